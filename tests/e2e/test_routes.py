"""The other routes, their errors, and what every response has."""

import json
import unittest

import harness
from harness import Server, ServerTest, in_threads, read_until, readable, scale, wait_until

ROUTES = {"/v1/completions": "post", "/v1/chat/completions": "post", "/v1/models": "get", "/v1/models/{model}": "get",
          "/tokenize": "post", "/detokenize": "post", "/health": "get", "/ready": "get", "/metrics": "get",
          "/version": "get", "/openapi.json": "get", "/debug/state": "get"}


KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
         "null": type(None)}


def schema_problems(value, schema, spec, where):
    """What is wrong with value by the parts of JSON Schema that openapi.json uses in answers."""
    while "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if "oneOf" in schema:
        if sum(not list(schema_problems(value, s, spec, where)) for s in schema["oneOf"]) != 1:
            yield f"{where}: not one of {len(schema['oneOf'])}"
        return
    kinds = schema.get("type", list(KINDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(isinstance(value, KINDS[k]) and not (isinstance(value, bool) and k != "boolean") for k in kinds):
        yield f"{where}: {value!r} is not {kinds}"
        return
    if "enum" in schema and value not in schema["enum"] or "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not allowed"
    if isinstance(value, dict):
        yield from (f"{where}: lacks {name}" for name in schema.get("required", ()) if name not in value)
        other = schema.get("additionalProperties", {})
        if other is False:
            yield from (f"{where}: {name} is not listed" for name in value if name not in schema["properties"])
            other = {}
        for key, item in value.items():
            yield from schema_problems(item, schema.get("properties", {}).get(key, other), spec, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from schema_problems(item, schema.get("items", {}), spec, f"{where}[{i}]")


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
                *(("/tokenize", {"prompt": "x", flag: value}, flag) for value in (1, 0, "true", [], {})
                  for flag in ("add_special_tokens", "return_token_strs")),
                *(("/detokenize", {"tokens": [5], "skip_special_tokens": value}, "skip_special_tokens")
                  for value in (1, 0, "true", [], {})),
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

    def test_openapi_says_what_is(self):
        # Real answers, checked against the schemas they are described by.
        spec, name = self.server.get("/openapi.json").json(), self.server.name
        schemas = spec["components"]["schemas"]
        fields = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1,
                  "return_token_ids": True, "n": 2}
        answers = [("Completion", self.server.complete(**fields)), ("Completion", self.server.complete(prompt="Once")),
                   ("Error", self.server.completions(prompt=5).json()),
                   ("ModelList", self.server.get("/v1/models").json()),
                   ("Model", self.server.get(f"/v1/models/{name}").json()),
                   ("Status", self.server.get("/health").json()),
                   ("TokenizeResponse", self.server.post("/tokenize", {"prompt": "a", "return_token_strs": True}).json()),
                   ("DetokenizeResponse", self.server.post("/detokenize", {"tokens": [5]}).json())]
        chat = {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}
        answers += [("ChatCompletion", self.server.chat("Hi", **chat, prompt_logprobs=1)),
                    ("ChatCompletion", self.server.chat("Hi")), ("Error", self.server.chat_completions([]).json())]
        usage = {"stream_options": {"include_usage": True}}
        answers += [("CompletionChunk", e) for e in self.server.stream(**fields, **usage)]
        answers += [("ChatChunk", e) for e in self.server.chat_stream("Hi", **chat, **usage)]
        for schema, answer in answers:
            problems = list(schema_problems(answer, schemas[schema], spec, schema))
            self.assertEqual(problems, [], answer)
            self.assertLessEqual(set(answer), set(schemas[schema]["properties"]))
        # Every field it lists is known to the server.
        for field in schemas["CompletionRequest"]["properties"]:
            if field not in ("model", "prompt", "user"):
                answer = self.server.completions(prompt="Once", max_tokens=None if field == "max_tokens" else 1,
                                                 **({field: None} if field != "max_tokens" else {}))
                self.assertEqual(answer.status, 200, (field, answer))
        for field in schemas["ChatRequest"]["properties"]:
            if field not in ("model", "messages", "user"):
                answer = self.server.chat_completions("Hi", **{"max_tokens": 1, field: None})
                self.assertEqual(answer.status, 200, (field, answer))
        for field in schemas["ChatMessage"]["properties"]:
            if field not in ("role", "content"):
                answer = self.server.chat_completions([{"role": "user", "content": "Hi", field: None}], max_tokens=1)
                self.assertEqual(answer.status, 200, (field, answer))

    def test_not_found(self):
        for path in ("//", "/v1", "/v1/completion", "/v1/completions/", "/v2/completions", "/health/x", "/../etc/passwd",
                     "/%00", "/health%00x", "/v1/chat/completionsx"):
            with self.subTest(path=path):
                answer = self.server.get(path)
                self.assertEqual(answer.status, 404)
                self.assertEqual(set(answer.error), {"message", "type", "param", "code"})

    def test_method_not_allowed(self):
        for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/completions"), ("PUT", "/tokenize"),
                             ("POST", "/v1/models"), ("POST", "/health"), ("DELETE", "/metrics"),
                             ("GET", "/v1/chat/completions")):
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
            body = {"model": self.server.name, "prompt": "a", "max_tokens": 2}
            self.assertEqual(self.server.post("/v1/completions", body, connection=connection).status, 200)
            self.assertEqual(self.server.post("/v1/completions", {}, connection=connection).status, 400)
        connection.close()

    def test_one_log_line_per_request(self):
        answer = self.server.completions(prompt="Once upon", max_tokens=3, ignore_eos=True,
                                         headers={"x-request-id": "log-me"})
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
        parts = sum(entry[f"{part}_seconds"] for part in ("queue", "prefill", "decode"))
        self.assertLessEqual(parts, entry["total_seconds"])
        self.assertNotIn("trace_id", entry)

    def test_prompts_in_the_log_when_told(self):
        for flags, there in ((), False), (("--log-prompts",), True):
            server = harness.Server(*flags)
            for i, prompt in enumerate(("A \"quoted\" moon\n" * 2, "Long moon " * 800)):
                server.completions(prompt=prompt, max_tokens=1, headers={"x-request-id": f"moon-{i}"})
            server.post("/v1/completions", "no moon, but {", headers={"x-request-id": "moon-2"})
            server.check_stopped()
            bodies = [e["message"] for e in server.log_entries() if e["message"].startswith("body of ")]
            self.assertEqual(any("moon" in e["message"] + e.get("error", "") for e in server.log_entries()), there)
            self.assertEqual([body.split()[2] for body in bodies], ["moon-0:", "moon-1:", "moon-2:"] if there else [])
            if there:
                self.assertEqual(json.loads(bodies[0].split(": ", 1)[1])["prompt"], "A \"quoted\" moon\n" * 2)
                self.assertGreater(len(bodies[1]), 3800)

    def test_debug_state(self):
        self.server.wait_idle()
        before = self.server.get("/debug/state").json()
        self.assertEqual(self.server.completions(prompt="Once upon a time", max_tokens=5, ignore_eos=True, n=3).status, 200)
        self.server.wait_idle()
        state = self.server.get("/debug/state").json()
        engine = state["engine"]
        self.assertEqual((state["open"], state["draining"], state["trouble"], engine["op"], engine["failure"]),
                         (True, False, None, None, None))
        self.assertGreaterEqual(engine["steps"]["count"], before["engine"]["steps"]["count"] + 5)
        self.assertEqual(engine["last_step"], {"tokens": 3, "sequences": 3})
        self.assertEqual([group["free"] for group in engine["blocks"]], [group["total"] for group in engine["blocks"]])
        self.assertGreaterEqual(state["connections"], state["exchanges"])
        self.assertEqual((engine["sequences_running"], engine["requests_waiting"], state["exchanges"]), (0, 0, 1))

    def test_trace_id_in_the_log(self):
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        for n, value in enumerate((f"00-{trace}-00f067aa0ba902b7-01", f"00-{trace}-00f067aa0ba902b7")):
            headers = {"x-request-id": f"trace-{n}", "Traceparent": value}
            self.assertEqual(self.server.completions(prompt="x", headers=headers).status, 200)
        harness.wait_until(lambda: any("trace-1" in line for line in self.server.log), 5, "the log line")
        ids = {e["id"]: e.get("trace_id") for e in self.server.log_entries() if e.get("id", "").startswith("trace-")}
        self.assertEqual(ids, {"trace-0": trace, "trace-1": None})


class LongTexts(ServerTest):
    flags = ("--tokenizer-threads", "1", "--max-request-tokens", "400000", "--max-num-seqs", "16")
    long = json.dumps({"prompt": "The cat sat on the mat. " * 43_000})  # 1 MB
    waiting = scale(8, 4)

    def post_bytes(self, path, body):
        return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}").encode()

    def test_short_before_long(self):
        # A completion whose body is too long for an event loop does not wait for the longer ones that came before.
        sockets = [self.server.socket(60) for _ in range(self.waiting)]
        for s in sockets:
            s.sendall(self.post_bytes("/tokenize", self.long))
        answer = self.server.completions(prompt="Once", max_tokens=1, metadata={"a": "x" * 10_000})
        self.assertEqual(answer.status, 200)
        self.assertFalse(all(readable(s, 0) for s in sockets), "the long ones were all answered before it")
        for s in sockets:
            self.assertIn(b" 200 OK", read_until(s, b"\r\n\r\n"))
            s.close()

    def test_nothing_for_those_who_left(self):
        def cpu_of(action):
            before = self.server.cpu_seconds()
            action()
            return self.server.cpu_seconds() - before

        def leave():
            seen, n = len(self.server.log), scale(12, 6)
            for _ in range(n):
                with self.server.socket() as s:
                    s.sendall(self.post_bytes("/tokenize", self.long))
            wait_until(lambda: len(self.server.log) >= seen + n, 60, "all have come to an end")

        one = cpu_of(lambda: self.assertEqual(self.server.post("/tokenize", self.long).status, 200))
        self.assertLess(cpu_of(leave), scale(6, 4) * one, "texts whose clients have gone are tokenized")

    def test_too_long(self):
        for path, body, param in (("/tokenize", {"prompt": "a b " * 300_000}, "prompt"),
                                  ("/tokenize", {"prompt": "a" * 7_900_000}, "prompt"),
                                  ("/detokenize", {"tokens": [5] * 400_001}, "tokens")):
            answer = self.server.post(path, body)
            self.assertEqual((answer.status, answer.error["param"]), (400, param), answer)
        self.assertEqual(self.server.post("/detokenize", {"tokens": [5] * 400_000}).status, 200)


class LateTexts(ServerTest):
    flags = ("--tokenizer-threads", "1", "--request-timeout", "0.05")

    def test_no_longer_than_the_deadline(self):
        statuses = [a.status for a in in_threads(lambda: self.server.post("/tokenize", LongTexts.long), [()] * 6)]
        self.assertIn(408, statuses)
        self.assertLessEqual(set(statuses), {200, 408})


if __name__ == "__main__":
    unittest.main()
