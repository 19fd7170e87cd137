#!/usr/bin/env python3
"""Holds our reading of tokenizer.json against Hugging Face's tokenizers library: ids and decoded text, on mixed text.

    compare.py ENCODE [--megabytes N] [--seed N] [--only KIND ...]

ENCODE: the program of encode.c. For each kind of configuration a vocabulary is trained on part of the text; what is compared is
all of it, in pieces of very different lengths, with the kind's special tokens strewn in, and random characters of all of Unicode.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
PUNCTUATED = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = pre_tokenizers.ByteLevel.alphabet()


def split_bytes(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(tokenizer, texts, special, size=3000, alphabet=(), **options):
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False,
                                  **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def gpt2(texts):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return trained(t, texts, ["<|endoftext|>"], alphabet=BYTES)


def llama3(texts):
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer, t.decoder = split_bytes(LLAMA3), decoders.ByteLevel()
    trained(t, texts, ["<|begin_of_text|>", "<|eot_id|>"], alphabet=BYTES)
    begin = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", begin)])])
    return t


def qwen2(texts):
    t = Tokenizer(models.BPE())
    t.normalizer, t.pre_tokenizer, t.decoder = normalizers.NFC(), split_bytes(QWEN2), decoders.ByteLevel()
    trained(t, texts, [], alphabet=BYTES)
    t.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    t.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return t


def of_pattern(texts, *patterns):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    return trained(t, texts, ["<|end|>"], alphabet=BYTES)


def o200k(texts):
    return of_pattern(texts, O200K)


def bloom(texts):
    return of_pattern(texts, BLOOM)


def deepseek(texts):
    return of_pattern(texts, r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", PUNCTUATED)


def neox(texts):
    t = Tokenizer(models.BPE())
    t.normalizer, t.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trained(t, texts, ["<|endoftext|>"], alphabet=BYTES)
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return t


def fallback(texts, size, **options):
    """BPE of characters with bytes for those without a piece, as converted SentencePiece models have it."""
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    return trained(t, [x.replace(" ", "\u2581") for x in texts], ["<unk>", "<s>", "</s>"] + pieces, size=size,
                   limit_alphabet=400, **options)


def plain(t):
    """Byte pieces as the trainer has them are added tokens; in real files they are the model's alone."""
    d = json.loads(t.to_str())
    d["added_tokens"] = [x for x in d["added_tokens"] if not x["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(d))


def words(texts):
    t = Tokenizer(models.BPE())
    return [w for x in texts for w in x.replace(" ", " \u2581").split(" ")], t


def mistral(texts):
    t = plain(fallback(words(texts)[0], 3000))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                     special_tokens=[("<s>", t.token_to_id("<s>"))])
    return t


def metaspace(texts):
    t = plain(fallback(words(texts)[0], 3000))
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    return t


def gemma(texts):
    t = plain(fallback(words(texts)[0], 3000))
    t.normalizer = normalizers.Replace(" ", "\u2581")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return t


def unigram(texts):
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    few = ["".join(c for c in x if ord(c) < 0x250) for x in texts]  # all characters that it sees become pieces
    t.train_from_iterator(few, trainers.UnigramTrainer(vocab_size=3000, special_tokens=["<unk>", "<s>", "</s>"],
                                                       unk_token="<unk>", show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                     special_tokens=[("</s>", t.token_to_id("</s>"))])
    return t


def unigram_bytes(texts):
    """With byte pieces, which the trainer knows nothing of."""
    d = json.loads(unigram(texts).to_str())
    vocab = d["model"]["vocab"]
    d["model"]["vocab"] = vocab[:3] + [[f"<0x{b:02X}>", 0.0] for b in range(256)] + vocab[3:]
    d["model"]["byte_fallback"] = True
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    d["normalizer"], d["pre_tokenizer"] = None, space
    d["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]}
    return Tokenizer.from_str(json.dumps(d))


KINDS = {f.__name__: f for f in (gpt2, llama3, qwen2, o200k, bloom, deepseek, neox, mistral, metaspace, gemma, unigram,
                                 unigram_bytes)}


# ---- text -----------------------------------------------------------------------------------------------------------

SCRIPTS = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x400, 0x500), (0x590, 0x5F5), (0x600, 0x700), (0x900, 0x980),
           (0xE00, 0xE60), (0x1100, 0x1200), (0x2000, 0x2070), (0x20A0, 0x20C0), (0x2190, 0x2200), (0x3040, 0x3100),
           (0x4E00, 0x5200), (0xAC00, 0xB000), (0xFE00, 0xFE10), (0xFF00, 0xFF60), (0x1F300, 0x1F650), (0x1F900, 0x1FA00),
           (0x300, 0x340), (0x10000, 0x10080), (0x1D400, 0x1D500), (0xE000, 0xE010)]
SPACES = ["  ", "\n", "\n\n", "\r\n", "\t", " \n ", "    ", "\u3000", "\xa0", "\u2028", "\x0b", "\x85", "\u180e", "\u200b",
          " " * 40]


def random_text(rng):
    parts = []
    for _ in range(rng.randint(1, 30)):
        low, high = rng.choice(SCRIPTS)
        parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 12))))
        parts.append(rng.choice([" ", " ", " ", "", "'s", "'LL ", "1234567", "e\u0301", rng.choice(SPACES)]))
    return "".join(parts)


def files(rng, n_bytes):
    """Texts that lie around: code, prose, translations."""
    found = []
    for root in (os.path.dirname(os.__file__), os.path.join(os.path.dirname(__file__), "..", ".."), "/usr/share"):
        for folder, _, names in os.walk(root):
            if ".git" in folder or "/build" in folder:
                continue
            found += [os.path.join(folder, x) for x in names if x.endswith((".py", ".md", ".c", ".h", ".txt", ".po", ".json"))]
    rng.shuffle(found)
    texts, total = [], 0
    for path in found:
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read(60000)
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        total += len(text.encode())
        if total > n_bytes:
            break
    return texts


def pieces(rng, texts, special):
    """The texts in pieces, some with special tokens in them."""
    out = []
    for text in texts:
        while text:
            n = rng.choice([1, 7, 60, 500, 4000, 40000])
            piece, text = text[:n], text[n:]
            if special and rng.random() < 0.3:
                at = rng.randrange(len(piece) + 1)
                piece = piece[:at] + rng.choice(["", " "]) + rng.choice(special) + rng.choice(["", " "]) + piece[at:]
            out.append(piece)
    return out


# ---- comparing ------------------------------------------------------------------------------------------------------

def ours(program, folder, texts):
    data = b"".join(b"%d\n" % len(x) + x for x in (t.encode() for t in texts))
    done = subprocess.run([program, folder, "--seconds"], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    results, at = [], 0
    for _ in texts:
        end = done.stdout.index(b"\n", at)
        line, at = done.stdout[at:end].decode(), end + 1
        if line.startswith("error"):
            results.append((line, None))
            continue
        decoded = []
        for _ in range(2):
            end = done.stdout.index(b"\n", at)
            n, at = int(done.stdout[at:end]), end + 1
            decoded.append(done.stdout[at:at + n].decode())
            at += n + 1
        results.append(([int(x) for x in line.split()], decoded))
    return results, float(done.stderr.split()[-1])


def compare(kind, program, rng, megabytes):
    texts = files(rng, megabytes * 1e6)
    texts += [random_text(rng) for _ in range(3000)]
    begin = time.monotonic()
    tokenizer = KINDS[kind](texts[:len(texts) // 3] + texts[-300:])
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.content.strip()]
    cut = pieces(rng, texts, special)
    cut += ["", " ", "a" * 100000, " " * 3000, "ab" * 30000, "\u4e2d" * 3000]
    with tempfile.TemporaryDirectory(prefix="gptd-tokenizer-") as folder:
        tokenizer.save(os.path.join(folder, "tokenizer.json"))
        got, seconds = ours(program, folder, cut)
    n_bytes = sum(len(x.encode()) for x in cut)
    wrong = []
    for text, (ids, back) in zip(cut, got):
        want = tokenizer.encode(text).ids
        if ids != want:
            wrong.append((text, ids, want))
            continue
        decoded = [tokenizer.decode(want, skip_special_tokens=skip) for skip in (False, True)]
        if back != decoded:
            wrong.append((text, back, decoded))
    print(f"{kind:10} {len(cut):6} texts, {n_bytes / 1e6:.2f} MB, {len(wrong)} differ; {n_bytes / 1e6 / seconds:.1f} MB/s"
          f" ({time.monotonic() - begin:.0f} s)", flush=True)
    for text, a, b in sorted(wrong, key=lambda w: len(w[0]))[:5]:
        print("   ", ascii(text[:100]), "\n     ours", ascii(a)[:200], "\n     want", ascii(b)[:200])
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encode")
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10 ** 9)
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    good = [compare(kind, arguments.encode, random.Random(f"{arguments.seed} {kind}"), arguments.megabytes)
            for kind in arguments.only]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
