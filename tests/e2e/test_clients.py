"""The clients people use: curl and the official OpenAI package."""

import asyncio
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
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

    def test_others(self):
        self.assertEqual(json.loads(self.curl("/v1/models"))["data"][0]["id"], self.server.name)
        self.assertIn(b"gptd_num_requests_running", self.curl("/metrics"))
        self.assertEqual(self.curl("/health", "-o", "/dev/null", "-w", "%{http_code}"), b"200")
        # curl sends Expect: 100-continue with a body over 1 MiB.
        long = {"model": self.server.name, "prompt": "a" * 1_100_000, "max_tokens": 1}
        self.assertIn(b"invalid_request_error", self.curl("/v1/completions", data=long))


# Where CI is set the tests run, and fail for want of the package: nobody reads there what was skipped.
needs_openai = unittest.skipUnless(openai or os.environ.get("CI"),
                                   "the openai package is not installed (see scripts/setup.sh check)")


def aborted(server):
    return server.metrics()['gptd_request_success_total{finished_reason="abort"}']


@needs_openai
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


class OpenAITest(unittest.TestCase):
    """What the classes below share: clients of a server, closed when the test ends."""

    def connect(self, server, **fields):
        fields = {"api_key": "none", "max_retries": 0, **fields}
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **fields)
        self.addCleanup(client.close)
        return client

    def run_async(self, server, call, **fields):
        """call(client) within an event loop of its own."""
        async def calls():
            fields_of = {"api_key": "none", "max_retries": 0, **fields}
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **fields_of) as client:
                return await call(client)
        return asyncio.run(calls())


@needs_openai
class OpenAIAsync(OpenAITest, ServerTest):
    flags = ("--deterministic",)

    def fields(self, **fields):
        return {"model": self.server.name, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, **fields}

    def test_whole_and_streamed(self):
        expected = self.server.text("Once upon a time", max_tokens=16, temperature=0)

        async def streamed(client):
            chunks = await client.completions.create(stream=True, **self.fields())
            return "".join([choice.text async for chunk in chunks for choice in chunk.choices])

        async def calls(client):
            whole = [client.completions.create(**self.fields()) for _ in range(8)]
            return await asyncio.gather(*whole, *[streamed(client) for _ in range(8)])

        answers = self.run_async(self.server, calls)
        self.assertEqual([a.choices[0].text for a in answers[:8]] + answers[8:], [expected] * 16)

    def test_errors(self):
        for fields, kind in (({"temperature": 3}, openai.BadRequestError), ({"model": "none"}, openai.NotFoundError),
                             ({"max_tokens": 100_000}, openai.BadRequestError)):
            for stream in (False, True):
                with self.assertRaises(kind):
                    self.run_async(self.server,
                                   lambda client: client.completions.create(**self.fields(stream=stream, **fields)))

    def test_leaving(self):
        """A task that is cancelled and a stream that is left end on the server, too."""
        async def calls(client):
            long = self.fields(max_tokens=1900, n=64, extra_body={"ignore_eos": True})
            task = asyncio.create_task(client.completions.create(**long))
            while not self.server.metrics()["gptd_num_requests_running"]:
                await asyncio.sleep(0.01)
            task.cancel()
            async with await client.completions.create(stream=True, **long) as chunks:
                await anext(aiter(chunks))

        before = aborted(self.server)
        self.run_async(self.server, calls)
        self.server.wait_idle()
        self.assertGreaterEqual(aborted(self.server), before + 2)


@needs_openai
class OpenAIKey(OpenAITest, ServerTest):
    flags = ("--api-key", "right")

    def test_key(self):
        fields = {"model": self.server.name, "prompt": "x", "max_tokens": 1}
        for key in ("wrong", "righ", "rightly"):
            client = self.connect(self.server, api_key=key)
            for call in (lambda: client.completions.create(**fields), client.models.list,
                         lambda: client.completions.create(stream=True, **fields)):
                with self.assertRaises(openai.AuthenticationError) as caught:
                    call()
                self.assertEqual(caught.exception.type, "authentication_error")
        client = self.connect(self.server, api_key="right")
        self.assertEqual(len(client.completions.create(**fields).choices), 1)
        self.assertEqual(len(client.models.list().data), 1)


@needs_openai
class OpenAIOverload(OpenAITest):
    """A server that is full, goes away or is slow: what the client does about it, with its own retries."""

    def hold(self, server):
        """A stream that goes on until the socket is closed."""
        holder = server.socket()
        self.addCleanup(holder.close)
        holder.sendall(server.completion_bytes(prompt="Once", max_tokens=1900, n=64, ignore_eos=True, stream=True))
        wait_until(lambda: server.metrics()["gptd_num_requests_running"] >= 1, 5, "it runs")
        return holder

    def fill(self, server):
        """The same where only one runs and one waits, and one that waits."""
        holder, waiting = self.hold(server), server.socket()
        waiting.sendall(server.completion_bytes(prompt="Once", max_tokens=2))
        wait_until(lambda: server.metrics()["gptd_num_requests_waiting"] == 1, 5, "one waits")
        self.addCleanup(waiting.close)
        return holder

    def create(self, server, **fields):
        return self.connect(server, **fields).completions.create(model=server.name, prompt="Once", max_tokens=2)

    def test_full(self):
        server = Server("--max-num-seqs", "1", "--max-queue-requests", "1")
        holder = self.fill(server)
        with self.assertRaises(openai.RateLimitError) as caught:
            self.create(server)
        self.assertEqual(caught.exception.type, "rate_limit_error")
        self.assertGreaterEqual(int(caught.exception.response.headers["retry-after"]), 1)

        def refused():
            return sum('"status":429' in line.replace(" ", "") for line in server.log)

        before = refused()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.create, server, max_retries=5)
            wait_until(lambda: refused() > before, 10, "the client was refused")
            holder.close()  # there is room when it tries again
            self.assertEqual(len(answer.result(30).choices), 1)
        server.check_stopped()

    def test_restart(self):
        """A kept connection to a server that drains gets a 503, and the client's next try the server's successor."""
        server = Server("--drain-delay", "0")
        client = self.connect(server, max_retries=5)
        fields = {"model": server.name, "prompt": "Once", "max_tokens": 2}
        client.completions.create(**fields)
        holder = self.hold(server)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("drain" in line for line in server.log), 5, "it drains")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.completions.create, **fields)
            successor = Server("--port", str(server.port))
            self.assertEqual(len(answer.result(30).choices), 1)
        self.assertTrue(any('"status":503' in line.replace(" ", "") for line in server.log), server.log[-5:])
        holder.close()
        self.assertEqual(server.stop(None), 0)
        successor.check_stopped()

    def test_timeout(self):
        """The client's own time limit cancels what it asked for; it is not left to run."""
        server = Server()
        client = self.connect(server, timeout=0.5)
        with self.assertRaises(openai.APITimeoutError):
            client.completions.create(model=server.name, prompt="Once", max_tokens=1900, n=64,
                                      extra_body={"ignore_eos": True})
        server.wait_idle(5)
        self.assertEqual(aborted(server), 1)
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
