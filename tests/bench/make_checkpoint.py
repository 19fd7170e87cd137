#!/usr/bin/env python3
"""Writes a Llama checkpoint of random BF16 weights as Hugging Face lays one out, to time loading.

    make_checkpoint.py tests/bench/models/llama-3-8b /tmp/llama-3-8b

Shapes are those of the first directory's config.json. Every value is 0.008 to 0.031 with a random sign; one block of them
is written over and over. There is no tokenizer: the server then takes token ids. Only the standard library is needed.
"""
import json
import os
import pathlib
import shutil
import struct
import sys

SHARD_BYTES = 5 << 30
BLOCK_BYTES = 64 << 20


def shapes(c):
    hidden, inter, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    dim = c.get("head_dim", hidden // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        for name, shape in (("q", (q, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, q))):
            yield f"{layer}self_attn.{name}_proj.weight", shape
        yield layer + "post_attention_layernorm.weight", (hidden,)
        for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
            yield f"{layer}mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    if not c.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocab, hidden)


def n_bytes(shape):
    n = 2
    for dim in shape:
        n *= dim
    return n


def random_block():
    block = bytearray(os.urandom(BLOCK_BYTES))
    block[1::2] = block[1::2].translate(bytes(0x3C | (i & 0x80) for i in range(256)))
    return memoryview(block)


def write_shard(path, tensors, block):
    header, at = {}, 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes(shape)]}
        at += n_bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        while at:
            at -= f.write(block[:at])


def main():
    source, out = map(pathlib.Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", out)
    shards, size = [[]], 0
    for name, shape in shapes(json.loads((source / "config.json").read_text())):
        if size + n_bytes(shape) > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes(shape)
    block, weight_map, total = random_block(), {}, 0
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(out / file, tensors, block)
        weight_map.update({name: file for name, _ in tensors})
        total += sum(n_bytes(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{out}: {total} bytes in {len(shards)} files")


if __name__ == "__main__":
    main()
