/* completion_json.h: the JSON of completions, written piece by piece into text buffers (no tree per token).
 *
 * Two kinds of functions: those that append to a choice's fragments as its tokens come, and those that put the
 * fragments into an answer or a chunk, which empties them.
 */
#ifndef GPTD_SERVER_COMPLETION_JSON_H
#define GPTD_SERVER_COMPLETION_JSON_H

#include "server/completion.h"

// A token's entry in `logprobs`, with up to n_top of its likeliest alternatives, itself always among them. offset: code
// points of text before it.
void completion_write_logprob(const struct completion *c, struct choice *ch, const struct token_out *token,
                              int32_t n_top, size_t offset);
// The prompt's entries: [n_ids] of them, the first without a value.
void completion_write_prompt_logprobs(const struct completion *c, struct choice *ch, const struct token_out *tokens);
// Its id, if the answer carries ids.
void completion_write_token_id(const struct completion *c, struct choice *ch, int32_t id);

// What every answer of a request begins with, up to and without `"choices"`.
void completion_write_head(struct text_buffer *out, const char *id, int64_t created, const char *model);
// Whether a stream has anything to say of ch.
bool choice_has_news(const struct choice *ch);
// {"index":...}: takes what has been collected of ch.
void choice_write(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index);
// {"prompt_tokens":...}
void completion_write_usage(struct text_buffer *out, const struct completion *c);
// Everything that follows the head of an answer sent whole: the n best choices of each prompt, and the usage.
void completion_write_whole(struct text_buffer *out, struct completion *c);

#endif
