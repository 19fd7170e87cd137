"""One connection, two requests: an odd or malformed one, and a good one behind it. Either the good one's answer is exactly what it
always is, or the connection has ended; nothing else is ever answered, least of all bytes of a body."""

import contextlib
import json
import random
import socket
import time
import unittest

import wire
from harness import ServerTest, in_threads, read_to_end, read_until, scale
from test_http import reset

ID = "X-Request-Id: "
SMUGGLED = f"GET /health HTTP/1.1\r\nHost: x\r\n{ID}smuggled\r\n\r\n".encode()
POST = f"POST /tokenize HTTP/1.1\r\nHost: x\r\n{ID}first\r\nContent-Type: application/json\r\n".encode()
GET = f"GET /version HTTP/1.1\r\nHost: x\r\n{ID}first\r\n".encode()
BODY = b'{"prompt": "Once"}'
N = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ONE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)

# What is fine, however odd: both are answered, the first with this status.
KEPT = {
    "plain": (200, POST + N + b"\r\n" + BODY),
    "a body that is a request": (400, POST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "a body where none belongs": (200, GET + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "HEAD with a body": (200, GET.replace(b"GET", b"HEAD") + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "OPTIONS with a body": (204, GET.replace(b"GET", b"OPTIONS") + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "nowhere, with a body":
        (404, POST.replace(b"/tokenize", b"/nowhere") + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "a method that is not allowed, with a body":
        (405, POST.replace(b"POST", b"DELETE") + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "another type, with a body":
        (415, POST.replace(b"application/json", b"text/plain") + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "an encoding, with a body":
        (415, POST + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED),
    "no body": (400, POST + b"Content-Length: 0\r\n\r\n"),
    "many zeros": (200, POST + N.replace(b": ", b": " + b"0" * 30) + b"\r\n" + BODY),
    "absolute form": (200, GET.replace(b"/version", b"http://x/version") + b"\r\n"),
    "absolute form in capitals": (200, GET.replace(b"/version", b"HTTP://X/version") + b"\r\n"),
    "absolute form without a path": (200, GET.replace(b"/version", b"http://x") + b"\r\n"),
    "OPTIONS *": (404, GET.replace(b"GET /version", b"OPTIONS *") + b"\r\n"),
    "authority form": (404, GET.replace(b"GET /version", b"CONNECT x:80") + b"\r\n"),
    "an unknown method": (405, GET.replace(b"GET", b"BREW") + b"\r\n"),
    "a query of requests": (200, GET.replace(b"/version", b"/version?a=%0d%0aGET%20/health%20HTTP/1.1%0d%0a") + b"\r\n"),
    "a path of escapes": (404, GET.replace(b"/version", b"/%2e%2e/%00/%ff%zz") + b"\r\n"),
    "upgrade to WebSocket": (200, GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"),
    "upgrade to HTTP/2": (200, GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"),
    "empty lines before": (200, b"\r\n\r\n" + GET + b"\r\n"),
    "an empty value": (200, GET + b"X-A:\r\n\r\n"),
    "spaces around a value": (200, GET + b"X-A: \t b \t \r\n\r\n"),
    "many headers": (200, GET + b"".join(b"X-%d: a\r\n" % i for i in range(90)) + b"\r\n"),
    "a long value": (200, GET + b"X-A: " + b"a" * 8000 + b"\r\n\r\n"),
    "HTTP/1.0 kept alive": (200, GET.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Connection: keep-alive\r\n\r\n"),
    "Expect, and the body at once": (200, POST + N + b"Expect: 100-continue\r\n\r\n" + BODY),
}

# What is refused, or a doubt: the first may be answered so, and the connection ends.
ENDED = {
    "the same length twice": POST + N + N + b"\r\n" + BODY,
    "two lengths": POST + N + b"Content-Length: 0\r\n\r\n" + SMUGGLED,
    "two lengths, the other way round": POST + b"Content-Length: 0\r\n" + N + b"\r\n" + SMUGGLED,
    "a list of lengths": POST + b"Content-Length: 18, 18\r\n\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "a signed length": POST + N.replace(b": ", b": +") + b"\r\n" + BODY,
    "a hexadecimal length": POST + b"Content-Length: 0x12\r\n\r\n" + BODY,
    "a length in two words": POST + b"Content-Length: 1 8\r\n\r\n" + BODY,
    "a length of 2^64 + 18": POST + b"Content-Length: 18446744073709551634\r\n\r\n" + BODY,
    "an empty length": POST + b"Content-Length:\r\n\r\n" + SMUGGLED,
    "no length": POST + b"\r\n" + SMUGGLED,
    "length and chunked": POST + N + CHUNKED + b"\r\n" + ONE_CHUNK,
    "chunked and length": POST + CHUNKED + N + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and length in a GET": GET + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and gzip": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + ONE_CHUNK,
    "gzip": POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n" + ONE_CHUNK,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + ONE_CHUNK,
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + ONE_CHUNK,
    "chunked with a parameter": POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n" + ONE_CHUNK,
    "chunked after a control character": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + ONE_CHUNK,
    "an empty Transfer-Encoding": POST + b"Transfer-Encoding:\r\n" + N + b"\r\n" + BODY,
    "space before a colon": POST + N.replace(b":", b" :") + b"\r\n" + SMUGGLED,
    "tab before a colon": POST + N.replace(b":", b"\t:") + b"\r\n" + SMUGGLED,
    "space before Transfer-Encoding's colon": POST + N + b"Transfer-Encoding : chunked\r\n\r\n" + SMUGGLED,
    "space before the first header": POST.replace(b"Host", b" Host") + N + b"\r\n" + SMUGGLED,
    "a name with a quote": POST + b'"Content-Length": 18\r\n' + N + b"\r\n" + BODY,
    "no name": POST + N + b": a\r\n\r\n" + BODY,
    "no colon": POST + N + b"Hello\r\n\r\n" + BODY,
    "folded": POST + b"X-A: b\r\n Content-Length: 5\r\n" + N + b"\r\n" + BODY,
    "a folded length": POST + b"Content-Length:\r\n 18\r\n\r\n" + BODY,
    "a folded encoding": POST + N + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + BODY,
    "bare line feeds": POST.replace(b"\r\n", b"\n") + N.replace(b"\r\n", b"\n") + b"\n" + BODY,
    "one bare line feed": POST + b"X-A: b\n" + N + b"\r\n" + BODY,
    "a bare line feed at the end": POST + N + b"\n" + BODY,
    "a bare carriage return": POST + b"X-A: b\rContent-Length: 5\r\n" + N + b"\r\n" + BODY,
    "a bare carriage return before the end": POST + N + b"X: y\r\r\n\r\n" + BODY,
    "a NUL in a value": POST + b"X-A: a\0b\r\n" + N + b"\r\n" + BODY,
    "a NUL in a name": POST + b"X\0A: b\r\n" + N + b"\r\n" + BODY,
    "a NUL before the end": POST + N + b"\0\r\n\r\n" + BODY,
    "a line of NUL before the end": POST + N + b"\0: x\r\n" + SMUGGLED,
    "a NUL in a length": POST + b"Content-Length: 18\x000\r\n\r\n" + BODY,
    "a control character": POST + b"X-A: a\x01b\r\n" + N + b"\r\n" + BODY,
    "DEL": POST + b"X-A: a\x7fb\r\n" + N + b"\r\n" + BODY,
    "two hosts": POST + b"Host: y\r\n" + N + b"\r\n" + BODY,
    "no host": POST.replace(b"Host: x\r\n", b"") + N + b"\r\n" + BODY,
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "HTTP/1.2": GET.replace(b"HTTP/1.1", b"HTTP/1.2") + b"\r\n",
    "HTTP/2.0": GET.replace(b"HTTP/1.1", b"HTTP/2.0") + b"\r\n",
    "http/1.1": GET.replace(b"HTTP/1.1", b"http/1.1") + b"\r\n",
    "HTTP/1.1 and more": GET.replace(b"HTTP/1.1", b"HTTP/1.1 x") + b"\r\n",
    "chunked in HTTP/1.0": POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Connection: keep-alive\r\n" + CHUNKED + b"\r\n" + ONE_CHUNK,
    "HTTP/1.0": GET.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n",
    "Connection: close": POST + N + b"Connection: close\r\n\r\n" + BODY,
    "Connection: close among others": POST + N + b"Connection: x, close\r\n\r\n" + BODY,
    "more headers than we take": GET + b"".join(b"X-%d: a\r\n" % i for i in range(120)) + b"\r\n",
    "headers beyond any memory": GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "a name beyond any memory": GET + b"a" * 100_000 + b": b\r\n\r\n",
    "a target beyond any memory": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method beyond any memory": b"A" * 100_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body that is too long": POST + b"Content-Length: 100000000\r\n\r\n" + SMUGGLED,
    "too long a body, and Expect": POST + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n",
    "Expect where nothing is": POST.replace(b"/tokenize", b"/nowhere") + N + b"Expect: 100-continue\r\n\r\n" + SMUGGLED,
    "a ClientHello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2 + b"\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x64\0\4\0\xa0\0\0\0\2\0\0\0\0",
    "a space in the target": GET.replace(b"/version", b"/version /x") + b"\r\n",
    "two spaces before the target": GET.replace(b"/version", b" /version") + b"\r\n",
    "two spaces behind the target": GET.replace(b"/version", b"/version ") + b"\r\n",
    "a tab in the target": GET.replace(b"/version", b"/version\tx") + b"\r\n",
    "a NUL in the target": GET.replace(b"/version", b"/version\0x") + b"\r\n",
    "a carriage return in the target": GET.replace(b"/version", b"/version?\rx") + b"\r\n",
    "no target": GET.replace(b"/version ", b"") + b"\r\n",
    "a method that is no token": GET.replace(b"GET", b"G\xe4T") + b"\r\n",
    "a NUL in the method": GET.replace(b"GET", b"GET\0") + b"\r\n",
    "a colon in the method": GET.replace(b"GET", b"Host:") + b"\r\n",
    "not a request": b"hello\r\n\r\n",
    "chunked": POST + CHUNKED + b"\r\n" + ONE_CHUNK,
    "chunked in capitals": POST + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n" + ONE_CHUNK,
    "chunks in a GET": GET + CHUNKED + b"\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "an extension": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b";a=b\r\n", 1),
    "an extension of requests": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b";a=\nGET /health HTTP/1.1\r\n", 1),
    "a quoted extension": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b';a="\r\n\r\n"\r\n', 1),
    "trailers": POST + CHUNKED + b"\r\n" + ONE_CHUNK[:-2] + b"X-A: b\r\nContent-Length: 100\r\n\r\n",
    "trailers of requests": POST + CHUNKED + b"\r\n" + ONE_CHUNK[:-2] + SMUGGLED,
    "a size that is none": POST + CHUNKED + b"\r\nzz\r\n" + BODY,
    "a size with a sign": POST + CHUNKED + b"\r\n-" + ONE_CHUNK,
    "a size in 0x": POST + CHUNKED + b"\r\n0x" + ONE_CHUNK,
    "a size with a space": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b" \r\n", 1),
    "no size": POST + CHUNKED + b"\r\n\r\n" + ONE_CHUNK,
    "a size of 2^64": POST + CHUNKED + b"\r\n1" + b"0" * 16 + b"\r\n" + BODY,
    "a size of 2^63": POST + CHUNKED + b"\r\n8" + b"0" * 15 + b"\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that goes on": POST + CHUNKED + b"\r\n5\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "bare line feeds between chunks": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b"\n") + SMUGGLED,
    "a bare carriage return after a size": POST + CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b"\r", 1),
    "a bare line feed at the end of chunks": POST + CHUNKED + b"\r\n" + ONE_CHUNK[:-2] + b"\n",
}


class Desync(ServerTest):
    flags = ("--deterministic", "--header-timeout", "1", "--body-timeout", "1", "--idle-timeout", "20")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.fields = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "logprobs": 1}
        cls.wanted = cls.server.complete(**cls.fields)["choices"]

    def good(self, name="good"):
        return self.server.completion_bytes(f"{ID}{name}\r\nConnection: close\r\n", **self.fields)

    def check_good(self, answer, what):
        status, headers, body = answer
        self.assertEqual((status, headers["Content-Type"]), (200, "application/json"), what)
        self.assertEqual(json.loads(body)["choices"], self.wanted, what)

    def exchange(self, what, data, pieces):
        """The answers to data and a good request behind it, sent in pieces."""
        with self.server.socket() as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces(data, self.good()):
                    s.sendall(piece)
                    time.sleep(0.002)
            _, got, closed = read_to_end(s)
        self.assertTrue(closed, f"{what}: it stays open: {got[-500:]}")
        answers, rest = wire.split_answers(got, [data.lstrip().split(b" ", 1)[0].decode("latin-1")])
        ids = [headers["x-request-id"] for _, headers, _ in answers]
        if ids != [None]:  # libmicrohttpd 0.9.75 sends the head of its own answer to a malformed length twice
            self.assertEqual(rest, b"", f"{what}: half of an answer")
        self.assertNotIn("smuggled", ids, f"{what}: an answer to its body")
        self.assertIn(ids[1:], ([], ["good"]), f"{what}: {got[:2000]}")
        if ids[-1:] == ["good"]:
            self.check_good(answers[-1], what)
        return answers, ids

    @staticmethod
    def ways():
        def anyhow(data, more):
            r = random.Random(len(data))
            whole = data + more
            cuts = sorted(r.randrange(len(whole)) for _ in range(r.randrange(1, 6)))
            return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)]) if b > a]
        return [lambda data, more: [data + more], lambda data, more: [data, more], anyhow]

    def test_kept(self):
        def check(what, status, data, pieces):
            answers, ids = self.exchange(what, data, pieces)
            self.assertEqual(([a[0] for a in answers], ids), ([status, 200], ["first", "good"]), what)
        in_threads(check, [(what, *case, pieces) for what, case in KEPT.items() for pieces in self.ways()])

    def test_ended(self):
        def check(what, data, pieces):
            answers, ids = self.exchange(what, data, pieces)
            self.assertNotIn("good", ids, f"{what}: {answers}")
        in_threads(check, [(what, data, pieces) for what, data in ENDED.items() for pieces in self.ways()])
        names = {e.get("id") for e in self.server.log_entries()}
        self.assertIn("first", names)
        self.assertNotIn("smuggled", names)

    def test_many_pipelined(self):
        """50 in one go, among them some that are refused and streams: each is answered, in order."""
        kinds = [lambda i: wire.request("GET", "/version", None, f"{ID}{i}"),
                 lambda i: wire.request("POST", "/tokenize", {"prompt": f"Number {i}"}, f"{ID}{i}"),
                 lambda i: wire.request("POST", "/nowhere", {"a": i}, f"{ID}{i}"),
                 lambda i: self.server.completion_bytes(f"{ID}{i}\r\n", prompt="Once", max_tokens=3, stream=True),
                 lambda i: wire.request("POST", "/v1/completions", b"{", f"{ID}{i}")]
        data = b"".join(kinds[i % 5](i) for i in range(49)) + self.good("49")
        with self.server.socket() as s:
            s.sendall(data)
            _, got, closed = read_to_end(s)
        answers, rest = wire.split_answers(got)
        self.assertEqual((len(answers), rest, closed), (50, b"", True))
        self.assertEqual([headers["x-request-id"] for _, headers, _ in answers], [str(i) for i in range(50)])
        self.assertEqual([status for status, _, _ in answers[:-1]], [(200, 200, 404, 200, 400)[i % 5] for i in range(49)])
        self.check_good(answers[-1], "the last")

    def test_half_closed_at_once(self):
        """Whoever sends no more has left, as proxies see it: what takes time is given up, nothing is answered by half."""
        for data in (wire.request("GET", "/version"), wire.request("POST", "/tokenize", {"prompt": "Once"}), self.good(),
                     self.server.completion_bytes(prompt="Once", max_tokens=1500, n=16, ignore_eos=True)):
            began = time.monotonic()
            with self.server.socket() as s:
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                _, got, closed = read_to_end(s)
            self.assertTrue(closed)
            self.assertLess(time.monotonic() - began, scale(3, 10), "before the idle timeout, which is 20 s here")
            answers, rest = wire.split_answers(got)
            self.assertEqual(rest, b"")
            self.assertIn([status for status, _, _ in answers], ([], [200]))
        self.server.wait_idle()

    def test_reset_anywhere(self):
        """In the body, in the answer, in a stream, and with more requests behind: nothing remains."""
        stream = self.server.completion_bytes(prompt="Once", max_tokens=1500, n=8, ignore_eos=True, stream=True)
        whole = self.server.completion_bytes(prompt="Once", max_tokens=40, n=8, ignore_eos=True)
        for data, until in ((stream[:-5], b""), (stream, b""), (stream, b"data: "), (stream + self.good() * 3, b"data: "),
                            (whole, b""), (whole, b"HTTP/1.1 200"), (b"\r\n".join([whole, whole]), b"HTTP/1.1 200")):
            for _ in range(scale(5, 2)):
                s = self.server.socket()
                s.sendall(data)
                read_until(s, until)
                reset(s)
        self.server.wait_idle()
        state = self.server.get("/debug/state").json()
        self.assertLessEqual((state["connections"], state["exchanges"]), (2, 1), state)


if __name__ == "__main__":
    unittest.main()
