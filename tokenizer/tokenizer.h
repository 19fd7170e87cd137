/* tokenizer.h: text <-> token ids.
 *
 * Called by server/ alone; knows nothing of HTTP or of the engine. A tokenizer is immutable after creation and may be
 * used from any number of threads at once. Text is UTF-8 with a length; it may hold NUL bytes.
 * Only the wrapper (sentencepiece_wrapper.cc) sees C++: every exception ends there and becomes an error message.
 */
#ifndef GPTD_TOKENIZER_TOKENIZER_H
#define GPTD_TOKENIZER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct tokenizer;

enum { TOKENIZER_ABSENT = 1 }; // tokenizer_create: the directory has no tokenizer we read

// Reads dir/tokenizer.model (SentencePiece), or where there is none dir/tokenizer.json (json_tokenizer.h); and, if there,
// tokenizer_config.json: beside the first add_bos_token and added tokens, beside the second the names of BOS and EOS.
// Returns 0; TOKENIZER_ABSENT when there is none (*out is NULL, not an error); -1 with a message in error.
int tokenizer_create(struct tokenizer **out, const char *dir, char *error, size_t error_size);
void tokenizer_destroy(struct tokenizer *t);

int32_t tokenizer_vocab_size(const struct tokenizer *t);
int32_t tokenizer_bos_id(const struct tokenizer *t);  // -1: none
int32_t tokenizer_eos_id(const struct tokenizer *t);  // -1: none
bool tokenizer_adds_bos(const struct tokenizer *t);   // whether a plain prompt starts with BOS
bool tokenizer_is_special(const struct tokenizer *t, int32_t id); // control tokens: BOS, EOS, chat marks

// Encodes text. add_special: put BOS first if the tokenizer does so. Control tokens written out in the text
// ("</s>") become their ids only if parse_special; each stretch of text between them is then encoded as if it stood
// alone. User-defined symbols of the model are SentencePiece's own affair: it finds them always, as it does in
// training. Of added tokens beyond the model's vocabulary, special ones need parse_special, the others do not.
// *ids is malloc'd, the caller frees; n may be 0.
// Ids are those of SentencePiece itself, for any length (1 MB takes less than a second; see sentencepiece_wrapper.h).
// Returns 0, or -1 with a message (text is not UTF-8, out of memory).
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t length, bool add_special, bool parse_special,
                     int32_t **ids, size_t *n, char *error, size_t error_size);

// The bytes id stands for inside running text: U+2581 is a space, byte pieces are their byte, control tokens are
// their name ("</s>"), <unk> is what SentencePiece shows for it (" \u2047 "). *length may be 0 (an id that only pads
// the vocabulary). Borrowed. NULL: id is outside the vocabulary.
const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *length);

// The whole of ids as text, as SentencePiece decodes it (the dummy prefix space of the first word is dropped; a
// denormalizer in the model is not applied), broken UTF-8 as utf8_stream makes it. skip_special leaves out what
// tokenizer_is_special names. *text is malloc'd and NUL-terminated. -1: an id outside the vocabulary (named), out of
// memory.
int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                     size_t *length, char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
