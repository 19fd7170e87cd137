#include "server/chat_json.h"

#include "server/answer_json.h"

// ---- log-probabilities ----

// "token":...,"logprob":...,"bytes":[...]
static void write_token(struct text_buffer *out, const struct completion *c, int32_t id, float logprob)
{
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(c->tokenizer, id, &n);
    text_string(out, "\"token\":");
    answer_write_token(out, c, id);
    text_string(out, ",\"logprob\":");
    text_json_float(out, logprob);
    text_string(out, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++) {
        if (i) text_char(out, ',');
        text_int(out, (unsigned char)bytes[i]);
    }
    text_char(out, ']');
}

void chat_write_logprob(const struct completion *c, struct choice *ch, const struct token_out *token, int32_t n_top)
{
    struct text_buffer *out = &ch->tokens;
    answer_separate(out);
    text_char(out, '{');
    write_token(out, c, token->id, token->logprob);
    text_string(out, ",\"top_logprobs\":[");
    for (int32_t i = 0; i < n_top && i < token->n_top; i++) {
        text_string(out, i ? ",{" : "{");
        write_token(out, c, token->top[i].id, token->top[i].logprob);
        text_char(out, '}');
    }
    text_string(out, "]}");
}

// ,"logprobs":...
static void write_logprobs(struct text_buffer *out, struct choice *ch, bool wanted)
{
    text_string(out, ",\"logprobs\":");
    if (wanted) {
        text_char(out, '{');
        answer_write_list(out, "content", &ch->tokens);
        text_string(out, ",\"refusal\":null}");
    } else {
        text_string(out, "null");
    }
}

// ---- answers ----

void chat_write_head(struct text_buffer *out, const char *model, bool stream)
{
    answer_write_head(out, "chatcmpl", stream ? "chat.completion.chunk" : "chat.completion", model);
}

static void write_text(struct text_buffer *out, struct choice *ch)
{
    text_json_string(out, ch->text.data ? ch->text.data : "", ch->text.length);
    text_clear(&ch->text);
}

static void write_ids(struct text_buffer *out, const struct completion *c, struct choice *ch)
{
    if (!answer_returns_ids(c)) return;
    text_char(out, ',');
    answer_write_list(out, "token_ids", &ch->token_ids);
}

void chat_write_chunk(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index)
{
    bool first = !ch->first_written, last = !first && !ch->text.length && !ch->tokens.length && !ch->token_ids.length;
    text_printf(out, "{\"index\":%d,\"delta\":{", index);
    if (first) {
        text_string(out, "\"role\":\"assistant\",\"content\":\"\"");
    } else if (!last) {
        text_string(out, "\"content\":");
        write_text(out, ch);
    }
    text_char(out, '}');
    write_logprobs(out, ch, !first && ch->tokens.length);
    answer_write_finish(out, last ? ch->finish : NULL);
    if (!first && !last) write_ids(out, c, ch);
    text_string(out, "}]");
    if (first && index == 0 && c->request.return_token_ids) answer_write_prompt_ids(out, ch->prompt);
    ch->first_written = true;
    ch->finish_written = last && ch->finish;
}

static void write_choice(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index)
{
    text_printf(out, "{\"index\":%d,\"message\":{\"role\":\"assistant\",\"content\":", index);
    write_text(out, ch);
    text_string(out, ",\"refusal\":null}");
    write_logprobs(out, ch, c->request.logprobs >= 0);
    answer_write_finish(out, ch->finish);
    write_ids(out, c, ch);
    text_char(out, '}');
}

void chat_write_whole(struct text_buffer *out, struct completion *c)
{
    text_string(out, ",\"choices\":[");
    for (int32_t i = 0; i < c->n_choices; i++) {
        if (i) text_char(out, ',');
        write_choice(out, c, &c->choices[i], i);
    }
    text_string(out, "],\"usage\":");
    answer_write_usage(out, c);
    if (c->request.return_token_ids) answer_write_prompt_ids(out, c->choices[0].prompt);
    if (c->request.prompt_logprobs >= 0) answer_write_prompt_logprobs(out, c, &c->choices[0]);
    text_char(out, '}');
}
