//! Times the metadata builders, on the host.
//!
//! They run once per request, before anything is launched: tens of microseconds at the size of a large batch.

use std::hint::black_box;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use varlen_fa::{KeyMask, KeyRanges, RangesOf, Run, VarlenMeta};
use varlen_fa_testkit::{Workload, WorkloadKind};

use crate::report::Report;
use crate::sizes::Sizes;
use crate::times::{Times, milliseconds};

/// A joint sequence of text and image, lengths of a padded batch, and the worst case for runs; all B = 8, S = 4352.
const WORKLOADS: [(&str, &str); 3] = [
    ("joint", "joint:text=256:image=4096:valid=12,37,80,211,256,5,150,64"),
    ("lengths", "prefix:len=4352:valid=544,1088,1632,2176,2720,3264,3808,4352"),
    ("random p=0.5", "random:len=4352:p=0.5:batch=8"),
];

/// Time what a request spends on the host: building a key mask, its metadata, and ranges of keys.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Calls of each row, after as many to warm up [default: 1000]
    #[arg(long, value_name = "N")]
    reps: Option<NonZeroUsize>,
    /// Also write one JSON object a line to FILE; `-` is standard output, and the text then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it and writes the report.
pub fn run(arguments: &Arguments, sizes: Sizes) -> Result<()> {
    let default = if sizes == Sizes::Smoke { 1 } else { 1000 };
    let calls = arguments.reps.map_or(default, NonZeroUsize::get);
    let mut report = Report::new(arguments.json.as_deref())?;
    let [median, min, max] = ["median µs", "min µs", "max µs"];
    writeln!(report.text, "{:<14} {:<29} {median:>8} {min:>10} {max:>10}   {calls} calls", "B 8, S 4352", "")?;

    for (name, spec) in WORKLOADS {
        let workload = Workload::parse(spec)?;
        let (batch, seq, keep) = (workload.batch, workload.seq, workload.mask.as_slice());
        let mask = KeyMask::from_bool(batch, seq, keep)?;
        let integers: Vec<i64> = keep.iter().map(|&keep| i64::from(keep)).collect();
        let runs: Vec<Vec<_>> = (0..batch).map(|row| mask.runs(row).map(Run::range).collect()).collect();
        let lengths = workload.row_lengths();

        let mut row = |call, times| write_row(&mut report, Record::new(name, call, [batch, seq], times));
        row("KeyMask::from_bool", time(calls, || KeyMask::from_bool(batch, seq, black_box(keep)))?)?;
        row("KeyMask::from_integers", time(calls, || KeyMask::from_integers(batch, seq, black_box(&integers)))?)?;
        row("KeyMask::from_runs", time(calls, || KeyMask::from_runs(seq, black_box(&runs)))?)?;
        if matches!(workload.kind, WorkloadKind::Prefix { .. }) {
            row("KeyMask::from_lengths", time(calls, || KeyMask::from_lengths(seq, black_box(&lengths)))?)?;
        }
        row("VarlenMeta::from_key_mask", time(calls, || VarlenMeta::from_key_mask(black_box(&mask)))?)?;
    }
    time_ranges(&mut report, calls)
}

/// Documents of 1 to 200 tokens, with a masked token between some.
fn document_ids([batch, seq]: [usize; 2]) -> Vec<u32> {
    let mut ids = Vec::with_capacity(batch * seq);
    let (mut id, mut length) = (0, 0);
    while ids.len() < batch * seq {
        id += 1;
        length = (length * 37 + 11) % 200;
        let number = if id % 5 == 0 { 0 } else { id };
        ids.extend(std::iter::repeat_n(number, if number == 0 { 1 } else { length + 1 }));
    }
    // The last document of a row goes on in the next, as another one of the same number.
    ids.truncate(batch * seq);
    ids
}

fn time_ranges(report: &mut Report, calls: usize) -> Result<()> {
    let [batch, seq] = [8, 4352];
    let of = RangesOf::from([batch, seq, seq]);
    let causal = KeyRanges::causal(of.clone())?;
    let local = KeyRanges::window(of.clone(), Some(64), Some(64))?;
    let own: Vec<[usize; 2]> = (0..batch * seq).map(|at| [at % 7 * 300, at % seq / 2 + 2100]).collect();
    let ids = document_ids([batch, seq]);
    let ones: Vec<u32> = (1..=(batch * seq) as u32).collect();
    // The worst to be told apart: after every four documents of one token, one of two.
    let mixed: Vec<u32> = (0..(batch * seq) as u32).map(|at| at - at / 6 - u32::from(at % 6 == 5) + 1).collect();
    let documents = KeyRanges::from_document_ids(batch, seq, &ids)?;

    let mut row = |name, call, times| write_row(report, Record::new(name, call, [batch, seq], times));
    row("ranges", "KeyRanges::causal", time(calls, || KeyRanges::causal(black_box(&of).clone()))?)?;
    let window = || KeyRanges::window(black_box(&of).clone(), Some(64), Some(64));
    row("ranges", "KeyRanges::window", time(calls, window)?)?;
    row("ranges", "KeyRanges::prefix", time(calls, || KeyRanges::prefix(black_box(&of).clone(), 577))?)?;
    row("ranges", "KeyRanges::from_ranges", time(calls, || KeyRanges::from_ranges(of.clone(), black_box(&own)))?)?;
    for (name, ids) in [("documents", &ids), ("single tokens", &ones), ("1 or 2 tokens", &mixed)] {
        let ranges = || KeyRanges::from_document_ids(batch, seq, black_box(ids));
        row(name, "KeyRanges::from_document_ids", time(calls, ranges)?)?;
        let meta = || VarlenMeta::from_document_ids(batch, seq, black_box(ids));
        row(name, "VarlenMeta::from_document_ids", time(calls, meta)?)?;
    }
    row("shared", "KeyRanges::intersect", time(calls, || black_box(&causal).intersect(&local))?)?;
    row("own", "KeyRanges::intersect", time(calls, || black_box(&documents).intersect(&documents))?)?;
    row("own, shared", "KeyRanges::intersect", time(calls, || black_box(&documents).intersect(&local))?)
}

/// Times each call alone. What it makes is dropped outside the time, since a request keeps it.
fn time<R>(calls: usize, call: impl Fn() -> varlen_fa::Result<R>) -> Result<Times> {
    let mut timings = Vec::with_capacity(calls);
    for index in 0..2 * calls {
        let start = Instant::now();
        let made = call();
        let elapsed = start.elapsed();
        drop(black_box(made?));
        // The first half warms up.
        if index >= calls {
            timings.push(elapsed);
        }
    }
    Ok(Times::of(timings))
}

/// One JSON line.
#[derive(Debug, Serialize)]
struct Record {
    mask: &'static str,
    call: &'static str,
    batch: usize,
    seq: usize,
    median_us: f64,
    min_us: f64,
    max_us: f64,
}

impl Record {
    fn new(mask: &'static str, call: &'static str, [batch, seq]: [usize; 2], times: Times) -> Self {
        let [median_us, min_us, max_us] =
            [times.median, times.min, times.max].map(|duration| 1e3 * milliseconds(duration));
        Self { mask, call, batch, seq, median_us, min_us, max_us }
    }
}

fn write_row(report: &mut Report, record: Record) -> Result<()> {
    let Record { mask, call, median_us, min_us, max_us, .. } = record;
    writeln!(report.text, "{mask:<14} {call:<29} {median_us:>8.2} {min_us:>10.2} {max_us:>10.2}")?;
    report.json(&record)
}
