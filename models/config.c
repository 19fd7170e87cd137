#include "models/config.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "models/layer_kinds.h"

enum {
    MAX_FILE = 1 << 20,       // bytes
    MAX_VOCAB = 1 << 24,
    MAX_WIDTH = 1 << 18,      // hidden_dim
    MAX_MLP_WIDTH = 1 << 22,
    MAX_HEAD_DIM = ROPE_MAX_DIM,
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
    static const char *const keys[] = {"quantization_config", "compression_config"};
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
    if (family->gelu_is_tanh && strcmp(name, "gelu") == 0) return ACT_GELU_TANH;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i].name, name) == 0) return names[i].activation;
    }
    json_fail(r, ERR_UNSUPPORTED, key, "%.40s is none of silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu",
              name);
    return ACT_SILU;
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

static bool is_null(const struct json_reader *r, const char *key)
{
    return cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(r->object, key));
}

static void heads_parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    const char *n_heads_key = config_key(r, f->n_heads_key);
    c->n_heads = json_integer(r, n_heads_key, 1, MAX_HEADS, f->n_heads ? f->n_heads : JSON_REQUIRED);
    c->n_kv_heads = c->n_heads;
    if (f->n_kv_heads_key) {
        int32_t absent = f->n_kv_heads && !is_null(r, f->n_kv_heads_key) ? f->n_kv_heads : c->n_heads;
        c->n_kv_heads = json_integer(r, f->n_kv_heads_key, 1, MAX_HEADS, absent);
    }
    if (c->n_heads % c->n_kv_heads) {
        json_fail(r, ERR_FORMAT, f->n_kv_heads_key, "%d does not divide %d heads", c->n_kv_heads, c->n_heads);
    }
    if (f->head_dim_key && (json_field(r, f->head_dim_key) || (f->head_dim && !is_null(r, f->head_dim_key)))) {
        c->head_dim = json_integer(r, f->head_dim_key, 1, MAX_HEAD_DIM, f->head_dim ? f->head_dim : JSON_REQUIRED);
    } else {
        c->head_dim = c->hidden_dim / c->n_heads;
        if (c->hidden_dim % c->n_heads) {
            json_fail(r, ERR_FORMAT, config_key(r, f->hidden_dim_key), "%d is not a multiple of %d heads", c->hidden_dim,
                      c->n_heads);
        }
    }
    if (c->head_dim % 8 || c->head_dim > MAX_HEAD_DIM || c->head_dim == 0) {
        json_fail(r, ERR_UNSUPPORTED, f->head_dim_key ? f->head_dim_key : n_heads_key,
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
        const char *key = f->mlp_ratio_key ? f->mlp_ratio_key : config_key(r, f->hidden_dim_key);
        json_fail(r, ERR_FORMAT, key, "an MLP of width %g", width);
        width = 1;
    }
    c->intermediate_dim = (int32_t)width;
}

// "mlp_only_layers": numbers of layers that have one MLP.
static void dense_layers_parse(struct model_config *c, struct json_reader *r)
{
    const cJSON *list = json_field(r, "mlp_only_layers"), *item;
    if (list && !cJSON_IsArray(list)) json_fail(r, ERR_FORMAT, "mlp_only_layers", "not a list");
    cJSON_ArrayForEach(item, list)
    {
        double i = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (i >= 0 && i < c->n_layers && i == floor(i)) c->has_experts[(int32_t)i] = false;
        else json_fail(r, ERR_FORMAT, "mlp_only_layers", "not numbers of %d layers", c->n_layers);
    }
}

static void experts_parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    if (!f->router) return;
    c->n_experts = json_integer(r, config_key(r, f->n_experts_key), 1, MAX_EXPERTS, f->n_experts);
    c->n_chosen = json_integer(r, f->n_chosen_key, 1, MAX_CHOSEN_EXPERTS, f->n_chosen);
    c->expert_dim = c->intermediate_dim;
    if (f->expert_dim_key) c->expert_dim = json_integer(r, f->expert_dim_key, 1, MAX_MLP_WIDTH, f->expert_dim);
    c->renormalize = f->renormalize_key ? json_bool(r, f->renormalize_key, f->renormalize) : f->renormalize;
    if (c->n_chosen > c->n_experts) json_fail(r, ERR_FORMAT, f->n_chosen_key, "%d of %d experts", c->n_chosen, c->n_experts);
    int32_t step = f->mlp_out ? json_integer(r, "decoder_sparse_step", 1, INT32_MAX, 1) : 1;
    for (int32_t i = 0; i < c->n_layers; i++) c->has_experts[i] = (i + 1) % step == 0;
    if (f->mlp_out) dense_layers_parse(c, r);
}

// 0: none, also where the key is null.
static float softcap_parse(struct json_reader *r, const char *key, double absent)
{
    if (!key || is_null(r, key) || (absent == 0 && !json_field(r, key))) return 0;
    return (float)json_number(r, key, 1e-3, 1e6, absent);
}

static void scores_parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    c->attn_scale = 1 / sqrtf((float)c->head_dim);
    if (f->query_scale_key) c->attn_scale = 1 / sqrtf((float)json_number(r, f->query_scale_key, 1e-3, 1e6, f->query_scale));
    c->attn_softcap = softcap_parse(r, f->attn_softcap_key, f->attn_softcap);
    c->logit_softcap = softcap_parse(r, f->logit_softcap_key, f->logit_softcap);
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

// What the file says of all parts of the model: of those that text is made with, if there are others, the file or their own
// object.
static void parse_common(struct model_config *c, struct json_reader *r, struct json_reader *text)
{
    c->vocab_size = json_integer(text, "vocab_size", 1, MAX_VOCAB, c->family->vocab_size ? c->family->vocab_size : JSON_REQUIRED);
    struct json_reader *dtype_from = json_field(r, "dtype") || json_field(r, "torch_dtype") ? r : text;
    c->dtype = dtype_parse(dtype_from);
    c->dtype_is_given = json_field(dtype_from, "dtype") || json_field(dtype_from, "torch_dtype");
    c->bos_token_id = json_integer(json_field(r, "bos_token_id") ? r : text, "bos_token_id", 0, c->vocab_size - 1, -1);
    eos_parse(c, text);
    if (text == r) return;
    eos_parse(c, r);
    refuse_unimplemented(r, c->family);
}

static void parse(struct model_config *c, struct json_reader *r)
{
    const struct family *f = c->family;
    refuse_unimplemented(r, f);
    c->hidden_dim = json_integer(r, config_key(r, f->hidden_dim_key), 1, MAX_WIDTH, JSON_REQUIRED);
    c->n_layers = json_integer(r, config_key(r, f->n_layers_key), 1, MAX_LAYERS, JSON_REQUIRED);
    heads_parse(c, r);
    intermediate_dim_parse(c, r);
    experts_parse(c, r);
    c->max_positions = json_integer(r, f->max_positions_key, 1, CONFIG_MAX_POSITIONS,
                                    f->max_positions ? f->max_positions : JSON_REQUIRED);
    c->max_model_len = c->max_positions;
    layer_kinds_parse(c, r);
    scores_parse(c, r);
    if (f->parallel_key) c->parallel = json_bool(r, f->parallel_key, f->parallel);
    c->norm_eps = (float)(f->norm_eps_key ? json_number(r, f->norm_eps_key, 1e-20, 1, f->norm_eps) : f->norm_eps);
    c->activation = activation_parse(r, f);
    c->qkv_bias = f->qkv_bias_key ? json_bool(r, f->qkv_bias_key, f->qkv_bias) : f->qkv_bias;
    c->attn_out_bias = f->attn_out_bias_key ? json_bool(r, f->attn_out_bias_key, f->attn_out_bias) : f->attn_out_bias;
    c->mlp_bias = f->mlp_bias_key ? json_bool(r, f->mlp_bias_key, f->mlp_bias) : f->mlp_bias;
    c->tied = json_bool(r, "tie_word_embeddings", f->tied);
}

int config_parse(struct model_config *c, const cJSON *config, const cJSON *generation, struct error *e)
{
    memset(c, 0, sizeof *c);
    int status = 0;
    struct json_reader r = {.object = config, .prefix = "", .status = &status, .error = e};
    c->family = family_parse(&r);
    struct json_reader text = r;
    if (c->family && c->family->text_key) {
        text.prefix = "text_config.";
        text.object = json_field(&r, c->family->text_key);
        if (!cJSON_IsObject(text.object)) json_fail(&r, ERR_FORMAT, c->family->text_key, text.object ? "not an object" : "missing");
    }
    if (c->family && !status) {
        parse_common(c, &r, c->family->text_key ? &text : &r);
        parse(c, &text);
    }
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
