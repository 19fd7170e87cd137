"""The other routes, their errors, and what every response has."""

import json
import unittest

import harness
from harness import Server, ServerTest

ROUTES = {"/v1/completions": "post", "/v1/models": "get", "/v1/models/{model}": "get", "/tokenize": "post",
          "/detokenize": "post", "/health": "get", "/ready": "get", "/metrics": "get", "/version": "get",
          "/openapi.json": "get"}


class Routes(ServerTest):
    def test_models(self):
        body = self.server.get("/v1/models").json()
        self.assertEqual(body["object"], "list")
        self.assertEqual([m["id"] for m in body["data"]], [self.server.name])
        self.assertEqual(body["data"][0]["object"], "model")
        one = self.server.get(f"/v1/models/{self.server.name}").json()
        self.assertEqual(one["id"], self.server.name)
        missing = self.server.get("/v1/models/none-such")
        self.assertEqual(missing.status, 404)
        self.assertEqual(set(missing.error), {"message", "type", "param", "code"})

    def test_tokenize_round_trip(self):
        for text in ("Once upon a time", "Größe 😀 名前", "a  b\n\nc\t", "12+30=", "x" * 5000, " leading", "trailing ",
                     "</s>", "<s>"):
            with self.subTest(text=text[:20]):
                answer = self.server.post("/tokenize", {"model": self.server.name, "prompt": text}).json()
                self.assertEqual(answer["count"], len(answer["tokens"]))
                self.assertIsInstance(answer["max_model_len"], int)
                plain = self.server.tokenize(text, add_special_tokens=False)
                self.assertIn(len(answer["tokens"]) - len(plain), (0, 1))
                back = self.server.post("/detokenize", {"model": self.server.name, "tokens": plain}).json()
                self.assertEqual(back["prompt"], text)

    def test_tokenize_errors(self):
        name = self.server.name
        for path, body, param in (
                ("/tokenize", {"model": name}, "prompt"),
                ("/tokenize", {"model": name, "prompt": 5}, "prompt"),
                ("/tokenize", {"model": name, "prompt": "x", "nonsense": 1}, "nonsense"),
                ("/detokenize", {"model": name}, "tokens"),
                ("/detokenize", {"model": name, "tokens": "x"}, "tokens"),
                ("/detokenize", {"model": name, "tokens": [-1]}, "tokens"),
                ("/detokenize", {"model": name, "tokens": [2**31]}, "tokens"),
                ("/detokenize", {"model": name, "tokens": [10**9]}, "tokens"),
                ("/detokenize", {"model": name, "tokens": [1.5]}, "tokens")):
            with self.subTest(path=path, body=body):
                answer = self.server.post(path, body)
                self.assertEqual(answer.status, 400, answer)
                self.assertEqual(answer.error["param"], param)

    def test_health_ready_version(self):
        self.assertEqual(self.server.get("/health").status, 200)
        self.assertEqual(self.server.get("/ready").status, 200)
        self.assertRegex(self.server.get("/version").json()["version"], r"^\d+\.\d+\.\d+")

    def test_metrics(self):
        before = self.server.metrics()
        answer = self.server.get("/metrics")
        self.assertTrue(answer.headers["Content-Type"].startswith("text/plain"))
        self.server.complete(prompt="Once", max_tokens=5, ignore_eos=True)
        # The engine's own count may follow the last token by a moment.
        generated = "gptd_generation_tokens_total"
        harness.wait_until(lambda: self.server.metrics()[generated] >= before[generated] + 5, 5, "five tokens more")
        after = self.server.metrics()
        reason = 'gptd_request_success_total{finished_reason="length"}'
        self.assertEqual(after[reason] - before[reason], 1)
        self.assertEqual(after["gptd_generation_tokens_total"] - before["gptd_generation_tokens_total"], 5)
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                     "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
                     "request_generation_tokens"):
            self.assertEqual(after[f"gptd_{name}_count"] - before[f"gptd_{name}_count"], 1, name)
        self.assertEqual(after["gptd_inter_token_latency_seconds_count"] -
                         before["gptd_inter_token_latency_seconds_count"], 4)
        for name in ("gptd_num_requests_running", "gptd_num_requests_waiting", "gptd_kv_cache_usage_ratio",
                     "gptd_prefix_cache_queries_total", "gptd_prefix_cache_hits_total", "gptd_prompt_tokens_total",
                     "gptd_num_preemptions_total", "process_resident_memory_bytes", "process_open_fds",
                     "process_cpu_seconds_total", "process_start_time_seconds"):
            self.assertIn(name, after)

    def test_openapi(self):
        answer = self.server.get("/openapi.json")
        self.assertTrue(answer.headers["Content-Type"].startswith("application/json"))
        spec = answer.json()
        self.assertTrue(spec["openapi"].startswith("3."))
        self.assertEqual(spec["info"]["version"], self.server.get("/version").json()["version"])
        for path, method in ROUTES.items():
            self.assertIn(method, spec["paths"][path], path)
        self.assertEqual(set(spec["paths"]), set(ROUTES), "it describes what there is, and nothing else")

        def references(node):
            if isinstance(node, dict):
                for key, value in node.items():
                    if key == "$ref":
                        yield value
                    yield from references(value)
            elif isinstance(node, list):
                for value in node:
                    yield from references(value)

        for reference in references(spec):
            node = spec
            for part in reference.removeprefix("#/").split("/"):
                self.assertIn(part, node, reference)
                node = node[part]

    def test_not_found(self):
        for path in ("/", "/v1", "/v1/completion", "/v1/completions/", "/v2/completions", "/health/x", "/../etc/passwd",
                     "/%00", "/v1/chat/completionsx"):
            with self.subTest(path=path):
                answer = self.server.get(path)
                self.assertEqual(answer.status, 404)
                self.assertEqual(set(answer.error), {"message", "type", "param", "code"})

    def test_method_not_allowed(self):
        for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/completions"), ("PUT", "/tokenize"),
                             ("POST", "/v1/models"), ("POST", "/health"), ("DELETE", "/metrics")):
            with self.subTest(method=method, path=path):
                answer = self.server.request(method, path, body="{}" if method in ("POST", "PUT") else None)
                self.assertEqual(answer.status, 405, answer)
                self.assertTrue(answer.headers["Allow"])
                self.assertIsNone(answer.error["param"])

    def test_request_id(self):
        answer = self.server.completions(prompt="Once", max_tokens=1, headers={"x-request-id": "mine-1.2_3"})
        self.assertEqual(answer.headers["x-request-id"], "mine-1.2_3")
        first, second = (self.server.get("/health").headers["x-request-id"] for _ in range(2))
        self.assertTrue(first and second and first != second)
        answer = self.server.get("/nothing", headers={"x-request-id": "mine-too"})
        self.assertEqual(answer.headers["x-request-id"], "mine-too")

    def test_query_is_ignored_on_routes(self):
        self.assertEqual(self.server.get("/health?probe=1").status, 200)

    def test_keep_alive(self):
        connection = self.server.connect()
        for _ in range(5):
            self.assertEqual(self.server.get("/health", connection=connection).status, 200)
            answer = self.server.request("POST", "/v1/completions", {"model": self.server.name, "prompt": "a", "max_tokens": 2},
                                         connection=connection)
            self.assertEqual(answer.status, 200)
            answer = self.server.request("POST", "/v1/completions", {"model": self.server.name}, connection=connection)
            self.assertEqual(answer.status, 400)
        connection.close()

    def test_one_log_line_per_request(self):
        answer = self.server.completions(prompt="Once upon", max_tokens=3, ignore_eos=True, headers={"x-request-id": "log-me"})
        self.assertEqual(answer.status, 200)
        harness.wait_until(lambda: any("log-me" in line for line in self.server.log), 5, "the log line")
        entries = [e for e in self.server.log_entries() if e.get("id") == "log-me"]
        self.assertEqual(len(entries), 1)
        entry, usage = entries[0], answer.json()["usage"]
        self.assertEqual((entry["method"], entry["path"], entry["status"]), ("POST", "/v1/completions", 200))
        self.assertEqual(entry["prompt_tokens"], usage["prompt_tokens"])
        self.assertEqual(entry["completion_tokens"], 3)
        self.assertIn("cached_tokens", entry)
        self.assertLessEqual(entry["queue_seconds"], entry["ttft_seconds"])
        self.assertLessEqual(entry["ttft_seconds"], entry["total_seconds"])


class Keys(unittest.TestCase):
    def test_api_keys(self):
        server = Server("--api-key", "sk-one", env={"GPTD_SERVED_MODEL_NAME": "front,back"})
        server.name = "front"
        completion = {"model": "front", "prompt": "Once", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sk-one"}, {"Authorization": "Bearer sk-on"},
                        {"Authorization": "Bearer sk-one2"}, {"Authorization": "Bearer "}, {"Authorization": "Basic sk-one"}):
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


if __name__ == "__main__":
    unittest.main()
