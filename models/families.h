/* families.h: what tells one family of GPTs from another: its tensors' names, its configuration's keys and defaults.
 *
 * A family is a row of this table, not a second forward pass. A tensor's full name is
 * root + name + ".weight" or ".bias", with root + layers + N + "." before the names inside layer N.
 */
#ifndef GPTD_MODELS_FAMILIES_H
#define GPTD_MODELS_FAMILIES_H

#include "kernels/kernels.h"

enum position_kind { POSITIONS_LEARNED, POSITIONS_ROPE };

struct family {
    const char *architecture; // in config.json's "architectures"

    // Tensors. NULL: the family has none.
    const char *root;         // before every name but lm_head; absent as a whole in some checkpoints
    const char *token_embed, *pos_embed;
    const char *layers;       // then the layer's number
    const char *norm1;
    const char *qkv[3];       // q, k, v; or one fused tensor, rows q, k, v, each head by head
    const char *attn_out;
    const char *norm2;
    const char *mlp_in[2];    // gate, up; or one tensor when not gated
    const char *mlp_out;
    const char *final_norm;
    const char *lm_head;
    const char *ignored[4];   // endings of tensors that hold nothing to load (masks, tables of old versions)
    bool transposed;          // linear weights are stored [in, out]

    // What config.json does not say.
    enum norm_kind norm;
    bool norm_bias;
    enum position_kind positions;
    bool gated;

    // Keys of config.json; NULL: the family has no such key. What follows a key is its value when absent; a key
    // without one is required.
    const char *hidden_dim_key, *n_layers_key, *n_heads_key, *max_positions_key;
    const char *n_kv_heads_key; int32_t n_kv_heads; // 0: as many as n_heads
    const char *head_dim_key;                       // absent: hidden_dim / n_heads
    const char *intermediate_dim_key;               // with mlp_multiple: absent means mlp_multiple * hidden_dim
    const char *mlp_ratio_key; double mlp_multiple; // 0: intermediate_dim is required
    const char *norm_eps_key; double norm_eps;
    const char *activation_key; const char *activation;
    const char *window_key; int32_t window;         // null: unlimited
    const char *qkv_bias_key, *attn_out_bias_key, *mlp_bias_key; bool qkv_bias, attn_out_bias, mlp_bias;
    bool tied;
    // Keys whose only value that gptd implements is the one the family has by default.
    struct { const char *key; bool value; } fixed[4];
};

// The family that loads the architecture; NULL: none does.
const struct family *family_find(const char *architecture);
// The architectures' names, "A, B, C", for messages.
const char *family_names(void);

#endif
