#include "server/completion_request.h"

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
    MAX_BEST_OF = 20, // or n, if that is more
    DEFAULT_CONTEXTS = 256, // max_request_tokens 0: so many
};

static const float MAX_PENALTY = 2, MAX_BIAS = 100;

#define LENGTH(array) (sizeof(array) / sizeof *(array))

// Every field we know, sorted.
static const char *const known_fields[] = {
    "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "cache_salt", "echo", "frequency_penalty",
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
    "guided_whitespace_pattern", "ignore_eos", "include_stop_str_in_output", "kv_transfer_params", "length_penalty",
    "logit_bias", "logits_processors", "logprobs", "max_tokens", "metadata", "min_p", "min_tokens", "model", "n",
    "presence_penalty", "priority", "prompt", "prompt_cache_key", "prompt_cache_retention", "prompt_embeds",
    "prompt_logprobs", "repetition_penalty", "request_id", "response_format", "return_token_ids",
    "return_tokens_as_token_ids", "safety_identifier", "seed", "service_tier", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "store", "stream", "stream_options",
    "structural_tag", "structured_outputs", "suffix", "temperature", "top_k", "top_p", "truncate_prompt_tokens",
    "use_beam_search", "user", "vllm_xargs",
};

// Those that would change the answer, and that we don't have: only null and false are taken.
static const char *const unsupported_fields[] = {
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
    "guided_whitespace_pattern", "kv_transfer_params", "logits_processors", "prompt_embeds", "response_format",
    "structural_tag", "structured_outputs", "truncate_prompt_tokens", "use_beam_search", "vllm_xargs",
};

// One parse: what the steps share.
struct parse {
    struct completion_request *r;
    const struct completion_limits *limits;
    struct json_body body;
    struct json_error json;
    struct http_error *error;
    bool add_special_tokens;
};

static int invalid(struct parse *p, const char *param, const char *message)
{
    return http_error_set(p->error, 400, NULL, param, "'%s' %s", param, message);
}

static int no_memory(struct parse *p) { return http_error_set(p->error, 503, NULL, NULL, "out of memory"); }

// What a getter returned.
static int json_result(struct parse *p, int failed) { return failed ? http_error_from_json(p->error, &p->json) : 0; }

// What a getter returned that looked into the object called name.
static int nested_result(struct parse *p, const char *name)
{
    char param[sizeof p->error->param];
    snprintf(param, sizeof param, "%s.%s", name, p->json.param);
    return http_error_from(p->error, &p->json.error, param);
}

// ---- fields ----

// {"type": "text"}: what is answered anyway.
static bool is_plain_text_format(const cJSON *value)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(value, "type");
    return cJSON_GetArraySize(value) == 1 && cJSON_IsString(type) && !strcmp(type->valuestring, "text");
}

static int check_fields(struct parse *p)
{
    const cJSON *root = p->body.root;
    if (json_check_known(root, known_fields, LENGTH(known_fields), &p->json)) return json_result(p, -1);
    for (size_t i = 0; i < LENGTH(unsupported_fields); i++) {
        const cJSON *value = json_find(root, unsupported_fields[i]);
        if (value && is_plain_text_format(value) && !strcmp(unsupported_fields[i], "response_format")) continue;
        if (value && !cJSON_IsFalse(value)) return invalid(p, unsupported_fields[i], "is not supported by this server");
    }
    const cJSON *user = cJSON_GetObjectItemCaseSensitive(root, "user");
    if (user && !cJSON_IsString(user)) return invalid(p, "user", "must be a string");
    const char *suffix = "";
    if (json_get_string(root, "suffix", 0, SIZE_MAX, &suffix, &p->json)) return json_result(p, -1);
    return *suffix ? invalid(p, "suffix", "needs tokens to fill in the middle, which this model does not have") : 0;
}

static int check_model(struct parse *p)
{
    const struct server_options *o = p->limits->options;
    const char *model = NULL;
    if (json_require(p->body.root, "model", &p->json) ||
        json_get_string(p->body.root, "model", 1, SIZE_MAX, &model, &p->json))
        return json_result(p, -1);
    for (size_t i = 0; i < o->n_served_model_names; i++)
        if (!strcmp(o->served_model_names[i], model)) return 0;
    return http_error_set(p->error, 404, "model_not_found", "model", "the model `%.*s` does not exist",
                          json_clip(model, 200), model);
}

static int parse_bools(struct parse *p)
{
    struct completion_request *r = p->r;
    const cJSON *o = p->body.root;
    struct json_error *e = &p->json;
    r->skip_special_tokens = p->add_special_tokens = true;
    return json_result(p, json_get_bool(o, "echo", &r->echo, e) || json_get_bool(o, "stream", &r->stream, e) ||
                              json_get_bool(o, "ignore_eos", &r->params.ignore_eos, e) ||
                              json_get_bool(o, "add_special_tokens", &p->add_special_tokens, e) ||
                              json_get_bool(o, "skip_special_tokens", &r->skip_special_tokens, e) ||
                              json_get_bool(o, "include_stop_str_in_output", &r->include_stop, e) ||
                              json_get_bool(o, "return_token_ids", &r->return_token_ids, e) ||
                              json_get_bool(o, "return_tokens_as_token_ids", &r->tokens_as_ids, e));
}

static int parse_numbers(struct parse *p)
{
    struct completion_request *r = p->r;
    struct sampling_params *s = &r->params;
    const cJSON *o = p->body.root;
    struct json_error *e = &p->json;
    int32_t max_logprobs = p->limits->options->max_logprobs;
    r->logprobs = r->prompt_logprobs = -1;
    r->n = 1;
    s->max_tokens = 16;
    s->temperature = s->top_p = s->repetition_penalty = 1;
    if (json_get_int32(o, "max_tokens", 0, INT32_MAX, &s->max_tokens, e) ||
        json_get_int32(o, "min_tokens", 0, INT32_MAX, &s->min_tokens, e) ||
        json_get_int32(o, "n", 1, MAX_N, &r->n, e) ||
        json_get_float(o, "temperature", 0, 2, &s->temperature, e) ||
        json_get_float(o, "top_p", 0, 1, &s->top_p, e) || json_get_float(o, "min_p", 0, 1, &s->min_p, e) ||
        json_get_int32(o, "top_k", -1, INT32_MAX, &s->top_k, e) ||
        json_get_float(o, "frequency_penalty", -MAX_PENALTY, MAX_PENALTY, &s->frequency_penalty, e) ||
        json_get_float(o, "presence_penalty", -MAX_PENALTY, MAX_PENALTY, &s->presence_penalty, e) ||
        json_get_float(o, "repetition_penalty", 0, MAX_PENALTY, &s->repetition_penalty, e) ||
        json_get_int32(o, "logprobs", 0, max_logprobs, &r->logprobs, e) ||
        json_get_int32(o, "prompt_logprobs", 0, max_logprobs, &r->prompt_logprobs, e) ||
        json_get_int32(o, "priority", INT32_MIN, INT32_MAX, &s->priority, e) ||
        json_body_int64(&p->body, "seed", &s->has_seed, &s->seed, e))
        return json_result(p, -1);
    if (s->top_p <= 0) return invalid(p, "top_p", "must be greater than 0");
    if (s->repetition_penalty <= 0) return invalid(p, "repetition_penalty", "must be greater than 0");
    if (s->min_tokens > s->max_tokens) return invalid(p, "min_tokens", "must not be greater than max_tokens");
    if (s->top_k < 0) s->top_k = 0; // -1 is vLLM's "off"
    return 0;
}

static int parse_best_of(struct parse *p)
{
    struct completion_request *r = p->r;
    int32_t max = r->n > MAX_BEST_OF ? r->n : MAX_BEST_OF;
    r->params.n = r->n;
    if (json_get_int32(p->body.root, "best_of", r->n, max, &r->params.n, &p->json)) return json_result(p, -1);
    if (json_find(p->body.root, "best_of") && r->stream && r->params.n > 1)
        return invalid(p, "best_of", "cannot be streamed");
    bool ranks = r->params.n > r->n;
    r->params.logprobs = ranks && r->logprobs < 0 ? 0 : r->logprobs;
    r->params.prompt_logprobs = r->echo && r->logprobs > r->prompt_logprobs ? r->logprobs : r->prompt_logprobs;
    return 0;
}

static int parse_stream_options(struct parse *p)
{
    static const char *const known[] = {"continuous_usage_stats", "include_obfuscation", "include_usage"};
    const cJSON *options = NULL;
    bool ignored, continuous = false;
    if (json_get_object(p->body.root, "stream_options", &options, &p->json)) return json_result(p, -1);
    if (!options) return 0;
    if (!p->r->stream) return invalid(p, "stream_options", "is only allowed with stream");
    if (json_check_known(options, known, LENGTH(known), &p->json) ||
        json_get_bool(options, "include_usage", &p->r->include_usage, &p->json) ||
        json_get_bool(options, "include_obfuscation", &ignored, &p->json) ||
        json_get_bool(options, "continuous_usage_stats", &continuous, &p->json))
        return nested_result(p, "stream_options");
    return continuous ? invalid(p, "stream_options", "asks for continuous_usage_stats, which is not supported") : 0;
}

static int parse_stops(struct parse *p)
{
    const char *stops[MAX_STOPS];
    size_t n = 0;
    if (json_get_strings(p->body.root, "stop", 1, MAX_STOPS, 1, STOP_MAX_BYTES, stops, &n, &p->json))
        return json_result(p, -1);
    if (n == 0) return 0;
    if (!p->limits->tokenizer) return invalid(p, "stop", "needs a tokenizer: use stop_token_ids");
    struct error e;
    int failed = stop_matcher_create(&p->r->stop, stops, n, p->r->include_stop, &e);
    return failed ? http_error_from(p->error, &e, "stop") : 0;
}

static int parse_id_lists(struct parse *p)
{
    struct sampling_params *s = &p->r->params;
    const cJSON *o = p->body.root;
    int32_t vocab_size = p->limits->plan->vocab_size;
    if (json_get_int32s(o, "stop_token_ids", 0, vocab_size - 1, MAX_STOP_IDS, &s->stop_token_ids, &s->n_stop_token_ids,
                        &p->json) ||
        json_get_int32s(o, "allowed_token_ids", 0, vocab_size - 1, (size_t)vocab_size, &s->allowed_token_ids,
                        &s->n_allowed_token_ids, &p->json))
        return json_result(p, -1);
    if (json_find(o, "allowed_token_ids") && s->n_allowed_token_ids == 0)
        return invalid(p, "allowed_token_ids", "must not be empty");
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

static int parse_logit_bias(struct parse *p)
{
    struct sampling_params *s = &p->r->params;
    const cJSON *map = NULL, *entry;
    if (json_get_object(p->body.root, "logit_bias", &map, &p->json)) return json_result(p, -1);
    size_t n = map ? (size_t)cJSON_GetArraySize(map) : 0;
    if (n == 0) return 0;
    s->logit_bias = calloc(n, sizeof *s->logit_bias);
    if (!s->logit_bias) return no_memory(p);
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

static int append_bad_word(struct parse *p, const int32_t *ids, size_t n)
{
    struct sampling_params *s = &p->r->params;
    int32_t begin = s->bad_word_offsets[s->n_bad_words];
    int32_t *grown = realloc(s->bad_word_ids, ((size_t)begin + n) * sizeof *grown);
    if (!grown) return no_memory(p);
    s->bad_word_ids = grown;
    memcpy(grown + begin, ids, n * sizeof *ids);
    s->bad_word_offsets[++s->n_bad_words] = begin + (int32_t)n;
    return 0;
}

// The ids of text, less those that end within its first `skip` bytes. *n is 0 when no token begins exactly there.
static int encode_after(struct parse *p, const char *text, size_t skip, int32_t **ids, size_t *first, size_t *n)
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
static int parse_bad_word(struct parse *p, const char *word)
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

static int parse_bad_words(struct parse *p)
{
    const char *words[MAX_BAD_WORDS];
    size_t n = 0;
    if (json_get_strings(p->body.root, "bad_words", 0, MAX_BAD_WORDS, 1, MAX_BAD_WORD_BYTES, words, &n, &p->json))
        return json_result(p, -1);
    if (n == 0) return 0;
    if (!p->limits->tokenizer) return invalid(p, "bad_words", "needs a tokenizer, which this model does not have");
    p->r->params.bad_word_offsets = calloc(2 * n + 1, sizeof(int32_t));
    if (!p->r->params.bad_word_offsets) return no_memory(p);
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

static int parse_salt(struct parse *p, const char *api_key)
{
    const char *salt = NULL;
    if (json_get_string(p->body.root, "cache_salt", 1, MAX_SALT_BYTES, &salt, &p->json)) return json_result(p, -1);
    uint64_t hash = hash_bytes(hash_bytes(0xcbf29ce484222325, api_key ? api_key : ""), salt ? salt : "");
    p->r->params.cache_salt = !api_key && !salt ? 0 : hash ? hash : 1;
    return 0;
}

// ---- prompts ----

static int check_n_prompts(struct parse *p, size_t n)
{
    const struct server_options *o = p->limits->options;
    if (n == 0) return invalid(p, "prompt", "must not be empty");
    if (n > (size_t)o->max_prompts || n * (size_t)p->r->params.n > (size_t)o->max_choices)
        return http_error_set(p->error, 400, NULL, "prompt",
                              "'prompt': %zu prompts with %d choices each; the most is %d prompts, %d choices in all",
                              n, p->r->params.n, o->max_prompts, o->max_choices);
    p->r->prompts = calloc(n, sizeof *p->r->prompts);
    if (!p->r->prompts) return no_memory(p);
    p->r->n_prompts = (int32_t)n;
    return 0;
}

static int check_context(struct parse *p, size_t n_ids)
{
    int32_t context = p->limits->plan->max_model_len, max_tokens = p->r->params.max_tokens;
    if (n_ids <= (size_t)context && max_tokens <= context - (int32_t)n_ids) return 0;
    return http_error_set(p->error, 400, "context_length_exceeded", n_ids < (size_t)context ? "max_tokens" : "prompt",
                          "the context is %d tokens; asked for were %zu (%zu in the prompt, %d for the completion)",
                          context, n_ids + (size_t)max_tokens, n_ids, max_tokens);
}

static int set_ids(struct parse *p, struct completion_prompt *prompt, const int32_t *ids, size_t n)
{
    int32_t vocab_size = p->limits->plan->vocab_size;
    if (n == 0) return invalid(p, "prompt", "must not be empty");
    if (check_context(p, n)) return -1;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab_size)
            return http_error_set(p->error, 400, NULL, "prompt",
                                  "'prompt': token id %d is outside the vocabulary of %d", ids[i], vocab_size);
    prompt->ids = malloc(n * sizeof *ids);
    if (!prompt->ids) return no_memory(p);
    memcpy(prompt->ids, ids, n * sizeof *ids);
    prompt->n_ids = (int32_t)n;
    return 0;
}

static int parse_ids(struct parse *p)
{
    const struct json_ids *lists = &p->body.ids;
    if (check_n_prompts(p, lists->n_lists)) return -1;
    for (size_t i = 0; i < lists->n_lists; i++) {
        struct completion_prompt *prompt = &p->r->prompts[i];
        if (set_ids(p, prompt, lists->ids + lists->offsets[i], lists->offsets[i + 1] - lists->offsets[i])) return -1;
        if (!p->r->echo || !p->limits->tokenizer) continue;
        char message[256];
        if (tokenizer_decode(p->limits->tokenizer, prompt->ids, (size_t)prompt->n_ids, p->r->skip_special_tokens,
                             &prompt->text, &prompt->text_length, message, sizeof message))
            return http_error_set(p->error, 400, NULL, "prompt", "'prompt': %s", message);
    }
    return 0;
}

static int parse_text(struct parse *p, struct completion_prompt *prompt, const char *text)
{
    const struct completion_limits *l = p->limits;
    size_t length = strlen(text), n;
    char message[256];
    if (length == 0) return invalid(p, "prompt", "must not be empty");
    int32_t *ids;
    // The cheap check first: so much text cannot fit, whatever its tokens are.
    size_t at_least = l->max_token_bytes ? length / l->max_token_bytes : 0;
    if (at_least > (size_t)l->plan->max_model_len)
        return http_error_set(p->error, 400, "context_length_exceeded", "prompt",
                              "the context is %d tokens; a prompt of %zu bytes has at least %zu",
                              l->plan->max_model_len, length, at_least);
    if (tokenizer_encode(l->tokenizer, text, length, p->add_special_tokens, true, &ids, &n, message, sizeof message))
        return http_error_set(p->error, 400, NULL, "prompt", "'prompt': %s", message);
    int failed = set_ids(p, prompt, ids, n);
    free(ids);
    if (failed || !p->r->echo) return failed;
    prompt->text = strdup(text);
    prompt->text_length = length;
    prompt->text_was_sent = true;
    return prompt->text ? 0 : no_memory(p);
}

static int parse_texts(struct parse *p)
{
    const cJSON *prompt = json_find(p->body.root, "prompt"), *item;
    bool single = cJSON_IsString(prompt);
    if (!single && !cJSON_IsArray(prompt))
        return invalid(p, "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists");
    if (!p->limits->tokenizer) return invalid(p, "prompt", "must be token ids: this model has no tokenizer");
    if (check_n_prompts(p, single ? 1 : (size_t)cJSON_GetArraySize(prompt))) return -1;
    if (single) return parse_text(p, p->r->prompts, prompt->valuestring);
    int32_t i = 0;
    cJSON_ArrayForEach(item, prompt)
    {
        if (!cJSON_IsString(item)) return invalid(p, "prompt", "must hold strings only, or token ids only");
        if (parse_text(p, &p->r->prompts[i++], item->valuestring)) return -1;
    }
    return 0;
}

int64_t completion_max_tokens(const struct completion_limits *limits)
{
    int64_t max = limits->options->max_request_tokens;
    return max ? max : (int64_t)DEFAULT_CONTEXTS * limits->plan->max_model_len;
}

// Times that a token with log-probabilities counts: once for itself, once for each alternative.
static int64_t weight(int32_t logprobs) { return 1 + (logprobs > 0 ? logprobs : 0); }

// The prompt is computed once, but what the answer repeats of it is written once for each choice. The field that the
// most tokens are due to is the one to name.
static int check_total(struct parse *p)
{
    const struct completion_request *r = p->r;
    int64_t max = completion_max_tokens(p->limits), n_ids = 0, total = 0;
    for (int32_t i = 0; i < r->n_prompts; i++) n_ids += r->prompts[i].n_ids;
    const struct { const char *param; int64_t tokens; } shares[] = {
        {"prompt", n_ids},
        {"max_tokens", (int64_t)r->n_prompts * r->params.n * r->params.max_tokens * weight(r->logprobs)},
        {"echo", r->echo ? n_ids * r->n * weight(r->logprobs) : 0},
        {"prompt_logprobs", r->prompt_logprobs >= 0 ? n_ids * r->n * weight(r->prompt_logprobs) : 0},
        {"return_token_ids", r->return_token_ids ? n_ids * r->n : 0},
    };
    size_t most = 0;
    for (size_t i = 0; i < LENGTH(shares); i++) {
        total += shares[i].tokens;
        if (shares[i].tokens > shares[most].tokens) most = i;
    }
    if (total <= max) return 0;
    return http_error_set(p->error, 400, NULL, shares[most].param,
                          "'%s': all prompts and choices, with what is asked about each of their tokens, may come to "
                          "%lld tokens; the most is %lld", shares[most].param, (long long)total, (long long)max);
}

static int parse_prompts(struct parse *p)
{
    if (!p->body.has_ids && json_require(p->body.root, "prompt", &p->json)) return json_result(p, -1);
    if (p->body.has_ids ? parse_ids(p) : parse_texts(p)) return -1;
    return check_total(p);
}

int completion_request_parse(struct completion_request *r, char *body, size_t length, const char *api_key,
                             const struct completion_limits *limits, struct http_error *e)
{
    *r = (struct completion_request){0};
    struct parse p = {.r = r, .limits = limits, .error = e};
    if (json_body_init(&p.body, body, length, "prompt", &p.json)) return json_result(&p, -1);
    int failed = check_fields(&p) || check_model(&p) || parse_bools(&p) || parse_numbers(&p) || parse_best_of(&p) ||
                 parse_stream_options(&p) || parse_stops(&p) || parse_id_lists(&p) || parse_logit_bias(&p) ||
                 parse_bad_words(&p) || parse_salt(&p, api_key) || parse_prompts(&p);
    json_body_deinit(&p.body);
    if (failed) completion_request_deinit(r);
    return failed ? -1 : 0;
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
