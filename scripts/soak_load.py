"""The load of soak.py: requests whose answers are known, and clients that behave and misbehave in every way.

Load runs them in a thread of its own. Of replicas it knows the ports, of faults when there was one and what may be lost
by it. Whatever it cannot explain is a failure, with the request and both answers.
"""
import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import socket
import struct
import threading
import time
import traceback

from bench_load import Answer, Connection, Failure
from harness import StreamError, parse_events
from test_sameness import WORDS

KEYS = ("sk-one", "sk-two")  # each has a prefix cache of its own
ATTEMPTS = 60
EXPLAINED = (Failure, StreamError, AssertionError, ValueError, LookupError, TypeError, OSError, asyncio.TimeoutError)
# Megabytes, as a stream; the sockets take some of them. In the KV cache more than there is.
BIG = {"messages": [{"role": "user", "content": "Once"}], "max_completion_tokens": 900, "n": 6, "logprobs": True,
       "top_logprobs": 20, "ignore_eos": True, "stream": True}


# ---- requests and their answers ----

@dataclasses.dataclass
class Request:
    path: str
    fields: dict
    expected: dict = None

    def can_stream(self):
        return self.fields.get("best_of", 0) <= self.fields.get("n", 1)


def text_of(draw, n_words):
    first = draw.randrange(len(WORDS))
    return " ".join(draw.choice(WORDS) if draw.random() < 0.3 else WORDS[(first + i) % len(WORDS)] for i in range(n_words))


def sampling(draw):
    if draw.random() < 0.3:
        fields = {"temperature": 0}
    else:
        fields = {"seed": draw.randrange(2**53), "temperature": draw.choice((0.5, 1, 1.4))}
    for name, values in (("top_p", (0.5, 0.9)), ("top_k", (1, 20)), ("min_p", (0.05,)), ("frequency_penalty", (-0.5, 0.7)),
                         ("presence_penalty", (0.5,)), ("repetition_penalty", (1.2,)),
                         ("logit_bias", ({"471": 5}, {"5": -100, "266": -2})), ("stop", (" the", ["king", ". ", "xyzzy"])),
                         ("stop_token_ids", ([434],)), ("bad_words", (["king", "silver key"],)), ("min_tokens", (5,)),
                         ("ignore_eos", (True,)), ("include_stop_str_in_output", (True,)), ("return_token_ids", (True,)),
                         ("allowed_token_ids", (list(range(200, 900)),)), ("n", (2, 3, 5))):
        if draw.random() < 0.12:
            fields[name] = draw.choice(values)
    if "seed" in fields and draw.random() < 0.08:
        fields["best_of"] = fields.get("n", 1) + 2
    return fields


def completion(draw, beginnings):
    prompt = (draw.choice(beginnings) if draw.random() < 0.5 else "") + text_of(draw, draw.choice((1, 5, 20, 60, 200)))
    shape = draw.random()
    if shape < 0.15:
        prompt = [draw.randrange(3, 1600) for _ in range(draw.choice((1, 17, 64, 200)))]
    elif shape < 0.25:
        prompt = [prompt, text_of(draw, 9), text_of(draw, 30)]
    fields = {"prompt": prompt, "max_tokens": draw.choice((1, 8, 20, 40, 80, 160)), **sampling(draw)}
    if "min_tokens" in fields:
        fields["max_tokens"] = max(fields["max_tokens"], fields["min_tokens"])
    if draw.random() < 0.3:
        fields["logprobs"] = draw.choice((0, 2, 5))
    for name, value in (("echo", True), ("prompt_logprobs", 1)):
        if draw.random() < 0.1:
            fields[name] = value
    return Request("/v1/completions", fields)


def chat(draw, beginnings):
    messages = [{"role": "system", "content": draw.choice(beginnings)}] if draw.random() < 0.4 else []
    for _ in range(draw.randrange(3)):
        messages += [{"role": "user", "content": text_of(draw, 8)}, {"role": "assistant", "content": text_of(draw, 12)}]
    messages.append({"role": "user", "content": text_of(draw, draw.choice((3, 20, 100)))})
    fields = {"messages": messages, "max_completion_tokens": draw.choice((5, 30, 90)), **sampling(draw)}
    fields.pop("best_of", None)
    if draw.random() < 0.3:
        fields |= {"logprobs": True, "top_logprobs": draw.choice((0, 3))}
    return Request("/v1/chat/completions", fields)


def make_requests(seed, n):
    draw = random.Random(f"{seed} requests")
    beginnings = [text_of(draw, n_words) + ". " for n_words in (30, 60, 100, 150, 200)]
    return [(completion if draw.random() < 0.7 else chat)(draw, beginnings) for _ in range(n)]


def merge(a, b):
    """What two parts of a stream come to."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {k: merge(a.get(k), b.get(k)) for k in {**a, **b}}
    return a + b


def bare(value):
    """Without what is not there: streams leave out what whole answers have as null or empty."""
    if not isinstance(value, dict):
        return value
    fields = {k: bare(v) for k, v in value.items()}
    return {k: v for k, v in fields.items() if v not in (None, "", [], {})}


def content_of(parts):
    """What an answer says, of [the whole answer] or the events of a stream: the same for both."""
    choices, usage = {}, None
    for part in parts:
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            choice = {("delta" if k == "message" else k): v for k, v in choice.items()}
            index = choice.pop("index")
            choices[index] = merge(choices.get(index), bare(choice))
    counts = [usage[name] for name in ("prompt_tokens", "completion_tokens")] if usage else None
    return {"choices": dict(sorted(choices.items())), "usage": counts}


def difference(got, expected, path=""):
    """Where they first differ, and how."""
    if isinstance(got, dict) and isinstance(expected, dict):
        pairs = [(str(k), got.get(k), expected.get(k)) for k in {**got, **expected}]
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(got, expected))]
    else:
        return f"{path}: {json.dumps(got)[:1000]}, alone {json.dumps(expected)[:1000]}"
    return next((difference(a, b, f"{path}.{name}") for name, a, b in pairs if a != b), "")


def is_beginning(part, content):
    """Of streams that were left: what had come is how the answer begins."""
    def pieces(choice):
        return choice.get("text", ""), choice.get("delta", {}).get("content", ""), choice.get("token_ids", [])
    return all(i in content["choices"] and whole[:len(have)] == have for i, choice in part["choices"].items()
               for have, whole in zip(pieces(choice), pieces(content["choices"][i])))


# ---- what is wrong with requests ----

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-one\r\n"
GOOD = b'{"model":"demo","prompt":"Once","max_tokens":3}'
MALFORMED = [b"", b"{", b"[]", b"null", b"{}", GOOD + b"x", b"\xef\xbb\xbf" + GOOD, b"[" * 5000, GOOD.replace(b"Once", b"\xff\xfe"),
             GOOD.replace(b"Once", b"a\x00b"), GOOD.replace(b"3", b"1e400"), GOOD.replace(b"3", b'"3"'), GOOD.replace(b"3", b"-1"),
             GOOD.replace(b'"prompt"', b'"prompts"'), GOOD.replace(b'"Once"', b"[[]]"), GOOD.replace(b'"Once"', b"[1600]"),
             GOOD[:-1] + b',"max_tokens":4}', GOOD[:-1] + b',"temperature":9}', GOOD[:-1] + b',"n":0}',
             GOOD[:-1] + b',"logit_bias":{"99999":1}}', GOOD[:-1] + b',"stop":["a","b","c","d","e"]}']
ODD = [HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD, HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + GOOD,
       HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD, HEAD + b"Content-Length: -1\r\n\r\n" + GOOD,
       HEAD + b"Content-Length : 5\r\n\r\n" + GOOD, HEAD + b"X-A: a\x01b\r\nContent-Length: 5\r\n\r\n" + GOOD,
       HEAD + b"Host: y\r\nContent-Length: 47\r\n\r\n" + GOOD, b"GET / HTTP/9.9\r\n\r\n",
       b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 300, b"BREW /pot HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
       b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n",
       HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 47\r\n\r\n" + GOOD,
       b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", HEAD + b"Content-Length: 47\r\n\r\n" + GOOD[:20]]
OVER = [({"max_tokens": 5000}, 400), ({"n": 129}, 400), ({"prompt": "cat " * 2000}, 400), ({"user": "x" * 80_000}, 413),
        ({"prompt": ["x"] * 2000}, 400), ({"model": "nobody"}, 404)]


# ---- what happens meanwhile ----

class Faults:
    """When there was what, on the monotonic clock. One thread writes, another reads."""

    def __init__(self):
        self.list = []

    def begin(self, kind, seconds=float("inf")):
        """seconds: for how long it is felt; else until end()."""
        now = time.monotonic()
        self.list.append([kind, now, now + seconds])
        return self.list[-1]

    @staticmethod
    def end(fault, seconds=1):
        fault[2] = time.monotonic() + seconds

    def within(self, start, *kinds):
        """Whether there was such a one between then and now."""
        return any(kind in kinds and begin <= time.monotonic() and start <= end for kind, begin, end in self.list[-20:])

    def lately(self):
        now = time.monotonic()
        return ", ".join(f"{kind} from {begin - now:.1f} s to {end - now:.1f} s" for kind, begin, end in self.list[-3:])


class Collected(Answer):
    """Keeps the body whole, for it is looked at when it is there, and ends after `limit` bytes."""

    def __init__(self, limit=None):
        super().__init__([])
        self.limit, self.received = limit, 0

    def feed(self, now, data):
        self.received += len(data)
        super().feed(now, data)
        if self.limit and self.received >= self.limit and not self.complete:
            raise Failure("cancelled", "")

    def _take_events(self, now):
        pass

    def parts(self):
        """What content_of() takes; of a stream also where it is not whole."""
        if "event-stream" not in self.headers["content-type"]:
            return [json.loads(self.body)]
        if self.complete:
            return parse_events(self.body)
        whole, end, _ = self.body.rpartition(b"\n\n")
        return parse_events(whole + end + (b"" if b"data: [DONE]" in whole else b"data: [DONE]\n\n"))


def reset(connection):
    if connection.closed:
        return
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()


class Client:
    """One after the other, over a connection that is kept while it can be."""

    def __init__(self, load, number):
        self.load, self.draw = load, random.Random(f"{load.seed} client {number}")
        self.number, self.n, self.connection, self.used, self.port = number, 0, None, 0.0, None

    # ---- sending ----

    def bytes_of(self, path, fields, key=None):
        body = json.dumps({"model": "demo", **fields}).encode()
        return self.post(path, body, key or self.draw.choice(KEYS))

    def post(self, path, body, key):
        self.n += 1
        return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
                f"X-Request-Id: {self.number}-{self.n}\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    def pick(self, stream):
        """(one of the requests, its bytes). What cannot change the answer differs from time to time."""
        request = self.draw.choice(self.load.requests)
        while stream and not request.can_stream():
            request = self.draw.choice(self.load.requests)
        fields = dict(request.fields)
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.draw.random() < 0.1:
            fields["cache_salt"] = self.draw.choice(("red", "green"))
        if self.draw.random() < 0.2:
            fields["priority"] = self.draw.randrange(-2, 3)
        return request, self.bytes_of(request.path, fields)

    async def open(self, ports=None, receive_buffer=None):
        """A new connection; None where that is explained by a fault."""
        began, s = time.monotonic(), socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(s, ("127.0.0.1", self.draw.choice(ports or self.load.ports)))
            self.port = s.getsockname()[1]
            return (await loop.create_connection(Connection, sock=s))[1]
        except OSError as e:
            s.close()
            if not self.load.faults.within(began, "restart", "kill", "reload"):
                self.load.fail("no connection", repr(e))
            return None

    async def acquire(self):
        """(a connection, whether it is new). Nobody counts on one that has been idle for long."""
        connection, self.connection = self.connection, None
        if connection and not connection.closed and time.monotonic() - self.used < 1:
            return connection, False
        if connection:
            connection.transport.abort()
        return await self.open(), True

    def release(self, connection):
        if connection.reusable() and self.draw.random() < 0.9:
            self.connection, self.used = connection, time.monotonic()
        else:
            connection.transport.abort()

    async def exchange(self, connection, data, answer, during=None):
        """during(connection) goes on beside it."""
        beside = asyncio.create_task(during(connection)) if during else None
        try:
            await connection.exchange(data, answer, self.load.timeout)
        except asyncio.TimeoutError:
            raise Failure("timeout", f"{answer.status} {answer.headers} {answer.body[-300:]!r}, to {data[:300]!r}") from None
        finally:
            if beside:
                beside.cancel()
                connection.transport.resume_reading()

    async def ask(self, data, during=None):
        """The answer to a request, asked for as long as a client would: None where it is lost to a fault."""
        for _ in range(ATTEMPTS):
            began, answer = time.monotonic(), Collected()
            connection, is_new = await self.acquire()
            if not connection:
                await asyncio.sleep(0.1)
                continue
            await self.exchange(connection, data, answer, during)
            self.release(connection)
            again = self.again(began, answer, is_new)
            if again is None:
                return answer if answer.complete else None
            await asyncio.sleep(again)
        raise Failure("never answered", f"{answer.status} {answer.body[:300]!r}")

    def again(self, began, answer, is_new):
        """Seconds after which to ask again; None: that's it."""
        faults, load = self.load.faults, self.load
        if answer.status in (429, 503) and answer.complete and "retry-after" in answer.headers:
            load.counts["refused", str(answer.status)] += 1
            return int(answer.headers["retry-after"])
        if answer.status in (502, 503, 504):
            if faults.within(began, "kill"):
                load.counts["lost", f"kill: {answer.status}"] += 1
                return 0.1
        elif answer.complete:
            return None
        elif not answer.received and not is_new:  # closed while it was idle: what any client tries again
            if faults.within(began, "restart", "kill", "reload"):
                load.counts["refused", "a kept connection closed"] += 1
                return 0
        elif faults.within(began, "kill"):
            load.counts["lost", "kill: cut" if answer.received else "kill: nothing came"] += 1
            return None
        elif not answer.received and load.direct and faults.within(began, "restart"):
            load.counts["lost", "restart: in the queue of its socket"] += 1
            return 0
        raise Failure("cut" if answer.received else "nothing came", f"{answer.status} {answer.body[-300:]!r}, asked "
                      f"{time.monotonic() - began:.1f} s ago over a {'new' if is_new else 'kept'} connection")

    # ---- kinds: each gives what became of it ----

    def check_if_whole(self, answer, request):
        if answer.complete and answer.status == 200 and (got := content_of(answer.parts())) != request.expected:
            self.load.wrong += 1
            raise Failure("WRONG ANSWER", f"{difference(got, request.expected)}\n  {json.dumps(got)[:3000]}")

    async def compared(self, stream, during=None):
        request, data = self.pick(stream)
        with self.load.about(request):
            answer = await self.ask(data, during)
            if not answer:
                return "lost"
            if answer.status != 200:
                raise Failure("refused", f"{answer.status} {answer.body[:500]!r}")
            self.check_if_whole(answer, request)
            self.load.counts["tokens", "compared"] += request.expected["usage"][1]
            return "compared"

    async def whole(self):
        return await self.compared(False)

    async def streamed(self):
        return await self.compared(True)

    async def slow(self):
        async def reading(connection):
            for _ in range(8):
                connection.transport.pause_reading()
                await asyncio.sleep(self.draw.random() * 0.3)
                connection.transport.resume_reading()
                await asyncio.sleep(0.01)
        return await self.compared(True, reading)

    async def left(self, leave, limit=None, part=None, stream=None):
        """leave(connection) after a while, or after limit bytes, or with a part of the request sent."""
        request, data = self.pick(limit or self.draw.random() < 0.5)
        with self.load.about(request):
            connection, _ = await self.acquire()
            if not connection:
                return "not connected"
            try:
                if limit:
                    return await self.begun(connection, request, data, limit)
                connection.transport.write(data[:int(len(data) * part)] if part else data)
                await asyncio.sleep(self.draw.choice((0, 0.002, 0.03, self.draw.expovariate(4))))
                return "left"
            finally:
                leave(connection)

    async def begun(self, connection, request, data, limit):
        answer = Collected(limit)
        try:
            await self.exchange(connection, data, answer)
            self.check_if_whole(answer, request)
            return "was done before" if answer.status == 200 else "refused"
        except Failure as failure:
            if failure.args[0] != "cancelled":
                raise
        if answer.status == 200 and not is_beginning(content_of(answer.parts()), request.expected):
            self.load.wrong += 1
            raise Failure("WRONG ANSWER (its beginning)", repr(answer.body))
        return "left"

    async def left_at_once(self):
        return await self.left(lambda connection: connection.transport.close())

    async def left_mid_stream(self):
        return await self.left(lambda connection: connection.transport.close(), limit=self.draw.choice((1, 600, 3000, 10000)))

    async def left_by_reset(self):
        return await self.left(reset, limit=self.draw.choice((None, 1, 2000)))

    async def left_half_sent(self):
        return await self.left(self.draw.choice((reset, lambda connection: connection.transport.close())),
                               part=self.draw.random())

    async def half_closed(self):
        """Nothing more is sent: the connection ends soon, with the whole answer or without."""
        async def close_half(connection):
            await asyncio.sleep(self.draw.choice((0, 0.01, 0.2)))
            if not connection.closed:
                connection.transport.write_eof()
        request, data = self.pick(self.draw.random() < 0.5)
        with self.load.about(request):
            connection, answer = (await self.acquire())[0], Collected()
            if not connection:
                return "not connected"
            try:
                await self.exchange(connection, data, answer, close_half)
                self.check_if_whole(answer, request)
                return "left"
            finally:
                connection.transport.abort()

    async def unread(self):
        """Straight to a replica, for its own timeout: a proxy holds back for longer."""
        connection = await self.open(self.load.replica_ports, 4096)
        if not connection:
            return "not connected"
        try:
            answer, began = Collected(), time.monotonic()
            connection.transport.pause_reading()
            connection.transport.write(self.bytes_of("/v1/chat/completions", BIG))
            while time.monotonic() - began < self.load.unread_seconds:
                if self.load.paused or self.load.faults.within(began, "kill"):
                    return "left"
                await asyncio.sleep(0.2)
            connection.transport.resume_reading()
            await self.exchange(connection, b"", answer)
            return "refused" if answer.status in (429, 503) else "came whole" if answer.complete else "cut"
        finally:
            connection.transport.abort()

    async def status(self, data, *expected):
        answer = await self.ask(data)
        if answer and answer.status not in expected:
            raise Failure("not what it must be answered", f"{data[:300]!r}: {answer.status} {answer.body[:300]!r}")
        return str(answer.status) if answer else "lost"

    async def malformed(self):
        path = self.draw.choice(("/v1/completions", "/v1/chat/completions"))
        if self.draw.random() < 0.5:
            return await self.status(self.post(path, self.draw.choice(MALFORMED), "sk-one"), 400)
        _, data = self.pick(False)
        head, body = data.split(b"\r\n\r\n", 1)
        body = bytearray(body)
        for _ in range(self.draw.choice((1, 3))):
            body[self.draw.randrange(len(body))] = self.draw.randrange(256)
        return await self.status(head + b"\r\n\r\n" + bytes(body), 200, 400, 404)

    async def odd_http(self):
        """Anything but silence, an answer of another's, or a fault of the server's."""
        connection = await self.open(self.draw.choice((self.load.ports, self.load.replica_ports)))
        if not connection:
            return "not connected"
        data, answer = self.draw.choice(ODD), Collected()
        try:
            await self.exchange(connection, data, answer)
            if answer.status and answer.status >= 500 and answer.status not in (501, 503, 505) and \
               not self.load.faults.within(time.monotonic() - 5, "kill"):
                raise Failure("odd HTTP", f"{data[:300]!r}: {answer.status} {answer.body[:300]!r}")
            return str(answer.status)
        finally:
            connection.transport.abort()

    async def over_limits(self):
        fields, status = self.draw.choice(OVER)
        return await self.status(self.bytes_of("/v1/completions", {"prompt": "Once", **fields}), status)

    async def by_key(self):
        key = self.draw.choice(("sk-comes-and-goes", "sk-few", "sk-nobody", "sk-nobody"))
        data = self.bytes_of("/v1/completions", {"prompt": "Once", "max_tokens": 5}, key)
        if key != "sk-few":
            return await self.status(data, *((200, 401) if key == "sk-comes-and-goes" else (401,)))
        connection, answer = await self.open(), Collected()  # not again and again: it is refused for a minute
        if not connection:
            return "not connected"
        try:
            began = time.monotonic()
            await self.exchange(connection, data, answer)
            if answer.status not in (200, 429) and not self.load.faults.within(began, "kill", "restart"):
                raise Failure("over its limit", f"{answer.status} {answer.body[:300]!r}")
            return str(answer.status)
        finally:
            connection.transport.abort()


# kind: how often. About half of all requests are left.
KINDS = {"whole": 17, "streamed": 19, "slow": 2,
         "left_at_once": 14, "left_mid_stream": 18, "left_by_reset": 9, "half_closed": 6, "left_half_sent": 4, "unread": 0.3,
         "malformed": 4, "odd_http": 2, "over_limits": 3, "by_key": 2}
COMPARED = ("whole", "streamed", "slow")
CANCELLED = ("left_at_once", "left_mid_stream", "left_by_reset", "half_closed", "left_half_sent", "unread")


class Load:
    """n clients in a thread. ports: to connect to; replica_ports: those behind, where there is a proxy."""

    def __init__(self, requests, n, seed, ports, replica_ports, faults, timeout, unread_seconds):
        self.requests, self.n, self.seed, self.ports, self.replica_ports = requests, n, seed, ports, replica_ports
        self.faults, self.timeout, self.unread_seconds = faults, timeout, unread_seconds
        self.direct = ports == replica_ports
        self.counts, self.failures, self.wrong = collections.Counter(), [], 0
        self.paused, self.ended, self.running, self.cpu_seconds = False, False, 0, 0.0
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self.thread.start()

    def fail(self, what, detail):
        self.counts["failed", what] += 1
        if len(self.failures) < 20:
            self.failures.append(f"{what}: {detail}\n  lately: {self.faults.lately()}")
            print(f"FAILURE (seed {self.seed}): {self.failures[-1]}", flush=True)

    @contextlib.contextmanager
    def about(self, request):
        """Adds the request and its answer alone to what goes wrong inside."""
        try:
            yield
        except EXPLAINED as e:
            what, detail = e.args if isinstance(e, Failure) else (repr(e), "".join(traceback.format_exception(e)[-2:]))
            raise Failure(what, f"{detail[:5000]}\n  of {request.path} {json.dumps(request.fields)}\n"
                          f"  alone: {json.dumps(request.expected)[:3000]}") from e

    def pause(self):
        self.paused = True
        while self.running:
            time.sleep(0.05)

    def resume(self):
        self.paused = False

    def end(self):
        self.ended = True
        self.thread.join()

    def sum(self, *kinds):
        """Requests of these kinds, or of all, whatever became of them."""
        return sum(count for (kind, _), count in self.counts.items() if kind in (kinds or KINDS))

    async def _main(self):
        await asyncio.gather(*(self._client(Client(self, i)) for i in range(self.n)))
        self.cpu_seconds = time.thread_time()

    async def _client(self, client):
        kinds, weights = list(KINDS), list(KINDS.values())
        while not self.ended:
            if self.paused:
                if client.connection:
                    client.connection = client.connection.transport.abort()
                await asyncio.sleep(0.05)
                continue
            kind = client.draw.choices(kinds, weights)[0]
            self.running += 1
            try:
                outcome = await getattr(client, kind)()
            except EXPLAINED as e:
                outcome = "failed"
                told = e.args if isinstance(e, Failure) else (repr(e), "".join(traceback.format_exception(e)[-3:]))
                self.fail(f"{kind} {client.number}-{client.n} from port {client.port}: {told[0]}", told[1])
            finally:
                self.running -= 1
            self.counts[kind, outcome] += 1
        if client.connection:
            client.connection.transport.abort()
