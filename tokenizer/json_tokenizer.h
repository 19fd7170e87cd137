/* json_tokenizer.h: tokenizers as Hugging Face's tokenizer.json has them: added tokens, normalizer, pre-tokenizer, model,
 * post-processor.
 *
 * Called by tokenizer.c, which knows what ids stand for and decodes. Immutable after creation; any number of threads may encode
 * at once. Ids are those of the tokenizers library. Models: BPE of bytes or of characters, Unigram. What we do not know is refused
 * by name.
 */
#ifndef GPTD_TOKENIZER_JSON_TOKENIZER_H
#define GPTD_TOKENIZER_JSON_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tokenizer/id_list.h"
#include "tokenizer/tokens.h"

struct json_tokenizer;

// json: [length], the file. tokens: [*n_tokens], what the ids stand for, borrowed. Returns 0, or -1 with a message.
int json_tokenizer_create(struct json_tokenizer **out, const char *json, size_t length, struct token **tokens, int32_t *n_tokens,
                          enum strip *strip, char *error, size_t error_size);
void json_tokenizer_destroy(struct json_tokenizer *t);

// The id of a token by its name in the file; -1: none.
int32_t json_tokenizer_id(const struct json_tokenizer *t, const char *name);
// What the post-processor puts before a text; *n may be 0. Borrowed.
const int32_t *json_tokenizer_prefix(const struct json_tokenizer *t, size_t *n);

// Appends the ids of valid UTF-8, as tokenizer_encode has it. Returns 0, or -1 with a message.
int json_tokenizer_encode(const struct json_tokenizer *t, const char *text, size_t length, bool add_special, bool parse_special,
                          struct id_list *list, char *error, size_t error_size);

#endif
