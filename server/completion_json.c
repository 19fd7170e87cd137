#include "server/completion_json.h"

#include "server/answer_json.h"

#include <stdlib.h>
#include <string.h>

// ---- fragments ----

// Whether two ids would be the same key of a JSON object: a piece and a byte token may both be "A".
static bool same_token(const struct completion *c, int32_t a, int32_t b)
{
    if (a == b || !c->tokenizer || c->request.tokens_as_ids) return a == b;
    size_t n_a, n_b;
    const char *bytes_a = tokenizer_token_bytes(c->tokenizer, a, &n_a);
    const char *bytes_b = tokenizer_token_bytes(c->tokenizer, b, &n_b);
    return bytes_a && bytes_b && n_a == n_b && !memcmp(bytes_a, bytes_b, n_a);
}

static bool is_repeated(const struct completion *c, const struct token_logprob *top, int32_t n, int32_t id)
{
    for (int32_t i = 0; i < n; i++)
        if (same_token(c, top[i].id, id)) return true;
    return false;
}

static void write_top(struct text_buffer *out, const struct completion *c, const struct token_out *token, int32_t n_top)
{
    int32_t n = token->n_top < n_top ? token->n_top : n_top;
    text_char(out, '{');
    if (!is_repeated(c, token->top, n, token->id)) {
        answer_write_token(out, c, token->id);
        text_char(out, ':');
        text_json_float(out, token->logprob);
        if (n) text_char(out, ',');
    }
    for (int32_t i = 0; i < n; i++) {
        if (is_repeated(c, token->top, i, token->top[i].id)) continue;
        if (i) text_char(out, ',');
        answer_write_token(out, c, token->top[i].id);
        text_char(out, ':');
        text_json_float(out, token->top[i].logprob);
    }
    text_char(out, '}');
}

static void begin_entry(const struct completion *c, struct choice *ch, int32_t id, size_t offset)
{
    answer_separate(&ch->tokens);
    answer_separate(&ch->token_logprobs);
    answer_separate(&ch->top_logprobs);
    answer_separate(&ch->text_offset);
    answer_write_token(&ch->tokens, c, id);
    text_int(&ch->text_offset, (int64_t)offset);
}

void completion_write_logprob(const struct completion *c, struct choice *ch, const struct token_out *token,
                              int32_t n_top, size_t offset)
{
    begin_entry(c, ch, token->id, offset);
    text_json_float(&ch->token_logprobs, token->logprob);
    write_top(&ch->top_logprobs, c, token, n_top);
}

// Whether the text of a prompt has the control token that is its i-th: not one that is skipped or that was put before
// what was sent.
static bool shows_special(const struct completion *c, const struct completion_prompt *p, int32_t i, const char *bytes,
                          size_t n)
{
    if (!p->text_was_sent) return !c->request.skip_special_tokens;
    return i > 0 || (n <= p->text_length && !memcmp(p->text, bytes, n));
}

// Code points of the prompt's i-th token in its text.
static size_t shown_chars(const struct completion *c, const struct completion_prompt *p, int32_t i)
{
    size_t n = 0, n_chars = 0;
    const char *bytes = c->tokenizer ? tokenizer_token_bytes(c->tokenizer, p->ids[i], &n) : NULL;
    if (!bytes || (tokenizer_is_special(c->tokenizer, p->ids[i]) && !shows_special(c, p, i, bytes, n))) return 0;
    for (size_t j = 0; j < n; j++) n_chars += ((unsigned char)bytes[j] & 0xc0) != 0x80;
    return n_chars;
}

// Index of the token with the space that the tokenizer puts before the first word, which the text lacks, or -1.
static int32_t find_added_space(const struct completion *c, const struct completion_prompt *p, size_t n_text)
{
    size_t n_shown = 0, n;
    for (int32_t i = 0; i < p->n_ids; i++) n_shown += shown_chars(c, p, i);
    if (n_shown <= n_text) return -1;
    for (int32_t i = 0; i < p->n_ids; i++) {
        const char *bytes = c->tokenizer ? tokenizer_token_bytes(c->tokenizer, p->ids[i], &n) : NULL;
        if (bytes && !tokenizer_is_special(c->tokenizer, p->ids[i])) return n > 0 && bytes[0] == ' ' ? i : -1;
    }
    return -1;
}

void completion_write_prompt_logprobs(const struct completion *c, struct choice *ch, const struct token_out *tokens)
{
    const struct completion_prompt *prompt = ch->prompt;
    size_t offset = 0, n_text = prompt->text ? utf8_length(prompt->text, prompt->text_length) : 0;
    int32_t added_space = find_added_space(c, prompt, n_text);
    for (int32_t i = 0; i < prompt->n_ids; i++) {
        if (i > 0) {
            completion_write_logprob(c, ch, &tokens[i], c->request.logprobs, offset);
        } else {
            begin_entry(c, ch, tokens[0].id, offset);
            text_string(&ch->token_logprobs, "null");
            text_string(&ch->top_logprobs, "null");
        }
        offset += shown_chars(c, prompt, i) - (i == added_space);
        if (offset > n_text) offset = n_text;
    }
}

// ---- answers ----

void completion_write_head(struct text_buffer *out, const char *model, bool stream)
{
    (void)stream; // chunks are called the same
    answer_write_head(out, "cmpl", "text_completion", model);
}

static void write_logprobs(struct text_buffer *out, struct choice *ch)
{
    text_char(out, '{');
    answer_write_list(out, "tokens", &ch->tokens);
    text_char(out, ',');
    answer_write_list(out, "token_logprobs", &ch->token_logprobs);
    text_char(out, ',');
    answer_write_list(out, "top_logprobs", &ch->top_logprobs);
    text_char(out, ',');
    answer_write_list(out, "text_offset", &ch->text_offset);
    text_char(out, '}');
}

static void write_choice(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index)
{
    text_string(out, "{\"text\":");
    text_json_string(out, ch->text.data ? ch->text.data : "", ch->text.length);
    text_clear(&ch->text);
    text_printf(out, ",\"index\":%d,\"logprobs\":", index);
    if (c->request.logprobs >= 0)
        write_logprobs(out, ch);
    else
        text_string(out, "null");
    answer_write_finish(out, ch->finish);
    if (answer_returns_ids(c)) {
        text_char(out, ',');
        answer_write_list(out, "token_ids", &ch->token_ids);
    }
    if (!ch->first_written && c->request.return_token_ids) answer_write_prompt_ids(out, ch->prompt);
    if (!ch->first_written && c->request.prompt_logprobs >= 0) answer_write_prompt_logprobs(out, c, ch);
    ch->first_written = true;
    ch->finish_written = ch->finish;
    text_char(out, '}');
}

void completion_write_chunk(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index)
{
    write_choice(out, c, ch, index);
    text_char(out, ']');
}

// ---- the best of several ----

static double mean_logprob(const struct choice *ch)
{
    return ch->n_tokens ? ch->sum_logprob / ch->n_tokens : 0;
}

// Likeliest first, ties in their order.
static int compare_choices(const void *a, const void *b)
{
    const struct choice *x = *(struct choice *const *)a, *y = *(struct choice *const *)b;
    double difference = mean_logprob(y) - mean_logprob(x);
    return difference > 0 ? 1 : difference < 0 ? -1 : x->index - y->index;
}

void completion_write_whole(struct text_buffer *out, struct completion *c)
{
    enum { MAX_BEST = 128 };
    struct choice *order[MAX_BEST];
    int32_t n = c->request.n, best_of = c->request.params.n, index = 0;
    text_string(out, ",\"choices\":[");
    for (int32_t i = 0; i < c->request.n_prompts; i++) {
        for (int32_t j = 0; j < best_of; j++) order[j] = &c->choices[i * best_of + j];
        if (best_of > n) qsort(order, (size_t)best_of, sizeof *order, compare_choices);
        for (int32_t j = 0; j < n; j++, index++) {
            if (index) text_char(out, ',');
            write_choice(out, c, order[j], index);
        }
    }
    text_string(out, "],\"usage\":");
    answer_write_usage(out, c);
    text_char(out, '}');
}
