"""The sections of bench_gpu.py that ask a running server, over HTTP, with bench_serve.py as the client.

Each takes the bench (its arguments, ceilings, tables and the time left) and adds rows to its tables as it goes.
"""
import glob
import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

from gpu import cost, trace

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCH_CPU = importlib.util.spec_from_file_location("bench_cpu", os.path.join(ROOT, "tests", "bench", "run.py"))
bench_cpu = importlib.util.module_from_spec(BENCH_CPU)
BENCH_CPU.loader.exec_module(bench_cpu)


def library_path(bundle):
    """LD_LIBRARY_PATH for our programs alone, as scripts/check_gpu.sh has it: Python has libraries of its own."""
    places = [os.path.abspath(os.path.join(bundle, "lib")), "/usr/local/cuda/lib64", "/usr/local/cuda/extras/CUPTI/lib64"]
    try:
        import nvidia
        for root in nvidia.__path__:
            for name in ("libcublasLt.so*", "libcupti.so*"):
                places += sorted({os.path.dirname(f) for f in glob.glob(f"{root}/**/{name}", recursive=True)})
    except ImportError:
        pass
    return ":".join([*dict.fromkeys(places), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


class Served:
    """One gptd at a time, kept for the sections that want the same one."""

    def __init__(self, bench):
        self.bench, self.key, self.server = bench, None, None

    def start(self, model, *flags, env=None):
        """A server of the model with these flags: the one there is, if it is that one and alive."""
        key = (model, flags, tuple(sorted((env or {}).items())))
        if key == self.key and self.server.process.poll() is None:
            return self.server
        self.bench.attempt("the end of the server", self.stop)
        a = self.bench.arguments
        whole = {**os.environ, "LD_LIBRARY_PATH": library_path(a.bundle), **(env or {})}
        try:
            self.server = bench_cpu.Server(os.path.join(a.bundle, "gptd"), model, "--backend", a.backend, "--drain-delay", "0",
                                           *flags, *a.server_flags, env=whole, patience=self.bench.left())
        except SystemExit as error:
            raise RuntimeError(error) from None
        self.key = key
        return self.server

    def stop(self):
        """Lets it end by itself, so that what runs at its exit does run."""
        if not self.server:
            return
        self.key, server, self.server = None, self.server, None
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
            raise RuntimeError("gptd did not end within 20 s of SIGTERM") from None


def dummy_server(bench, model, context, n_seqs, *flags, env=None):
    return bench.served.start(
        model.path, "--load-format", "dummy", "--max-model-len", str(min(context, model.max_positions)),
        "--max-num-seqs", str(n_seqs), "--max-num-batched-tokens", str(max(bench.arguments.chunk, n_seqs)), *flags, env=env)


def main_server(bench, *flags, env=None):
    return dummy_server(bench, bench.model, 8192, max(256, *bench.arguments.streams), *flags, env=env)


def lengths(model, n_input, n_output):
    """Both halved until they fit the model: only for trying the script on a small one."""
    while n_input + n_output > model.max_positions:
        n_input, n_output = n_input // 2, max(2, n_output // 2)
    return n_input, n_output


def metrics(server):
    """{name: sum over labels} of /metrics"""
    values = {}
    for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", server.get("/metrics")[1].decode(), re.M):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def host_times(samples, streams):
    """{"host us", "launch us"} of a step: between samples of the metrics with all streams decoding and nothing else, by the
    counters of the engine's loop; None where there are none."""
    steps, spent = 0, {"host": 0.0, "launch": 0.0}
    for before, after in zip(samples, samples[1:]):
        decoding = all(s.get("gptd_num_requests_running") == streams for s in (before, after))
        if not decoding or before["gptd_prompt_tokens_total"] != after["gptd_prompt_tokens_total"]:
            continue
        steps += after["gptd_engine_steps_total"] - before["gptd_engine_steps_total"]
        for name in spent:
            counter = f"gptd_engine_{name}_seconds_total"
            spent[name] += after[counter] - before[counter]
    return {f"{name} us": 1e6 * spent[name] / steps if steps else None for name in spent}


class Samples:
    """The server's metrics, again and again, beside a load."""
    SECONDS = 0.1

    def __init__(self, server):
        self.server, self.taken, self.over = server, [], threading.Event()
        self.thread = threading.Thread(target=self.take, daemon=True)

    def take(self):
        while not self.over.wait(self.SECONDS):
            try:
                self.taken.append(metrics(self.server))
            except (OSError, http.client.HTTPException):
                pass  # the load's own failure says more

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(2)  # no longer for a server that hangs


def load(bench, server, model, streams, requests, n_input, n_output, warmup=1):
    """One run of bench_serve.py: its JSON of the run, with the engine's times while all streams decode."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "run.json")
        command = [sys.executable, os.path.join(ROOT, "scripts", "bench_serve.py"), "--url", f"http://127.0.0.1:{server.port}",
                   "--vocab", str(model.vocab_size), "--concurrency", str(streams), "--requests", str(requests),
                   "--input-len", str(n_input), "--output-len", str(n_output), "--warmup", str(warmup), "--json", path]
        with Samples(server) as samples:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=bench.left())
        if not os.path.exists(path):
            raise RuntimeError(f"bench_serve.py: {done.stdout.strip()[-300:]}")
        with open(path) as f:
            run = json.load(f)["runs"][0]
    if run["failed"]:
        raise RuntimeError(f"{run['failed']} of {run['n_requests']} requests failed: {json.dumps(run['failures'])[:300]}")
    return {**run, **host_times(samples.taken, streams)}


class Watch:
    """nvidia-smi beside a load: {name: mean}, empty where there is none."""
    FIELDS = {"utilization.gpu": "GPU %", "clocks.sm": "SM MHz", "power.draw": "W"}

    def __enter__(self):
        self.process = None
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "200", "-i", "0"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            pass
        return self

    def __exit__(self, *_):
        self.means = {}
        if self.process:
            self.process.terminate()
            self.means = watch_means(self.process.communicate()[0], list(self.FIELDS.values()))


def watch_means(text, names):
    """Of lines of comma-separated numbers, those while the GPU did anything (first column over 0)."""
    rows = []
    for line in text.splitlines():
        try:
            values = [float(x) for x in line.split(",")]
        except ValueError:
            continue
        if len(values) == len(names) and values[0] > 0:
            rows.append(values)
    return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))} if rows else {}


# ---- sections -------------------------------------------------------------------------------------------------------

def batch1_of(bench, server, model):
    n_input, n_output = lengths(model, 128, 256)
    with Watch() as watch:
        run = load(bench, server, model, 1, 2 if bench.arguments.quick else 4, n_input, n_output)
    tpot = run["tpot_ms"]["p50"] * 1e-3
    share = cost.bandwidth_share(bench.ceilings(), model, 1, n_input + n_output / 2, tpot)
    bench.add("batch1", model=model.name(), **{
        "in": n_input, "out": n_output, "decode tokens/s": 1 / tpot, "whole tokens/s": run["output_tokens_per_second"],
        "TTFT ms": run["ttft_ms"]["p50"], "TPOT ms": tpot * 1e3, "share of bandwidth": share,
        "host us": run["host us"], "launch us": run["launch us"], **watch.means})


def batch1(bench):
    batch1_of(bench, main_server(bench), bench.model)


def small(bench):
    batch1_of(bench, dummy_server(bench, bench.small, 8192, 16), bench.small)


def itl(bench):
    server, (n_input, n_output) = main_server(bench), lengths(bench.model, 128, 64 if bench.arguments.quick else 128)
    for streams in (1, 2, 4, 8, 16, 32):
        run = load(bench, server, bench.model, streams, streams, n_input, n_output)
        steady = run["steady_decode"]
        bench.add("itl", streams=streams, **{
            "in": n_input, "out": n_output, "TPOT ms p50": run["tpot_ms"]["p50"], "ITL ms p50": run["itl_ms"]["p50"],
            "ITL ms p99": run["itl_ms"]["p99"], "steady tokens/s": steady and steady["tokens_per_second"]})


def streams_of(bench, server, n, waves):
    model, (n_input, n_output) = bench.model, lengths(bench.model, 1024, 256)
    with Watch() as watch:
        run = load(bench, server, model, n, n * waves, n_input, n_output, warmup=min(n, 8))
    c, context, steady = bench.ceilings(), n_input + n_output / 2, run["steady_decode"]
    step = n / steady["tokens_per_second"] if steady else None
    roofline = cost.decode_roofline(c, model, n, context)
    whole = cost.run_roofline(c, model, n, waves, n_input, n_output, bench.arguments.chunk)
    bench.add("streams", streams=n, **{
        "requests": n * waves, "in": n_input, "out": n_output, "steady tokens/s": steady and steady["tokens_per_second"],
        "step ms": step and step * 1e3, "roofline step ms": roofline and roofline * 1e3,
        "steady share": cost.ratio(roofline, step), "share of bandwidth": cost.bandwidth_share(c, model, n, context, step),
        "whole s": run["wall_seconds"], "whole roofline s": whole, "whole share": cost.ratio(whole, run["wall_seconds"]),
        "whole tokens/s": run["output_tokens_per_second"], "TTFT ms p50": run["ttft_ms"]["p50"],
        "host us": run["host us"], "launch us": run["launch us"], "generator cores": run["generator"]["share_of_a_core"],
        "its busiest": run["generator"]["busiest_process_share"], **watch.means})


def streams(bench):
    server = main_server(bench)
    for n in bench.arguments.streams:
        bench.attempt(f"{n} streams", streams_of, bench, server, n, 1 if bench.arguments.quick else 2)


class Shapes:
    """What `load` wants to know of a checkpoint of any family."""

    def __init__(self, path):
        self.path = path
        self.token_bytes, self.vocab_size, self.max_positions = cost.family_token_bytes(path)


def family(bench, path):
    shapes, name = Shapes(path), os.path.basename(path)
    server = dummy_server(bench, shapes, 2048, 64)
    run = load(bench, server, shapes, 1, 2, 128, 128)
    tpot = run["tpot_ms"]["p50"] * 1e-3
    many = load(bench, server, shapes, 64, 64, 128, 128, warmup=8)["steady_decode"]
    bandwidth = bench.ceilings().bandwidth
    bench.add("families", model=name, **{
        "GB a token": shapes.token_bytes / 1e9, "tokens/s": 1 / tpot, "TTFT ms": run["ttft_ms"]["p50"],
        "share of bandwidth": bandwidth and shapes.token_bytes / tpot / bandwidth,
        "64 streams tokens/s": many and many["tokens_per_second"]})


def families(bench):
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "bench", "models", "*"))):
        bench.attempt(os.path.basename(path), family, bench, path)


def deterministic(bench):
    """What answers that are the same whatever else is served cost: beside the streams of this run, or its batch 1."""
    server = main_server(bench, "--deterministic")
    cases = [(1, "batch1", "decode tokens/s"), *((n, "streams", "steady tokens/s") for n in bench.arguments.streams[:1])]
    for n, table, column in cases:
        n_input, n_output = lengths(bench.model, 128 if table == "batch1" else 1024, 256)
        run = load(bench, server, bench.model, n, n, n_input, n_output, warmup=min(n, 8))
        steady = run["steady_decode"] and run["steady_decode"]["tokens_per_second"]
        rate = 1e3 / run["tpot_ms"]["p50"] if table == "batch1" else steady
        free = next((r[column] for r in bench.tables.get(table, []) if r.get("streams", 1) == n), None)
        bench.add("deterministic", streams=n, **{"in": n_input, "out": n_output, "tokens/s": rate, "without": free,
                                                 "share": cost.ratio(rate, free)})


def ttft_of(bench, server, length):
    model = bench.model
    n = 3 if length <= 8192 else 2 if length <= 32768 else 1
    run = load(bench, server, model, 1, n, length, 1, warmup=1 if length <= 8192 else 0)
    measured = run["ttft_ms"]["p50"] * 1e-3
    floor = cost.prefill_roofline(bench.ceilings(), model, 1, length, bench.arguments.chunk)
    bench.add("ttft", tokens=length, requests=n, **{
        "TTFT s": measured, "floor s": floor, "times the floor": cost.ratio(measured, floor),
        "prefix hits": run["prefix_cache_hit_tokens"], "tokens/s": length / measured})


def ttft(bench):
    server = dummy_server(bench, bench.model, bench.model.max_positions, 8)
    for length in bench.model.prompt_lengths(bench.arguments.quick):
        bench.attempt(f"{length} tokens", ttft_of, bench, server, length)


def traced(bench, start, cases, **env):
    """[(streams, run, records)] of loads of a server that is traced. start(environment) gives it and its model; cases:
    (streams, (tokens in, tokens out))."""
    library = os.path.abspath(os.path.join(bench.arguments.bundle, "libgptd_trace.so"))
    if not os.path.exists(library):
        raise RuntimeError(f"{library} is not there (make gpu-bundle)")
    with tempfile.TemporaryDirectory() as directory:
        path, runs = os.path.join(directory, "trace"), []
        server, model = start({"CUDA_INJECTION64_PATH": library, "GPU_TRACE": path, **env})
        for n, (n_input, n_output) in cases:
            time.sleep(1.5)  # parts the loads in the trace
            runs.append(load(bench, server, model, n, n, n_input, n_output, warmup=0))
        bench.served.stop()
        if not os.path.exists(path):
            raise RuntimeError("the driver did not load libgptd_trace.so, or CUPTI gave nothing (its message is above)")
        with open(path, errors="replace") as f:
            parts = trace.loads(trace.parse(f))[-len(cases):]
    if len(parts) < len(cases):
        raise RuntimeError("the trace has too little in it")
    return [(n, run, part) for (n, _), run, part in zip(cases, runs, parts)]


def window_of(run):
    """Seconds at the end of a run in which all of it decodes."""
    return 0.6 * (run["output_tokens"] / run["n_requests"] - 1) * run["tpot_ms"]["p50"] * 1e-3


def idle(bench):
    """Gaps between decode steps: one stream, then 64."""
    cases = [(1, lengths(bench.model, 128, 256)), (min(64, *bench.arguments.streams), lengths(bench.model, 128, 128))]
    for n, run, part in traced(bench, lambda env: (main_server(bench, env=env), bench.model), cases):
        bench.add("idle", streams=n, **{"traced TPOT ms": run["tpot_ms"]["p50"], **trace.idle(part, window_of(run))})


def kernels(bench):
    """Where a decode step of one stream goes, with every kernel traced, which costs some."""
    def of_model(model):
        def started(env):
            return dummy_server(bench, model, 8192, 16, env=env), model
        for _, run, part in traced(bench, started, [(1, lengths(model, 128, 256))], GPU_TRACE_NODES="1"):
            for row in trace.kernels(part, window_of(run)):
                bench.add("kernels", model=model.name(), **{"traced TPOT ms": run["tpot_ms"]["p50"], **row})
    for model in (bench.model, bench.small):
        bench.attempt(model.name(), of_model, model)


def start(bench):
    a = bench.arguments
    context = str(min(8192, bench.model.max_positions))
    for path, flags in ((a.demo, ()), (bench.model.path, ("--load-format", "dummy", "--max-model-len", context))):
        for attempt in ("first", "second"):
            bench.served.stop()  # else the one that runs would do
            server = bench.served.start(path, *flags)
            values = metrics(server)
            bench.add("start", what=f"{os.path.basename(os.path.normpath(path))}, {attempt}",
                      **{"exec to ready, s": server.startup,
                         **{f"{part} s": values.get(f"gptd_start_{part}_seconds") for part in ("device", "weights", "warm_up")},
                         "warm_up MB": values.get("gptd_start_warm_up_bytes", 0) / 1e6, "resident MB": (server.rss() or 0) / 1e6})
    bench.served.stop()


def sizes(bench):
    for name in ("gptd", "libgptd_cuda.so"):
        path = os.path.join(bench.arguments.bundle, name)
        if os.path.exists(path):
            bench.add("sizes", file=name, MB=os.path.getsize(path) / 1e6)
