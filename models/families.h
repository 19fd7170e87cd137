/* families.h: what tells one family of GPTs from another: its tensors' names, its configuration's keys and defaults.
 *
 * A family is a row of this table, not a second forward pass. A tensor's full name is
 * root + name + ".weight" or ".bias", with root + layers + N + "." before the names inside layer N.
 */
#ifndef GPTD_MODELS_FAMILIES_H
#define GPTD_MODELS_FAMILIES_H

#include "kernels/kernels.h"

enum position_kind { POSITIONS_LEARNED, POSITIONS_ROPE, POSITIONS_ALIBI };

struct family {
    const char *architecture; // in config.json's "architectures"

    // Tensors. NULL: the family has none.
    const char *root[2];      // before every name but lm_head: in some files one, in some the other, in some none
    const char *token_embed, *embed_norm, *pos_embed;
    const char *layers;       // then the layer's number
    const char *norm1;
    const char *qkv[3];       // q, k, v; or one fused tensor, rows q, k, v, each head by head
    const char *q_norm, *k_norm; // of each head
    const char *attn_out;
    const char *post_attn_norm, *post_mlp_norm; // of what a half adds to the residual stream
    const char *norm2;
    const char *mlp_in[2];    // gate, up: two tensors or one fused; or one when not gated
    const char *mlp_out;
    const char *router;       // of experts instead of the MLP, in all layers or, with mlp_out, in some
    const char *experts;      // then an expert's number, then:
    const char *expert_in[2], *expert_out;
    const char *final_norm;
    const char *lm_head;
    const char *ignored[4];   // endings of tensors that hold nothing to load (masks, tables of old versions)
    const char *other_parts[5]; // beginnings of tensors of what is not served (a vision tower)
    bool transposed;          // linear weights are stored [in, out]
    bool interleaved;         // the fused qkv has q, k and v of one head, then those of the next

    // What config.json does not say.
    enum norm_kind norm;
    bool norm_bias;
    float norm_weight_offset; // what the files' weights of norms lack
    enum position_kind positions;
    bool gated;
    bool scales_embedding;    // by the root of hidden_dim
    bool gelu_is_tanh;        // "gelu" in old files means the approximation
    bool yarn_is_longrope;    // "yarn" and "su" are old names of "longrope"

    // Keys of config.json; NULL: the family has no such key. Of two, the first that is there counts. What follows a key
    // is its value when absent; a key without one is required.
    const char *text_key;                           // of the object that has all others; NULL: they are the file's own
    int32_t vocab_size;
    const char *hidden_dim_key[2], *n_layers_key[2], *n_heads_key[2]; int32_t n_heads;
    const char *max_positions_key; int32_t max_positions;
    int32_t original_max_positions;                 // 0: as many as max_positions
    const char *n_kv_heads_key; int32_t n_kv_heads; // 0, or the key is null: as many as n_heads
    const char *head_dim_key; int32_t head_dim;     // 0, or the key is null: hidden_dim / n_heads
    const char *intermediate_dim_key;               // with mlp_multiple: absent means mlp_multiple * hidden_dim
    const char *mlp_ratio_key; double mlp_multiple; // 0: intermediate_dim is required
    const char *norm_eps_key; double norm_eps;
    const char *activation_key; const char *activation;
    const char *theta_key; double theta;            // of rotary positions
    const char *local_theta_key; double local_theta; // likewise of windowed layers, which are not scaled; NULL: the same
    const char *rotary_key; double rotary;          // part of a head that rotates; NULL: all of it
    const char *query_scale_key; double query_scale; // scores are divided by its root; NULL: head_dim
    const char *attn_softcap_key; double attn_softcap; // null: none
    const char *logit_softcap_key; double logit_softcap;
    const char *parallel_key; bool parallel;        // both halves of a layer read the same residual stream
    const char *n_experts_key[2]; int32_t n_experts;
    const char *n_chosen_key; int32_t n_chosen;
    const char *expert_dim_key; int32_t expert_dim; // NULL: intermediate_dim
    const char *renormalize_key; bool renormalize;
    const char *qkv_bias_key, *attn_out_bias_key, *mlp_bias_key; bool qkv_bias, attn_out_bias, mlp_bias;
    bool tied;

    // Windows: of the layers that "layer_types" names, or, where that is absent, of those that all rules leave.
    const char *window_key; int32_t window;         // null: unlimited
    const char *window_switch_key;                  // false, also when absent: unlimited
    const char *first_windowed_key; int32_t first_windowed; // layers before it are not windowed
    const char *window_period_key; int32_t window_period;   // every so many layers one is not; 0: all are

    // Keys whose only value that gptd implements is the one the family has by default.
    struct { const char *key; bool value; } fixed[4];
};

// The family that loads the architecture; NULL: none does.
const struct family *family_find(const char *architecture);
// The architectures' names, for messages.
const char *family_names(void);

#endif
