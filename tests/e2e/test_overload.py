"""More than the server can do: every request is answered exactly, or refused with when to come again; nothing is lost."""

import threading
import time
import unittest

import harness
from harness import StreamError, in_threads, parse_events, read_until, scale, wait_until

REASONS = ("queue_full", "queue_wait", "queue_timeout")


def refused(server):
    metrics = server.metrics()
    return {reason: metrics[f'gptd_requests_refused_total{{reason="{reason}"}}'] for reason in REASONS}


def occupy(server):
    """A stream that holds the only slot for its choices, one after the other, until it is closed."""
    s = server.socket(timeout=60)
    s.sendall(server.completion_bytes(prompt="Once", max_tokens=1500, n=32, ignore_eos=True, stream=True))
    read_until(s, b"data: ")
    return s


class OwnServer(unittest.TestCase):
    def start(self, *flags):
        server = harness.same_server(*flags)
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        return server


class Overload(OwnServer):
    def check_refusal(self, answer):
        self.assertIn(answer.status, (429, 503), answer)
        self.assertRegex(answer.headers["Retry-After"], r"^[1-9][0-9]?$")
        self.assertLessEqual(int(answer.headers["Retry-After"]), 60)
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        self.assertEqual(answer.error["type"], {429: "rate_limit_error", 503: "service_unavailable_error"}[answer.status])
        self.assertTrue(answer.error["message"])

    def test_exact_or_refused(self):
        """Some ten times as many requests at once as the queue takes, with a deadline that some will miss."""
        server = self.start("--max-num-seqs", "3", "--max-queue-requests", "8", "--queue-timeout", "0.3",
                            "--kv-cache-memory-bytes", "2M")
        fields = [{"prompt": [1, 1500 + i, *[1505 + (i + k) % 40 for k in range(i * 7 % 90)]], "max_tokens": 20 + i * 11 % 100,
                   "temperature": 0, "ignore_eos": True, "return_token_ids": True} for i in range(scale(40, 12))]
        alone = [server.complete(**f)["choices"][0]["token_ids"] for f in fields]
        answers, ended = [], threading.Event()

        def health():
            while not ended.is_set():
                self.assertEqual(server.get("/health").status, 200)
                time.sleep(0.05)

        def client(i):
            for turn in range(3):
                stream = (i + turn) % 2 == 0
                answer = server.completions(stream=stream, priority=i % 3 - 1, **fields[i])
                answers.append(answer)
                if answer.status != 200:
                    self.check_refusal(answer)
                    continue
                choices = [e["choices"][0] for e in parse_events(answer.body)] if stream else answer.json()["choices"]
                self.assertEqual(sum((c["token_ids"] for c in choices), []), alone[i])

        watching = threading.Thread(target=health)
        watching.start()
        try:
            in_threads(client, [(i,) for i in range(len(fields))] * 2)
        finally:
            ended.set()
            watching.join()
        statuses = [a.status for a in answers]
        self.assertEqual(len(statuses), 6 * len(fields))
        self.assertGreater(statuses.count(200), 0)
        self.assertGreater(statuses.count(429), 0)
        counts = refused(server)
        self.assertEqual(counts["queue_full"] + counts["queue_wait"], statuses.count(429))
        self.assertEqual(counts["queue_timeout"], statuses.count(503))
        server.wait_idle()
        self.assertEqual(server.complete(**fields[0])["choices"][0]["token_ids"], alone[0])
        server.check_stopped()

    def test_obeying_retry_after(self):
        """A crowd three times as large as slots and queue: all get in, most at the first or second try."""
        server = self.start("--max-num-seqs", "2", "--max-queue-requests", "6")
        n = scale(24, 12)

        def client(i):
            for tries in range(1, 20):
                answer = server.completions(prompt=[1, 1500 + i], max_tokens=scale(200, 40), ignore_eos=True)
                if answer.status == 200:
                    return tries
                self.check_refusal(answer)
                time.sleep(int(answer.headers["Retry-After"]))
            raise AssertionError("refused twenty times")

        tries = in_threads(client, [(i,) for i in range(n)])
        print(f"tries of {n} clients that obey Retry-After: {sorted(tries)}")
        self.assertGreater(max(tries), 1)
        self.assertLess(sum(tries) / n, 4)
        server.check_stopped()


class QueueTimeout(OwnServer):
    def held(self, *flags):
        server = self.start("--max-num-seqs", "1", "--queue-timeout", "0.5", *flags)
        holder = occupy(server)
        self.addCleanup(holder.close)
        return server, holder

    def test_status(self):
        """A stream, too, is told by its status: nothing has been sent yet."""
        server, holder = self.held()
        for fields in ({}, {"stream": True}, {"n": 2, "stream": True}, {"prompt": ["Twice", "Thrice"]}):
            answer = server.completions(**{"prompt": "Twice", "max_tokens": 3, **fields})
            self.assertEqual((answer.status, answer.error["type"]), (503, "service_unavailable_error"), (fields, answer))
            self.assertIn("in time", answer.error["message"])
            self.assertGreaterEqual(int(answer.headers["Retry-After"]), 1)
        self.assertEqual(refused(server)["queue_timeout"], 4)
        self.assertEqual(server.metrics()["gptd_num_requests_running"], 1)  # the last one did not wait for its second prompt
        holder.close()
        server.wait_idle()
        server.check_stopped()

    def test_in_the_stream(self):
        """Where the silence has been broken before, it is the stream that says so."""
        server, holder = self.held("--keep-alive-interval", "0.1")
        answer = server.completions(prompt="Twice", max_tokens=3, stream=True)
        self.assertEqual(answer.status, 200)
        self.assertIn(b": keep-alive\n\n", answer.body)
        self.assertIn(b'"type":"service_unavailable_error"', answer.body)
        with self.assertRaisesRegex(StreamError, "in time"):
            parse_events(answer.body)
        holder.close()
        server.check_stopped()

    def test_further_prompts_of_a_call(self):
        """A call that has begun is not given up because its prompts wait for one another."""
        server = self.start("--max-num-seqs", "1", "--queue-timeout", "0.1")
        answer = server.complete(prompt=["Once"] * 3, max_tokens=scale(600, 150), ignore_eos=True)
        self.assertEqual(answer["usage"]["completion_tokens"], 3 * scale(600, 150))
        self.assertEqual(sum(refused(server).values()), 0)
        server.check_stopped()

    def test_none(self):
        server = self.start("--max-num-seqs", "1", "--queue-timeout", "0")
        holder = occupy(server)
        waiting = server.socket(timeout=60)
        waiting.sendall(server.completion_bytes(prompt="Twice", max_tokens=3))
        wait_until(lambda: server.metrics()["gptd_num_requests_waiting"] == 1, 5, "one waits")
        time.sleep(0.3)
        self.assertFalse(harness.readable(waiting, 0))
        holder.close()
        read_until(waiting, b"200 OK")
        waiting.close()
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
