"""The clients people use: curl and the official OpenAI package."""

import asyncio
import json
import os
import shutil
import subprocess
import threading
import unittest

from harness import Server, ServerTest, parse_events, wait_until

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

    def test_chat(self):
        fields = {"model": self.server.name, "messages": [{"role": "user", "content": "What is 12+30?"}], "temperature": 0}
        body = json.loads(self.curl("/v1/chat/completions", data=fields))
        self.assertEqual(body["choices"][0]["message"]["content"], "12+30=42.")
        events = parse_events(self.curl("/v1/chat/completions", "-N", data={**fields, "stream": True}))
        self.assertEqual("".join(c["delta"].get("content", "") for e in events for c in e["choices"]), "12+30=42.")

    def test_others(self):
        self.assertEqual(json.loads(self.curl("/v1/models"))["data"][0]["id"], self.server.name)
        self.assertIn(b"gptd_num_requests_running", self.curl("/metrics"))
        self.assertEqual(self.curl("/health", "-o", "/dev/null", "-w", "%{http_code}"), b"200")
        # curl sends Expect: 100-continue with a body over 1 MiB.
        long = {"model": self.server.name, "prompt": "a" * 1_100_000, "max_tokens": 1}
        self.assertIn(b"invalid_request_error", self.curl("/v1/completions", data=long))


# Where CI is set the tests run, and fail for want of the package: nobody reads there what was skipped.
with_openai = unittest.skipUnless(openai or os.environ.get("CI"),
                                  "the openai package is not installed (see scripts/setup.sh check)")


def need_openai():
    if not openai:
        raise AssertionError("the openai package is not installed, and CI is set")


def client_of(server, kind="OpenAI", **options):
    options = {"max_retries": 0, **options}
    return getattr(openai, kind)(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", **options)


@with_openai
class OpenAIClient(ServerTest):
    flags = ("--deterministic",)

    @classmethod
    def setUpClass(cls):
        need_openai()
        super().setUpClass()
        cls.client = client_of(cls.server)

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


@with_openai
class OpenAIChat(ServerTest):
    flags = ("--deterministic",)
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]

    @classmethod
    def setUpClass(cls):
        need_openai()
        super().setUpClass()
        cls.client = client_of(cls.server)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        super().tearDownClass()

    def create(self, **fields):
        fields = {"messages": self.messages, "temperature": 0, **fields}
        return self.client.chat.completions.create(model=self.server.name, **fields)

    def test_plain(self):
        answer = self.create(n=2, max_completion_tokens=30, logprobs=True, top_logprobs=3, seed=1, stop=["\n\n\n"], user="me")
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual([c.index for c in answer.choices], [0, 1])
        choice = answer.choices[0]
        self.assertEqual((choice.message.role, choice.message.refusal, choice.finish_reason), ("assistant", None, "length"))
        self.assertEqual(len(choice.logprobs.content), 30)
        self.assertEqual("".join(t.token for t in choice.logprobs.content), choice.message.content)
        self.assertEqual([len(t.top_logprobs) for t in choice.logprobs.content], [3] * 30)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 60)
        self.assertIsNotNone(answer.usage.prompt_tokens_details.cached_tokens)
        self.assertTrue(answer._request_id)

    def test_conversation(self):
        messages = [{"role": "user", "content": "My name is Anna."}]
        for said in ("What is my name?", "Thank you!"):
            messages.append(self.create(messages=messages).choices[0].message)  # as the client hands it back
            messages.append({"role": "user", "content": said})
            if said == "Thank you!":
                self.assertEqual(messages[-2].content, "Your name is Anna.")
        dumped = [m if isinstance(m, dict) else m.model_dump() for m in messages]
        self.assertEqual(self.create(messages=dumped).choices, self.create(messages=messages).choices)

    def test_stream(self):
        plain = self.create().choices[0]
        text, roles, reasons, usage = "", [], [], None
        for chunk in self.create(stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
                reasons += [choice.finish_reason] if choice.finish_reason else []
            usage = chunk.usage or usage
        self.assertEqual((text, roles, reasons), (plain.message.content, ["assistant"], [plain.finish_reason]))
        self.assertGreater(usage.completion_tokens, 20)

    def test_stream_helper(self):
        # The client's own way to put a stream together again. It takes an answer that was cut for an error.
        fields = {"n": 2, "logprobs": True, "messages": [{"role": "user", "content": "What is 12+30?"}]}
        with self.client.chat.completions.stream(model=self.server.name, temperature=0, **fields) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        plain = self.create(**fields)
        self.assertEqual([c.message.content for c in final.choices], ["12+30=42."] * 2)
        self.assertEqual([c.logprobs.content for c in final.choices], [c.logprobs.content for c in plain.choices])
        self.assertLessEqual({"chunk", "content.delta", "content.done", "logprobs.content.done"}, kinds)

    def test_async(self):
        plain = self.create(max_tokens=40).choices[0].message.content

        async def ask(client, stream):
            answer = await client.chat.completions.create(model=self.server.name, messages=self.messages, temperature=0,
                                                          max_tokens=40, stream=stream)
            if not stream:
                return answer.choices[0].message.content
            return "".join([c.delta.content or "" async for chunk in answer for c in chunk.choices])

        async def ask_all():
            async with client_of(self.server, "AsyncOpenAI") as client:
                return await asyncio.gather(*(ask(client, i % 2 == 0) for i in range(20)))

        self.assertEqual(asyncio.run(ask_all()), [plain] * 20)

    def test_extra_fields(self):
        answer = self.create(max_tokens=5, extra_body={"ignore_eos": True, "return_token_ids": True, "top_k": 1,
                                                       "chat_template_kwargs": {"enable_thinking": False}})
        self.assertEqual(len(answer.choices[0].model_extra["token_ids"]), 5)
        self.assertTrue(answer.model_extra["prompt_token_ids"])

    def test_errors(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        for fields, param in (({"temperature": 3}, "temperature"), ({"tools": [tool]}, "tools"), ({"messages": []}, "messages"),
                              ({"response_format": {"type": "json_object"}}, "response_format"),
                              ({"messages": [{"role": "wizard", "content": "x"}]}, "messages")):
            for stream in (False, True):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.create(stream=stream, **fields)
                self.assertEqual((caught.exception.param, caught.exception.type), (param, "invalid_request_error"))
        with self.assertRaises(openai.NotFoundError):
            self.client.chat.completions.create(model="none-such", messages=self.messages)

    def test_leaving(self):
        fields = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        stream = self.create(stream=True, **fields)
        next(iter(stream))
        stream.close()
        self.server.wait_idle()
        impatient = self.client.with_options(timeout=0.05)
        with self.assertRaises(openai.APITimeoutError):
            impatient.chat.completions.create(model=self.server.name, messages=self.messages, n=64, **fields)
        self.server.wait_idle()


@with_openai
class OpenAIRetries(unittest.TestCase):
    """What the client does by itself about 429, 503 and 408."""

    setUpClass = classmethod(lambda cls: need_openai())

    def ask(self, client, server, **fields):
        return client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": "Hi"}],
                                              **{"max_tokens": 2, **fields})

    def test_busy(self):
        server = Server("--max-num-seqs", "1", "--max-queue-requests", "1")
        sockets = [server.socket() for _ in range(2)]
        for name, s in zip(("running", "waiting"), sockets):
            s.sendall(server.completion_bytes(prompt="Once", max_tokens=1500, n=64, ignore_eos=True, stream=True))
            wait_until(lambda: server.metrics()[f"gptd_num_requests_{name}"] >= 1, 5, name)
        with client_of(server) as client:
            with self.assertRaises(openai.RateLimitError) as caught:
                self.ask(client, server)
            self.assertGreaterEqual(int(caught.exception.response.headers["Retry-After"]), 1)
            leave = threading.Timer(0.3, lambda: [s.close() for s in sockets])
            leave.start()
            answer = self.ask(client.with_options(max_retries=5), server)
            leave.join()
        self.assertEqual(answer.choices[0].message.role, "assistant")
        wait_until(lambda: sum(e.get("status") == 429 for e in server.log_entries()) >= 2, 5, "it was refused, and came back")
        server.check_stopped()

    def test_no_connection_left(self):
        server = Server("--max-connections", "2")
        sockets = [server.socket() for _ in range(2)]
        with client_of(server) as client:
            with self.assertRaises(openai.InternalServerError) as caught:
                self.ask(client, server)
            self.assertEqual(caught.exception.status_code, 503)
            leave = threading.Timer(0.3, lambda: [s.close() for s in sockets])
            leave.start()
            answer = self.ask(client.with_options(max_retries=5), server)
            leave.join()
        self.assertEqual(answer.choices[0].message.role, "assistant")
        server.check_stopped()

    def test_too_late(self):
        server = Server("--request-timeout", "0.2")
        fields = {"max_tokens": 1500, "n": 64, "extra_body": {"ignore_eos": True}}
        with client_of(server) as client:
            with self.assertRaises(openai.APIStatusError) as caught:
                self.ask(client, server, **fields)
            self.assertEqual(caught.exception.status_code, 408)
            with self.assertRaises(openai.APIError) as caught:  # the headers are out: it is told in the stream
                for _ in self.ask(client, server, stream=True, **fields):
                    pass
            self.assertIn("longer than", caught.exception.message)
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
