#!/usr/bin/env python3
"""`make bench`: every figure the README quotes, measured now on this machine.

Runs the kernel and model benchmarks, then the server with the demo checkpoint: start-up, idle CPU, memory, concurrent
streams. Prints a table and writes all of it as JSON to build/bench.json. No assertion depends on time.
"""
import argparse
import http.client
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """gptd on a free port; `startup` is the time from exec to the first 200 of /ready, in seconds."""

    def __init__(self, binary, model, *flags, env=None, patience=60):
        self.port = free_port()
        command = [binary, "--model", model, "--port", str(self.port), "--log-level", "warning", *flags]
        begin = time.monotonic()
        self.process = subprocess.Popen(command, env=env)
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() - begin > patience:
                self.process.kill()
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.001)
        self.startup = time.monotonic() - begin

    def ready(self):
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        self.process.send_signal(signal.SIGTERM)  # the second one does not wait for the drain
        self.process.wait(30)


def stream(port, body, times):
    """One streamed completion. Appends its time to the first token in seconds; None if it did not end with [DONE]."""
    begin = time.monotonic()
    first, done = None, False
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b'data: {"error"'):
                break
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begin
            done = done or line.startswith(b"data: [DONE]")
        connection.close()
    except OSError as error:
        print(f"a stream failed: {error}")
    finally:
        times.append(first if done else None)


def concurrent_streams(server, n, max_tokens):
    times = []
    body = {"model": "demo", "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    threads = [threading.Thread(target=stream, args=(server.port, {**body, "prompt": f"Once upon a time number {i}"},
                                                     times)) for i in range(n)]
    begin = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return times, time.monotonic() - begin


def percentile(values, p):
    return sorted(values)[min(len(values) - 1, int(p / 100 * len(values)))]


def bench_server(binary, model, results):
    starts = []
    for _ in range(11):
        server = Server(binary, model)
        starts.append(server.startup)
        server.stop()
    results["startup_seconds"] = statistics.median(starts)
    print(f"exec to ready                      {statistics.median(starts) * 1e3:9.0f} ms (median of 11; "
          f"worst {max(starts) * 1e3:.0f})")

    server = Server(binary, model)
    before = server.cpu_seconds()
    time.sleep(5)
    results["idle_cpu_share"] = (server.cpu_seconds() - before) / 5
    print(f"idle CPU                           {results['idle_cpu_share'] * 100:9.1f} % of a core")
    first, _ = concurrent_streams(server, 1, 64)  # touches memory for the first time
    print(f"first request after the start      {first[0] * 1e3:9.0f} ms to its first token")
    results["ttft_first_request"] = first[0]
    for n in (1, 64, 500):
        times, wall = concurrent_streams(server, n, 64)
        first = [t for t in times if t is not None]
        failed = n - len(first)
        tokens = 64 * (n - failed)
        results[f"streams_{n}"] = {"tokens_per_second": tokens / wall, "failed": failed,
                                   "ttft_p50": percentile(first, 50), "ttft_p99": percentile(first, 99)}
        print(f"{n:4} streams of 64 tokens            {tokens / wall:9.0f} tok/s, first token p50 "
              f"{percentile(first, 50) * 1e3:.0f} ms, p99 {percentile(first, 99) * 1e3:.0f} ms, {failed} failed")
    server.stop()
    bench_memory(binary, model, results)
    with tempfile.TemporaryDirectory() as folder:
        stripped = pathlib.Path(folder) / "gptd"
        subprocess.run(["strip", "-o", stripped, binary], check=True)
        results["program_bytes"] = stripped.stat().st_size
    print(f"program, stripped                  {results['program_bytes'] / 2**20:9.1f} MiB")


def bench_memory(binary, model, results):
    """Resident memory beyond weights and KV cache, with a cache small enough that all of it has been written to."""
    flags = ["--kv-cache-memory-bytes", "32M"]
    plan = json.loads(subprocess.run([binary, "--model", model, "--dry-run", "--log-format", "json", *flags], check=True,
                                     capture_output=True, text=True).stdout.strip().splitlines()[-1])
    server = Server(binary, model, *flags)
    concurrent_streams(server, 200, 256)
    planned = plan["weights_bytes"] + plan["kv_cache_bytes"]
    results["rss_bytes"], results["planned_bytes"] = server.rss(), planned
    print(f"resident memory after 200 streams  {server.rss() / 2**20:9.1f} MiB, weights + KV {planned / 2**20:.1f} MiB: "
          f"{(server.rss() - planned) / 2**20:.1f} MiB more")
    server.stop()


def run_and_show(program):
    """Runs a benchmark, printing its table as it comes. Returns the table's lines."""
    lines = []
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode != 0:
        raise SystemExit(f"{program} ended with {process.returncode}")
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", default="build")
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--out", default="build/bench.json")
    parser.add_argument("--server-only", action="store_true")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    results = {"date": time.strftime("%Y-%m-%d"), "cpu": next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()}
    print(f"{results['cpu']}, {results['cores']} cores, commit {results['commit']}, {results['date']}\n")
    for name in [] if arguments.server_only else ["bench_cpu", "bench_attention", "bench_model", "bench_engine"]:
        print(f"-- {name}", flush=True)
        results[name] = run_and_show(f"{arguments.build}/tests/bench/{name}")
        print()
    print("-- server, models/demo")
    bench_server(f"{arguments.build}/gptd", arguments.model, results)
    pathlib.Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
