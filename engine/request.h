/* request.h: a request and its choices (sequences), as engine/ sees them.
 *
 * A request has two holders, the server and (from submission to the end of its last sequence) the engine; whoever lets
 * go last frees it. A sequence is one choice. Its fields fall in two: what the reader shares with the engine thread,
 * all atomic or written before `finish` is (or before the ring's head, as its ids are), and what only the engine thread
 * touches.
 */
#ifndef GPTD_ENGINE_REQUEST_H
#define GPTD_ENGINE_REQUEST_H

#include <stddef.h>

#include "engine/block_manager.h"
#include "engine/inbox.h"
#include "engine/token_ring.h"
#include "models/model.h"

enum { MAX_CHOICES = 128 };

enum sequence_state {
    SEQUENCE_NEW,     // not queued yet: waits for choice 0 to compute the prompt
    SEQUENCE_WAITING, // in the waiting list: holds neither slot nor blocks
    SEQUENCE_RUNNING, // holds a slot (a row of the history and of the block tables) and blocks
    SEQUENCE_PARKED,  // its reader is slow: holds neither slot nor blocks until the ring has room
    SEQUENCE_ENDED,
};

enum { NEAR_STOP_IDS = 2 };

struct sequence {
    // The engine thread's: what each step changes, which has become cold by then, on a line of the cache of its own.
    _Alignas(CACHE_LINE) int32_t n_generated;
    int32_t n_pending;            // tokens sampled on the device, not yet collected
    int32_t n_computed;           // tokens whose KV is computed by what has been launched
    int32_t n_references;         // by plans that have not been committed
    int32_t slot;
    int32_t n_blocks;             // entries of its block table rows, the same in every group
    int32_t n_hashed;             // leading full blocks whose hash is known, the prompt's included
    int32_t n_registered;         // leading full blocks offered to the prefix cache since admission
    uint64_t admission;           // number of this stay in its slot: changes whenever a table row is begun anew
    int32_t first_block[MAX_KV_GROUPS]; // entries before it were freed behind the window
    enum sequence_state state;
    bool is_alone;                // no other choices

    // What each step reads, up to where the reader looks: the next line. Copies of what the request has, whose own memory is
    // left alone.
    _Alignas(CACHE_LINE) struct request *request;
    int32_t *generated;           // [max_tokens]
    int32_t n_prompt, n_most;     // n_most: with all that it may generate
    int32_t n_stop_ids;
    int32_t stop_ids[NEAR_STOP_IDS]; // the first ones; all are the request's
    struct token_ring ring;       // shared with the reader, as all that follows
    _Atomic int32_t finish;       // enum finish_reason
    int32_t stop_token_id;        // -1: none
    atomic_bool stop;             // choice_stop was called
    atomic_bool parked;           // the reader is to wake the engine once the ring has room

    // The engine thread's: now and then.
    struct sequence *prev, *next; // in the waiting or the parked list
    double parked_since;          // when its reader last took a token while it was parked, seconds,
    int32_t parked_used;          // and how many were in the ring
    int32_t index;                // choice
    struct block_hash *hashes;    // [full blocks beyond the prompt's]
};
_Static_assert(offsetof(struct sequence, ring.ids) <= 2 * CACHE_LINE, "two lines of a sequence are what a step needs");

struct request {
    atomic_int references;
    struct inbox *_Atomic inbox;  // from submission on; one reference
    struct request *next;         // in the inbox
    int32_t *prompt;              // [n_prompt]
    int32_t n_prompt;
    struct sampling_params params;
    struct request *params_of;    // whose arrays params has, and which is referenced for them; NULL: its own
    struct sequence *sequences;   // [n], from submission on
    int32_t n;
    atomic_bool cancelled;
    _Atomic int32_t cached_tokens; // prompt tokens choice 0 took from the cache when first admitted; -1: not yet
    _Atomic double submitted, scheduled, first_token, finished; // CLOCK_MONOTONIC seconds; 0: not yet
    struct error error;           // of FINISH_ERROR: written before the first sequence that ends so
    int32_t retry_after;          // seconds, of a submission that was refused: written by inbox_submit
    uint64_t fingerprint;         // of the prompt and its salt
    struct token_out *prompt_logprobs;     // [n_prompt]
    struct token_logprob *prompt_top;      // [n_prompt, params.prompt_logprobs]
    int32_t *stop_ids;            // [n_stop_ids] EOS (unless ignored) and stop token ids
    int32_t n_stop_ids;
    uint64_t seed;
    uint64_t arrival;             // submissions are numbered
    struct block_hash *prompt_hashes;      // [n_prompt / block_size]
    size_t storage_bytes;         // of what was allocated for its choices

    // The engine thread's.
    bool counted;                 // still among the inbox's waiting requests
    double key;                   // seconds: where it stands among all, see scheduler.h
    struct request *older, *newer; // in the scheduler's list of what was not begun
    bool forked;                  // choices other than 0 have been queued or run
    int32_t n_ended;              // sequences with a finish reason
    int32_t n_retired;            // sequences ended and out of every plan
    int32_t n_prompt_logprobs;    // leading entries filled
};

// What requests are checked against, and what their storage depends on.
struct request_limits {
    int32_t vocab_size, max_model_len, max_logprobs, block_size, max_num_batched_tokens;
    int32_t n_groups, n_blocks[MAX_KV_GROUPS], windows[MAX_KV_GROUPS];
    int32_t eos_token_ids[MAX_EOS_IDS], n_eos_token_ids;
    struct hash_key hash_key;
};

// Blocks of group g that a sequence of n_tokens holds at most at once.
int32_t request_blocks_needed(const struct request_limits *limits, int32_t g, int32_t n_tokens);

// Checks r against limits and allocates everything its life takes, so that the engine thread never does. ERR_INVALID
// names the field. May be repeated after a failure.
int request_prepare(struct request *r, const struct request_limits *limits, struct error *e);

void request_unref(struct request *r);

static inline int32_t request_priority(const struct request *r)
{
    int32_t p = r->params.priority;
    return p < -PRIORITY_MAX ? -PRIORITY_MAX : p > PRIORITY_MAX ? PRIORITY_MAX : p;
}

static inline int32_t sequence_token(const struct sequence *s, int32_t i)
{
    return i < s->n_prompt ? s->request->prompt[i] : s->generated[i - s->n_prompt];
}

// Tokens the host knows, and with those still on the device.
static inline int32_t sequence_known(const struct sequence *s)
{
    return s->n_prompt + s->n_generated;
}

static inline int32_t sequence_length(const struct sequence *s)
{
    return sequence_known(s) + s->n_pending;
}

#endif
