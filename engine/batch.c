#include "engine/batch.h"

#include <string.h>

#include "engine/sequence_blocks.h"

void step_layout(struct step *step, struct arena *arena, const struct scheduler *s)
{
    const struct scheduler_config *c = &s->config;
    struct batch *b = &step->batch;
    int32_t n_tokens = c->limits.max_num_batched_tokens;
    plan_layout(&step->plan, arena, c);
    ARENA_ARRAY(arena, step->sample_rows, c->max_logits_rows);
    ARENA_ARRAY(arena, step->sampled, c->max_logits_rows);
    ARENA_ARRAY(arena, step->table_rows, c->max_num_seqs);
    ARENA_ARRAY(arena, b->tokens, n_tokens);
    ARENA_ARRAY(arena, b->positions, n_tokens);
    ARENA_ARRAY(arena, b->history_rows, n_tokens);
    ARENA_ARRAY(arena, b->adapter_ids, n_tokens);
    ARENA_ARRAY(arena, b->cu_seqlens_q, c->max_num_seqs + 1);
    ARENA_ARRAY(arena, b->context_lens, c->max_num_seqs);
    ARENA_ARRAY(arena, b->logits_rows, c->max_logits_rows);
    for (int32_t g = 0; g < c->limits.n_groups; g++) {
        ARENA_ARRAY(arena, b->slot_mapping[g], n_tokens);
        ARENA_ARRAY(arena, b->block_tables[g], (size_t)c->max_num_seqs * (size_t)s->max_blocks);
    }
    ARENA_ARRAY(arena, b->table_stamps, c->max_num_seqs);
    ARENA_ARRAY(arena, step->layer_tickets, c->n_layers);
}

void step_init(struct step *step, const struct scheduler *s, struct history history)
{
    step->batch.max_seqs = s->config.max_num_seqs;
    step->batch.max_blocks = s->max_blocks;
    step->batch.block_size = s->config.limits.block_size;
    step->batch.history = history;
    for (int32_t t = 0; t < s->config.limits.max_num_batched_tokens; t++)
        step->batch.adapter_ids[t] = -1;
}

static void fill_tokens(struct batch *b, const struct plan_row *row)
{
    const struct sequence *seq = row->sequence;
    int32_t known = sequence_known(seq);
    for (int32_t i = 0; i < row->n_tokens; i++) {
        int32_t t = b->n_tokens + i, position = row->start + i;
        b->tokens[t] = position < known ? sequence_token(seq, position) : -1;
        b->positions[t] = position;
        b->history_rows[t] = seq->slot;
    }
}

// last_block: of the sequence's table, which is not looked at for a token in it.
static void fill_slots(struct batch *b, const struct plan_row *row, const int32_t *table, int32_t last_block, int32_t g)
{
    int32_t at = row->start / b->block_size, offset = row->start % b->block_size;
    if (row->n_tokens == 1 && at == row->sequence->n_blocks - 1) {
        b->slot_mapping[g][b->n_tokens] = last_block * b->block_size + offset;
        return;
    }
    for (int32_t i = 0; i < row->n_tokens; i++) {
        b->slot_mapping[g][b->n_tokens + i] = table[at] * b->block_size + offset;
        if (++offset == b->block_size) {
            offset = 0;
            at++;
        }
    }
}

// Of a row's entries: 0 if they may be others by the next step, as those of a choice, whose last block may be copied on write.
static uint64_t stamp_of(const struct sequence *seq)
{
    return seq->is_alone ? seq->admission << 24 | (uint64_t)seq->n_blocks : 0;
}

// Entries freed behind the window since the last copy are left as they were: nobody reads them. The last block may have
// been copied on write, so it is taken again.
static const struct table_row *fill_table_row(struct step *step, const struct scheduler *s, const struct sequence *seq)
{
    struct batch *b = &step->batch;
    struct table_row *held = &step->table_rows[b->n_seqs];
    uint64_t stamp = stamp_of(seq);
    if (stamp != 0 && stamp == b->table_stamps[b->n_seqs])
        return held;
    b->table_stamps[b->n_seqs] = stamp;
    int32_t from = held->admission == seq->admission && held->n_blocks > 0 ? held->n_blocks - 1 : 0;
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        int32_t *row = b->block_tables[g] + (size_t)b->n_seqs * (size_t)b->max_blocks;
        memcpy(row + from, sequence_table(s, seq, g) + from, (size_t)(seq->n_blocks - from) * sizeof *row);
        held->last_block[g] = row[seq->n_blocks - 1];
    }
    held->admission = seq->admission;
    held->n_blocks = seq->n_blocks;
    return held;
}

void batch_fill(struct step *step, const struct scheduler *s)
{
    const struct plan *plan = &step->plan;
    struct batch *b = &step->batch;
    b->n_tokens = b->n_seqs = 0;
    b->cu_seqlens_q[0] = 0;
    for (int32_t i = 0; i < plan->n_rows; i++) {
        const struct plan_row *row = &plan->rows[i];
        fill_tokens(b, row);
        const struct table_row *held = fill_table_row(step, s, row->sequence);
        for (int32_t g = 0; g < s->config.limits.n_groups; g++)
            fill_slots(b, row, sequence_table(s, row->sequence, g), held->last_block[g], g);
        b->context_lens[b->n_seqs] = row->start + row->n_tokens;
        b->n_tokens += row->n_tokens;
        b->cu_seqlens_q[++b->n_seqs] = b->n_tokens;
    }
    b->layer_tickets = b->n_tokens >= LONG_STEP ? step->layer_tickets : NULL;
    b->n_logits_rows = plan->n_outputs;
    b->is_decode = b->n_tokens == b->n_seqs && plan->n_outputs == b->n_seqs;
    for (int32_t i = 0; i < plan->n_outputs; i++) {
        b->logits_rows[i] = plan->outputs[i].token;
        b->is_decode = b->is_decode && b->logits_rows[i] == i;
    }
}

// To 1, 2, 4, 8, then multiples of 8, 16 and 64.
int32_t batch_padded_rows(int32_t n)
{
    int32_t unit = n <= 2 ? n : n <= 4 ? 4 : n <= 64 ? 8 : n <= 256 ? 16 : 64;
    return (n + unit - 1) / unit * unit;
}

void batch_pad(struct batch *b, int32_t n_rows)
{
    for (int32_t n = b->n_seqs; n < n_rows; n++) {
        for (int32_t g = 0; g < MAX_KV_GROUPS; g++) {
            if (b->slot_mapping[g] != NULL)
                b->slot_mapping[g][n] = -1;
        }
        b->tokens[n] = b->positions[n] = b->history_rows[n] = b->context_lens[n] = 0;
        b->logits_rows[n] = n;
        b->cu_seqlens_q[n + 1] = n + 1;
    }
    b->n_tokens = b->n_seqs = b->n_logits_rows = n_rows;
}

static void fill_prompt_row(struct sample_row *row, const struct plan_output *output)
{
    const struct request *r = output->sequence->request;
    row->target = r->prompt[output->entry];
    row->n_logprobs = r->params.prompt_logprobs;
}

static void fill_params(struct sample_row *row, const struct plan_output *output)
{
    const struct request *r = output->sequence->request;
    const struct sampling_params *p = &r->params;
    row->target = -1;
    row->n_logprobs = p->logprobs;
    row->seed = r->seed;
    row->choice = output->sequence->index;
    row->temperature = p->temperature;
    row->top_p = p->top_p;
    row->min_p = p->min_p;
    row->top_k = p->top_k;
    row->repetition_penalty = p->repetition_penalty;
    row->frequency_penalty = p->frequency_penalty;
    row->presence_penalty = p->presence_penalty;
    row->logit_bias = p->logit_bias;
    row->n_logit_bias = p->n_logit_bias;
    row->allowed_ids = p->allowed_token_ids;
    row->n_allowed_ids = p->n_allowed_token_ids;
    row->bad_word_ids = p->bad_word_ids;
    row->bad_word_offsets = p->bad_word_offsets;
    row->n_bad_words = p->n_bad_words;
    row->banned_ids = r->stop_ids;
    row->n_banned_ids = r->n_stop_ids;
}

// All that does not change while the sequence is in its slot.
static void fill_sample_row(struct sample_row *row, const struct plan_output *output)
{
    *row = (struct sample_row){
        .history_row = output->sequence->slot,
        .n_prompt = output->sequence->request->n_prompt,
        .temperature = 1, .top_p = 1, .repetition_penalty = 1,
    };
    if (output->entry > 0)
        fill_prompt_row(row, output);
    else
        fill_params(row, output);
}

void batch_fill_sample_rows(struct step *step)
{
    for (int32_t i = 0; i < step->plan.n_outputs; i++) {
        const struct plan_output *output = &step->plan.outputs[i];
        struct sample_row *row = &step->sample_rows[i];
        uint64_t admission = output->entry > 0 ? 0 : output->sequence->admission;
        if (admission == 0 || step->sampled[i] != admission)
            fill_sample_row(row, output);
        step->sampled[i] = admission;
        row->logits_row = i;
        row->position = output->position;
        // Positions only rise: once bans are over, they are.
        if (row->n_banned_ids > 0 && row->position - row->n_prompt >= output->sequence->request->params.min_tokens)
            row->n_banned_ids = 0;
    }
}
