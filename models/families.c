#include "models/families.h"

#include <string.h>

#define LLAMA_TENSORS                                                                                                 \
    .root = "model.", .token_embed = "embed_tokens", .layers = "layers.", .norm1 = "input_layernorm",                 \
    .qkv = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, .attn_out = "self_attn.o_proj",              \
    .norm2 = "post_attention_layernorm", .mlp_in = {"mlp.gate_proj", "mlp.up_proj"}, .mlp_out = "mlp.down_proj",      \
    .final_norm = "norm", .lm_head = "lm_head", .ignored = {".rotary_emb.inv_freq"}, .norm = NORM_RMS,                \
    .positions = POSITIONS_ROPE, .gated = true

#define LLAMA_KEYS                                                                                                    \
    .hidden_dim_key = "hidden_size", .n_layers_key = "num_hidden_layers", .n_heads_key = "num_attention_heads",       \
    .max_positions_key = "max_position_embeddings", .n_kv_heads_key = "num_key_value_heads",                          \
    .head_dim_key = "head_dim", .intermediate_dim_key = "intermediate_size", .norm_eps_key = "rms_norm_eps",          \
    .norm_eps = 1e-6, .activation_key = "hidden_act", .activation = "silu"

// The defaults are those of transformers' configuration classes.
static const struct family families[] = {
    {
        .architecture = "FlashGPT", // the plain GPT of a PyTorch user
        .root = "", .token_embed = "token_embed", .pos_embed = "pos_embed", .layers = "blocks.", .norm1 = "norm1",
        .qkv = {"attn.qkv_proj"}, .attn_out = "attn.out_proj", .norm2 = "norm2", .mlp_in = {"mlp.0"},
        .mlp_out = "mlp.3", .final_norm = "norm", .lm_head = "lm_head",
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_LEARNED,
        .hidden_dim_key = "embed_dim", .n_layers_key = "num_layers", .n_heads_key = "num_heads",
        .max_positions_key = "max_seq_len", .mlp_ratio_key = "mlp_ratio", .mlp_multiple = 4, .norm_eps = 1e-5,
        .activation = "gelu", .mlp_bias = true, .tied = true,
    },
    {
        .architecture = "GPT2LMHeadModel",
        .root = "transformer.", .token_embed = "wte", .pos_embed = "wpe", .layers = "h.", .norm1 = "ln_1",
        .qkv = {"attn.c_attn"}, .attn_out = "attn.c_proj", .norm2 = "ln_2", .mlp_in = {"mlp.c_fc"},
        .mlp_out = "mlp.c_proj", .final_norm = "ln_f", .lm_head = "lm_head",
        .ignored = {".attn.bias", ".attn.masked_bias"}, .transposed = true,
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_LEARNED,
        .hidden_dim_key = "n_embd", .n_layers_key = "n_layer", .n_heads_key = "n_head",
        .max_positions_key = "n_positions", .intermediate_dim_key = "n_inner", .mlp_multiple = 4,
        .norm_eps_key = "layer_norm_epsilon", .norm_eps = 1e-5, .activation_key = "activation_function",
        .activation = "gelu_new", .qkv_bias = true, .attn_out_bias = true, .mlp_bias = true, .tied = true,
        .fixed = {{"scale_attn_weights", true}, {"scale_attn_by_inverse_layer_idx", false},
                  {"add_cross_attention", false}},
    },
    {
        .architecture = "LlamaForCausalLM", LLAMA_TENSORS, LLAMA_KEYS,
        .qkv_bias_key = "attention_bias", .attn_out_bias_key = "attention_bias", .mlp_bias_key = "mlp_bias",
    },
    {
        .architecture = "MistralForCausalLM", LLAMA_TENSORS, LLAMA_KEYS,
        .n_kv_heads = 8, .window_key = "sliding_window", .window = 4096,
    },
};

const struct family *family_find(const char *architecture)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        if (strcmp(families[i].architecture, architecture) == 0) return &families[i];
    }
    return NULL;
}

const char *family_names(void) { return "FlashGPT, GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM"; }
