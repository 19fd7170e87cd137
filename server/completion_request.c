#include "server/completion_request.h"

#include "server/json_get.h"
#include "server/request_fields.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_BEST_OF = 20 }; // or n, if that is more

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

static int parse_numbers(struct request_fields *p)
{
    struct completion_request *r = p->r;
    const cJSON *o = p->body.root;
    r->logprobs = -1;
    r->params.max_tokens = 16;
    if (json_get_bool(o, "echo", &r->echo, &p->json) ||
        json_get_int32(o, "max_tokens", 0, INT32_MAX, &r->params.max_tokens, &p->json) ||
        json_get_int32(o, "logprobs", 0, p->limits->options->max_logprobs, &r->logprobs, &p->json))
        return fields_result(p, -1);
    return fields_check_min_tokens(p);
}

static int parse_best_of(struct request_fields *p)
{
    struct completion_request *r = p->r;
    int32_t max = r->n > MAX_BEST_OF ? r->n : MAX_BEST_OF;
    if (json_get_int32(p->body.root, "best_of", r->n, max, &r->params.n, &p->json)) return fields_result(p, -1);
    if (json_find(p->body.root, "best_of") && r->stream && r->params.n > 1)
        return fields_invalid(p, "best_of", "cannot be streamed");
    bool ranks = r->params.n > r->n;
    r->params.logprobs = ranks && r->logprobs < 0 ? 0 : r->logprobs;
    r->params.prompt_logprobs = r->echo && r->logprobs > r->prompt_logprobs ? r->logprobs : r->prompt_logprobs;
    return 0;
}

// ---- suffix ----

// What the model may end a middle with is nothing the client asked for.
static int add_end_ids(struct request_fields *p)
{
    const struct infill *f = &p->limits->infill;
    return p->r->params.ignore_eos ? 0 : fields_add_stop_ids(p, f->end_ids, f->n_ends);
}

// *suffix stays NULL where there is none, or an empty one.
static int parse_suffix(struct request_fields *p, const char **suffix)
{
    if (json_get_string(p->body.root, "suffix", 0, SIZE_MAX, suffix, &p->json)) return fields_result(p, -1);
    if (!*suffix || !**suffix) {
        *suffix = NULL;
        return 0;
    }
    if (!p->limits->infill.found)
        return fields_invalid(p, "suffix", "needs tokens to fill in the middle, which this model does not have");
    if (p->body.has_ids) return fields_invalid(p, "suffix", "needs a prompt that is text");
    if (p->r->echo && p->r->logprobs >= 0)
        return fields_invalid(p, "suffix", "has no order of tokens that echo and logprobs could show together");
    return add_end_ids(p);
}

static int encode_infill(struct request_fields *p, const char *text, const char *suffix, int32_t **ids, size_t *n)
{
    const struct completion_limits *l = p->limits;
    size_t length = strlen(text), suffix_length = strlen(suffix);
    char message[256];
    if (fields_check_bytes(p, length + suffix_length)) return -1;
    if (infill_encode(&l->infill, l->tokenizer, text, length, suffix, suffix_length, p->add_special_tokens, ids, n, message,
                      sizeof message))
        return http_error_set(p->error, 400, NULL, "suffix", "'suffix': %s", message);
    return 0;
}

// ---- prompts ----

static int parse_ids(struct request_fields *p)
{
    const struct json_ids *lists = &p->body.ids;
    if (fields_set_n_prompts(p, lists->n_lists)) return -1;
    for (size_t i = 0; i < lists->n_lists; i++) {
        struct completion_prompt *prompt = &p->r->prompts[i];
        if (fields_set_ids(p, prompt, lists->ids + lists->offsets[i], lists->offsets[i + 1] - lists->offsets[i])) return -1;
        if (!p->r->echo || !p->limits->tokenizer) continue;
        char message[256];
        if (tokenizer_decode(p->limits->tokenizer, prompt->ids, (size_t)prompt->n_ids, p->r->skip_special_tokens,
                             &prompt->text, &prompt->text_length, message, sizeof message))
            return http_error_set(p->error, 400, NULL, "prompt", "'prompt': %s", message);
    }
    return 0;
}

static int parse_text(struct request_fields *p, struct completion_prompt *prompt, const char *text, const char *suffix)
{
    size_t length = strlen(text), n;
    int32_t *ids;
    if (length == 0 && !suffix) return fields_invalid(p, "prompt", "must not be empty");
    if (suffix ? encode_infill(p, text, suffix, &ids, &n) : fields_encode(p, text, length, p->add_special_tokens, &ids, &n))
        return -1;
    int failed = fields_set_ids(p, prompt, ids, n);
    free(ids);
    if (failed || !p->r->echo) return failed;
    prompt->text = strdup(text);
    prompt->text_length = length;
    prompt->text_was_sent = true;
    return prompt->text ? 0 : fields_no_memory(p);
}

static int parse_texts(struct request_fields *p, const char *suffix)
{
    const cJSON *prompt = json_find(p->body.root, "prompt"), *item;
    bool single = cJSON_IsString(prompt);
    if (!single && !cJSON_IsArray(prompt))
        return fields_invalid(p, "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists");
    if (!p->limits->tokenizer) return fields_invalid(p, "prompt", "must be token ids: this model has no tokenizer");
    if (fields_set_n_prompts(p, single ? 1 : (size_t)cJSON_GetArraySize(prompt))) return -1;
    if (single) return parse_text(p, p->r->prompts, prompt->valuestring, suffix);
    int32_t i = 0;
    cJSON_ArrayForEach(item, prompt)
    {
        if (!cJSON_IsString(item)) return fields_invalid(p, "prompt", "must hold strings only, or token ids only");
        if (parse_text(p, &p->r->prompts[i++], item->valuestring, suffix)) return -1;
    }
    return 0;
}

static int parse_prompts(struct request_fields *p)
{
    const char *suffix = NULL;
    if (parse_suffix(p, &suffix)) return -1;
    if (!p->body.has_ids && json_require(p->body.root, "prompt", &p->json)) return fields_result(p, -1);
    if (p->body.has_ids ? parse_ids(p) : parse_texts(p, suffix)) return -1;
    return fields_check_total(p);
}

int completion_request_parse(struct completion_request *r, char *body, size_t length, const char *api_key,
                             const struct completion_limits *limits, struct http_error *e)
{
    static const struct field_names names = {known_fields, LENGTH(known_fields), unsupported_fields,
                                             LENGTH(unsupported_fields)};
    *r = (struct completion_request){0};
    struct request_fields p = {.r = r, .limits = limits, .error = e, .prompt_name = "prompt",
                               .max_tokens_name = "max_tokens", .add_special_tokens = true};
    if (json_body_init(&p.body, body, length, "prompt", &p.json)) return fields_result(&p, -1);
    int failed = fields_check(&p, &names) || fields_parse_shared(&p, api_key) || parse_numbers(&p) || parse_best_of(&p) ||
                 parse_prompts(&p);
    json_body_deinit(&p.body);
    if (failed) completion_request_deinit(r);
    return failed ? -1 : 0;
}
