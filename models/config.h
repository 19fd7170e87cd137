/* config.h: what a checkpoint's config.json says, checked and brought into one form for every family.
 *
 * Called by model.c. Every number is ranged, and an option that gptd does not implement is refused by name, never
 * guessed at; keys that change nothing are ignored. The ranges bound every product of two sizes below 2^63 bytes.
 */
#ifndef GPTD_MODELS_CONFIG_H
#define GPTD_MODELS_CONFIG_H

#include <cjson/cJSON.h>

#include "models/families.h"
#include "models/model.h"
#include "models/rope.h"

enum { MAX_LAYERS = 1 << 10, MAX_HEADS = 1 << 12, MAX_LAYER_KINDS = 2 };

// Layers that see equally far and turn alike: a KV group.
struct layer_kind {
    int32_t n_layers;
    int32_t window;           // 0: unlimited
    struct rope_config rope;  // of families with POSITIONS_ROPE
};

struct model_config {
    const struct family *family;
    enum dtype dtype;         // "dtype" or "torch_dtype", else BF16: what dummy weights are made of
    bool dtype_is_given;
    int32_t vocab_size, n_layers, hidden_dim, n_heads, n_kv_heads, head_dim, intermediate_dim;
    int32_t max_positions;    // rows of the table of learned positions
    int32_t max_model_len;    // tokens that the positions allow, scaling included
    struct layer_kind kinds[MAX_LAYER_KINDS];
    int32_t n_kinds;
    uint8_t kind_of_layer[MAX_LAYERS];
    float norm_eps;
    enum activation activation;
    float attn_scale, attn_softcap, logit_softcap; // the caps 0: none
    bool parallel;            // both halves of a layer read the same residual stream
    bool qkv_bias, attn_out_bias, mlp_bias, tied;
    int32_t n_experts;        // 0: every layer has one MLP
    int32_t n_chosen, expert_dim;
    bool has_experts[MAX_LAYERS]; // of the layer
    bool renormalize;         // weights of the chosen experts sum up to 1
    int32_t bos_token_id;     // -1: none
    int32_t eos_token_ids[MAX_EOS_IDS], n_eos_token_ids;
};

// Reads dir's config.json, and the EOS ids of generation_config.json if there is one.
int config_read(struct model_config *c, const char *dir, struct error *e);

// The same from parsed trees. generation may be NULL.
int config_parse(struct model_config *c, const cJSON *config, const cJSON *generation, struct error *e);

#endif
