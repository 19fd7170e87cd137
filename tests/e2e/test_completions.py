"""POST /v1/completions: what each field does."""

import json
import math
import os
import random
import tempfile
import unittest

import harness
from harness import ServerTest, StreamError, TinyServerTest, TINY_CONFIG, join_events, parse_events

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_tokens": 24}


class Completions(ServerTest):
    flags = ("--deterministic",)

    def test_plain(self):
        answer = self.server.completions(prompt=PROMPT, **GREEDY)
        self.assertEqual(answer.status, 200, answer)
        self.assertTrue(answer.headers["Content-Type"].startswith("application/json"))
        self.assertGreaterEqual(int(answer.headers["openai-processing-ms"]), 0)
        self.assertTrue(answer.headers["x-request-id"])
        body = answer.json()
        self.assertEqual(body["object"], "text_completion")
        self.assertEqual(body["model"], self.server.name)
        self.assertTrue(body["id"])
        self.assertGreater(body["created"], 1.7e9)
        self.assertIn("system_fingerprint", body)
        self.assertEqual(len(body["choices"]), 1)
        choice = body["choices"][0]
        self.assertEqual(choice["index"], 0)
        self.assertIsNone(choice["logprobs"])
        self.assertIn(choice["finish_reason"], ("stop", "length"))
        self.assertTrue(choice["text"])
        usage = body["usage"]
        self.assertEqual(usage["prompt_tokens"], len(self.server.tokenize(PROMPT)))
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertLessEqual(usage["completion_tokens"], 24)
        self.assertIn("cached_tokens", usage["prompt_tokens_details"])

    def test_defaults(self):
        body = self.server.complete(prompt=PROMPT, ignore_eos=True)
        self.assertEqual(body["usage"]["completion_tokens"], 16)
        self.assertEqual(body["choices"][0]["finish_reason"], "length")

    def test_null_is_default(self):
        nulls = {name: None for name in (
            "max_tokens", "n", "best_of", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logprobs",
            "logit_bias", "echo", "stream", "stop", "suffix", "seed", "stream_options", "top_k", "min_p",
            "repetition_penalty", "min_tokens", "stop_token_ids", "bad_words", "allowed_token_ids", "prompt_logprobs")}
        body = self.server.complete(prompt=PROMPT, **{**nulls, "seed": 3, "ignore_eos": True})
        self.assertEqual(body["choices"][0]["text"], self.server.text(PROMPT, seed=3, ignore_eos=True))
        self.assertEqual(body["usage"]["completion_tokens"], 16)

    def test_stream_equals_plain(self):
        for fields in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "n": 3}, {"seed": 6, "echo": True},
                       {"temperature": 0, "logprobs": 2}, {"seed": 8, "stop": ["a", "the"]}):
            with self.subTest(**fields):
                fields = {"max_tokens": 40, **fields}
                plain = self.server.complete(prompt=PROMPT, **fields)
                events = self.server.stream(prompt=PROMPT, **fields)
                self.assertEqual({e["id"] for e in events}, {events[0]["id"]})
                self.assertEqual({e["created"] for e in events}, {events[0]["created"]})
                self.assertEqual({e["object"] for e in events}, {"text_completion"})
                joined = join_events(events)
                self.assertEqual(len(joined), fields.get("n", 1))
                for choice in plain["choices"]:
                    text, reason, _ = joined[choice["index"]]
                    self.assertEqual(text, choice["text"])
                    self.assertEqual(reason, choice["finish_reason"])

    def test_stream_headers_and_chunks(self):
        answer = self.server.completions(prompt=PROMPT, stream=True, **GREEDY)
        self.assertTrue(answer.headers["Content-Type"].startswith("text/event-stream"))
        self.assertIn("no-cache", answer.headers["Cache-Control"])
        self.assertEqual(answer.headers["X-Accel-Buffering"], "no")
        self.assertTrue(answer.headers["x-request-id"])
        self.assertTrue(answer.body.endswith(b"data: [DONE]\n\n"))
        events = parse_events(answer.body)
        for event in events[:-1]:
            for choice in event["choices"]:
                self.assertIsNone(choice["finish_reason"])
        self.assertTrue(all("usage" not in e or e["usage"] is None for e in events))

    def test_stream_usage(self):
        events = self.server.stream(prompt=PROMPT, stream_options={"include_usage": True}, n=2, seed=1, max_tokens=8)
        self.assertTrue(all(e["usage"] is None for e in events[:-1]))
        self.assertEqual(events[-1]["choices"], [])
        plain = self.server.complete(prompt=PROMPT, n=2, seed=1, max_tokens=8)["usage"]
        usage = events[-1]["usage"]
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            self.assertEqual(usage[key], plain[key])
        events = self.server.stream(prompt=PROMPT, stream_options={"include_usage": False}, max_tokens=4)
        self.assertTrue(all(not e.get("usage") for e in events))

    def test_stream_logprobs(self):
        plain = self.server.complete(prompt=PROMPT, logprobs=2, echo=True, **GREEDY)["choices"][0]["logprobs"]
        parts = [c["logprobs"] for e in self.server.stream(prompt=PROMPT, logprobs=2, echo=True, **GREEDY)
                 for c in e["choices"] if c["logprobs"]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            self.assertEqual([x for part in parts for x in part[key]], plain[key], key)

    def test_token_id_prompts(self):
        ids = self.server.tokenize(PROMPT)
        text = self.server.text(PROMPT, **GREEDY)
        self.assertEqual(self.server.text(ids, **GREEDY), text)
        body = self.server.complete(prompt=[ids, ids], **GREEDY)
        self.assertEqual([c["text"] for c in body["choices"]], [text, text])

    def test_several_prompts(self):
        prompts = [PROMPT, "The king said", "12+30=", "A dog"]
        body = self.server.complete(prompt=prompts, n=2, seed=11, max_tokens=12)
        self.assertEqual([c["index"] for c in body["choices"]], list(range(8)))
        for i, prompt in enumerate(prompts):
            alone = self.server.complete(prompt=prompt, n=2, seed=11, max_tokens=12)["choices"]
            self.assertEqual([c["text"] for c in body["choices"][2 * i:2 * i + 2]], [c["text"] for c in alone])
        self.assertEqual(body["usage"]["prompt_tokens"], sum(len(self.server.tokenize(p)) for p in prompts))

    def test_n(self):
        fields = {"prompt": PROMPT, "seed": 21, "max_tokens": 20, "temperature": 1.5}
        one = self.server.text(**fields)
        many = [c["text"] for c in self.server.complete(n=5, **fields)["choices"]]
        self.assertEqual(many[0], one)
        self.assertGreater(len(set(many)), 1)
        greedy = [c["text"] for c in self.server.complete(prompt=PROMPT, n=3, **GREEDY)["choices"]]
        self.assertEqual(len(set(greedy)), 1)

    def test_best_of(self):
        fields = {"prompt": PROMPT, "seed": 31, "max_tokens": 12, "logprobs": 0, "ignore_eos": True, "temperature": 1.3}
        candidates = self.server.complete(n=4, **fields)["choices"]
        best = self.server.complete(n=1, best_of=4, **fields)["choices"]
        self.assertEqual(len(best), 1)
        self.assertEqual(best[0]["index"], 0)
        mean = lambda c: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"])
        self.assertEqual(best[0]["text"], max(candidates, key=mean)["text"])

    def test_echo(self):
        plain = self.server.text(PROMPT, **GREEDY)
        self.assertEqual(self.server.text(PROMPT, echo=True, **GREEDY), PROMPT + plain)
        body = self.server.complete(prompt=PROMPT, echo=True, max_tokens=0)
        self.assertEqual(body["choices"][0]["text"], PROMPT)
        self.assertEqual(body["choices"][0]["finish_reason"], "length")
        self.assertEqual(body["usage"]["completion_tokens"], 0)

    def test_max_tokens_0(self):
        body = self.server.complete(prompt=PROMPT, max_tokens=0)
        self.assertEqual(body["choices"][0]["text"], "")
        self.assertEqual(body["usage"]["completion_tokens"], 0)

    def check_logprobs(self, logprobs, top):
        n = len(logprobs["tokens"])
        for key in ("token_logprobs", "top_logprobs", "text_offset"):
            self.assertEqual(len(logprobs[key]), n, key)
        for token, logprob, tops in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
            if logprob is None:
                self.assertIsNone(tops)
                continue
            self.assertLessEqual(logprob, 0)
            self.assertTrue(math.isfinite(logprob))
            self.assertIn(token, tops)
            self.assertAlmostEqual(tops[token], logprob, places=5)
            self.assertLessEqual(len(tops), top + 1)
            self.assertLessEqual(sum(math.exp(x) for x in tops.values()), 1.0001)
        self.assertEqual(logprobs["text_offset"], sorted(logprobs["text_offset"]))

    def test_logprobs(self):
        for top in (0, 1, 5):
            with self.subTest(top=top):
                choice = self.server.complete(prompt=PROMPT, logprobs=top, seed=2, max_tokens=20)["choices"][0]
                self.check_logprobs(choice["logprobs"], top)
                self.assertTrue("".join(choice["logprobs"]["tokens"]).startswith(choice["text"]))
        greedy = self.server.complete(prompt=PROMPT, logprobs=3, **GREEDY)["choices"][0]["logprobs"]
        for logprob, tops in zip(greedy["token_logprobs"], greedy["top_logprobs"]):
            self.assertAlmostEqual(logprob, max(tops.values()), places=5)

    def test_echo_logprobs(self):
        # What lm-evaluation-harness relies on: the prompt's tokens first, the first of them without a log-probability.
        ids = self.server.tokenize(PROMPT)
        for max_tokens in (0, 5):
            body = self.server.complete(prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0,
                                        ignore_eos=True)
            logprobs = body["choices"][0]["logprobs"]
            self.check_logprobs(logprobs, 1)
            self.assertEqual(len(logprobs["tokens"]), len(ids) + max_tokens)
            self.assertIsNone(logprobs["token_logprobs"][0])
            self.assertNotIn(None, logprobs["token_logprobs"][1:])

    def test_prompt_offsets(self):
        # Where each of the prompt's tokens begins in the text that is returned, whatever the tokenizer adds or skips.
        turns = "<|user|>\nHi é😀 there<|end|>\n<|assistant|>\n"
        for prompt in (PROMPT, " one", "  two  spaces", "é😀 x", turns, "Hi<|end|> there"):
            ids = self.server.tokenize(prompt)
            for sent, skip in ((prompt, True), (prompt, False), (ids, True), (ids, False)):
                with self.subTest(sent=sent, skip=skip):
                    choice = self.server.complete(prompt=sent, echo=True, logprobs=0, max_tokens=0,
                                                  skip_special_tokens=skip)["choices"][0]
                    text, logprobs = choice["text"], choice["logprobs"]
                    self.check_logprobs(logprobs, 0)
                    begins = logprobs["text_offset"]
                    pieces = [text[i:j] for i, j in zip(begins, begins[1:] + [len(text)])]
                    self.assertEqual("".join(pieces), text)
                    for token, piece in zip(logprobs["tokens"], pieces):
                        if token.startswith("bytes:"):
                            self.assertLessEqual(len(piece), 1)
                        elif piece or not token.startswith(("<", " ")):
                            self.assertIn(piece, (token, token.removeprefix(" ")))

    def test_scored_equals_generated(self):
        # Decode and prefill compute the same bits: what was generated has the same log-probabilities as a prompt.
        ids = self.server.tokenize(PROMPT)
        choice = self.server.complete(prompt=ids, logprobs=0, seed=77, max_tokens=30, ignore_eos=True,
                                      return_token_ids=True, skip_special_tokens=False)["choices"][0]
        generated = choice["token_ids"]
        self.assertEqual(len(generated), 30)
        scored = self.server.complete(prompt=ids + generated, echo=True, logprobs=0, max_tokens=0)["choices"][0]
        self.assertEqual(scored["logprobs"]["token_logprobs"][len(ids):], choice["logprobs"]["token_logprobs"])

    def test_prompt_logprobs(self):
        ids = self.server.tokenize(PROMPT)
        choice = self.server.complete(prompt=ids, prompt_logprobs=2, max_tokens=1)["choices"][0]
        entries = choice["prompt_logprobs"]
        self.assertEqual(len(entries), len(ids))
        self.assertIsNone(entries[0])
        for token, entry in zip(ids[1:], entries[1:]):
            self.assertIn(str(token), entry)
            self.assertLessEqual(entry[str(token)]["logprob"], 0)

    def test_add_special_tokens(self):
        with_bos = self.server.tokenize(PROMPT)
        for add in (True, False):
            choice = self.server.complete(prompt=PROMPT, add_special_tokens=add, return_token_ids=True, max_tokens=1)
            self.assertEqual(choice["choices"][0]["prompt_token_ids"], with_bos if add else with_bos[1:])

    def test_tokens_as_token_ids(self):
        choice = self.server.complete(prompt=PROMPT, return_tokens_as_token_ids=True, return_token_ids=True, logprobs=2,
                                      **GREEDY)["choices"][0]
        names = [f"token_id:{i}" for i in choice["token_ids"]]
        self.assertEqual(choice["logprobs"]["tokens"], names)
        for name, top in zip(names, choice["logprobs"]["top_logprobs"]):
            self.assertIn(name, top)
            self.assertTrue(all(key.startswith("token_id:") for key in top))

    def test_return_token_ids(self):
        ids = self.server.tokenize(PROMPT)
        choice = self.server.complete(prompt=PROMPT, return_token_ids=True, ignore_eos=True, **GREEDY)["choices"][0]
        self.assertEqual(choice["prompt_token_ids"], ids)
        self.assertEqual(len(choice["token_ids"]), 24)
        streamed = join_events(self.server.stream(prompt=PROMPT, return_token_ids=True, ignore_eos=True, **GREEDY))
        self.assertEqual(streamed[0][2], choice["token_ids"])

    def test_stop_strings(self):
        whole = self.server.text(PROMPT, temperature=0, max_tokens=60)
        self.assertGreater(len(whole), 60)
        for start, size in ((10, 1), (9, 5), (20, 12), (3, 30)):
            stop = whole[start:start + size]
            cut = whole[:whole.index(stop)]
            for stops in (stop, [stop], ["\x01never", stop], [stop + "\x01", stop]):
                with self.subTest(stops=stops):
                    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "stop": stops}
                    choice = self.server.complete(**fields)["choices"][0]
                    self.assertEqual((choice["text"], choice["finish_reason"]), (cut, "stop"))
                    text, reason, _ = join_events(self.server.stream(**fields))[0]
                    self.assertEqual((text, reason), (cut, "stop"))
            kept = self.server.text(PROMPT, temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=True)
            self.assertEqual(kept, cut + stop)
        # Held back as a possible beginning, then given out since it was none.
        almost = whole[10:20] + "\x01"
        self.assertEqual(self.server.text(PROMPT, temperature=0, max_tokens=60, stop=almost), whole)
        self.assertEqual(self.server.text(PROMPT, temperature=0, max_tokens=60, stop=whole[-5:] + "\x01"), whole)

    def test_stop_string_of_a_special_token(self):
        # Its text waits for what comes next; what comes next is not part of the answer.
        end = self.server.tokenize("</s>", add_special_tokens=False)
        fields = {"prompt": PROMPT, "logit_bias": {str(end[0]): 100}, "max_tokens": 4, "temperature": 0,
                  "stop": "</s>", "skip_special_tokens": False, "ignore_eos": True, "logprobs": 0,
                  "return_token_ids": True}
        body = self.server.complete(**fields)
        choice = body["choices"][0]
        self.assertEqual((choice["text"], choice["finish_reason"], choice["token_ids"]), ("", "stop", end))
        self.assertEqual(body["usage"]["completion_tokens"], 1)
        self.assertEqual(choice["logprobs"]["tokens"], ["</s>"])
        self.assertEqual(join_events(self.server.stream(**fields))[0], ("", "stop", end))

    def test_stop_token_ids(self):
        fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "return_token_ids": True}
        whole = self.server.complete(**fields)["choices"][0]
        stop = whole["token_ids"][7]
        first = whole["token_ids"].index(stop)
        choice = self.server.complete(stop_token_ids=[stop], **fields)["choices"][0]
        self.assertEqual(choice["finish_reason"], "stop")
        self.assertEqual(choice["token_ids"][:first], whole["token_ids"][:first])
        self.assertLessEqual(len(choice["token_ids"]), first + 1)
        self.assertTrue(whole["text"].startswith(choice["text"]))
        later = self.server.complete(stop_token_ids=[stop], min_tokens=first + 5, **fields)["choices"][0]
        self.assertGreaterEqual(len(later["token_ids"]), first + 5)

    def test_seed(self):
        fields = {"temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
        texts = [self.server.text(PROMPT, seed=s, **fields) for s in (1, 1, 2, 2**53, 2**53 + 1, -1, 2**63 - 1, -2**63)]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(len(set(texts)), 7, "every seed counts, to the last bit")
        unseeded = {self.server.text(PROMPT, **fields) for _ in range(4)}
        self.assertGreater(len(unseeded), 1)

    def test_greedy_limits(self):
        greedy = self.server.text(PROMPT, **GREEDY)
        for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
            with self.subTest(**fields):
                self.assertEqual(self.server.text(PROMPT, seed=9, max_tokens=24, **fields), greedy)
        self.assertEqual(self.server.text(PROMPT, top_k=0, seed=9), self.server.text(PROMPT, top_k=-1, seed=9))

    def test_logit_bias_and_lists(self):
        fields = {"prompt": PROMPT, "return_token_ids": True, "ignore_eos": True}
        greedy = self.server.complete(**GREEDY, **fields)["choices"][0]["token_ids"]
        wanted = greedy[3]
        biased = self.server.complete(logit_bias={str(wanted): 100}, **GREEDY, **fields)["choices"][0]["token_ids"]
        self.assertEqual(set(biased), {wanted})
        without = self.server.complete(logit_bias={str(greedy[0]): -100}, **GREEDY, **fields)["choices"][0]["token_ids"]
        self.assertNotIn(greedy[0], without)
        allowed = sorted(set(greedy))[:3]
        choice = self.server.complete(allowed_token_ids=allowed, seed=4, max_tokens=20, **fields)["choices"][0]
        self.assertLessEqual(set(choice["token_ids"]), set(allowed))

    def test_bad_words(self):
        whole = self.server.text(PROMPT, temperature=0, max_tokens=40)
        word = max(whole.split(), key=len).strip(".,!?\"'")
        self.assertNotIn(word, self.server.text(PROMPT, temperature=0, max_tokens=40, bad_words=[word]))

    def test_constraints_that_leave_nothing(self):
        seven = self.server.tokenize("77", add_special_tokens=False)[-1:]
        stop = self.server.tokenize("</s>", add_special_tokens=False)
        for fields in ({"allowed_token_ids": stop, "min_tokens": 1},
                       {"allowed_token_ids": seven * 1000, "bad_words": ["7"]},
                       {"allowed_token_ids": seven + stop, "bad_words": ["7"], "min_tokens": 1},
                       {"allowed_token_ids": seven, "stop_token_ids": seven, "min_tokens": 1}):
            answer = self.server.completions(prompt="12+30=", **fields)
            self.assertEqual((answer.status, answer.error["param"]), (400, "allowed_token_ids"), (fields, answer))
        # The same, but only after the first token.
        outcomes = [f'gptd_request_success_total{{finished_reason="{reason}"}}' for reason in ("error", "abort")]
        before = self.server.metrics()
        fields = {"prompt": "12+30=", "allowed_token_ids": seven, "bad_words": ["77"], "max_tokens": 5}
        answer = self.server.completions(**fields)
        self.assertEqual((answer.status, answer.error["param"]), (400, "bad_words"), answer)
        self.assertEqual(answer.error["type"], "invalid_request_error")
        answer = self.server.completions(stream=True, **fields)
        self.assertEqual(answer.status, 200)
        with self.assertRaisesRegex(StreamError, "bad_words"):
            parse_events(answer.body)
        def counted():
            after = self.server.metrics()
            return [after[name] - before[name] for name in outcomes]
        # An answer is counted once it has been sent: its reader may be here before.
        harness.wait_until(lambda: sum(counted()) >= 2, 5, "both are counted")
        self.assertEqual(counted(), [2, 0])
        self.assertEqual(self.server.text("12+30=", allowed_token_ids=stop, max_tokens=5), "")

    def test_penalties(self):
        fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
        distinct = lambda **f: len(set(self.server.complete(**fields, **f)["choices"][0]["token_ids"]))
        plain = distinct()
        for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.8}):
            with self.subTest(**penalty):
                self.assertGreater(distinct(**penalty), plain)

    def test_ignored_fields(self):
        text = self.server.text(PROMPT, **GREEDY)
        ignored = {"user": "someone", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
                   "safety_identifier": "x", "prompt_cache_key": "y", "priority": 0}
        self.assertEqual(self.server.text(PROMPT, **GREEDY, **ignored), text)

    def test_cached_tokens(self):
        prompt = " ".join(random.Random().choice(("red", "dog", "tree", "runs", "blue")) for _ in range(300))
        first = self.server.complete(prompt=prompt, **GREEDY)
        second = self.server.complete(prompt=prompt, **GREEDY)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.assertEqual(first["choices"][0]["text"], second["choices"][0]["text"])
        self.assertGreater(cached, 0)
        self.assertLess(cached, second["usage"]["prompt_tokens"])
        salted = self.server.complete(prompt=prompt, cache_salt="mine", **GREEDY)
        self.assertEqual(salted["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
        self.assertEqual(salted["choices"][0]["text"], first["choices"][0]["text"])

    def test_unicode(self):
        for prompt in ("Größe 😀 名前", "e\u0301 \u200b", "\ufffd", "\U0010ffff", "a\ttab\r\nline"):
            with self.subTest(prompt=prompt):
                answer = self.server.complete(prompt=prompt, echo=True, max_tokens=8, seed=1)
                self.assertTrue(answer["choices"][0]["text"].startswith(prompt))
                joined = join_events(self.server.stream(prompt=prompt, echo=True, max_tokens=8, seed=1))
                self.assertEqual(joined[0][0], answer["choices"][0]["text"])
        # High temperature on a byte-fallback vocabulary: broken characters must come out as U+FFFD, the same both ways.
        for seed in range(6):
            fields = {"prompt": PROMPT, "seed": seed, "temperature": 2, "max_tokens": 60, "ignore_eos": True}
            self.assertEqual(join_events(self.server.stream(**fields))[0][0], self.server.text(**fields))

    def test_empty_prompt(self):
        answer = self.server.completions(prompt="", max_tokens=4)
        self.assertIn(answer.status, (200, 400), answer)
        if answer.status == 200:
            self.assertGreaterEqual(answer.json()["usage"]["prompt_tokens"], 1)

    def test_long_prompt(self):
        room = self.server.get("/v1/models").json()["data"][0].get("max_model_len") or 2048
        ids = (self.server.tokenize("The cat sat on the mat. ") * room)[:room - 4]
        body = self.server.complete(prompt=ids, max_tokens=4, temperature=0, ignore_eos=True)
        self.assertEqual(body["usage"]["total_tokens"], room)
        answer = self.server.completions(prompt=ids, max_tokens=5)
        self.assertEqual(answer.status, 400)
        self.assertIn(str(room), answer.error["message"])
        text = "word " * 200_000  # 1 MB, far over the context: an answer, not a crash
        answer = self.server.completions(prompt=text, max_tokens=1)
        self.assertEqual(answer.status, 400)


class OrdinaryEos(unittest.TestCase):
    def test_its_text_is_not_in_the_answer(self):
        # An id that generation_config.json names EOS and that the tokenizer takes for text like any other.
        with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
            for name in os.listdir(harness.MODEL):
                if name != "generation_config.json":
                    os.symlink(os.path.join(harness.MODEL, name), os.path.join(directory, name))
            first = harness.Server()
            seven = first.tokenize("77", add_special_tokens=False)[-1]
            first.check_stopped()
            with open(os.path.join(directory, "generation_config.json"), "w") as f:
                json.dump({"eos_token_id": [2, seven]}, f)
            server = harness.Server(model=directory)
            fields = {"prompt": "12+30=", "logit_bias": {str(seven): 100}, "max_tokens": 3, "temperature": 0}
            for more, expected in (({}, ("", "stop")), ({"include_stop_str_in_output": True}, ("7", "stop")),
                                   ({"ignore_eos": True}, ("777", "length"))):
                choice = server.complete(**fields, **more)["choices"][0]
                self.assertEqual((choice["text"], choice["finish_reason"]), expected)
                self.assertEqual(join_events(server.stream(**fields, **more))[0][:2], expected)
            server.check_stopped()


class TokenIdsOnly(TinyServerTest):
    """A directory with a config.json and nothing else."""

    flags = ("--deterministic",)

    def test_token_ids(self):
        body = self.server.complete(prompt=[5, 6, 7], max_tokens=9, seed=1)
        choice = body["choices"][0]
        self.assertEqual(len(choice["token_ids"]), 9)
        self.assertTrue(all(0 <= i < TINY_CONFIG["vocab_size"] for i in choice["token_ids"]))
        self.assertEqual(body["usage"]["prompt_tokens"], 3)
        events = self.server.stream(prompt=[5, 6, 7], max_tokens=9, seed=1)
        self.assertEqual(join_events(events)[0][2], choice["token_ids"])

    def test_same_after_restart(self):
        # Random weights, but the same ones every time.
        from harness import Server
        other = Server(*self.flags, model=self.model)
        fields = {"prompt": [1, 2, 3], "max_tokens": 20, "seed": 4}
        self.assertEqual(other.complete(**fields)["choices"], self.server.complete(**fields)["choices"])
        other.check_stopped()

    def test_text_is_refused(self):
        answer = self.server.completions(prompt="hello")
        self.assertEqual(answer.status, 400)
        self.assertEqual(answer.error["param"], "prompt")
        self.assertEqual(self.server.post("/tokenize", {"model": self.server.name, "prompt": "x"}).status, 400)
        for fields in ({"stop": "x"}, {"bad_words": ["x"]}):
            self.assertEqual(self.server.completions(prompt=[1], **fields).status, 400, fields)

    def test_whole_vocabulary_and_context(self):
        ids = list(range(TINY_CONFIG["vocab_size"]))
        body = self.server.complete(prompt=ids, max_tokens=TINY_CONFIG["max_seq_len"] - len(ids), ignore_eos=True)
        self.assertEqual(body["usage"]["total_tokens"], TINY_CONFIG["max_seq_len"])


if __name__ == "__main__":
    unittest.main()
