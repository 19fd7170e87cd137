"""The official OpenAI client on completions: async, with keys, and what becomes of calls that are cut."""

import asyncio
import concurrent.futures
import signal
import unittest

from harness import Server, ServerTest, wait_until
from test_clients import client_of, openai, with_openai


def aborted(server):
    return server.metrics()['gptd_request_success_total{finished_reason="abort"}']


def run_async(server, call):
    """call(client) within an event loop of its own."""
    async def calls():
        async with client_of(server, "AsyncOpenAI") as client:
            return await call(client)
    return asyncio.run(calls())


@with_openai
class OpenAIAsync(ServerTest):
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

        answers = run_async(self.server, calls)
        self.assertEqual([a.choices[0].text for a in answers[:8]] + answers[8:], [expected] * 16)

    def test_errors(self):
        for fields, kind in (({"temperature": 3}, openai.BadRequestError), ({"model": "none"}, openai.NotFoundError),
                             ({"max_tokens": 100_000}, openai.BadRequestError)):
            for stream in (False, True):
                with self.assertRaises(kind):
                    run_async(self.server, lambda client: client.completions.create(**self.fields(stream=stream, **fields)))

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
        run_async(self.server, calls)
        self.server.wait_idle()
        self.assertGreaterEqual(aborted(self.server), before + 2)


@with_openai
class OpenAIKey(ServerTest):
    flags = ("--api-key", "right")

    def test_key(self):
        fields = {"model": self.server.name, "prompt": "x", "max_tokens": 1}
        anybody = client_of(self.server)
        self.addCleanup(anybody.close)
        for key in ("wrong", "righ", "rightly"):
            client = anybody.with_options(api_key=key)
            for call in (lambda: client.completions.create(**fields), client.models.list,
                         lambda: client.completions.create(stream=True, **fields)):
                with self.assertRaises(openai.AuthenticationError) as caught:
                    call()
                self.assertEqual(caught.exception.type, "authentication_error")
        client = anybody.with_options(api_key="right")
        self.assertEqual(len(client.completions.create(**fields).choices), 1)
        self.assertEqual(len(client.models.list().data), 1)


@with_openai
class OpenAICut(unittest.TestCase):
    """A server that is replaced, and a client that does not wait."""

    def start(self, *flags):
        server = Server(*flags)
        self.addCleanup(server.kill)  # where the test fails, too
        return server

    def connect(self, server, **options):
        client = client_of(server, **options)
        self.addCleanup(client.close)
        return client

    def hold(self, server):
        """A stream that goes on until the socket is closed."""
        holder = server.socket()
        self.addCleanup(holder.close)
        holder.sendall(server.completion_bytes(prompt="Once", max_tokens=1900, n=64, ignore_eos=True, stream=True))
        wait_until(lambda: server.metrics()["gptd_num_requests_running"] >= 1, 5, "it runs")
        return holder

    def test_restart(self):
        """A kept connection to a server that drains gets a 503, and the client's next try the server's successor."""
        server = self.start("--drain-delay", "0")
        client = self.connect(server, max_retries=5)
        fields = {"model": server.name, "prompt": "Once", "max_tokens": 2}
        client.completions.create(**fields)
        holder = self.hold(server)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("drain" in line for line in server.log), 5, "it drains")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.completions.create, **fields)
            successor = self.start("--port", str(server.port))
            self.assertEqual(len(answer.result(30).choices), 1)
        self.assertTrue(any(e.get("status") == 503 for e in server.log_entries()), server.log[-5:])
        holder.close()
        self.assertEqual(server.stop(None), 0)
        successor.check_stopped()

    def test_timeout(self):
        """The client's own time limit cancels what it asked for; it is not left to run."""
        server = self.start()
        client = self.connect(server, timeout=0.5)
        with self.assertRaises(openai.APITimeoutError):
            client.completions.create(model=server.name, prompt="Once", max_tokens=1900, n=64,
                                      extra_body={"ignore_eos": True})
        server.wait_idle(5)
        self.assertEqual(aborted(server), 1)
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
