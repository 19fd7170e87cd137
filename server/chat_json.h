/* chat_json.h: what is of /v1/chat/completions alone in its answers' JSON. See answer_json.h. */
#ifndef GPTD_SERVER_CHAT_JSON_H
#define GPTD_SERVER_CHAT_JSON_H

#include "server/completion.h"

// A token's element of `logprobs.content`, with n_top of the likeliest.
void chat_write_logprob(const struct completion *c, struct choice *ch, const struct token_out *token, int32_t n_top);

void chat_write_head(struct text_buffer *out, const char *model, bool stream);
// What follows `"choices":[` in a chunk, the bracket included. A choice's first chunk has its role, its last its finish_reason
// and no text, those between what has been collected of ch, which they take: call it while choice_has_news.
void chat_write_chunk(struct text_buffer *out, const struct completion *c, struct choice *ch, int32_t index);
// Everything that follows the head of an answer sent whole.
void chat_write_whole(struct text_buffer *out, struct completion *c);

#endif
