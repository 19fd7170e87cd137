/* kernels.h: the ops a GPT is made of, on ragged batches, behind one table per backend.
 *
 * Called by models/ (the forward pass) and engine/ (memory, history, sampling, block copies). A backend is a
 * `struct kernels`; everything it needs to remember lives in its `struct device` (no globals: one process may drive
 * several). kernels/cpu/ is the reference and runs anywhere; a CUDA backend fills the same table.
 *
 * Execution: ops are enqueued in order on the device's one stream and may return before they are done. Their arguments
 * (params structs and the host arrays they point to) are copied or consumed before the call returns. `record` marks a
 * point in the stream, `wait` blocks until it is reached. The CPU backend runs each op before returning.
 *
 * Memory: pointers in `struct tensor` and `struct weight` are device pointers: from `alloc`, or into a mapped file where
 * the backend reads_mapped_weights.
 * Ops never allocate. All tensors are contiguous, row-major, the last dimension fastest.
 *
 * The same answer every time: an op's result for a row (token, sequence) depends on that row's own data and position
 * alone, bit for bit, never on what else is in the batch. On the CPU this holds for every op. On a GPU
 * linear breaks it, and attention where a sequence's one query takes another kernel than several do; with
 * `deterministic` neither does.
 *
 * Activations (hidden states, qkv, logits) have the type `activation_dtype` answers: F32 on the CPU; logits always F32.
 *
 * Shapes use: T = n_tokens in the batch, S = n_seqs, H = n_heads, KV = n_kv_heads, D = head_dim, V = vocab_size.
 */
#ifndef GPTD_KERNELS_KERNELS_H
#define GPTD_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"
#include "kernels/sampling.h"

#ifdef __cplusplus
extern "C" {
#endif

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_I32 };

size_t dtype_size(enum dtype dtype);          // bytes per element
const char *dtype_name(enum dtype dtype);     // "F32", "F16", "BF16", "I32": as safetensors writes them
// to[n] = from[n], rounded to nearest, ties to even. Neither type is I32; `from` may stand at any address.
void dtype_convert(void *to, enum dtype to_dtype, const void *from, enum dtype from_dtype, size_t n);

enum { MAX_DIMS = 4, MAX_WEIGHT_PARTS = 3 };

struct tensor {
    void *data;
    enum dtype dtype;
    int32_t n_dims;
    size_t shape[MAX_DIMS];
};

struct device; // a backend's own state: thread pool, streams, scratch

// ---- memory, streams ------------------------------------------------------------------------------------------------

struct device_options {
    int32_t n_threads;      // CPU: worker threads including the caller; 0: one per usable core
    bool deterministic;     // CUDA: linear and attention, too, sum a row in one order whatever the batch; the CPU always does
    bool reference_attention; // the standard attention (scores in full) instead of flash: for comparison, on the CPU alone
    const char *isa;        // CPU: NULL = the best the machine has; "avx512bf16", "avx512", "avx2", "generic" force one (tests)
    int32_t max_vocab_size; // scratch for sampling is sized at creation: ops never allocate
    int32_t max_context;    // likewise: the longest context any sequence can have, tokens
    int32_t max_dim;        // likewise: the widest row any op will see (hidden, intermediate, qkv), elements
    int32_t max_tokens;     // likewise: the most rows (tokens) any op will see in one call
    int32_t max_seqs;       // likewise: the most sequences in one batch
    int32_t n_heads, n_kv_heads, head_dim; // of the model's attention
    int32_t block_size;     // tokens of a KV block
    int32_t n_tables;       // block tables of a step, one for each KV group; 0: one
};

// A host array that ops of the coming step will be given, so that it is copied to the device once, not by every op.
struct stage_array {
    const void *host;
    size_t bytes;
    size_t capacity;        // bytes it may have in any step: its place on the device is fixed
};

// A block table of the step, [n_seqs, width], of which the ops read the entries of blocks that a query of this step sees.
struct stage_table {
    const int32_t *host, *cu_seqlens_q, *context_lens; // as in attention_params
    int32_t n_seqs, width, block_size;
    int32_t window;         // 0: unlimited
    // [n_seqs]: a row that has the stamp which its place had in an earlier step has the same entries, as far as both were
    // seen. 0: nothing is said of it. NULL: of none.
    const uint64_t *stamps;
};

// Random weights, the same on every backend: element i is table[w], w the 16-bit word i % 4, lowest first, of
// mix(key + i / 4 * 0x9E3779B97F4A7C15), where mix is SplitMix64's output function: https://prng.di.unimi.it/splitmix64.c
enum { DRAW_TABLE_SIZE = 1 << 16 };

struct draw_params {
    void *to;               // device, [n] of a 16-bit type, 16-byte aligned
    size_t n;
    uint64_t key;
    const uint16_t *table;  // host [DRAW_TABLE_SIZE]: bits of the type
};

// ---- embedding, history ---------------------------------------------------------------------------------------------

// Token history: the one place where a running sequence's tokens live on the device, one row per slot, so that a
// sampled token feeds the next step, and penalties see what was said, without the host.
struct history {
    int32_t *tokens;    // device, [n_slots, max_len]
    int32_t n_slots;
    int32_t max_len;
};

struct embedding_params {
    struct tensor out;          // [T, hidden]
    struct tensor token_table;  // [V, hidden], any weight type
    struct tensor pos_table;    // [max_positions, hidden] learned positions; data NULL: none
    const int32_t *tokens;      // host [T]; -1: read history[history_rows[t]][positions[t]] instead
    const int32_t *positions;   // host [T]
    const int32_t *history_rows; // host [T]: the slot of token t's sequence
    struct history history;
    float scale;                // multiplies the token embedding; 1 for none
};

// ---- norm -----------------------------------------------------------------------------------------------------------

enum norm_kind { NORM_RMS, NORM_LAYER };

struct norm_params {
    struct tensor out;       // [T, dim]; may be x itself
    struct tensor x;         // [T, dim]
    struct tensor weight;    // [dim] any weight type
    struct tensor bias;      // [dim]; data NULL: none
    enum norm_kind kind;
    float eps;
    float weight_offset;     // added to each weight: 1 where checkpoints keep weight - 1 (Gemma), else 0
    bool accumulate;         // out += instead of out =
};

// ---- linear ---------------------------------------------------------------------------------------------------------

// Up to three row blocks stacked into one matrix of n_rows = sum of part rows, n_cols columns, each where it lies in
// the map: q, k, v (or gate, up) are one product without copying. scales/group: for quantized weights later.
struct weight_part {
    const void *data;   // device, [n_rows, n_cols] row-major: out_features x in_features
    enum dtype dtype;
    const void *scales; // NULL: none
    int32_t group;      // columns per scale; 0: none
    size_t n_rows;
    struct tensor bias; // [n_rows]; data NULL: none
};

struct weight {
    struct weight_part part[MAX_WEIGHT_PARTS];
    int32_t n_parts;
    size_t n_cols;
};

struct linear_params {
    struct tensor out;          // [T, sum of part rows]
    struct tensor x;            // [T, n_cols]
    const struct weight *weight;
    bool accumulate;            // out += instead of out =
};

// ---- positions, KV write --------------------------------------------------------------------------------------------

struct rope_table_params {
    struct tensor cos_sin;      // [T, rope_dim] F32: cos in the first half, sin in the second
    const int32_t *positions;   // host [T]
    const float *inv_freq;      // device [rope_dim/2], radians per token
    float attention_factor;     // multiplies cos and sin (yarn); 1 for none
};

// One layer's paged cache: K and V each [n_blocks, n_kv_heads, block_size, head_dim]: one block of one head is one
// contiguous tile. How a tile lies inside is the backend's own: the CPU keeps those of K
// transposed, [head_dim, block_size].
struct kv_layer {
    struct tensor k, v;
};

// Where q_norm and k_norm are given, each head of q and of k is RMS normed first. Then rotates q and k in place (half-split
// layout as Hugging Face's Llama: element i pairs with i + rope_dim/2; dims beyond rope_dim pass through) and writes k, v
// of each token to its slot.
struct rope_kv_write_params {
    struct tensor qkv;            // [T, (H + 2 KV) * D]: q heads, k heads, v heads; q and k changed in place
    struct tensor q_norm, k_norm; // [D] any weight type; data NULL, both: none
    float norm_eps, norm_weight_offset; // as in norm_params
    struct tensor cos_sin;        // from rope_table; data NULL: no rotation (learned positions, ALiBi)
    struct kv_layer cache;
    const int32_t *slot_mapping;  // host [T]: block * block_size + offset in the block; -1: a row of padding, not kept
    int32_t n_heads, n_kv_heads, head_dim, rope_dim;
};

// ---- attention ------------------------------------------------------------------------------------------------------

// Causal attention of each sequence's new tokens over its paged context. Sequence s owns query rows cu_seqlens_q[s] ..
// cu_seqlens_q[s+1]; its last query is at position context_lens[s] - 1, so query row i of it is at
// context_lens[s] - n_q + i. Query at position p sees keys max(0, p - window + 1) .. p.
// Prefill and decode are one op; the backend chooses kernels. scores: scale * q.k, then softcap * tanh(x / softcap) if
// softcap > 0, then + alibi_slopes[h] * (key position - query position) if slopes are given.
struct attention_params {
    struct tensor out;            // [T, H * D]
    struct tensor qkv;            // [T, (H + 2 KV) * D]: only the q part is read
    struct kv_layer cache;
    const int32_t *cu_seqlens_q;  // host [S + 1]
    const int32_t *context_lens;  // host [S], new tokens included; 0 with one query: a row of padding, zeros come out
    const int32_t *block_table;   // host [S, max_blocks]: entries of blocks behind the window may be -1
    int32_t n_seqs, max_blocks, block_size;
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t window;               // 0: unlimited
    float scale, softcap;
    const float *alibi_slopes;    // device [H]; NULL: none
};

// ---- activation -----------------------------------------------------------------------------------------------------

enum activation { ACT_GELU_ERF, ACT_GELU_TANH, ACT_SILU, ACT_RELU };

struct activation_params {
    struct tensor out;      // [T, m]; may be x itself when not gated
    struct tensor x;        // [T, m], or [T, 2 m] when gated: gate first, then up; out = act(gate) * up
    enum activation kind;
    bool gated;
};

// ---- mixture of experts ---------------------------------------------------------------------------------------------

// Each token goes to its K likeliest of E experts: P = T * K pairs of token and expert. Products take the pairs sorted by
// expert, those of one expert by token, so that an expert's rows lie together.
enum { MAX_EXPERTS = 256, MAX_CHOSEN_EXPERTS = 16 };

struct expert_plan {
    float *weights;        // device [T, K]: of a token's experts, which are in ascending order
    int32_t *rows;         // device [T, K]: where each of its pairs is in the sorted order
    int32_t *tokens;       // device [P]: by that order
    int32_t *offsets;      // device [E + 1]: expert e has the pairs offsets[e] .. offsets[e+1]
    int32_t n_experts, n_chosen; // E, K
};

// Fills the plan: softmax of the logits over all experts, the K highest (ties to the lower id; what is NaN counts as the
// lowest), their probabilities divided by their sum if `renormalize`.
struct route_params {
    struct tensor logits;  // [T, E] F32
    struct expert_plan plan;
    bool renormalize;
};

// out[i] = W_e x[row of pair i], e the expert of pair i. Each element is summed over the columns in one order, whatever the
// other rows.
struct linear_experts_params {
    struct tensor out;     // [P, sum of part rows], in the plan's order
    struct tensor x;       // [P, n_cols] in that order; by_token: [T, n_cols], a token's row serves its pairs
    const struct weight *weights; // [E], all of one shape and type; on a GPU each at one distance from the one before
    struct expert_plan plan;
    bool by_token;
};

// out[t] += sum over t's experts, in ascending order, of weight * x[row of the pair].
struct combine_experts_params {
    struct tensor out;     // [T, dim]
    struct tensor x;       // [P, dim]
    struct expert_plan plan;
};

// ---- rows, logits ---------------------------------------------------------------------------------------------------

// x = cap * tanh(x / cap)
struct softcap_params {
    struct tensor x;        // [n, V] F32
    float cap;
};

struct gather_rows_params {
    struct tensor out;      // [n, dim]
    struct tensor x;        // [T, dim]
    const int32_t *rows;    // host [n], indices into x
    int32_t n;
};

// ---- sampling -------------------------------------------------------------------------------------------------------

// What to do with one row of logits. Order, as vLLM has it: log-probabilities are those of the raw logits (before
// everything below); then allowed_ids, logit_bias, bad_words, min_tokens (EOS and stop ids banned); repetition,
// frequency, presence penalties; temperature; min_p; top_k; top_p; the draw.
// The draw is Gumbel-max: argmax over the kept ids of logit/temperature + g(id), g = -log(-log(u)), u from
// Philox4x32-10 with key = seed and counter = (id / 4, position, choice, 0), word id % 4; so it depends on nothing but
// (seed, choice, position, logits). temperature 0: argmax, the lowest id on ties. `position` is that of the new token.
struct sample_row {
    int32_t logits_row;       // row of logits
    int32_t history_row;      // slot in history
    int32_t position;         // of the token to sample: its context is history[history_row][0 .. position-1]
    int32_t n_prompt;         // of those, how many are the prompt (frequency/presence count only what was generated)
    int32_t target;           // >= 0: sample nothing; report this id (prompt log-probabilities). -1: sample
    int32_t n_logprobs;       // 0..MAX_LOGPROBS top entries wanted beside the chosen; -1: no log-probabilities at all
    uint64_t seed;
    int32_t choice;
    float temperature, top_p, min_p; // top_p 1 and min_p 0: off
    int32_t top_k;            // 0: off
    float repetition_penalty; // 1: off
    float frequency_penalty, presence_penalty;
    const struct logit_bias *logit_bias; int32_t n_logit_bias;
    const int32_t *allowed_ids; int32_t n_allowed_ids;  // n 0: all
    // n_bad_words sequences; sequence i is bad_word_ids[bad_word_offsets[i] .. bad_word_offsets[i+1]]: its last id is
    // banned when the context ends in the others (compared with generated tokens only)
    const int32_t *bad_word_ids, *bad_word_offsets; int32_t n_bad_words;
    const int32_t *banned_ids; int32_t n_banned_ids;    // banned in this row: stop ids while below min_tokens
    const uint32_t *mask;     // [ceil(V/32)] bits, 1 = allowed (a constraint's); NULL: none
};

struct sample_result {
    int32_t id;               // sampled, or the target
    int32_t rank;             // of id among raw logits, 1 = most likely (filled when log-probabilities are wanted)
    float logprob;            // of id
    int32_t n_top;
    bool invalid;             // the row held NaN, +infinity or nothing finite: id is 0, the engine fails the sequence
    bool barred;              // the row was fine, but what the sample_row bans left none of it: id is 0
    struct token_logprob top[MAX_LOGPROBS]; // most likely first, ties by lower id
};

struct sample_params {
    struct tensor logits;     // [n_logits_rows, V] F32; overwritten
    struct history history;   // a sampled id is stored at history[history_row][position] (when position < max_len)
    const struct sample_row *rows;  // host [n_rows]
    int32_t n_rows;
    struct sample_result *results;  // host memory from alloc_host, [n_rows]: valid after wait() of a later record()
};

// ---- the table ------------------------------------------------------------------------------------------------------

// Every op returns 0 or ERR_INVALID (shapes that do not fit: a bug) or ERR_DEVICE.
struct kernels {
    const char *name; // "cpu", "cuda"
    bool asynchronous; // ops return before they are done: the engine then plans a step ahead of what it has read

    int (*device_create)(struct device **out, const struct device_options *options, struct error *e);
    void (*device_destroy)(struct device *device);
    // One line for the log: "AMD EPYC, 2 threads, avx512+bf16".
    const char *(*device_description)(struct device *device);
    size_t (*device_memory)(struct device *device); // bytes of memory the device has, for the plan
    enum dtype (*activation_dtype)(struct device *device, enum dtype weights);
    size_t (*scratch_bytes)(struct device *device); // what the device holds for itself, for the plan

    // Zero-filled, 64-byte aligned; NULL when out of memory. alloc_host: memory the host reads and writes.
    void *(*alloc)(struct device *device, size_t bytes);
    void (*free)(struct device *device, void *memory);
    void *(*alloc_host)(struct device *device, size_t bytes);
    void (*free_host)(struct device *device, void *memory);
    // Returns when `from_host` may be changed; ops enqueued from then on see the copy. Fastest from alloc_host's memory.
    // May be called by several threads at once while weights are loaded.
    int (*copy_in)(struct device *device, void *to, const void *from_host, size_t bytes, struct error *e);
    int (*copy_out)(struct device *device, void *to_host, const void *from, size_t bytes, struct error *e);
    // Ops read weights where their file is mapped, F32, F16 and BF16 each beside the others. Else all are copied in.
    bool reads_mapped_weights;

    // NULL: whoever wants it draws on the host.
    int (*draw)(struct device *device, const struct draw_params *p, struct error *e);

    uint64_t (*record)(struct device *device);
    int (*wait)(struct device *device, uint64_t ticket, struct error *e);

    // From here to the next call, an op that is given one of these host arrays reads the device's copy, made now. Tables:
    // at most device_options.n_tables, each always in its place. The function NULL: the backend reads host arrays where they
    // are. What attention reads of a sequence with one query, but its last key and value, has been written by then: it may be
    // read while the ops before still run.
    int (*stage)(struct device *device, const struct stage_array *arrays, int32_t n, const struct stage_table *tables,
                 int32_t n_tables, struct error *e);

    // Ops of a decode step, recorded once and then launched whole. From graph_begin on, ops on staged arrays are recorded
    // until graph_end, which launches them; `keep` false: one of them failed, and all are forgotten. *launched false: there
    // is no memory for a record, and nothing ran. When there is a record of the same owner and n_rows, graph_begin launches
    // that, sets *replayed, and there is no graph_end: equal keys promise the same ops on the same device memory. NULL:
    // there are no graphs, and no row is padding.
    int (*graph_begin)(struct device *device, const void *owner, int32_t n_rows, bool *replayed, struct error *e);
    int (*graph_end)(struct device *device, bool keep, bool *launched, struct error *e);

    // Stores n tokens at history[row][position ..].
    int (*history_write)(struct device *device, struct history history, int32_t row, int32_t position,
                         const int32_t *tokens, int32_t n, struct error *e);
    // Copies whole blocks from[i] -> to[i] in both caches (fork, copy on write).
    int (*copy_blocks)(struct device *device, struct kv_layer cache, const int32_t *from, const int32_t *to, int32_t n,
                       struct error *e);

    int (*embedding)(struct device *device, const struct embedding_params *p, struct error *e);
    int (*norm)(struct device *device, const struct norm_params *p, struct error *e);
    int (*linear)(struct device *device, const struct linear_params *p, struct error *e);
    int (*rope_table)(struct device *device, const struct rope_table_params *p, struct error *e);
    int (*rope_kv_write)(struct device *device, const struct rope_kv_write_params *p, struct error *e);
    int (*attention)(struct device *device, const struct attention_params *p, struct error *e);
    int (*activation)(struct device *device, const struct activation_params *p, struct error *e);
    // Ops one after another, each on what the one before it wrote, in as few kernels as the backend can; what they hand
    // on may be left unwritten (norm's out, linear's out; the q part of qkv is written). NULL: call them one by one.
    int (*norm_linear)(struct device *device, const struct norm_params *norm, const struct linear_params *linear,
                       struct error *e);
    int (*norm_linear_rope)(struct device *device, const struct norm_params *norm, const struct linear_params *linear,
                            const struct rope_kv_write_params *rope, struct error *e);
    int (*norm_linear_activation)(struct device *device, const struct norm_params *norm,
                                  const struct linear_params *linear, const struct activation_params *activation,
                                  struct error *e);
    int (*route)(struct device *device, const struct route_params *p, struct error *e);
    int (*linear_experts)(struct device *device, const struct linear_experts_params *p, struct error *e);
    int (*combine_experts)(struct device *device, const struct combine_experts_params *p, struct error *e);
    int (*gather_rows)(struct device *device, const struct gather_rows_params *p, struct error *e);
    int (*softcap)(struct device *device, const struct softcap_params *p, struct error *e);
    int (*sample)(struct device *device, const struct sample_params *p, struct error *e);
};

const struct kernels *kernels_cpu(void);

// The backend by name: "cpu", "cuda", or "auto" for the best this machine has. An unknown name: ERR_UNSUPPORTED; a backend
// that this machine cannot run: ERR_DEVICE, and why. On success e is cleared, or it tells, with code 0, why "auto" did not
// take the GPU that is there. The CUDA backend is libgptd_cuda.so beside the program, loaded when it is wanted.
int kernels_open(const struct kernels **out, const char *backend, struct error *e);

#ifdef __cplusplus
}
#endif
#endif
