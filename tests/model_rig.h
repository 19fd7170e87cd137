/* model_rig.h: a loaded model with a paged cache of its own, and the bookkeeping of one sequence: what the engine does,
 * as simply as it can be done. Blocks are handed out in random order, and given back, poisoned, once they lie wholly
 * behind the window. */
#ifndef GPTD_TESTS_MODEL_RIG_H
#define GPTD_TESTS_MODEL_RIG_H

#include "models/model.h"

struct rig_options {
    const char *dir;
    int32_t max_model_len;      // 0: what the checkpoint allows
    int32_t max_tokens;         // of a step
    int32_t max_len;            // of the sequence
    int32_t block_size;
    int32_t max_seqs;           // of a batch, each with room for max_len tokens; 0: one
    bool reference_attention, deterministic;
    const char *isa;            // NULL: the best
    enum load_format load_format;
    const char *backend;        // NULL: "cpu"
    enum dtype dtype;           // of copied weights; F32: the checkpoint's
    unsigned seed;              // of the blocks' order
};

struct rig_group {
    struct kv_layer *layers;    // [n_layers of the group]
    int32_t *free_blocks, n_free;
    int32_t *block_table;       // [max_blocks]
    int32_t n_freed;            // blocks behind the window, given back
};

struct rig {
    const struct kernels *kernels;
    struct device *device;
    struct model *model;
    const struct model_info *info;
    int32_t block_size, n_blocks, max_blocks, max_len;
    struct rig_group groups[MAX_KV_GROUPS];
    int32_t n_context;          // tokens in the cache
};

// Check assertions inside: a failure ends the test.
void rig_init(struct rig *r, const struct rig_options *o);
void rig_deinit(struct rig *r);
void rig_reset(struct rig *r);  // an empty sequence

// Feeds n tokens. logits [n_rows, vocab] receives those of the n_rows tokens (indices into this step, ascending).
void rig_step(struct rig *r, const int32_t *tokens, int32_t n, const int32_t *rows, int32_t n_rows, float *logits);

#endif
