#!/usr/bin/env python3
"""Turns a saved FlashGPT state_dict into a checkpoint directory that gptd serves.

    scripts/convert_flashgpt.py model.pt --num-heads 12 --out my-model [--dtype bfloat16] [--tokenizer tokenizer.model]

The file may hold the state_dict itself or a dictionary with it under "model_state_dict", "state_dict" or "model"; the
prefixes that DataParallel ("module.") and torch.compile ("_orig_mod.") leave in names are taken off. Everything but the
number of heads is read off the shapes. What FlashGPT has no place for (masks, optimizer state) is left out, and named.
The file is loaded with weights_only=True: it can hold tensors, not code.
"""
import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path

try:
    import torch
    from safetensors.torch import save_file
except ImportError as error:
    torch, missing = None, error  # --help works without

LAYER = re.compile(r"blocks\.(\d+)\.")
NAMES = re.compile(r"((token_embed|pos_embed|lm_head|norm|blocks\.\d+\.(norm[12]|attn\.(qkv_proj|out_proj)|mlp\.[03]))"
                   r"\.weight|(norm|blocks\.\d+\.(norm[12]|mlp\.[03]))\.bias)$")
DTYPES = ("float32", "float16", "bfloat16")


def load_state_dict(path):
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not any(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise SystemExit(f"{path}: holds no state_dict")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in loaded.items()}


def split_known(state):
    """The tensors of FlashGPT, and the names of the rest."""
    known = {name: t for name, t in state.items() if NAMES.fullmatch(name)}
    return known, sorted(set(state) - set(known))


def infer_config(tensors, num_heads):
    embedding = tensors.get("token_embed.weight", tensors.get("lm_head.weight"))
    missing = [name for name in ("pos_embed.weight", "blocks.0.mlp.0.weight") if name not in tensors]
    if embedding is None or missing:
        raise SystemExit(f"not a FlashGPT: {', '.join(missing) or 'token_embed.weight'} is missing")
    vocab_size, embed_dim = embedding.shape
    if num_heads < 1 or embed_dim % num_heads:
        raise SystemExit(f"--num-heads {num_heads} does not divide the embedding's {embed_dim}")
    inner_dim = tensors["blocks.0.mlp.0.weight"].shape[0]
    mlp_ratio = inner_dim / embed_dim
    if int(embed_dim * mlp_ratio) < inner_dim:  # the division rounded down, and the width would be one less
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "architectures": ["FlashGPT"],
        "vocab_size": vocab_size,
        "max_seq_len": tensors["pos_embed.weight"].shape[0],
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_layers": 1 + max(int(LAYER.match(name)[1]) for name in tensors if LAYER.match(name)),
        "mlp_ratio": int(mlp_ratio) if mlp_ratio == int(mlp_ratio) else mlp_ratio,
    }


def tie(tensors):
    """Keeps one name of a tied embedding. Answers whether it is tied."""
    head = tensors.get("lm_head.weight")
    if head is None or "token_embed.weight" not in tensors:
        return True
    if not torch.equal(head, tensors["token_embed.weight"]):
        return False
    del tensors["lm_head.weight"]
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state_dict", type=Path, help="the .pt file")
    parser.add_argument("--num-heads", type=int, required=True, help="attention heads: no shape tells them")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=DTYPES, help="store the weights in this type (default: as they are)")
    parser.add_argument("--eos-token-id", type=int, help="the id that ends a text")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model to put beside the weights")
    args = parser.parse_args(arguments)
    if not torch:
        raise SystemExit(f"PyTorch and safetensors are needed: {missing}")

    tensors, left_out = split_known(load_state_dict(args.state_dict))
    if left_out:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr)
    config = infer_config(tensors, args.num_heads)
    if not tie(tensors):
        config["tie_word_embeddings"] = False
    if args.eos_token_id is not None:
        config["eos_token_id"] = args.eos_token_id
    tensors = {name: t.to(getattr(torch, args.dtype)) if args.dtype else t for name, t in tensors.items()}
    unknown = sorted({str(t.dtype) for t in tensors.values()} - {f"torch.{name}" for name in DTYPES})
    if unknown:
        raise SystemExit(f"{', '.join(unknown)} weights: choose a --dtype")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, args.out / "model.safetensors")
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, args.out / "tokenizer.model")
    n = sum(t.numel() for t in tensors.values())
    print(f"{args.out}: {config['num_layers']} layers, {n / 1e6:.1f} M parameters; "
          f"gptd --model {args.out} serves it")


if __name__ == "__main__":
    main()
