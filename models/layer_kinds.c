#include "models/layer_kinds.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const char *config_key(const struct json_reader *r, const char *const keys[2])
{
    return keys[1] && !json_field(r, keys[0]) && json_field(r, keys[1]) ? keys[1] : keys[0];
}

// ---- rope -----------------------------------------------------------------------------------------------------------

static enum rope_type rope_type_parse(const struct family *f, struct json_reader *r)
{
    static const char *const names[] = {
        [ROPE_DEFAULT] = "default", [ROPE_LINEAR] = "linear", [ROPE_DYNAMIC] = "dynamic",
        [ROPE_LLAMA3] = "llama3", [ROPE_YARN] = "yarn", [ROPE_LONGROPE] = "longrope",
    };
    const char *key = json_field(r, "rope_type") ? "rope_type" : "type";
    const char *name = json_string(r, key, "default");
    if (f->yarn_is_longrope && (!strcmp(name, "yarn") || !strcmp(name, "su"))) return ROPE_LONGROPE;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], name) == 0) return (enum rope_type)i;
    }
    json_fail(r, ERR_UNSUPPORTED, key, "%.40s is none of default, linear, dynamic, llama3, yarn, longrope", name);
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

static void factors_parse(float *factors, int32_t n, const char *key, struct json_reader *r)
{
    const cJSON *list = json_field(r, key), *item;
    int32_t i = 0;
    cJSON_ArrayForEach(item, list)
    {
        if (i == n || !cJSON_IsNumber(item) || !(item->valuedouble >= 1e-3 && item->valuedouble <= 1e6)) break;
        factors[i++] = (float)item->valuedouble;
    }
    if (!cJSON_IsArray(list) || item || i < n) json_fail(r, ERR_FORMAT, key, "not a list of %d factors", n);
}

static void longrope_parse(struct rope_config *rope, struct json_reader *r)
{
    double original = rope->original_max_positions;
    rope->factor = json_number(r, "factor", 1e-3, 1e6, rope->max_positions / original);
    double attention_factor = rope->factor <= 1 || original < 2 ? 1 : sqrt(1 + log(rope->factor) / log(original));
    rope->attention_factor = json_number(r, "attention_factor", 1e-3, 1e3, attention_factor);
    factors_parse(rope->short_factors, rope->dim / 2, "short_factor", r);
    factors_parse(rope->long_factors, rope->dim / 2, "long_factor", r);
}

// How much of a head rotates.
static int32_t rotary_dim_parse(const struct model_config *c, struct json_reader *r, struct json_reader *top)
{
    const struct family *f = c->family;
    struct json_reader *from = json_field(r, "partial_rotary_factor") ? r : top;
    const char *key = from == top && f->rotary_key ? f->rotary_key : "partial_rotary_factor";
    double part = json_number(from, key, 0, 1, f->rotary_key ? f->rotary : 1);
    int32_t dim = (int32_t)(c->head_dim * part);
    if (!f->rotary_key && part != 1) json_fail(from, ERR_UNSUPPORTED, key, "other than 1 is not implemented");
    if (dim < 2 || dim % 2) json_fail(from, ERR_UNSUPPORTED, key, "%d of %d elements cannot rotate", dim, c->head_dim);
    return dim;
}

// "rope_scaling" with "rope_theta" beside it, or the newer "rope_parameters" that holds both; or that for each type of layers.
static void rope_parse(struct rope_config *rope, const struct model_config *c, bool windowed, struct json_reader *top)
{
    const struct family *f = c->family;
    const char *key = json_field(top, "rope_scaling") ? "rope_scaling" : "rope_parameters";
    const char *type = windowed ? "sliding_attention" : "full_attention";
    char prefix[64];
    snprintf(prefix, sizeof prefix, "%s.", key);
    struct json_reader r = *top;
    r.object = json_field(top, key), r.prefix = prefix;
    if (r.object && !cJSON_IsObject(r.object)) json_fail(top, ERR_FORMAT, key, "not an object");
    const bool by_type = cJSON_IsObject(json_field(&r, "full_attention")) || cJSON_IsObject(json_field(&r, "sliding_attention"));
    const bool local = windowed && f->local_theta_key;
    if (by_type) {
        r.object = json_field(&r, type);
        snprintf(prefix, sizeof prefix, "%s.%s.", key, type);
    } else if (local) {
        r.object = NULL;
    }
    *rope = (struct rope_config){.factor = 1, .attention_factor = 1, .max_positions = c->max_positions};
    rope->type = rope_type_parse(f, &r);
    rope->dim = rotary_dim_parse(c, &r, top);
    bool inside = json_field(&r, "rope_theta") != NULL;
    const char *theta_key = inside ? "rope_theta" : local ? f->local_theta_key : f->theta_key;
    rope->theta = json_number(inside ? &r : top, theta_key, 2, 1e12, local ? f->local_theta : f->theta);
    const char *original = "original_max_position_embeddings";
    struct json_reader *original_from = json_field(top, original) ? top : &r;
    int32_t absent = f->original_max_positions ? f->original_max_positions : c->max_positions;
    rope->original_max_positions = json_integer(original_from, original, 1, CONFIG_MAX_POSITIONS, absent);
    if (rope->type == ROPE_LINEAR || rope->type == ROPE_DYNAMIC) {
        rope->factor = json_number(&r, "factor", 1, 1e6, JSON_REQUIRED);
    }
    if (rope->type == ROPE_LLAMA3) llama3_parse(rope, &r);
    if (rope->type == ROPE_YARN) yarn_parse(rope, &r);
    if (rope->type == ROPE_LONGROPE) longrope_parse(rope, &r);
}

// How many tokens the scaled positions are made for (as vLLM reads the same keys). Yarn's factor multiplies the
// original context, linear's and dynamic's the configured one; elsewhere max_position_embeddings is stretched already.
static int32_t rope_max_model_len(const struct family *f, const struct rope_config *rope)
{
    double length = rope->max_positions;
    if ((rope->type == ROPE_LINEAR && !f->local_theta_key) || rope->type == ROPE_DYNAMIC) length *= rope->factor;
    if (rope->type == ROPE_YARN) length = rope->original_max_positions * rope->factor;
    return length < CONFIG_MAX_POSITIONS ? (int32_t)length : CONFIG_MAX_POSITIONS;
}

// ---- windows --------------------------------------------------------------------------------------------------------

static int32_t window_parse(const struct family *f, struct json_reader *r)
{
    if (!f->window_key) return 0;
    if (f->window_switch_key && !json_bool(r, f->window_switch_key, false)) return 0;
    if (cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(r->object, f->window_key))) return 0;
    if (f->window == 0 && !json_field(r, f->window_key)) return 0;
    return json_integer(r, f->window_key, 1, CONFIG_MAX_POSITIONS, f->window);
}

// "layer_types": a name for each layer.
static void layer_types_parse(struct model_config *c, const cJSON *list, bool *windowed, struct json_reader *r)
{
    const cJSON *item;
    int32_t i = 0;
    cJSON_ArrayForEach(item, list)
    {
        const char *name = cJSON_IsString(item) ? item->valuestring : "";
        bool is_windowed = !strcmp(name, "sliding_attention");
        if (i == c->n_layers) break;
        if (!is_windowed && strcmp(name, "full_attention")) {
            json_fail(r, ERR_UNSUPPORTED, "layer_types", "%.40s is none of full_attention, sliding_attention", name);
        }
        if (is_windowed && !c->family->window_key) json_fail(r, ERR_UNSUPPORTED, "layer_types", "windows are not of this family");
        windowed[i++] = is_windowed;
    }
    if (!cJSON_IsArray(list) || item || i != c->n_layers) {
        json_fail(r, ERR_FORMAT, "layer_types", "not a list of %d names", c->n_layers);
    }
}

static void windowed_by_rule(const struct model_config *c, bool *windowed, struct json_reader *r)
{
    const struct family *f = c->family;
    int32_t first = 0, period = 0;
    if (f->first_windowed_key) first = json_integer(r, f->first_windowed_key, 0, INT32_MAX, f->first_windowed);
    if (f->window_period) period = f->window_period;
    if (f->window_period_key) period = json_integer(r, f->window_period_key, 1, MAX_LAYERS, f->window_period);
    for (int32_t i = 0; i < c->n_layers; i++) windowed[i] = i >= first && !(period && (i + 1) % period == 0);
}

void layer_kinds_parse(struct model_config *c, struct json_reader *r)
{
    bool windowed[MAX_LAYERS] = {false};
    const cJSON *types = json_field(r, "layer_types");
    int32_t window = window_parse(c->family, r), n_windowed = 0;
    if (types) layer_types_parse(c, types, windowed, r);
    else if (c->family->window_key) windowed_by_rule(c, windowed, r);
    for (int32_t i = 0; i < c->n_layers; i++) {
        if (window == 0 && !c->family->local_theta_key) windowed[i] = false;
        n_windowed += windowed[i];
    }
    bool has_full = n_windowed < c->n_layers;
    if (has_full) c->kinds[c->n_kinds++] = (struct layer_kind){.n_layers = c->n_layers - n_windowed};
    if (n_windowed) c->kinds[c->n_kinds++] = (struct layer_kind){.n_layers = n_windowed, .window = window};
    for (int32_t i = 0; i < c->n_layers; i++) c->kind_of_layer[i] = windowed[i] && has_full;
    if (c->family->positions != POSITIONS_ROPE) return;
    for (int32_t i = 0; i < c->n_kinds; i++) rope_parse(&c->kinds[i].rope, c, i == 1 || !has_full, r);
    c->max_model_len = rope_max_model_len(c->family, &c->kinds[0].rope);
}
