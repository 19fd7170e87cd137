/* completion_json.h: what is of /v1/completions alone in its answers' JSON. See answer_json.h. */
#ifndef GPTD_SERVER_COMPLETION_JSON_H
#define GPTD_SERVER_COMPLETION_JSON_H

#include "server/completion.h"

// A token's entry in `logprobs`, with up to n_top of its likeliest alternatives, itself always among them. offset: code
// points of text before it.
void completion_write_logprob(const struct completion *c, struct choice *ch, const struct token_out *token,
                              int32_t n_top, size_t offset);
// The prompt's entries: [n_ids] of them, the first without a value.
void completion_write_prompt_logprobs(const struct completion *c, struct choice *ch, const struct token_out *tokens);

void completion_write_head(struct text_buffer *out, const char *model, bool stream);
// What follows `"choices":[` in a chunk, the bracket included: takes what has been collected of ch.
void completion_write_chunk(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index);
// Everything that follows the head of an answer sent whole: the n best choices of each prompt, and the usage.
void completion_write_whole(struct text_buffer *out, struct completion *c);

#endif
