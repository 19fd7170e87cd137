/* Nobody starves: hours of virtual time at several times the engine's capacity, with random priorities, lengths, cancellations
 * and slow readers, and a tenth of the KV blocks that all slots would need. In every step:
 *
 * - Who is begun, or comes back, goes before everybody who still waits, by (submission + priority x aging). The only ones to
 *   overtake are further choices of a request whose prompt has just been computed: they start beside it.
 * - Who loses his place goes after everybody who keeps or gets one.
 * - Nobody who was not begun is older than queue_timeout.
 *
 * And nobody takes more steps than the work of those before him could: with W(r) the steps that r takes by itself when it is
 * the oldest that runs, which advances in each step, and of which at most W_MAX are lost to each that displaces it,
 *   steps(q) <= sum of W(r) + W_MAX over q, all r before it by key, whenever they came, and those that ran when it came.
 * Steps in which q's own reader has it parked do not count; those that run when it comes back are added.
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/batch.h"
#include "engine/inbox.h"

enum { MAX_LEN = 256, BLOCK_SIZE = 16, N_SLOTS = 32, N_BLOCKS = N_SLOTS * MAX_LEN / BLOCK_SIZE / 10, MAX_N = 3 };
enum { BUDGET = 64, PREFILL_STEPS = MAX_LEN / (BUDGET - N_SLOTS), MAX_LIVE = 256, STOP_ID = 7 };
enum { MAX_TOKENS = 120, W_MAX = MAX_N * (MAX_TOKENS + PREFILL_STEPS * (1 + MAX_TOKENS / 2) + 4) };

// Check's own assertions write to a file each: too slow for what is looked at some millions of times.
#define MUST(condition, ...) \
    do { \
        if (!(condition)) \
            ck_abort_msg(__VA_ARGS__); \
    } while (0)

static const double STEP = 0.05, AGING = 10; // seconds

struct live {
    struct request *request; // NULL: free
    double submitted, key;
    int64_t work, steps, bound;
    bool lazy, was_parked;
};

struct world {
    struct scheduler s;
    struct scheduler_config config;
    struct inbox *inbox;
    struct step steps[2];
    struct sample_result *results[2];
    void *memory;
    uint64_t n_planned, n_committed;
    double now;
    struct live live[MAX_LIVE];
    int32_t n_live, refs[N_BLOCKS];
    int64_t n_submitted, n_refused, ended[FINISH_ERROR + 1];
    double worst;            // steps by bound
};

static void world_init(struct world *w, int32_t variant)
{
    memset(w, 0, sizeof *w);
    struct request_limits *l = &w->config.limits;
    *l = (struct request_limits){
        .vocab_size = 50, .max_model_len = MAX_LEN, .block_size = BLOCK_SIZE, .max_num_batched_tokens = BUDGET,
        .n_groups = 1 + variant % 2, .n_blocks = {N_BLOCKS, N_BLOCKS}, .eos_token_ids = {STOP_ID}, .n_eos_token_ids = 1,
    };
    l->windows[l->n_groups - 1] = variant % 2 ? 40 : 0;
    w->config.max_num_seqs = N_SLOTS;
    w->config.max_logits_rows = N_SLOTS + 8;
    w->config.prefix_caching = variant >= 2;
    w->config.slow_client_timeout = 30;
    w->config.queue_timeout = variant >= 2 ? 12 : 0;
    w->config.priority_aging = AGING;
    struct arena arena = {0};
    for (int32_t pass = 0; pass < 2; pass++) {
        arena.used = 0;
        scheduler_layout(&w->s, &arena, &w->config);
        for (int32_t i = 0; i < 2; i++) {
            step_layout(&w->steps[i], &arena, &w->s);
            ARENA_ARRAY(&arena, w->results[i], w->config.max_logits_rows);
        }
        if (pass == 0)
            w->memory = arena.base = calloc(1, arena.used);
    }
    scheduler_init(&w->s);
    step_init(&w->steps[0], &w->s, (struct history){0});
    step_init(&w->steps[1], &w->s, (struct history){0});
    w->inbox = inbox_create(60, 1000000, 0, 1); // the deadline alone ends who waits
    w->now = 1000;
}

static struct live *live_of(struct world *w, const struct sequence *seq)
{
    return &w->live[seq->request->params.seed];
}

// The work of all that run and were not counted already is q's, too.
static void add_running(struct world *w, struct live *q)
{
    for (int32_t i = 0; i < w->s.n_running; i++) {
        const struct live *r = live_of(w, w->s.running[i]);
        if (w->s.running[i]->index == 0 || i == 0 || w->s.running[i - 1]->request != w->s.running[i]->request)
            q->bound += r != q && r->key > q->key ? r->work + W_MAX : 0;
    }
}

static void submit(struct world *w)
{
    int32_t prompt[MAX_LEN], n = 1 + rand() % 100, i = 0;
    struct error e;
    while (w->live[i].request != NULL)
        MUST(++i < MAX_LIVE, "too many at once");
    for (int32_t k = 0; k < n; k++)
        prompt[k] = k < 40 ? k % 5 + n % 2 : rand() % 50;
    struct live *q = &w->live[i];
    struct request *r = request_create(prompt, n);
    struct sampling_params *p = request_params(r);
    static const int32_t extremes[] = {INT32_MIN, INT32_MAX, -101, 101};
    p->n = rand() % 6 == 0 ? 1 + rand() % MAX_N : 1;
    p->max_tokens = rand() % 30 == 0 ? 0 : 1 + rand() % MAX_TOKENS;
    p->priority = rand() % 500 == 0 ? extremes[rand() % 4] : rand() % 5 - 2;
    p->has_seed = true;
    p->seed = i;
    MUST(request_prepare(r, &w->config.limits, &e) == 0, "%s", e.message);
    w->n_submitted++;
    if (inbox_submit(w->inbox, r, w->now, &e) != 0) {
        w->n_refused++;
        request_release(r);
        return;
    }
    *q = (struct live){.request = r, .submitted = w->now, .lazy = rand() % 12 == 0};
    q->key = w->now + fmin(fmax(p->priority, -100), 100) * AGING;
    q->work = p->n * (p->max_tokens + PREFILL_STEPS * (1 + (q->lazy ? p->max_tokens / 2 : 0)) + 4);
    q->bound = q->work + W_MAX;
    for (int32_t c = 0; c < r->n; c++)
        r->sequences[c].ring.capacity = q->lazy && r->sequences[c].ring.capacity > 4 ? 4 : r->sequences[c].ring.capacity;
    for (struct live *l = w->live; l < w->live + MAX_LIVE; l++) {
        if (l->request == NULL || l == q)
            continue;
        *(l->key <= q->key ? &q->bound : &l->bound) += (l->key <= q->key ? l->work : q->work) + W_MAX;
    }
    w->n_live++;
    add_running(w, q);
    scheduler_add(&w->s, inbox_take(w->inbox), w->now);
}

// ---- what must hold -------------------------------------------------------------------------------------------------

static void check_order(struct world *w, const struct plan *plan, struct sequence **ran, int32_t n_ran)
{
    for (int32_t i = 0; i < plan->n_entered; i++) {
        const struct live *in = live_of(w, plan->entered[i]);
        for (const struct sequence *seq = w->s.waiting.first; seq != NULL && plan->entered[i]->index == 0; seq = seq->next)
            MUST(in->key <= live_of(w, seq)->key, "one of key %f overtakes one of %f", in->key, live_of(w, seq)->key);
    }
    for (int32_t i = 0; i < n_ran; i++) {
        for (int32_t k = 0; ran[i]->state == SEQUENCE_WAITING && k < w->s.n_running; k++)
            MUST(live_of(w, w->s.running[k])->key <= live_of(w, ran[i])->key, "the wrong one was displaced");
    }
}

static bool is_parked(const struct live *q)
{
    for (int32_t c = 0; c < q->request->n; c++) {
        if (q->request->sequences[c].state == SEQUENCE_PARKED)
            return true;
    }
    return false;
}

static void check_time(struct world *w, struct live *q)
{
    bool parked = is_parked(q);
    const struct request_times times = request_times_get(q->request);
    if (q->was_parked && !parked)
        add_running(w, q);
    q->was_parked = parked;
    q->steps += !parked;
    w->worst = fmax(w->worst, (double)q->steps / (double)q->bound);
    MUST(q->steps <= q->bound, "priority %d: %ld steps, more than %ld", q->request->params.priority, (long)q->steps,
                  (long)q->bound);
    double waited_until = times.scheduled > 0 ? times.scheduled : times.finished > 0 ? times.finished : w->now;
    if (w->config.queue_timeout > 0)
        MUST(waited_until - q->submitted < w->config.queue_timeout + 1.5 * STEP, "%f s in the queue",
             waited_until - q->submitted);
}

static void check_end(struct world *w, struct live *q)
{
    const struct request_times times = request_times_get(q->request);
    for (int32_t c = 0; c < q->request->n; c++) {
        enum finish_reason reason = choice_finish(q->request, c, NULL);
        w->ended[reason]++;
        MUST(reason != FINISH_EXPIRED || (times.scheduled == 0 && w->config.queue_timeout > 0 &&
                                          times.finished - q->submitted > w->config.queue_timeout - STEP / 2), "expired too early");
    }
}

// ---- a step ---------------------------------------------------------------------------------------------------------

static void plan_step(struct world *w)
{
    const char *why = "";
    struct plan *plan = &w->steps[w->n_planned % 2].plan;
    struct sequence *ran[N_SLOTS];
    int32_t n_ran = w->s.n_running;
    memcpy(ran, w->s.running, (size_t)n_ran * sizeof *ran);
    scheduler_plan(&w->s, plan, w->inbox->n_signals, w->now);
    check_order(w, plan, ran, n_ran);
    MUST(scheduler_check(&w->s, w->refs, &why), "%s", why);
    if (plan->n_rows == 0)
        return;
    for (int32_t i = 0; i < plan->n_outputs; i++)
        w->results[w->n_planned % 2][i] = (struct sample_result){.id = rand() % 100 == 0 ? STOP_ID : 8 + rand() % 40};
    w->n_planned++;
}

static void read_rings(struct world *w, bool all)
{
    struct token_out out[64];
    for (struct live *q = w->live; q < w->live + MAX_LIVE; q++) {
        if (q->request == NULL)
            continue;
        bool reads = all || !q->lazy || rand() % 150 == 0;
        for (int32_t c = 0; reads && c < q->request->n; c++)
            while (request_read(q->request, c, out, q->lazy ? 1 + rand() % 4 : 64) > 0 && !q->lazy)
                ;
        check_time(w, q);
        if (!request_done(q->request) || !reads)
            continue;
        for (int32_t c = 0; c < q->request->n; c++)
            while (request_read(q->request, c, out, 64) > 0)
                ;
        check_end(w, q);
        request_release(q->request);
        q->request = NULL;
        w->n_live--;
    }
}

static void turn(struct world *w, bool arrivals)
{
    w->now += STEP;
    for (int32_t n = arrivals && rand() % 3 == 0 ? 1 + rand() % 3 : 0; n > 0; n--) // some three times what can be begun
        submit(w);
    if (arrivals && rand() % 20 == 0) {
        struct live *q = &w->live[rand() % MAX_LIVE];
        if (q->request != NULL)
            request_cancel(q->request);
    }
    uint64_t before = w->n_planned;
    plan_step(w);
    bool ahead = w->n_planned > before && w->n_planned - w->n_committed == 1 && rand() % 3 > 0;
    while (w->n_committed < w->n_planned && !(ahead && w->n_planned - w->n_committed == 1)) {
        scheduler_commit(&w->s, &w->steps[w->n_committed % 2].plan, w->results[w->n_committed % 2], w->now);
        w->n_committed++;
    }
    read_rings(w, !arrivals);
}

START_TEST(test_nobody_starves)
{
    unsigned seed = (unsigned)time(NULL) * 31 + (unsigned)_i;
    const char *seconds = getenv("FAIRNESS_SECONDS");
    printf("fairness %d: seed %u\n", _i, seed);
    fflush(stdout);
    srand(seed);
    struct world *w = malloc(sizeof *w);
    world_init(w, _i);
    for (double end = w->now + (seconds != NULL ? atof(seconds) : 3600); w->now < end;)
        turn(w, true);
    for (int32_t i = 0; w->n_live > 0; i++) {
        ck_assert_int_lt(i, 100000);
        turn(w, false);
    }
    ck_assert(!scheduler_busy(&w->s) && w->s.oldest == NULL && w->n_committed == w->n_planned);
    for (int32_t g = 0; g < w->config.limits.n_groups; g++)
        ck_assert_int_eq(w->s.blocks[g].n_free, w->s.blocks[g].n_blocks);
    ck_assert(w->inbox->n_waiting == 0 && w->inbox->n_waiting_tokens == 0 && w->inbox->n_waiting_bytes == 0);
    for (int32_t i = 0; i < N_PRIORITIES; i++)
        ck_assert_int_eq(w->inbox->n_waiting_of[i], 0);
    printf("  %.0f min: %ld requests, %ld refused, %ld expired, %ld choices ended, %ld cancelled, %ld slow; %lu preemptions; "
           "at most %.2f of the bound\n", (w->now - 1000) / 60, (long)w->n_submitted, (long)w->n_refused,
           (long)w->ended[FINISH_EXPIRED], (long)(w->ended[FINISH_LENGTH] + w->ended[FINISH_STOP]),
           (long)w->ended[FINISH_CANCELLED], (long)w->ended[FINISH_SLOW], (unsigned long)w->s.n_preemptions, w->worst);
    ck_assert_msg(seconds != NULL || (w->n_refused + w->ended[FINISH_EXPIRED]) * 2 > w->n_submitted, "no overload");
    inbox_unref(w->inbox);
    free(w->memory);
    free(w);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("scheduler_fairness");
    TCase *tc = tcase_create("scheduler_fairness");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, test_nobody_starves, 0, 4);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
