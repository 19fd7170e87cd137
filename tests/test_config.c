/* test_config.c: config.json of every family; each field absent, of a wrong type and out of range; rope's lengths. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/config.h"
#include "models/json.h"

#define FLASHGPT "{\"architectures\":[\"FlashGPT\"],\"vocab_size\":100,\"max_seq_len\":64,\"embed_dim\":48," \
                 "\"num_heads\":3,\"num_layers\":2,\"mlp_ratio\":4}"
#define GPT2 "{\"architectures\":[\"GPT2LMHeadModel\"],\"vocab_size\":100,\"n_positions\":64,\"n_embd\":48," \
             "\"n_head\":3,\"n_layer\":2,\"n_inner\":null,\"activation_function\":\"gelu_new\"," \
             "\"layer_norm_epsilon\":1e-05,\"scale_attn_weights\":true,\"bos_token_id\":99,\"eos_token_id\":99}"
#define LLAMA "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"max_position_embeddings\":64," \
              "\"hidden_size\":48,\"num_attention_heads\":6,\"num_key_value_heads\":2,\"num_hidden_layers\":2," \
              "\"intermediate_size\":80,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"eos_token_id\":[2,3]}"
#define MISTRAL "{\"architectures\":[\"MistralForCausalLM\"],\"vocab_size\":100,\"max_position_embeddings\":64," \
                "\"hidden_size\":64,\"num_attention_heads\":8,\"num_hidden_layers\":2,\"intermediate_size\":80}"

// Parses config with `"key": value` put in or replaced; value NULL takes the key out; key NULL changes nothing.
static int parse(struct model_config *c, const char *config, const char *key, const char *value, struct error *e)
{
    char text[1024];
    cJSON *root, *field = NULL;
    ck_assert_msg(json_parse(&root, config, strlen(config), e) == 0, "%s", e->message);
    if (key) cJSON_DeleteItemFromObjectCaseSensitive(root, key);
    if (value) {
        snprintf(text, sizeof text, "{\"value\":%s}", value);
        ck_assert_msg(json_parse(&field, text, strlen(text), e) == 0, "%s: %s", value, e->message);
        cJSON_AddItemToObject(root, key, cJSON_DetachItemFromObjectCaseSensitive(field, "value"));
        cJSON_Delete(field);
    }
    int rc = config_parse(c, root, NULL, e);
    cJSON_Delete(root);
    return rc;
}

static void parse_ok(struct model_config *c, const char *config, const char *key, const char *value)
{
    struct error e = {0};
    ck_assert_msg(parse(c, config, key, value, &e) == 0, "%s %s: %s", key ? key : "", value ? value : "", e.message);
}

START_TEST(flashgpt)
{
    struct model_config c;
    parse_ok(&c, FLASHGPT, NULL, NULL);
    ck_assert_int_eq(c.vocab_size, 100);
    ck_assert_int_eq(c.max_model_len, 64);
    ck_assert_int_eq(c.hidden_dim, 48);
    ck_assert_int_eq(c.head_dim, 16);
    ck_assert_int_eq(c.n_kv_heads, 3);
    ck_assert_int_eq(c.intermediate_dim, 192);
    ck_assert_int_eq(c.activation, ACT_GELU_ERF);
    ck_assert(c.tied && c.mlp_bias && !c.qkv_bias && !c.attn_out_bias);
    ck_assert_int_eq(c.bos_token_id, -1);
    ck_assert_int_eq(c.n_eos_token_ids, 0);
    ck_assert_float_eq(c.norm_eps, 1e-5f);
    parse_ok(&c, FLASHGPT, "mlp_ratio", "2.6875");
    ck_assert_int_eq(c.intermediate_dim, 129);
}
END_TEST

START_TEST(gpt2)
{
    struct model_config c;
    parse_ok(&c, GPT2, NULL, NULL);
    ck_assert_int_eq(c.intermediate_dim, 192);
    ck_assert_int_eq(c.activation, ACT_GELU_TANH);
    ck_assert(c.tied && c.mlp_bias && c.qkv_bias && c.attn_out_bias);
    ck_assert_int_eq(c.bos_token_id, 99);
    ck_assert_int_eq(c.eos_token_ids[0], 99);
    parse_ok(&c, GPT2, "n_inner", "20");
    ck_assert_int_eq(c.intermediate_dim, 20);
    parse_ok(&c, GPT2, "reorder_and_upcast_attn", "true"); // changes no answer
}
END_TEST

START_TEST(llama)
{
    struct model_config c;
    parse_ok(&c, LLAMA, NULL, NULL);
    ck_assert_int_eq(c.head_dim, 8);
    ck_assert_int_eq(c.n_kv_heads, 2);
    ck_assert_int_eq(c.kinds[0].window, 0);
    ck_assert_int_eq(c.dtype, DTYPE_BF16);
    ck_assert(!c.tied && !c.mlp_bias && !c.qkv_bias && !c.attn_out_bias);
    ck_assert_int_eq(c.n_eos_token_ids, 2);
    ck_assert_int_eq(c.kinds[0].rope.type, ROPE_DEFAULT);
    parse_ok(&c, LLAMA, "num_key_value_heads", NULL);
    ck_assert_int_eq(c.n_kv_heads, 6);
    parse_ok(&c, LLAMA, "head_dim", "32");
    ck_assert_int_eq(c.head_dim, 32);
    parse_ok(&c, LLAMA, "head_dim", "null");
    ck_assert_int_eq(c.head_dim, 8);
    parse_ok(&c, LLAMA, "attention_bias", "true");
    ck_assert(c.qkv_bias && c.attn_out_bias && !c.mlp_bias);
    parse_ok(&c, LLAMA, "tie_word_embeddings", "true");
    ck_assert(c.tied);
    parse_ok(&c, LLAMA, "torch_dtype", "\"float16\"");
    ck_assert_int_eq(c.dtype, DTYPE_F16);
    parse_ok(&c, LLAMA, "dtype", "\"float32\"");
    ck_assert_int_eq(c.dtype, DTYPE_F32);
    parse_ok(&c, LLAMA, "sliding_window", "16"); // no such option in this family
    ck_assert_int_eq(c.kinds[0].window, 0);
    parse_ok(&c, LLAMA, "anything_else", "{\"ignored\":[1,2]}");
}
END_TEST

START_TEST(mistral)
{
    struct model_config c;
    parse_ok(&c, MISTRAL, NULL, NULL); // absent keys: transformers' defaults
    ck_assert_int_eq(c.n_kv_heads, 8);
    ck_assert_int_eq(c.kinds[0].window, 4096);
    parse_ok(&c, MISTRAL, "sliding_window", "null");
    ck_assert_int_eq(c.kinds[0].window, 0);
    parse_ok(&c, MISTRAL, "sliding_window", "17");
    ck_assert_int_eq(c.kinds[0].window, 17);
}
END_TEST

START_TEST(generation_config)
{
    struct model_config c;
    struct error e;
    cJSON *config, *generation;
    static const struct { const char *text; int n; const char *message; } all[] = {
        {"{\"eos_token_id\":[3,4,5]}", 4, NULL}, {"{\"eos_token_id\":2}", 2, NULL},
        {"{\"eos_token_id\":null}", 2, NULL}, {"{\"temperature\":0.7}", 2, NULL},
        {"{\"eos_token_id\":100}", 0, "generation_config.json: eos_token_id: not an id below 100"},
        {"{\"eos_token_id\":[-1]}", 0, "eos_token_id"}, {"{\"eos_token_id\":\"a\"}", 0, "eos_token_id"},
        {"{\"eos_token_id\":[1.5]}", 0, "eos_token_id"}, {"{\"eos_token_id\":[[1]]}", 0, "eos_token_id"},
        {"{\"eos_token_id\":[1,4,5,6,7,8,9]}", 0, "more than 8 ids"},
    };
    ck_assert_int_eq(json_parse(&config, LLAMA, strlen(LLAMA), &e), 0);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        ck_assert_int_eq(json_parse(&generation, all[i].text, strlen(all[i].text), &e), 0);
        int rc = config_parse(&c, config, generation, &e);
        const char *message = all[i].message;
        if (message) ck_assert_msg(rc < 0 && strstr(e.message, message), "%s: %s", all[i].text, e.message);
        else ck_assert_msg(rc == 0 && c.n_eos_token_ids == all[i].n, "%s: %d", all[i].text, c.n_eos_token_ids);
        cJSON_Delete(generation);
    }
    cJSON_Delete(config);
}
END_TEST

// ---- numbers --------------------------------------------------------------------------------------------------------

// Each number: whether it may be absent, its least and greatest value.
static const struct { const char *config, *key; bool required; double min, max; } numbers[] = {
    {FLASHGPT, "vocab_size", true, 1, 1 << 24},
    {FLASHGPT, "max_seq_len", true, 1, 1 << 24},
    {FLASHGPT, "embed_dim", true, 24, 1 << 18},
    {FLASHGPT, "num_heads", true, 1, 1 << 12},
    {FLASHGPT, "num_layers", true, 1, 1024},
    {FLASHGPT, "mlp_ratio", false, 0.03125, 1024},
    {FLASHGPT, "bos_token_id", false, 0, 99},
    {FLASHGPT, "eos_token_id", false, 0, 99},
    {GPT2, "vocab_size", true, 100, 1 << 24},
    {GPT2, "n_positions", true, 1, 1 << 24},
    {GPT2, "n_embd", true, 24, 1 << 18},
    {GPT2, "n_head", true, 1, 1 << 12},
    {GPT2, "n_layer", true, 1, 1024},
    {GPT2, "n_inner", false, 1, 1 << 22},
    {GPT2, "layer_norm_epsilon", false, 1e-20, 1},
    {LLAMA, "vocab_size", true, 4, 1 << 24},
    {LLAMA, "max_position_embeddings", true, 1, 1 << 24},
    {LLAMA, "hidden_size", true, 1, 1 << 18},
    {LLAMA, "num_attention_heads", true, 1, 1 << 12},
    {LLAMA, "num_key_value_heads", false, 1, 1 << 12},
    {LLAMA, "num_hidden_layers", true, 1, 1024},
    {LLAMA, "intermediate_size", true, 1, 1 << 22},
    {LLAMA, "head_dim", false, 8, 256},
    {LLAMA, "rms_norm_eps", false, 1e-20, 1},
    {LLAMA, "rope_theta", false, 2, 1e12},
    {MISTRAL, "sliding_window", false, 1, 1 << 24},
};

static void refused(const char *config, const char *key, const char *value)
{
    struct model_config c;
    struct error e = {0};
    ck_assert_msg(parse(&c, config, key, value, &e) < 0, "%s %s: accepted", key, value ? value : "(absent)");
    ck_assert_msg(strstr(e.message, "config.json: ") && strstr(e.message, key), "%s %s: %s", key,
                  value ? value : "(absent)", e.message);
}

START_TEST(number)
{
    const char *config = numbers[_i].config, *key = numbers[_i].key;
    static const char *const wrong[] = {"0.5", "-1", "2147483648", "-2147483649", "1e300", "1e400", "-1e400",
                                        "9007199254740993", "\"8\"", "true", "[[8]]", "{}"};
    struct model_config c;
    char text[32];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        double value = atof(wrong[i]);
        bool real = strcmp(key, "mlp_ratio") == 0 || strstr(key, "eps") || strcmp(key, "rope_theta") == 0;
        if (real && value >= numbers[_i].min && value <= numbers[_i].max) continue;
        refused(config, key, wrong[i]);
    }
    if (numbers[_i].min != 0) refused(config, key, "0");
    snprintf(text, sizeof text, "%.17g", numbers[_i].max < 2 ? numbers[_i].max * 2 : numbers[_i].max + 1);
    if (numbers[_i].max < 1e12) refused(config, key, text);
    if (numbers[_i].required) refused(config, key, NULL);
    else parse_ok(&c, config, key, NULL);
}
END_TEST

START_TEST(number_limits_alone)
{
    struct model_config c;
    parse_ok(&c, LLAMA, "vocab_size", "16777216");
    parse_ok(&c, LLAMA, "num_hidden_layers", "1024");
    parse_ok(&c, LLAMA, "max_position_embeddings", "16777216");
    parse_ok(&c, LLAMA, "max_position_embeddings", "1");
    parse_ok(&c, LLAMA, "intermediate_size", "4194304");
    parse_ok(&c, LLAMA, "head_dim", "256");
    parse_ok(&c, LLAMA, "rms_norm_eps", "1");
    parse_ok(&c, LLAMA, "num_hidden_layers", "2.0"); // whole, however written
}
END_TEST

START_TEST(shapes_that_do_not_fit)
{
    refused(FLASHGPT, "embed_dim", "50");          // not a multiple of 3 heads
    refused(LLAMA, "num_key_value_heads", "4");    // does not divide 6
    refused(LLAMA, "num_key_value_heads", "12");
    refused(LLAMA, "head_dim", "12");              // not a multiple of 8
    refused(LLAMA, "head_dim", "264");
    refused(GPT2, "n_head", "4");                  // heads of 12
}
END_TEST

// ---- what is refused by name ----------------------------------------------------------------------------------------

static const struct { const char *config, *key, *value, *message; } unsupported[] = {
    {LLAMA, "architectures", "[\"OPTForCausalLM\"]", "OPTForCausalLM is none of FlashGPT, GPT2LMHeadModel"},
    {LLAMA, "architectures", "[\"LlamaForCausalLM\",\"X\"]", "architectures: not a list of one name"},
    {LLAMA, "architectures", "[]", "not a list of one name"},
    {LLAMA, "architectures", "\"LlamaForCausalLM\"", "not a list of one name"},
    {LLAMA, "architectures", "[1]", "not a list of one name"},
    {LLAMA, "architectures", NULL, "architectures: missing"},
    {LLAMA, "quantization_config", "{\"bits\":4}", "quantization_config: not implemented"},
    {LLAMA, "layer_types", "[\"full_attention\"]", "layer_types: not a list of 2 names"},
    {LLAMA, "layer_types", "[\"full_attention\",\"sliding_attention\"]", "layer_types: windows are not of this family"},
    {LLAMA, "layer_types", "[\"full_attention\",\"chunked_attention\"]", "layer_types: chunked_attention is none of"},
    {LLAMA, "partial_rotary_factor", "0.5", "partial_rotary_factor: other than 1 is not implemented"},
    {LLAMA, "hidden_act", "\"gelu_10\"", "hidden_act: gelu_10 is none of silu"},
    {LLAMA, "hidden_act", "7", "hidden_act: not a string"},
    {LLAMA, "torch_dtype", "\"float8_e4m3fn\"", "torch_dtype: float8_e4m3fn is none of"},
    {LLAMA, "dtype", "\"int8\"", "dtype: int8 is none of"},
    {LLAMA, "attention_bias", "1", "attention_bias: not true or false"},
    {LLAMA, "tie_word_embeddings", "\"no\"", "tie_word_embeddings: not true or false"},
    {LLAMA, "rope_scaling", "{\"type\":\"su\",\"factor\":2}", "rope_scaling.type: su is none of default, linear"},
    {LLAMA, "rope_scaling", "{\"rope_type\":\"longrope\"}", "rope_scaling.short_factor: not a list of 4 factors"},
    {LLAMA, "rope_scaling", "{\"rope_type\":\"longrope\",\"short_factor\":[1,1,1,0]}",
     "rope_scaling.short_factor: not a list of 4 factors"},
    {LLAMA, "rope_scaling", "[2]", "rope_scaling: not an object"},
    {LLAMA, "rope_scaling", "{\"type\":\"linear\"}", "rope_scaling.factor: missing"},
    {LLAMA, "rope_scaling", "{\"type\":\"linear\",\"factor\":0.5}", "rope_scaling.factor: 0.5 is not in 1 to"},
    {LLAMA, "rope_scaling", "{\"type\":\"dynamic\",\"factor\":\"2\"}", "rope_scaling.factor: not a number"},
    {LLAMA, "rope_parameters", "{\"rope_type\":\"dynamic\"}", "rope_parameters.factor: missing"},
    {LLAMA, "rope_parameters", "{\"rope_theta\":0}", "rope_parameters.rope_theta: 0 is not in"},
    {LLAMA, "rope_parameters", "{\"rope_theta\":1e4,\"partial_rotary_factor\":0.25}",
     "rope_parameters.partial_rotary_factor: other"},
    {LLAMA, "rope_scaling", "{\"type\":\"llama3\",\"factor\":8}", "rope_scaling.low_freq_factor: missing"},
    {LLAMA, "rope_scaling", "{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4}",
     "rope_scaling.high_freq_factor: 4 is not above"},
    {LLAMA, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"beta_fast\":-1}",
     "rope_scaling.beta_fast: -1 is not in"},
    {LLAMA, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":0}",
     "rope_scaling.original_max_position_embeddings: 0 is not in"},
    {GPT2, "scale_attn_weights", "false", "scale_attn_weights: false is not implemented"},
    {GPT2, "scale_attn_by_inverse_layer_idx", "true", "scale_attn_by_inverse_layer_idx: true is not implemented"},
    {GPT2, "add_cross_attention", "true", "add_cross_attention: true is not implemented"},
};

START_TEST(refused_by_name)
{
    struct model_config c;
    struct error e = {0};
    ck_assert_int_lt(parse(&c, unsupported[_i].config, unsupported[_i].key, unsupported[_i].value, &e), 0);
    ck_assert_msg(strstr(e.message, unsupported[_i].message), "%s", e.message);
}
END_TEST

START_TEST(not_a_number_is_named)
{
    static const char text[] = "{\n  \"vocab_size\": 5,\n  \"hidden_size\": NaN\n}";
    struct error e;
    cJSON *root;
    ck_assert_int_eq(json_parse(&root, text, sizeof text - 1, &e), ERR_FORMAT);
    ck_assert_msg(strstr(e.message, "line 3") && strstr(e.message, "\"hidden_size\": NaN"), "%s", e.message);
}
END_TEST

// ---- positions ------------------------------------------------------------------------------------------------------

static const struct { const char *key, *value; int32_t max_model_len; } lengths[] = {
    {"rope_scaling", "null", 64},
    {"rope_scaling", "{\"type\":\"default\"}", 64},
    {"rope_scaling", "{\"type\":\"linear\",\"factor\":2.5}", 160},
    {"rope_scaling", "{\"rope_type\":\"dynamic\",\"factor\":2}", 128},
    {"rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
                     "\"original_max_position_embeddings\":16}", 64},
    {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":16}", 64},
    {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":64}", 256},
    {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4}", 256},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"original_max_position_embeddings\":32}", 64}, // factor 64 / 32
    {"rope_scaling", "{\"type\":\"linear\",\"factor\":1000000}", 1 << 24},
};

START_TEST(longest_context)
{
    struct model_config c;
    parse_ok(&c, LLAMA, lengths[_i].key, lengths[_i].value);
    ck_assert_int_eq(c.max_model_len, lengths[_i].max_model_len);
}
END_TEST

// Within the original context dynamic scaling changes nothing; linear divides; a longer context turns more slowly.
START_TEST(frequencies)
{
    struct rope_config rope = {.type = ROPE_DEFAULT, .dim = 16, .theta = 10000, .factor = 2, .max_positions = 64};
    float plain[8], scaled[8], longer[8];
    rope_inv_freq(&rope, 64, plain);
    for (int i = 0; i < 8; i++) ck_assert_double_eq_tol(plain[i], pow(10000, -i / 8.0), 1e-6);
    rope.type = ROPE_DYNAMIC;
    rope_inv_freq(&rope, 64, scaled);
    ck_assert_mem_eq(scaled, plain, sizeof plain);
    rope_inv_freq(&rope, 20, scaled);
    ck_assert_mem_eq(scaled, plain, sizeof plain);
    rope_inv_freq(&rope, 128, longer);
    ck_assert_double_eq_tol(longer[7] / plain[7], pow(3, -14.0 / 14), 1e-5); // base times 3^(16/14), to the power 14/16
    rope.type = ROPE_LINEAR;
    rope_inv_freq(&rope, 128, scaled);
    for (int i = 0; i < 8; i++) ck_assert_float_eq(scaled[i], plain[i] / 2);
}
END_TEST

START_TEST(attention_factor_of_yarn)
{
    struct model_config c;
    parse_ok(&c, LLAMA, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4}");
    ck_assert_double_eq_tol(c.kinds[0].rope.attention_factor, 0.1 * log(4) + 1, 1e-12);
    parse_ok(&c, LLAMA, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"attention_factor\":0.75}");
    ck_assert_double_eq(c.kinds[0].rope.attention_factor, 0.75);
    parse_ok(&c, LLAMA, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"mscale\":2,\"mscale_all_dim\":1}");
    ck_assert_double_eq_tol(c.kinds[0].rope.attention_factor, (0.2 * log(4) + 1) / (0.1 * log(4) + 1), 1e-12);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("config");
    TCase *tc = tcase_create("config.json");
    tcase_add_test(tc, flashgpt);
    tcase_add_test(tc, gpt2);
    tcase_add_test(tc, llama);
    tcase_add_test(tc, mistral);
    tcase_add_test(tc, generation_config);
    tcase_add_loop_test(tc, number, 0, sizeof numbers / sizeof *numbers);
    tcase_add_test(tc, number_limits_alone);
    tcase_add_test(tc, shapes_that_do_not_fit);
    tcase_add_loop_test(tc, refused_by_name, 0, sizeof unsupported / sizeof *unsupported);
    tcase_add_test(tc, not_a_number_is_named);
    tcase_add_loop_test(tc, longest_context, 0, sizeof lengths / sizeof *lengths);
    tcase_add_test(tc, frequencies);
    tcase_add_test(tc, attention_factor_of_yarn);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
