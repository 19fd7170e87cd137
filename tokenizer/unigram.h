/* unigram.h: the most probable division of a word into pieces (Kudo, 2018), as Hugging Face's tokenizers find it.
 *
 * Called by json_tokenizer.c. Of equally probable ways to a place the one with the earliest last piece counts. Immutable after
 * creation; any number of threads may encode at once.
 */
#ifndef GPTD_TOKENIZER_UNIGRAM_H
#define GPTD_TOKENIZER_UNIGRAM_H

#include <stddef.h>
#include <stdint.h>

#include "tokenizer/id_list.h"
#include "tokenizer/vocab.h"

struct unigram;

struct unigram_piece {
    const char *bytes; // [length]
    size_t length;
    double score;      // log probability
    int32_t id;
};

// pieces: [n], copied, sorted by this call; vocab: of the same pieces, borrowed; byte_ids: [256], of <0x00> to <0xFF>, -1: none,
// for what is unknown; NULL: no such fallback. unk_id: -1 where nothing may be unknown. NULL: out of memory.
struct unigram *unigram_create(struct unigram_piece *pieces, size_t n, const struct vocab *vocab, const int32_t *byte_ids,
                               int32_t unk_id);
void unigram_destroy(struct unigram *u);

// Appends the ids of one word, of valid UTF-8. Returns 0; -1 when out of memory; 1 if something is unknown, and nothing is for
// that.
int unigram_encode(const struct unigram *u, const char *word, size_t length, struct id_list *out);

#endif
