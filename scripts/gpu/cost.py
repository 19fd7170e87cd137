"""What a step of a model costs at the least: bytes and FLOPs from its config.json, times from ceilings measured in the same
run. No GPU, no server: arithmetic alone.

Weights and KV are of 2 bytes. A linear layer of N outputs and K inputs is 2 N K FLOPs a token; causal attention over s
tokens is 2 s^2 H D a layer. Norms, biases, activations and the embedding's rows are left out: below 0.1 % of either.
"""
import dataclasses
import json
import os

BYTES = 2
PROMPTS = (8192, 32768, 131072)  # tokens, of which the time to first token is measured
LEFT_FREE = 8  # tokens of a context that a prompt is to fill


@dataclasses.dataclass(frozen=True)
class Model:
    path: str
    n_layers: int
    hidden_dim: int
    mlp_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    @classmethod
    def load(cls, path):
        """Of a Llama-shaped checkpoint's directory."""
        with open(os.path.join(path, "config.json")) as f:
            c = json.load(f)
        n_heads, hidden = c["num_attention_heads"], c["hidden_size"]
        return cls(path, c["num_hidden_layers"], hidden, c["intermediate_size"], n_heads,
                   c.get("num_key_value_heads") or n_heads, c.get("head_dim") or hidden // n_heads, c["vocab_size"],
                   c["max_position_embeddings"])

    def prompt_lengths(self, quick):
        """PROMPTS, as far as the model's context goes"""
        return [min(n, self.max_positions - LEFT_FREE) for n in PROMPTS[:2 if quick else 3] if n <= 2 * self.max_positions]

    def name(self):
        return os.path.basename(os.path.normpath(self.path))

    def linears(self):
        """{name: (N, K)} of one layer, fused as they are run"""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"qkv": (q + 2 * kv, self.hidden_dim), "o": (self.hidden_dim, q),
                "gate_up": (2 * self.mlp_dim, self.hidden_dim), "down": (self.hidden_dim, self.mlp_dim)}

    def layer_weights(self):
        """of all layers together"""
        return self.n_layers * sum(n * k for n, k in self.linears().values())

    def token_weight_bytes(self):
        """What one step reads of the weights: all layers and lm_head; of the embedding only a row."""
        return BYTES * (self.layer_weights() + self.vocab_size * self.hidden_dim)

    def kv_bytes(self, tokens):
        return 2 * BYTES * self.n_layers * self.n_kv_heads * self.head_dim * tokens

    def linear_flops(self, tokens):
        """without lm_head, which prefill runs for one token of each prompt"""
        return 2 * tokens * self.layer_weights()

    def attention_flops(self, s):
        return 2 * s * s * self.n_heads * self.head_dim * self.n_layers


class Ceilings:
    """bandwidth in bytes/s, or None; gemm {T: {linear's name: seconds}}; attention {s: FLOP/s of whoever is the fastest}."""

    def __init__(self, tables=None):
        """From the tables of bench_gpu.py's section `ceilings`."""
        tables = tables or {}
        self.bandwidth = max((row["GB/s"] * 1e9 for row in tables.get("bandwidth", [])), default=None)
        self.gemm = {row["T"]: {k[:-3]: v * 1e-6 for k, v in row.items() if k.endswith(" us")}
                     for row in tables.get("gemm", [])}
        rates = {row["s"]: [v for k, v in row.items() if k.endswith(" TFLOP/s") and v] for row in tables.get("attention", [])}
        self.attention = {s: max(all_of_s) * 1e12 for s, all_of_s in rates.items() if all_of_s}

    def layers_seconds(self, model, tokens):
        """All layers' linears over so many tokens, at the rate of the largest measured T up to it."""
        sizes = [t for t in self.gemm if t <= tokens and set(model.linears()) <= set(self.gemm[t])]
        if not sizes:
            return None
        t = max(sizes)
        return model.n_layers * sum(self.gemm[t][name] for name in model.linears()) * tokens / t

    def decode_linear_seconds(self, model, n_seqs):
        """cuBLAS's time for every linear and lm_head with n_seqs rows; None unless measured at that size."""
        times = self.gemm.get(n_seqs, {})
        if "lm_head" not in times:
            return None
        return self.layers_seconds(model, n_seqs) + times["lm_head"]

    def attention_rate(self, s):
        """at the measured length nearest to s, by ratio"""
        return self.attention[min(self.attention, key=lambda m: max(m / s, s / m))] if self.attention else None


def family_token_bytes(path):
    """What a step of one sequence reads of the weights of a checkpoint of any family: its layers, of experts the chosen ones,
    and the output layer. Returns that, the size of the vocabulary, and the length of the context."""
    with open(os.path.join(path, "config.json")) as f:
        c = json.load(f)
    gemma3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    c = {**gemma3, **c["text_config"]} if "text_config" in c else c

    def first(*keys):
        return next((c[k] for k in keys if c.get(k)), None)

    hidden, n_heads = first("hidden_size", "n_embed", "n_embd"), first("num_attention_heads", "n_head")
    head_dim, n_layers = c.get("head_dim") or hidden // n_heads, first("num_hidden_layers", "n_layer")
    gated = c.get("architectures", [None])[0] not in ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "BloomForCausalLM")
    mlp = first("moe_intermediate_size", "intermediate_size") or 4 * hidden
    n_experts = first("num_local_experts", "num_experts") or 0
    attention = hidden * head_dim * (2 * n_heads + 2 * (c.get("num_key_value_heads") or n_heads))
    mlps = (3 if gated else 2) * hidden * mlp * (c["num_experts_per_tok"] if n_experts else 1)
    size = n_layers * (attention + mlps + n_experts * hidden) + c["vocab_size"] * hidden
    return BYTES * size, c["vocab_size"], first("max_position_embeddings", "n_positions") or 2048


def decode_bytes(model, n_seqs, context):
    return model.token_weight_bytes() + model.kv_bytes(n_seqs * context)


def bandwidth_share(ceilings, model, n_seqs, context, seconds):
    """Of the read bandwidth, by a decode step of so many seconds."""
    if not ceilings.bandwidth or not seconds:
        return None
    return decode_bytes(model, n_seqs, context) / seconds / ceilings.bandwidth


def decode_roofline(ceilings, model, n_seqs, context):
    """Seconds of one decode step: max(weights / bandwidth, FLOPs / GEMM rate at that T) + KV / bandwidth."""
    linear = ceilings.decode_linear_seconds(model, n_seqs)
    if linear is None or not ceilings.bandwidth:
        return None
    weights = model.token_weight_bytes() / ceilings.bandwidth
    return max(weights, linear) + model.kv_bytes(n_seqs * context) / ceilings.bandwidth


def prefill_roofline(ceilings, model, n_prompts, length, chunk):
    """Seconds for n_prompts of so many tokens, computed `chunk` tokens a step: GEMMs at cuBLAS's rate for the chunk,
    attention at the fastest kernel's for the length."""
    tokens, rate = n_prompts * length, ceilings.attention_rate(length)
    step = min(chunk, tokens)
    linear = ceilings.layers_seconds(model, step)
    if linear is None or not rate:
        return None
    return linear * tokens / step + n_prompts * model.attention_flops(length) / rate


def run_roofline(ceilings, model, n_seqs, waves, input_len, output_len, chunk):
    """Seconds of a whole run: `waves` times n_seqs prompts, the prefill of all, then their decode steps, all full."""
    prefill = prefill_roofline(ceilings, model, n_seqs * waves, input_len, chunk)
    step = decode_roofline(ceilings, model, n_seqs, input_len + output_len / 2)
    if prefill is None or step is None:
        return None
    return prefill + waves * (output_len - 1) * step


def ratio(a, b):
    return a / b if a is not None and b else None
