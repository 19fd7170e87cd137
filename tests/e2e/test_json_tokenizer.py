"""A checkpoint with a tokenizer.json, served: ids and text are those of Hugging Face's tokenizers."""
import json
import os
import tempfile
import unittest

import harness

try:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
except ImportError:
    tokenizers = None

TEXTS = ["the quick brown fox", "  two  spaces\n\nand lines\t", "it's 12345 of I'LL", "", "before<|end|>behind",
         "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600"]


def trained(size):
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B",
                                                     special_tokens=[("<|begin|>", t.token_to_id("<|begin|>"))])
    return t


# Where CI is set it runs, and fails for want of the package.
@unittest.skipUnless(tokenizers or os.environ.get("CI"), "the tokenizers package is not installed (see scripts/setup.sh check)")
class JsonTokenizer(harness.ServerTest):
    flags = ("--load-format", "dummy")

    @classmethod
    def setUpClass(cls):
        if not tokenizers:
            raise AssertionError("the tokenizers package is not installed, and CI is set")
        cls.folder = tempfile.TemporaryDirectory(prefix="gptd-e2e-")
        cls.model = os.path.join(cls.folder.name, "tiny")
        cls.tokenizer = trained(400)
        os.mkdir(cls.model)
        cls.tokenizer.save(os.path.join(cls.model, "tokenizer.json"))
        for name, content in (("config.json", {**harness.TINY_CONFIG, "vocab_size": cls.tokenizer.get_vocab_size()}),
                              ("tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})):
            with open(os.path.join(cls.model, name), "w") as f:
                json.dump(content, f)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.folder.cleanup()

    def test_ids(self):
        for text in TEXTS:
            for special in (False, True):
                ids = self.server.tokenize(text, add_special_tokens=special)
                self.assertEqual(ids, self.tokenizer.encode(text, add_special_tokens=special).ids, text)
            back = self.server.post("/detokenize", {"model": self.server.name, "tokens": ids, "skip_special_tokens": False}).json()
            self.assertEqual(back["prompt"], self.tokenizer.decode(ids, skip_special_tokens=False))

    def test_text_of_an_answer(self):
        fields = {"prompt": "the quick", "max_tokens": 60, "seed": 7, "temperature": 1.5, "return_token_ids": True,
                  "ignore_eos": True}
        choice = self.server.complete(**fields)["choices"][0]
        self.assertEqual(len(choice["token_ids"]), 60)
        self.assertEqual(choice["prompt_token_ids"], self.tokenizer.encode("the quick").ids)
        self.assertEqual(choice["text"], self.tokenizer.decode(choice["token_ids"]))
        chunks = list(self.server.stream(**fields))
        self.assertEqual("".join(c["choices"][0]["text"] for c in chunks if c["choices"]), choice["text"])


if __name__ == "__main__":
    unittest.main()
