/* weights.h: a model's weights by their place in it, bound to a checkpoint's tensors or to random numbers.
 *
 * Called by model.c; read by forward.c. One walk over the model serves both steps: weights_plan finds and checks every
 * tensor and adds up its bytes, weights_load does the same again and binds. A tensor is used in place, in the map, but:
 * - linear weights that the family stores as [in, out] (GPT-2) are copied, transposed;
 * - fused q, k, v that the family stores head by head (GPT-NeoX, BLOOM) are copied, all heads of q first;
 * - a tensor whose data is not aligned to its own element size is copied;
 * - all are copied for a device that cannot read the map, the matrices converted to one type;
 * - dummy weights have no file.
 * Copies lie in one allocation, the arena. Layers' fused products (q, k, v; gate, up) are parts, not copies.
 */
#ifndef GPTD_MODELS_WEIGHTS_H
#define GPTD_MODELS_WEIGHTS_H

#include "models/checkpoint.h"
#include "models/config.h"

struct norm_weights {
    struct tensor weight, bias; // [hidden_dim], of heads [head_dim]; data NULL: none
};

struct layer_weights {
    struct norm_weights norm1, norm2, q_norm, k_norm, post_attn_norm, post_mlp_norm;
    struct weight qkv;          // [(n_heads + 2 n_kv_heads) * head_dim, hidden_dim]
    struct weight attn_out;     // [hidden_dim, n_heads * head_dim]
    // One MLP, or, with these, not NULL, experts:
    struct weight *expert_in, *expert_out; // [n_experts]: as mlp_in and mlp_out, of expert_dim
    struct weight router;       // [n_experts, hidden_dim]
    struct weight mlp_in;       // [intermediate_dim, or twice that: gate, up; hidden_dim]
    struct weight mlp_out;      // [hidden_dim, intermediate_dim]
};

struct weights {
    struct tensor token_embed;  // [vocab_size, hidden_dim]
    struct tensor pos_embed;    // [max_positions, hidden_dim]; data NULL: none
    struct norm_weights embed_norm; // data NULL: none
    struct layer_weights *layers; // [n_layers]
    struct weight *experts;     // [n_layers, 2, n_experts]: what the layers' expert_in and expert_out point to; NULL: none
    struct norm_weights final_norm;
    struct weight lm_head;      // [vocab_size, hidden_dim]
    uint64_t n_parameters;
    size_t mapped_bytes;        // used in place
    size_t arena_bytes;         // allocated by weights_load
    size_t n_copies;            // runs of rows that are copied there
    void *arena;
    bool copied;                // all of them
    enum dtype dtype;           // of the matrices, if copied
};

// The type of the checkpoint's token embedding; BF16 where it has none.
enum dtype weights_dtype(const struct model_config *config, const struct checkpoint *checkpoint);

// checkpoint NULL: dummy weights of config->dtype, or of `dtype` if copied.
int weights_plan(struct weights *w, const struct model_config *config, const struct checkpoint *checkpoint,
                 bool copied, enum dtype dtype, struct error *e);
// After weights_plan with the same arguments. The seed is that of dummy weights.
int weights_load(struct weights *w, const struct model_config *config, struct checkpoint *checkpoint, uint64_t seed,
                 const struct kernels *kernels, struct device *device, struct error *e);
// kernels and device may be NULL before weights_load.
void weights_free(struct weights *w, const struct kernels *kernels, struct device *device);

#endif
