/* vocab.h: from the bytes of a piece to its id. Called by bpe.c and json_tokenizer.c; immutable once it is filled. */
#ifndef GPTD_TOKENIZER_VOCAB_H
#define GPTD_TOKENIZER_VOCAB_H

#include <stddef.h>
#include <stdint.h>

struct vocab;

// For at most n_pieces of n_bytes in all. NULL: out of memory, or 4 GiB and more.
struct vocab *vocab_create(size_t n_pieces, size_t n_bytes);
void vocab_destroy(struct vocab *v);
// Of pieces with the same bytes the first counts. id >= 0.
void vocab_add(struct vocab *v, const char *bytes, size_t length, int32_t id);
int32_t vocab_find(const struct vocab *v, const char *bytes, size_t length); // -1: none

#endif
