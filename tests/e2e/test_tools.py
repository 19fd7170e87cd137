"""What people put between themselves and a server: schemathesis for its description, LangChain's client, litellm."""

import asyncio
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import unittest

import harness
from harness import ServerTest, scale

HERE = os.path.dirname(os.path.abspath(__file__))


def has(package):
    spec = importlib.util.find_spec(package)
    return bool(spec and spec.origin)


def needs(package):
    """Skips without the package, but not where CI is set: nobody reads there what was skipped."""
    return unittest.skipUnless(has(package) or os.environ.get("CI"),
                               f"{package} is not installed (see scripts/setup.sh check)")


async def gather(stream):
    return [chunk async for chunk in stream]


@needs("schemathesis")
@unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "the limits are the demo model's")
class Description(ServerTest):
    """Requests made of /openapi.json, right and wrong ones; openapi_hooks.py says more."""

    flags = ("--api-key", "key", "--max-logprobs", "5")

    def run_schemathesis(self, seed):
        with open(os.path.join(self.server.model, "config.json")) as f:
            vocab_size = json.load(f)["vocab_size"]
        command = [os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run",
                   f"http://127.0.0.1:{self.server.port}/openapi.json", "--header", "Authorization: Bearer key",
                   "--phases", "coverage,fuzzing", "--max-examples", str(scale(20, 8)), "--seed", str(seed), "--no-shrink",
                   "--suppress-health-check", "all", "--generation-database", "none", "--no-color"]
        environment = {**os.environ, "PYTHONPATH": HERE, "SCHEMATHESIS_HOOKS": "openapi_hooks",
                       "OPENAPI_TEST_MODEL": self.server.name, "OPENAPI_TEST_VOCAB_SIZE": str(vocab_size)}
        with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
            with open(os.path.join(directory, "schemathesis.toml"), "w") as f:
                f.write("max-stream-events = 100000\n")  # else it leaves a stream after 20
            return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)

    def test_answers_are_as_described(self):
        seed = int(os.environ.get("SCHEMATHESIS_SEED") or random.getrandbits(32))
        done = self.run_schemathesis(seed)
        print(f"schemathesis: SCHEMATHESIS_SEED={seed}", done.stdout.strip().split("\n")[-1].strip("= "))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        ended = {k: v for k, v in self.metrics().items() if k.startswith("gptd_request_success_total")}
        self.assertGreater(sum(ended.values()), scale(50, 10), ended)  # the engine was reached
        self.wait_idle()

    def metrics(self):
        text = self.server.get("/metrics", headers={"Authorization": "Bearer key"}).body.decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}

    def wait_idle(self):
        def idle():
            return not any(v for k, v in self.metrics().items() if k.startswith("gptd_kv_cache_usage_ratio"))
        harness.wait_until(idle, 20, "every block is free")


@needs("langchain_openai")
class LangChain(ServerTest):
    """langchain-openai's OpenAI, which is of completions."""

    flags = ("--deterministic",)
    prompts = ["12+30=", "Once upon a time"]

    @classmethod
    def setUpClass(cls):
        import openai
        from langchain_openai import OpenAI
        super().setUpClass()
        cls.openai, cls.model_class = openai, OpenAI
        cls.answers = [cls.server.text(p, max_tokens=12, temperature=0) for p in cls.prompts]

    def client(self, **fields):
        fields = {"model": self.server.name, "temperature": 0, "max_tokens": 12, "max_retries": 0, **fields}
        return self.model_class(base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key="none", **fields)

    def run_async(self, model, call):
        """The connections end with their event loop."""
        async def calls():
            try:
                return await call()
            finally:
                await model.async_client._client.close()
        return asyncio.run(calls())

    def test_sync(self):
        model = self.client()
        self.assertEqual(model.invoke(self.prompts[0]), self.answers[0])
        self.assertEqual(model.batch(self.prompts), self.answers)
        self.assertEqual(model.invoke(self.prompts[0], stop=["\n"]), "42")

    def test_stream(self):
        self.assertEqual("".join(self.client().stream(self.prompts[1])), self.answers[1])
        chunks = self.client(max_tokens=600, extra_body={"ignore_eos": True}).stream(self.prompts[1])
        self.assertGreater(sum(1 for _ in chunks), 1)  # not all of it at the end

    def test_async(self):
        model = self.client()

        async def calls():
            return await asyncio.gather(model.ainvoke(self.prompts[0]), gather(model.astream(self.prompts[1])),
                                        model.abatch(self.prompts))

        answer, chunks, batch = self.run_async(model, calls)
        self.assertEqual([answer, "".join(chunks)], self.answers)
        self.assertEqual(batch, self.answers)

    def test_fields(self):
        """What the class has parameters for, and what goes beside them."""
        model = self.client(n=2, best_of=3, temperature=1, seed=5, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5,
                           logit_bias={"5": -100}, logprobs=2, extra_body={"top_k": 40, "return_token_ids": True})
        result = model.generate(self.prompts)
        self.assertEqual([len(g) for g in result.generations], [2, 2])
        self.assertEqual(result, model.generate(self.prompts).model_copy(update={"run": result.run}))
        usage = result.llm_output["token_usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertTrue(result.generations[0][0].generation_info["logprobs"]["tokens"])

    def test_errors(self):
        for fields, kind in (({"model": "none-such"}, self.openai.NotFoundError),
                             ({"temperature": 3}, self.openai.BadRequestError)):
            with self.assertRaises(kind):
                self.client(**fields).invoke("x")
            with self.assertRaises(kind):
                list(self.client(**fields).stream("x"))
            with self.assertRaises(kind):
                model = self.client(**fields)
                self.run_async(model, lambda: model.ainvoke("x"))


class ChatAnswers:
    """What the classes of chats share: one conversation, and the server's own answer to it."""

    messages = [{"role": "user", "content": "Tell me a story about a fox."}]

    @classmethod
    def ask(cls, **fields):
        body = {"model": cls.server.name, "messages": cls.messages, "max_tokens": 40, "temperature": 0, **fields}
        answer = cls.server.post("/v1/chat/completions", body)
        assert answer.status == 200, answer
        return answer.json()["choices"][0]["message"]["content"]


@needs("langchain_openai")
class LangChainChat(ChatAnswers, ServerTest):
    """langchain-openai's ChatOpenAI."""

    flags = ("--deterministic",)

    @classmethod
    def setUpClass(cls):
        import openai
        from langchain_openai import ChatOpenAI
        super().setUpClass()
        cls.openai, cls.model_class, cls.answer = openai, ChatOpenAI, cls.ask()

    def client(self, **fields):
        fields = {"model": self.server.name, "temperature": 0, "max_tokens": 40, "max_retries": 0, **fields}
        return self.model_class(base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key="none", **fields)

    def test_sync(self):
        answer = self.client().invoke(self.messages)
        self.assertEqual(answer.content, self.answer)
        self.assertEqual(answer.usage_metadata["output_tokens"], 40)
        self.assertEqual(answer.response_metadata["finish_reason"], "length")
        self.assertEqual([a.content for a in self.client().batch([self.messages] * 3)], [self.answer] * 3)

    def test_stream(self):
        chunks = list(self.client(stream_usage=True).stream(self.messages))
        self.assertEqual("".join(c.content for c in chunks), self.answer)
        self.assertEqual([c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata], [40])

    def test_async(self):
        model = self.client()

        async def calls():
            try:
                return await asyncio.gather(model.ainvoke(self.messages), gather(model.astream(self.messages)))
            finally:
                await model.root_async_client.close()

        answer, chunks = asyncio.run(calls())
        self.assertEqual([answer.content, "".join(c.content for c in chunks)], [self.answer] * 2)

    def test_conversation(self):
        """Messages of its own kinds, an answer handed back among them, and a template with its output parser."""
        from langchain_core.messages import HumanMessage, SystemMessage
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import ChatPromptTemplate
        first = [SystemMessage("Be kind."), HumanMessage("My name is Anna.")]
        model = self.client(stop_sequences=["\n"])
        answer = model.invoke([*first, model.invoke(first), HumanMessage("What is my name?")])
        self.assertIn("Anna", answer.content)
        chain = ChatPromptTemplate.from_messages([("user", "What is {a}+{b}?")]) | model | StrOutputParser()
        self.assertEqual(chain.invoke({"a": 12, "b": 30}), "12+30=42.")

    def test_errors(self):
        for fields, kind in (({"model": "none-such"}, self.openai.NotFoundError),
                             ({"max_tokens": 100_000}, self.openai.BadRequestError)):
            with self.assertRaises(kind):
                self.client(**fields).invoke(self.messages)
            with self.assertRaises(kind):
                list(self.client(**fields).stream(self.messages))
        with self.assertRaises(self.openai.BadRequestError) as caught:  # there are no tools, and that is said
            self.client().bind_tools([{"name": "f", "description": "x", "parameters": {}}]).invoke(self.messages)
        self.assertEqual(caught.exception.param, "tools")


# 200 MB of its own: see `make check-clients`.
@unittest.skipUnless(has("litellm"), "litellm is not installed (see scripts/setup.sh clients)")
class LiteLLM(ChatAnswers, ServerTest):
    """litellm's text_completion, under both names that lead to a server of one's own, and its completion, of chats."""

    flags = ("--deterministic",)
    prompts = ["12+30=", "Once upon a time"]

    @classmethod
    def setUpClass(cls):
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices are not to be fetched
        import litellm
        litellm.suppress_debug_info = litellm.disable_aiohttp_transport = True
        cls.litellm = litellm
        super().setUpClass()
        cls.answers = [cls.server.text(p, max_tokens=12, temperature=0) for p in cls.prompts]

    def fields(self, provider, **fields):
        return {"api_base": f"http://127.0.0.1:{self.server.port}/v1", "api_key": "none", "max_tokens": 12,
                "temperature": 0, "max_retries": 0, "model": f"{provider}/{self.server.name}", **fields}

    def each_provider(self):
        for provider in ("openai", "text-completion-openai"):
            with self.subTest(provider):
                yield provider

    def test_sync(self):
        for provider in self.each_provider():
            answer = self.litellm.text_completion(prompt=self.prompts[0], **self.fields(provider))
            self.assertEqual(answer.choices[0].text, self.answers[0])
            self.assertEqual(answer.usage.completion_tokens, 12)

    def test_prompts(self):
        answer = self.litellm.text_completion(prompt=self.prompts, **self.fields("text-completion-openai"))
        self.assertEqual([c.text for c in answer.choices], self.answers)

    def test_stream(self):
        for provider in self.each_provider():
            chunks = list(self.litellm.text_completion(prompt=self.prompts[1], stream=True, **self.fields(provider)))
            self.assertEqual("".join(c.choices[0].text or "" for c in chunks), self.answers[1])

    def test_async(self):
        async def calls(fields):
            whole = await self.litellm.atext_completion(prompt=self.prompts[0], **fields)
            chunks = await self.litellm.atext_completion(prompt=self.prompts[1], stream=True, **fields)
            text = "".join(c.choices[0].text or "" for c in await gather(chunks))
            await self.litellm.close_litellm_async_clients()
            return [whole.choices[0].text, text]

        for provider in self.each_provider():
            self.assertEqual(asyncio.run(calls(self.fields(provider))), self.answers)

    def test_chat(self):
        async def calls(fields):
            whole = await self.litellm.acompletion(**fields)
            chunks = await gather(await self.litellm.acompletion(stream=True, **fields))
            await self.litellm.close_litellm_async_clients()
            return [whole, chunks]

        fields = self.fields("openai", messages=self.messages, max_tokens=40)
        whole, chunks = self.litellm.completion(**fields), list(self.litellm.completion(stream=True, **fields))
        for answer, stream in ((whole, chunks), asyncio.run(calls(fields))):
            self.assertEqual(answer.choices[0].message.content, self.ask())
            self.assertEqual(answer.usage.completion_tokens, 40)
            self.assertEqual("".join(c.choices[0].delta.content or "" for c in stream), self.ask())
        with self.assertRaises(self.litellm.BadRequestError):
            self.litellm.completion(**{**fields, "max_tokens": 100_000})

    def test_errors(self):
        for provider in self.each_provider():
            for fields, kind in (({"model": f"{provider}/none-such"}, self.litellm.NotFoundError),
                                 ({"temperature": 3}, self.litellm.BadRequestError),
                                 ({"max_tokens": 100_000}, self.litellm.BadRequestError)):
                with self.assertRaises(kind):
                    self.litellm.text_completion(prompt="x", **self.fields(provider, **fields))


if __name__ == "__main__":
    unittest.main()
