/* answer_json.h: the JSON that answers of completions and of chat have in common.
 *
 * JSON is written piece by piece into text buffers (no tree per token). Two kinds of functions: those that append to a choice's
 * fragments as its tokens come, and those that put the fragments into an answer or a chunk, which empties them.
 */
#ifndef GPTD_SERVER_ANSWER_JSON_H
#define GPTD_SERVER_ANSWER_JSON_H

#include "server/completion.h"

// Before the next element of a list without its brackets.
void answer_separate(struct text_buffer *list);
// A token's name as a JSON string.
void answer_write_token(struct text_buffer *out, const struct completion *c, int32_t id);
// A token's id, if the answer carries ids: asked for, or without a tokenizer.
void answer_write_token_id(const struct completion *c, struct choice *ch, int32_t id);
bool answer_returns_ids(const struct completion *c);

// What every answer of a request begins with, up to and without `"choices"`: with an id of its own and the time.
void answer_write_head(struct text_buffer *out, const char *id_prefix, const char *object, const char *model);
// Whether a stream has anything to say of ch.
bool choice_has_news(const struct choice *ch);
// "name":[...]: takes the elements.
void answer_write_list(struct text_buffer *out, const char *name, struct text_buffer *elements);
// ,"finish_reason":...
void answer_write_finish(struct text_buffer *out, const char *finish);
// ,"prompt_token_ids":[...]
void answer_write_prompt_ids(struct text_buffer *out, const struct completion_prompt *prompt);
// ,"prompt_logprobs":[...] in vLLM's form: null for the first token, then {id: {logprob, decoded_token}} of each and its
// alternatives.
void answer_write_prompt_logprobs(struct text_buffer *out, const struct completion *c, const struct choice *ch);
// {"prompt_tokens":...}
void answer_write_usage(struct text_buffer *out, const struct completion *c);

#endif
