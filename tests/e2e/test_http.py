"""HTTP itself, on raw sockets: requests that mean two things, clients that are slow, gone or never read."""

import contextlib
import json
import os
import socket
import struct
import time
import unittest

from harness import Server, ServerTest, not_on_a_gpu, parse_events, read_to_end, read_until, readable, scale, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def reset(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


class Framing(ServerTest):
    def setUp(self):
        self.body = json.dumps({"model": self.server.name, "prompt": "Once", "max_tokens": 1}).encode()
        self.length = b"Content-Length: %d\r\n" % len(self.body)

    def expect_refused(self, data, statuses=(400,)):
        status, answer, closed = self.server.raw(data)
        self.assertIn(status, statuses, answer[:300])
        self.assertTrue(closed, "the connection must be closed")
        self.assertNotIn(b"HTTP/1.1 200", answer, "what follows is not a second request")

    def test_refused(self):
        b, n = self.body, self.length
        chunked = b"%x\r\n" % len(b) + b + b"\r\n0\r\n\r\n"
        smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        cases = {
            "the same length twice": HEAD + n + n + b"\r\n" + b,
            "two lengths": HEAD + n + b"Content-Length: 5\r\n\r\n" + b,
            "length and chunked": HEAD + n + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
            "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\n" + n + b"\r\n" + chunked,
            "gzip": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + b,
            "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked,
            "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
            "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunked,
            "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + chunked,
            "identity": HEAD + b"Transfer-Encoding: identity\r\n" + n + b"\r\n" + b,
            "two hosts": HEAD + b"Host: y\r\n" + n + b"\r\n" + b,
            "the same host twice": HEAD + b"Host: x\r\n" + n + b"\r\n" + b,
            "space before the colon": HEAD + n.replace(b":", b" :") + b"\r\n" + b + smuggled,
            "tab before the colon": HEAD + n.replace(b":", b"\t:") + b"\r\n" + b + smuggled,
            "space before Transfer-Encoding's colon": HEAD + n + b"Transfer-Encoding : chunked\r\n\r\n" + b,
            "control character in a value": HEAD + b"X-A: a\x01b\r\n" + n + b"\r\n" + b,
            "DEL in a value": HEAD + b"X-A: a\x7fb\r\n" + n + b"\r\n" + b,
            "control character in a name": HEAD + b"X\x02A: b\r\n" + n + b"\r\n" + b,
            "length -1": HEAD + b"Content-Length: -1\r\n\r\n" + b,
            "length +5": HEAD + b"Content-Length: +5\r\n\r\n" + b,
            "length 5x": HEAD + b"Content-Length: 5x\r\n\r\n" + b,
            "length 0x5": HEAD + b"Content-Length: 0x5\r\n\r\n" + b,
            "length 5, 5": HEAD + b"Content-Length: 5, 5\r\n\r\n" + b,
            "no host": HEAD.replace(b"Host: x\r\n", b"") + n + b"\r\n" + b,
            "bad chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + b,
        }
        for what, data in cases.items():
            with self.subTest(what=what):
                self.expect_refused(data)
        with self.subTest(what="length of 2^64"):
            self.expect_refused(HEAD + b"Content-Length: 18446744073709551617\r\n\r\n" + b, (400, 413))
        self.assertEqual(self.server.get("/health").status, 200)

    def test_length_required(self):
        status, answer, _ = self.server.raw(HEAD + b"Connection: close\r\n\r\n")
        self.assertEqual(status, 411, answer[:300])

    def test_nul_in_a_header(self):
        # libmicrohttpd 0.9.75 ends the value there and shows nobody the rest: a 400, or the value up to the NUL.
        head = HEAD + b"X-A: a\0b\r\nConnection: close\r\n"
        status, answer, _ = self.server.raw(head + self.length + b"\r\n" + self.body)
        self.assertIn(status, (200, 400), answer[:300])
        self.assertTrue(answer.endswith(b"}"), "and nothing after the answer")

    def test_oversized_head(self):
        for data in (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 200_000 + b"\r\n\r\n",
                     b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                     b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(20_000))
                     + b"\r\n"):
            status, answer, closed = self.server.raw(data)
            self.assertIn(status, (None, 400, 413, 414, 431), answer[:200])
            self.assertTrue(closed)
        self.assertEqual(self.server.get("/health").status, 200)

    def test_not_http(self):
        for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 300 + b"\r\n\r\n",
                     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health\r\n\r\n", b"GET\r\n\r\n",
                     b"\r\n" * 50 + b"x\r\n\r\n", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n"):
            status, answer, closed = self.server.raw(data + b"Connection: close\r\n\r\n", timeout=12)
            self.assertTrue(status is None or 400 <= status < 600, (data[:20], answer[:200]))
            self.assertTrue(closed, data[:20])
        self.assertEqual(self.server.get("/health").status, 200)

    def test_target_with_a_host(self):
        status, answer, _ = self.server.raw(b"GET http://x/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        self.assertEqual(status, 200, answer[:300])

    def test_encoded_body(self):
        head = HEAD + b"Connection: close\r\nContent-Encoding: %s\r\n" + self.length + b"\r\n"
        self.assertEqual(self.server.raw(head % b"gzip" + self.body)[0], 415)
        self.assertEqual(self.server.raw(head % b"identity" + self.body)[0], 200)

    def test_odd_methods(self):
        for method in (b"BREW", b"CONNECT", b"TRACE", b"get"):
            status, answer, _ = self.server.raw(method + b" /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            self.assertIn(status, (400, 405, 501), (method, answer[:200]))

    def test_chunked_request(self):
        b = self.body
        data = (HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\n" + b[:5] + b"\r\n"
                + b"%X\r\n" % (len(b) - 5) + b[5:] + b"\r\n0\r\n\r\n")
        status, answer, closed = self.server.raw(data)
        self.assertEqual(status, 200, answer[:300])
        self.assertTrue(closed)

    def test_expect_continue(self):
        with self.server.socket() as s:
            s.sendall(HEAD + self.length + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
            read_until(s, b"100 Continue\r\n\r\n")
            s.sendall(self.body)
            self.assertEqual(read_to_end(s)[0], 200)

    def test_pipelined(self):
        one = HEAD + self.length + b"\r\n" + self.body
        last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        status, answer, closed = self.server.raw(one + one + last)
        self.assertEqual(status, 200)
        self.assertEqual(answer.count(b"HTTP/1.1 200"), 3, answer[:1000])
        self.assertTrue(closed)

    def test_http_1_0(self):
        head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
        status, answer, closed = self.server.raw(head + self.length + b"\r\n" + self.body)
        self.assertEqual(status, 200)
        self.assertTrue(closed)
        body = json.dumps({"model": self.server.name, "prompt": "Once", "max_tokens": 5, "stream": True}).encode()
        status, answer, closed = self.server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.assertEqual(status, 200)
        headers, events = answer.split(b"\r\n\r\n", 1)
        self.assertNotIn(b"chunked", headers)
        parse_events(events)

    def test_one_byte_at_a_time(self):
        with self.server.socket() as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in HEAD + self.length + b"Connection: close\r\n\r\n" + self.body:
                s.sendall(bytes([byte]))
                time.sleep(0.001)
            self.assertEqual(read_to_end(s)[0], 200)

    def test_error_after_body_keeps_connection(self):
        # A 400 for what the body says leaves the connection usable; a client library counts on it.
        bad = b'{"model": 5}'
        with self.server.socket() as s:
            s.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(bad) + bad)
            read_until(s, b"}}")
            s.sendall(HEAD + self.length + b"Connection: close\r\n\r\n" + self.body)
            self.assertEqual(read_to_end(s)[0], 200)


class SlowAndGone(ServerTest):
    flags = ("--header-timeout", "1", "--body-timeout", "1", "--idle-timeout", "1", "--slow-client-timeout", "1",
             "--keep-alive-interval", "0.2", "--max-num-seqs", "8")

    def until_closed(self, s, send, seconds=8):
        """Keeps sending single bytes until the server closes: after how many seconds, and what it had said."""
        began, data = time.monotonic(), b""
        while time.monotonic() - began < seconds:
            if readable(s, 0.1):
                try:
                    chunk = s.recv(65536)
                except ConnectionResetError:
                    chunk = b""
                if not chunk:
                    return time.monotonic() - began, data
                data += chunk
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if send:
                    s.sendall(send)
        raise AssertionError(f"still open after {seconds} s")

    def test_header_drip(self):
        with self.server.socket() as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
            after, data = self.until_closed(s, b"a")
            self.assertGreater(after, 0.7)
            self.assertTrue(not data or b" 408 " in data, data)

    def test_nothing_sent(self):
        with self.server.socket() as s:
            after, data = self.until_closed(s, b"")
            self.assertGreater(after, 0.7)
            self.assertTrue(not data or b" 408 " in data, data)

    def test_idle_after_a_request(self):
        with self.server.socket() as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            after, data = self.until_closed(s, b"")
            self.assertIn(b"200 OK", data)
            self.assertGreater(after, 0.7)

    def test_slow_body(self):
        with self.server.socket() as s:
            s.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
            after, data = self.until_closed(s, b" ")
            self.assertGreater(after, 0.7)
            self.assertTrue(not data or b" 408 " in data, data)

    def test_half_closed_in_the_body(self):
        with self.server.socket() as s:
            s.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            s.shutdown(socket.SHUT_WR)
            self.assertTrue(read_to_end(s)[2])
        self.server.wait_idle()

    def start_stream(self):
        """One that goes on for long, on a GPU, too: 64 choices, eight at a time."""
        s = self.server.socket()
        s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=1800, n=64, ignore_eos=True, stream=True))
        read_until(s, b"data: ")
        return s

    def aborts(self):
        return self.server.metrics()['gptd_request_success_total{finished_reason="abort"}']

    def test_leaving_mid_stream(self):
        for leave in (socket.socket.close, reset, lambda s: s.shutdown(socket.SHUT_WR)):
            before = self.aborts()
            s = self.start_stream()
            leave(s)
            self.server.wait_idle()
            wait_until(lambda: self.aborts() > before, 5, "it counts as aborted")
            s.close()

    def test_half_closed_without_reading(self):
        """A client who takes nothing more is noticed to have gone as well as one who waits."""
        before = self.aborts()
        with self.server.socket(receive_buffer=4096) as s:
            s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=1800, n=32, ignore_eos=True, stream=True, logprobs=5))
            read_until(s, b"data: ")
            time.sleep(1)  # long enough for all buffers on the way to be full
            s.shutdown(socket.SHUT_WR)
            wait_until(lambda: self.aborts() > before, 5, "it counts as aborted")
        self.server.wait_idle()

    def test_leaving_beside_an_older_connection(self):
        # libmicrohttpd forgets a connection that it gave up after it was suspended, until all that are older have gone.
        server = Server("--http-threads", "1")
        with server.socket() as older:
            older.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(older, b"}")
            for leave in (socket.socket.close, reset, lambda s: s.shutdown(socket.SHUT_WR)) * 3:
                for version in (b"1.1", b"1.0"):
                    data = server.completion_bytes(prompt="Once", max_tokens=1800, n=32, ignore_eos=True, stream=True)
                    s = server.socket()
                    s.sendall(data.replace(b"1.1", version, 1))
                    read_until(s, b"data: ")
                    leave(s)
            wait_until(lambda: server.get("/debug/state").json()["connections"] <= 2, 5, "none of them is left")
        server.check_stopped()

    def test_leaving_unstreamed(self):
        for leave in (socket.socket.close, reset):
            before = self.aborts()
            s = self.server.socket()
            s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=1800, n=64, ignore_eos=True))
            wait_until(lambda: self.server.metrics()["gptd_num_requests_running"] > 0, 5, "it runs")
            leave(s)
            self.server.wait_idle()
            wait_until(lambda: self.aborts() > before, 5, "it counts as aborted")

    def test_leaving_the_queue(self):
        holder = self.start_stream()
        s = self.server.socket()
        s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=5))
        wait_until(lambda: self.server.metrics()["gptd_num_requests_waiting"] == 1, 5, "it waits")
        s.close()
        wait_until(lambda: self.server.metrics()["gptd_num_requests_waiting"] == 0, 5, "it no longer waits")
        holder.close()
        self.server.wait_idle()

    def test_keep_alive_comments(self):
        holder = self.start_stream()
        with self.server.socket() as s:
            s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=2, stream=True))
            read_until(s, b": keep-alive\n\n")
            holder.close()
            data = read_until(s, b"data: [DONE]\n\n")
            self.assertIn(b"data: {", data)
        self.server.wait_idle()

    def test_client_that_never_reads(self):
        fds = self.server.metrics()["process_open_fds"]
        s = self.server.socket(receive_buffer=4096)
        s.sendall(self.server.completion_bytes(prompt="Once", max_tokens=scale(1800, 300), n=8, logprobs=5, stream=True,
                                               ignore_eos=True))
        time.sleep(1)
        self.server.wait_idle(40)
        wait_until(lambda: self.server.metrics()["process_open_fds"] <= fds, 20, "its connection is closed")
        s.close()

    def test_reset_at_any_time(self):
        data = self.server.completion_bytes(prompt="Once", max_tokens=50, stream=True)
        for cut in range(1, len(data), max(1, len(data) // 25)):
            s = self.server.socket()
            s.sendall(data[:cut])
            reset(s)
        self.server.wait_idle()
        self.assertEqual(self.server.get("/health").status, 200)


class Connections(unittest.TestCase):
    def test_limit(self):
        server = Server("--max-connections", "8")
        idle = [server.socket() for _ in range(8)]
        wait_until(lambda: self.full(server), 5, "the limit is reached")
        for _ in range(20):
            with server.socket() as s:
                began = time.monotonic()
                s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                status, data, closed = read_to_end(s)
                self.assertEqual(status, 503, data)
                self.assertIn(b"retry-after:", data.lower())
                self.assertTrue(closed)
                self.assertLess(time.monotonic() - began, 5)
        for s in idle:
            s.close()
        wait_until(lambda: not self.full(server), 5, "there is room again")
        server.check_stopped()

    def test_limit_in_a_burst(self):
        # The limit is exact however fast they come, and again when they have gone.
        server = Server("--max-connections", "8")

        def n_files():
            return len(os.listdir(f"/proc/{server.process.pid}/fd"))

        before = n_files()
        for _ in range(2):
            burst = [server.socket() for _ in range(60)]
            for s in burst:
                s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            statuses = [read_until(s, b"\r\n\r\n").split(b" ", 2)[1] for s in burst]
            self.assertEqual(statuses, [b"200"] * 8 + [b"503"] * 52)
            for s in burst:
                s.close()
            wait_until(lambda: n_files() <= before, 10, "all have gone")
        server.check_stopped()

    @staticmethod
    def full(server):
        status, data, _ = server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return status == 503

    def test_many_idle(self):
        server = Server("--max-connections", "2000", "--idle-timeout", "60", "--header-timeout", "60")
        idle = [server.socket() for _ in range(900)]
        began = time.monotonic()
        self.assertEqual(server.complete(prompt="Once", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"], 2)
        self.assertLess(time.monotonic() - began, 5)
        for s in idle:
            s.close()
        server.check_stopped()


class Bodies(ServerTest):
    flags = ["--max-body-bytes", "4096"]

    def test_running_streams_hold_no_bodies(self):
        """Only bodies that are in memory count towards what all of them may take together: 16 of the longest."""
        request = self.server.completion_bytes(prompt="Once", max_tokens=1500, ignore_eos=True, stream=True,
                                               user="x" * 3800)
        with contextlib.ExitStack() as stack:
            for _ in range(24):
                s = stack.enter_context(self.server.socket(receive_buffer=4096))
                s.sendall(request)
                self.assertIn(b" 200 ", read_until(s, b"\r\n\r\n"))
        self.server.wait_idle(60)


class SharedParams(ServerTest):
    @not_on_a_gpu("CUDA's own memory, which comes with the first requests, hides what is looked for")
    def test_one_copy(self):
        # 1,000 prompts and bad words of 0.3 MB as ids: once in memory, not 1,000 times.
        before = self.server.rss_bytes()
        words = [f"q{i}z".ljust(250, "x") for i in range(256)]
        self.server.complete(prompt=[[5]] * 1000, max_tokens=1, bad_words=words)
        self.assertLess(self.server.rss_bytes(peak=True) - before, scale(64, 512) << 20)


class RequestTimeout(ServerTest):
    flags = ("--request-timeout", "0.3", "--max-num-seqs", "16")

    def test_stream_ends_in_an_error(self):
        # Cut without [DONE], a stream must say so in band: clients notice nothing otherwise.
        answer = self.server.completions(prompt="Once", max_tokens=1900, n=128, ignore_eos=True, stream=True)
        self.assertEqual(answer.status, 200)
        self.assertNotIn(b"[DONE]", answer.body)
        last = [line for line in answer.body.decode().split("\n\n") if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.server.wait_idle()

    def test_unstreamed(self):
        answer = self.server.completions(prompt="Once", max_tokens=1900, n=128, ignore_eos=True)
        self.assertIn(answer.status, (408, 503, 504))
        self.assertEqual(set(answer.error), {"message", "type", "param", "code"})
        self.server.wait_idle()


if __name__ == "__main__":
    unittest.main()
