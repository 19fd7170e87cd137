/* workspace.h: the activations of one step, in one allocation, planned before it is made.
 *
 * Called by model.c, written by forward.c. T is max_num_batched_tokens, A the activations' type, P pairs of a token and one of
 * its experts. The attention half and the MLP half of a layer are never alive together, unless they are parallel, and share
 * their bytes.
 */
#ifndef GPTD_MODELS_WORKSPACE_H
#define GPTD_MODELS_WORKSPACE_H

#include "models/config.h"

struct workspace {
    enum dtype dtype;       // A
    int32_t max_tokens;     // T
    int32_t max_logits_rows;
    void *memory;           // NULL while planning
    size_t size;            // bytes

    void *x;                // [T, hidden_dim] A: the residual stream
    void *normed;           // [T, hidden_dim] A
    void *qkv, *attn;       // [T, (n_heads + 2 n_kv_heads) * head_dim], [T, n_heads * head_dim] A
    void *mlp_in;           // [T, intermediate_dim, or twice that: gate, up] A; and [P, expert_dim, or twice that]
    void *mlp_out;          // [T, intermediate_dim] A, and [P, expert_dim]; mlp_in itself when not gated
    float *router_logits;   // [T, n_experts]
    void *expert_out;       // [P, hidden_dim] A
    struct expert_plan plan;
    float *cos_sin[MAX_LAYER_KINDS];  // [T, rope.dim]
    float *inv_freq[MAX_LAYER_KINDS]; // [rope.dim / 2]
    float *alibi_slopes;    // [n_heads]; NULL: none
    void *rows;             // [max_logits_rows, hidden_dim] A
    float *logits;          // [max_logits_rows, vocab_size]
};

// Lays everything out from w->memory on, and sets w->size. w's dtype, max_tokens, max_logits_rows, memory are given.
void workspace_layout(struct workspace *w, const struct model_config *c);

#endif
