"""Crowds: of idle and slow clients, of clients that never read; and some seconds of fuzzing (crowd.py and fuzz_http.py do more)."""

import contextlib
import json
import os
import time
import unittest

import crowd
import fuzz_http
from harness import Server, in_threads, scale, wait_until


class IdleAndSlow(unittest.TestCase):
    def test_the_others_lose_nothing(self):
        """1,000 idle connections and 40 slow ones, which are cut and come back, while 20 clients are served again and again."""
        n_idle, n_slow, n_streams = scale(1000, 200), scale(40, 20), scale(20, 8)
        if not crowd.allow_files(2 * n_idle + 512):
            self.skipTest(f"ulimit -Hn is below {2 * n_idle + 512}")
        server = Server("--max-connections", str(2 * n_idle), "--deterministic", "--header-timeout", "1",
                        "--body-timeout", "1", "--idle-timeout", "60")
        fields = crowd.requests(n_streams, 60)
        wanted = [server.complete(**f)["choices"][0] for f in fields]
        there = crowd.Crowd(server.port, n_idle, n_slow, interval=0.3)
        began, rounds = time.monotonic(), 0
        while time.monotonic() < began + 3:
            crowd.run_streams(server, fields, wanted)
            rounds += 1
        left = there.end()
        print(f"\n{rounds} times {n_streams} streams; {json.dumps(left)}")
        self.assertEqual(left["kept"], n_idle // 2)
        self.assertLessEqual(set(left["statuses"]), {"408", ""})  # nothing: one more byte crossed with the answer
        self.assertGreater(left["statuses"]["408"], 0.9 * sum(left["statuses"].values()))
        self.assertGreater(left["cut"], n_slow)
        self.assertLess(left["longest"], scale(3, 15))
        server.wait_idle()
        wait_until(lambda: server.get("/debug/state").json()["connections"] <= 1, 10, "all have gone")
        server.check_stopped()

    def test_too_few_files(self):
        """The limit of open files is raised as far as it may be, and connections beyond it are refused, not left waiting."""
        health = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with contextlib.ExitStack() as stack:
            server = Server("--max-connections", "4096", "--header-timeout", "20", files=(256, 500))
            self.assertTrue(any("--max-connections: 308 instead of 4096" in line for line in server.log), server.log)
            idle = [stack.enter_context(server.socket()) for _ in range(308)]
            wait_until(lambda: server.raw(health)[0] == 503, 5, "it is full")
            for s in idle[:10]:
                s.close()
            wait_until(lambda: server.raw(health)[0] == 200, 5, "it is not")
            server.check_stopped()


class DeafClients(unittest.TestCase):
    """They ask for much and read nothing."""

    def test_cost_is_bounded(self):
        tokens, n, k, n_streams, n_whole = scale(60, 30), 4, 20, scale(40, 6), scale(20, 3)
        server = Server("--slow-client-timeout", "1", "--idle-timeout", "1", "--kv-cache-memory-bytes", "64M")
        fields = {"prompt": "Once upon a time", "max_tokens": tokens, "n": n, "logprobs": k, "ignore_eos": True}
        whole = len(server.completions(**fields).body)
        in_threads(lambda: server.completions(**fields), [()] * (n_streams + n_whole))  # the KV cache is touched for the first time
        event = len(server.completions(stream=True, **fields).body) // (n * tokens)
        # A choice holds its tokens until they are taken: 16 bytes each, 16 for each alternative. A stream: an event for each of the
        # 32 tokens of a choice that are taken at once. An answer sent whole: its parts, then all of it. Both in buffers that
        # double. A connection: 32 KiB of libmicrohttpd's, 8 of ours. And half as much again that malloc loses between them. The
        # kernel holds 64 KiB more of each.
        choice = tokens * (16 + 16 * k)
        connection = (32 + 8) << 10
        bound = n_streams * (connection + n * (choice + 2 * 32 * event)) + n_whole * (connection + n * choice + 4 * whole)
        bound = bound * 3 // 2

        def one_round():
            with contextlib.ExitStack() as stack:
                for i in range(n_streams + n_whole):
                    s = stack.enter_context(server.socket(receive_buffer=4096))
                    s.sendall(server.completion_bytes(stream=i < n_streams, **fields))
                peak = 0
                began = time.monotonic()
                while server.get("/debug/state").json()["connections"] > 1:
                    peak = max(peak, server.rss_bytes())
                    time.sleep(0.02)
                    self.assertLess(time.monotonic() - began, scale(30, 120), "they are cut")
            server.wait_idle()
            return peak, server.rss_bytes(), len(os.listdir(f"/proc/{server.process.pid}/fd"))

        before, files = server.rss_bytes(), len(os.listdir(f"/proc/{server.process.pid}/fd"))
        rounds = [one_round() for _ in range(scale(2, 1))]
        most = max(r[0] for r in rounds) - before
        print(f"\n{n_streams} streams, {n_whole} answers of {whole} bytes: {most / 2**20:.1f} MiB at most, the bound is "
              f"{bound / 2**20:.1f}; after each round {[f'{(r[1] - before) / 2**20:.1f}' for r in rounds]} MiB")
        self.assertLessEqual(max(r[2] for r in rounds), files + 1, "files")
        if scale(True, False):  # a sanitizer keeps what is freed
            self.assertLess(most, bound)
            self.assertLess(rounds[-1][1] - rounds[0][1], 4 << 20)
        server.check_stopped()


class Fuzzed(unittest.TestCase):
    def test_whole_server(self):
        fuzz = fuzz_http.Fuzz(seed=1)
        before, files = fuzz.server.rss_bytes(), len(os.listdir(f"/proc/{fuzz.server.process.pid}/fd"))
        fuzz.run(seconds=scale(6, 3))
        self.assertEqual(fuzz.findings, [])
        figures = fuzz.finish()
        print(f"\n{fuzz.n} inputs: {dict(sorted(fuzz.statuses.items()))}, {figures}")
        self.assertGreater(fuzz.n, scale(1000, 200))
        if scale(True, False):
            self.assertLess(figures["rss"] - before, 96 << 20)
        self.assertLessEqual(figures["files"], files + 2)


if __name__ == "__main__":
    unittest.main()
