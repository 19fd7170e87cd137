"""The same answer every time: alone, batched, streamed, chunked, cached, forked, preempted; greedy and seeded.

Answers are compared whole: text, token ids, log-probabilities to the last digit.
"""

import asyncio
import unittest

from harness import in_threads, join_events, not_on_a_gpu, parse_events, same_server, scale

WORDS = "the old king asked his daughter where the silver key was hidden and she said under the seventh stone".split()


def requests():
    """A dozen of different lengths and settings, all reproducible."""
    out = []
    for i in range(scale(12, 6)):
        prompt = " ".join((WORDS * 40)[i:i + 3 + 37 * (i % 5)])
        fields = {"prompt": prompt, "max_tokens": 20 + 7 * (i % 4), "logprobs": 2, "return_token_ids": True}
        fields |= [{"temperature": 0}, {"seed": 100 + i}, {"seed": i, "temperature": 1.4, "top_p": 0.9},
                   {"seed": i, "top_k": 20, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
                   {"seed": 7, "n": 3}, {"temperature": 0, "ignore_eos": True}][i % 6]
        out.append(fields)
    return out


def strip(choices):
    return [{k: c[k] for k in ("index", "text", "token_ids", "finish_reason", "logprobs")} for c in choices]


def gather(events):
    """The choices of a stream, put together as the unstreamed answer has them."""
    out = {}
    for event in events:
        for c in event["choices"]:
            o = out.setdefault(c["index"], {"index": c["index"], "text": "", "token_ids": [], "finish_reason": None,
                                            "logprobs": {}})
            o["text"] += c["text"]
            o["token_ids"] += c.get("token_ids") or []
            o["finish_reason"] = c["finish_reason"]
            for key, values in (c["logprobs"] or {}).items():
                o["logprobs"].setdefault(key, []).extend(values)
    return [out[i] for i in sorted(out)]


class Sameness(unittest.TestCase):
    maxDiff = 2000

    @classmethod
    def setUpClass(cls):
        # One sequence at a time, nothing cached: the reference.
        server = same_server("--max-num-seqs", "3", "--no-enable-prefix-caching")
        cls.requests = requests()
        cls.alone = [strip(server.complete(**fields)["choices"]) for fields in cls.requests]
        server.check_stopped()

    def compare(self, got, what):
        for fields, alone, answer in zip(self.requests, self.alone, got):
            self.assertEqual(alone, answer, f"{what}: {fields['prompt'][:30]!r} ({len(fields['prompt'])} characters)")

    def answers(self, server, stream=False):
        def ask(fields):
            if stream:
                return gather(server.stream(**fields))
            return strip(server.complete(**fields)["choices"])
        return in_threads(ask, [(fields,) for fields in self.requests])

    def test_batched_streamed_cached(self):
        server = same_server()
        self.compare(self.answers(server), "batched")
        self.compare(self.answers(server), "batched and cached")
        self.compare(self.answers(server, stream=True), "streamed, batched and cached")
        self.assertGreater(server.metrics()["gptd_prefix_cache_hits_total"], 0)
        server.check_stopped()

    def test_small_chunks(self):
        server = same_server("--max-num-seqs", "16", "--max-num-batched-tokens", "16")
        self.compare(self.answers(server), "chunks of 16 tokens")
        server.check_stopped()

    @not_on_a_gpu("--threads is about the CPU")
    def test_one_thread(self):
        server = same_server("--threads", "1")
        self.compare(self.answers(server), "one thread")
        server.check_stopped()

    def test_preempted(self):
        # A cache that holds a fraction of what is asked for at once.
        plan = same_server("--block-size", "16", "--kv-cache-memory-bytes", "1G")
        blocks = plan.metrics()["gptd_kv_cache_blocks"]
        plan.check_stopped()
        block_bytes = int(2**30 // blocks)
        memory = str(block_bytes * 40)
        server = same_server("--block-size", "16", "--kv-cache-memory-bytes", memory, "--max-model-len", "512")
        long = [{"prompt": " ".join(WORDS[i:] + WORDS * 3), "max_tokens": 200, "seed": i, "ignore_eos": True,
                 "logprobs": 1, "return_token_ids": True} for i in range(scale(10, 6))]
        alone = [strip(server.complete(**fields)["choices"]) for fields in long]
        self.assertEqual(server.metrics()["gptd_num_preemptions_total"], 0)
        together = in_threads(lambda fields: strip(server.complete(**fields)["choices"]), [(f,) for f in long])
        self.assertEqual(alone, together)
        self.assertGreater(server.metrics()["gptd_num_preemptions_total"], 0)
        server.wait_idle()
        server.check_stopped()

    def test_forked(self):
        server = same_server()
        fields = {"prompt": " ".join(WORDS * 8), "max_tokens": 30, "seed": 5, "temperature": 1.2}
        eight = server.complete(n=8, **fields)["choices"]
        for n in (1, 2, 5):
            self.assertEqual(server.complete(n=n, **fields)["choices"], eight[:n])
        self.assertEqual(len({c["text"] for c in eight}), 8)
        server.check_stopped()


class Crowd(unittest.TestCase):
    """500 streams at once: all complete, each equals its answer alone."""

    def test_concurrent_streams(self):
        count, distinct = scale(500, 60), scale(50, 12)
        server = same_server()
        fields = [{"prompt": f"Number {i}: " + " ".join(WORDS[:3 + i % 12]), "seed": i, "max_tokens": 8 + i % 9,
                   "temperature": 0 if i % 3 == 0 else 1, "ignore_eos": i % 2 == 0} for i in range(distinct)]
        alone = [server.complete(**f)["choices"][0] for f in fields]

        async def stream(i):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
            headers = "Connection: close\r\n"
            writer.write(server.completion_bytes(headers, stream=True, **fields[i % distinct]))
            await writer.drain()
            data = await asyncio.wait_for(reader.read(-1), 240)
            writer.close()
            return data

        async def all_streams():
            return await asyncio.gather(*(stream(i) for i in range(count)))

        for i, data in enumerate(asyncio.run(all_streams())):
            head, body = data.split(b"\r\n\r\n", 1)
            self.assertTrue(head.startswith(b"HTTP/1.1 200"), head)
            text, reason, _ = join_events(parse_events(dechunk(body)))[0]
            want = alone[i % distinct]
            self.assertEqual((text, reason), (want["text"], want["finish_reason"]), i)
        server.wait_idle()
        m = server.metrics()
        self.assertEqual(m['gptd_request_success_total{finished_reason="abort"}'], 0)
        server.check_stopped()


def dechunk(body):
    """The body of a response in chunked encoding."""
    out = b""
    while True:
        size, body = body.split(b"\r\n", 1)
        n = int(size, 16)
        if n == 0:
            return out
        out, body = out + body[:n], body[n + 2:]


if __name__ == "__main__":
    unittest.main()
