#include "server/chat_request.h"

#include "server/chat_messages.h"
#include "server/json_get.h"
#include "server/request_fields.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

// Every field of OpenAI's and vLLM's chat requests, sorted.
static const char *const known_fields[] = {
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "audio", "bad_words", "cache_salt", "chat_template",
    "chat_template_kwargs", "continue_final_message", "documents", "echo", "frequency_penalty", "function_call",
    "functions", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
    "guided_whitespace_pattern", "ignore_eos", "include_reasoning", "include_stop_str_in_output", "kv_transfer_params",
    "length_penalty", "logit_bias", "logits_processors", "logprobs", "max_completion_tokens", "max_tokens",
    "media_io_kwargs", "messages", "metadata", "min_p", "min_tokens", "mm_processor_kwargs", "modalities", "model", "n",
    "parallel_tool_calls", "prediction", "presence_penalty", "priority", "prompt_cache_key", "prompt_cache_retention",
    "prompt_logprobs", "reasoning_effort", "repetition_penalty", "request_id", "response_format", "return_token_ids",
    "return_tokens_as_token_ids", "safety_identifier", "seed", "service_tier", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "store", "stream", "stream_options", "structural_tag",
    "structured_outputs", "temperature", "tool_choice", "tools", "top_k", "top_logprobs", "top_p",
    "truncate_prompt_tokens", "use_beam_search", "user", "verbosity", "vllm_xargs", "web_search_options",
};

// Those that would change the answer, and that we don't have: only null and false are taken. Templates are the checkpoint's.
static const char *const unsupported_fields[] = {
    "audio", "chat_template", "documents", "echo", "function_call", "functions", "guided_choice", "guided_decoding_backend",
    "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern", "kv_transfer_params",
    "logits_processors", "media_io_kwargs", "mm_processor_kwargs", "prediction", "reasoning_effort", "response_format",
    "structural_tag", "structured_outputs", "truncate_prompt_tokens", "use_beam_search", "verbosity", "vllm_xargs",
    "web_search_options",
};

// ---- fields ----

static bool is_string(const cJSON *value, const char *expected)
{
    return cJSON_IsString(value) && !strcmp(value->valuestring, expected);
}

// What asks for text alone, and no tools, asks for nothing we do not have.
static int check_tools(struct request_fields *p)
{
    const cJSON *root = p->body.root, *tools = json_find(root, "tools"), *choice = json_find(root, "tool_choice");
    const cJSON *modalities = json_find(root, "modalities");
    if (tools && !cJSON_IsArray(tools)) return fields_invalid(p, "tools", "must be a list");
    if (tools && tools->child) return fields_invalid(p, "tools", "is not supported by this server unless it is empty");
    if (choice && !is_string(choice, "none"))
        return fields_invalid(p, "tool_choice", "is not supported by this server unless it is \"none\"");
    if (modalities && !(cJSON_GetArraySize(modalities) == 1 && is_string(modalities->child, "text")))
        return fields_invalid(p, "modalities", "is not supported by this server unless it is [\"text\"]");
    return 0;
}

static int parse_logprobs(struct request_fields *p)
{
    struct completion_request *r = p->r;
    bool logprobs = false;
    int32_t top = 0;
    if (json_get_bool(p->body.root, "logprobs", &logprobs, &p->json) ||
        json_get_int32(p->body.root, "top_logprobs", 0, p->limits->options->max_logprobs, &top, &p->json))
        return fields_result(p, -1);
    if (top > 0 && !logprobs) return fields_invalid(p, "top_logprobs", "is only allowed with logprobs");
    if (r->stream && r->prompt_logprobs >= 0) return fields_invalid(p, "prompt_logprobs", "cannot be streamed");
    r->logprobs = r->params.logprobs = logprobs ? top : -1;
    return 0;
}

// max_completion_tokens wins over max_tokens, its old name. 0: neither was given.
static int parse_max_tokens(struct request_fields *p)
{
    int32_t *max = &p->r->params.max_tokens;
    if (json_get_int32(p->body.root, "max_tokens", 1, INT32_MAX, max, &p->json) ||
        json_get_int32(p->body.root, "max_completion_tokens", 1, INT32_MAX, max, &p->json))
        return fields_result(p, -1);
    bool old = json_find(p->body.root, "max_tokens") && !json_find(p->body.root, "max_completion_tokens");
    p->max_tokens_name = old ? "max_tokens" : "max_completion_tokens";
    return 0;
}

static int parse_template_fields(struct request_fields *p, struct chat_conversation *c)
{
    const cJSON *root = p->body.root;
    c->add_generation_prompt = true;
    if (json_get_bool(root, "add_generation_prompt", &c->add_generation_prompt, &p->json) ||
        json_get_bool(root, "continue_final_message", &c->continue_final_message, &p->json) ||
        json_get_object(root, "chat_template_kwargs", &c->kwargs, &p->json))
        return fields_result(p, -1);
    if (c->continue_final_message && c->add_generation_prompt)
        return fields_invalid(p, "continue_final_message", "is only allowed with add_generation_prompt false");
    const char *name = c->kwargs ? chat_template_reserved(p->limits->chat_template, c->kwargs) : NULL;
    if (!name) return 0;
    return http_error_set(p->error, 400, NULL, "chat_template_kwargs", "'chat_template_kwargs' may not set '%.*s'",
                          json_clip(name, 64), name);
}

// ---- the prompt ----

// To the end of the context, of the cache, and of what one request may come to: a default that never is the reason for a
// refusal.
static int32_t default_max_tokens(const struct request_fields *p, size_t n_ids)
{
    const struct engine_plan *plan = p->limits->plan;
    int64_t n = (int64_t)n_ids, max = plan->longest_request - n, allowed = fields_allowed_max_tokens(p);
    if (allowed < max) max = allowed;
    return max > 1 ? (int32_t)max : 1;
}

static int set_prompt(struct request_fields *p, const char *text, size_t length)
{
    struct completion_prompt *prompt = p->r->prompts;
    int32_t *max_tokens = &p->r->params.max_tokens, *ids;
    size_t n;
    if (fields_encode(p, text, length, p->add_special_tokens, &ids, &n)) return -1;
    bool to_the_end = *max_tokens == 0;
    if (to_the_end) *max_tokens = 1;
    int failed = fields_set_ids(p, prompt, ids, n);
    free(ids);
    if (failed) return -1;
    if (to_the_end) *max_tokens = default_max_tokens(p, n);
    return fields_check_min_tokens(p) || fields_check_total(p) ? -1 : 0;
}

// Renders other forms of the same history until the template takes one.
static int render_forms(struct request_fields *p, const struct chat_conversation *c, char **text, size_t *length)
{
    static const struct chat_form forms[] = {{true, false}, {false, true}, {true, true}};
    char message[8];
    int result = -1;
    for (size_t i = 0; i < LENGTH(forms) && result; i++) {
        struct chat_conversation other = *c;
        cJSON *messages;
        if (chat_messages_read(p, forms[i], &messages, NULL)) return -1;
        other.messages = messages;
        result = chat_template_render(p->limits->chat_template, &other, time(NULL), text, length, message, sizeof message);
        cJSON_Delete(messages);
    }
    return result;
}

static int render(struct request_fields *p, const struct chat_conversation *c, bool has_forms)
{
    char message[400], *text;
    size_t length;
    int result = chat_template_render(p->limits->chat_template, c, time(NULL), &text, &length, message, sizeof message);
    if (result && has_forms && !render_forms(p, c, &text, &length)) result = 0;
    if (result) {
        bool raised = result == CHAT_TEMPLATE_RAISED;
        return http_error_set(p->error, 400, NULL, "messages", "'messages': %s: %.*s",
                              raised ? "the model's chat template refuses them" : "the model's chat template fails",
                              json_clip(message, sizeof message), message);
    }
    int failed = set_prompt(p, text, length);
    free(text);
    return failed;
}

static int parse_messages(struct request_fields *p, struct chat_conversation *c)
{
    cJSON *messages;
    bool has_forms;
    if (fields_set_n_prompts(p, 1) || chat_messages_read(p, (struct chat_form){0}, &messages, &has_forms)) return -1;
    const cJSON *last = messages->child->prev; // cJSON's lists know their end
    int failed = 0;
    c->messages = messages;
    if (c->continue_final_message && !cJSON_IsString(cJSON_GetObjectItemCaseSensitive(last, "content")))
        failed = fields_invalid(p, "continue_final_message", "needs a final message with content");
    if (!failed) failed = render(p, c, has_forms);
    cJSON_Delete(messages);
    return failed;
}

static int check_template(struct request_fields *p)
{
    const char *lacks = !p->limits->tokenizer ? "tokenizer" : !p->limits->chat_template ? "chat template" : NULL;
    if (!lacks) return 0;
    return http_error_set(p->error, 400, NULL, NULL, "this model has no %s: use /v1/completions", lacks);
}

int chat_request_parse(struct completion_request *r, char *body, size_t length, const char *api_key,
                       const struct completion_limits *limits, struct http_error *e)
{
    static const struct field_names names = {known_fields, LENGTH(known_fields), unsupported_fields,
                                             LENGTH(unsupported_fields)};
    *r = (struct completion_request){.chat = true};
    struct request_fields p = {.r = r, .limits = limits, .error = e, .prompt_name = "messages"};
    struct chat_conversation c = {0};
    if (json_body_init(&p.body, body, length, NULL, &p.json)) return fields_result(&p, -1);
    int failed = fields_check(&p, &names) || check_template(&p) || check_tools(&p) || fields_parse_shared(&p, api_key) ||
                 parse_logprobs(&p) || parse_max_tokens(&p) || parse_template_fields(&p, &c) || parse_messages(&p, &c);
    json_body_deinit(&p.body);
    if (failed) completion_request_deinit(r);
    return failed ? -1 : 0;
}
