/* model.h: what a GPT is: its configuration, its weights, and one forward pass written in ops.
 *
 * Called by engine/ alone. A model is created in two steps, so that its exact memory can be planned and refused before
 * anything is allocated: model_create reads config.json and the weight files' headers; model_load maps and binds the
 * weights and allocates the workspace. model_forward enqueues one step for a ragged batch and never allocates.
 * The KV cache belongs to the engine; the model says its geometry (`struct kv_spec`) and is handed the tensors.
 */
#ifndef GPTD_MODELS_MODEL_H
#define GPTD_MODELS_MODEL_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MAX_KV_GROUPS = 4, MAX_EOS_IDS = 8 };

enum load_format {
    LOAD_AUTO,  // the weights in the checkpoint's safetensors files
    LOAD_DUMMY, // random weights of the configured shapes and type: only config.json is needed
};

struct model_options {
    const char *dir;              // checkpoint directory
    enum load_format load_format;
    int32_t max_model_len;        // 0: what config.json allows
    int32_t max_num_batched_tokens; // rows of the workspace
    int32_t max_logits_rows;      // rows of logits a step may ask for
    uint64_t seed;                // of dummy weights
    // The device cannot read weights where the files are mapped: all are copied, the matrices in one 16-bit type:
    // `dtype` or, if that is F32, the checkpoint's own (BF16 for one of F32).
    bool copies_weights;
    enum dtype dtype;
    int32_t tp_rank, tp_size;     // tensor parallelism: 0, 1 for now
};

// Layers that share a cache geometry form a group with its own block table.
struct kv_spec {
    int32_t n_layers;             // layers of this group
    int32_t window;               // tokens; 0: unlimited
    int32_t n_kv_heads, k_dim, v_dim;
    enum dtype dtype;
};

struct model_info {
    char architecture[64];        // as config.json names it
    enum dtype dtype;             // of the weights
    int32_t vocab_size, n_layers, hidden_dim, n_heads, n_kv_heads, head_dim;
    int32_t intermediate_dim;     // MLP width
    int32_t max_model_len;        // effective: at most what the checkpoint allows
    int32_t bos_token_id;         // -1: none
    int32_t eos_token_ids[MAX_EOS_IDS], n_eos_token_ids; // of config.json and generation_config.json together
    int32_t n_kv_groups;
    struct kv_spec kv_groups[MAX_KV_GROUPS];
    int32_t max_dim;              // widest activation row, for device_options
    uint64_t n_parameters;
    size_t weights_bytes;         // mapped or allocated by model_load
    size_t workspace_bytes;       // allocated by model_load, logits included
};

// One step's ragged batch: never padded, decode sequences first. Host arrays, owned and reused by the engine.
// For each kv group g: block_tables[g] is [n_seqs, max_blocks], slot_mapping[g] is [n_tokens].
// What the cache has of a sequence with one token, but that token's, was computed by earlier steps: no two rows are of one
// sequence, and none reads what another computes in the same step (kernels/kernels.h, `stage`).
struct batch {
    int32_t n_tokens, n_seqs, n_logits_rows;
    // Each sequence has one token, and row i of the logits is its. The last rows may be padding (kernels/kernels.h),
    // so that few different sizes occur.
    bool is_decode;
    int32_t max_seqs;             // room of the arrays below, for a device that keeps a place for each; 0: n_seqs
    int32_t max_blocks;           // width of a block table row
    int32_t block_size;           // tokens
    int32_t *tokens;              // [n_tokens]; -1: sampled by an earlier step: take it from history
    int32_t *positions;           // [n_tokens]
    int32_t *history_rows;        // [n_tokens]
    int32_t *slot_mapping[MAX_KV_GROUPS]; // [n_tokens]
    int32_t *cu_seqlens_q;        // [n_seqs + 1]
    int32_t *context_lens;        // [n_seqs], new tokens included
    int32_t *block_tables[MAX_KV_GROUPS]; // [n_seqs, max_blocks]
    uint64_t *table_stamps;       // [n_seqs] as in stage_table (kernels/kernels.h), of the rows of all groups; NULL: none
    int32_t *logits_rows;         // [n_logits_rows]: tokens whose logits are wanted, ascending; one may repeat (n > 1)
    int32_t *adapter_ids;         // [n_tokens]; -1: none (LoRA comes later)
    struct history history;
    uint64_t *layer_tickets;      // [n_layers], out: recorded after each layer; NULL: not asked for. Not with graphs.
};

// The whole cache: layers[g][i] is layer i of group g (in the order of the model's layers of that group).
struct kv_cache {
    struct kv_layer *layers[MAX_KV_GROUPS];
    int32_t n_blocks[MAX_KV_GROUPS];
};

struct model;

// Reads the model's plan; allocates nothing but the struct. The kernels table is needed by model_load, not here.
int model_create(struct model **out, const struct model_options *options, struct error *e);
void model_destroy(struct model *model);
const struct model_info *model_info_get(const struct model *model);

// Maps the weights, checks them against the configuration, binds them to the device, allocates the workspace.
int model_load(struct model *model, const struct kernels *kernels, struct device *device, struct error *e);

// Enqueues embedding .. logits for the batch. *logits is the model's own workspace, [n_logits_rows, vocab_size] F32,
// row i for batch->logits_rows[i], valid until the next forward. n_logits_rows may be 0 (logits->data is then NULL).
int model_forward(struct model *model, const struct batch *batch, const struct kv_cache *kv, struct tensor *logits,
                  struct error *e);

// The path of the mapped weights file that the address lies in; NULL: in none. May be called from a signal handler.
const char *model_file_at(const void *address);

#ifdef __cplusplus
}
#endif
#endif
