#include "engine/scheduler.h"

#include <assert.h>
#include <string.h>

#include "engine/inbox.h"
#include "engine/sequence_blocks.h"

// Loops over what runs walk scattered memory, which is cold after each step: they ask for it some turns ahead.
enum { PREFETCH_AHEAD = 8 };

static void sequence_prefetch(const struct sequence *seq)
{
    __builtin_prefetch(seq, 1);
    __builtin_prefetch(&seq->request);
}

void scheduler_layout(struct scheduler *s, struct arena *arena, const struct scheduler_config *config)
{
    const struct request_limits *l = &config->limits;
    s->config = *config;
    s->max_blocks = (l->max_model_len + l->block_size - 1) / l->block_size;
    for (int32_t g = 0; g < l->n_groups; g++) {
        block_manager_layout(&s->blocks[g], arena, l->n_blocks[g]);
        ARENA_ARRAY(arena, s->tables[g], (size_t)config->max_num_seqs * (size_t)s->max_blocks);
    }
    ARENA_ARRAY(arena, s->free_slots, config->max_num_seqs);
    ARENA_ARRAY(arena, s->running, config->max_num_seqs);
}

void scheduler_init(struct scheduler *s)
{
    for (int32_t g = 0; g < s->config.limits.n_groups; g++)
        block_manager_init(&s->blocks[g]);
    for (int32_t slot = s->config.max_num_seqs; slot-- > 0;)
        s->free_slots[s->n_free_slots++] = slot;
}

void plan_layout(struct plan *plan, struct arena *arena, const struct scheduler_config *config)
{
    ARENA_ARRAY(arena, plan->rows, config->max_num_seqs);
    ARENA_ARRAY(arena, plan->outputs, config->max_logits_rows);
    ARENA_ARRAY(arena, plan->entered, config->max_num_seqs);
    for (int32_t g = 0; g < config->limits.n_groups; g++) {
        ARENA_ARRAY(arena, plan->copies[g].sequence, config->max_num_seqs);
        ARENA_ARRAY(arena, plan->copies[g].from, config->max_num_seqs);
        ARENA_ARRAY(arena, plan->copies[g].to, config->max_num_seqs);
    }
}

// ---- lists and order ------------------------------------------------------------------------------------------------

static bool goes_before(const struct sequence *a, const struct sequence *b)
{
    const struct request *ra = a->request, *rb = b->request;
    if (ra->key != rb->key)
        return ra->key < rb->key;
    return ra->arrival != rb->arrival ? ra->arrival < rb->arrival : a->index < b->index;
}

static void unbegun_add(struct scheduler *s, struct request *r)
{
    r->older = s->newest;
    r->newer = NULL;
    *(s->newest != NULL ? &s->newest->newer : &s->oldest) = r;
    s->newest = r;
}

// It has been begun, or has ended. False: it had been already.
static bool unbegun_remove(struct scheduler *s, struct request *r)
{
    if (!inbox_leave(r->inbox, r))
        return false;
    *(r->older != NULL ? &r->older->newer : &s->oldest) = r->newer;
    *(r->newer != NULL ? &r->newer->older : &s->newest) = r->older;
    return true;
}

static void list_insert_before(struct sequence_list *list, struct sequence *seq, struct sequence *next)
{
    seq->next = next;
    seq->prev = next != NULL ? next->prev : list->last;
    *(seq->prev != NULL ? &seq->prev->next : &list->first) = seq;
    *(seq->next != NULL ? &seq->next->prev : &list->last) = seq;
}

static void list_remove(struct sequence_list *list, struct sequence *seq)
{
    *(seq->prev != NULL ? &seq->prev->next : &list->first) = seq->next;
    *(seq->next != NULL ? &seq->next->prev : &list->last) = seq->prev;
    seq->prev = seq->next = NULL;
}

// New arrivals belong near the end, preempted and forked sequences near the beginning.
static void wait_from_end(struct scheduler *s, struct sequence *seq)
{
    struct sequence *before = s->waiting.last;
    while (before != NULL && goes_before(seq, before))
        before = before->prev;
    seq->state = SEQUENCE_WAITING;
    list_insert_before(&s->waiting, seq, before != NULL ? before->next : s->waiting.first);
}

static void wait_from_beginning(struct scheduler *s, struct sequence *seq)
{
    struct sequence *next = s->waiting.first;
    while (next != NULL && goes_before(next, seq))
        next = next->next;
    seq->state = SEQUENCE_WAITING;
    list_insert_before(&s->waiting, seq, next);
}

static void start_running(struct scheduler *s, struct plan *plan, struct sequence *seq)
{
    int32_t at = s->n_running++;
    for (; at > 0 && goes_before(seq, s->running[at - 1]); at--)
        s->running[at] = s->running[at - 1];
    s->running[at] = seq;
    seq->state = SEQUENCE_RUNNING;
    seq->slot = s->free_slots[--s->n_free_slots];
    seq->admission = ++s->n_admissions;
    plan->entered[plan->n_entered++] = seq;
}

// Takes back slot and blocks.
static void stop_running(struct scheduler *s, struct sequence *seq, bool forget)
{
    int32_t at = 0;
    while (s->running[at] != seq)
        at++;
    s->n_running--;
    memmove(&s->running[at], &s->running[at + 1], (size_t)(s->n_running - at) * sizeof *s->running);
    sequence_free_blocks(s, seq, forget);
    s->free_slots[s->n_free_slots++] = seq->slot;
    seq->slot = -1;
}

// ---- ends -----------------------------------------------------------------------------------------------------------

// The engine lets go of a request when all its sequences have ended and no plan names them.
static void retire(struct sequence *seq)
{
    struct request *r = seq->request;
    if (++r->n_retired < r->n)
        return;
    request_unref(r);
}

static void unreference(struct sequence *seq)
{
    if (--seq->n_references == 0 && seq->state == SEQUENCE_ENDED)
        retire(seq);
}

// The other choices no longer wait for choice 0.
static void queue_siblings(struct scheduler *s, struct request *r)
{
    r->forked = true;
    s->unseen_flags = true; // they were on no list when a signal was last heard
    for (int32_t i = 1; i < r->n; i++) {
        if (r->sequences[i].state == SEQUENCE_NEW)
            wait_from_beginning(s, &r->sequences[i]);
    }
}

static void publish_end(struct scheduler *s, struct sequence *seq, enum finish_reason reason, double now)
{
    struct request *r = seq->request;
    if (++r->n_ended == r->n)
        atomic_store_explicit(&r->finished, now, memory_order_relaxed);
    atomic_store_explicit(&seq->finish, (int32_t)reason, memory_order_release);
    s->published = true;
}

static void end_sequence(struct scheduler *s, struct sequence *seq, enum finish_reason reason, double now)
{
    struct request *r = seq->request;
    if (seq->state == SEQUENCE_RUNNING)
        stop_running(s, seq, reason == FINISH_ERROR);
    else if (seq->state == SEQUENCE_WAITING)
        list_remove(&s->waiting, seq);
    else if (seq->state == SEQUENCE_PARKED)
        list_remove(&s->parked, seq);
    seq->state = SEQUENCE_ENDED;
    unbegun_remove(s, r);
    if (!r->forked)
        queue_siblings(s, r);
    publish_end(s, seq, reason, now);
    if (seq->n_references == 0)
        retire(seq);
}

static void end_request(struct scheduler *s, struct request *r, enum finish_reason reason, double now)
{
    r->forked = true;
    atomic_fetch_add(&r->references, 1); // it must outlive the loop
    for (int32_t i = 0; i < r->n; i++) {
        if (r->sequences[i].state != SEQUENCE_ENDED)
            end_sequence(s, &r->sequences[i], reason, now);
    }
    request_unref(r);
}

void scheduler_end_all(struct scheduler *s, enum finish_reason reason, const struct error *why, double now)
{
    for (;;) {
        struct sequence *seq = s->n_running > 0 ? s->running[s->n_running - 1]
                             : s->waiting.first != NULL ? s->waiting.first : s->parked.first;
        if (seq == NULL)
            return;
        if (why != NULL && seq->request->error.code == 0)
            seq->request->error = *why;
        end_request(s, seq->request, reason, now);
    }
}

void scheduler_add(struct scheduler *s, struct request *r, double now)
{
    r->key = r->submitted + request_priority(r) * s->config.priority_aging;
    unbegun_add(s, r);
    bool rows_wanted = r->prompt_logprobs != NULL && r->n_prompt_logprobs < r->n_prompt;
    if (r->params.max_tokens == 0 && !rows_wanted)
        end_request(s, r, FINISH_LENGTH, now); // nothing to compute
    else
        wait_from_end(s, &r->sequences[0]);
}

// ---- cancellation, slow readers -------------------------------------------------------------------------------------

static void end_if_flagged(struct scheduler *s, struct sequence *seq, double now)
{
    if (atomic_load_explicit(&seq->request->cancelled, memory_order_relaxed))
        end_request(s, seq->request, FINISH_CANCELLED, now);
    else if (atomic_load_explicit(&seq->stop, memory_order_relaxed))
        end_sequence(s, seq, FINISH_STOP, now);
}

static void end_flagged_in_list(struct scheduler *s, struct sequence_list *list, double now)
{
    for (struct sequence *seq = list->first, *next; seq != NULL; seq = next) {
        next = seq->next;
        bool cancelled = atomic_load_explicit(&seq->request->cancelled, memory_order_relaxed);
        while (cancelled && next != NULL && next->request == seq->request)
            next = next->next; // ends with seq
        end_if_flagged(s, seq, now);
    }
}

// Flags are looked at only after a signal, so that a step costs nothing for them.
static void end_flagged(struct scheduler *s, uint64_t n_signals, double now)
{
    if (n_signals == s->n_signals && !s->unseen_flags)
        return;
    s->n_signals = n_signals;
    s->unseen_flags = false;
    for (int32_t i = s->n_running; i-- > 0;) {
        if (i < s->n_running)
            end_if_flagged(s, s->running[i], now);
    }
    end_flagged_in_list(s, &s->waiting, now);
    end_flagged_in_list(s, &s->parked, now);
}

// In order of arrival, so that the oldest is looked at. A call's further prompts wait for as long as it takes.
static void end_expired(struct scheduler *s, double now)
{
    double timeout = s->config.queue_timeout;
    for (struct request *r = s->oldest, *newer; r != NULL && timeout > 0 && now - r->submitted >= timeout; r = newer) {
        newer = r->newer;
        if (r->params_of != NULL)
            continue;
        s->n_expired++;
        end_request(s, r, FINISH_EXPIRED, now);
    }
}

// With what is on its way. Looked at before each plan, so a sequence that is preempted never has a full ring.
static bool ring_is_full(struct sequence *seq)
{
    return !token_ring_fits(&seq->ring, seq->n_pending + 1) && sequence_length(seq) < seq->n_most;
}

static bool ring_has_room(const struct sequence *seq)
{
    return (token_ring_used(&seq->ring) + seq->n_pending) * 2 <= seq->ring.capacity;
}

// A full ring costs its sequence slot and blocks; half of the ring must be read before it is queued again, so that a
// reader that takes single tokens does not have it computed anew for each.
static void park(struct scheduler *s, struct sequence *seq, double now)
{
    stop_running(s, seq, false);
    seq->state = SEQUENCE_PARKED;
    seq->parked_used = token_ring_used(&seq->ring);
    seq->parked_since = now;
    list_insert_before(&s->parked, seq, NULL);
    atomic_store(&seq->parked, true); // before the ring is looked at again: pairs with token_ring_read
}

static void park_slow(struct scheduler *s, double now)
{
    for (int32_t i = s->n_running; i-- > 0;) {
        if (i >= PREFETCH_AHEAD)
            sequence_prefetch(s->running[i - PREFETCH_AHEAD]);
        if (ring_is_full(s->running[i]))
            park(s, s->running[i], now);
    }
}

static void look_at_parked(struct scheduler *s, double now)
{
    for (struct sequence *seq = s->parked.first, *next; seq != NULL; seq = next) {
        int32_t used = token_ring_used(&seq->ring);
        next = seq->next;
        if (used < seq->parked_used) {
            seq->parked_used = used;
            seq->parked_since = now;
        }
        if (ring_has_room(seq)) {
            atomic_store(&seq->parked, false);
            list_remove(&s->parked, seq);
            wait_from_beginning(s, seq);
        } else if (now - seq->parked_since >= s->config.slow_client_timeout) {
            end_sequence(s, seq, FINISH_SLOW, now);
            next = s->parked.first;
        }
    }
}

// ---- planning -------------------------------------------------------------------------------------------------------

// What is left of a step; fork_slots: slots that choices of requests whose prompt ends in this step are to have.
struct budget { int32_t tokens, logprob_rows, fork_slots; };

static void unplan_copies(struct block_copies *copies, const struct sequence *seq)
{
    int32_t n = 0;
    for (int32_t i = 0; i < copies->n; i++) {
        if (copies->sequence[i] == seq)
            continue;
        copies->sequence[n] = copies->sequence[i];
        copies->from[n] = copies->from[i];
        copies->to[n++] = copies->to[i];
    }
    copies->n = n;
}

static void unplan(struct plan *plan, struct budget *budget, const struct sequence *seq)
{
    for (int32_t g = 0; g < MAX_KV_GROUPS; g++)
        unplan_copies(&plan->copies[g], seq);
    for (int32_t i = 0; i < plan->n_rows; i++) {
        if (plan->rows[i].sequence != seq)
            continue;
        budget->tokens += plan->rows[i].n_tokens;
        plan->n_rows--;
        memmove(&plan->rows[i], &plan->rows[i + 1], (size_t)(plan->n_rows - i) * sizeof *plan->rows);
        return;
    }
}

static void preempt_youngest(struct scheduler *s, struct plan *plan, struct budget *budget)
{
    struct sequence *victim = s->running[s->n_running - 1];
    unplan(plan, budget, victim);
    stop_running(s, victim, false);
    wait_from_beginning(s, victim);
    s->n_preemptions++;
}

// Blocks for positions < end, taken from younger sequences if need be.
static bool grow_or_preempt(struct scheduler *s, struct plan *plan, struct budget *budget, struct sequence *seq,
                            int32_t end)
{
    while (!sequence_grow(s, seq, end)) {
        if (s->running[s->n_running - 1] == seq)
            return false;
        preempt_youngest(s, plan, budget);
    }
    return true;
}

static bool is_decode(const struct sequence *seq)
{
    return seq->n_computed >= seq->n_prompt && sequence_length(seq) - seq->n_computed == 1;
}

static bool wants_more(const struct sequence *seq)
{
    return sequence_length(seq) < seq->n_most || seq->n_computed < seq->n_prompt;
}

static void add_row(struct plan *plan, struct budget *budget, const struct plan_row *row)
{
    plan->rows[plan->n_rows++] = *row;
    budget->tokens -= row->n_tokens;
}

static void plan_decode(struct scheduler *s, struct plan *plan, struct budget *budget, struct sequence *seq)
{
    const struct plan_row row = {.sequence = seq, .start = seq->n_computed, .n_tokens = 1, .sample = true};
    sequence_free_behind_window(s, seq);
    if (!grow_or_preempt(s, plan, budget, seq, row.start + 1))
        return;
    while (!sequence_own_block(s, seq, plan->copies)) {
        if (s->running[s->n_running - 1] == seq)
            return;
        preempt_youngest(s, plan, budget);
    }
    add_row(plan, budget, &row);
}

// Rows of logits for prompt log-probabilities in n tokens from start: position p gives entry p + 1.
static int32_t n_logprob_rows(const struct sequence *seq, int32_t start, int32_t n)
{
    const struct request *r = seq->request;
    if (start + 1 >= seq->n_prompt || seq->index != 0 || r->prompt_logprobs == NULL)
        return 0;
    int32_t first = start + 1 > r->n_prompt_logprobs ? start + 1 : r->n_prompt_logprobs;
    int32_t end = start + n + 1 < r->n_prompt ? start + n + 1 : r->n_prompt;
    return end > first ? end - first : 0;
}

static void plan_prefill(struct scheduler *s, struct plan *plan, struct budget *budget, struct sequence *seq)
{
    const struct request *r = seq->request;
    struct plan_row row = {.sequence = seq, .start = seq->n_computed};
    int32_t length = sequence_length(seq), n = length - row.start;
    n = n < budget->tokens ? n : budget->tokens;
    for (int32_t excess; (excess = n_logprob_rows(seq, row.start, n) - budget->logprob_rows) > 0;)
        n -= excess;
    if (n <= 0)
        return;
    sequence_free_behind_window(s, seq);
    if (!grow_or_preempt(s, plan, budget, seq, row.start + n)) {
        int32_t covered = seq->n_blocks * s->config.limits.block_size - row.start;
        n = n < covered ? n : covered;
    }
    if (n <= 0)
        return;
    row.n_tokens = n;
    row.sample = row.start + n == length && length < seq->n_most;
    budget->logprob_rows -= n_logprob_rows(seq, row.start, n);
    if (row.sample && !r->forked)
        budget->fork_slots += r->n - 1;
    add_row(plan, budget, &row);
}

// Blocks that running sequences will still need for what they have to compute, and one more for each to go on.
static int32_t blocks_promised(const struct scheduler *s, int32_t g)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_running; i++) {
        const struct sequence *seq = s->running[i];
        int32_t held = seq->n_blocks - seq->first_block[g];
        int32_t need = request_blocks_needed(&s->config.limits, g, sequence_length(seq));
        n += 1 + (need > held && !is_decode(seq) ? need - held : 0);
    }
    return n;
}

static bool fits(const struct scheduler *s, const struct budget *budget, const struct sequence *seq,
                 const struct prefix_match *match)
{
    if (s->n_free_slots <= budget->fork_slots)
        return false;
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        int32_t need = request_blocks_needed(&s->config.limits, g, sequence_length(seq));
        int32_t fresh = need - (match->n_blocks - match->first[g]);
        if (fresh + match->revived[g] + blocks_promised(s, g) > s->blocks[g].n_free)
            return false;
    }
    return true;
}

static void note_admission(struct scheduler *s, struct sequence *seq, double now)
{
    struct request *r = seq->request;
    if (unbegun_remove(s, r))
        admission_note(&r->inbox->admission, r->n_prompt, (int64_t)r->storage_bytes);
    if (atomic_load_explicit(&r->cached_tokens, memory_order_relaxed) >= 0)
        return; // it comes back, or is a further choice: what is counted is counted once a request
    s->prompt_tokens += (uint64_t)r->n_prompt;
    if (s->config.prefix_caching) {
        s->prefix_queries += (uint64_t)r->n_prompt;
        s->prefix_hits += (uint64_t)seq->n_computed;
    }
    atomic_store_explicit(&r->cached_tokens, seq->n_computed < r->n_prompt ? seq->n_computed : r->n_prompt,
                          memory_order_relaxed);
    atomic_store_explicit(&r->scheduled, now, memory_order_relaxed);
}

static void admit(struct scheduler *s, struct plan *plan, struct budget *budget, double now)
{
    while (budget->tokens > 0 && s->waiting.first != NULL) {
        struct sequence *seq = s->waiting.first;
        struct prefix_match match;
        if (budget->logprob_rows == 0 && n_logprob_rows(seq, 0, seq->request->n_prompt) > 0)
            return; // no row of logits is left for it
        if (seq->n_pending > 0)
            return; // preempted in flight: its last token is not known yet
        sequence_match_prefix(s, seq, &match);
        if (!fits(s, budget, seq, &match)) {
            const struct sequence *youngest = s->n_running > 0 ? s->running[s->n_running - 1] : NULL;
            if (youngest == NULL || request_priority(youngest->request) <= request_priority(seq->request) ||
                !goes_before(seq, youngest))
                return;
            preempt_youngest(s, plan, budget);
            continue;
        }
        list_remove(&s->waiting, seq);
        start_running(s, plan, seq);
        sequence_take_prefix(s, seq, &match);
        note_admission(s, seq, now);
        plan_prefill(s, plan, budget, seq);
    }
}

// ---- the plan made final --------------------------------------------------------------------------------------------

static void add_output(struct plan *plan, struct sequence *seq, int32_t token, int32_t position, int32_t entry)
{
    plan->outputs[plan->n_outputs++] = (struct plan_output){seq, token, position, entry};
    seq->n_references++;
    if (entry == 0)
        seq->n_pending++;
}

// Choice 0 has just computed the prompt: the other choices share its blocks as far as there are slots, and draw their
// first token from the same logits.
static void fork_choices(struct scheduler *s, struct plan *plan, const struct plan_row *row, int32_t token)
{
    struct request *r = row->sequence->request;
    for (int32_t i = 1; i < r->n && s->n_free_slots > 0; i++) {
        struct sequence *seq = &r->sequences[i];
        if (seq->state != SEQUENCE_NEW)
            continue;
        start_running(s, plan, seq);
        sequence_share_blocks(s, row->sequence, seq);
        add_output(plan, seq, token, r->n_prompt, 0);
    }
    queue_siblings(s, r);
}

static void finish_row(struct scheduler *s, struct plan *plan, const struct plan_row *row)
{
    struct sequence *seq = row->sequence;
    struct request *r = seq->request;
    int32_t last = plan->n_tokens + row->n_tokens - 1;
    int32_t n_entries = n_logprob_rows(seq, row->start, row->n_tokens);
    for (int32_t i = 0; i < n_entries; i++) {
        int32_t entry = r->n_prompt_logprobs++;
        add_output(plan, seq, plan->n_tokens + entry - 1 - row->start, entry, entry);
    }
    seq->n_computed += row->n_tokens;
    seq->n_references += !row->sample; // else its output is one
    sequence_register_blocks(s, seq);
    if (row->sample) {
        add_output(plan, seq, last, row->start + row->n_tokens, 0);
        if (row->start + row->n_tokens == seq->n_prompt && seq->index == 0 && !r->forked)
            fork_choices(s, plan, row, last);
    }
    plan->n_tokens += row->n_tokens;
}

void scheduler_plan(struct scheduler *s, struct plan *plan, uint64_t n_signals, double now)
{
    struct budget budget = {
        .tokens = s->config.limits.max_num_batched_tokens,
        .logprob_rows = s->config.max_logits_rows - s->config.max_num_seqs,
    };
    plan->n_rows = plan->n_tokens = plan->n_outputs = plan->n_entered = 0;
    for (int32_t g = 0; g < MAX_KV_GROUPS; g++)
        plan->copies[g].n = 0;
    end_flagged(s, n_signals, now);
    end_expired(s, now);
    park_slow(s, now);
    look_at_parked(s, now);
    for (int32_t i = 0; i < s->n_running; i++) {
        if (is_decode(s->running[i]) && wants_more(s->running[i]))
            plan_decode(s, plan, &budget, s->running[i]);
    }
    for (int32_t i = 0; i < s->n_running; i++) {
        if (!is_decode(s->running[i]) && wants_more(s->running[i]))
            plan_prefill(s, plan, &budget, s->running[i]);
    }
    admit(s, plan, &budget, now);
    // Only now are their blocks offered to others: none reads what is computed in the same step (struct batch).
    for (int32_t i = 0; i < plan->n_rows; i++)
        finish_row(s, plan, &plan->rows[i]);
}

// ---- commit ---------------------------------------------------------------------------------------------------------

static void store_prompt_logprob(struct request *r, int32_t entry, const struct sample_result *result)
{
    struct token_logprob *top = r->prompt_top + (size_t)entry * (size_t)r->params.prompt_logprobs;
    if (result->n_top > 0)
        memcpy(top, result->top, (size_t)result->n_top * sizeof *top);
    r->prompt_logprobs[entry] = (struct token_out){result->id, result->logprob, result->n_top, top};
}

static enum finish_reason finish_after(struct sequence *seq, int32_t id)
{
    for (int32_t i = 0; i < seq->n_stop_ids; i++) {
        if (id == (i < NEAR_STOP_IDS ? seq->stop_ids[i] : seq->request->stop_ids[i])) {
            seq->stop_token_id = id;
            return FINISH_STOP;
        }
    }
    return sequence_known(seq) == seq->n_most ? FINISH_LENGTH : FINISH_NONE;
}

static void take_token(struct scheduler *s, struct sequence *seq, const struct sample_result *result, double now)
{
    if (seq->n_generated == 0 && atomic_load_explicit(&seq->request->first_token, memory_order_relaxed) == 0)
        atomic_store_explicit(&seq->request->first_token, now, memory_order_relaxed);
    seq->generated[seq->n_generated++] = result->id;
    token_ring_write(&seq->ring, result->logprob, result->top, result->n_top);
    s->published = true;
    s->generation_tokens++;
    if (seq->state == SEQUENCE_RUNNING)
        sequence_register_blocks(s, seq);
    enum finish_reason reason = finish_after(seq, result->id);
    if (reason != FINISH_NONE)
        end_sequence(s, seq, reason, now);
}

static void commit_output(struct scheduler *s, const struct plan_output *output, const struct sample_result *result,
                          double now)
{
    struct sequence *seq = output->sequence;
    if (output->entry == 0)
        seq->n_pending--;
    if (seq->state == SEQUENCE_ENDED) {
        // Its slot in this step was wasted.
    } else if (result->invalid) {
        if (seq->request->error.code == 0) // written once: another choice's end may have published it
            error_set(&seq->request->error, ERR_DEVICE, "the model gave no finite logit at position %d",
                      output->position);
        end_sequence(s, seq, FINISH_ERROR, now);
    } else if (result->barred) {
        end_sequence(s, seq, FINISH_BARRED, now);
    } else if (output->entry > 0) {
        store_prompt_logprob(seq->request, output->entry, result);
    } else {
        take_token(s, seq, result, now);
    }
    unreference(seq);
}

void scheduler_commit(struct scheduler *s, const struct plan *plan, const struct sample_result *results, double now)
{
    for (int32_t i = 0; i < plan->n_outputs; i++) {
        if (i + 2 * PREFETCH_AHEAD < plan->n_outputs) {
            sequence_prefetch(plan->outputs[i + 2 * PREFETCH_AHEAD].sequence);
            __builtin_prefetch(&results[i + 2 * PREFETCH_AHEAD]);
        }
        if (i + PREFETCH_AHEAD < plan->n_outputs) {
            const struct sequence *seq = plan->outputs[i + PREFETCH_AHEAD].sequence;
            __builtin_prefetch(seq->generated + seq->n_generated, 1);
        }
        commit_output(s, &plan->outputs[i], &results[i], now);
    }
    for (int32_t i = 0; i < plan->n_rows; i++) {
        const struct plan_row *row = &plan->rows[i];
        struct sequence *seq = row->sequence;
        if (row->sample)
            continue;
        bool prompt_only = seq->n_most == seq->n_prompt && row->start + row->n_tokens == seq->n_prompt;
        if (prompt_only && seq->state != SEQUENCE_ENDED)
            end_request(s, seq->request, FINISH_LENGTH, now);
        unreference(seq);
    }
}

void plan_drop(const struct plan *plan)
{
    for (int32_t i = 0; i < plan->n_outputs; i++)
        unreference(plan->outputs[i].sequence);
    for (int32_t i = 0; i < plan->n_rows; i++) {
        if (!plan->rows[i].sample)
            unreference(plan->rows[i].sequence);
    }
}

// ---- state ----------------------------------------------------------------------------------------------------------

bool scheduler_busy(const struct scheduler *s)
{
    return s->n_running > 0 || s->waiting.first != NULL;
}

double scheduler_deadline(const struct scheduler *s)
{
    double first = 0;
    for (const struct sequence *seq = s->parked.first; seq != NULL; seq = seq->next) {
        double at = seq->parked_since + s->config.slow_client_timeout;
        first = first == 0 || at < first ? at : first;
    }
    return first;
}

bool scheduler_check(const struct scheduler *s, int32_t *scratch, const char **why)
{
    if (s->n_running + s->n_free_slots != s->config.max_num_seqs) {
        *why = "slots do not add up";
        return false;
    }
    for (int32_t g = 0; g < s->config.limits.n_groups; g++) {
        memset(scratch, 0, (size_t)s->blocks[g].n_blocks * sizeof *scratch);
        for (int32_t i = 0; i < s->n_running; i++) {
            const struct sequence *seq = s->running[i];
            for (int32_t b = seq->first_block[g]; b < seq->n_blocks; b++)
                scratch[sequence_table(s, seq, g)[b]]++;
        }
        if (!block_manager_check(&s->blocks[g], scratch, why))
            return false;
    }
    return true;
}
