/* engine.h: token ids in, token ids out, for many requests at once.
 *
 * The engine owns the model, the KV cache and the device, and one thread that runs plan -> launch -> collect -> commit.
 * server/ is its only caller; it never sees tensors, and the engine never sees HTTP, JSON or text.
 * Crossing points, and there are no others: engine_submit (a bounded queue), one single-producer single-consumer ring
 * of tokens per choice, atomic cancel flags, and an eventfd signalled once per step in which some ring got something.
 *
 * A request: request_create fills the ids and sizes the rings; the caller sets `params`; engine_submit hands it over.
 * Both sides hold it from then on; request_release drops the server's hold at any time (running: it is cancelled).
 */
#ifndef GPTD_ENGINE_ENGINE_H
#define GPTD_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/error.h"
#include "kernels/sampling.h"

enum engine_dtype { ENGINE_DTYPE_AUTO, ENGINE_DTYPE_BF16, ENGINE_DTYPE_F16 };

struct engine_options {
    const char *model_dir;
    const char *backend;            // "auto", "cpu", "cuda"
    unsigned dtype;                 // enum engine_dtype: what a GPU computes in; auto: the checkpoint's, BF16 for F32
    bool dummy_weights;             // --load-format dummy
    bool reference_attention;       // --attention reference
    bool deterministic;             // on a GPU answers do not depend on what else runs, as they never do on the CPU
    bool prefix_caching;            // reuse KV of equal prefixes across requests
    int32_t n_threads;              // CPU worker threads; 0: all cores
    int32_t max_model_len;          // tokens; 0: what the checkpoint allows
    int32_t max_num_seqs;           // choices running at once
    int32_t max_num_batched_tokens; // tokens a step; 0: 512 or max_num_seqs if that is more, on a GPU 8192
    int32_t block_size;             // tokens per KV block: 16, 32 or 64
    double gpu_memory_utilization;  // of the memory that is free on the GPU, for everything; (0, 1]
    size_t kv_cache_memory_bytes;   // 0: what max_num_seqs sequences of max_model_len need, at most what weights,
                                    // workspace, history and scratch leave (on the CPU half of it), in whole blocks
    int32_t max_queue_requests;     // waiting requests; more: ERR_BUSY
    int64_t max_queue_tokens;       // prompt tokens of waiting requests; more: ERR_BUSY
    int32_t max_logprobs;           // most top log-probabilities a request may ask for
    double queue_timeout;           // seconds a request may wait to be begun (FINISH_EXPIRED); one that would wait for
                                    // longer by the measured rate: ERR_BUSY; 0: any
    double priority_aging;          // seconds that one step of priority is worth; 0: priorities count for nothing
    double slow_client_timeout;     // seconds a full ring may stall its sequence before it is cancelled
    uint64_t seed;                  // base of the seeds of requests without one
};

// Exact bytes, known before anything is allocated.
struct engine_plan {
    char architecture[64], dtype[8], device[128];
    char note[512];                 // why "auto" did not take the GPU that is there; empty: nothing to tell
    uint64_t n_parameters;
    size_t weights_bytes, workspace_bytes, history_bytes, kv_cache_bytes;
    size_t scratch_bytes;           // the device's own and the engine's tables
    size_t memory_bytes;            // what the device has
    // The cache: layers that see equally far have blocks of their own.
    struct kv_group_plan { int32_t window /* 0: unlimited */, n_blocks; size_t block_bytes; } kv_groups[4];
    int32_t n_kv_groups, block_size, vocab_size, max_model_len, max_num_seqs, max_num_batched_tokens;
    int64_t kv_tokens;              // tokens the cache holds, as far as windows let it forget none
    int32_t longest_request;        // tokens of the longest sequence that it can hold, forgetting what windows allow
    int32_t bos_token_id;           // -1: none
    const int32_t *eos_token_ids; int32_t n_eos_token_ids; // what ends a choice unless it ignores them
};

struct sampling_params {
    int32_t n;                      // choices, 1..128
    int32_t max_tokens, min_tokens; // per choice
    float temperature, top_p, min_p;
    int32_t top_k;                  // 0: off
    float repetition_penalty, frequency_penalty, presence_penalty;
    bool has_seed;
    int64_t seed;
    bool ignore_eos;
    int32_t logprobs;               // -1: none; 0: of the chosen token; k: and the top k
    int32_t prompt_logprobs;        // likewise, for every prompt token but the first
    int32_t priority;               // p + 1 counts as come priority_aging seconds later than p; at most 100 either way
    // Arrays are malloc'd by the caller and freed with the request; ids are checked by engine_submit.
    int32_t *stop_token_ids; int32_t n_stop_token_ids;
    struct logit_bias *logit_bias; int32_t n_logit_bias;
    int32_t *allowed_token_ids; int32_t n_allowed_token_ids;
    int32_t *bad_word_ids, *bad_word_offsets; int32_t n_bad_words; // sequence i: ids[offsets[i] .. offsets[i+1]]
    uint64_t cache_salt;            // 0: none; part of the prefix hash
};

enum finish_reason {
    FINISH_NONE,      // still running
    FINISH_STOP,      // EOS or a stop token id (the last token in the ring, and stop_token_id), or choice_stop
    FINISH_LENGTH,    // max_tokens or the context is full
    FINISH_CANCELLED, // request_cancel
    FINISH_SLOW,      // the reader let its ring stay full for too long
    FINISH_EXPIRED,   // not begun within queue_timeout
    FINISH_BARRED,    // its own constraints (bad_words, allowed_token_ids, min_tokens) left no token to go on with
    FINISH_ERROR,     // the model gave NaN, or the device failed: see request_error
};

struct token_out {
    int32_t id;
    float logprob;                    // 0 unless logprobs >= 0
    int32_t n_top; const struct token_logprob *top; // [n_top] in the ring: valid until the choice's next request_read
};

struct request_times { double submitted, scheduled, first_token, finished; }; // CLOCK_MONOTONIC seconds; 0: not yet

struct engine;
struct request;

// Plans: reads the checkpoint's configuration, refuses what cannot be served or does not fit, with the sum. ERR_DEVICE,
// here and from engine_start: the device cannot be used, whatever the model.
int engine_create(struct engine **out, const struct engine_options *options, struct error *e);
const struct engine_plan *engine_plan_get(const struct engine *engine);
// Loads the weights, allocates the cache, starts the engine's thread.
int engine_start(struct engine *engine, struct error *e);
// Refuses new requests from now on (ERR_SHUTDOWN); what runs goes on.
void engine_drain(struct engine *engine);
// Cancels what is left, ends the thread, frees everything. All requests stay readable until released. Waits for the step
// that runs: for ever if the device hangs.
void engine_destroy(struct engine *engine);
// The mapped weights file that the address lies in; NULL: in none. For a SIGBUS handler: the file was cut short.
const char *engine_file_at(const void *address);
// What the engine's thread is at: an op, and its layer (-1: in none); NULL: nothing to do. Any thread or signal handler.
const char *engine_progress(int32_t *layer);
// Readable when a ring got something or a choice ended since the last read of it (an eventfd: read 8 bytes to reset).
int engine_event_fd(const struct engine *engine);

// prompt is copied, params get OpenAI's defaults (n 1, max_tokens 16, temperature 1, ...). NULL: out of memory.
struct request *request_create(const int32_t *prompt, int32_t n_prompt);
struct sampling_params *request_params(struct request *r);
// Gives r the params of a submitted request: their arrays are one copy, freed with the last that shares them.
void request_share_params(struct request *r, struct request *of);
// Checks (ERR_INVALID, "field: why": empty prompt, ids outside the vocabulary, more than the context or cache holds,
// no token allowed to begin with), then queues (ERR_BUSY: full, or it would wait too long, see request_retry_after;
// ERR_SHUTDOWN). On failure the caller still owns r.
int engine_submit(struct engine *engine, struct request *r, struct error *e);
// Whole seconds, at least 1, after which there is likely to be a place for r, which engine_submit refused (ERR_BUSY) or which
// expired: the place is promised, to whoever then comes with the same prompt.
int32_t request_retry_after(struct request *r);
void request_cancel(struct request *r);                // any thread
void choice_stop(struct request *r, int32_t choice);   // any thread: no more tokens for this choice, FINISH_STOP
void request_release(struct request *r);

// Reads up to max tokens of a choice. One reader a choice. Returns how many.
int32_t request_read(struct request *r, int32_t choice, struct token_out *out, int32_t max);
int32_t request_available(const struct request *r, int32_t choice);  // tokens waiting in the ring
// FINISH_NONE until the choice has ended *and* its ring has been read empty; stop_token_id (may be NULL) gets the id
// of the EOS or stop token that ended it (also the last token read), -1 if none did.
enum finish_reason choice_finish(const struct request *r, int32_t choice, int32_t *stop_token_id);
bool request_done(const struct request *r);            // every choice has ended (rings may still hold tokens)
int32_t request_prompt_tokens(const struct request *r);
const int32_t *request_prompt(const struct request *r);
int32_t request_cached_tokens(const struct request *r); // prompt tokens taken from the prefix cache
// Prompt log-probabilities, complete before the first token of choice 0 (or its end if max_tokens is 0). Entry i is of
// prompt token i; entry 0 is empty (id of the token, n_top 0). NULL: not asked for.
const struct token_out *request_prompt_logprobs(const struct request *r);
struct request_times request_times_get(const struct request *r);
const char *request_error(const struct request *r);     // for FINISH_ERROR; borrowed

struct engine_stats {
    int32_t n_running, n_waiting;       // sequences running, requests waiting
    int64_t n_waiting_tokens;
    int32_t n_blocks, n_free_blocks;    // of the fullest group; free includes cached blocks that nobody uses
    int64_t n_all_blocks;               // of all groups
    int32_t group_free[4];              // blocks of each group, as above; how many it has is in the plan
    int32_t step_tokens, step_seqs;     // of the last step that was launched
    uint64_t n_steps, n_preemptions, prefix_queries, prefix_hits; // the last two in tokens
    uint64_t prompt_tokens, generation_tokens; // of requests begun, each counted once; sampled
    uint64_t n_refused_full, n_refused_wait, n_expired; // requests: the queue was full; would have waited too long; did
    double queue_wait;                  // seconds a request that comes now would wait to be begun, by the measured rate
    double last_beat;                   // CLOCK_MONOTONIC seconds of the last progress, in a step too (of now when idle)
    // Of all steps: time outside the backend and the model; in calls of ops, which on a GPU only enqueue; whole time.
    double host_seconds, launch_seconds, step_seconds;
    double device_seconds, weights_seconds; // of the start: backend, plan and device; loading the weights
    double warm_up_seconds;             // of the start: the first steps of a device that records them
    uint64_t warm_up_bytes;             // what they took of the device's memory beyond the plan
    bool busy;                          // has work
    const char *failure;                // why the device failed, borrowed; NULL: it did not
};
void engine_stats_get(const struct engine *engine, struct engine_stats *out);

#endif
