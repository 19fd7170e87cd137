#include "server/request_fields.h"

#include "server/json_get.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_STOPS = 4,
    MAX_STOP_IDS = 256,
    MAX_BAD_WORDS = 256,
    MAX_BAD_WORD_BYTES = 256,
    MAX_SALT_BYTES = 1024,
    MAX_N = 128,
    DEFAULT_CONTEXTS = 256, // max_request_tokens 0: so many
};

static const float MAX_PENALTY = 2, MAX_BIAS = 100;

int fields_invalid(struct request_fields *p, const char *param, const char *message)
{
    return http_error_set(p->error, 400, NULL, param, "'%s' %s", param, message);
}

int fields_no_memory(struct request_fields *p) { return http_error_set(p->error, 503, NULL, NULL, "out of memory"); }

int fields_result(struct request_fields *p, int failed) { return failed ? http_error_from_json(p->error, &p->json) : 0; }

int fields_nested_error(struct request_fields *p, const char *name)
{
    char param[sizeof p->error->param];
    snprintf(param, sizeof param, "%s.%s", name, p->json.param);
    return http_error_from(p->error, &p->json.error, param);
}

// ---- which fields ----

// {"type": "text"}: what is answered anyway.
static bool is_plain_text_format(const cJSON *value)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(value, "type");
    return cJSON_GetArraySize(value) == 1 && cJSON_IsString(type) && !strcmp(type->valuestring, "text");
}

static int check_model(struct request_fields *p)
{
    const struct server_options *o = p->limits->options;
    const char *model = NULL;
    if (json_require(p->body.root, "model", &p->json) ||
        json_get_string(p->body.root, "model", 1, SIZE_MAX, &model, &p->json))
        return fields_result(p, -1);
    for (size_t i = 0; i < o->n_served_model_names; i++)
        if (!strcmp(o->served_model_names[i], model)) return 0;
    return http_error_set(p->error, 404, "model_not_found", "model", "the model `%.*s` does not exist",
                          json_clip(model, 200), model);
}

int fields_check(struct request_fields *p, const struct field_names *names)
{
    const cJSON *root = p->body.root;
    if (json_check_known(root, names->known, names->n_known, &p->json)) return fields_result(p, -1);
    for (size_t i = 0; i < names->n_unsupported; i++) {
        const char *name = names->unsupported[i];
        const cJSON *value = json_find(root, name);
        if (value && is_plain_text_format(value) && !strcmp(name, "response_format")) continue;
        if (value && !cJSON_IsFalse(value)) return fields_invalid(p, name, "is not supported by this server");
    }
    const cJSON *user = cJSON_GetObjectItemCaseSensitive(root, "user");
    if (user && !cJSON_IsString(user)) return fields_invalid(p, "user", "must be a string");
    return check_model(p);
}

// ---- plain values ----

static int parse_bools(struct request_fields *p)
{
    struct completion_request *r = p->r;
    const cJSON *o = p->body.root;
    struct json_error *e = &p->json;
    r->skip_special_tokens = true;
    return fields_result(p, json_get_bool(o, "stream", &r->stream, e) ||
                                json_get_bool(o, "ignore_eos", &r->params.ignore_eos, e) ||
                                json_get_bool(o, "add_special_tokens", &p->add_special_tokens, e) ||
                                json_get_bool(o, "skip_special_tokens", &r->skip_special_tokens, e) ||
                                json_get_bool(o, "include_stop_str_in_output", &r->include_stop, e) ||
                                json_get_bool(o, "return_token_ids", &r->return_token_ids, e) ||
                                json_get_bool(o, "return_tokens_as_token_ids", &r->tokens_as_ids, e));
}

static int parse_numbers(struct request_fields *p)
{
    struct completion_request *r = p->r;
    struct sampling_params *s = &r->params;
    const cJSON *o = p->body.root;
    struct json_error *e = &p->json;
    r->prompt_logprobs = -1;
    r->n = 1;
    s->temperature = s->top_p = s->repetition_penalty = 1;
    if (json_get_int32(o, "min_tokens", 0, INT32_MAX, &s->min_tokens, e) ||
        json_get_int32(o, "n", 1, MAX_N, &r->n, e) ||
        json_get_float(o, "temperature", 0, 2, &s->temperature, e) ||
        json_get_float(o, "top_p", 0, 1, &s->top_p, e) || json_get_float(o, "min_p", 0, 1, &s->min_p, e) ||
        json_get_int32(o, "top_k", -1, INT32_MAX, &s->top_k, e) ||
        json_get_float(o, "frequency_penalty", -MAX_PENALTY, MAX_PENALTY, &s->frequency_penalty, e) ||
        json_get_float(o, "presence_penalty", -MAX_PENALTY, MAX_PENALTY, &s->presence_penalty, e) ||
        json_get_float(o, "repetition_penalty", 0, MAX_PENALTY, &s->repetition_penalty, e) ||
        json_get_int32(o, "prompt_logprobs", 0, p->limits->options->max_logprobs, &r->prompt_logprobs, e) ||
        json_get_int32(o, "priority", INT32_MIN, INT32_MAX, &s->priority, e) ||
        json_body_int64(&p->body, "seed", &s->has_seed, &s->seed, e))
        return fields_result(p, -1);
    if (s->top_p <= 0) return fields_invalid(p, "top_p", "must be greater than 0");
    if (s->repetition_penalty <= 0) return fields_invalid(p, "repetition_penalty", "must be greater than 0");
    if (s->top_k < 0) s->top_k = 0; // -1 is vLLM's "off"
    s->n = r->n;
    s->prompt_logprobs = r->prompt_logprobs;
    return 0;
}

int fields_check_min_tokens(struct request_fields *p)
{
    const struct sampling_params *s = &p->r->params;
    if (s->min_tokens <= s->max_tokens) return 0;
    return http_error_set(p->error, 400, NULL, "min_tokens", "'min_tokens' is %d, more than the %d tokens of %s",
                          s->min_tokens, s->max_tokens, p->max_tokens_name);
}

static int parse_stream_options(struct request_fields *p)
{
    static const char *const known[] = {"continuous_usage_stats", "include_obfuscation", "include_usage"};
    const cJSON *options = NULL;
    bool ignored, continuous = false;
    if (json_get_object(p->body.root, "stream_options", &options, &p->json)) return fields_result(p, -1);
    if (!options) return 0;
    if (!p->r->stream) return fields_invalid(p, "stream_options", "is only allowed with stream");
    if (json_check_known(options, known, LENGTH(known), &p->json) ||
        json_get_bool(options, "include_usage", &p->r->include_usage, &p->json) ||
        json_get_bool(options, "include_obfuscation", &ignored, &p->json) ||
        json_get_bool(options, "continuous_usage_stats", &continuous, &p->json))
        return fields_nested_error(p, "stream_options");
    return continuous ? fields_invalid(p, "stream_options", "asks for continuous_usage_stats, which is not supported") : 0;
}

// ---- lists ----

static int parse_stops(struct request_fields *p)
{
    const char *stops[MAX_STOPS];
    size_t n = 0;
    if (json_get_strings(p->body.root, "stop", 1, MAX_STOPS, 1, STOP_MAX_BYTES, stops, &n, &p->json))
        return fields_result(p, -1);
    if (n == 0) return 0;
    if (!p->limits->tokenizer) return fields_invalid(p, "stop", "needs a tokenizer: use stop_token_ids");
    struct error e;
    int failed = stop_matcher_create(&p->r->stop, stops, n, p->r->include_stop, &e);
    return failed ? http_error_from(p->error, &e, "stop") : 0;
}

static int parse_id_lists(struct request_fields *p)
{
    struct sampling_params *s = &p->r->params;
    const cJSON *o = p->body.root;
    int32_t vocab_size = p->limits->plan->vocab_size;
    if (json_get_int32s(o, "stop_token_ids", 0, vocab_size - 1, MAX_STOP_IDS, &s->stop_token_ids, &s->n_stop_token_ids,
                        &p->json) ||
        json_get_int32s(o, "allowed_token_ids", 0, vocab_size - 1, (size_t)vocab_size, &s->allowed_token_ids,
                        &s->n_allowed_token_ids, &p->json))
        return fields_result(p, -1);
    if (json_find(o, "allowed_token_ids") && s->n_allowed_token_ids == 0)
        return fields_invalid(p, "allowed_token_ids", "must not be empty");
    return 0;
}

// A key of logit_bias: a token id in plain decimal digits. -1: something else.
static int64_t parse_token_id(const char *s)
{
    if (*s < '0' || *s > '9' || (s[0] == '0' && s[1]) || strlen(s) > 10) return -1;
    char *end;
    int64_t id = strtoll(s, &end, 10);
    return *end ? -1 : id;
}

static int parse_logit_bias(struct request_fields *p)
{
    struct sampling_params *s = &p->r->params;
    const cJSON *map = NULL, *entry;
    if (json_get_object(p->body.root, "logit_bias", &map, &p->json)) return fields_result(p, -1);
    size_t n = map ? (size_t)cJSON_GetArraySize(map) : 0;
    if (n == 0) return 0;
    s->logit_bias = calloc(n, sizeof *s->logit_bias);
    if (!s->logit_bias) return fields_no_memory(p);
    cJSON_ArrayForEach(entry, map)
    {
        int64_t id = parse_token_id(entry->string);
        if (id < 0 || id >= p->limits->plan->vocab_size)
            return http_error_set(p->error, 400, NULL, "logit_bias", "'logit_bias': `%.*s` is not a token id below %d",
                                  json_clip(entry->string, 32), entry->string, p->limits->plan->vocab_size);
        if (!cJSON_IsNumber(entry) || !(fabs(entry->valuedouble) <= MAX_BIAS))
            return http_error_set(p->error, 400, NULL, "logit_bias",
                                  "'logit_bias': the bias of token %d is not a number from -100 to 100", (int32_t)id);
        s->logit_bias[s->n_logit_bias++] = (struct logit_bias){(int32_t)id, (float)entry->valuedouble};
    }
    return 0;
}

// ---- bad words ----

static int append_bad_word(struct request_fields *p, const int32_t *ids, size_t n)
{
    struct sampling_params *s = &p->r->params;
    int32_t begin = s->bad_word_offsets[s->n_bad_words];
    int32_t *grown = realloc(s->bad_word_ids, ((size_t)begin + n) * sizeof *grown);
    if (!grown) return fields_no_memory(p);
    s->bad_word_ids = grown;
    memcpy(grown + begin, ids, n * sizeof *ids);
    s->bad_word_offsets[++s->n_bad_words] = begin + (int32_t)n;
    return 0;
}

// The ids of text, less those that end within its first `skip` bytes. *n is 0 when no token begins exactly there.
static int encode_after(struct request_fields *p, const char *text, size_t skip, int32_t **ids, size_t *first, size_t *n)
{
    const struct tokenizer *t = p->limits->tokenizer;
    char message[256];
    size_t n_ids, left = 0, length;
    if (tokenizer_encode(t, text, strlen(text), false, false, ids, &n_ids, message, sizeof message))
        return http_error_set(p->error, 400, NULL, "bad_words", "'bad_words': %s", message);
    // From the end: a tokenizer may have put a space before the text.
    size_t wanted = strlen(text) - skip;
    size_t i = n_ids;
    while (i > 0 && left < wanted) {
        tokenizer_token_bytes(t, (*ids)[--i], &length);
        left += length;
    }
    *first = i;
    *n = left == wanted ? n_ids - i : 0;
    return 0;
}

// A word is one sequence of ids at the start of a word and another inside running text; both are kept out.
static int parse_bad_word(struct request_fields *p, const char *word)
{
    char text[MAX_BAD_WORD_BYTES + 2];
    int32_t *ids;
    size_t first, n;
    text[0] = '\n';
    strcpy(text + 1, word);
    if (encode_after(p, text, 1, &ids, &first, &n)) return -1;
    int failed = n ? append_bad_word(p, ids + first, n) : 0;
    free(ids);
    text[0] = ' ';
    if (failed || encode_after(p, text + (word[0] == ' '), 0, &ids, &first, &n)) return -1;
    failed = n ? append_bad_word(p, ids + first, n) : 0;
    free(ids);
    return failed;
}

static int parse_bad_words(struct request_fields *p)
{
    const char *words[MAX_BAD_WORDS];
    size_t n = 0;
    if (json_get_strings(p->body.root, "bad_words", 0, MAX_BAD_WORDS, 1, MAX_BAD_WORD_BYTES, words, &n, &p->json))
        return fields_result(p, -1);
    if (n == 0) return 0;
    if (!p->limits->tokenizer) return fields_invalid(p, "bad_words", "needs a tokenizer, which this model does not have");
    p->r->params.bad_word_offsets = calloc(2 * n + 1, sizeof(int32_t));
    if (!p->r->params.bad_word_offsets) return fields_no_memory(p);
    for (size_t i = 0; i < n; i++)
        if (parse_bad_word(p, words[i])) return -1;
    return 0;
}

// ---- salt ----

static uint64_t hash_bytes(uint64_t hash, const char *s) // FNV-1a, the final NUL included
{
    do hash = (hash ^ (unsigned char)*s) * 0x100000001b3;
    while (*s++);
    return hash;
}

static int parse_salt(struct request_fields *p, const char *api_key)
{
    const char *salt = NULL;
    if (json_get_string(p->body.root, "cache_salt", 1, MAX_SALT_BYTES, &salt, &p->json)) return fields_result(p, -1);
    uint64_t hash = hash_bytes(hash_bytes(0xcbf29ce484222325, api_key ? api_key : ""), salt ? salt : "");
    p->r->params.cache_salt = !api_key && !salt ? 0 : hash ? hash : 1;
    return 0;
}

int fields_add_stop_ids(struct request_fields *p, const int32_t *ids, int32_t n)
{
    struct sampling_params *s = &p->r->params;
    int32_t *all = realloc(s->stop_token_ids, (size_t)(s->n_stop_token_ids + n) * sizeof *all);
    if (!all) return fields_no_memory(p);
    s->stop_token_ids = all;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < p->limits->plan->vocab_size) all[s->n_stop_token_ids++] = ids[i];
    return 0;
}

// The tokenizer's EOS ends an answer, too: of many a fine-tuned model it is not the one that config.json names.
static int add_eos(struct request_fields *p)
{
    const struct engine_plan *plan = p->limits->plan;
    int32_t id = p->limits->tokenizer ? tokenizer_eos_id(p->limits->tokenizer) : -1;
    if (id < 0 || p->r->params.ignore_eos) return 0;
    for (int32_t i = 0; i < plan->n_eos_token_ids; i++)
        if (plan->eos_token_ids[i] == id) return 0;
    return fields_add_stop_ids(p, &id, 1);
}

int fields_parse_shared(struct request_fields *p, const char *api_key)
{
    return parse_bools(p) || parse_numbers(p) || parse_stream_options(p) || parse_stops(p) || parse_id_lists(p) ||
           add_eos(p) || parse_logit_bias(p) || parse_bad_words(p) || parse_salt(p, api_key) ? -1 : 0;
}

// ---- prompts ----

int fields_set_n_prompts(struct request_fields *p, size_t n)
{
    const struct server_options *o = p->limits->options;
    if (n == 0) return fields_invalid(p, p->prompt_name, "must not be empty");
    const char *param = n > 1 ? p->prompt_name : "n";
    if (n > (size_t)o->max_prompts || n * (size_t)p->r->params.n > (size_t)o->max_choices)
        return http_error_set(p->error, 400, NULL, param,
                              "'%s': %zu prompts with %d choices each; the most is %d prompts, %d choices in all",
                              param, n, p->r->params.n, o->max_prompts, o->max_choices);
    p->r->prompts = calloc(n, sizeof *p->r->prompts);
    if (!p->r->prompts) return fields_no_memory(p);
    p->r->n_prompts = (int32_t)n;
    return 0;
}

int fields_check_context(struct request_fields *p, size_t n_ids)
{
    int32_t context = p->limits->plan->max_model_len, max_tokens = p->r->params.max_tokens;
    if (n_ids <= (size_t)context && max_tokens <= context - (int32_t)n_ids) return 0;
    return http_error_set(p->error, 400, "context_length_exceeded",
                          n_ids < (size_t)context ? p->max_tokens_name : p->prompt_name,
                          "the context is %d tokens; asked for were %zu (%zu in the prompt, %d for the completion)",
                          context, n_ids + (size_t)max_tokens, n_ids, max_tokens);
}

int fields_set_ids(struct request_fields *p, struct completion_prompt *prompt, const int32_t *ids, size_t n)
{
    int32_t vocab_size = p->limits->plan->vocab_size;
    if (n == 0) return fields_invalid(p, p->prompt_name, "must not be empty");
    if (fields_check_context(p, n)) return -1;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab_size)
            return http_error_set(p->error, 400, NULL, p->prompt_name,
                                  "'%s': token id %d is outside the vocabulary of %d", p->prompt_name, ids[i], vocab_size);
    prompt->ids = malloc(n * sizeof *ids);
    if (!prompt->ids) return fields_no_memory(p);
    memcpy(prompt->ids, ids, n * sizeof *ids);
    prompt->n_ids = (int32_t)n;
    return 0;
}

int fields_check_bytes(struct request_fields *p, size_t length)
{
    const struct completion_limits *l = p->limits;
    size_t at_least = l->max_token_bytes ? length / l->max_token_bytes : 0;
    if (at_least <= (size_t)l->plan->max_model_len) return 0;
    return http_error_set(p->error, 400, "context_length_exceeded", p->prompt_name,
                          "the context is %d tokens; a prompt of %zu bytes has at least %zu", l->plan->max_model_len,
                          length, at_least);
}

int fields_encode(struct request_fields *p, const char *text, size_t length, bool add_special, int32_t **ids, size_t *n)
{
    const struct completion_limits *l = p->limits;
    char message[256];
    if (fields_check_bytes(p, length)) return -1; // cheap, so first
    if (tokenizer_encode(l->tokenizer, text, length, add_special, true, ids, n, message, sizeof message))
        return http_error_set(p->error, 400, NULL, p->prompt_name, "'%s': %s", p->prompt_name, message);
    return 0;
}

// ---- the whole ----

int64_t completion_max_tokens(const struct completion_limits *limits)
{
    int64_t max = limits->options->max_request_tokens;
    return max ? max : (int64_t)DEFAULT_CONTEXTS * limits->plan->max_model_len;
}

// Times that a token with log-probabilities counts: once for itself, once for each alternative.
static int64_t weight(int32_t logprobs) { return 1 + (logprobs > 0 ? logprobs : 0); }

// The prompt is computed once, but what the answer repeats of it is written once for each choice.
struct share {
    const char *param;
    int64_t tokens;
};

enum { N_SHARES = 5 };

static void find_shares(const struct request_fields *p, int32_t max_tokens, struct share shares[N_SHARES])
{
    const struct completion_request *r = p->r;
    int64_t n_ids = 0;
    for (int32_t i = 0; i < r->n_prompts; i++) n_ids += r->prompts[i].n_ids;
    shares[0] = (struct share){p->prompt_name, n_ids};
    shares[1] = (struct share){p->max_tokens_name,
                               (int64_t)r->n_prompts * r->params.n * max_tokens * weight(r->logprobs)};
    shares[2] = (struct share){"echo", r->echo ? n_ids * r->n * weight(r->logprobs) : 0};
    shares[3] = (struct share){"prompt_logprobs",
                               r->prompt_logprobs >= 0 ? n_ids * r->n * weight(r->prompt_logprobs) : 0};
    shares[4] = (struct share){"return_token_ids", r->return_token_ids ? n_ids * r->n : 0};
}

int64_t fields_allowed_max_tokens(const struct request_fields *p)
{
    const struct completion_request *r = p->r;
    struct share shares[N_SHARES];
    int64_t left = completion_max_tokens(p->limits);
    find_shares(p, 0, shares);
    for (size_t i = 0; i < N_SHARES; i++) left -= shares[i].tokens;
    return left / (r->n_prompts * r->params.n * weight(r->logprobs));
}

// The field that the most tokens are due to is the one to name.
int fields_check_total(struct request_fields *p)
{
    struct share shares[N_SHARES];
    int64_t max = completion_max_tokens(p->limits), total = 0;
    size_t most = 0;
    find_shares(p, p->r->params.max_tokens, shares);
    for (size_t i = 0; i < N_SHARES; i++) {
        total += shares[i].tokens;
        if (shares[i].tokens > shares[most].tokens) most = i;
    }
    if (total <= max) return 0;
    return http_error_set(p->error, 400, NULL, shares[most].param,
                          "'%s': all prompts and choices, with what is asked about each of their tokens, may come to "
                          "%lld tokens; the most is %lld", shares[most].param, (long long)total, (long long)max);
}

int64_t completion_request_tokens(const struct completion_request *r)
{
    int64_t n = (int64_t)r->n_prompts * r->params.n * r->params.max_tokens;
    for (int32_t i = 0; i < r->n_prompts; i++) n += r->prompts[i].n_ids;
    return n;
}

void completion_request_deinit(struct completion_request *r)
{
    for (int32_t i = 0; i < r->n_prompts; i++) {
        free(r->prompts[i].ids);
        free(r->prompts[i].text);
    }
    free(r->prompts);
    free(r->params.stop_token_ids);
    free(r->params.logit_bias);
    free(r->params.allowed_token_ids);
    free(r->params.bad_word_ids);
    free(r->params.bad_word_offsets);
    stop_matcher_destroy(r->stop);
    *r = (struct completion_request){0};
}
