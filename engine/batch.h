/* batch.h: a step: the plan, and the arrays that the model and the sampler read, filled from it.
 *
 * Steps alternate between as many buffers as the pipeline is deep. A row of a block table is copied only as far as it
 * changed since the same sequence last had that row, so a step's cost does not grow with the length of contexts; sampling
 * parameters stay where they are for as long.
 */
#ifndef GPTD_ENGINE_BATCH_H
#define GPTD_ENGINE_BATCH_H

#include "engine/scheduler.h"

// What a row of the batch's block tables holds.
struct table_row {
    uint64_t admission;
    int32_t n_blocks, last_block[MAX_KV_GROUPS];
};

// Tokens from which on a step may take so long that its layers are looked at one by one: whether it gets on (a recorded point
// costs a GPU 2 us).
enum { LONG_STEP = 2048 };

struct step {
    struct plan plan;
    struct batch batch;
    struct sample_row *sample_rows;  // [max_logits_rows]
    uint64_t *sampled;               // [max_logits_rows] admission of the sequence whose parameters a row has; 0: none
    struct sample_result *results;   // [max_logits_rows], from alloc_host
    struct table_row *table_rows;    // [max_num_seqs]
    uint64_t *layer_tickets;         // [n_layers] of a long step
    uint64_t ticket;
};

void step_layout(struct step *step, struct arena *arena, const struct scheduler *s);
void step_init(struct step *step, const struct scheduler *s, struct history history);

void batch_fill(struct step *step, const struct scheduler *s);         // all but the sampling rows
// Few sizes of decode batches, so that a device records few graphs: how many rows n are made. Adds rows of padding.
int32_t batch_padded_rows(int32_t n);
void batch_pad(struct batch *b, int32_t n_rows);
void batch_fill_sample_rows(struct step *step);

#endif
