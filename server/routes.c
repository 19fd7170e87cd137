/* The routes beside completions: models, tokenizer, health, metrics. */
#include "server/context.h"

#include "server/json_get.h"
#include "tokenizer/detokenizer.h"

#include <stdlib.h>
#include <string.h>

// ---- /v1/models ----

static void write_model(struct text_buffer *out, const struct server *s, const char *name)
{
    text_string(out, "{\"id\":");
    text_json_string(out, name, strlen(name));
    text_printf(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"gptd\",\"max_model_len\":%d}",
                (long long)s->created, s->limits.plan->max_model_len);
}

static enum exchange_next models_handle(struct exchange *x)
{
    const struct server *s = x->server;
    struct text_buffer out = {0};
    text_string(&out, "{\"object\":\"list\",\"data\":[");
    for (size_t i = 0; i < s->options.n_served_model_names; i++) {
        if (i) text_char(&out, ',');
        write_model(&out, s, s->options.served_model_names[i]);
    }
    text_string(&out, "]}");
    return exchange_reply_json(x, &out);
}

static enum exchange_next model_handle(struct exchange *x)
{
    const struct server *s = x->server;
    const char *name = x->path + strlen(x->route->path);
    for (size_t i = 0; i < s->options.n_served_model_names; i++) {
        if (strcmp(s->options.served_model_names[i], name)) continue;
        struct text_buffer out = {0};
        write_model(&out, s, name);
        return exchange_reply_json(x, &out);
    }
    struct http_error e;
    http_error_set(&e, 404, "model_not_found", "model", "there is no such model");
    return exchange_reply_error(x, &e);
}

// ---- /tokenize, /detokenize ----

struct text_call {
    struct work work;
    struct http_error error;
    struct text_buffer out;
};

static bool text_ready(const struct exchange *x)
{
    const struct text_call *call = x->state;
    return atomic_load(&call->work.finished);
}

static void text_done(struct exchange *x)
{
    struct text_call *call = x->state;
    work_end(&call->work);
    text_deinit(&call->out);
    free(call);
}

static enum exchange_next text_handle(struct exchange *x, void (*run)(struct exchange *x))
{
    struct text_call *call = x->state;
    struct http_error e;
    if (!x->server->tokenizer) {
        http_error_set(&e, 400, NULL, NULL, "this model has no tokenizer");
        return exchange_reply_error(x, &e);
    }
    if (!call) {
        x->state = call = calloc(1, sizeof *call);
        if (!call || !work_begin(&call->work, x, SHORT_TEXT, run)) {
            http_error_set(&e, 503, NULL, NULL, call ? "too many long texts at once" : "out of memory");
            return exchange_reply_error(x, &e);
        }
    }
    if (!work_over(&call->work)) return EXCHANGE_WAIT;
    if (atomic_load(&x->gone)) return EXCHANGE_ABORT;
    exchange_drop_body(x);
    if (!call->error.status) request_check_time(x, &call->error);
    return call->error.status ? exchange_reply_error(x, &call->error) : exchange_reply_json(x, &call->out);
}

static void write_tokens(struct text_buffer *out, const struct server *s, const int32_t *ids, size_t n, bool strings)
{
    text_printf(out, "{\"count\":%zu,\"max_model_len\":%d,\"tokens\":[", n, s->limits.plan->max_model_len);
    for (size_t i = 0; i < n; i++) {
        if (i) text_char(out, ',');
        text_int(out, ids[i]);
    }
    text_char(out, ']');
    if (!strings) {
        text_char(out, '}');
        return;
    }
    text_string(out, ",\"token_strs\":[");
    for (size_t i = 0; i < n; i++) {
        size_t length;
        const char *bytes = tokenizer_token_bytes(s->tokenizer, ids[i], &length);
        if (i) text_char(out, ',');
        if (utf8_valid(bytes, length))
            text_json_string(out, bytes, length);
        else
            text_printf(out, "\"<0x%02X>\"", (unsigned char)bytes[0]);
    }
    text_string(out, "]}");
}

// Accepts a model's name if it is one of ours; it may be left out.
static int check_model(const struct server *s, const cJSON *root, struct http_error *e)
{
    struct json_error json;
    const char *model = NULL;
    if (json_get_string(root, "model", 1, SIZE_MAX, &model, &json)) return http_error_from_json(e, &json);
    if (!model) return 0;
    for (size_t i = 0; i < s->options.n_served_model_names; i++)
        if (!strcmp(s->options.served_model_names[i], model)) return 0;
    return http_error_set(e, 404, "model_not_found", "model", "there is no such model");
}

static int check_length(size_t n, int64_t max, const char *param, struct http_error *e)
{
    if (n <= (size_t)max) return 0;
    return http_error_set(e, 400, NULL, param, "'%s': at least %zu tokens; the most is %lld", param, n, (long long)max);
}

static void tokenize_body(const struct server *s, const cJSON *root, struct text_call *call)
{
    static const char *const known[] = {"add_special_tokens", "model", "prompt", "return_token_strs"};
    struct json_error json;
    const char *prompt = NULL;
    bool add_special = true, strings = false;
    int64_t max = completion_max_tokens(&s->limits);
    char message[256];
    int32_t *ids;
    size_t n;
    if (json_check_known(root, known, sizeof known / sizeof *known, &json) ||
        json_require(root, "prompt", &json) ||
        json_get_string(root, "prompt", 0, SIZE_MAX, &prompt, &json) ||
        json_get_bool(root, "add_special_tokens", &add_special, &json) ||
        json_get_bool(root, "return_token_strs", &strings, &json)) {
        http_error_from_json(&call->error, &json);
        return;
    }
    if (check_model(s, root, &call->error)) return;
    if (check_length(strlen(prompt) / s->limits.max_token_bytes, max, "prompt", &call->error)) return;
    if (tokenizer_encode(s->tokenizer, prompt, strlen(prompt), add_special, true, &ids, &n, message, sizeof message)) {
        http_error_set(&call->error, 400, NULL, "prompt", "'prompt': %s", message);
        return;
    }
    if (!check_length(n, max, "prompt", &call->error)) write_tokens(&call->out, s, ids, n, strings);
    free(ids);
}

static void tokenize_run(struct exchange *x)
{
    struct text_call *call = x->state;
    struct json_error json;
    struct json_body body;
    if (json_body_init(&body, x->body.data ? x->body.data : "", x->body.length, NULL, &json)) {
        http_error_from_json(&call->error, &json);
        return;
    }
    tokenize_body(x->server, body.root, call);
    json_body_deinit(&body);
}

static void detokenize_body(const struct server *s, const struct json_body *body, struct text_call *call)
{
    static const char *const known[] = {"model", "skip_special_tokens", "tokens"};
    struct json_error json;
    bool skip = false;
    char *text, message[256];
    size_t length;
    if (json_check_known(body->root, known, sizeof known / sizeof *known, &json) ||
        json_require(body->root, "tokens", &json) ||
        json_get_bool(body->root, "skip_special_tokens", &skip, &json)) {
        http_error_from_json(&call->error, &json);
        return;
    }
    if (check_model(s, body->root, &call->error)) return;
    if (!body->has_ids || body->ids.nested || body->ids.n_lists != 1) {
        http_error_set(&call->error, 400, NULL, "tokens", "'tokens' must be a list of token ids");
        return;
    }
    if (check_length(body->ids.offsets[1], completion_max_tokens(&s->limits), "tokens", &call->error)) return;
    if (tokenizer_decode(s->tokenizer, body->ids.ids, body->ids.offsets[1], skip, &text, &length, message,
                         sizeof message)) {
        http_error_set(&call->error, 400, NULL, "tokens", "'tokens': %s", message);
        return;
    }
    text_string(&call->out, "{\"prompt\":");
    text_json_string(&call->out, text, length);
    text_char(&call->out, '}');
    free(text);
}

static void detokenize_run(struct exchange *x)
{
    struct text_call *call = x->state;
    struct json_error json;
    struct json_body body;
    if (json_body_init(&body, x->body.data ? x->body.data : "", x->body.length, "tokens", &json)) {
        http_error_from_json(&call->error, &json);
        return;
    }
    detokenize_body(x->server, &body, call);
    json_body_deinit(&body);
}

static enum exchange_next tokenize_handle(struct exchange *x) { return text_handle(x, tokenize_run); }
static enum exchange_next detokenize_handle(struct exchange *x) { return text_handle(x, detokenize_run); }

// ---- health, version, metrics, description ----

// Alive: the loop moves. A server that loads, drains or has nothing to do is alive.
static enum exchange_next health_handle(struct exchange *x)
{
    struct http_error e;
    const char *trouble = server_trouble(x->server);
    if (trouble) {
        http_error_set(&e, 503, NULL, NULL, "%s", trouble);
        return exchange_reply_error(x, &e);
    }
    struct text_buffer out = {0};
    text_string(&out, "{\"status\":\"ok\"}");
    return exchange_reply_json(x, &out);
}

static enum exchange_next ready_handle(struct exchange *x)
{
    const struct server *s = x->server;
    struct http_error e;
    bool open = atomic_load(&s->open);
    if (!open || atomic_load(&s->draining)) {
        http_error_set(&e, 503, NULL, NULL, open ? "the server is shutting down" : "the model is being loaded");
        return exchange_reply_error(x, &e);
    }
    struct text_buffer out = {0};
    text_string(&out, "{\"status\":\"ready\"}");
    return exchange_reply_json(x, &out);
}

static enum exchange_next version_handle(struct exchange *x)
{
    struct text_buffer out = {0};
    text_string(&out, "{\"version\":\"" GPTD_VERSION "\"}");
    return exchange_reply_json(x, &out);
}

static enum exchange_next metrics_handle(struct exchange *x)
{
    struct engine_stats stats;
    struct text_buffer out = {0};
    engine_stats_get(x->server->engine, &stats);
    out.data = metrics_render(x->server->metrics, &stats, &out.length);
    out.capacity = out.length;
    out.failed = !out.data;
    return exchange_reply(x, 200, METRICS_CONTENT_TYPE, &out);
}

extern const char _binary_server_openapi_json_start[], _binary_server_openapi_json_end[]; // server/openapi.json

static enum exchange_next openapi_handle(struct exchange *x)
{
    struct text_buffer out = {0};
    const char *text = _binary_server_openapi_json_start;
    text_append(&out, text, (size_t)(_binary_server_openapi_json_end - text));
    return exchange_reply_json(x, &out);
}

const struct route server_routes[] = {
    {"POST", "/v1/completions", false, API_ROLE_USER, completion_handle, completion_stream, completion_ready,
     completion_done_with},
    {"POST", "/v1/chat/completions", false, API_ROLE_USER, chat_handle, completion_stream, completion_ready,
     completion_done_with},
    {"GET", "/v1/models", false, API_ROLE_USER, models_handle, NULL, NULL, NULL},
    {"GET", "/v1/models/", false, API_ROLE_USER, model_handle, NULL, NULL, NULL},
    {"POST", "/tokenize", false, API_ROLE_USER, tokenize_handle, NULL, text_ready, text_done},
    {"POST", "/detokenize", false, API_ROLE_USER, detokenize_handle, NULL, text_ready, text_done},
    {"GET", "/health", true, API_ROLE_USER, health_handle, NULL, NULL, NULL},
    {"GET", "/ready", true, API_ROLE_USER, ready_handle, NULL, NULL, NULL},
    {"GET", "/version", false, API_ROLE_USER, version_handle, NULL, NULL, NULL},
    {"GET", "/metrics", false, API_ROLE_METRICS, metrics_handle, NULL, NULL, NULL},
    {"GET", "/debug/state", false, API_ROLE_ADMIN, debug_state_handle, NULL, NULL, NULL},
    {"GET", "/openapi.json", false, API_ROLE_USER, openapi_handle, NULL, NULL, NULL},
    {"GET", "/", true, API_ROLE_USER, page_handle, NULL, NULL, NULL},
};
const size_t server_n_routes = sizeof server_routes / sizeof *server_routes;
