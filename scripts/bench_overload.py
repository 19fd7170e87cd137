#!/usr/bin/env python3
"""What a server gives when it is asked for more than it can: an open loop (Poisson) at multiples of its measured capacity.

    python3 scripts/bench_overload.py                                   the demo model on one core, some 5 minutes
    python3 scripts/bench_overload.py --short                           a minute and a half
    python3 scripts/bench_overload.py --bundle build/gpu --backend cuda --model tests/bench/models/llama-3.2-1b --dummy \\
        --max-num-seqs 256 --processes 8                                on a GPU machine
    python3 scripts/bench_overload.py --url http://127.0.0.1:8000       a server that runs already

First the capacity: a closed loop with a few more streams than the server runs at once. Then each multiple of it with clients
that obey Retry-After (as OpenAI's do, but until the run ends), and with clients that leave when they are refused. Prompts are
random ids of mixed lengths, so are answers.

Tokens per second of the server's CPU are beside those of time: on a shared machine they are what can be compared.
Goodput counts what ended within the run, but for its first seconds: requests and their tokens per second. TTFT is of
requests that were let in, from the sending of the try that was. It should be bounded by --queue-timeout and the time that
prompt takes beside all others; at the highest multiple goodput should be within a tenth of its peak.

Exit status: 0 if both hold, 1 if not.
"""
import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
import types

from bench_load import START_DELAY, Answer, Client, Failure, Target
from bench_report import percentile
from bench_serve import first_model, vocabulary_size
from gpu.serving import bench_cpu, library_path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPTS = {32: 5, 128: 3, 400: 2}  # length: weight
ANSWERS = (16, 112)                # tokens, evenly between
WARM = 0.2                         # of a run: not counted


# ---- one process of clients ----

class Clients(Client):
    def __init__(self, plan):
        super().__init__(plan)
        self.plan, self.draw = plan, random.Random(f"{plan.seed} {plan.run} {plan.process}")

    def request(self):
        n = self.draw.choices(list(PROMPTS), PROMPTS.values())[0]
        body = {"model": self.plan.model, "prompt": self.draw.choices(range(self.plan.vocab), k=n), "temperature": 0,
                "max_tokens": self.draw.randint(*ANSWERS), "ignore_eos": True, "stream": True}
        return self.plan.target.completion_bytes(body, True), body["max_tokens"]

    async def attempt(self, data):
        """One try: (status, or what failed; seconds of Retry-After; times of its chunks)."""
        answer, connection = Answer([]), None
        try:
            connection = await self.acquire()
            await connection.exchange(data, answer, self.plan.timeout)
        except asyncio.TimeoutError:
            return "timeout", 0, answer.chunks
        except Failure as failure:
            return failure.args[0], 0, answer.chunks
        finally:
            if connection:
                self.release(connection)
        if answer.status == 200 and not answer.done:
            return "no [DONE]", 0, answer.chunks
        return answer.status, int(answer.headers.get("retry-after", 0)), answer.chunks

    async def ask(self, end):
        """A request until it is answered, or its client gives up: at the latest at the end of the run."""
        data, n_tokens = self.request()
        record = {"begin": time.monotonic(), "tries": 0, "outcomes": [], "tokens": n_tokens, "ttft": None, "end": None}
        while True:
            begin = time.monotonic()
            status, wait, chunks = await self.attempt(data)
            record["tries"] += 1
            record["outcomes"].append(status)
            if status == 200:
                record["ttft"], record["end"] = chunks[0] - begin, time.monotonic()
            if status not in (429, 503) or not self.plan.obey or time.monotonic() + wait >= end:
                return record
            await asyncio.sleep(wait)


async def open_loop(plan, begin):
    clients, end, tasks = Clients(plan), begin + plan.seconds, []
    at, late = begin, 0.0
    while (at := at + clients.draw.expovariate(plan.rate)) < end:
        await asyncio.sleep(at - time.monotonic())
        late = max(late, time.monotonic() - at)
        tasks.append(asyncio.create_task(clients.ask(end)))
    return [*await asyncio.gather(*tasks)], late


async def closed_loop(plan, begin):
    clients, end, records = Clients(plan), begin + plan.seconds, []

    async def stream():
        while time.monotonic() < end:
            records.append(await clients.ask(end))
    await asyncio.sleep(begin - time.monotonic())
    await asyncio.gather(*(stream() for _ in range(plan.streams)))
    return records, 0.0


def process_main(plan, pipe):
    pipe.send("ready")
    begin = pipe.recv()
    cpu = time.process_time()
    records, late = asyncio.run((closed_loop if plan.streams else open_loop)(plan, begin))
    pipe.send((records, late, time.process_time() - cpu))


# ---- a run ----

class Bench:
    def __init__(self, arguments, target, server):
        self.arguments, self.target, self.server, self.n_runs = arguments, target, server, 0
        self.model = first_model(target)
        self.vocab = vocabulary_size(target, self.model)

    def metrics(self):
        lines = [line.rsplit(" ", 1) for line in self.target.ask("GET", "/metrics")[1].decode().splitlines()]
        return {name: float(value) for name, value in lines if not name.startswith("#")}

    def generated(self):
        return sum(v for k, v in self.metrics().items() if k.startswith("gptd_generation_tokens_total"))

    def wait_idle(self):
        def busy():
            return sum(v for k, v in self.metrics().items() if k.startswith(("gptd_num_requests_running", "gptd_num_requests_w")))
        while busy():
            time.sleep(0.05)

    def run(self, seconds, rate=0.0, streams=0, obey=False):
        """Summary of one run; rate: requests/s over all processes; streams: of a closed loop."""
        a = self.arguments
        self.n_runs += 1
        n = min(a.processes, streams or a.processes)
        workers = []
        for i in range(n):
            plan = types.SimpleNamespace(target=self.target, model=self.model, vocab=self.vocab, seed=a.seed, run=self.n_runs,
                                         process=i, seconds=seconds, rate=rate / n, obey=obey, timeout=600, keep_alive=True,
                                         streams=streams // n + (i < streams % n))
            ours, theirs = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=process_main, args=(plan, theirs), daemon=True)
            worker.start()
            theirs.close()
            workers.append((worker, ours))
        for _, pipe in workers:
            pipe.recv()
        begin = time.monotonic() + START_DELAY
        for _, pipe in workers:
            pipe.send(begin)
        tokens, server_cpu = self.generated(), self.server.cpu_seconds() if self.server else 0
        results = [pipe.recv() for _, pipe in workers]
        for worker, _ in workers:
            worker.join()
        self.wait_idle()
        server_cpu = self.server.cpu_seconds() - server_cpu if self.server else 0
        records = [r for result in results for r in result[0]]
        row = summarize(records, begin + WARM * seconds, begin + seconds, a.slo)
        return {**row, "rate": rate or len(records) / seconds, "late": max(r[1] for r in results),
                "cpu": sum(r[2] for r in results) / seconds,
                "by_cpu": (self.generated() - tokens) / server_cpu if server_cpu else None}


def summarize(records, begin, end, slo):
    seconds = end - begin
    ended = [r for r in records if r["end"] and begin <= r["end"] < end]
    let_in = [r for r in records if r["ttft"] is not None]
    ttft = sorted(r["ttft"] for r in let_in)
    outcomes = [o for r in records for o in r["outcomes"]]
    return {"requests": len(records), "good": len(ended) / seconds, "tokens": sum(r["tokens"] for r in ended) / seconds,
            "in_slo": sum(r["ttft"] <= slo for r in ended) / seconds,
            "ttft_p50": percentile(ttft, 50) if ttft else None, "ttft_p99": percentile(ttft, 99) if ttft else None,
            "ttft_max": ttft[-1] if ttft else None, "let_in": len(let_in),
            "tries": sum(r["tries"] for r in let_in) / max(1, len(let_in)),
            "within_two": sum(r["tries"] <= 2 for r in let_in) / max(1, len(let_in)),
            "n_429": outcomes.count(429), "n_503": outcomes.count(503),
            "failed": len([o for o in outcomes if o not in (200, 429, 503)])}


HEADINGS = [("multiple", "x", "{:.1f}"), ("rate", "asked/s", "{:.1f}"), ("good", "ended/s", "{:.2f}"),
            ("tokens", "tokens/s", "{:.0f}"), ("by_cpu", "/CPU s", "{:.0f}"), ("in_slo", "in SLO/s", "{:.2f}"),
            ("ttft_p50", "TTFT p50", "{:.2f}"), ("ttft_p99", "p99", "{:.2f}"), ("ttft_max", "max", "{:.2f}"),
            ("let_in", "let in", "{}"), ("tries", "tries", "{:.2f}"), ("within_two", "in two", "{:.0%}"), ("n_429", "429", "{}"),
            ("n_503", "503", "{}"), ("failed", "failed", "{}"), ("late", "late", "{:.3f}"), ("cpu", "load CPU", "{:.2f}")]


def print_rows(title, rows):
    print(f"\n{title}\n" + " ".join(f"{name:>9}" for _, name, _ in HEADINGS))
    for row in rows:
        print(" ".join(f"{'' if row[key] is None else form.format(row[key]):>9}" for key, _, form in HEADINGS), flush=True)


UNITS = {"tokens": "tokens/s", "by_cpu": "tokens per CPU second"}


def judge(rows, bound, unit):
    """Prints what should hold; whether it does."""
    peak = max(rows, key=lambda r: r[unit])
    top = max(r["multiple"] for r in rows)
    met = True
    for row in (r for r in rows if r["multiple"] == top):
        share, p99 = row[unit] / peak[unit], row["ttft_p99"]
        ok = share >= 0.9 and p99 is not None and p99 <= bound and row["failed"] == 0
        print(f"at {top:g} times the capacity, clients that {row['mode']}: {share:.0%} of the peak's {UNITS[unit]} "
              f"({peak[unit]:.0f} at {peak['multiple']:g} x); TTFT p99 {p99:.2f} s, bound {bound:.2f}: "
              f"{'met' if ok else 'NOT MET'}")
        met = met and ok
    return met


# ---- the server ----

def start_server(a):
    flags = ["--backend", a.backend, "--max-num-seqs", str(a.max_num_seqs), "--queue-timeout", str(a.queue_timeout),
             "--drain-delay", "0", *(["--load-format", "dummy"] if a.dummy else []), *a.server_flags]
    env = {**os.environ, "LD_LIBRARY_PATH": library_path(a.bundle)} if a.bundle else None
    ours = os.sched_getaffinity(0)
    if a.server_cpus:
        os.sched_setaffinity(0, a.server_cpus)  # the server inherits it
    try:
        return bench_cpu.Server(os.path.join(a.bundle or os.path.dirname(a.server), "gptd"), a.model, *flags, env=env, patience=300)
    finally:
        os.sched_setaffinity(0, (ours - set(a.server_cpus)) or ours if a.server_cpus else ours)


def cpu_list(text):
    return {c for part in text.split(",") for a, _, b in [part.partition("-")] for c in range(int(a), int(b or a) + 1)}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="a server that runs; say its --max-num-seqs and --queue-timeout, too [one is started]")
    add("--api-key", help="bearer token [none]")
    add("--server", default=os.path.join(ROOT, "build", "gptd"), help="the program to start [build/gptd]")
    add("--bundle", help="directory of the program and its libraries on a GPU machine, instead")
    add("--backend", default="cpu", help="[%(default)s]")
    add("--model", default=os.path.join(ROOT, "models", "demo"), help="[models/demo]")
    add("--dummy", action="store_true", help="random weights")
    add("--max-num-seqs", type=int, default=8, help="[%(default)s]")
    add("--queue-timeout", type=float, default=3.0, help="seconds [%(default)g]")
    add("--server-flags", nargs=argparse.REMAINDER, default=["--threads", "1"], help="the last: further options [--threads 1]")
    add("--server-cpus", type=cpu_list, default=set(), help="cores that the server runs on, the clients on the others [any]")
    add("--rates", type=float, nargs="+", default=[0.5, 1, 2, 5, 10], help="multiples of the capacity [0.5 1 2 5 10]")
    add("--seconds", type=float, help="of a run [20]")
    add("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)), help="of clients [%(default)s]")
    add("--slo", type=float, default=1.0, help="TTFT in seconds that counts as served in time [%(default)g]")
    add("--slack", type=float, default=1.0, help="seconds beyond --queue-timeout in which a first token must come [%(default)g]")
    add("--by-cpu", action="store_true", help="compare tokens per CPU second of the server: where others use the machine")
    add("--seed", type=int, default=time.time_ns() // 1000, help="[the clock's; printed]")
    add("--short", action="store_true", help="8 s a run, at 0.5, 2 and 10")
    add("--json", metavar="FILE", help="write all figures there")
    a = parser.parse_args()
    a.seconds = a.seconds or (8 if a.short else 20)
    a.rates = [0.5, 2, 10] if a.short and a.rates == parser.get_default("rates") else a.rates
    return a


def main():
    a = parse_arguments()
    server = None if a.url else start_server(a)
    try:
        bench = Bench(a, Target.parse(a.url or f"http://127.0.0.1:{server.port}", a.api_key), server)
        bench.run(2, streams=a.max_num_seqs)  # warms up
        capacity = bench.run(a.seconds / 2, streams=a.max_num_seqs + a.max_num_seqs // 4 + 1)
        print(f"{bench.model}: {capacity['good']:.2f} requests/s, {capacity['tokens']:.0f} tokens/s in a closed loop, "
              f"seed {a.seed}")
        if capacity["good"] == 0:
            sys.exit("bench_overload: no request ended: give more --seconds, or a smaller model")
        rows = []
        for obey in (True, False):
            mode = "obey Retry-After" if obey else "leave"
            some = [{"multiple": m, "mode": mode, **bench.run(a.seconds, rate=m * capacity["good"], obey=obey)} for m in a.rates]
            print_rows(f"clients that {mode}", some)
            rows += some
        print()
        met = judge(rows, a.queue_timeout + a.slack, "by_cpu" if a.by_cpu else "tokens")
        refused = {k: v for k, v in bench.metrics().items() if k.startswith("gptd_requests_refused_total")}
        print(", ".join(f"{k}: {v:.0f}" for k, v in refused.items()))
    finally:
        if server:
            server.stop()
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "seed": a.seed, "capacity": capacity,
                       "rows": rows}, f, indent=1)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
