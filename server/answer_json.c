#include "server/answer_json.h"

#include <string.h>
#include <sys/random.h>
#include <time.h>

// ---- tokens ----

void answer_separate(struct text_buffer *list)
{
    if (list->length) text_char(list, ',');
}

// Bytes that are no text by themselves, as OpenAI writes them: bytes:\xe2\x9c
static void write_bytes(struct text_buffer *out, const char *bytes, size_t n)
{
    text_string(out, "\"bytes:");
    for (size_t i = 0; i < n; i++) text_printf(out, "\\\\x%02x", (unsigned char)bytes[i]);
    text_char(out, '"');
}

void answer_write_token(struct text_buffer *out, const struct completion *c, int32_t id)
{
    size_t n;
    const char *bytes =
        c->tokenizer && !c->request.tokens_as_ids ? tokenizer_token_bytes(c->tokenizer, id, &n) : NULL;
    if (!bytes)
        text_printf(out, "\"token_id:%d\"", id);
    else if (utf8_valid(bytes, n))
        text_json_string(out, bytes, n);
    else
        write_bytes(out, bytes, n);
}

bool answer_returns_ids(const struct completion *c) { return c->request.return_token_ids || !c->tokenizer; }

void answer_write_token_id(const struct completion *c, struct choice *ch, int32_t id)
{
    if (!answer_returns_ids(c)) return;
    answer_separate(&ch->token_ids);
    text_int(&ch->token_ids, id);
}

// ---- answers ----

void answer_write_head(struct text_buffer *out, const char *id_prefix, const char *object, const char *model)
{
    uint64_t random[2] = {0};
    (void)!getrandom(random, sizeof random, 0);
    text_printf(out, "{\"id\":\"%s-%016lx%016lx\",\"object\":\"%s\",\"created\":%lld,\"model\":", id_prefix,
                (unsigned long)random[0], (unsigned long)random[1], object, (long long)time(NULL));
    text_json_string(out, model, strlen(model));
    text_string(out, ",\"system_fingerprint\":\"gptd-" GPTD_VERSION "\"");
}

// Takes the text of from.
static void move_text(struct text_buffer *out, struct text_buffer *from)
{
    text_append(out, from->data, from->length);
    text_clear(from);
}

void answer_write_list(struct text_buffer *out, const char *name, struct text_buffer *elements)
{
    text_printf(out, "\"%s\":[", name);
    move_text(out, elements);
    text_char(out, ']');
}

void answer_write_finish(struct text_buffer *out, const char *finish)
{
    if (finish) text_printf(out, ",\"finish_reason\":\"%s\"", finish);
    else text_string(out, ",\"finish_reason\":null");
}

void answer_write_prompt_ids(struct text_buffer *out, const struct completion_prompt *prompt)
{
    text_string(out, ",\"prompt_token_ids\":[");
    for (int32_t i = 0; i < prompt->n_ids; i++) {
        if (i) text_char(out, ',');
        text_int(out, prompt->ids[i]);
    }
    text_char(out, ']');
}

static void write_candidate(struct text_buffer *out, const struct completion *c, int32_t id, float logprob)
{
    text_printf(out, "\"%d\":{\"logprob\":", id);
    text_json_float(out, logprob);
    text_string(out, ",\"decoded_token\":");
    answer_write_token(out, c, id);
    text_char(out, '}');
}

void answer_write_prompt_logprobs(struct text_buffer *out, const struct completion *c, const struct choice *ch)
{
    const struct token_out *tokens = request_prompt_logprobs(ch->request);
    text_string(out, ",\"prompt_logprobs\":[null");
    for (int32_t i = 1; i < ch->prompt->n_ids; i++) {
        const struct token_out *t = &tokens[i];
        int32_t n = t->n_top < c->request.prompt_logprobs ? t->n_top : c->request.prompt_logprobs;
        bool listed = false;
        text_string(out, ",{");
        for (int32_t k = 0; k < n; k++) {
            if (k) text_char(out, ',');
            write_candidate(out, c, t->top[k].id, t->top[k].logprob);
            listed = listed || t->top[k].id == t->id;
        }
        if (!listed) {
            if (n) text_char(out, ',');
            write_candidate(out, c, t->id, t->logprob);
        }
        text_char(out, '}');
    }
    text_char(out, ']');
}

bool choice_has_news(const struct choice *ch)
{
    return ch->text.length || ch->tokens.length || ch->token_ids.length || (ch->finish && !ch->finish_written);
}

void answer_write_usage(struct text_buffer *out, const struct completion *c)
{
    int64_t prompt = completion_prompt_tokens(c), generated = completion_tokens(c);
    text_printf(out,
                "{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
                "\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
                (long long)prompt, (long long)generated, (long long)(prompt + generated),
                (long long)completion_cached_tokens(c));
}
