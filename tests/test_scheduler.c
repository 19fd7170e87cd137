/* The scheduler on random traces, without an engine: admit, step, cancel, stop, preempt, park, finish, fork.
 *
 * A simulated device keeps, for each slot of each block, a hash of all tokens up to the one computed there. Before each
 * launch every visible slot of every planned sequence must hold what the sequence's own tokens say. After each operation
 * scheduler_check() proves the block managers' invariants from the tables.
 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/batch.h"
#include "engine/inbox.h"
#include "engine/sequence_blocks.h"

enum { N_REQUESTS = 40, N_BLOCKS = 40, BLOCK_SIZE = 16, MAX_LEN = 256, MAX_N = 3, VOCAB = 50, STOP_ID = 7 };

struct simulated {
    struct request *request;
    int32_t tokens[MAX_N][MAX_LEN];   // what each choice has said on the device, prompt included
    int32_t expected[MAX_N][MAX_LEN]; // what it would say alone
    int32_t n_expected[MAX_N];        // tokens, prompt included
    int32_t read[MAX_N];              // tokens taken from the ring
    int32_t nan_at;                   // position whose logits are not finite; 0: none
    bool lazy;                        // reads seldom
};

struct trace {
    struct scheduler s;
    struct scheduler_config config;
    struct inbox *inbox;
    struct step steps[2];
    struct sample_result *results[2];
    uint64_t n_planned, n_committed;
    uint64_t kv[MAX_KV_GROUPS][N_BLOCKS * BLOCK_SIZE];
    struct simulated sims[N_REQUESTS];
    int32_t n_sims, refs[N_BLOCKS];
    void *memory;
    double now; // seconds, as the test wills
};

static uint64_t chain(uint64_t h, int32_t token)
{
    h = (h ^ (uint64_t)(token + 1)) * 0x9e3779b97f4a7c15;
    return h ^ h >> 31;
}

static int32_t say(uint64_t h, int32_t choice)
{
    return (int32_t)(chain(h, choice) >> 20 & 0xffff) % VOCAB;
}

static void trace_init(struct trace *t, int32_t variant)
{
    memset(t, 0, sizeof *t);
    struct request_limits *l = &t->config.limits;
    *l = (struct request_limits){
        .vocab_size = VOCAB, .max_model_len = MAX_LEN, .max_logprobs = 5, .block_size = BLOCK_SIZE,
        .max_num_batched_tokens = variant % 2 ? 64 : 13, .n_groups = 1 + variant % 2,
        .n_blocks = {N_BLOCKS, N_BLOCKS / 2}, .eos_token_ids = {STOP_ID}, .n_eos_token_ids = 1,
    };
    l->windows[l->n_groups - 1] = variant >= 2 ? 30 : 0;
    l->n_blocks[0] = variant == 0 ? 22 : N_BLOCKS;
    t->config.max_num_seqs = 9;
    t->config.max_logits_rows = 9 + 8;
    t->config.prefix_caching = variant != 3;
    t->config.slow_client_timeout = 50;
    t->config.priority_aging = variant == 1 ? 1000 : 10;
    struct arena arena = {0};
    for (int32_t pass = 0; pass < 2; pass++) {
        arena.used = 0;
        scheduler_layout(&t->s, &arena, &t->config);
        step_layout(&t->steps[0], &arena, &t->s);
        step_layout(&t->steps[1], &arena, &t->s);
        ARENA_ARRAY(&arena, t->results[0], t->config.max_logits_rows);
        ARENA_ARRAY(&arena, t->results[1], t->config.max_logits_rows);
        if (pass == 0)
            t->memory = arena.base = calloc(1, arena.used);
    }
    scheduler_init(&t->s);
    step_init(&t->steps[0], &t->s, (struct history){0});
    step_init(&t->steps[1], &t->s, (struct history){0});
    t->inbox = inbox_create(1000, 1000000, 0, 1);
}

static void expect_alone(struct simulated *sim, int32_t c)
{
    const struct request *r = sim->request;
    uint64_t h = 0;
    int32_t n = r->n_prompt;
    for (int32_t i = 0; i < n; i++)
        h = chain(h, sim->expected[c][i] = sim->tokens[c][i] = r->prompt[i]);
    for (int32_t i = 0; i < r->params.max_tokens && n != sim->nan_at; i++) {
        int32_t id = say(h, c);
        sim->expected[c][n++] = id;
        h = chain(h, id);
        if (id == STOP_ID)
            break;
    }
    sim->n_expected[c] = n;
}

static void add_request(struct trace *t)
{
    struct simulated *sim = &t->sims[t->n_sims++];
    int32_t prompt[MAX_LEN], n = 1 + rand() % 100, shared = rand() % 100, family = rand() % 2;
    struct error e;
    for (int32_t i = 0; i < n; i++)
        prompt[i] = i < shared ? (i + family) % VOCAB : rand() % VOCAB;
    struct request *r = sim->request = request_create(prompt, n);
    struct sampling_params *p = request_params(r);
    p->n = rand() % 3 == 0 ? 1 + rand() % MAX_N : 1;
    p->max_tokens = rand() % 8 == 0 ? 0 : 1 + rand() % 80;
    p->prompt_logprobs = rand() % 5 == 0 ? 0 : -1;
    p->priority = rand() % 2;
    sim->lazy = rand() % 4 == 0;
    sim->nan_at = rand() % 10 == 0 ? n + rand() % 20 : 0;
    ck_assert_msg(request_prepare(r, &t->config.limits, &e) == 0, "%s", e.message);
    for (int32_t c = 0; c < r->n; c++) {
        expect_alone(sim, c);
        if (rand() % 4 == 0 && r->sequences[c].ring.capacity > 4)
            r->sequences[c].ring.capacity = 4; // fills soon
    }
    ck_assert_int_eq(inbox_submit(t->inbox, r, t->now, &e), 0);
    scheduler_add(&t->s, inbox_take(t->inbox), t->now);
}

static struct simulated *sim_of(struct trace *t, const struct sequence *seq)
{
    for (int32_t i = 0; i < t->n_sims; i++) {
        if (t->sims[i].request == seq->request)
            return &t->sims[i];
    }
    ck_abort_msg("a sequence of no request");
    return NULL;
}

// The forward pass: writes the row's tokens, having checked everything before them that is visible.
static void launch_row(struct trace *t, const struct plan_row *row)
{
    const struct sequence *seq = row->sequence;
    const int32_t *tokens = sim_of(t, seq)->tokens[seq->index];
    for (int32_t g = 0; g < t->config.limits.n_groups; g++) {
        const int32_t *table = sequence_table(&t->s, seq, g);
        int32_t window = t->config.limits.windows[g], n_wrong = 0;
        int32_t first = window > 0 && row->start >= window ? row->start - window + 1 : 0;
        uint64_t h = 0;
        for (int32_t p = 0; p < row->start + row->n_tokens; p++) {
            h = chain(h, tokens[p]);
            if (p < first)
                continue;
            uint64_t *slot = &t->kv[g][table[p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE];
            if (p >= row->start)
                *slot = h;
            n_wrong += *slot != h;
        }
        ck_assert_msg(n_wrong == 0, "a sequence sees %d wrong slots in group %d", n_wrong, g);
    }
}

static void copy_on_write(struct trace *t, const struct plan *plan)
{
    for (int32_t g = 0; g < t->config.limits.n_groups; g++) {
        const struct block_copies *copies = &plan->copies[g];
        for (int32_t i = 0; i < copies->n; i++) {
            bool planned = false;
            for (int32_t k = 0; k < plan->n_rows; k++) planned = planned || plan->rows[k].sequence == copies->sequence[i];
            ck_assert(planned);
            for (int32_t k = 0; k < copies->n; k++) // all at once on a device
                ck_assert(copies->to[i] != copies->from[k] && (i == k || copies->to[i] != copies->to[k]));
            memcpy(&t->kv[g][copies->to[i] * BLOCK_SIZE], &t->kv[g][copies->from[i] * BLOCK_SIZE],
                   BLOCK_SIZE * sizeof t->kv[g][0]);
        }
    }
}

static void sample(struct trace *t, const struct plan_output *output, struct sample_result *result)
{
    const struct sequence *seq = output->sequence;
    struct simulated *sim = sim_of(t, seq);
    *result = (struct sample_result){.id = output->entry > 0 ? seq->request->prompt[output->entry] : 0};
    if (output->entry > 0)
        return;
    uint64_t h = 0;
    for (int32_t p = 0; p < output->position; p++)
        h = chain(h, sim->tokens[seq->index][p]);
    result->id = say(h, seq->index);
    result->invalid = output->position == sim->nan_at;
    sim->tokens[seq->index][output->position] = result->id;
}

static void check_plan(const struct trace *t, const struct plan *plan)
{
    int32_t n = 0;
    for (int32_t i = 0; i < plan->n_rows; i++) {
        const struct plan_row *row = &plan->rows[i];
        n += row->n_tokens;
        ck_assert(row->n_tokens > 0 && row->sequence->state == SEQUENCE_RUNNING);
        for (int32_t k = 0; k < plan->n_entered; k++) // a token still on the device lies in the slot it left
            ck_assert(plan->entered[k] != row->sequence || row->sequence->n_pending == row->sample);
        for (int32_t k = 0; k < i; k++)
            ck_assert(plan->rows[k].sequence != row->sequence);
    }
    ck_assert(n == plan->n_tokens && n <= t->config.limits.max_num_batched_tokens);
    for (int32_t i = 1; i < plan->n_outputs; i++)
        ck_assert(plan->outputs[i].token >= plan->outputs[i - 1].token);
    if (t->s.n_running > 0 && plan->n_rows == 0) // the oldest always advances, unless it awaits its last result
        ck_assert(t->n_planned > t->n_committed);
    // Nobody was admitted over somebody who goes first.
    for (int32_t i = 0; i < plan->n_entered && t->s.waiting.first != NULL; i++) {
        const struct sequence *seq = plan->entered[i], *head = t->s.waiting.first;
        if (seq->index == 0 && head->n_pending == 0)
            ck_assert(seq->request->key <= head->request->key);
    }
}

static void check(struct trace *t)
{
    const char *why = "";
    ck_assert_msg(scheduler_check(&t->s, t->refs, &why), "%s", why);
}

// What the device is told: tables as far as rows see, and slots.
static void check_batch(const struct trace *t, const struct step *step)
{
    const struct batch *b = &step->batch;
    ck_assert(b->n_seqs == step->plan.n_rows && b->n_tokens == step->plan.n_tokens);
    for (int32_t i = 0; i < step->plan.n_rows; i++) {
        const struct plan_row *row = &step->plan.rows[i];
        for (int32_t g = 0; g < t->config.limits.n_groups; g++) {
            const int32_t *table = sequence_table(&t->s, row->sequence, g);
            const int32_t *told = b->block_tables[g] + (size_t)i * (size_t)b->max_blocks;
            int32_t window = t->config.limits.windows[g], end = row->start + row->n_tokens;
            for (int32_t p = window > 0 && row->start >= window ? row->start - window + 1 : 0; p < end; p++) {
                ck_assert(told[p / BLOCK_SIZE] == table[p / BLOCK_SIZE] && table[p / BLOCK_SIZE] >= 0);
                if (p >= row->start)
                    ck_assert_int_eq(b->slot_mapping[g][b->cu_seqlens_q[i] + p - row->start],
                                     table[p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE);
            }
        }
    }
}

static bool step(struct trace *t)
{
    struct plan *plan = &t->steps[t->n_planned % 2].plan;
    scheduler_plan(&t->s, plan, t->inbox->n_signals, t->now);
    check(t);
    check_plan(t, plan);
    if (plan->n_rows == 0)
        return false;
    batch_fill(&t->steps[t->n_planned % 2], &t->s);
    check_batch(t, &t->steps[t->n_planned % 2]);
    copy_on_write(t, plan);
    for (int32_t i = 0; i < plan->n_rows; i++)
        launch_row(t, &plan->rows[i]);
    for (int32_t i = 0; i < plan->n_outputs; i++)
        sample(t, &plan->outputs[i], &t->results[t->n_planned % 2][i]);
    t->n_planned++;
    return true;
}

static void commit(struct trace *t)
{
    scheduler_commit(&t->s, &t->steps[t->n_committed % 2].plan, t->results[t->n_committed % 2], t->now);
    t->n_committed++;
    check(t);
}

static void read_some(struct trace *t, bool all)
{
    for (int32_t i = 0; i < t->n_sims; i++) {
        struct simulated *sim = &t->sims[i];
        if (sim->lazy && !all && rand() % 20 > 0)
            continue;
        for (int32_t c = 0; c < sim->request->n; c++) {
            struct token_out out[8];
            int32_t n = request_read(sim->request, c, out, rand() % 8);
            for (int32_t k = 0; k < n; k++) {
                int32_t at = sim->request->n_prompt + sim->read[c]++;
                ck_assert(at < sim->n_expected[c] && out[k].id == sim->expected[c][at]);
            }
        }
    }
}

static void interfere(struct trace *t)
{
    struct request *r = t->sims[rand() % t->n_sims].request;
    if (rand() % 2)
        request_cancel(r);
    else
        choice_stop(r, rand() % r->n);
}

static void check_ends(struct trace *t, int32_t counts[])
{
    for (int32_t i = 0; i < t->n_sims; i++) {
        struct simulated *sim = &t->sims[i];
        struct request *r = sim->request;
        ck_assert(request_done(r));
        for (int32_t c = 0; c < r->n; c++) {
            enum finish_reason reason = choice_finish(r, c, NULL);
            counts[reason]++;
            if (reason == FINISH_LENGTH)
                ck_assert_int_eq(sim->read[c], r->params.max_tokens);
            if (reason == FINISH_ERROR)
                ck_assert_int_eq(r->n_prompt + sim->read[c], sim->nan_at);
        }
        ck_assert_int_eq(r->references, 1); // the engine has let go
        request_release(r);
    }
}

START_TEST(test_random_trace)
{
    unsigned seed = (unsigned)time(NULL) * 31 + (unsigned)_i;
    printf("scheduler trace: seed %u\n", seed);
    fflush(stdout);
    srand(seed);
    struct trace *t = malloc(sizeof *t);
    trace_init(t, _i % 4);
    bool busy = true;
    for (int32_t turn = 0; busy || t->n_sims < N_REQUESTS; turn++) {
        ck_assert_msg(turn < 100000, "no progress");
        t->now += 1;
        if (t->n_sims < N_REQUESTS && rand() % 8 == 0)
            add_request(t);
        bool planned = step(t);
        bool ahead = planned && t->n_planned - t->n_committed == 1 && rand() % 3 > 0; // leave it in flight
        while (t->n_committed < t->n_planned && !(ahead && t->n_planned - t->n_committed == 1))
            commit(t);
        if (rand() % 3 == 0)
            read_some(t, false);
        if (t->n_sims > 0 && rand() % 40 == 0)
            interfere(t);
        busy = scheduler_busy(&t->s) || t->s.parked.first != NULL || t->n_committed < t->n_planned;
    }
    for (int32_t i = 0; i < MAX_LEN; i++)
        read_some(t, true);
    int32_t counts[FINISH_ERROR + 1] = {0};
    check_ends(t, counts);
    for (int32_t g = 0; g < t->config.limits.n_groups; g++)
        ck_assert_int_eq(t->s.blocks[g].n_free, t->s.blocks[g].n_blocks);
    ck_assert_int_eq(t->inbox->n_waiting, 0);
    ck_assert_int_eq(t->inbox->n_waiting_tokens, 0);
    printf("  %lu steps, %lu preemptions, %lu of %lu cached; stop %d, length %d, cancelled %d, slow %d, error %d\n",
           t->n_planned, t->s.n_preemptions, t->s.prefix_hits, t->s.prefix_queries, counts[FINISH_STOP],
           counts[FINISH_LENGTH], counts[FINISH_CANCELLED], counts[FINISH_SLOW], counts[FINISH_ERROR]);
    inbox_unref(t->inbox);
    free(t->memory);
    free(t);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("scheduler");
    TCase *tc = tcase_create("scheduler");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, test_random_trace, 0, 12);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
