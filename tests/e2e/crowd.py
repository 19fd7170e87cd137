#!/usr/bin/env python3
"""What a crowd of idle and slow clients costs those who are served meanwhile.

    python3 tests/e2e/crowd.py [--server build/gptd] [--idle 5000] [--slow 200] [--streams 100] [--rounds 3]

Half of the idle connections have had an answer, half never say a word. A slow one sends its request line, headers, body or
chunks a byte at a time, every two seconds. Whoever is cut comes back at once. Measured in turns, without them and with them: the
time of all streams together; each stream's answer is compared with the same request's alone. Also: memory of an idle connection,
CPU time of the server while there is nothing but idle ones.
"""

import argparse
import asyncio
import collections
import json
import multiprocessing
import os
import resource
import selectors
import socket
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness  # noqa: E402
from test_sameness import dechunk  # noqa: E402

HEADER_TIMEOUT, BODY_TIMEOUT = 5, 6  # of the server, in seconds
FLAGS = ("--deterministic", "--header-timeout", str(HEADER_TIMEOUT), "--body-timeout", str(BODY_TIMEOUT), "--idle-timeout", "600")
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SLOW = [(b"", b"GET /" + b"a" * 1000), (b"GET /version HTTP/1.1\r\nHost: x\r\n", b"X-A: " + b"a" * 1000),
        (POST + b"Content-Length: 1000\r\n\r\n", b" " * 1000), (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 200)]


def allow_files(n):
    """Whether this process and the servers it starts may open n files each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < n:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))
    return True


class Client:
    def __init__(self, port, kind, interval):
        self.port, self.kind, self.interval = port, kind, interval

    def connect(self):
        self.socket = socket.create_connection(("127.0.0.1", self.port))
        self.socket.setblocking(False)
        self.began, self.got = time.monotonic(), b""
        self.next, self.rest = 0, b""
        if self.kind == "kept":
            self.socket.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        elif self.kind != "silent":
            head, self.rest = SLOW[self.kind]
            self.socket.sendall(head)
            self.next = time.monotonic() + self.interval

    def drip(self, now):
        if self.rest and now >= self.next:
            try:
                self.socket.send(self.rest[:1])
            except OSError:
                return  # the end of it is readable
            self.rest, self.next = self.rest[1:], now + self.interval


def be_there(port, n_idle, n_slow, interval, pipe):
    """Says ("there", None) when all are connected; told to leave, (n cut, statuses of the slow ones, longest life of one)."""
    selector, cut, longest = selectors.EpollSelector(), 0, 0
    statuses = collections.Counter()
    kinds = ["silent", "kept"] * (n_idle // 2) + [i % len(SLOW) for i in range(n_slow)]
    clients = [Client(port, kind, interval) for kind in kinds]
    for client in clients:
        client.connect()
        selector.register(client.socket, selectors.EVENT_READ, client)
    slow = clients[len(clients) - n_slow:]
    pipe.send("there")
    while not pipe.poll():
        for key, _ in selector.select(0.1):
            client = key.data
            try:
                chunk = client.socket.recv(4096)
            except OSError:
                chunk = b""
            client.got += chunk
            if chunk:
                continue
            selector.unregister(client.socket)
            client.socket.close()
            cut += 1
            if client.kind != "kept":
                statuses[client.got[9:12].decode("latin-1")] += 1
                longest = max(longest, time.monotonic() - client.began)
            client.connect()
            selector.register(client.socket, selectors.EVENT_READ, client)
        now = time.monotonic()
        for client in slow:
            client.drip(now)
    still = sum(client.got.startswith(b"HTTP/1.1 200") for client in clients if client.kind == "kept")
    pipe.send({"cut": cut, "statuses": dict(statuses), "longest": longest, "kept": still, "own CPU time": time.process_time()})


class Crowd:
    """The clients, in a process of their own, until end()."""

    def __init__(self, port, n_idle, n_slow, interval=2):
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=be_there, args=(port, n_idle, n_slow, interval, theirs), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(60) or self.pipe.recv() != "there":
            raise AssertionError("they are not let in")

    def end(self):
        self.pipe.send("leave")
        figures = self.pipe.recv()
        self.process.join()
        return figures


def requests(n, max_tokens):
    return [{"prompt": f"Number {i}: once upon a time", "seed": i, "max_tokens": max_tokens - i % 7, "ignore_eos": True,
             "temperature": i % 3 / 2} for i in range(n)]


def run_streams(server, fields, wanted):
    """All at once; seconds. Each answer must be what is wanted."""
    async def stream(f):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
        writer.write(server.completion_bytes("Connection: close\r\n", stream=True, **f))
        data = await asyncio.wait_for(reader.read(-1), 240)
        writer.close()
        return data

    async def all_streams():
        return await asyncio.gather(*(stream(f) for f in fields))

    began = time.monotonic()
    answers = asyncio.run(all_streams())
    seconds = time.monotonic() - began
    for f, data, want in zip(fields, answers, wanted):
        head, body = data.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 200"), head
        text, reason, _ = harness.join_events(harness.parse_events(dechunk(body)))[0]
        assert (text, reason) == (want["text"], want["finish_reason"]), f
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default=harness.SERVER)
    parser.add_argument("--model", default=harness.MODEL)
    for name, number in (("--idle", 5000), ("--slow", 200), ("--streams", 100), ("--max-tokens", 200), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=number)
    a = parser.parse_args()
    harness.SERVER, harness.MODEL = os.path.abspath(a.server), os.path.abspath(a.model)
    n = a.idle + a.slow + a.streams
    if not allow_files(2 * n + 512):
        sys.exit(f"ulimit -Hn is below {2 * n + 512}")
    server = harness.Server("--max-connections", str(2 * n), *FLAGS)
    fields = requests(a.streams, a.max_tokens)
    wanted = [server.complete(**f)["choices"][0] for f in fields]
    run_streams(server, fields, wanted)

    before = server.rss_bytes()
    crowd = Crowd(server.port, a.idle, 0)
    harness.wait_until(lambda: server.get("/debug/state").json()["connections"] > a.idle, 20, "all are there")
    cpu, began = server.cpu_seconds(), time.monotonic()
    print(f"{a.idle} idle connections: {(server.rss_bytes() - before) / a.idle / 1024:.1f} KiB of resident memory each")
    time.sleep(HEADER_TIMEOUT - 1)  # the silent ones come back after that
    print(f"CPU meanwhile: {100 * (server.cpu_seconds() - cpu) / (time.monotonic() - began):.1f} % of a core")
    crowd.end()

    def measured():
        """(seconds, seconds of the server's CPU time: others on this machine do not count there)"""
        began = server.cpu_seconds()
        return run_streams(server, fields, wanted), server.cpu_seconds() - began

    without, with_them = [], []
    for _ in range(a.rounds):
        without.append(measured())
        crowd = Crowd(server.port, a.idle, a.slow)
        with_them.append(measured())
        left = crowd.end()
        assert set(left["statuses"]) <= {"408", ""} and left["kept"] == a.idle // 2, left
        print(f"{without[-1][0]:.2f} s without, {with_them[-1][0]:.2f} s with them; {json.dumps(left)}")
    print(f"{a.streams} streams of {a.max_tokens} tokens without and with {a.idle} idle and {a.slow} slow ones; all answers right")
    for what, i in (("all of them", 0), ("CPU time of the server", 1)):
        m, w = (statistics.median(run[i] for run in runs) for runs in (without, with_them))
        print(f"{what}: {m:.2f} s, {w:.2f} s: {w / m:.2f} times (medians of {a.rounds})")
    server.check_stopped()


if __name__ == "__main__":
    main()
