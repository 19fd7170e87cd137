/* infill.h: filling in the middle: a prompt and a suffix between the marks that a model was trained with.
 *
 * Called by server/ alone, for `suffix` of /v1/completions. The marks are found by their names in the vocabulary; the order of the
 * parts is the family's (infill.c has the table). Each part is encoded apart, so that no token joins text with a mark.
 */
#ifndef GPTD_TOKENIZER_INFILL_H
#define GPTD_TOKENIZER_INFILL_H

#include "tokenizer/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { INFILL_MAX_ENDS = 8 };

struct infill {
    bool found;                                // whether the model can do it
    bool suffix_first;                         // suffix mark, suffix, prefix mark, prefix: what the middle follows comes last
    int32_t prefix_id, suffix_id, middle_id;   // the marks; middle -1: the family has none
    int32_t end_ids[INFILL_MAX_ENDS], n_ends;  // what the model may end a middle with, beside EOS: the marks of this family
    bool adds_space;                           // the tokenizer puts a space before a text, which a suffix must not have
};

// t may be NULL: not found.
void infill_find(struct infill *f, const struct tokenizer *t);

// Ids of the prompt that asks for what is between prefix and suffix; f was found. Both may hold control tokens. *ids is malloc'd.
// Returns 0, or -1 with a message.
int infill_encode(const struct infill *f, const struct tokenizer *t, const char *prefix, size_t prefix_length, const char *suffix,
                  size_t suffix_length, bool add_special, int32_t **ids, size_t *n, char *error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
