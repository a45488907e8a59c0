#!/usr/bin/env python3
"""Opens the page of examples/web in headless Chromium, on WebGPU, and fails unless everything in it is right.

    test_page.py [--page target/web/page] [--chromium chromium] [--screenshot FILE.png] [--timeout SECONDS]

Serves the folder that `cargo xtask-web` wrote on a free port of localhost and waits for what the page posts back. A failed
check, an error of the page, anything on its console that is not known to be harmless, and silence are failures.
"""

import argparse
import functools
import http.server
import json
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1100,860",
]
# A software adapter, so that any machine will do.
WEBGPU_FLAGS = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]

# What Chromium says on the console of any page that uses WebGPU so.
HARMLESS = ["WebGPU is experimental on this platform"]
CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] "(.*)')


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder, takes the result, and answers /done only then: Chromium takes a picture once all of a page has come."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wasm": "application/wasm", ".js": "text/javascript"}

    def __init__(self, *arguments, results, done, **keywords):
        self.results, self.done = results, done
        super().__init__(*arguments, **keywords)

    def do_GET(self):
        if self.path != "/done":
            return super().do_GET()
        self.done.wait()
        self.send_response(204)
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.results.put(json.loads(body))
        self.done.set()

    def log_message(self, *_):
        pass


def serve(page, results):
    handler = functools.partial(Handler, directory=str(page), results=results, done=threading.Event())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


class Browser:
    """A headless Chromium with a profile of its own, and what it printed."""

    def __init__(self, chromium, flags, url):
        # Helper processes of the browser may outlive it for a moment and write there.
        self.profile = tempfile.TemporaryDirectory(prefix="varlen-fa-page-", ignore_cleanup_errors=True)
        command = [chromium, *FLAGS, *flags, f"--user-data-dir={self.profile.name}", url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        self.lines = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(5)
        self.profile.cleanup()

    def console(self):
        said = [match[1] for match in map(CONSOLE.search, self.lines) if match]
        return [text for text in said if not any(harmless in text for harmless in HARMLESS)]


def failures_of(result):
    """Prints a result; gives what is wrong with it."""
    if "error" in result:
        return [f"the page failed: {result['error']}"]
    wrong = []

    def show(where, checks):
        if not checks:
            wrong.append(f"{where}: nothing was checked")
        for check in checks:
            print(f"  {'ok   ' if check['ok'] else 'WRONG'} {check['name']}: {check['found']}")
            if not check["ok"]:
                wrong.append(f"{where}: {check['name']}: {check['found']}")

    print(f"adapter: {result['adapter']}")
    for report in result["reports"]:
        varlen, dense = report["varlen"], report["dense"]
        clock = "timestamps" if report["by_device"] else "the page's clock"
        print(f"{report['dtype']} {report['workload']}")
        print(f"  {varlen['path']} by {varlen['kernel']} {varlen['milliseconds']:.2f} ms, dense {dense['milliseconds']:.2f} ms, by {clock}")
        show(report["dtype"], report["checks"])
    if {report["dtype"] for report in result["reports"]} != {"f32", "f16", "bf16"}:
        wrong.append("not every element type was run")
    print("what only a browser does")
    show("self-test", result["selftest"])
    return wrong


def result_of(arguments, flags, url, results):
    """Opens the page in its test mode; gives what it posts, or what went wrong, and the browser."""
    browser = Browser(arguments.chromium, flags, f"{url}/?test")
    try:
        deadline = time.monotonic() + arguments.timeout
        while time.monotonic() < deadline:
            try:
                result = results.get(timeout=1)
                if any(flag.startswith("--screenshot") for flag in flags):
                    # It ends by itself once it has taken the picture.
                    browser.process.wait(60)
                return result, browser
            except queue.Empty:
                if browser.process.poll() is not None:
                    return {"error": f"Chromium ended by itself with status {browser.process.returncode}"}, browser
        return {"error": f"no result within {arguments.timeout} s"}, browser
    finally:
        browser.close()


def check_page(arguments, url, results):
    """The page with all its checks."""
    flags = [f"--screenshot={arguments.screenshot.resolve()}"] if arguments.screenshot else []
    result, browser = result_of(arguments, [*WEBGPU_FLAGS, *flags], url, results)
    wrong = failures_of(result) + [f"on the console: {text}" for text in browser.console()]
    if wrong:
        print("\n".join(browser.lines[-40:]), file=sys.stderr)
    return wrong


def check_without_webgpu(arguments, url, results):
    """What the page says where it cannot compute: no adapter, and no WebGPU at all, as on pages that are not from localhost."""
    port = url.rsplit(":", 1)[1]
    wrong = []
    for where, flags, address, expected in [
        ("without an adapter", ["--disable-gpu", "--disable-software-rasterizer"], url, "no adapter"),
        ("without WebGPU", ["--host-resolver-rules=MAP page.test 127.0.0.1"], f"http://page.test:{port}", "browsers give WebGPU only"),
    ]:
        result, _ = result_of(arguments, flags, address, results)
        said = result.get("error", "nothing of it")
        print(f"{where} the page says: {said.splitlines()[0]}")
        if expected not in said:
            wrong.append(f"{where} the page does not say so")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=pathlib.Path, default=pathlib.Path("target/web/page"))
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--timeout", type=float, default=240)
    arguments = parser.parse_args()
    if not (arguments.page / "index.html").is_file():
        sys.exit(f"error: no page in {arguments.page}: `cargo xtask-web` builds it")

    results = queue.Queue()
    server, url = serve(arguments.page, results)
    wrong = check_page(arguments, url, results) + check_without_webgpu(arguments, url, results)
    server.shutdown()
    for failure in wrong:
        print(f"error: {failure}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
