#!/usr/bin/env python3
"""Fuzzes a whole gptd over sockets.

    python3 tests/e2e/fuzz_http.py [--server build/gptd] [--seconds 60] [--seed 1] [--first 0] [--count N] [--jobs 2]

Inputs are well-formed requests of every route, changed: bits, bytes, lines, pieces, values of their JSON with the framing kept;
sent in random pieces over many connections at once, which end in random ways. What must hold:
- h11, a strict parser, sees the same requests in the same order on each connection, or the server has closed it at the first doubt;
- every answer is whole and well-formed, every line of the log is JSON, and no connection hangs;
- now and then a plain request gets the answer that it always gets; in the end nothing runs, no file is open, memory is flat.
Input i of a seed is always the same: --seed S --first I --count 1 sends one again.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import queue
import random
import re
import selectors
import socket
import sys
import time

import h11

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import harness  # noqa: E402
import wire  # noqa: E402
from test_http import reset  # noqa: E402

AT_ONCE = 160      # connections of a job
BATCH = 250        # inputs of a job between two looks at the server
QUIET = 0.15       # seconds without a byte, after which a client ends its side
HANGING = 30.0     # and how long the server may then take; its own timeouts are below that
FLAGS = ("--deterministic", "--header-timeout", "2", "--body-timeout", "2", "--idle-timeout", "2", "--slow-client-timeout", "2",
         "--request-timeout", "20", "--max-model-len", "64", "--max-body-bytes", "65536", "--max-num-seqs", "64",
         "--kv-cache-memory-bytes", "64M")
CANARY = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 1}
SALT = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b": ", b"\r\n\r\n", b"\r\n ", b"0\r\n\r\n", b"Content-Length: 0\r\n",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n",
        b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n", b"Host: y\r\n", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"%00",
        b"%", b"\xff\xfe", b"\xf0\x9f\x98\x80", b"\\u0000", b"\\ud800", b"[[[[", b'{"a":', b"1e999", b"-1", b"18446744073709551616",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"A" * 5000, b"traceparent: 00-0-0-00\r\n", b"Authorization: Bearer \r\n"]
VALUES = [None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 2**31, 2**53 + 1, -2**63, 10**30, "", "a", "\0", "\ud800", "é" * 30,
          "x" * 3000, [], [[]], [0], [-1, 2**31], ["", "a"], {}, {"a": 1}, {"5": 1}, [[[[[]]]]], "stop", "demo", "user"]


def corpus():
    """[(the request as (method, path, body, headers, version, chunks))]"""
    fields = {"model": "demo", "prompt": "Once", "max_tokens": 2}
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat = {"model": "demo", "messages": messages, "max_tokens": 2}
    gets = ["/health", "/ready", "/version", "/v1/models", "/v1/models/demo", "/metrics", "/debug/state", "/openapi.json", "/",
            "/nowhere?a=b&c", "http://x/version", "*"]
    posts = [("/v1/completions", {**fields, **more}) for more in (
        {}, {"stream": True, "stream_options": {"include_usage": True}}, {"logprobs": 2, "echo": True, "n": 2, "best_of": 3},
        {"prompt": [[5, 6], [7]], "stop": ["a", "bc"], "logit_bias": {"5": -1}, "seed": 7, "stream": True, "logprobs": 1},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "frequency_penalty": 1, "presence_penalty": -1,
         "repetition_penalty": 1.1, "bad_words": ["bad"], "allowed_token_ids": [300, 301], "stop_token_ids": [9], "user": "me"})]
    posts += [("/v1/chat/completions", {**chat, **more}) for more in (
        {}, {"stream": True}, {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "response_format": {"type": "text"}})]
    posts += [("/tokenize", {"prompt": "Once upon a time"}), ("/tokenize", {"messages": messages}), ("/nowhere", {"a": 1}),
              ("/detokenize", {"tokens": [300, 301, 302]}), ("/v1/completions", b"{"), ("/version", b"body")]
    out = [("GET", path, None, (), "1.1", None) for path in gets]
    out += [(method, "/v1/completions", None, (), "1.1", None) for method in ("HEAD", "OPTIONS", "PUT", "BREW")]
    out += [("GET", "/version", None, headers, version, None) for headers, version in (
        (("Connection: keep-alive",), "1.0"), ((), "1.0"), (("Connection: close",), "1.1"),
        (("Upgrade: h2c", "Connection: Upgrade"), "1.1"),
        (("Authorization: Bearer sk-x", "Origin: http://a", "Accept: */*"), "1.1"),
        (("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",), "1.1"))]
    for path, body in posts:
        out.append(("POST", path, body, (), "1.1", None))
        out.append(("POST", path, body, (), "1.1", [1, 7, 30]))
    out.append(("POST", *posts[0], ("Expect: 100-continue",), "1.1", None))
    out.append(("POST", *posts[1], (), "1.0", None))
    return out


CORPUS = corpus()

# ---- inputs ----


def mutate_json(r, value):
    """A copy with something else in one place."""
    if isinstance(value, dict) and value and r.random() < 0.8:
        key = r.choice(list(value))
        what = r.randrange(6)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            name = r.choice(["stream", "n", "x", "logprobs", "echo", "max_tokens", "suffix", key + "_"])
            return {**value, name: r.choice(VALUES)}
        return {**value, key: mutate_json(r, value[key])}
    if isinstance(value, list) and value and r.random() < 0.8:
        i = r.randrange(len(value))
        if r.random() < 0.3:
            return value[:i] + value[i + 1:] if r.random() < 0.5 else value + value[i:i + 1] * r.choice([1, 3, 200])
        return value[:i] + [mutate_json(r, value[i])] + value[i + 1:]
    return r.choice(VALUES)


def some_request(r, name):
    method, path, body, headers, version, chunks = r.choice(CORPUS)
    if isinstance(body, dict):
        for _ in range(r.choice([0, 0, 1, 1, 2])):
            body = mutate_json(r, body)
            if not isinstance(body, dict):
                break
        body = json.dumps(body, allow_nan=True).encode()
    return wire.request(method, path, body, f"x-request-id: {name}", *headers, version=version, chunks=chunks)


def mutate_bytes(r, data):
    for _ in range(r.choice([1, 1, 1, 2, 4, 10])):
        a, b = sorted((r.randrange(len(data) + 1), r.randrange(len(data) + 1)))
        b = min(b, a + r.choice([1, 4, 20, 1000]))
        what = r.randrange(9)
        if what == 0 and a < len(data):  # a bit
            data = data[:a] + bytes([data[a] ^ 1 << r.randrange(8)]) + data[a + 1:]
        elif what == 1:
            data = data[:a] + bytes([r.randrange(256)]) + data[a + 1:]
        elif what == 2:
            data = data[:a] + r.choice(SALT) + data[a:]
        elif what == 3:
            data = data[:a] + data[b:]
        elif what == 4:
            data = data[:b] + data[a:b] * r.choice([1, 1, 50]) + data[b:]
        elif what == 5:  # another one's end
            other = some_request(r, "other")
            data = data[:a] + other[r.randrange(len(other)):]
        elif what == 6:
            data = data[:a] if r.random() < 0.3 else data
        else:  # lines: doubled, moved, left out, salted
            lines = data.split(b"\r\n")
            i, j = r.randrange(len(lines)), r.randrange(len(lines))
            how = r.randrange(4)
            if how == 0:
                lines.insert(j, lines[i])
            elif how == 1:
                lines.insert(j, lines.pop(i))
            elif how == 2:
                lines.pop(i)
            else:
                lines.insert(j, r.choice(SALT).strip(b"\r\n"))
            data = b"\r\n".join(lines)
        if not data:
            data = b"\r\n"
    return data[:200_000]


class Input:
    """What one connection sends, in which pieces, and how it ends."""

    def __init__(self, seed, i):
        r = random.Random(f"{seed}/{i}")
        self.index = i
        n = r.choice([1, 1, 1, 2, 3])
        parts = [some_request(r, f"r{k}") for k in range(n)]
        if r.random() < 0.7:
            k = r.randrange(n)
            parts[k] = mutate_bytes(r, parts[k])
        self.data = b"".join(parts)
        if r.random() < 0.5:
            self.data += wire.CLOSE.replace(b"Host", b"x-request-id: last\r\nHost")
        cuts = sorted(r.randrange(len(self.data)) for _ in range(r.choice([0, 0, 0, 1, 2, 8]))) if self.data else []
        self.pieces = [self.data[a:b] for a, b in zip([0, *cuts], [*cuts, len(self.data)]) if b > a]
        self.end = r.choice(["wait"] * 6 + ["half", "close", "reset", "reset later", "deaf"])


# ---- what a strict parser makes of it ----


def strict_request(data):
    """(name, method, what follows) of the whole request that data begins with; None: it has none yet. h11's errors are raised."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            names = [value.decode("latin-1") for name, value in request.headers if name == b"x-request-id"]
            last = connection.our_state is h11.MUST_CLOSE or connection.their_state is h11.MUST_CLOSE
            kept = b"keep-alive" in dict(request.headers).get(b"connection", b"").lower()  # of HTTP/1.0: nothing that h11 knows
            follows = connection.trailing_data[0] if not last or (request.http_version == b"1.0" and kept) else b""
            return (names or [""])[0], request.method.decode("latin-1"), follows
        elif not isinstance(event, h11.Data):  # NEED_DATA
            return None


def strict_requests(data):
    """([(name, method)] of the whole requests that h11 sees, whether it found nothing wrong)."""
    requests = []
    try:
        # Empty lines before a request are to be ignored. libmicrohttpd 0.9.75 takes a line that begins with NUL for one. What it
        # takes for line ends in as many bytes, a bare line feed among them, leaves nothing to tell it from the right ones.
        data = re.sub(rb"\r\n[:\0]\n|(?<!\r)\n[:\0]\r\n", b"\r\n\r\n", data).replace(b"\0\n", b"\r\n")
        while found := strict_request(re.sub(rb"^(\r|(\0[^\n]*)?\n)*", b"", data)):
            *head, data = found
            requests.append(head)
        return requests, True
    except h11.RemoteProtocolError:
        return requests, False


def judge(case, got, whole):
    """None, or what is wrong with the answers. whole: the server has closed the connection by itself."""
    seen, strict = strict_requests(case.data)
    methods = [method for _, method in seen]
    try:
        answers, rest = wire.split_answers(got, methods)
    except Exception as e:  # noqa: BLE001: http.client has many
        if got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")):
            return None  # libmicrohttpd's own answer with its head twice
        return f"not an answer: {e!r}"
    names = [headers["x-request-id"] for _, headers, _ in answers]
    if b"HEAD" in case.data and len(answers) >= len(seen):  # refused, with a method that h11 did not see
        rest = b""
    may_end = rest.startswith(b"HTTP/1.1 100") or None in names or b"text/event-stream" in rest.split(b"\r\n\r\n")[0]
    if rest and whole and not may_end:
        return f"half of an answer: {rest[-200:]}"
    if any(status >= 400 and re.search(rb"0x[0-9a-f]{6}", body) for status, _, body in answers) and b"0x" not in case.data:
        return f"an address in an error: {answers}"
    chunked = re.search(rb"(?i)transfer-encoding: *chunked", case.data)
    for k, (status, headers, _) in enumerate(answers):
        last = headers["Connection"] == "close" or (names[k] is None and status >= 400)
        if last and (status >= 400 or (chunked and k >= len(seen))):
            pass  # refused for malformed; or answered whatever its trailers were, which are the last thing on a connection
        elif k >= len(seen):
            return f"answer {k} ({status} to {names[k]}), where there are {len(seen)} requests; nothing wrong: {strict}"
        elif names[k] is not None and not names[k].startswith("req-") and names[k].strip() != seen[k][0]:
            return f"answer {k} is to {names[k]}, not to {seen[k][0]!r}"
        if last:
            late = [status for status, *_ in answers[k + 1:]]  # libmicrohttpd's own answer crosses with that to a deadline
            return None if late in ([], [408]) else "an answer after the last one"
    return None


# ---- connections ----


class Client:
    """One connection and its input."""

    def __init__(self, port, case):
        self.case, self.got, self.pieces = case, b"", list(case.pieces)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if case.end == "deaf":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.began = self.last = time.monotonic()
        self.ended = False

    def send(self):
        """False: it is over."""
        try:
            n = self.socket.send(self.pieces[0])
        except BlockingIOError:
            return True
        except OSError:
            self.pieces.clear()  # it was closed to us; what it said is still to be read
            return True
        self.last = time.monotonic()
        self.pieces[0] = self.pieces[0][n:]
        if not self.pieces[0]:
            self.pieces.pop(0)
        if self.pieces:
            return True
        if self.case.end in ("close", "reset"):
            return self.leave(self.case.end == "reset")
        if self.case.end == "half":
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        return True

    def leave(self, hard):
        if hard:
            reset(self.socket)
        else:
            self.socket.close()
        return False

    def receive(self):
        """False: it is over."""
        try:
            chunk = self.socket.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            chunk = b""
        self.got += chunk
        self.last = time.monotonic()
        if chunk and self.case.end == "reset later":
            return self.leave(True)
        if not chunk:
            self.ended = True
            return self.leave(False)
        return True

    def look(self, now):
        """False: it is over. None: it hangs."""
        if now - self.last < QUIET or self.pieces:
            return None if now - self.began > HANGING else True
        if self.case.end in ("reset later", "deaf"):
            return self.leave(self.case.end != "deaf")
        if now - self.last > HANGING:
            return None
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        return True


class Job:
    """The clients of one process. Takes ranges of inputs from a queue, until it gets None; tells what came of BATCH at a time."""

    def __init__(self, port, seed, queue, results):
        self.port, self.seed, self.queue, self.results = port, seed, queue, results
        self.selector, self.clients, self.todo = selectors.EpollSelector(), set(), collections.deque()
        self.feeding = True
        self.begin_report()

    def begin_report(self):
        self.n, self.findings, self.statuses = 0, [], collections.Counter()

    def report(self):
        self.results.put((self.n, self.findings, self.statuses))
        self.begin_report()

    def fill(self):
        while len(self.clients) < AT_ONCE and (self.todo or self.feeding):
            if not self.todo:
                try:
                    indices = self.queue.get(block=not self.clients)
                except queue.Empty:
                    return
                self.feeding = indices is not None
                self.todo.extend(indices or ())
                continue
            client = Client(self.port, Input(self.seed, self.todo.popleft()))
            self.clients.add(client)
            self.selector.register(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def over(self, client, descriptor):
        self.selector.unregister(descriptor)
        self.clients.discard(client)
        wrong = judge(client.case, client.got, client.ended) if client.ended else None
        if wrong:
            self.findings.append((client.case.index, wrong))
        self.statuses[client.got[9:12].decode("latin-1")] += 1
        self.n += 1
        if self.n == BATCH:
            self.report()

    def handle(self, client, descriptor, events):
        going = True
        if events & selectors.EVENT_WRITE and client.pieces:
            going = client.send()
            if going and not client.pieces:
                self.selector.modify(descriptor, 0 if client.case.end == "deaf" else selectors.EVENT_READ, client)
        if going and events & selectors.EVENT_READ and client.case.end != "deaf":
            going = client.receive()
        if not going:
            self.over(client, descriptor)

    def look(self):
        now = time.monotonic()
        for client in list(self.clients):
            descriptor = client.socket.fileno()
            going = client.look(now)
            if going is None:
                self.findings.append((client.case.index, f"it hangs ({client.case.end}): {client.got[-200:]!r}"))
                going = client.leave(True)
            if not going:
                self.over(client, descriptor)

    def run(self):
        try:
            while self.feeding or self.todo or self.clients:
                self.fill()
                for key, events in self.selector.select(0.05):
                    self.handle(key.data, key.fd, events)
                self.look()
        except Exception as e:  # noqa: BLE001: told by the one who waits
            self.findings.append((self.todo[0] if self.todo else -1, f"some inputs before this one: {e!r}"))
        self.report()
        self.results.put(None)


# ---- the run ----


class Fuzz:
    def __init__(self, seed, first=0, jobs=2):
        self.seed, self.next, self.n, self.n_ended = seed, first, 0, 0
        self.findings, self.statuses = [], collections.Counter()
        self.server = harness.Server(*FLAGS)
        self.wanted = self.server.complete(**CANARY)["choices"]
        context = multiprocessing.get_context("fork")
        self.queue, self.results = context.Queue(), context.Queue()
        self.jobs = [context.Process(target=Job(self.server.port, seed, self.queue, self.results).run, daemon=True)
                     for _ in range(jobs)]
        for j in self.jobs:
            j.start()

    def take(self):
        report = self.results.get(timeout=60)
        if report is None:
            self.n_ended += 1
            return
        n, findings, statuses = report
        self.n += n
        self.findings += findings
        self.statuses += statuses
        self.check()

    def check(self):
        if self.server.process.poll() is not None:
            raise AssertionError("the server has ended:\n" + "\n".join(self.server.log[-60:]))
        n = len(self.server.log)
        for line in self.server.log[:n]:
            json.loads(line)
        del self.server.log[:n]
        got = self.server.complete(**CANARY)["choices"]
        assert got == self.wanted, f"near input {self.next}: {got}, not {self.wanted}"

    def run(self, seconds=None, count=None):
        """For so long, or so many inputs."""
        began, first, left = time.monotonic(), self.next, count if count is not None else 1 << 60
        while left > 0 and (not seconds or time.monotonic() < began + seconds) and not self.findings:
            if self.next - first - self.n > 2 * len(self.jobs) * BATCH:
                self.take()
                continue
            n = min(BATCH, left)
            self.queue.put(range(self.next, self.next + n))
            self.next, left = self.next + n, left - n
        for _ in self.jobs:
            self.queue.put(None)
        while self.n_ended < len(self.jobs):
            self.take()
        self.took = time.monotonic() - began

    def finish(self):
        """Everything comes back, and the server ends well."""
        self.server.wait_idle(60)
        state = {}

        def gone():
            state.update(self.server.get("/debug/state").json())
            return state["connections"] <= 1 and state["exchanges"] <= 1
        try:
            harness.wait_until(gone, 20, "every connection has ended")
        except AssertionError as e:
            raise AssertionError(f"{e}: {state}")
        files = os.listdir(f"/proc/{self.server.process.pid}/fd")
        figures = {"rss": self.server.rss_bytes(), "files": len(files)}
        self.server.check_stopped()
        return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default=harness.SERVER)
    parser.add_argument("--model", default=harness.MODEL)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a sanitizer build: more patience")
    arguments = parser.parse_args()
    harness.SERVER, harness.MODEL = os.path.abspath(arguments.server), os.path.abspath(arguments.model)
    harness.QUICK = arguments.quick
    if arguments.count == 1:
        case = Input(arguments.seed, arguments.first)
        print(case.end, *case.pieces, sep="\n")
    fuzz = Fuzz(arguments.seed, arguments.first, arguments.jobs)
    print(f"at first: {fuzz.server.rss_bytes() >> 10} KiB, {len(os.listdir(f'/proc/{fuzz.server.process.pid}/fd'))} files")
    fuzz.run(arguments.seconds or (60 if arguments.count is None else None), arguments.count)
    for index, wrong in fuzz.findings[:40]:
        print(f"input {index}: {wrong}")
    figures = fuzz.finish()
    print(f"seed {arguments.seed}: {fuzz.n} inputs from {arguments.first} on, {fuzz.n / fuzz.took:.0f} a second; first answers "
          f"{dict(sorted(fuzz.statuses.items()))}; in the end {figures['rss'] >> 10} KiB, {figures['files']} files")
    print(f"{len(fuzz.findings)} findings")
    return 1 if fuzz.findings else 0


if __name__ == "__main__":
    sys.exit(main())
