"""The clients people use: curl and the official OpenAI package."""

import json
import os
import shutil
import subprocess
import unittest

from harness import ServerTest, parse_events

try:
    import openai
except ImportError:
    openai = None


@unittest.skipUnless(shutil.which("curl"), "curl is not installed")
class Curl(ServerTest):
    flags = ("--deterministic",)

    def curl(self, *arguments, data=None):
        url = f"http://127.0.0.1:{self.server.port}{arguments[0]}"
        command = ["curl", "-sS", "--max-time", "60", url, *arguments[1:]]
        if data is not None:
            command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
        done = subprocess.run(command, input=json.dumps(data).encode(), capture_output=True, timeout=90)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_plain(self):
        body = json.loads(self.curl("/v1/completions", data={"model": self.server.name, "prompt": "Once upon a time",
                                                              "max_tokens": 8, "temperature": 0}))
        self.assertTrue(body["choices"][0]["text"])

    def test_stream(self):
        fields = {"model": self.server.name, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        plain = json.loads(self.curl("/v1/completions", data=fields))["choices"][0]["text"]
        events = parse_events(self.curl("/v1/completions", "-N", data={**fields, "stream": True}))
        self.assertEqual("".join(c["text"] for e in events for c in e["choices"]), plain)

    def test_others(self):
        self.assertEqual(json.loads(self.curl("/v1/models"))["data"][0]["id"], self.server.name)
        self.assertIn(b"gptd_num_requests_running", self.curl("/metrics"))
        self.assertEqual(self.curl("/health", "-o", "/dev/null", "-w", "%{http_code}"), b"200")
        # curl sends Expect: 100-continue with a body over 1 MiB.
        long = {"model": self.server.name, "prompt": "a" * 1_100_000, "max_tokens": 1}
        self.assertIn(b"invalid_request_error", self.curl("/v1/completions", data=long))


# Where CI is set the tests run, and fail for want of the package: nobody reads there what was skipped.
@unittest.skipUnless(openai or os.environ.get("CI"), "the openai package is not installed (see scripts/setup.sh check)")
class OpenAIClient(ServerTest):
    flags = ("--deterministic",)

    @classmethod
    def setUpClass(cls):
        if not openai:
            raise AssertionError("the openai package is not installed, and CI is set")
        super().setUpClass()
        cls.client = openai.OpenAI(base_url=f"http://127.0.0.1:{cls.server.port}/v1", api_key="none", max_retries=0)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        super().tearDownClass()

    def create(self, **fields):
        fields = {"prompt": "Once upon a time", "max_tokens": 16, **fields}
        return self.client.completions.create(model=self.server.name, **fields)

    def test_plain(self):
        answer = self.create(temperature=0, logprobs=2, n=2, seed=3, stop=["\n\n\n"], user="me")
        self.assertEqual(answer.object, "text_completion")
        self.assertEqual([c.index for c in answer.choices], [0, 1])
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertEqual(len(answer.choices[0].logprobs.tokens), len(answer.choices[0].logprobs.token_logprobs))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertTrue(answer._request_id)

    def test_stream(self):
        plain = self.create(temperature=0).choices[0].text
        text, usage = "", None
        for chunk in self.create(temperature=0, stream=True, stream_options={"include_usage": True}):
            text += "".join(c.text for c in chunk.choices)
            usage = chunk.usage or usage
        self.assertEqual(text, plain)
        self.assertEqual(usage.completion_tokens, 16)

    def test_prompts(self):
        ids = self.server.tokenize("Once upon a time")
        texts = [c.text for c in self.create(prompt=[ids, ids], temperature=0).choices]
        self.assertEqual(texts, [self.create(temperature=0).choices[0].text] * 2)
        self.assertEqual(len(self.create(prompt=["a", "b"]).choices), 2)

    def test_extra_fields(self):
        answer = self.create(temperature=0, extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True})
        self.assertEqual(len(answer.choices[0].model_extra["token_ids"]), 16)

    def test_models(self):
        self.assertEqual([m.id for m in self.client.models.list()], [self.server.name])
        self.assertEqual(self.client.models.retrieve(self.server.name).id, self.server.name)

    def test_errors(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(temperature=3)
        self.assertEqual(caught.exception.param, "temperature")
        self.assertEqual(caught.exception.type, "invalid_request_error")
        with self.assertRaises(openai.NotFoundError):
            self.client.completions.create(model="none-such", prompt="x")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("none-such")

    def test_leaving_a_stream(self):
        stream = self.create(max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        self.server.wait_idle()


if __name__ == "__main__":
    unittest.main()
