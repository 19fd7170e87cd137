#!/usr/bin/env python3
"""Writes tests/vectors/: tiny random checkpoints of every family and option, with the logits that PyTorch gives.

    scripts/export_vectors.py [--out tests/vectors] [case ...]

Each case is a directory with a checkpoint as a user would have it, and expected.safetensors:
    prompt     I32 [P]     token ids
    generated  I32 [G]     the greedy continuation (G is 64, or 0 where the case is a single pass)
    rows       I32 [R]     positions in prompt + generated
    logits     F32 [R, V]  after the token at each of these positions, teacher-forced
    metadata   max_model_len: the option to serve with, where the answer depends on it

The reference is transformers, loading the very files (FlashGPT: the module below), in float32 with eager attention.
Checkpoints in BF16 or F16 are computed in float32 on the rounded weights, and some BF16 ones are drawn calmer: what is
asked of gptd there is its own rounding, not how far a random network amplifies it. Cases of one shape that differ in
config.json alone share a weights file through a link. A prompt is drawn again until the least distance between the best
and the second logit on the greedy path is at least MARGIN of the row's standard deviation, so that rounding cannot
change a token, and the continuation has at least DISTINCT different tokens. Where experts are chosen, the last one
taken and the first one left stand EXPERT_MARGIN apart, likewise. A case without a prompt is a checkpoint to be refused:
nothing is expected of it.
"""
import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging
from transformers import AutoModelForCausalLM
from transformers import (BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config, GPTNeoXConfig,
                          LlamaConfig, MistralConfig, MixtralConfig, Phi3Config, Qwen2Config, Qwen3Config,
                          Qwen3MoeConfig)
from transformers import (BloomForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM, GPT2LMHeadModel,
                          GPTNeoXForCausalLM, LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM,
                          Phi3ForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM)

MARGIN = 2e-3
EXPERT_MARGIN = 2e-3
DISTINCT = 8
N_GENERATED = 64


class FlashGPT(nn.Module):
    """A plain GPT of a PyTorch user: learned positions, pre-norm, exact GELU, tied output layer."""

    class Attention(nn.Module):
        def __init__(self, embed_dim, num_heads):
            super().__init__()
            self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
            self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

        def forward(self, x):
            batch, length, dim = x.shape
            q, k, v = self.qkv_proj(x).split(dim, dim=-1)
            q, k, v = (t.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
            return self.out_proj(out.transpose(1, 2).reshape(batch, length, dim))

    class Block(nn.Module):
        def __init__(self, embed_dim, num_heads, mlp_ratio):
            super().__init__()
            inner = int(embed_dim * mlp_ratio)
            self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
            self.attn = FlashGPT.Attention(embed_dim, num_heads)
            self.mlp = nn.Sequential(nn.Linear(embed_dim, inner), nn.GELU(), nn.Dropout(0.1),
                                     nn.Linear(inner, embed_dim), nn.Dropout(0.1))

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def __init__(self, vocab_size, max_seq_len, embed_dim, num_heads, num_layers, mlp_ratio):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, embed_dim)
        self.pos_embed = nn.Embedding(max_seq_len, embed_dim)
        self.blocks = nn.ModuleList(FlashGPT.Block(embed_dim, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.lm_head = nn.Linear(embed_dim, vocab_size, bias=False)
        self.lm_head.weight = self.token_embed.weight

    def forward(self, ids):
        x = self.token_embed(ids) + self.pos_embed(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def randomize(model, seed, gain=1.2, embed=0.15, norm=1):
    """Weights that make every part matter: scores of spread about gain^2, norms' weights (whose neutral value is norm)
    and biases away from doing nothing, embeddings small enough that a tied model does not only repeat its last token."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.data = noise * 0.2 + (norm if "weight" in name else 0)
        elif "pos_embed" in name or "wpe" in name:
            p.data = noise * 0.5
        elif "embed" in name or "wte" in name or "lm_head" in name:
            p.data = noise * embed
        else:
            p.data = noise * (gain / min(p.shape[-2:]) ** 0.5)  # all experts of a layer are one tensor
    return model


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def cast_weights(directory, choose):
    """Rounds the tensors of a directory's files to the type that choose(name) answers."""
    for path in directory.glob("*.safetensors"):
        tensors = {name: t.to(choose(name)).contiguous() for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def flashgpt(directory, seed, names=("token_embed.weight",), dtype=torch.float32, **config):
    model = randomize(FlashGPT(**config), seed)
    tensors = {name: t.detach().clone().to(dtype) for name, t in model.state_dict().items()}
    for tied in {"token_embed.weight", "lm_head.weight"} - set(names):
        del tensors[tied]
    save_file(tensors, directory / "model.safetensors")
    write_json(directory / "config.json", {"architectures": ["FlashGPT"], **config})


def hugging_face(model_class, config_class, norm=1):
    def make(directory, seed, edit=None, choose=None, shard=None, weights_of=None, base=False,
             gain=1.2, embed=0.15, **config):
        model = model_class(config_class(bos_token_id=1, eos_token_id=2, pad_token_id=None, **config))
        randomize(model, seed, gain, embed, norm)
        part = model.base_model if base else model
        part.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
        if choose:
            cast_weights(directory, choose)
        if weights_of:
            os.remove(directory / "model.safetensors")
            os.symlink(f"../{weights_of}/model.safetensors", directory / "model.safetensors")
        written = json.loads((directory / "config.json").read_text())
        written["architectures"] = [model_class.__name__]
        if edit:
            edit(written)
        write_json(directory / "config.json", written)
    return make


def old_rope(scaling, drop=(), **keys):
    """config.json as transformers before 5 wrote it."""
    def edit(config):
        theta = config.pop("rope_parameters")["rope_theta"]
        config.update(rope_theta=theta, rope_scaling=scaling, torch_dtype=config.pop("dtype", "float32"))
        config.update(keys)
        for key in drop:
            del config[key]
    return edit


def old_gemma3(scaling, pattern, local_base, theta):
    """Likewise: two kinds of RoPE and of layers without a dictionary for each."""
    def edit(config):
        for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
            del config[key]
        config.update(sliding_window_pattern=pattern, rope_local_base_freq=local_base, rope_theta=theta,
                      rope_scaling=scaling, torch_dtype=config.pop("dtype"), cache_implementation="hybrid")
    return edit


def old_phi3(scaling, **keys):
    def edit(config):
        partial = config["rope_parameters"]["partial_rotary_factor"]
        old_rope(scaling, [], partial_rotary_factor=partial, **keys)(config)
    return edit


def old_gpt_neox(**keys):
    def edit(config):
        rope = config.pop("rope_parameters")
        config.update(rotary_emb_base=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"],
                      torch_dtype=config.pop("dtype"))
        config.update(keys)
    return edit


def old_bloom(config):
    config["n_embed"], config["num_attention_heads"] = config.pop("hidden_size"), config.pop("n_head")
    del config["tie_word_embeddings"], config["dtype"]
    config.update(offset_alibi=100, seq_length=2048, n_inner=None)


def old_qwen3_moe(config):
    old_rope(None, num_experts=config.pop("num_local_experts"), max_window_layers=1)(config)


def all_to(dtype):
    return lambda name: dtype


def norms_float32(name):
    return torch.float32 if "norm" in name else torch.bfloat16


def old_gpt2(directory, seed, **config):
    """As the first GPT-2 files: no "transformer." before the names, a causal mask and a constant beside the weights."""
    gpt2(directory, seed, base=True, choose=all_to(torch.float16), **config)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})


def pythia(directory, seed, **config):
    """As on the hub: the causal mask, its constant and RoPE's frequencies beside the weights."""
    gpt_neox(directory, seed, **config)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    n_rotary = config["hidden_size"] // config["num_attention_heads"] // 4
    for layer in range(config["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, n_rotary, 2) / n_rotary)
    save_file(tensors, path, metadata={"format": "pt"})


gpt2 = hugging_face(GPT2LMHeadModel, GPT2Config)
llama = hugging_face(LlamaForCausalLM, LlamaConfig)
mistral = hugging_face(MistralForCausalLM, MistralConfig)
qwen2 = hugging_face(Qwen2ForCausalLM, Qwen2Config)
qwen3 = hugging_face(Qwen3ForCausalLM, Qwen3Config)
gemma = hugging_face(GemmaForCausalLM, GemmaConfig, norm=0)
gemma2 = hugging_face(Gemma2ForCausalLM, Gemma2Config, norm=0)
def gemma3_vision(directory, of):
    """The text of another case as a checkpoint with a vision tower has it; the answers are that case's."""
    other = directory.parent / of
    tensors = {"language_model." + name: t for name, t in load_file(other / "model.safetensors").items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.ones(2, 3, 4, 4)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.ones(4, 4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((other / "config.json").read_text())
    write_json(directory / "config.json", {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {},
                                           "text_config": text, "eos_token_id": [text["eos_token_id"]],
                                           "torch_dtype": text.pop("torch_dtype")})
    os.symlink(f"../{of}/expected.safetensors", directory / "expected.safetensors")


gemma3 = hugging_face(Gemma3ForCausalLM, Gemma3TextConfig, norm=0)
phi3 = hugging_face(Phi3ForCausalLM, Phi3Config)
gpt_neox = hugging_face(GPTNeoXForCausalLM, GPTNeoXConfig)
bloom = hugging_face(BloomForCausalLM, BloomConfig)
mixtral = hugging_face(MixtralForCausalLM, MixtralConfig)
qwen3_moe = hugging_face(Qwen3MoeForCausalLM, Qwen3MoeConfig)

GPT2 = dict(vocab_size=97, n_positions=144, n_embd=32, n_layer=2, n_head=2)
LLAMA = dict(vocab_size=101, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=160)
ROPE = dict(seed=31, weights_of="llama-mqa", **LLAMA)
MISTRAL = dict(vocab_size=103, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, max_position_embeddings=256)
QWEN2 = dict(seed=51, vocab_size=101, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3,
             num_key_value_heads=1, max_position_embeddings=170)
QWEN3 = dict(seed=61, vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=160)
GEMMA = dict(embed=0.05, vocab_size=101, hidden_size=24, intermediate_size=40, num_attention_heads=3,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=150)
GEMMA2 = dict(seed=72, num_hidden_layers=3, query_pre_attn_scalar=11, sliding_window=24, **GEMMA)
GEMMA3 = dict(seed=73, num_hidden_layers=4, query_pre_attn_scalar=9, sliding_window=24, **GEMMA)
PHI3 = dict(seed=81, vocab_size=101, hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5,
            num_key_value_heads=1)
LONGROPE = dict(original_max_position_embeddings=150, max_position_embeddings=600)
FACTORS = dict(short_factor=[1.0, 1.1, 1.25, 1.4], long_factor=[1.0, 2.5, 5.5, 12.0])
PHI4 = dict(seed=82, tie_word_embeddings=True, vocab_size=103, hidden_size=48, intermediate_size=36,
            num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
FACTORS4 = dict(short_factor=[1.0, 1.0, 1.05, 1.2, 1.3, 1.6], long_factor=[1.0, 1.5, 2.5, 4.0, 9.0, 20.0])
NEOX = dict(seed=91, vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=72,
            max_position_embeddings=144)
MIXTRAL = dict(seed=111, vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
               num_attention_heads=3, num_key_value_heads=1, num_local_experts=5, max_position_embeddings=160)
QWEN3MOE = dict(vocab_size=101, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1,
                head_dim=16, moe_intermediate_size=16, max_position_embeddings=160)
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)

# name: (maker, arguments, tokens in the prompt or None, what else)
CASES = {
    "flashgpt": (flashgpt, dict(seed=11, vocab_size=113, max_seq_len=139, embed_dim=40, num_heads=5, num_layers=2,
                                mlp_ratio=4), 75, {}),
    "flashgpt-head-bf16": (flashgpt, dict(seed=12, names=("lm_head.weight",), dtype=torch.bfloat16, vocab_size=259,
                                          max_seq_len=130, embed_dim=48, num_heads=2, num_layers=3, mlp_ratio=2.5), 66,
                           {}),
    "flashgpt-both-f16": (flashgpt, dict(seed=13, names=("token_embed.weight", "lm_head.weight"), dtype=torch.float16,
                                         vocab_size=97, max_seq_len=80, embed_dim=24, num_heads=1, num_layers=1,
                                         mlp_ratio=4.0), 16, {}),
    "gpt2": (gpt2, dict(seed=21, **GPT2), 70, {}),
    "gpt2-inner-relu-bf16": (gpt2, dict(seed=22, n_inner=56, activation_function="relu",
                                        choose=all_to(torch.bfloat16), **GPT2), 70, {}),
    "gpt2-bare-f16": (old_gpt2, dict(seed=23, vocab_size=99, n_positions=129, n_embd=40, n_layer=1, n_head=5), 65, {}),
    "llama-mqa": (llama, dict(seed=31, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **LLAMA), 71, {}),
    "llama-mha-sharded": (llama, dict(seed=32, shard="40KB", vocab_size=131, hidden_size=40, intermediate_size=52,
                                      num_hidden_layers=2, num_attention_heads=5, max_position_embeddings=200), 77, {}),
    "llama-gqa-biases-tied": (llama, dict(seed=33, vocab_size=107, hidden_size=40, intermediate_size=36,
                                          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                          head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                                          hidden_act="gelu_pytorch_tanh", max_position_embeddings=140,
                                          edit=old_rope(None)), 70, {}),
    "llama-gqa-bf16": (llama, dict(seed=34, gain=0.8, choose=all_to(torch.bfloat16), vocab_size=163, hidden_size=64,
                                   intermediate_size=72, num_hidden_layers=2, num_attention_heads=8,
                                   num_key_value_heads=2, max_position_embeddings=150, rms_norm_eps=1e-5), 80, {}),
    "llama-mixed-types": (llama, dict(seed=35, gain=0.8, choose=norms_float32, **LLAMA), 40, {}),
    "llama-linear-old": (llama, dict(edit=old_rope({"type": "linear", "factor": 2.5}), **ROPE), 70, {}),
    "llama-linear-new": (llama, dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 3e3}, **ROPE),
                         70, {}),
    "llama-dynamic": (llama, dict(edit=old_rope({"type": "dynamic", "factor": 2.0}), **ROPE), 70,
                      {"max_model_len": 160}),
    "llama-dynamic-long": (llama, dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                                       **ROPE), 300, {"max_model_len": 300}),
    "llama-llama3-old": (llama, dict(edit=old_rope({"rope_type": "llama3", **LLAMA3}), **ROPE), 70, {}),
    "llama-llama3-new": (llama, dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e4, **LLAMA3}, **ROPE), 70,
                         {}),
    "llama-yarn-old": (llama, dict(edit=old_rope({"rope_type": "yarn", "factor": 4.0,
                                                  "original_max_position_embeddings": 40}), **ROPE), 70, {}),
    "llama-yarn-new": (llama, dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                    "beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25,
                                                    "truncate": False, "original_max_position_embeddings": 64}, **ROPE),
                       70, {}),
    "llama-yarn-mscale": (llama, dict(rope_parameters={"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4,
                                                       "mscale": 1.5, "mscale_all_dim": 0.5}, **ROPE), 70, {}),
    "mistral-window": (mistral, dict(seed=41, sliding_window=24, **MISTRAL), 90, {}),
    "mistral-window-null": (mistral, dict(seed=41, weights_of="mistral-window", sliding_window=None, **MISTRAL), 90,
                            {}),
    "mistral-window-wide": (mistral, dict(seed=41, weights_of="mistral-window", sliding_window=200, **MISTRAL), 90, {}),
    "mistral-window-bf16": (mistral, dict(seed=42, gain=0.8, sliding_window=37, choose=all_to(torch.bfloat16),
                                          **MISTRAL), 90, {}),
    "qwen2": (qwen2, dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **QWEN2), 75, {}),
    "qwen2-window-off": (qwen2, dict(weights_of="qwen2", edit=old_rope(None, ["layer_types", "rope_theta", "rope_scaling"],
                                                                       sliding_window=24, max_window_layers=1),
                                     **QWEN2), 75, {}),
    "qwen2-window": (qwen2, dict(weights_of="qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1,
                                 edit=old_rope(None, ["layer_types"]), **QWEN2), 75, {}),
    "qwen2-window-types": (qwen2, dict(weights_of="qwen2", use_sliding_window=True, sliding_window=19,
                                       layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                       **QWEN2), 75, {}),
    "qwen2-tied": (qwen2, dict(seed=52, tie_word_embeddings=True, vocab_size=103, hidden_size=40, intermediate_size=52,
                               num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5, rms_norm_eps=1e-5,
                               edit=old_rope(None, ["layer_types"]), max_position_embeddings=180), 80, {}),
    "qwen2-bf16": (qwen2, dict(gain=0.7, choose=all_to(torch.bfloat16),
                               edit=old_rope(None, ["layer_types"], torch_dtype="bfloat16"), **{**QWEN2, "seed": 53}),
                   75, {}),
    "qwen3": (qwen3, dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **QWEN3), 72, {}),
    "qwen3-window": (qwen3, dict(weights_of="qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=2,
                                 edit=old_rope(None, ["layer_types"]), **QWEN3), 72, {}),
    "qwen3-yarn": (qwen3, dict(weights_of="qwen3", edit=old_rope({"rope_type": "yarn", "factor": 4.0,
                                                                  "original_max_position_embeddings": 40},
                                                                 ["layer_types"], sliding_window=24, max_window_layers=1),
                               **QWEN3), 72, {}),
    "qwen3-tied-bf16": (qwen3, dict(seed=62, gain=0.8, embed=0.1, choose=all_to(torch.bfloat16), tie_word_embeddings=True,
                                    vocab_size=107, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
                                    num_attention_heads=6, num_key_value_heads=2, head_dim=24,
                                    edit=old_rope(None, ["layer_types"], torch_dtype="bfloat16"),
                                    max_position_embeddings=150), 70, {}),
    "gemma": (gemma, dict(seed=71, num_hidden_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 2e3},
                          **GEMMA), 72, {}),
    "gemma-old": (gemma, dict(seed=71, weights_of="gemma", num_hidden_layers=3,
                              edit=old_rope(None, ["tie_word_embeddings", "rms_norm_eps", "rope_theta"], hidden_act="gelu",
                                            hidden_activation=None), **GEMMA), 72, {}),
    "gemma-bf16": (gemma, dict(seed=78, gain=0.7, choose=all_to(torch.bfloat16), num_hidden_layers=3,
                               edit=old_rope(None, torch_dtype="bfloat16"), **{**GEMMA, "embed": 0.03}), 72, {}),
    "gemma2": (gemma2, dict(attn_logit_softcapping=2.5, final_logit_softcapping=0.6, **GEMMA2), 75, {}),
    "gemma2-old": (gemma2, dict(weights_of="gemma2", attn_logit_softcapping=3.0, final_logit_softcapping=0.4,
                                edit=old_rope(None, ["layer_types", "tie_word_embeddings", "hidden_activation"],
                                              hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid"),
                                **GEMMA2), 75, {}),
    "gemma2-uncapped": (gemma2, dict(weights_of="gemma2", attn_logit_softcapping=None, final_logit_softcapping=None,
                                     layer_types=[FULL, SLIDING, SLIDING], **GEMMA2), 75, {}),
    "gemma2-bf16": (gemma2, dict(gain=0.7, choose=all_to(torch.bfloat16), attn_logit_softcapping=2.0,
                                 final_logit_softcapping=0.5,
                                 **{**GEMMA2, "seed": 75, "num_key_value_heads": 3, "embed": 0.03}), 75, {}),
    "gemma3": (gemma3, dict(layer_types=[SLIDING, FULL, SLIDING, FULL],
                            rope_parameters={SLIDING: {"rope_type": "default", "rope_theta": 300.0},
                                             FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}},
                            **GEMMA3), 75, {}),
    "gemma3-old": (gemma3, dict(weights_of="gemma3", edit=old_gemma3({"rope_type": "linear", "factor": 2.0}, 3, 500, 2e4),
                                **GEMMA3), 75, {}),
    "gemma3-final-cap": (gemma3, dict(weights_of="gemma3", edit=old_gemma3(None, 2, 10000, 1000000),
                                      final_logit_softcapping=0.5, **GEMMA3), 75, {}),
    "gemma3-vision": (gemma3_vision, dict(of="gemma3-old"), None, {}),
    "gemma3-bf16": (gemma3, dict(gain=0.6, choose=all_to(torch.bfloat16), layer_types=[SLIDING, FULL, SLIDING],
                                 **{**GEMMA3, "num_hidden_layers": 3, "seed": 76, "embed": 0.03}), 75, {}),
    "phi3": (phi3, dict(max_position_embeddings=160, **PHI3), 70, {}),
    "phi3-window": (phi3, dict(weights_of="phi3", max_position_embeddings=160, sliding_window=24,
                               edit=old_rope(None, ["rms_norm_eps"]), **PHI3), 80, {}),
    "phi3-longrope": (phi3, dict(weights_of="phi3", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
                                 **LONGROPE, **PHI3), 80, {"max_model_len": 150}),
    "phi3-longrope-long": (phi3, dict(weights_of="phi3", edit=old_rope({"type": "longrope", **FACTORS}), **LONGROPE, **PHI3),
                           310, {"max_model_len": 310}),
    "phi3-partial": (phi3, dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                                                 **FACTORS4}, edit=old_phi3({"type": "longrope", **FACTORS4}),
                                sliding_window=600, **LONGROPE, **PHI4), 75, {"max_model_len": 150}),
    "phi3-partial-long": (phi3, dict(weights_of="phi3-partial", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 8.0, **FACTORS4},
                                     **LONGROPE, **PHI4), 230, {"max_model_len": 230}),
    "phi3-bf16": (phi3, dict(gain=0.7, choose=all_to(torch.bfloat16), max_position_embeddings=160, sliding_window=24,
                             edit=old_rope(None, torch_dtype="bfloat16"), **{**PHI3, "seed": 83}), 80, {}),
    "gpt-neox": (gpt_neox, dict(**NEOX), 70, {}),
    "gpt-neox-sequential": (gpt_neox, dict(weights_of="gpt-neox", use_parallel_residual=False, hidden_act="gelu_fast",
                                           rope_parameters={"rope_type": "default", "rope_theta": 500.0,
                                                            "partial_rotary_factor": 1.0}, edit=old_gpt_neox(), **NEOX), 70,
                            {}),
    "gpt-neox-tied": (gpt_neox, dict(attention_bias=False, tie_word_embeddings=True, hidden_act="relu", embed=0.1,
                                     rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                      "partial_rotary_factor": 0.5},
                                     **{**NEOX, "seed": 92, "hidden_size": 40, "num_attention_heads": 5}), 70, {}),
    "gpt-neox-f16": (pythia, dict(gain=1.6, choose=all_to(torch.float16), edit=old_gpt_neox(torch_dtype="float16"),
                                  **{**NEOX, "seed": 93, "hidden_size": 48}), 75, {}),
    "bloom": (bloom, dict(seed=101, gain=1.6, embed=0.1, vocab_size=101, hidden_size=32, n_layer=2, n_head=4), 72, {}),
    "bloom-3-heads": (bloom, dict(seed=102, gain=1.6, embed=0.1, base=True, edit=old_bloom, vocab_size=103,
                                  hidden_size=24, n_layer=3, n_head=3, layer_norm_epsilon=1e-6), 85, {}),
    "bloom-6-heads-bf16": (bloom, dict(seed=104, gain=1.6, embed=0.1, choose=all_to(torch.bfloat16), vocab_size=97,
                                       hidden_size=48, n_layer=2, n_head=6), 75, {}),
    "mixtral": (mixtral, dict(**MIXTRAL), 70, {}),
    "mixtral-window": (mixtral, dict(weights_of="mixtral", sliding_window=24, num_experts_per_tok=3,
                                     edit=old_rope(None, ["head_dim", "rms_norm_eps"]), **MIXTRAL), 80, {}),
    "mixtral-bf16": (mixtral, dict(gain=0.8, choose=all_to(torch.bfloat16), edit=old_rope(None, torch_dtype="bfloat16"),
                                   **{**MIXTRAL, "seed": 112, "num_local_experts": 4}), 24,
                     {"max_model_len": 24, "least_expert_margin": 0.03}),
    "qwen3-moe": (qwen3_moe, dict(seed=121, num_hidden_layers=2, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
                                  **QWEN3MOE), 70, {}),
    "qwen3-moe-raw": (qwen3_moe, dict(seed=121, weights_of="qwen3-moe", num_hidden_layers=2, num_experts=8,
                                      num_experts_per_tok=2, edit=old_qwen3_moe, **QWEN3MOE), 70, {}),
    "qwen3-moe-dense": (qwen3_moe, dict(seed=122, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
                                        norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3],
                                        use_sliding_window=True, sliding_window=24, edit=old_qwen3_moe, **QWEN3MOE), 75, {}),
}


# ---- expectations ---------------------------------------------------------------------------------------------------

def expert_margin(model, ids):
    """The least distance between an expert taken and one left, in standard deviations."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return float("inf")
    n_taken, least = model.config.num_experts_per_tok, float("inf")
    for scores in model.base_model(torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits:
        best = scores.topk(n_taken + 1).values
        least = min(least, float((best[:, n_taken - 1] - best[:, n_taken]).min()) / float(scores.std()))
    return least


def reference(directory):
    """Two functions: token ids to logits, and a list of ids to its expert_margin."""
    config = json.loads((directory / "config.json").read_text())
    if config["architectures"] == ["FlashGPT"]:
        del config["architectures"]
        model = FlashGPT(**config).float()
        tensors = {name: t.float() for name, t in load_file(directory / "model.safetensors").items()}
        tied = tensors.get("token_embed.weight", tensors.get("lm_head.weight"))
        model.load_state_dict({**tensors, "token_embed.weight": tied, "lm_head.weight": tied})
        return model.eval(), lambda ids: float("inf")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model = model.eval()
    return lambda ids: model(ids, use_cache=False).logits, lambda ids: expert_margin(model, ids)


def greedy(forward, prompt, n):
    """The continuation, given up where it is too close, and its least margin in standard deviations."""
    ids, least = list(prompt), float("inf")
    for _ in range(n):
        row = forward(torch.tensor([ids]))[0, -1]
        best = row.topk(2)
        least = min(least, float(best.values[0] - best.values[1]) / float(row.std()))
        ids.append(int(best.indices[0]))
        if least < MARGIN:
            break
    return ids[len(prompt):], least


@torch.no_grad()
def export(directory, vocab_size, prompt_len, max_model_len=None, least_expert_margin=EXPERT_MARGIN):
    forward, experts = reference(directory)
    # transformers' dynamic scaling would change with every token; choices of experts that rounding to BF16 leaves alone
    # are rare, so that there are few tokens
    single_pass = max_model_len == prompt_len
    for attempt in range(100):
        generator = torch.Generator().manual_seed(1000 + attempt)
        prompt = torch.randint(vocab_size, (prompt_len,), generator=generator).tolist()
        generated, margin = greedy(forward, prompt, 0 if single_pass else N_GENERATED)
        if margin >= MARGIN and (single_pass or len(set(generated)) >= DISTINCT):
            if experts(prompt + generated) >= least_expert_margin:
                break
    else:
        raise SystemExit(f"{directory}: no prompt with a margin of {MARGIN} and {DISTINCT} distinct tokens")
    total, last = prompt_len + len(generated), prompt_len - 1
    later = {row for row in (prompt_len, prompt_len + 17, total - 2, total - 1) if row < total}
    rows = sorted({0, 1, last // 2, last} | later)
    logits = forward(torch.tensor([prompt + generated]))[0]
    tensors = {"prompt": torch.tensor(prompt, dtype=torch.int32), "rows": torch.tensor(rows, dtype=torch.int32),
               "generated": torch.tensor(generated, dtype=torch.int32), "logits": logits[rows].float().contiguous()}
    save_file(tensors, directory / "expected.safetensors",
              metadata={"max_model_len": str(max_model_len)} if max_model_len else None)
    return margin, len(set(generated))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "vectors")
    parser.add_argument("cases", nargs="*", metavar="case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in args.cases or CASES:
        make, arguments, prompt_len, options = CASES[name]
        directory = args.out / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        make(directory, **arguments)
        (directory / "generation_config.json").unlink(missing_ok=True)
        if prompt_len is None:
            continue
        margin, distinct = export(directory, arguments["vocab_size"], prompt_len, **options)
        size = sum(p.lstat().st_size for p in directory.iterdir())
        print(f"{name:24} {size / 1024:6.0f} KB   margin {margin:8.4f}   {distinct:3} distinct tokens")


if __name__ == "__main__":
    main()
