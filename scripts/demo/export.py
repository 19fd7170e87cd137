"""Writes a trained checkpoint in Hugging Face's layout.

    python scripts/demo/export.py --run build/demo/run --out models/demo

One BF16 model.safetensors (tied embeddings, so no lm_head), config.json, generation_config.json,
tokenizer.model, tokenizer_config.json and chat_template.jinja.
"""

import argparse
import json
import pathlib
import shutil

import sentencepiece
import torch
from safetensors.torch import save_file

import corpus
from model import Config

CHAT_TEMPLATE = r"""{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'system' if message.role == 'developer' else message.role %}
    {%- if role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('roles are system, user and assistant, not ' ~ role) }}
    {%- endif %}
    {{- '<|' ~ role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def export(run, tokenizer, out):
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "checkpoint.pt", map_location="cpu")
    c = Config(**state["config"])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    end = sp.piece_to_id(corpus.END)
    tensors = {"model." + name: t.to(torch.bfloat16).contiguous() for name, t in state["model"].items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim, "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings, "rope_theta": c.rope_theta, "rope_scaling": None,
        "rms_norm_eps": c.rms_norm_eps, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": True, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": [2, end], "torch_dtype": "bfloat16",
    })
    write_json(out / "generation_config.json", {
        "bos_token_id": 1, "eos_token_id": [2, end], "do_sample": False})
    special = {0: "<unk>", 1: "<s>", 2: "</s>", **{sp.piece_to_id(t): t for t in corpus.CONTROL}}
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
        "legacy": False, "add_prefix_space": True, "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False, "model_max_length": c.max_position_embeddings,
        "added_tokens_decoder": {str(i): {
            "content": t, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True} for i, t in special.items()},
        "additional_special_tokens": corpus.CONTROL,
    })
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if not (out / "tokenizer.model").exists() or not tokenizer.samefile(out / "tokenizer.model"):
        shutil.copyfile(tokenizer, out / "tokenizer.model")
    size = (out / "model.safetensors").stat().st_size
    assert size <= 15 * 2 ** 20, size
    print(f"wrote {out}: {state['step']} steps, {state['tokens']} tokens, {size} bytes of weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("build/demo/run"))
    parser.add_argument("--tokenizer", type=pathlib.Path, default=pathlib.Path("models/demo/tokenizer.model"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("models/demo"))
    arguments = parser.parse_args()
    export(arguments.run, arguments.tokenizer, arguments.out)
