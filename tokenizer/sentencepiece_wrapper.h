/* sentencepiece_wrapper.h: the few calls of SentencePiece we need, as plain C. Called by tokenizer.c alone.
 *
 * The .cc behind it is the only file that sees SentencePiece; every C++ exception ends there. All functions but
 * spm_create and spm_destroy are safe on one spm from any number of threads.
 *
 * Time and memory, measured with 0.1.97 (Zen 4, Nov 2026): encoding is linear, at most 1 s for 1 MB of text with BPE
 * and 0.4 s with unigram, whatever the text (one word, spaces, random or unknown characters); while it runs it needs up
 * to 250 bytes per token.
 */
#ifndef GPTD_TOKENIZER_SENTENCEPIECE_WRAPPER_H
#define GPTD_TOKENIZER_SENTENCEPIECE_WRAPPER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct spm;

enum spm_type {
    SPM_TEXT,    // normal, user-defined and unused pieces
    SPM_BYTE,    // "<0x0A>"
    SPM_CONTROL, // never comes out of text
    SPM_UNKNOWN,
};

// Reads a serialized model (the bytes of tokenizer.model), which need not outlive the call. Returns 0, or -1 with the
// library's message. A broken file is a message as far as the library notices; a crafted one can crash 0.1.97.
int spm_create(struct spm **out, const char *model, size_t n, char *error, size_t error_size);
void spm_destroy(struct spm *spm);

int32_t spm_size(const struct spm *spm);
int32_t spm_bos_id(const struct spm *spm); // -1: none
int32_t spm_eos_id(const struct spm *spm); // -1: none
enum spm_type spm_type(const struct spm *spm, int32_t id);
// The piece as it stands in the model, U+2581 for spaces. Borrowed.
const char *spm_piece(const struct spm *spm, int32_t id, size_t *length);
// The id of a piece; -1: none.
int32_t spm_id(const struct spm *spm, const char *piece);

// Encodes valid UTF-8. *ids is malloc'd (NULL if there are none). Returns 0, or -1 with a message.
int spm_encode(const struct spm *spm, const char *text, size_t length, int32_t **ids, size_t *n, char *error,
               size_t error_size);
// Decodes into out, cut to out_size - 1 bytes and NUL-terminated. Returns the length of the whole, or -1 on failure.
int64_t spm_decode(const struct spm *spm, const int32_t *ids, size_t n, char *out, size_t out_size);

#ifdef __cplusplus
}
#endif
#endif
