#include "models/config.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "models/json.h"

enum {
    MAX_FILE = 1 << 20,       // bytes
    MAX_VOCAB = 1 << 24,
    MAX_LAYERS = 1 << 10,
    MAX_WIDTH = 1 << 18,      // hidden_dim
    MAX_HEADS = 1 << 12,
    MAX_MLP_WIDTH = 1 << 22,
    MAX_POSITIONS = 1 << 24,  // float counts exactly up to here
    MAX_HEAD_DIM = 256,
};

// ---- what is refused ------------------------------------------------------------------------------------------------

static const struct family *family_parse(struct json_reader *r)
{
    const cJSON *list = json_field(r, "architectures");
    const cJSON *name = cJSON_IsArray(list) ? list->child : NULL;
    if (!cJSON_IsString(name) || name->next) {
        json_fail(r, ERR_FORMAT, "architectures", "%s", list ? "not a list of one name" : "missing");
        return NULL;
    }
    const struct family *family = family_find(name->valuestring);
    if (!family) {
        json_fail(r, ERR_UNSUPPORTED, "architectures", "%.60s is none of %s", name->valuestring, family_names());
    }
    return family;
}

// Options that would change the answers and that nothing here implements.
static void refuse_unimplemented(struct json_reader *r, const struct family *family)
{
    static const char *const keys[] = {"quantization_config", "compression_config", "layer_types"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (json_field(r, keys[i])) json_fail(r, ERR_UNSUPPORTED, keys[i], "not implemented");
    }
    for (size_t i = 0; i < sizeof family->fixed / sizeof *family->fixed && family->fixed[i].key; i++) {
        const char *key = family->fixed[i].key;
        bool value = json_bool(r, key, family->fixed[i].value);
        if (value != family->fixed[i].value) {
            json_fail(r, ERR_UNSUPPORTED, key, "%s is not implemented", value ? "true" : "false");
        }
    }
}

// ---- names ----------------------------------------------------------------------------------------------------------

static enum dtype dtype_parse(struct json_reader *r)
{
    const char *key = json_field(r, "dtype") ? "dtype" : "torch_dtype";
    const char *name = json_string(r, key, "bfloat16");
    if (strcmp(name, "bfloat16") == 0) return DTYPE_BF16;
    if (strcmp(name, "float16") == 0) return DTYPE_F16;
    if (strcmp(name, "float32") != 0) {
        json_fail(r, ERR_UNSUPPORTED, key, "%.40s is none of float32, float16, bfloat16", name);
    }
    return DTYPE_F32;
}

static enum activation activation_parse(struct json_reader *r, const struct family *family)
{
    static const struct { const char *name; enum activation activation; } names[] = {
        {"silu", ACT_SILU}, {"swish", ACT_SILU}, {"gelu", ACT_GELU_ERF}, {"gelu_new", ACT_GELU_TANH},
        {"gelu_pytorch_tanh", ACT_GELU_TANH}, {"gelu_fast", ACT_GELU_TANH}, {"relu", ACT_RELU},
    };
    const char *key = family->activation_key;
    const char *name = key ? json_string(r, key, family->activation) : family->activation;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i].name, name) == 0) return names[i].activation;
    }
    json_fail(r, ERR_UNSUPPORTED, key, "%.40s is none of silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu",
              name);
    return ACT_SILU;
}

// ---- rope -----------------------------------------------------------------------------------------------------------

static enum rope_type rope_type_parse(struct json_reader *r)
{
    static const char *const names[] = {
        [ROPE_DEFAULT] = "default", [ROPE_LINEAR] = "linear", [ROPE_DYNAMIC] = "dynamic",
        [ROPE_LLAMA3] = "llama3", [ROPE_YARN] = "yarn",
    };
    const char *key = json_field(r, "rope_type") ? "rope_type" : "type";
    const char *name = json_string(r, key, "default");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], name) == 0) return (enum rope_type)i;
    }
    json_fail(r, ERR_UNSUPPORTED, key, "%.40s is none of default, linear, dynamic, llama3, yarn", name);
    return ROPE_DEFAULT;
}

static double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1; }

static void yarn_parse(struct rope_config *rope, struct json_reader *r)
{
    rope->factor = json_number(r, "factor", 1, 1e6, (double)rope->max_positions / rope->original_max_positions);
    rope->beta_fast = json_number(r, "beta_fast", 1e-3, 1e6, 32);
    rope->beta_slow = json_number(r, "beta_slow", 1e-3, 1e6, 1);
    rope->truncate = json_bool(r, "truncate", true);
    double mscale = json_number(r, "mscale", 0, 1e3, 0), all_dim = json_number(r, "mscale_all_dim", 0, 1e3, 0);
    double attention_factor = yarn_mscale(rope->factor, 1);
    if (mscale > 0 && all_dim > 0) {
        attention_factor = yarn_mscale(rope->factor, mscale) / yarn_mscale(rope->factor, all_dim);
    }
    rope->attention_factor = json_number(r, "attention_factor", 1e-3, 1e3, attention_factor);
}

static void llama3_parse(struct rope_config *rope, struct json_reader *r)
{
    rope->factor = json_number(r, "factor", 1, 1e6, JSON_REQUIRED);
    rope->low_freq_factor = json_number(r, "low_freq_factor", 1e-3, 1e6, JSON_REQUIRED);
    rope->high_freq_factor = json_number(r, "high_freq_factor", 1e-3, 1e6, JSON_REQUIRED);
    if (rope->high_freq_factor <= rope->low_freq_factor) {
        json_fail(r, ERR_FORMAT, "high_freq_factor", "%g is not above low_freq_factor", rope->high_freq_factor);
    }
}

// "rope_scaling" with "rope_theta" beside it, or the newer "rope_parameters" that holds both.
static void rope_parse(struct rope_config *rope, int32_t dim, int32_t max_positions, struct json_reader *top)
{
    const char *key = json_field(top, "rope_scaling") ? "rope_scaling" : "rope_parameters";
    char prefix[32];
    snprintf(prefix, sizeof prefix, "%s.", key);
    struct json_reader r = *top;
    r.object = json_field(top, key), r.prefix = prefix;
    if (r.object && !cJSON_IsObject(r.object)) json_fail(top, ERR_FORMAT, key, "not an object");
    struct json_reader *theta_from = json_field(&r, "rope_theta") ? &r : top;
    struct json_reader *partial_from = json_field(&r, "partial_rotary_factor") ? &r : top;
    *rope = (struct rope_config){.dim = dim, .factor = 1, .attention_factor = 1, .max_positions = max_positions};
    rope->type = rope_type_parse(&r);
    rope->theta = json_number(theta_from, "rope_theta", 2, 1e12, 10000);
    if (json_number(partial_from, "partial_rotary_factor", 0, 1, 1) != 1) {
        json_fail(partial_from, ERR_UNSUPPORTED, "partial_rotary_factor", "other than 1 is not implemented");
    }
    const char *original = "original_max_position_embeddings";
    struct json_reader *original_from = json_field(top, original) ? top : &r;
    rope->original_max_positions = json_integer(original_from, original, 1, MAX_POSITIONS, max_positions);
    if (rope->type == ROPE_LINEAR || rope->type == ROPE_DYNAMIC) {
        rope->factor = json_number(&r, "factor", 1, 1e6, JSON_REQUIRED);
    }
    if (rope->type == ROPE_LLAMA3) llama3_parse(rope, &r);
    if (rope->type == ROPE_YARN) yarn_parse(rope, &r);
}

// How many tokens the scaled positions are made for (as vLLM reads the same keys). Yarn's factor multiplies the
// original context, linear's and dynamic's the configured one; llama3's max_position_embeddings is stretched already.
static int32_t rope_max_model_len(const struct rope_config *rope)
{
    double length = rope->max_positions;
    if (rope->type == ROPE_LINEAR || rope->type == ROPE_DYNAMIC) length *= rope->factor;
    if (rope->type == ROPE_YARN) length = rope->original_max_positions * rope->factor;
    return length < MAX_POSITIONS ? (int32_t)length : MAX_POSITIONS;
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

static void heads_parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    c->n_heads = json_integer(r, f->n_heads_key, 1, MAX_HEADS, JSON_REQUIRED);
    c->n_kv_heads = c->n_heads;
    if (f->n_kv_heads_key) {
        c->n_kv_heads = json_integer(r, f->n_kv_heads_key, 1, MAX_HEADS, f->n_kv_heads ? f->n_kv_heads : c->n_heads);
    }
    if (c->n_heads % c->n_kv_heads) {
        json_fail(r, ERR_FORMAT, f->n_kv_heads_key, "%d does not divide %d heads", c->n_kv_heads, c->n_heads);
    }
    if (f->head_dim_key && json_field(r, f->head_dim_key)) {
        c->head_dim = json_integer(r, f->head_dim_key, 1, MAX_HEAD_DIM, JSON_REQUIRED);
    } else {
        c->head_dim = c->hidden_dim / c->n_heads;
        if (c->hidden_dim % c->n_heads) {
            json_fail(r, ERR_FORMAT, f->hidden_dim_key, "%d is not a multiple of %d heads", c->hidden_dim, c->n_heads);
        }
    }
    if (c->head_dim % 8 || c->head_dim > MAX_HEAD_DIM || c->head_dim == 0) {
        json_fail(r, ERR_UNSUPPORTED, f->head_dim_key ? f->head_dim_key : f->n_heads_key,
                  "a head of %d elements is not a multiple of 8 up to 256", c->head_dim);
    }
}

static void intermediate_dim_parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    if (f->intermediate_dim_key && (f->mlp_multiple == 0 || json_field(r, f->intermediate_dim_key))) {
        c->intermediate_dim = json_integer(r, f->intermediate_dim_key, 1, MAX_MLP_WIDTH, JSON_REQUIRED);
        return;
    }
    double ratio = f->mlp_multiple;
    if (f->mlp_ratio_key) ratio = json_number(r, f->mlp_ratio_key, 1e-3, 1024, ratio);
    double width = floor(c->hidden_dim * ratio);
    if (width < 1 || width > MAX_MLP_WIDTH) {
        json_fail(r, ERR_FORMAT, f->mlp_ratio_key ? f->mlp_ratio_key : f->hidden_dim_key, "an MLP of width %g", width);
        width = 1;
    }
    c->intermediate_dim = (int32_t)width;
}

static void eos_add(struct model_config *c, struct json_reader *r, const cJSON *id)
{
    if (!cJSON_IsNumber(id) || !(id->valuedouble >= 0 && id->valuedouble < c->vocab_size) ||
        id->valuedouble != floor(id->valuedouble)) {
        json_fail(r, ERR_FORMAT, "eos_token_id", "not an id below %d", c->vocab_size);
        return;
    }
    int32_t value = (int32_t)id->valuedouble;
    for (int32_t i = 0; i < c->n_eos_token_ids; i++) {
        if (c->eos_token_ids[i] == value) return;
    }
    if (c->n_eos_token_ids < MAX_EOS_IDS) c->eos_token_ids[c->n_eos_token_ids++] = value;
    else json_fail(r, ERR_UNSUPPORTED, "eos_token_id", "more than %d ids", MAX_EOS_IDS);
}

// One id or a list of them.
static void eos_parse(struct model_config *c, struct json_reader *r)
{
    const cJSON *field = json_field(r, "eos_token_id"), *id;
    if (cJSON_IsArray(field)) {
        cJSON_ArrayForEach(id, field) eos_add(c, r, id);
    } else if (field) {
        eos_add(c, r, field);
    }
}

static void parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    refuse_unimplemented(r, f);
    c->dtype = dtype_parse(r);
    c->vocab_size = json_integer(r, "vocab_size", 1, MAX_VOCAB, JSON_REQUIRED);
    c->hidden_dim = json_integer(r, f->hidden_dim_key, 1, MAX_WIDTH, JSON_REQUIRED);
    c->n_layers = json_integer(r, f->n_layers_key, 1, MAX_LAYERS, JSON_REQUIRED);
    heads_parse(c, r);
    intermediate_dim_parse(c, r);
    c->max_positions = json_integer(r, f->max_positions_key, 1, MAX_POSITIONS, JSON_REQUIRED);
    c->max_model_len = c->max_positions;
    if (f->positions == POSITIONS_ROPE) {
        rope_parse(&c->rope, c->head_dim, c->max_positions, r);
        c->max_model_len = rope_max_model_len(&c->rope);
    }
    c->norm_eps = (float)(f->norm_eps_key ? json_number(r, f->norm_eps_key, 1e-20, 1, f->norm_eps) : f->norm_eps);
    c->activation = activation_parse(r, f);
    if (f->window_key) {
        bool is_null = cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(r->object, f->window_key));
        c->window = is_null ? 0 : json_integer(r, f->window_key, 1, MAX_POSITIONS, f->window);
    }
    c->qkv_bias = f->qkv_bias_key ? json_bool(r, f->qkv_bias_key, f->qkv_bias) : f->qkv_bias;
    c->attn_out_bias = f->attn_out_bias_key ? json_bool(r, f->attn_out_bias_key, f->attn_out_bias) : f->attn_out_bias;
    c->mlp_bias = f->mlp_bias_key ? json_bool(r, f->mlp_bias_key, f->mlp_bias) : f->mlp_bias;
    c->tied = json_bool(r, "tie_word_embeddings", f->tied);
    c->bos_token_id = json_integer(r, "bos_token_id", 0, c->vocab_size - 1, -1);
    eos_parse(c, r);
}

int config_parse(struct model_config *c, const cJSON *config, const cJSON *generation, struct error *e)
{
    memset(c, 0, sizeof *c);
    int status = 0;
    struct json_reader r = {.object = config, .prefix = "", .status = &status, .error = e};
    c->family = family_parse(&r);
    if (c->family) parse(c, &r);
    if (status) {
        error_prefix(e, "config.json");
        return status;
    }
    r.object = generation;
    eos_parse(c, &r);
    if (status) error_prefix(e, "generation_config.json");
    return status;
}

int config_read(struct model_config *c, const char *dir, struct error *e)
{
    cJSON *config = NULL, *generation = NULL;
    int rc = json_read(&config, dir, "config.json", MAX_FILE, e);
    char path[4096];
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    if (!rc && access(path, F_OK) == 0) rc = json_read(&generation, dir, "generation_config.json", MAX_FILE, e);
    if (!rc) rc = config_parse(c, config, generation, e);
    cJSON_Delete(config);
    cJSON_Delete(generation);
    return rc;
}
