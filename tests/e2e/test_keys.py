"""API keys: who is let in, roles, limits, and SIGHUP."""

import hashlib
import json
import os
import signal
import tempfile
import time
import unittest

from harness import Server, in_threads, wait_until


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


class Keys(unittest.TestCase):
    def test_api_keys(self):
        server = Server("--api-key", "sk-one", env={"GPTD_SERVED_MODEL_NAME": "front,back"})
        server.name = "front"
        completion = {"model": "front", "prompt": "Once", "max_tokens": 1}
        wrong = ("Bearer wrong", "sk-one", "Bearer sk-on", "Bearer sk-one2", "Bearer ", "Basic sk-one")
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            for method, path, body in (("POST", "/v1/completions", completion), ("GET", "/v1/models", None),
                                       ("POST", "/tokenize", completion), ("GET", "/metrics", None)):
                answer = server.request(method, path, body, headers=headers)
                self.assertEqual(answer.status, 401, (headers, path))
                self.assertEqual(answer.error["type"], "authentication_error")
                self.assertNotIn("sk-one", answer.body.decode())
        self.assertEqual(server.get("/health").status, 200)
        good = {"Authorization": "Bearer sk-one"}
        self.assertEqual(server.post("/v1/completions", completion, headers=good).status, 200)
        self.assertEqual(server.post("/v1/completions", {**completion, "model": "back"}, headers=good).status, 200)
        self.assertEqual(server.post("/v1/completions", {**completion, "model": "demo"}, headers=good).status, 404)
        models = server.get("/v1/models", headers=good).json()["data"]
        self.assertEqual([m["id"] for m in models], ["front", "back"])
        server.check_stopped()
        self.assertNotIn("sk-one", json.dumps(server.log))


class KeyFile(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "keys")

    def write(self, *lines):
        with open(self.path, "w") as f:
            f.write("".join(line + "\n" for line in lines))

    def start(self, *lines):
        self.write(*lines)
        self.server = Server("--api-key-file", self.path)
        self.addCleanup(lambda: self.server.process.poll() is None and self.server.kill())

    def hang_up(self, *words):
        n = len(self.server.log)
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(all(w in line for w in words) for line in self.server.log[n:]), 10, f"{words} in the log")

    def complete(self, key, **fields):
        return self.server.completions(headers=bearer(key), **{"prompt": "Once", "max_tokens": 1, **fields})

    def statuses(self, key):
        """Of /v1/models, a completion, /metrics, /debug/state."""
        headers = bearer(key)
        return [self.server.get("/v1/models", headers=headers).status, self.complete(key).status,
                *(self.server.get(path, headers=headers).status for path in ("/metrics", "/debug/state"))]

    def test_roles(self):
        digest = hashlib.sha256(b"sk-hashed").hexdigest()
        self.start("# who may what", "sk-user name=alice", "sk-prometheus role=metrics", "sk-root role=admin", f"sha256:{digest}")
        self.assertEqual(self.statuses("sk-user"), [200, 200, 403, 403])
        self.assertEqual(self.statuses("sk-prometheus"), [403, 403, 200, 403])
        self.assertEqual(self.statuses("sk-root"), [200] * 4)
        self.assertEqual(self.statuses("sk-hashed"), [200, 200, 403, 403])
        self.assertEqual(self.statuses(f"sha256:{digest}"), [401] * 4)
        self.assertEqual(self.statuses(digest), [401] * 4)
        refusal = self.server.get("/metrics", headers=bearer("sk-user"))
        self.assertEqual((refusal.error["type"], refusal.error["code"]), ("invalid_request_error", "insufficient_permissions"))
        self.assertEqual([self.server.get(path).status for path in ("/health", "/ready", "/")], [200] * 3)
        self.server.check_stopped()
        names = {entry.get("key") for entry in self.server.log_entries() if entry.get("path") == "/v1/completions"}
        self.assertEqual(names - {"alice", f"key-{digest[:8]}", None},
                         {"key-" + hashlib.sha256(key).hexdigest()[:8] for key in (b"sk-root", b"sk-prometheus")})
        self.assertNotIn("sk-", json.dumps(self.server.log))

    def test_reload(self):
        """Under load: whoever stays loses nothing; whoever goes is let finish, and not let in again."""
        self.start("sk-stays role=admin", "sk-goes")
        long = self.server.completions  # a stream that outlives its key
        results = []

        def ask(key, n):
            results.append((key, [self.complete(key, prompt="Once upon a time", max_tokens=100, ignore_eos=True).status
                                  for _ in range(n)]))

        def reload(_, n):
            for i in range(n):
                self.write("sk-stays role=admin", *([] if i % 2 else ["sk-comes"]))
                self.server.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
        running = in_threads(lambda f, key, n: f(key, n), [(ask, "sk-stays", 10), (ask, "sk-stays", 10), (reload, None, 11)])
        self.assertEqual(len(running), 3)
        self.assertEqual([statuses for _, statuses in results], [[200] * 10] * 2)
        self.hang_up("API keys read again: 2")
        self.assertEqual([self.complete(key).status for key in ("sk-stays", "sk-comes", "sk-goes")], [200, 200, 401])
        self.assertEqual(long(headers=bearer("sk-goes"), prompt="x").status, 401)

    def test_reload_of_a_wrong_file(self):
        self.start("sk-one", "sk-two role=admin")
        for lines, words in ((["sk-one role=king"], "line 1: roles are"), ([], "holds no key"), (["sk-a", "sk-b sk-c"], "line 2")):
            self.write(*lines)
            self.hang_up("stay as they were", words)
            self.assertEqual([self.complete(key).status for key in ("sk-one", "sk-two", "sk-a")], [200, 200, 401])
        os.unlink(self.path)
        self.hang_up("stay as they were", "cannot open")
        self.assertEqual(self.complete("sk-one").status, 200)
        self.assertNotIn("sk-", json.dumps(self.server.log))

    def test_prefixes_are_a_key_s_own(self):
        """Also when the file was read again in between: a key is the same by its text and by its hash."""
        prompt = "The cat sat on the mat and looked at the moon for a long time. " * 12

        def cached(key):
            answer = self.complete(key, prompt=prompt).json()
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.start("sk-one", "sk-two")
        self.assertEqual([cached("sk-one"), cached("sk-two")], [0, 0])
        self.assertGreater(min(cached("sk-one"), cached("sk-two")), 0)
        self.write("sha256:" + hashlib.sha256(b"sk-one").hexdigest(), "sk-three")
        self.hang_up("read again: 2")
        self.assertGreater(cached("sk-one"), 0)
        self.assertEqual(cached("sk-three"), 0)

    def test_nothing_to_reload(self):
        self.server = Server()
        self.hang_up("no API keys")
        self.assertEqual(self.server.get("/health").status, 200)
        self.server.check_stopped()

    def test_requests_per_minute(self):
        self.start("sk-few requests-per-minute=60", "sk-free")
        answers = []
        while len(answers) < 500 and (not answers or answers[-1].status == 200):
            answers.append(self.complete("sk-few"))
        refused = answers[-1]
        self.assertGreater(len(answers), 60)
        self.assertEqual((refused.status, refused.error["type"], refused.error["code"]),
                         (429, "rate_limit_error", "rate_limit_exceeded"))
        self.assertEqual(self.complete("sk-free").status, 200)
        time.sleep(int(refused.headers["Retry-After"]))
        self.assertEqual(self.complete("sk-few").status, 200)
        self.assertEqual(self.server.get("/v1/models", headers=bearer("sk-few")).status, 200)

    def test_tokens_per_minute(self):
        self.start("sk-few tokens-per-minute=600", "sk-root role=admin")
        first = self.complete("sk-few", prompt=[5] * 500, max_tokens=1000, allowed_token_ids=[7], stop_token_ids=[7])
        self.assertEqual(first.status, 200)
        usage = first.json()["usage"]
        self.assertLess(usage["completion_tokens"], 1000)
        self.assertEqual(self.complete("sk-few", prompt=[5] * 400).status, 200)  # what the first left came back
        refused = self.complete("sk-few")
        self.assertEqual(refused.status, 429)
        seconds = int(refused.headers["Retry-After"])
        self.assertLessEqual(seconds, (usage["total_tokens"] + 401 - 600) / 10 + 1)
        self.write("sk-few tokens-per-minute=6000", "sk-root role=admin")
        self.hang_up("read again: 2")
        self.assertEqual(self.complete("sk-few").status, 200)

    def test_at_once(self):
        """One too many is refused; those that run are not disturbed; when one has gone, in whatever way, another gets in."""
        self.start("sk-two max-concurrent=2", "sk-root role=admin")
        fields = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        body = json.dumps({"model": self.server.name, **fields}).encode()
        request = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-two\r\n"
                   b"Content-Length: %d\r\n\r\n" % len(body)) + body
        sockets = [self.server.socket() for _ in range(2)]
        for s in sockets:
            s.sendall(request)
            self.assertIn(b" 200 ", s.recv(4096))
        refused = self.complete("sk-two")
        self.assertEqual((refused.status, refused.headers["Retry-After"]), (429, "1"))
        self.assertEqual(self.complete("sk-root").status, 200)
        sockets.pop().close()
        wait_until(lambda: self.complete("sk-two").status == 200, 10, "the place of the one who left")
        sockets.pop().close()
        wait_until(lambda: in_threads(lambda: self.complete("sk-two").status, [()] * 2) == [200, 200], 10, "both places")
        wrong = [self.complete("sk-two", temperature=9).status for _ in range(5)]
        self.assertEqual(wrong, [400] * 5)  # a place each, given back
        self.assertEqual(self.complete("sk-two").status, 200)


if __name__ == "__main__":
    unittest.main()
