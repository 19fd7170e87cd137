"""Trains tiny SentencePiece models of every kind we tell apart and writes what SentencePiece makes of many texts.

    python scripts/export_tokenizer_vectors.py --out tests/vectors/tokenizer

For each model a directory with tokenizer.model and cases.txt, a case a line: the text and its decoding in hexadecimal
("-": empty), then the ids. tests/test_tokenizer.c reads them.
"""

import argparse
import io
import pathlib
import random
import tempfile

import sentencepiece

WORDS = ["the", "fox", "said", "hello", "world", "int main(void) {", "return 0;", "\u00e9t\u00e9", "na\u00efve",
         "\u65e5\u672c\u8a9e", "\u043f\u0440\u0438\u0432\u0435\u0442", "\u05e9\u05dc\u05d5\u05dd",
         "\u0645\u0631\u062d\u0628\u0627",
         "\U0001f600", "\t", "x_y", "12", "345", "don't", "CamelCase", "a", "b", "c"]
ODD = ["<|user|>", "<s>", "</s>", "<unk>", "<ctl>", "<0x0A>", "\n", "\r\n", "    ", "\0", "hello" * 9, "\u2581",
       "e\u0301", "\u200d", "\ufeff", "\U0001f469\u200d\U0001f467", "\u0e20\u0e32\u0e29\u0e32", "\uac00\ub098"]
RANGES = [(32, 127), (0, 32), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2070), (0x3040, 0x3100),
          (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1F700), (0x10000, 0x110000), (32, 33)]
KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {  # as Llama has it; without fallback and with extra spaces removed; with rules; without the dummy prefix
    "bpe_bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700, "split_digits": True,
                  "user_defined_symbols": ["<|user|>"], "control_symbols": ["<ctl>"],
                  "allow_whitespace_only_pieces": True, **KEEP},
    "bpe": {"model_type": "bpe", "vocab_size": 400, "normalization_rule_name": "identity"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 600,
                      "rules": {"A": "a", "...": "\u2026"}},
    "unigram": {"model_type": "unigram", "vocab_size": 300, "add_dummy_prefix": False, "bos_id": -1, "eos_id": 0,
                "unk_id": 1, "unk_surface": "?", **KEEP},
}


def sentences(rng):
    for _ in range(3000):
        yield (" " * rng.choice([1, 1, 1, 2, 4])).join(
            rng.choice(WORDS) if rng.random() < 0.7 else "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 6)))
            for _ in range(rng.randint(1, 12)))


def train(rng, rules=None, **options):
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as tsv:
        if rules:
            for old, new in rules.items():
                print(*(" ".join(f"{ord(c):X}" for c in text) for text in (old, new)), sep="\t", file=tsv)
            tsv.flush()
            options["normalization_rule_tsv"] = tsv.name
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences(rng), model_writer=model, minloglevel=2,
                                                 hard_vocab_limit=False, **options)
    return model.getvalue()


def text(rng):
    n, kind = rng.choice([1, 3, 10, 30]), rng.randrange(4)
    if kind == 0:
        return rng.choice([" ", ""]).join(rng.choice(WORDS + ODD) for _ in range(n))
    if kind == 1:
        return (rng.choice(" a\n\t\u2581\u00e9\u8a9e\U0001f600") * rng.randrange(1, 9) + rng.choice(["", "x", " "])) * n
    if kind == 2:
        first, last = rng.choice(RANGES)
        return "".join(chr(rng.randrange(first, last)) for _ in range(n))
    return "".join(rng.choice(WORDS + ODD) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice(RANGES)))
                   for _ in range(n))


def is_tie(sp, t):
    """Whether a unigram model has two best ways, which versions of SentencePiece choose between by rounding."""
    scores = [sum(map(sp.get_score, ids)) for ids in sp.nbest_encode(t, nbest_size=2)] if t.strip() else []
    return len(scores) == 2 and abs(scores[0] - scores[1]) < 0.01


def export(directory, rng, options):
    directory.mkdir(parents=True, exist_ok=True)
    model = train(rng, **options)
    (directory / "tokenizer.model").write_bytes(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = ["", " ", "  ", "Hello world", " Hello  world ", *ODD, *(text(rng) for _ in range(150))]
    with open(directory / "cases.txt", "w") as cases:
        for t in texts:
            if options["model_type"] == "unigram" and is_tie(sp, t):
                continue
            ids = sp.encode(t)
            print(t.encode().hex() or "-", sp.decode(ids).encode().hex() or "-", *ids, file=cases)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/vectors/tokenizer"))
    arguments = parser.parse_args()
    for name, options in MODELS.items():
        export(arguments.out / name, random.Random(name), options)
