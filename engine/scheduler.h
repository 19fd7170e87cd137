/* scheduler.h: which tokens of which sequences the next step computes, and what becomes of its results.
 *
 * CPU only, no tensors, no clock and no lock of its own; called by the engine thread (and by tests) in turns of
 * scheduler_plan and scheduler_commit. Plans may be made ahead: plan N+1 before the commit of N. Sequence lengths are
 * upper bounds until then, and a sequence found to have ended is skipped by the commits that follow.
 *
 * Order is (key, arrival, choice) everywhere, where key is the time of submission plus priority x priority_aging: a request
 * of priority p + 1 is treated as if it had come so much later than one of p. All age alike, so that the order of two never
 * changes, and whoever waits is overtaken only by what comes within the difference: nobody starves.
 *
 * Decodes are planned first, then prefill chunks of what runs, then admissions, strictly from the head of the waiting list. A
 * running sequence that lacks a block takes it from the youngest one, which is queued again and computed anew (from the
 * prefix cache where its blocks survive); the oldest thus always advances. The head of the waiting list displaces the
 * youngest running sequence if its key is earlier and its priority number lower: for its own priority it waits. Who is
 * displaced keeps his key, so that of two sequences only one can ever displace the other. A request that is not begun within
 * queue_timeout ends.
 *
 * Everything a step frees or reuses is safe while earlier steps are still on the device: its stream runs in order.
 */
#ifndef GPTD_ENGINE_SCHEDULER_H
#define GPTD_ENGINE_SCHEDULER_H

#include "engine/request.h"

struct scheduler_config {
    struct request_limits limits;
    int32_t max_num_seqs;           // slots
    int32_t n_layers;               // of the model, for steps (batch.h)
    int32_t max_logits_rows;        // at least max_num_seqs; what is more serves prompt log-probabilities
    bool prefix_caching;
    bool own_memory;                // the device's memory serves nobody else
    double slow_client_timeout, queue_timeout, priority_aging; // seconds
};

// One sequence's share of a step: its tokens start .. start + n_tokens - 1.
struct plan_row {
    struct sequence *sequence;
    int32_t start, n_tokens;
    bool sample;                    // the row reaches the sequence's end: its last token's logits give the next
};

// Blocks of a group to be copied before the step: copy on write.
struct block_copies {
    struct sequence **sequence;     // [max_num_seqs]
    int32_t *from, *to;             // [max_num_seqs]
    int32_t n;
};

// One row of logits and what it is for.
struct plan_output {
    struct sequence *sequence;
    int32_t token;                  // index in the batch
    int32_t position;               // of the token it predicts
    int32_t entry;                  // > 0: entry of the prompt log-probabilities; 0: sample a token
};

struct plan {
    struct plan_row *rows;          // [max_num_seqs] decodes first
    struct plan_output *outputs;    // [max_logits_rows] by ascending token
    struct sequence **entered;      // [max_num_seqs] got their slot in this step: their history is to be written
    struct block_copies copies[MAX_KV_GROUPS];
    int32_t n_rows, n_tokens, n_outputs, n_entered;
};

struct sequence_list { struct sequence *first, *last; };

struct scheduler {
    struct scheduler_config config;
    int32_t max_blocks;             // width of a table row
    struct block_manager blocks[MAX_KV_GROUPS];
    int32_t *tables[MAX_KV_GROUPS]; // [max_num_seqs, max_blocks] by slot; -1: freed behind the window
    int32_t *free_slots;            // [max_num_seqs] a stack
    int32_t n_free_slots;
    struct sequence **running;      // [max_num_seqs] in order
    int32_t n_running;
    struct sequence_list waiting;   // in order
    struct sequence_list parked;    // in no order
    struct request *oldest, *newest; // requests that were not begun, by arrival
    uint64_t n_admissions;
    uint64_t n_signals;             // of the inbox, when flags were last looked at
    bool unseen_flags;              // sequences were queued whose flags were not looked at then
    bool published;                 // a ring got something or a sequence ended since the caller last cleared it
    // Totals.
    uint64_t n_preemptions, prefix_queries, prefix_hits, prompt_tokens, generation_tokens, n_expired;
};

void scheduler_layout(struct scheduler *s, struct arena *arena, const struct scheduler_config *config);
void scheduler_init(struct scheduler *s); // after the placing layout
void plan_layout(struct plan *plan, struct arena *arena, const struct scheduler_config *config);

void scheduler_add(struct scheduler *s, struct request *r, double now);
// n_signals: the inbox's count; flags of queued sequences are looked at when it has changed. now: seconds.
void scheduler_plan(struct scheduler *s, struct plan *plan, uint64_t n_signals, double now);
// results [n_outputs] of the plan, oldest plan first.
void scheduler_commit(struct scheduler *s, const struct plan *plan, const struct sample_result *results, double now);
// Ends every sequence there is; plans made before may still be committed or dropped (plan_drop).
void scheduler_end_all(struct scheduler *s, enum finish_reason reason, const struct error *why, double now);
void plan_drop(const struct plan *plan);

// Whether anything runs or waits (who is parked waits for his reader, not for the engine); when a parked sequence's
// time is up (seconds; 0: none is parked).
bool scheduler_busy(const struct scheduler *s);
double scheduler_deadline(const struct scheduler *s);
// Proves what block_manager_check proves, with the references counted from the tables of what runs. For tests: scratch
// is [n_blocks] of the largest group.
bool scheduler_check(const struct scheduler *s, int32_t *scratch, const char **why);

#endif
