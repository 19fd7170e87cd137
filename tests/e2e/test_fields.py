"""Every field at its limits and beyond, every type it is not; bodies that are not what they should be."""

import json
import unittest

from harness import Server, ServerTest, wait_until

NAN, INF = float("nan"), float("inf")
HUGE = [2**31, -2**31 - 1, 2**63, -2**63 - 1, 10**30, 1e308]

INTEGER_WRONG = ["1", 1.5, [1], {"a": 1}, True, *HUGE]
NUMBER_WRONG = ["1", [1], {"a": 1}, True, 10**30, 1e308]
BOOL_WRONG = ["true", 0, 1, [], {}]
STRING_WRONG = [1, 1.5, True, [], {}]

# field: (values that must be refused, values that must be taken)
FIELDS = {
    "model": ([5, ["m"], True, {}, ""], []),
    "prompt": ([5, True, {}, [], [[]], ["a", 1], [1, "a"], [[1], 2], [[1], []], [1.5], [-1], [2**31], [[2**40]],
                [None], [True], [["a"]], [[[1]]], [10**9]], [["a", "b"], [1, 2], [[1], [2, 3]]]),
    "max_tokens": ([-1, *INTEGER_WRONG, 10**7], [0, 1]),
    "n": ([0, -1, 129, *INTEGER_WRONG], [1, 3]),
    "best_of": ([0, -1, 21, *INTEGER_WRONG], [1, 2]),
    "temperature": ([-0.01, 2.01, *NUMBER_WRONG], [0, 0.0, 2, 1e-9]),
    "top_p": ([0, -0.1, 1.01, *NUMBER_WRONG], [1e-9, 1]),
    "frequency_penalty": ([-2.01, 2.01, *NUMBER_WRONG], [-2, 2]),
    "presence_penalty": ([-2.01, 2.01, *NUMBER_WRONG], [-2, 2]),
    "logprobs": ([-1, 21, *INTEGER_WRONG], [0, 5, 20]),
    "logit_bias": ([[], "x", 5, True, {"x": 1}, {"-1": 1}, {"2147483648": 1}, {"1000000000": 1}, {"1.5": 1}, {"": 1},
                    {"5": 100.1}, {"5": -100.1}, {"5": "1"}, {"5": None}, {"5": [1]}, {" 5": 1}, {"5 ": 1}, {"0x5": 1}],
                   [{}, {"5": 100}, {"5": -100.0}]),
    "echo": (BOOL_WRONG, [True, False]),
    "stream": (BOOL_WRONG, [True, False]),
    "stop": (["", [""], ["a", "b", "c", "d", "e"], 5, True, {}, [1], [None], ["a", ""], "x" * 100_000],
             ["x", ["x"], ["a", "b", "c", "d"]]),
    "suffix": ([5, True, []], []),
    "seed": ([2**63, -2**63 - 1, 1.5, "1", True, [1], 10**30, 1e30], [0, -1, 2**63 - 1, -2**63]),
    "stream_options": ([{"include_usage": True}, {}, "x", 5, True], []),
    "user": ([5, True, []], ["someone"]),
    "top_k": ([-2, *INTEGER_WRONG], [-1, 0, 1, 10**6]),
    "min_p": ([-0.01, 1.01, *NUMBER_WRONG], [0, 1]),
    "repetition_penalty": ([0, -1, *NUMBER_WRONG], [0.5, 1.5]),
    "min_tokens": ([-1, 17, *INTEGER_WRONG], [0, 16]),
    "ignore_eos": (BOOL_WRONG, [True]),
    "stop_token_ids": ([[-1], [2**31], [10**9], ["1"], [1.5], "1", 5, {}, [None]], [[], [5]]),
    "bad_words": ([5, [5], [""], {}, True], [[], ["x"]]),
    "allowed_token_ids": ([[], [-1], [2**31], [10**9], ["1"], [1.5], 5, {}], [[5, 6]]),
    "prompt_logprobs": ([-2, 21, *INTEGER_WRONG], [0, 5, 20]),
    "skip_special_tokens": (BOOL_WRONG, [True, False]),
    "include_stop_str_in_output": (BOOL_WRONG, [True, False]),
    "return_token_ids": (BOOL_WRONG, [True, False]),
    "return_tokens_as_token_ids": (BOOL_WRONG, [True, False]),
    "add_special_tokens": (BOOL_WRONG, [True, False]),
    "priority": (["1", 1.5, [1], {}, 2**31], [0, -5, 5]),
    "cache_salt": ([5, True, [], ""], ["salt"]),
}

# Fields of OpenAI's or vLLM's that would change the answer and that there are not; names nobody knows.
REFUSED = {
    "prompt_embeds": "AAAA", "use_beam_search": True, "structured_outputs": {"regex": "a"}, "guided_json": {},
    "guided_choice": ["a"], "guided_decoding_backend": "x", "guided_grammar": "x", "guided_regex": "a",
    "guided_whitespace_pattern": " ", "kv_transfer_params": {}, "logits_processors": ["x"], "structural_tag": "x",
    "truncate_prompt_tokens": 5, "vllm_xargs": {},
    "response_format": {"type": "json_object"}, "nonsense": 1, "Max_tokens": 5, "MAX_TOKENS": 5, "max_tokens ": 5,
    "maxTokens": 5, "__proto__": 1, "messages": [], "tools": [],
}


class Fields(ServerTest):
    def refuse(self, answer, param, what):
        self.assertEqual(answer.status, 400, (what, answer))
        error = answer.error
        self.assertEqual(set(error), {"message", "type", "param", "code"}, what)
        self.assertEqual(error["type"], "invalid_request_error", what)
        self.assertTrue(error["message"], what)
        self.assertNotRegex(error["message"], r"0x[0-9a-f]{6,}", what)
        self.assertIn(param, (error["param"] or "").split("."), (what, error))

    def test_refused_values(self):
        connection = self.server.connect()
        for field, (refused, _) in FIELDS.items():
            for value in refused:
                body = {"model": self.server.name, "prompt": "Once", **{field: value}}
                with self.subTest(field=field, value=str(value)[:60]):
                    answer = self.server.request("POST", "/v1/completions", body, connection=connection)
                    self.refuse(answer, field, (field, str(value)[:60]))
        connection.close()
        self.server.wait_idle()

    def test_taken_values(self):
        for field, (_, taken) in FIELDS.items():
            for value in taken:
                with self.subTest(field=field, value=value):
                    max_tokens = 16 if field == "min_tokens" else 2
                    answer = self.server.completions(**{"prompt": "Once", "max_tokens": max_tokens, field: value})
                    self.assertEqual(answer.status, 200, (field, value, answer))

    def test_not_finite(self):
        for field in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "min_p", "repetition_penalty"):
            for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
                with self.subTest(field=field, value=value):
                    body = '{"model": "%s", "prompt": "Once", "%s": %s}' % (self.server.name, field, value)
                    self.assertEqual(self.server.post("/v1/completions", body).status, 400)

    def test_refused_fields(self):
        for field, value in REFUSED.items():
            with self.subTest(field=field):
                answer = self.server.completions(prompt="Once", **{field: value})
                self.assertEqual(answer.status, 400, answer)
                self.assertEqual(answer.error["param"], field)

    def test_required(self):
        name = self.server.name
        for body, param in (({"prompt": "Once"}, "model"), ({"model": name}, "prompt"),
                            ({"model": None, "prompt": "Once"}, "model"), ({"model": name, "prompt": None}, "prompt")):
            self.refuse(self.server.post("/v1/completions", body), param, body)

    def test_user_may_not_be_null(self):
        self.refuse(self.server.completions(prompt="Once", user=None), "user", "user: null")

    def test_together(self):
        for fields, param in (({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of"),
                              ({"suffix": "x"}, "suffix"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
                              ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
                              ({"stream": True, "stream_options": {"nonsense": True}}, "nonsense"),
                              ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options")):
            with self.subTest(**fields):
                self.refuse(self.server.completions(prompt="Once", **fields), param, fields)

    def test_no_such_model(self):
        for name in ("none-such", self.server.name + "/", self.server.name.upper()):
            answer = self.server.post("/v1/completions", {"model": name, "prompt": "Once"})
            self.assertEqual(answer.status, 404, (name, answer))
            self.assertEqual(answer.error["param"], "model")

    def test_over_the_context(self):
        answer = self.server.completions(prompt="Once", max_tokens=1_000_000)
        self.assertEqual(answer.status, 400)
        self.assertIn("1000000", answer.error["message"].replace(",", "").replace("_", ""))

    def test_capped_work(self):
        for fields in ({"prompt": ["Once"] * 128, "n": 128}, {"prompt": ["Once"] * 10_000}, {"prompt": [[1]] * 10_000}):
            answer = self.server.completions(max_tokens=1, **fields)
            self.assertEqual(answer.status, 400, answer)

    def test_capped_answers(self):
        # What is asked about a prompt is written once for each choice: a small request, an answer of gigabytes.
        answer = self.server.completions(prompt=[[5] * 2047] * 16, n=128, max_tokens=1, echo=True, logprobs=5,
                                         prompt_logprobs=5)
        self.refuse(answer, "echo", "echo and log-probabilities for 2,048 choices")

    def test_not_json(self):
        name = self.server.name
        good = '{"model": "%s", "prompt": "Once"' % name
        bodies = {
            "empty": b"",
            "space": b"  ",
            "a list": b"[]",
            "a string": b'"x"',
            "a number": b"1",
            "null": b"null",
            "cut": good.encode(),
            "cut in a string": good[:-2].encode(),
            "trailing comma": (good + ",}").encode(),
            "trailing garbage": (good + "} x").encode(),
            "two objects": (good + "}{}").encode(),
            "trailing NUL": (good + "}").encode() + b"\0",
            "leading BOM": b"\xef\xbb\xbf" + (good + "}").encode(),
            "NUL byte": (good + "}").encode().replace(b"Once", b"On\0ce"),
            "escaped NUL": (good + "}").encode().replace(b"Once", b"On\\u0000ce"),
            "escaped NUL in a key": (good + ', "max_tokens\\u0000": 1}').encode(),
            "control character": (good + "}").encode().replace(b"Once", b"On\nce"),
            "bad UTF-8": (good + "}").encode().replace(b"Once", b"On\xffce"),
            "overlong UTF-8": (good + "}").encode().replace(b"Once", b"On\xc0\xafce"),
            "UTF-8 surrogate": (good + "}").encode().replace(b"Once", b"On\xed\xa0\x80ce"),
            "lone surrogate": (good + "}").encode().replace(b"Once", b"On\\ud800ce"),
            "swapped surrogates": (good + "}").encode().replace(b"Once", b"\\ude00\\ud83d"),
            "bad escape": (good + "}").encode().replace(b"Once", b"\\x41"),
            "short escape": (good + "}").encode().replace(b"Once", b"\\u12"),
            "single quotes": (good + "}").replace('"', "'").encode(),
            "comment": (good + "} // x").encode(),
            "duplicate key": (good + ', "prompt": "Twice"}').encode(),
            "duplicate key, escaped": (good + ', "pr\\u006fmpt": "Twice"}').encode(),
            "duplicate key inside": (good + ', "logit_bias": {"5": 1, "5": 2}}').encode(),
            "number 01": (good + ', "n": 01}').encode(),
            "number 1.": (good + ', "temperature": 1.}').encode(),
            "number .5": (good + ', "temperature": .5}').encode(),
            "number +1": (good + ', "n": +1}').encode(),
            "number 0x1": (good + ', "n": 0x1}').encode(),
            "number --1": (good + ', "n": --1}').encode(),
            "True": (good + ', "echo": True}').encode(),
            "deep list": (good + ', "metadata": ' + "[" * 100_000 + "]" * 100_000 + "}").encode(),
            "deep object": (good + ', "metadata": ' + '{"a":' * 40 + "1" + "}" * 40 + "}").encode(),
            "deep and cut": (good + ', "metadata": ' + "[" * 500_000).encode(),
            "UTF-16": (good + "}").encode("utf-16"),
        }
        for what, body in bodies.items():
            with self.subTest(what=what):
                answer = self.server.post("/v1/completions", body)
                self.assertEqual(answer.status, 400, (what, answer))
                self.assertEqual(answer.error["type"], "invalid_request_error")
        self.assertEqual(self.server.get("/health").status, 200)

    def test_strict_json_that_is_fine(self):
        for body in ('{"model":"%s","prompt":"On\\u0063e \\ud83d\\ude00","max_tokens":1}',
                     ' \t\r\n{ "model" : "%s" , "prompt" : "Once" , "max_tokens" : 1e0 , "temperature" : 5E-1 } \r\n',
                     '{"prompt":"\\"\\\\\\/\\b\\f\\n\\r\\t","model":"%s","max_tokens":1.0}'):
            answer = self.server.post("/v1/completions", body % self.server.name)
            self.assertEqual(answer.status, 200, answer)

    def test_many_values(self):
        # Under the size limit, but far more values than any request has.
        once = {"model": self.server.name, "prompt": "Once"}
        for body in ('{"model":"x","prompt":"Once","metadata":[%s]}' % ",".join(["0"] * 1_000_000),
                     '{"model":"x","prompt":"Once","metadata":{%s}}' % ",".join(f'"k{i}":0' for i in range(150_000)),
                     json.dumps({**once, "stop_token_ids": [1] * 500_000}),
                     json.dumps({**once, "logit_bias": {str(i): 1 for i in range(100_000)}})):
            answer = self.server.post("/v1/completions", body)
            self.assertEqual(answer.status, 400, answer)


class Limits(ServerTest):
    flags = ("--max-body-bytes", "4K", "--max-logprobs", "7", "--max-model-len", "128")

    def test_body_limit(self):
        body = json.dumps({"model": self.server.name, "prompt": "a" * 5000}).encode()
        answer = self.server.post("/v1/completions", body)
        self.assertEqual(answer.status, 413)
        self.assertEqual(set(answer.error), {"message", "type", "param", "code"})
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        status, data, closed = self.server.raw(chunked + 5 * chunk + b"0\r\n\r\n")
        self.assertEqual(status, 413, data[:300])
        self.assertTrue(self.server.raw(chunked + 1000 * chunk)[2], "one that does not end is cut")
        status, data, closed = self.server.raw(head + b"Content-Length: 100000000000\r\n\r\n")
        self.assertEqual(status, 413, data[:300])
        self.assertTrue(closed)
        exact = json.dumps({"model": self.server.name, "prompt": "Once", "max_tokens": 1})
        self.assertEqual(self.server.post("/v1/completions", exact.ljust(4096)).status, 200)
        self.assertEqual(self.server.post("/v1/completions", exact.ljust(4097)).status, 413)

    def test_set_maxima(self):
        self.assertEqual(self.server.completions(prompt="Once", logprobs=7, max_tokens=1).status, 200)
        self.assertEqual(self.server.completions(prompt="Once", logprobs=8, max_tokens=1).status, 400)
        answer = self.server.completions(prompt=[5] * 100, max_tokens=29)
        self.assertEqual(answer.status, 400)
        self.assertIn("128", answer.error["message"])
        self.assertIn("29", answer.error["message"])
        self.assertEqual(self.server.completions(prompt=[5] * 100, max_tokens=28).status, 200)

    def test_content_type(self):
        body = json.dumps({"model": self.server.name, "prompt": "Once", "max_tokens": 1})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/json-seq"):
            answer = self.server.post("/v1/completions", body, headers={"Content-Type": kind})
            self.assertEqual(answer.status, 415, kind)
            self.assertEqual(answer.error["type"], "invalid_request_error")
        for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
            answer = self.server.post("/v1/completions", body, headers={"Content-Type": kind})
            self.assertEqual(answer.status, 200, kind)


class SmallCache(ServerTest):
    flags = ("--kv-cache-memory-bytes", "1M")  # 512 tokens of a context of 2,048

    def test_never_fits(self):
        for n_prompt, max_tokens, param in ((400, 113, "max_tokens"), (513, 1, "prompt")):
            answer = self.server.completions(prompt=[5] * n_prompt, max_tokens=max_tokens)
            self.assertEqual((answer.status, answer.error["param"]), (400, param), answer)
            self.assertIn("KV blocks", answer.error["message"])
        self.assertEqual(self.server.completions(prompt=[5] * 400, max_tokens=112).status, 200)


class Overload(unittest.TestCase):
    def test_queue_limits(self):
        server = Server("--max-num-seqs", "1", "--max-queue-requests", "2", "--max-queue-tokens", "100")
        holder = server.socket()
        holder.sendall(server.completion_bytes(prompt="Once", max_tokens=1500, n=32, ignore_eos=True, stream=True))
        holder.recv(100)
        wait_until(lambda: server.metrics()["gptd_num_requests_running"] == 1, 5, "it runs")
        waiting = [server.socket() for _ in range(2)]
        waiting[0].sendall(server.completion_bytes(prompt=[5] * 60, max_tokens=2))
        wait_until(lambda: server.metrics()["gptd_num_requests_waiting"] == 1, 5, "one waits")
        refused = server.completions(prompt=[5] * 60, max_tokens=1)  # too many tokens would wait
        self.assertEqual(refused.status, 429, refused)
        waiting[1].sendall(server.completion_bytes(prompt="Once", max_tokens=2))
        wait_until(lambda: server.metrics()["gptd_num_requests_waiting"] == 2, 5, "two wait")
        refused = server.completions(prompt="Once", max_tokens=1)
        self.assertEqual(refused.status, 429, refused)
        self.assertEqual(refused.error["type"], "rate_limit_error")
        self.assertGreaterEqual(int(refused.headers["Retry-After"]), 1)
        self.assertEqual(server.get("/health").status, 200)
        holder.close()
        for s in waiting:
            self.assertIn(b"200 OK", s.recv(65536))
            s.close()
        self.assertEqual(server.completions(prompt="Once", max_tokens=1).status, 200)
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
