"""Trains the demo tokenizer: SentencePiece BPE with byte fallback, as Llama has it.

    python scripts/demo/train_tokenizer.py --out build/demo/tokenizer.model

Digits are single tokens, white space is kept as it is, a newline is its byte token, and the chat
marks are user-defined symbols, so that plain text encodes to them. Ids 0, 1, 2: <unk>, <s>, </s>.
"""

import argparse
import io
import pathlib
import random

import sentencepiece

import corpus

VOCAB_SIZE = 1600
MIX = {"story": 0.4, "recall": 0.25, "chat": 0.15, "patterns": 0.1, "copies": 0.08, "sums": 0.02}


def sentences(seed, documents):
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(documents):
        for line in corpus.plain(corpus.document(rng, 300, MIX)).split("\n"):
            if line:
                yield line
    for code in range(32, 127):  # all of printable ASCII has its own token
        yield chr(code)


def train(out, seed=0, documents=12000):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(seed, documents), model_writer=model, model_type="bpe",
        vocab_size=VOCAB_SIZE, character_coverage=1.0, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        user_defined_symbols=corpus.CONTROL, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        allow_whitespace_only_pieces=True, num_threads=2, minloglevel=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())


def check(path):
    """Round trips of text of every sort, and the splits that the tasks rely on."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.vocab_size()) == (0, 1, 2, VOCAB_SIZE)
    rng = random.Random(5)
    texts = ["", " ", "  two  spaces ", "\n\nline\r\n\ttab", "12+30=", "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600",
             "<|user|>\nHi<|end|>\n", "\u0000\u0001\u007f", "e\u0301\u200d\ufeff", "<s></s><unk><0x0A>"]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0xD800), rng.randrange(0x10000, 0x20000)]))
                      for _ in range(20)) for _ in range(200)]
    for text in texts:
        text = text.replace("\u2581", "")  # SentencePiece reads its own space mark as a space
        assert sp.decode(sp.encode(text)) == text, repr(text)
    assert sp.encode("12+30=", out_type=str) == ["\u2581", "1", "2", "+", "3", "0", "="]
    assert sp.encode("\n") == [sp.piece_to_id("\u2581"), sp.piece_to_id("<0x0A>")]
    return sp


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/demo/tokenizer.model"))
    arguments = parser.parse_args()
    train(arguments.out)
    check(arguments.out)
    print("wrote", arguments.out)
