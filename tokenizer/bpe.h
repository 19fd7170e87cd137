/* bpe.h: byte-pair encoding of words into token ids (Sennrich et al., 2016), as Hugging Face's tokenizers do it.
 *
 * Called by json_tokenizer.c. Symbols are ids from the start: of bytes, or of characters, whichever the pieces are made of. Merges
 * apply by rank, among equals the leftmost first. Immutable after creation; any number of threads may encode at once.
 */
#ifndef GPTD_TOKENIZER_BPE_H
#define GPTD_TOKENIZER_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tokenizer/id_list.h"
#include "tokenizer/vocab.h"

struct bpe;

struct bpe_options {
    bool byte_level;      // pieces are bytes; else UTF-8 characters
    bool byte_fallback;   // a character without a piece becomes its bytes' pieces, <0x00> to <0xFF>
    bool ignore_merges;   // a word that is a piece is that piece, whatever the merges
    bool fuse_unk;        // neighbours that are unknown become one
    int32_t unk_id;       // -1: what is unknown is left out
};

struct bpe_merge {
    int32_t left, right, merged; // ids
};

// vocab: borrowed; byte_ids: [256], of the pieces <0x00> to <0xFF>, -1: none; merges: [n_merges] by rank. NULL: out of memory.
struct bpe *bpe_create(const struct bpe_options *options, const struct vocab *vocab, const int32_t *byte_ids,
                       const struct bpe_merge *merges, size_t n_merges);
void bpe_destroy(struct bpe *bpe);

// Appends the ids of one word; n log n in its length. Returns 0, or -1 when out of memory.
int bpe_encode(const struct bpe *bpe, const char *word, size_t length, struct id_list *out);

#endif
