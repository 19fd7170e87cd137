#!/usr/bin/env python3
"""An hour of everything at once: two replicas behind HAProxy, half of the requests cancelled, faults all the time.

    python3 scripts/soak.py [--server build/gptd] [--seconds 3600] [--haproxy PATH | --direct] [--seed N] [--out FILE.md]

First each of some hundreds of requests is answered alone, by a server with nothing else to do. Then clients ask for them at
random, of replicas with a KV cache that is far too small, and leave, stall, reset and send nonsense, while replicas are drained,
killed, stopped and told to read their keys again and HAProxy is reloaded. On a CPU an answer is the same bit for bit whatever
else runs: each is compared with what it was alone. Between phases the load rests: then no block, file descriptor or thread may
be in use that was not at the start, and memory may not have grown. After the first third only replica b is replaced: a's memory
is watched over the rest.

Exits 1 if any answer was wrong or any check failed. Takes the proxy of `scripts/setup.sh check`; --direct: none, clients take
any replica that answers. --quick: for sanitizer builds (longer deadlines, memory not judged).
"""
import argparse
import collections
import contextlib
import datetime
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "tests", "e2e"))
import harness  # noqa: E402
import soak_load  # noqa: E402
from test_keys import bearer  # noqa: E402
from test_proxies import program, start_haproxy  # noqa: E402

ADMIN = bearer("sk-admin")
# The size of a block is part of what gives an answer its last digits; nothing below is.
COMMON = ("--max-model-len", "1024", "--max-body-bytes", "65536", "--block-size", "16")
SLOW_CLIENT_SECONDS = 3
# 2,048 tokens of KV each, of which one request may take half. The clients want some ten times as much.
REPLICA = (*COMMON, "--kv-cache-memory-bytes", "4M", "--max-queue-requests", "16", "--drain-delay", "2",
           "--slow-client-timeout", str(SLOW_CLIENT_SECONDS), "--idle-timeout", "15", "--header-timeout", "3",
           "--body-timeout", "3", "--keep-alive-interval", "1")
# In different pieces, and still the same answers.
SHAPES = {"a": (), "b": ("--max-num-seqs", "32", "--max-num-batched-tokens", "64", "--threads", "1")}
COUNTERS = {"preemptions": "gptd_num_preemptions_total", "prefix hits": "gptd_prefix_cache_hits_total",
            "prefix queries": "gptd_prefix_cache_queries_total", "generated": "gptd_generation_tokens_total",
            "aborted": 'gptd_request_success_total{finished_reason="abort"}'}
WRONG_FILE = "the API keys stay as they were"  # an error in the log that a fault below is meant to make
# What fragmentation may come to. Both must be exceeded.
MAX_RSS_SLOPE, MAX_RSS_GROWTH = 64, 6 << 10  # KiB a minute; KiB from the first rest of the process to the last


def free_port():
    """One that the clients' own connections cannot take while a replica is down: below the system's range for those."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        first = int(f.read().split()[0])
    for port in random.sample(range(first // 2, first), 100):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port")


class Replica:
    """A server that is replaced now and then, with what all its processes counted."""

    def __init__(self, name, key_file, logs):
        self.name, self.port, self.logs = name, free_port(), logs
        self.flags = (*REPLICA, *SHAPES[name], "--api-key-file", key_file, "--port", str(self.port))
        self.counters, self.samples, self.rests, self.errors = collections.Counter(), [], [], collections.Counter()
        self.start()

    def start(self):
        self.server, self.last, self.rests = harness.Server(*self.flags), {}, []
        self.n_fds, self.n_threads = min(self.files() for _ in range(20)), self.threads()

    def files(self):
        time.sleep(0.02)  # a proxy's checks come and go
        return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))

    def threads(self):
        return len(os.listdir(f"/proc/{self.server.process.pid}/task"))

    def sample(self, resting=False):
        metrics = self.server.metrics(headers=ADMIN)
        engine = self.server.get("/debug/state", headers=ADMIN).json()["engine"]
        self.last = {name: metrics[series] for name, series in COUNTERS.items()}
        self.take_log()
        found = {"time": time.monotonic(), "rss": self.server.rss_bytes() >> 10, "fds": self.files(), "threads": self.threads(),
                 "free": engine["blocks"][0]["free"], "blocks": engine["blocks"][0]["total"],
                 "running": engine["sequences_running"], "waiting": engine["requests_waiting"]}
        (self.rests if resting else self.samples).append(found)
        return found

    def take_log(self):
        """Counts what it complained of; of the rest only the end is kept."""
        lines = self.server.log[:-50]
        del self.server.log[:len(lines)]
        self.keep(lines)
        self.errors.update(json.loads(line)["message"] for line in lines if '"level":"error"' in line and WRONG_FILE not in line)

    def keep(self, lines):
        if self.logs:
            with open(os.path.join(self.logs, self.name + ".log"), "a") as f:
                f.writelines(line + "\n" for line in lines)

    def count(self):
        self.counters.update(self.last)
        self.last = {}
        self.keep(self.server.log)

    def total(self, name):
        return int(self.counters[name] + self.last.get(name, 0))

    def ended(self):
        """What the process ended with, after a SIGTERM."""
        status = self.server.stop(seconds=60)
        self.count()
        return status

    def kill(self):
        self.server.kill()
        self.count()

    def rest(self):
        """What is wrong with it while nobody asks for anything."""
        wrong = []
        try:
            self.server.wait_idle(20, headers=ADMIN)
            harness.wait_until(lambda: self.files() <= self.n_fds, 20, f"{self.n_fds} descriptors, as at the start")
        except AssertionError as e:
            wrong.append(f"replica {self.name}, at rest: {e}")
        found = self.sample(resting=True)
        if found["threads"] != self.n_threads or found["running"] or found["waiting"] or found["free"] != found["blocks"]:
            wrong.append(f"replica {self.name}, at rest: {found}, {self.n_threads} threads at the start")
        return wrong

    def growth(self):
        """(KiB a minute by least squares, KiB) over the rests of this process, but for the first."""
        rests = self.rests[1:]
        if len(rests) < 3:
            return None
        t, y = [r["time"] / 60 for r in rests], [r["rss"] for r in rests]
        mean_t, mean_y = sum(t) / len(t), sum(y) / len(y)
        slope = sum((a - mean_t) * (b - mean_y) for a, b in zip(t, y)) / sum((a - mean_t) ** 2 for a in t)
        return slope, y[-1] - y[0]


class Soak:
    def __init__(self, options, directory):
        self.options, self.directory, self.draw = options, directory, random.Random(f"{options.seed} faults")
        self.key_file, self.generation = os.path.join(directory, "keys"), 0
        self.faults, self.n_faults, self.failures = soak_load.Faults(), collections.Counter(), []
        self.write_keys()
        self.replicas = [Replica(name, self.key_file, options.logs) for name in SHAPES]
        self.proxy = None

    def fail(self, text):
        self.failures.append(text)
        print(f"FAILURE (seed {self.options.seed}): {text}", flush=True)

    def write_keys(self, *more):
        """Whole at any time, for a replica may start."""
        one = "sk-one" if self.generation % 2 else "sha256:" + hashlib.sha256(b"sk-one").hexdigest()
        lines = [one, "sk-two name=two", "sk-few requests-per-minute=30 max-concurrent=1", "sk-admin role=admin",
                 *(["sk-comes-and-goes"] if self.generation % 2 else []), *more]
        self.generation += 1
        with open(self.key_file + ".new", "w") as f:
            f.write("\n".join(lines) + "\n")
        os.replace(f.name, self.key_file)

    # ---- faults: each is over, and seen to be by the proxy, when it returns ----

    def replica(self):
        """Any at first; later a is let live."""
        return self.draw.choice(self.replicas[1 if self.later else 0:])

    def back(self, replica, fault):
        replica.start()
        time.sleep(1.5)
        self.faults.end(fault)

    def restart(self):
        replica = self.replica()
        replica.sample()
        fault = self.faults.begin("restart")
        status = replica.ended()
        if status:
            self.fail(f"replica {replica.name} ended with {status}:\n" + "\n".join(replica.server.log[-40:]))
        self.back(replica, fault)

    def kill(self):
        replica = self.replica()
        replica.sample()
        self.faults.begin("kill", 2)
        down = self.faults.begin("restart")
        replica.kill()
        time.sleep(self.draw.random() * 2)
        self.back(replica, down)

    def hang_up(self):
        wrong = self.draw.random() < 0.3
        self.write_keys(*(["sk-king role=king"] if wrong else []))
        for replica in self.replicas:
            replica.take_log()
            words = WRONG_FILE if wrong else "read again"
            n = sum(words in line for line in replica.server.log)
            replica.server.process.send_signal(signal.SIGHUP)
            with contextlib.suppress(AssertionError):  # its line may be among thousands
                harness.wait_until(lambda: sum(words in line for line in replica.server.log) > n, 5, words)
        if wrong:
            self.write_keys()

    def stop_and_continue(self):
        replica = self.draw.choice(self.replicas)
        fault = self.faults.begin("stop")
        replica.server.process.send_signal(signal.SIGSTOP)
        time.sleep(1 + self.draw.random())
        replica.server.process.send_signal(signal.SIGCONT)
        time.sleep(1.5)
        self.faults.end(fault)

    def reload(self):
        fault = self.faults.begin("reload")
        self.proxy.send_signal(signal.SIGUSR2)
        time.sleep(1.5)
        self.faults.end(fault)

    def kinds(self):
        return ["restart", "kill", "hang_up", "stop_and_continue", *(["reload"] if self.proxy else [])]

    # ---- before, during and after ----

    def reference(self, requests):
        """Answers each alone."""
        server = harness.same_server(*COMMON, "--no-enable-prefix-caching")
        try:
            for request in requests:
                answer = server.post(request.path, {"model": server.name, **request.fields})
                if answer.status != 200:
                    raise SystemExit(f"alone, too: {answer}: {request.path} {json.dumps(request.fields)}")
                request.expected = soak_load.content_of([answer.json()])
        finally:
            server.check_stopped()

    def front(self):
        ports = [replica.port for replica in self.replicas]
        if self.options.direct:
            return ports, ports
        port = free_port()
        with open(os.path.join(self.options.logs, "haproxy.log") if self.options.logs else os.devnull, "w") as log:
            self.proxy = start_haproxy([port], ports, "-W", haproxy=self.options.haproxy, log=log)

        def answers():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
        harness.wait_until(answers, 20, "haproxy answers")
        return [port], ports

    def run(self):
        o = self.options
        requests = soak_load.make_requests(o.seed, o.requests)
        began = time.monotonic()
        self.reference(requests)
        print(f"{len(requests)} requests answered alone in {time.monotonic() - began:.0f} s", flush=True)
        ports, replica_ports = self.front()
        unread = SLOW_CLIENT_SECONDS + harness.scale(17, 60)
        load = soak_load.Load(requests, o.clients, o.seed, ports, replica_ports, self.faults, 60 * harness.scale(1, 4), unread)
        self.began = time.monotonic()
        try:
            self.phases(load)
        finally:
            load.pause()
            load.end()
        self.seconds = time.monotonic() - self.began
        for replica in self.replicas:
            if status := replica.ended():
                self.fail(f"replica {replica.name} ended with {status}:\n" + "\n".join(replica.server.log[-40:]))
        self.judge(load)
        return load

    def phases(self, load):
        o, order, self.later = self.options, [], False
        n_phases = max(1, min(round(o.seconds / 60), 12))
        every, between = min(10, o.seconds / 10), min(15, o.seconds / 7)
        self.loaded, now = 0.0, time.monotonic()
        next_sample, next_fault = now + every, now + between / 2
        for phase in range(n_phases):
            end, began = self.began + o.seconds * (phase + 1) / n_phases, time.monotonic()
            while (now := time.monotonic()) < end and len(load.failures) + len(self.failures) < 60:
                self.later = now - self.began > o.seconds / 3
                if now >= next_fault:
                    order = order or self.draw.sample(self.kinds(), len(self.kinds()))
                    kind = order.pop()
                    getattr(self, kind)()
                    self.n_faults[kind] += 1
                    next_fault = time.monotonic() + between * self.draw.uniform(0.5, 1.5)
                if now >= next_sample:
                    for replica in self.replicas:
                        replica.sample()
                    next_sample = now + every
                time.sleep(0.1)
            load.pause()
            self.loaded += time.monotonic() - began
            if self.proxy:
                self.proxy.send_signal(signal.SIGUSR2)  # lets go of connections that it keeps
            for replica in self.replicas:
                for wrong in replica.rest():
                    self.fail(wrong)
            rests = ", ".join(f"{r.name}: {r.rests[-1]['rss'] / 1024:.1f} MiB" for r in self.replicas)
            print(f"{time.monotonic() - self.began:5.0f} s: {load.sum()} requests, {load.sum(*soak_load.COMPARED)} to compare, "
                  f"{sum(self.n_faults.values())} faults, {len(load.failures) + len(self.failures)} failures; at rest {rests}",
                  flush=True)
            load.resume()

    def judge(self, load):
        """What must have happened, else the run shows nothing; and memory."""
        total = collections.Counter()
        for replica in self.replicas:
            total.update({name: replica.total(name) for name in COUNTERS})
            for message, n in replica.errors.items():
                self.fail(f"replica {replica.name} logged {n} times: {message}")
        self.total = total
        for name in ("preemptions", "prefix hits", "aborted"):
            if not total[name]:
                self.fail(f"no {name}: the load is not what it should be")
        if not load.sum(*soak_load.COMPARED):
            self.fail("nothing was compared")
        growth = self.replicas[0].growth()
        if growth and not self.options.quick and growth[0] > MAX_RSS_SLOPE and growth[1] > MAX_RSS_GROWTH:
            self.fail(f"replica a grows: {growth[0]:.0f} KiB a minute, {growth[1]} KiB in all")

    def end(self):
        for replica in self.replicas:
            if replica.server.process.poll() is None:
                replica.server.process.send_signal(signal.SIGCONT)
                replica.server.kill()
        if self.proxy:
            self.proxy.terminate()
            self.proxy.wait()


# ---- the report ----

def outcomes(load, kind):
    return ", ".join(f"{outcome} {n:,}" for (k, outcome), n in sorted(load.counts.items()) if k == kind) or "0"


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "?"


def report(soak, load, command):
    compared = sum(load.counts[kind, "compared"] for kind in soak_load.COMPARED)
    cancelled, sent = load.sum(*soak_load.CANCELLED), load.sum()
    total, loaded = soak.total, soak.loaded
    rows = [("date, commit", f"{datetime.date.today()}, {commit()}"), ("command", f"`{command}`"),
            ("machine", f"{os.cpu_count()} CPU cores, the clients' and the proxy's, too"),
            ("seconds", f"{soak.seconds:,.0f}, {loaded:,.0f} of them under load"),
            ("requests sent", f"{sent:,}: {sent / loaded:.0f}/s, {soak.options.clients} clients, "
             f"{soak.options.requests} distinct with a known answer, seed {soak.options.seed}"),
            ("completed and compared", f"{compared:,}"), ("wrong answers", f"{load.wrong}"),
            ("cancelled", f"{cancelled:,}: {cancelled / max(sent, 1):.0%}"),
            ("tokens generated", f"{total['generated']:,}: {total['generated'] / loaded:,.0f}/s"),
            ("preemptions", f"{total['preemptions']:,}"),
            ("prompt tokens from the prefix cache", f"{total['prefix hits']:,} of {total['prefix queries']:,}"),
            ("faults survived", f"{sum(soak.n_faults.values())}: "
             + ", ".join(f"{kind.replace('_', ' ')} {n}" for kind, n in sorted(soak.n_faults.items()))),
            ("lost to a fault, as they may", outcomes(load, "lost")), ("asked again, as they may", outcomes(load, "refused"))]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", "| kind | sent | became |",
             "|---|---|---|"]
    lines += [f"| {kind.replace('_', ' ')} | {load.sum(kind):,} | {outcomes(load, kind)} |" for kind in soak_load.KINDS]
    lines += ["", "| replica | RSS at rest, first / last / max MiB | slope KiB/min | RSS under load, max MiB | "
              "fds at rest / most | KV blocks free at rest / least | most waiting |", "|---|---|---|---|---|---|---|"]
    for r in soak.replicas:
        rss, growth, samples = [x["rss"] / 1024 for x in r.rests], r.growth(), r.samples or r.rests
        lines.append(f"| {r.name}, its last process | {rss[0]:.1f} / {rss[-1]:.1f} / {max(rss):.1f} | "
                     f"{f'{growth[0]:.1f}' if growth else '-'} | {max(x['rss'] for x in samples) / 1024:.1f} | "
                     f"{r.rests[-1]['fds']} / {max(x['fds'] for x in samples)} | "
                     f"{r.rests[-1]['free']} of {r.rests[-1]['blocks']} / {min(x['free'] for x in samples)} | "
                     f"{max(x['waiting'] for x in samples)} |")
    failures = load.failures + soak.failures
    lines += ["", f"Failures: {len(failures)}", "", *(f"    {line}" for text in failures for line in text.split("\n"))]
    return "\n".join(lines) + "\n"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--server", default=harness.SERVER)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--requests", type=int, help="distinct ones with a known answer [400; fewer in a short run]")
    parser.add_argument("--haproxy", default=program("haproxy"))
    parser.add_argument("--direct", action="store_true", help="without a proxy")
    parser.add_argument("--quick", action="store_true", help="for sanitizer builds")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000)
    parser.add_argument("--logs", metavar="DIR", help="where to keep the replicas' and the proxy's logs")
    parser.add_argument("--out", metavar="FILE.md")
    o = parser.parse_args()
    o.requests = o.requests or int(min(400, 40 + 3 * o.seconds))
    if not o.direct and not o.haproxy:
        parser.error("haproxy is not installed (scripts/setup.sh check); or --direct")
    if o.logs:
        os.makedirs(o.logs, exist_ok=True)
    harness.SERVER, harness.QUICK = os.path.abspath(o.server), o.quick
    return o


def main():
    options = parse()
    command = re.sub(r"\S*/(?=haproxy\b)", "", " ".join(["scripts/soak.py", *sys.argv[1:]]))
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gptd-soak-") as directory:
        soak = Soak(options, directory)
        try:
            load = soak.run()
        finally:
            soak.end()
    text = report(soak, load, command)
    print(text)
    if options.out:
        with open(options.out, "w") as f:
            f.write("# Soak\n\n" + text)
    return 1 if load.failures or soak.failures or load.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
