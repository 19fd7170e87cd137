/* model_vectors.h: the checkpoints under tests/vectors with what PyTorch made of them, and how a rig is held against it. */
#ifndef GPTD_TESTS_MODEL_VECTORS_H
#define GPTD_TESTS_MODEL_VECTORS_H

#include "tests/model_rig.h"

enum { MAX_CASES = 96, MAX_LEN = 512, MAX_ROWS = 16, MAX_VOCAB = 512 };

struct expected {
    int32_t ids[MAX_LEN];      // prompt, then generated
    int32_t n_prompt, n_ids;
    int32_t rows[MAX_ROWS], n_rows;
    float logits[MAX_ROWS][MAX_VOCAB];
    int32_t vocab_size, max_model_len;
};

// Directories of checkpoints, sorted. Returns how many.
int vectors_find(char cases[MAX_CASES][128]);
void expected_read(struct expected *x, const char *dir);

double distance(const float *out, const float *ref, int32_t n); // ‖out − ref‖ / ‖ref‖
int32_t argmax(const float *x, int32_t n);

// The whole sequence in steps of random lengths up to max_step (0: in one), tokens given.
void teacher_force(struct rig *r, const struct expected *x, int32_t max_step, float logits[MAX_ROWS][MAX_VOCAB]);

#endif
