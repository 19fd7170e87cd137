#include "models/families.h"

#include <string.h>

// Of what Llama began.
#define LLAMA_NAMES .root = {"model."}, LLAMA_LAYERS
#define LLAMA_LAYERS                                                                                                  \
    .token_embed = "embed_tokens", .layers = "layers.", .norm1 = "input_layernorm",                 \
    .attn_out = "self_attn.o_proj", .final_norm = "norm", .lm_head = "lm_head", .ignored = {".rotary_emb.inv_freq"},  \
    .norm = NORM_RMS, .positions = POSITIONS_ROPE, .gated = true

#define QKV .qkv = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
#define NORM2 .norm2 = "post_attention_layernorm"
#define GATED_MLP .mlp_in = {"mlp.gate_proj", "mlp.up_proj"}, .mlp_out = "mlp.down_proj"
#define LLAMA_TENSORS LLAMA_NAMES, QKV, NORM2, GATED_MLP

#define LLAMA_KEYS                                                                                                    \
    .hidden_dim_key = {"hidden_size"}, .n_layers_key = {"num_hidden_layers"}, .n_heads_key = {"num_attention_heads"}, \
    .max_positions_key = "max_position_embeddings", .n_kv_heads_key = "num_key_value_heads",                          \
    .head_dim_key = "head_dim", .intermediate_dim_key = "intermediate_size", .norm_eps_key = "rms_norm_eps",          \
    .theta_key = "rope_theta"

#define SILU .activation_key = "hidden_act", .activation = "silu"

#define QWEN_WINDOW .window_switch_key = "use_sliding_window", .window_key = "sliding_window", .window = 4096

#define GEMMA                                                                                                         \
    LLAMA_LAYERS, QKV, GATED_MLP, LLAMA_KEYS, .norm_eps = 1e-6, .norm_weight_offset = 1, .scales_embedding = true,     \
    .head_dim = 256, .tied = true, .qkv_bias_key = "attention_bias", .attn_out_bias_key = "attention_bias",           \
    .activation = "gelu_pytorch_tanh", .fixed = {{"use_bidirectional_attention", false}}

// Norms before and after each half.
#define GEMMA_2_AND_3                                                                                                 \
    GEMMA, .n_kv_heads = 4, .activation_key = "hidden_activation", .post_attn_norm = "post_attention_layernorm",      \
    .norm2 = "pre_feedforward_layernorm", .post_mlp_norm = "post_feedforward_layernorm", .window_key = "sliding_window", \
    .window = 4096, .query_scale_key = "query_pre_attn_scalar", .query_scale = 256,                                   \
    .logit_softcap_key = "final_logit_softcapping"

#define GEMMA_3                                                                                                       \
    GEMMA_2_AND_3, .q_norm = "self_attn.q_norm", .k_norm = "self_attn.k_norm", .theta = 1e6,                          \
    .local_theta_key = "rope_local_base_freq", .local_theta = 1e4, .max_positions = 131072,                           \
    .window_period_key = "sliding_window_pattern", .window_period = 6

// The defaults are those of transformers' configuration classes.
static const struct family families[] = {
    {
        .architecture = "FlashGPT", // the plain GPT of a PyTorch user
        .root = {""}, .token_embed = "token_embed", .pos_embed = "pos_embed", .layers = "blocks.", .norm1 = "norm1",
        .qkv = {"attn.qkv_proj"}, .attn_out = "attn.out_proj", .norm2 = "norm2", .mlp_in = {"mlp.0"},
        .mlp_out = "mlp.3", .final_norm = "norm", .lm_head = "lm_head",
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_LEARNED,
        .hidden_dim_key = {"embed_dim"}, .n_layers_key = {"num_layers"}, .n_heads_key = {"num_heads"},
        .max_positions_key = "max_seq_len", .mlp_ratio_key = "mlp_ratio", .mlp_multiple = 4, .norm_eps = 1e-5,
        .activation = "gelu", .mlp_bias = true, .tied = true,
    },
    {
        .architecture = "GPT2LMHeadModel",
        .root = {"transformer."}, .token_embed = "wte", .pos_embed = "wpe", .layers = "h.", .norm1 = "ln_1",
        .qkv = {"attn.c_attn"}, .attn_out = "attn.c_proj", .norm2 = "ln_2", .mlp_in = {"mlp.c_fc"},
        .mlp_out = "mlp.c_proj", .final_norm = "ln_f", .lm_head = "lm_head",
        .ignored = {".attn.bias", ".attn.masked_bias"}, .transposed = true,
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_LEARNED,
        .hidden_dim_key = {"n_embd"}, .n_layers_key = {"n_layer"}, .n_heads_key = {"n_head"},
        .max_positions_key = "n_positions", .intermediate_dim_key = "n_inner", .mlp_multiple = 4,
        .norm_eps_key = "layer_norm_epsilon", .norm_eps = 1e-5, .activation_key = "activation_function",
        .activation = "gelu_new", .qkv_bias = true, .attn_out_bias = true, .mlp_bias = true, .tied = true,
        .fixed = {{"scale_attn_weights", true}, {"scale_attn_by_inverse_layer_idx", false},
                  {"add_cross_attention", false}},
    },
    {
        .architecture = "LlamaForCausalLM", LLAMA_TENSORS, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-6,
        .qkv_bias_key = "attention_bias", .attn_out_bias_key = "attention_bias", .mlp_bias_key = "mlp_bias",
    },
    {
        .architecture = "MistralForCausalLM", LLAMA_TENSORS, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-6,
        .n_kv_heads = 8, .window_key = "sliding_window", .window = 4096,
    },
    {
        .architecture = "MixtralForCausalLM", LLAMA_NAMES, QKV, NORM2, LLAMA_KEYS, SILU, .theta = 1e6, .norm_eps = 1e-5,
        .router = "block_sparse_moe.gate", .experts = "block_sparse_moe.experts.", .expert_in = {"w1", "w3"},
        .expert_out = "w2", .n_kv_heads = 8, .window_key = "sliding_window",
        .n_experts_key = {"num_local_experts"}, .n_experts = 8, .n_chosen_key = "num_experts_per_tok", .n_chosen = 2,
        .renormalize = true,
    },
    {
        .architecture = "Qwen2ForCausalLM", LLAMA_TENSORS, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-6,
        .n_kv_heads = 32, .qkv_bias = true, QWEN_WINDOW, .first_windowed_key = "max_window_layers", .first_windowed = 28,
    },
    {
        .architecture = "Qwen3ForCausalLM", LLAMA_TENSORS, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-6,
        .q_norm = "self_attn.q_norm", .k_norm = "self_attn.k_norm", .n_kv_heads = 32, .head_dim = 128,
        .qkv_bias_key = "attention_bias", .attn_out_bias_key = "attention_bias",
        QWEN_WINDOW, .first_windowed_key = "max_window_layers", .first_windowed = 28,
    },
    {
        .architecture = "Qwen3MoeForCausalLM", LLAMA_TENSORS, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-6,
        .q_norm = "self_attn.q_norm", .k_norm = "self_attn.k_norm", .router = "mlp.gate", .experts = "mlp.experts.",
        .expert_in = {"gate_proj", "up_proj"}, .expert_out = "down_proj", .n_kv_heads = 4,
        .qkv_bias_key = "attention_bias", .attn_out_bias_key = "attention_bias", QWEN_WINDOW,
        .n_experts_key = {"num_experts", "num_local_experts"}, .n_experts = 128,
        .n_chosen_key = "num_experts_per_tok", .n_chosen = 8, .expert_dim_key = "moe_intermediate_size", .expert_dim = 768,
        .renormalize_key = "norm_topk_prob",
    },
    {
        .architecture = "GemmaForCausalLM", .root = {"model."}, GEMMA, NORM2, .theta = 1e4, .n_kv_heads = 16,
        .activation_key = "hidden_act", .gelu_is_tanh = true,
    },
    {
        .architecture = "Gemma2ForCausalLM", .root = {"model."}, GEMMA_2_AND_3, .theta = 1e4, .window_period = 2,
        .attn_softcap_key = "attn_logit_softcapping", .attn_softcap = 50, .logit_softcap = 30,
    },
    {.architecture = "Gemma3ForCausalLM", .root = {"model."}, GEMMA_3},
    {
        .architecture = "Gemma3ForConditionalGeneration", GEMMA_3, .root = {"language_model.model.", "model.language_model."},
        .other_parts = {"vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
                        "language_model.lm_head."}, // the last is tied
        .text_key = "text_config", .vocab_size = 262208, .n_heads = 8,
    },
    {
        .architecture = "Phi3ForCausalLM", LLAMA_NAMES, NORM2, LLAMA_KEYS, SILU, .theta = 1e4, .norm_eps = 1e-5,
        .qkv = {"self_attn.qkv_proj"}, .mlp_in = {"mlp.gate_up_proj"}, .mlp_out = "mlp.down_proj",
        .yarn_is_longrope = true, .rotary_key = "partial_rotary_factor", .rotary = 1, .original_max_positions = 4096,
        .window_key = "sliding_window",
    },
    {
        .architecture = "GPTNeoXForCausalLM",
        .root = {"gpt_neox."}, .token_embed = "embed_in", .layers = "layers.", .norm1 = "input_layernorm",
        .qkv = {"attention.query_key_value"}, .attn_out = "attention.dense", .norm2 = "post_attention_layernorm",
        .mlp_in = {"mlp.dense_h_to_4h"}, .mlp_out = "mlp.dense_4h_to_h", .final_norm = "final_layer_norm",
        .lm_head = "embed_out", .interleaved = true,
        .ignored = {".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"},
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_ROPE,
        .hidden_dim_key = {"hidden_size"}, .n_layers_key = {"num_hidden_layers"}, .n_heads_key = {"num_attention_heads"},
        .max_positions_key = "max_position_embeddings", .intermediate_dim_key = "intermediate_size",
        .norm_eps_key = "layer_norm_eps", .norm_eps = 1e-5, .activation_key = "hidden_act", .activation = "gelu",
        .theta_key = "rotary_emb_base", .theta = 1e4, .rotary_key = "rotary_pct", .rotary = 0.25,
        .parallel_key = "use_parallel_residual", .parallel = true, .qkv_bias_key = "attention_bias",
        .attn_out_bias_key = "attention_bias", .qkv_bias = true, .attn_out_bias = true, .mlp_bias = true,
    },
    {
        .architecture = "BloomForCausalLM",
        .root = {"transformer."}, .token_embed = "word_embeddings", .embed_norm = "word_embeddings_layernorm",
        .layers = "h.", .norm1 = "input_layernorm", .qkv = {"self_attention.query_key_value"},
        .attn_out = "self_attention.dense", .norm2 = "post_attention_layernorm", .mlp_in = {"mlp.dense_h_to_4h"},
        .mlp_out = "mlp.dense_4h_to_h", .final_norm = "ln_f", .lm_head = "lm_head", .interleaved = true,
        .norm = NORM_LAYER, .norm_bias = true, .positions = POSITIONS_ALIBI,
        .hidden_dim_key = {"n_embed", "hidden_size"}, .n_layers_key = {"n_layer", "num_hidden_layers"},
        .n_heads_key = {"n_head", "num_attention_heads"}, .max_positions_key = "seq_length", .max_positions = 2048,
        .mlp_multiple = 4, .norm_eps_key = "layer_norm_epsilon", .norm_eps = 1e-5, .activation = "gelu_pytorch_tanh",
        .qkv_bias = true, .attn_out_bias = true, .mlp_bias = true, .tied = true,
        .fixed = {{"apply_residual_connection_post_layernorm", false}},
    },
};

enum { N_FAMILIES = sizeof families / sizeof *families };

const struct family *family_find(const char *architecture)
{
    for (int i = 0; i < N_FAMILIES; i++) {
        if (strcmp(families[i].architecture, architecture) == 0) return &families[i];
    }
    return NULL;
}

const char *family_names(void)
{
    return "FlashGPT, GPT2LMHeadModel, or ForCausalLM after one of Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3Moe, Gemma, "
           "Gemma2, Gemma3, Phi3, GPTNeoX, Bloom; Gemma3ForConditionalGeneration";
}
