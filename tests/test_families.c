/* test_families.c: the configurations of published checkpoints, as their config.json spells them: which layers see how far and
 * turn how, what is on, and what is refused by name. Vectors of each family: test_model.c. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/config.h"
#include "models/json.h"

// "{...}" with `more` members after it.
static int parse(struct model_config *c, const char *base, const char *more, struct error *e)
{
    char text[4096];
    cJSON *root;
    snprintf(text, sizeof text, "{%s%s%s}", base, *more ? "," : "", more);
    ck_assert_msg(json_parse(&root, text, strlen(text), e) == 0, "%s", e->message);
    int rc = config_parse(c, root, NULL, e);
    cJSON_Delete(root);
    return rc;
}

static void parse_ok(struct model_config *c, const char *base, const char *more)
{
    struct error e = {0};
    ck_assert_msg(parse(c, base, more, &e) == 0, "%s: %s", more, e.message);
}

static void refused(const char *base, const char *more, const char *message)
{
    struct model_config c;
    struct error e = {0};
    ck_assert_int_lt(parse(&c, base, more, &e), 0);
    ck_assert_msg(strstr(e.message, message), "%s: %s", more, e.message);
}

#define SIZES "\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,\"num_attention_heads\":4,\"num_hidden_layers\":12"
#define FAMILY(name) "\"architectures\":[\"" name "ForCausalLM\"]," SIZES
#define POSITIONS ",\"max_position_embeddings\":32768"
#define QWEN2 FAMILY("Qwen2") POSITIONS ",\"num_key_value_heads\":2"
#define QWEN3 FAMILY("Qwen3") POSITIONS ",\"num_key_value_heads\":2,\"head_dim\":32"
#define GEMMA FAMILY("Gemma") ",\"max_position_embeddings\":8192,\"head_dim\":64,\"num_key_value_heads\":1"
#define GEMMA2 FAMILY("Gemma2") ",\"max_position_embeddings\":8192,\"head_dim\":64,\"num_key_value_heads\":2"
#define GEMMA3 FAMILY("Gemma3") ",\"num_key_value_heads\":1"
#define PHI3 FAMILY("Phi3") ",\"max_position_embeddings\":131072,\"original_max_position_embeddings\":4096"
#define NEOX FAMILY("GPTNeoX") ",\"max_position_embeddings\":2048"
#define BLOOM "\"architectures\":[\"BloomForCausalLM\"],\"vocab_size\":100,\"n_embed\":64,\"n_layer\":3,\"num_attention_heads\":4"
#define MIXTRAL FAMILY("Mixtral") POSITIONS
#define QWEN3MOE FAMILY("Qwen3Moe") POSITIONS ",\"head_dim\":32,\"num_experts\":16,\"num_experts_per_tok\":8"

START_TEST(qwen2)
{
    struct model_config c;
    parse_ok(&c, QWEN2, "\"use_sliding_window\":false,\"sliding_window\":131072,\"max_window_layers\":10");
    ck_assert(c.qkv_bias && !c.attn_out_bias && !c.tied);
    ck_assert_int_eq(c.n_kinds, 1);
    ck_assert_int_eq(c.kinds[0].window, 0);
    parse_ok(&c, QWEN2, "\"use_sliding_window\":true,\"sliding_window\":17,\"max_window_layers\":10");
    ck_assert_int_eq(c.n_kinds, 2);
    ck_assert(c.kinds[0].window == 0 && c.kinds[0].n_layers == 10 && c.kinds[1].window == 17 && c.kinds[1].n_layers == 2);
    ck_assert(c.kind_of_layer[9] == 0 && c.kind_of_layer[10] == 1);
    parse_ok(&c, QWEN2, "\"use_sliding_window\":true,\"sliding_window\":17,\"max_window_layers\":0"); // all
    ck_assert(c.n_kinds == 1 && c.kinds[0].window == 17 && c.kind_of_layer[0] == 0);
    parse_ok(&c, QWEN2, "\"use_sliding_window\":true"); // from layer 28 on: none
    ck_assert(c.n_kinds == 1 && c.kinds[0].window == 0);
}
END_TEST

START_TEST(qwen3)
{
    struct model_config c;
    parse_ok(&c, QWEN3, "\"rope_theta\":1000000,\"tie_word_embeddings\":true");
    ck_assert(!c.qkv_bias && c.tied && c.family->q_norm && c.family->k_norm);
    ck_assert_int_eq(c.head_dim, 32);
    ck_assert_double_eq(c.kinds[0].rope.theta, 1e6);
    parse_ok(&c, FAMILY("Qwen3") POSITIONS ",\"num_key_value_heads\":2", "\"attention_bias\":true");
    ck_assert(c.head_dim == 128 && c.qkv_bias && c.attn_out_bias);
}
END_TEST

START_TEST(gemma)
{
    struct model_config c;
    parse_ok(&c, GEMMA, "\"hidden_act\":\"gelu\",\"hidden_activation\":null"); // the old files' name for the approximation
    ck_assert_int_eq(c.activation, ACT_GELU_TANH);
    ck_assert(c.tied && c.family->scales_embedding && c.attn_softcap == 0 && c.logit_softcap == 0);
    ck_assert_float_eq(c.attn_scale, 0.125f);
    parse_ok(&c, FAMILY("Gemma") POSITIONS ",\"num_key_value_heads\":1", "");
    ck_assert_int_eq(c.head_dim, 256);
    refused(GEMMA, "\"use_bidirectional_attention\":true", "use_bidirectional_attention: true is not implemented");
}
END_TEST

START_TEST(gemma2)
{
    struct model_config c;
    parse_ok(&c, GEMMA2, "");
    ck_assert(c.n_kinds == 2 && c.kinds[0].window == 0 && c.kinds[0].n_layers == 6 && c.kinds[1].window == 4096);
    ck_assert(c.kind_of_layer[0] == 1 && c.kind_of_layer[1] == 0); // even layers are windowed
    ck_assert(c.attn_softcap == 50 && c.logit_softcap == 30);
    ck_assert_float_eq(c.attn_scale, 0.0625f); // of query_pre_attn_scalar 256, not of head_dim
    parse_ok(&c, GEMMA2, "\"query_pre_attn_scalar\":144,\"attn_logit_softcapping\":null,\"final_logit_softcapping\":12.5");
    ck_assert(c.attn_softcap == 0 && c.logit_softcap == 12.5f);
    ck_assert_float_eq_tol(c.attn_scale, 1 / 12.0f, 1e-8f);
    parse_ok(&c, GEMMA2, "\"sliding_window\":null");
    ck_assert(c.n_kinds == 1 && c.kinds[0].window == 0);
    refused(GEMMA2, "\"final_logit_softcapping\":-1", "final_logit_softcapping: -1 is not in");
    refused(GEMMA2, "\"hidden_activation\":\"gelu_9\"", "hidden_activation: gelu_9 is none of");
}
END_TEST

START_TEST(gemma3)
{
    struct model_config c;
    parse_ok(&c, GEMMA3, "\"sliding_window\":512,\"rope_theta\":1000000,\"rope_local_base_freq\":10000,"
                         "\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8.0},\"sliding_window_pattern\":6,"
                         "\"max_position_embeddings\":131072");
    ck_assert(c.n_kinds == 2 && c.kinds[0].n_layers == 2 && c.kinds[1].n_layers == 10 && c.kinds[1].window == 512);
    ck_assert(c.kind_of_layer[4] == 1 && c.kind_of_layer[5] == 0 && c.kind_of_layer[11] == 0);
    ck_assert(c.kinds[0].rope.theta == 1e6 && c.kinds[0].rope.type == ROPE_LINEAR && c.kinds[0].rope.factor == 8);
    ck_assert(c.kinds[1].rope.theta == 1e4 && c.kinds[1].rope.type == ROPE_DEFAULT);
    ck_assert_int_eq(c.max_model_len, 131072); // which has the factor in it
    ck_assert(c.attn_softcap == 0 && c.logit_softcap == 0);
    parse_ok(&c, GEMMA3, "\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\",\"rope_theta\":5e5},"
                         "\"sliding_attention\":{\"rope_type\":\"default\",\"rope_theta\":2e4}}");
    ck_assert(c.kinds[0].rope.theta == 5e5 && c.kinds[1].rope.theta == 2e4);
    parse_ok(&c, GEMMA3, "\"sliding_window\":null"); // they still turn differently
    ck_assert(c.n_kinds == 2 && c.kinds[1].window == 0 && c.kinds[1].rope.theta == 1e4);
    // With a vision tower: what describes the text is an object of its own, with transformers' defaults.
    parse_ok(&c, "\"architectures\":[\"Gemma3ForConditionalGeneration\"],\"eos_token_id\":[1,106]",
             "\"torch_dtype\":\"float16\",\"text_config\":{\"hidden_size\":2560,\"intermediate_size\":10240,"
             "\"num_hidden_layers\":34,"
             "\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8.0},\"sliding_window\":1024},\"vision_config\":{}");
    ck_assert(c.n_heads == 8 && c.n_kv_heads == 4 && c.head_dim == 256 && c.vocab_size == 262208 && c.kinds[0].n_layers == 5);
    ck_assert(c.n_eos_token_ids == 2 && c.eos_token_ids[1] == 106 && c.dtype == DTYPE_F16 && c.kinds[1].window == 1024);
    refused("\"architectures\":[\"Gemma3ForConditionalGeneration\"]", "", "text_config: missing");
}
END_TEST

#define FACTORS(x) "[" x "," x "," x "," x "," x "," x "," x "," x "]" // for heads of 16

START_TEST(phi3)
{
    struct model_config c;
    parse_ok(&c, PHI3, "\"rope_scaling\":{\"type\":\"su\",\"short_factor\":" FACTORS("1.25") ",\"long_factor\":" FACTORS("9")
                       "},\"sliding_window\":262144");
    const struct rope_config *rope = &c.kinds[0].rope;
    ck_assert(rope->type == ROPE_LONGROPE && rope->short_factors[7] == 1.25f && rope->long_factors[0] == 9);
    ck_assert_double_eq_tol(rope->attention_factor, sqrt(1 + log(32) / log(4096)), 1e-12);
    ck_assert_int_eq(c.max_model_len, 131072);
    ck_assert_int_eq(c.kinds[0].window, 262144);
    float inv_freq[8];
    rope_inv_freq(rope, 4096, inv_freq); // within the original context
    ck_assert_float_eq_tol(inv_freq[0], 1 / 1.25f, 1e-7f);
    rope_inv_freq(rope, 4097, inv_freq);
    ck_assert_float_eq_tol(inv_freq[0], 1 / 9.0f, 1e-7f);
    parse_ok(&c, PHI3, "\"partial_rotary_factor\":0.75,\"rope_scaling\":null");
    ck_assert_int_eq(c.kinds[0].rope.dim, 12);
    refused(PHI3, "\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[1,1]}", "short_factor: not a list of 8 factors");
    refused(PHI3, "\"partial_rotary_factor\":0.2", "3 of 16 elements cannot rotate");
}
END_TEST

START_TEST(gpt_neox)
{
    struct model_config c;
    parse_ok(&c, NEOX, "\"rotary_pct\":0.5,\"rotary_emb_base\":20000,\"use_parallel_residual\":true");
    ck_assert(c.parallel && c.qkv_bias && c.attn_out_bias && c.mlp_bias && !c.tied);
    ck_assert(c.kinds[0].rope.dim == 8 && c.kinds[0].rope.theta == 2e4);
    parse_ok(&c, NEOX, "\"use_parallel_residual\":false,\"attention_bias\":false");
    ck_assert(!c.parallel && !c.qkv_bias && !c.attn_out_bias && c.mlp_bias && c.kinds[0].rope.dim == 4);
    parse_ok(&c, NEOX, "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":3e4,\"partial_rotary_factor\":1.0}");
    ck_assert(c.kinds[0].rope.dim == 16 && c.kinds[0].rope.theta == 3e4);
}
END_TEST

START_TEST(bloom)
{
    struct model_config c;
    parse_ok(&c, BLOOM, "");
    ck_assert(c.hidden_dim == 64 && c.n_layers == 3 && c.intermediate_dim == 256 && c.max_model_len == 2048 && c.tied);
    parse_ok(&c, BLOOM, "\"seq_length\":4096,\"hidden_size\":32"); // n_embed counts
    ck_assert(c.max_model_len == 4096 && c.hidden_dim == 64);
    refused(BLOOM, "\"apply_residual_connection_post_layernorm\":true", "apply_residual_connection_post_layernorm: true is not");
}
END_TEST

START_TEST(experts)
{
    struct model_config c;
    parse_ok(&c, MIXTRAL, "\"num_key_value_heads\":2,\"sliding_window\":null");
    ck_assert(c.n_experts == 8 && c.n_chosen == 2 && c.expert_dim == 96 && c.renormalize);
    ck_assert_double_eq(c.kinds[0].rope.theta, 1e6);
    parse_ok(&c, MIXTRAL, "\"num_key_value_heads\":null");
    ck_assert_int_eq(c.n_kv_heads, 4);
    parse_ok(&c, QWEN3MOE, "\"moe_intermediate_size\":24,\"norm_topk_prob\":true,\"mlp_only_layers\":[]");
    ck_assert(c.n_experts == 16 && c.n_chosen == 8 && c.expert_dim == 24 && c.renormalize);
    parse_ok(&c, QWEN3MOE, "\"mlp_only_layers\":[1],\"decoder_sparse_step\":2");
    ck_assert(!c.has_experts[0] && !c.has_experts[1] && !c.has_experts[2] && c.has_experts[3]);
    refused(QWEN3MOE, "\"mlp_only_layers\":[12]", "mlp_only_layers: not numbers of 12 layers");
    refused(QWEN3MOE, "\"decoder_sparse_step\":0", "decoder_sparse_step: 0 is not in");
    refused(MIXTRAL, "\"num_key_value_heads\":2,\"num_experts_per_tok\":9", "num_experts_per_tok: 9 of 8 experts");
    refused(MIXTRAL, "\"num_key_value_heads\":2,\"num_local_experts\":0", "num_local_experts: 0 is not in");
}
END_TEST

// Names in the message that says what there is, and in the table.
START_TEST(every_name_is_known)
{
    static const char *const stems[] = {"Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3",
                                        "Phi3", "GPTNeoX", "Bloom"};
    for (size_t i = 0; i < sizeof stems / sizeof *stems; i++) {
        char name[64], listed[64];
        snprintf(name, sizeof name, "%sForCausalLM", stems[i]);
        snprintf(listed, sizeof listed, " %s", stems[i]);
        ck_assert_msg(family_find(name) && strstr(family_names(), listed), "%s", name);
    }
    ck_assert(family_find("FlashGPT") && family_find("GPT2LMHeadModel") && !family_find("OPTForCausalLM"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("families");
    TCase *tc = tcase_create("config.json");
    tcase_add_test(tc, qwen2);
    tcase_add_test(tc, qwen3);
    tcase_add_test(tc, gemma);
    tcase_add_test(tc, gemma2);
    tcase_add_test(tc, gemma3);
    tcase_add_test(tc, phi3);
    tcase_add_test(tc, gpt_neox);
    tcase_add_test(tc, bloom);
    tcase_add_test(tc, experts);
    tcase_add_test(tc, every_name_is_known);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
