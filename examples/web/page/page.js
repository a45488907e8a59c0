// Loads the wasm, runs what the form says, and shows the report. With ?test in the address it runs every element type and the
// self-test without being asked, and posts what came to /result, for scripts/web/test_page.py.

import init, { run, selftest } from './masked_attention_web.js';

const at = (id) => document.getElementById(id);
const isTest = new URLSearchParams(location.search).has('test');

function say(text, kind = '') {
  at('status').textContent = text;
  at('status').className = kind;
}

// Browsers tell the library little of the adapter; the page may ask itself.
async function adapterName() {
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' });
  if (!adapter) throw new Error('this browser has WebGPU, but no adapter for it on this machine');
  const { vendor, architecture, device, description } = adapter.info;
  return [...new Set([vendor, architecture, device, description])].filter(Boolean).join(' ') || 'not told by the browser';
}

function row(body, name, value, mark) {
  const line = body.insertRow();
  line.appendChild(Object.assign(document.createElement('th'), { textContent: name, scope: 'row' }));
  line.insertCell().textContent = value;
  if (mark !== undefined) {
    Object.assign(line.insertCell(), { textContent: mark ? 'ok' : 'wrong', className: mark ? 'mark' : 'mark bad' });
  }
}

// One strip of the mask and one of the output for each batch row.
function draw({ shape: [batch, seq], text, runs, magnitude }) {
  const [left, width, mask, output, step] = [64, 960, 14, 10, 36];
  const picture = at('picture');
  picture.replaceChildren();
  picture.setAttribute('viewBox', `0 0 ${left + width} ${batch * step}`);
  const add = (name, attributes) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return picture.appendChild(element);
  };
  const x = (token) => left + (token * width) / seq;
  const strip = (kind, start, end, y) =>
    start < end && add('rect', { class: kind, x: x(start), y, width: x(end) - x(start), height: mask });
  const most = Math.max(...magnitude.flat()) || 1;
  for (let b = 0; b < batch; b++) {
    const y = b * step;
    add('text', { x: 0, y: y + 12 }).textContent = `row ${b}`;
    strip('masked', 0, seq, y);
    for (const [start, end] of runs[b]) {
      strip('text', start, Math.min(end, text ?? 0), y);
      strip('image', Math.max(start, text ?? 0), end, y);
    }
    add('rect', { x: left, y: y + mask + 2, width, height: output, fill: '#fff', stroke: '#dfe3ea' });
    magnitude[b].forEach((value, token) => {
      if (value > 0) {
        const opacity = (0.15 + 0.85 * (value / most)).toFixed(3);
        add('rect', { x: x(token), y: y + mask + 2, width: width / seq, height: output, fill: '#1b6b5a', opacity });
      }
    });
  }
  at('image-label').textContent = text === null ? 'valid' : 'valid image';
}

function show(report, adapter) {
  const [batch, seq, heads, dim] = report.shape;
  const tokens = batch * seq;
  const { varlen, dense, by_device: byDevice } = report;
  draw(report);
  const facts = at('facts');
  facts.replaceChildren();
  row(facts, 'adapter', adapter);
  row(facts, 'tensors', `${report.dtype} [${batch}, ${seq}, ${heads}, ${dim}]`);
  row(facts, 'valid', `${report.valid} of ${tokens} tokens, ${(100 * report.valid_pairs).toFixed(1)}% of the pairs`);
  row(facts, 'path, kernel', `${varlen.path} by ${varlen.kernel}`);
  row(facts, 'why', varlen.reason);
  row(facts, 'varlen', `${varlen.milliseconds.toFixed(2)} ms`);
  row(facts, 'dense', `${dense.milliseconds.toFixed(2)} ms, ${dense.path} by ${dense.kernel}`);
  row(facts, 'speed-up', `${(dense.milliseconds / varlen.milliseconds).toFixed(2)}×`);
  row(facts, 'measured by', byDevice ? 'the adapter’s timestamps' : 'the page’s clock');
  const checks = at('checks');
  checks.replaceChildren();
  for (const { name, found, ok } of report.checks) row(checks, name, found, ok);
  at('result').hidden = false;
  const right = report.checks.every((check) => check.ok);
  say(right ? 'done, and right' : 'done, and wrong', right ? 'good' : 'bad');
}

async function runForm(adapter) {
  at('go').disabled = true;
  say('running');
  try {
    const report = JSON.parse(await run(at('workload').value, at('dtype').value));
    show(report, adapter);
    return report;
  } finally {
    at('go').disabled = false;
  }
}

async function main() {
  // Part of the page until the result is there.
  if (isTest) document.body.append(Object.assign(new Image(), { src: '/done', hidden: true }));
  if (!navigator.gpu) {
    at('go').disabled = true;
    throw new Error(
      isSecureContext
        ? 'this browser has no WebGPU: nothing can be computed here'
        : 'browsers give WebGPU only to pages from https or localhost, and this one is neither',
    );
  }
  const adapter = await adapterName();
  await init();
  at('form').addEventListener('submit', (event) => {
    event.preventDefault();
    runForm(adapter).catch(fail);
  });
  if (!isTest) return runForm(adapter);
  const reports = [];
  for (const dtype of ['bf16', 'f16', 'f32']) {
    at('dtype').value = dtype;
    reports.push(await runForm(adapter));
  }
  return post({ adapter, reports, selftest: JSON.parse(await selftest()) });
}

function post(result) {
  return fetch('/result', { method: 'POST', body: JSON.stringify(result) });
}

function fail(error) {
  say(error?.message ?? String(error), 'bad');
  if (isTest) post({ error: String(error?.stack ?? error) });
}

main().catch(fail);
