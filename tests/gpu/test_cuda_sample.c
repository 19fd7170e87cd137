/* Sampling on the GPU against the CPU's, row by row; the draw's distribution; the same row whatever is beside it. */
#include "kernels/cpu/philox.h"
#include "tests/kernel_helpers.h"

enum { MAX_V = 128256, MAX_ROWS = 600, MAX_LEN = 96, SAMPLED = -1 };

// What a row asks for beside plain sampling at some temperature.
enum wish { GREEDY, TARGET, LOGPROBS, ALLOWED, BIAS, WORDS, BANNED, MASK, REPETITION, FREQUENCY, PRESENCE, MIN_P, TOP_K,
            TOP_P, N_WISHES };

enum logits_kind { NORMAL, TIES, EQUAL, PEAK, HOLES, FLAT, BROKEN_NAN, BROKEN_INF, NOTHING, N_KINDS };

struct side { // one backend
    const struct kernels *ops;
    struct device *device;
    float *logits;            // device, [MAX_ROWS * V] as far as it is needed
    struct history history;   // device
    int32_t *tokens;          // host, [MAX_ROWS, MAX_LEN]: the history as the last batch left it
    struct sample_result *results;
};

static struct side cpu, gpu;
static float *logits;                           // host, [rows, V]
static int32_t context[MAX_ROWS * MAX_LEN];     // history before a batch
static size_t logits_bytes;

// ---- both sides -----------------------------------------------------------------------------------------------------

static void side_open(struct side *s, const char *name)
{
    struct device_options options = {.n_threads = 2, .max_vocab_size = MAX_V, .max_context = MAX_LEN, .max_dim = 1024,
                                     .max_tokens = MAX_ROWS, .max_seqs = MAX_ROWS, .n_heads = 1, .n_kv_heads = 1,
                                     .head_dim = 64, .block_size = 64};
    struct error e;
    ck_assert_msg(kernels_open(&s->ops, name, &e) == 0, "%s", e.message);
    ck_assert_msg(s->ops->device_create(&s->device, &options, &e) == 0, "%s", e.message);
    s->history = (struct history){s->ops->alloc(s->device, sizeof(context)), MAX_ROWS, MAX_LEN};
    s->results = s->ops->alloc_host(s->device, MAX_ROWS * sizeof(*s->results));
    s->tokens = malloc(sizeof(context));
    s->logits = s->ops->alloc(s->device, logits_bytes);
    ck_assert(s->history.tokens && s->results && s->tokens && s->logits);
    printf("%s: %s\n", name, s->ops->device_description(s->device));
}

static void side_close(struct side *s)
{
    s->ops->free(s->device, s->history.tokens);
    s->ops->free(s->device, s->logits);
    s->ops->free_host(s->device, s->results);
    s->ops->device_destroy(s->device);
    free(s->tokens);
}

static void open_sides(void)
{
    logits_bytes = (size_t)40 * MAX_V * sizeof(float);
    logits = malloc(logits_bytes);
    side_open(&cpu, "cpu");
    side_open(&gpu, "cuda");
}

static void close_sides(void)
{
    side_close(&cpu);
    side_close(&gpu);
    free(logits);
}

static int sample(struct side *s, size_t n_logits, size_t vocab_size, const struct sample_row *rows, int32_t n_rows,
                  struct error *e)
{
    const struct kernels *ops = s->ops;
    memset(s->results, 0xff, MAX_ROWS * sizeof(*s->results));
    struct sample_params p = {.logits = matrix(s->logits, DTYPE_F32, n_logits, vocab_size), .history = s->history,
                              .rows = rows, .n_rows = n_rows, .results = s->results};
    CHECK(ops->copy_in(s->device, s->logits, logits, n_logits * vocab_size * sizeof(float), e) == 0);
    CHECK(ops->copy_in(s->device, s->history.tokens, context, sizeof(context), e) == 0);
    int rc = ops->sample(s->device, &p, e);
    if (rc) return rc;
    rc = ops->wait(s->device, ops->record(s->device), e);
    if (rc) return rc;
    return ops->copy_out(s->device, s->tokens, s->history.tokens, sizeof(context), e);
}

static void run(struct side *s, size_t n_logits, size_t vocab_size, const struct sample_row *rows, int32_t n_rows)
{
    struct error e;
    int rc = sample(s, n_logits, vocab_size, rows, n_rows, &e);
    CHECK_MSG(rc == 0, "%s: %s", s->ops->name, e.message);
}

// ---- random batches -------------------------------------------------------------------------------------------------

static void fill_logits(float *x, size_t n, enum logits_kind kind)
{
    float scale = kind == FLAT ? 0.01f : kind == PEAK ? 1 : 3;
    for (size_t i = 0; i < n; i++) {
        x[i] = kind == EQUAL ? 1.25f : rng_normal() * scale;
        if (kind == TIES) x[i] = roundf(x[i]);
        if (kind == HOLES && rng_below(3)) x[i] = -INFINITY;
        if (kind == NOTHING) x[i] = -INFINITY;
    }
    size_t some = (size_t)rng_below((int32_t)n);
    if (kind == PEAK) x[some] = 30;
    if (kind == HOLES) x[some] = 0.5f;
    if (kind == BROKEN_NAN) x[some] = NAN;
    if (kind == BROKEN_INF) x[some] = INFINITY;
}

static enum logits_kind random_kind(void)
{
    return rng_below(8) == 0 ? (enum logits_kind)rng_below(N_KINDS) : (enum logits_kind)rng_below(BROKEN_NAN);
}

// Lists that rows point to: freed with the batch.
static void *lists[MAX_ROWS * 8];
static int32_t n_lists;

static void *list_new(size_t bytes)
{
    void *list = malloc(bytes ? bytes : 1);
    ck_assert(list && n_lists < MAX_ROWS * 8);
    return lists[n_lists++] = list;
}

static void lists_free(void)
{
    while (n_lists > 0) free(lists[--n_lists]);
}

static int32_t *random_ids(int32_t n, size_t vocab_size)
{
    int32_t *ids = list_new((size_t)n * sizeof(*ids));
    for (int32_t i = 0; i < n; i++) ids[i] = rng_below((int32_t)vocab_size);
    return ids;
}

static void wish_bias(struct sample_row *row, size_t vocab_size)
{
    int32_t n = 1 + rng_below(rng_below(4) ? 12 : 600); // more than the ids of a small vocabulary: some come twice
    struct logit_bias *bias = list_new((size_t)n * sizeof(*bias));
    for (int32_t i = 0; i < n; i++)
        bias[i] = (struct logit_bias){rng_below((int32_t)vocab_size), rng_below(10) ? rng_normal() * 4 : -100};
    row->logit_bias = bias, row->n_logit_bias = n;
}

static void wish_words(struct sample_row *row, size_t vocab_size)
{
    int32_t n = 1 + rng_below(30), at = 0;
    int32_t *offsets = list_new((size_t)(n + 1) * sizeof(*offsets)), *ids = random_ids(4 * n, vocab_size);
    for (int32_t i = 0; i < n; i++) {
        int32_t length = 1 + rng_below(4);
        const int32_t *tail = context + row->history_row * MAX_LEN + row->position - (length - 1);
        if (rng_below(2) && length - 1 <= row->position) memcpy(ids + at, tail, (size_t)(length - 1) * sizeof(*ids));
        offsets[i] = at, at += length;
    }
    offsets[n] = at;
    row->bad_word_ids = ids, row->bad_word_offsets = offsets, row->n_bad_words = n;
}

static void wish_mask(struct sample_row *row, size_t vocab_size)
{
    size_t n = (vocab_size + 31) / 32;
    uint32_t *mask = list_new(n * sizeof(*mask));
    for (size_t i = 0; i < n; i++) mask[i] = (uint32_t)rng_next() & (uint32_t)rng_next();
    row->mask = mask;
}

static void grant(struct sample_row *row, enum wish wish, size_t vocab_size)
{
    int32_t v = (int32_t)vocab_size;
    switch (wish) {
    case GREEDY: row->temperature = 0; break;
    case TARGET: row->target = rng_below(v); break;
    case LOGPROBS: row->n_logprobs = rng_below(MAX_LOGPROBS + 1); break;
    case ALLOWED:
        row->n_allowed_ids = 1 + rng_below(rng_below(2) ? 8 : v); // long lists travel in another way
        row->allowed_ids = random_ids(row->n_allowed_ids, vocab_size);
        break;
    case BIAS: wish_bias(row, vocab_size); break;
    case WORDS: wish_words(row, vocab_size); break;
    case BANNED:
        row->n_banned_ids = 1 + rng_below(20);
        row->banned_ids = random_ids(row->n_banned_ids, vocab_size);
        break;
    case MASK: wish_mask(row, vocab_size); break;
    case REPETITION: row->repetition_penalty = 0.7f + (float)rng_uniform(); break;
    case FREQUENCY: row->frequency_penalty = (float)rng_uniform() * 2 - 1; break;
    case PRESENCE: row->presence_penalty = (float)rng_uniform() * 2 - 1; break;
    case MIN_P: row->min_p = (float)rng_uniform() * 0.3f; break;
    case TOP_K: row->top_k = 1 + rng_below(rng_below(2) ? 60 : 2 * v); break;
    case TOP_P: row->top_p = rng_below(8) ? (float)rng_uniform() : 1e-9f; break;
    default: break;
    }
}

static struct sample_row random_row(int32_t i, size_t n_logits)
{
    struct sample_row row = {.logits_row = rng_below((int32_t)n_logits), .history_row = i, .target = SAMPLED,
                             .n_logprobs = -1, .seed = rng_next(), .choice = rng_below(4), .top_p = 1,
                             .repetition_penalty = 1};
    row.position = rng_below(MAX_LEN + 1), row.n_prompt = rng_below(row.position + 1);
    row.temperature = rng_below(20) ? (float)exp(rng_normal()) : rng_below(2) ? 1e-30f : 1e4f;
    return row;
}

static void random_context(size_t vocab_size)
{
    int32_t few = vocab_size < 12 ? (int32_t)vocab_size : 12;
    for (int32_t i = 0; i < MAX_ROWS * MAX_LEN; i++) context[i] = rng_below(rng_below(2) ? few : (int32_t)vocab_size);
}

// ---- which ids are right --------------------------------------------------------------------------------------------

static const float *sorted_by;

static int by_descending(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (sorted_by[i] != sorted_by[j]) return sorted_by[i] > sorted_by[j] ? -1 : 1;
    return i - j;
}

static void naive_penalties(const struct sample_row *row, float *x, size_t n)
{
    const int32_t *ids = context + row->history_row * MAX_LEN;
    int32_t *generated = malloc(n * sizeof(*generated));
    for (size_t id = 0; id < n; id++) generated[id] = -1;
    for (int32_t i = 0; i < row->position; i++) {
        if (generated[ids[i]] < 0) generated[ids[i]] = 0;
        generated[ids[i]] += i >= row->n_prompt;
    }
    for (size_t id = 0; id < n; id++) {
        if (generated[id] < 0) continue;
        x[id] = x[id] > 0 ? x[id] / row->repetition_penalty : x[id] * row->repetition_penalty;
        x[id] -= row->frequency_penalty * (float)generated[id];
        if (generated[id]) x[id] -= row->presence_penalty;
    }
    free(generated);
}

static void naive_words(const struct sample_row *row, float *x)
{
    const int32_t *end = context + row->history_row * MAX_LEN + row->position;
    for (int32_t i = 0; i < row->n_bad_words; i++) {
        const int32_t *word = row->bad_word_ids + row->bad_word_offsets[i];
        int32_t n = row->bad_word_offsets[i + 1] - row->bad_word_offsets[i] - 1;
        if (n <= row->position - row->n_prompt && memcmp(end - n, word, (size_t)n * sizeof(*word)) == 0)
            x[word[n]] = -INFINITY;
    }
}

static void naive_process(const struct sample_row *row, float *x, size_t n)
{
    bool *allowed = malloc(n);
    for (size_t id = 0; id < n; id++) allowed[id] = row->n_allowed_ids == 0;
    for (int32_t i = 0; i < row->n_allowed_ids; i++) allowed[row->allowed_ids[i]] = true;
    for (size_t id = 0; id < n; id++)
        if (!allowed[id] || (row->mask && !(row->mask[id / 32] >> id % 32 & 1))) x[id] = -INFINITY;
    for (int32_t i = 0; i < row->n_logit_bias; i++) x[row->logit_bias[i].id] += row->logit_bias[i].bias;
    naive_words(row, x);
    for (int32_t i = 0; i < row->n_banned_ids; i++) x[row->banned_ids[i]] = -INFINITY;
    naive_penalties(row, x, n);
    free(allowed);
}

static double naive_gumbel(int32_t id, const struct sample_row *row)
{
    uint32_t counter[4] = {(uint32_t)id / 4, (uint32_t)row->position, (uint32_t)row->choice, 0}, words[4];
    philox4x32(words, counter, (uint32_t[]){(uint32_t)row->seed, (uint32_t)(row->seed >> 32)});
    return -log(-log1p(-(words[id % 4] + 0.5) * 0x1p-32));
}

static double naive_weight(const struct sample_row *row, const float *x, int32_t id, int32_t best)
{
    return exp(((double)x[id] - x[best]) / row->temperature);
}

// Whether `id` wins among the likeliest n, for some n that filters may keep, give or take a rounding.
static bool wins(const struct sample_row *row, const float *x, const int32_t *ids, size_t kept, int32_t id)
{
    double total = 0, sum = 0, best = -INFINITY, mine = -INFINITY;
    const double slack = 3e-6; // of the mass
    for (size_t i = 0; i < kept; i++) total += naive_weight(row, x, ids[i], ids[0]);
    for (size_t i = 0; i < kept; i++) {
        double t = ((double)x[ids[i]] - x[ids[0]]) / row->temperature, value = t + naive_gumbel(ids[i], row);
        if (ids[i] == id) mine = value + 2e-5 - 1e-6 * t;
        if (value > best) best = value;
        sum += naive_weight(row, x, ids[i], ids[0]);
        bool may_end = i + 1 == kept || (row->top_p < 1 && sum / total >= row->top_p - slack);
        if (may_end && mine >= best) return true;
        if (row->top_p < 1 && sum / total >= row->top_p + slack) return false;
    }
    return false;
}

static bool is_right(const struct sample_row *row, size_t vocab_size, int32_t id)
{
    float *x = malloc(vocab_size * sizeof(*x));
    int32_t *ids = malloc(vocab_size * sizeof(*ids));
    memcpy(x, logits + (size_t)row->logits_row * vocab_size, vocab_size * sizeof(*x));
    naive_process(row, x, vocab_size);
    for (size_t i = 0; i < vocab_size; i++) ids[i] = (int32_t)i;
    sorted_by = x;
    qsort(ids, vocab_size, sizeof(*ids), by_descending);
    size_t kept = vocab_size;
    while (kept > 0 && x[ids[kept - 1]] == -INFINITY) kept--;
    while (row->min_p > 0 && kept > 0 &&
           ((double)x[ids[kept - 1]] - x[ids[0]]) / row->temperature < log(row->min_p) - 1e-5)
        kept--;
    if (row->top_k > 0 && (size_t)row->top_k < kept) kept = (size_t)row->top_k;
    bool right = row->temperature > 0 && wins(row, x, ids, kept, id);
    free(x), free(ids);
    return right;
}

// ---- comparing ------------------------------------------------------------------------------------------------------

static void check_report(const struct sample_result *g, const struct sample_result *c, int32_t i)
{
    if (g->id == c->id) {
        CHECK_MSG(g->rank == c->rank, "row %d: rank %d, not %d", i, g->rank, c->rank);
        CHECK_MSG(g->logprob == c->logprob || fabs(g->logprob - c->logprob) < 1e-4,
                  "row %d: log-probability %g, not %g", i, g->logprob, c->logprob);
    }
    CHECK_MSG(g->n_top == c->n_top, "row %d: %d top ids, not %d", i, g->n_top, c->n_top);
    for (int32_t j = 0; j < c->n_top; j++) {
        CHECK_MSG(g->top[j].id == c->top[j].id, "row %d: top %d is %d, not %d", i, j, g->top[j].id, c->top[j].id);
        CHECK_MSG(fabs(g->top[j].logprob - c->top[j].logprob) < 1e-4, "row %d: top %d has %g, not %g", i, j,
                  g->top[j].logprob, c->top[j].logprob);
    }
}

static int32_t n_compared, n_unlike; // sampled ids; of those, the ones that rounding decided

static void compare_row(const struct sample_row *row, size_t vocab_size, int32_t i)
{
    const struct sample_result *g = &gpu.results[i], *c = &cpu.results[i];
    CHECK_MSG(g->invalid == c->invalid && g->barred == c->barred, "row %d: invalid %d, barred %d, not %d, %d", i,
              g->invalid, g->barred, c->invalid, c->barred);
    n_compared++;
    if (g->id != c->id) {
        n_unlike++;
        CHECK_MSG(!c->invalid && !c->barred && row->target < 0 && is_right(row, vocab_size, g->id),
                  "row %d: id %d, not %d: V %zu, T %g, top_k %d, top_p %.9g, min_p %g, lists of %d, %d, %d, %d, "
                  "mask %d, penalties %g %g %g", i, g->id, c->id, vocab_size, row->temperature, row->top_k, row->top_p,
                  row->min_p, row->n_allowed_ids, row->n_logit_bias, row->n_bad_words, row->n_banned_ids,
                  row->mask != NULL, row->repetition_penalty, row->frequency_penalty, row->presence_penalty);
    }
    check_report(g, c, i);
    if (row->target < 0 && row->position < MAX_LEN) // so that what is left to compare is what must not have changed
        cpu.tokens[row->history_row * MAX_LEN + row->position] = g->id;
}

static void compare(size_t n_logits, size_t vocab_size, const struct sample_row *rows, int32_t n_rows)
{
    run(&cpu, n_logits, vocab_size, rows, n_rows);
    run(&gpu, n_logits, vocab_size, rows, n_rows);
    for (int32_t i = 0; i < n_rows; i++) compare_row(&rows[i], vocab_size, i);
    CHECK_MSG(memcmp(cpu.tokens, gpu.tokens, sizeof(context)) == 0, "the history differs: V %zu, %d rows", vocab_size,
              n_rows);
}

// ---- tests ----------------------------------------------------------------------------------------------------------

static const size_t sizes[] = {1, 2, 31, 32, 1000, 1600, 4096, 4097, 32000, MAX_V};
enum { N_SIZES = sizeof(sizes) / sizeof(*sizes) };

static int32_t rounds_of(size_t vocab_size, int32_t most)
{
    if (is_short()) return 1;
    return vocab_size < 5000 ? most : vocab_size < 100000 ? most / 4 : most / 10;
}

START_TEST(test_each_parameter_alone)
{
    for (int32_t k = 0; k < N_SIZES; k++)
        for (int32_t round = 0; round < rounds_of(sizes[k], 20); round++) {
            struct sample_row rows[2 * N_WISHES + 2];
            size_t n_logits = 1 + (size_t)rng_below(4);
            for (size_t i = 0; i < n_logits; i++) fill_logits(logits + i * sizes[k], sizes[k], random_kind());
            random_context(sizes[k]);
            for (int32_t i = 0; i < 2 * N_WISHES + 2; i++) {
                rows[i] = random_row(i, n_logits);
                if (i / 2 < N_WISHES) grant(&rows[i], (enum wish)(i / 2), sizes[k]);
            }
            compare(n_logits, sizes[k], rows, 2 * N_WISHES + 2);
            lists_free();
        }
}
END_TEST

START_TEST(test_parameters_mixed)
{
    for (int32_t k = 0; k < N_SIZES; k++)
        for (int32_t round = 0; round < rounds_of(sizes[k], 60); round++) {
            struct sample_row rows[40];
            int32_t n_rows = 1 + rng_below(40), often = 2 + rng_below(8);
            size_t n_logits = 1 + (size_t)rng_below(n_rows < 8 ? n_rows : 8);
            for (size_t i = 0; i < n_logits; i++) fill_logits(logits + i * sizes[k], sizes[k], random_kind());
            random_context(sizes[k]);
            for (int32_t i = 0; i < n_rows; i++) {
                rows[i] = random_row(i, n_logits);
                for (int32_t wish = 0; wish < N_WISHES; wish++)
                    if (rng_below(often + (wish == TARGET || wish == GREEDY) * 8) == 0)
                        grant(&rows[i], (enum wish)wish, sizes[k]);
            }
            compare(n_logits, sizes[k], rows, n_rows);
            lists_free();
        }
    printf("%d of %d ids were rounding's to decide\n", n_unlike, n_compared);
    ck_assert_int_le(n_unlike, 2 + n_compared / 200);
}
END_TEST

START_TEST(test_more_rows_than_a_launch_takes)
{
    static struct sample_row rows[MAX_ROWS];
    static const size_t vocab_sizes[] = {100, 5000, MAX_V};
    for (int32_t k = 0; k < 3; k++) {
        int32_t n_rows = k < 2 ? MAX_ROWS : 170; // of MAX_V, masks alone are more than one launch takes
        for (size_t i = 0; i < 3; i++) fill_logits(logits + i * vocab_sizes[k], vocab_sizes[k], NORMAL);
        random_context(vocab_sizes[k]);
        for (int32_t i = 0; i < n_rows; i++) {
            rows[i] = random_row(i, 3);
            if (k == 2 || rng_below(3) == 0) grant(&rows[i], MASK, vocab_sizes[k]);
            if (rng_below(3) == 0) grant(&rows[i], TOP_P, vocab_sizes[k]);
            if (rng_below(3) == 0) grant(&rows[i], LOGPROBS, vocab_sizes[k]);
            if (rng_below(3) == 0) grant(&rows[i], TARGET, vocab_sizes[k]);
        }
        compare(3, vocab_sizes[k], rows, n_rows);
        lists_free();
    }
}
END_TEST

// Bit for bit, what the host may read of a result.
static bool same_result(const struct sample_result *a, const struct sample_result *b)
{
    return a->id == b->id && a->rank == b->rank && f32_bits(a->logprob) == f32_bits(b->logprob) &&
           a->n_top == b->n_top && a->invalid == b->invalid && a->barred == b->barred &&
           memcmp(a->top, b->top, (size_t)a->n_top * sizeof(a->top[0])) == 0;
}

START_TEST(test_same_row_alone_and_in_company)
{
    enum { N = 40 };
    for (int32_t k = 0; k < N_SIZES; k++) {
        struct sample_row rows[N];
        struct sample_result together[N];
        size_t vocab_size = sizes[k];
        for (size_t i = 0; i < 8; i++) fill_logits(logits + i * vocab_size, vocab_size, random_kind());
        random_context(vocab_size);
        for (int32_t i = 0; i < N; i++) {
            rows[i] = random_row(i, 8);
            for (int32_t wish = 0; wish < N_WISHES; wish++)
                if (i % 4 && rng_below(4) == 0) grant(&rows[i], (enum wish)wish, vocab_size);
            if (rng_below(2)) grant(&rows[i], LOGPROBS, vocab_size);
        }
        run(&gpu, 8, vocab_size, rows, N);
        memcpy(together, gpu.results, sizeof(together));
        for (int32_t i = 0; i < N; i += vocab_size > 5000 ? 3 : 1) {
            run(&gpu, 8, vocab_size, &rows[i], 1);
            CHECK_MSG(same_result(&gpu.results[0], &together[i]), "V %zu: row %d alone gives %d, %d in company",
                      vocab_size, i, gpu.results[0].id, together[i].id);
        }
        for (int32_t i = 0; i < N; i++) { // and again, in the opposite order
            if (i >= N / 2) break;
            struct sample_row row = rows[i];
            rows[i] = rows[N - 1 - i], rows[N - 1 - i] = row;
        }
        run(&gpu, 8, vocab_size, rows, N);
        for (int32_t i = 0; i < N; i++)
            CHECK_MSG(same_result(&gpu.results[i], &together[N - 1 - i]), "V %zu: row %d differs in another order",
                      vocab_size, N - 1 - i);
        lists_free();
    }
}
END_TEST

// At a temperature that makes all that is kept alike, every kept id comes up, and no other.
static void check_kept(const float *x, size_t vocab_size, int32_t top_k, float top_p, size_t least, size_t most)
{
    enum { DRAWS = 500 };
    static struct sample_row rows[DRAWS];
    int32_t *ids = malloc(vocab_size * sizeof(*ids));
    bool *drawn = calloc(vocab_size, 1);
    for (size_t i = 0; i < vocab_size; i++) ids[i] = (int32_t)i;
    sorted_by = x;
    qsort(ids, vocab_size, sizeof(*ids), by_descending);
    for (int32_t i = 0; i < DRAWS; i++) {
        rows[i] = random_row(i, 1);
        rows[i].temperature = 1e5f, rows[i].top_k = top_k, rows[i].top_p = top_p;
    }
    run(&gpu, 1, vocab_size, rows, DRAWS);
    for (int32_t i = 0; i < DRAWS; i++) drawn[gpu.results[i].id] = true;
    for (size_t i = 0; i < vocab_size; i++) {
        if (i < least) CHECK_MSG(drawn[ids[i]], "top_k %d, top_p %g: place %zu is never drawn", top_k, top_p, i);
        if (i >= most) CHECK_MSG(!drawn[ids[i]], "top_k %d, top_p %g: place %zu is drawn", top_k, top_p, i);
    }
    free(ids), free(drawn);
}

START_TEST(test_what_filters_keep)
{
    for (int32_t k = 0; k < N_SIZES; k++) {
        size_t vocab_size = sizes[k];
        if (vocab_size < 31) continue;
        for (int32_t kind = NORMAL; kind <= EQUAL; kind++) {
            fill_logits(logits, vocab_size, (enum logits_kind)kind);
            int32_t top_k = 1 + rng_below(16);
            check_kept(logits, vocab_size, top_k, 1, (size_t)top_k, (size_t)top_k);
            check_kept(logits, vocab_size, 20, 0.5f, 9, 11); // 20 alike but for 1e-4 of a weight
            check_kept(logits, vocab_size, 0, 10.5f / (float)vocab_size, 10, 12);
        }
    }
}
END_TEST

START_TEST(test_many_candidates) // more than are listed: the row is read again; ties across blocks
{
    static const int32_t top_ks[] = {9000, 20000, 31999, 0, 0, 0, 9000};
    static const float top_ps[] = {1, 1, 1, 0.5f, 0.999f, 0.9999999f, 0.7f};
    for (int32_t kind = NORMAL; kind <= (is_short() ? NORMAL : FLAT); kind++)
        for (size_t size = N_SIZES - 2; size < N_SIZES; size++) {
            struct sample_row rows[28];
            fill_logits(logits, sizes[size], (enum logits_kind)kind);
            for (int32_t i = 0; i < 28; i++) {
                rows[i] = random_row(i, 1);
                rows[i].temperature = i % 2 ? 1 : 20;
                rows[i].top_k = top_ks[i % 7], rows[i].top_p = top_ps[i % 7];
            }
            compare(1, sizes[size], rows, 28);
        }
}
END_TEST

// ---- distribution ---------------------------------------------------------------------------------------------------

// Exceeded once in a million by chi-square with n degrees of freedom (Wilson and Hilferty's approximation).
static double chi2_bound(double n)
{
    double root = 1 - 2 / (9 * n) + 4.7534 * sqrt(2 / (9 * n));
    return n * root * root * root;
}

static void expect_distribution(struct sample_row row, size_t vocab_size, double *p)
{
    float *x = malloc(vocab_size * sizeof(*x));
    int32_t *ids = malloc(vocab_size * sizeof(*ids));
    double total = 0, sum = 0;
    memcpy(x, logits, vocab_size * sizeof(*x));
    naive_process(&row, x, vocab_size);
    for (size_t i = 0; i < vocab_size; i++) ids[i] = (int32_t)i, p[i] = 0;
    sorted_by = x;
    qsort(ids, vocab_size, sizeof(*ids), by_descending);
    size_t kept = row.top_k > 0 && (size_t)row.top_k < vocab_size ? (size_t)row.top_k : vocab_size;
    while (kept > 0 && naive_weight(&row, x, ids[kept - 1], ids[0]) < row.min_p) kept--;
    for (size_t i = 0; i < kept; i++) total += naive_weight(&row, x, ids[i], ids[0]);
    for (size_t i = 0; i < kept && sum / total < row.top_p; i++)
        sum += p[ids[i]] = naive_weight(&row, x, ids[i], ids[0]);
    for (size_t i = 0; i < vocab_size; i++) p[i] /= sum;
    free(x), free(ids);
}

static void check_distribution(struct sample_row row, const char *what)
{
    enum { V = 50, DRAWS = 20000, BATCH = 500 };
    static struct sample_row rows[BATCH];
    double p[V], chi2 = 0, rare = 0;
    int32_t counts[V] = {0}, n_rare = 0, n_bins = 0;
    uint64_t seed = rng_next();
    for (int32_t i = 0; i < DRAWS; i += BATCH) {
        for (int32_t j = 0; j < BATCH; j++) { // seeds, choices and positions that follow one another
            rows[j] = row;
            rows[j].seed = seed + (uint64_t)(i + j) / 8, rows[j].choice = j % 2, rows[j].position = 20 + j / 2 % 4;
            rows[j].history_row = j;
        }
        run(&gpu, 1, V, rows, BATCH);
        for (int32_t j = 0; j < BATCH; j++) counts[gpu.results[j].id]++;
    }
    row.position = 20, row.history_row = 0; // in no row does the context have what penalties would tell apart
    expect_distribution(row, V, p);
    for (int32_t id = 0; id < V; id++) {
        CHECK_MSG(p[id] > 0 || counts[id] == 0, "%s: %d was drawn", what, id);
        if (p[id] * DRAWS < 5) {
            rare += p[id] * DRAWS, n_rare += counts[id];
            continue;
        }
        chi2 += pow(counts[id] - p[id] * DRAWS, 2) / (p[id] * DRAWS), n_bins++;
    }
    if (rare > 5) chi2 += pow(n_rare - rare, 2) / rare, n_bins++;
    double bound = chi2_bound(n_bins > 2 ? n_bins - 1 : 1);
    printf("%s: chi-square %.1f over %d bins, at most %.1f\n", what, chi2, n_bins, bound);
    CHECK_MSG(chi2 < bound, "%s: chi-square %g over %d bins, more than %g", what, chi2, n_bins, bound);
}

START_TEST(test_distribution)
{
    struct logit_bias bias[] = {{3, 2.5f}, {17, -4}, {3, -0.5f}};
    int32_t allowed[] = {1, 2, 3, 5, 8, 13, 21, 34, 49};
    fill_logits(logits, 50, PEAK);
    logits[rng_below(50)] = 2.5f;
    for (size_t i = 0; i < 50; i++) logits[i] = logits[i] > 3 ? 3 : logits[i];
    for (int32_t i = 0; i < MAX_ROWS * MAX_LEN; i++) context[i] = i % 2;
    struct sample_row plain = random_row(0, 1), row;
    plain.temperature = 1, plain.n_prompt = 20; // nothing is generated yet, or little
    check_distribution(plain, "plain");
    row = plain, row.temperature = 0.5f, check_distribution(row, "temperature 0.5");
    row = plain, row.temperature = 2, row.n_logprobs = 3, check_distribution(row, "temperature 2, log-probabilities");
    row = plain, row.top_k = 12, check_distribution(row, "top_k 12");
    row = plain, row.top_p = 0.83f, check_distribution(row, "top_p 0.83");
    row = plain, row.min_p = 0.08f, check_distribution(row, "min_p 0.08");
    row = plain, row.top_k = 20, row.top_p = 0.9f, row.min_p = 0.02f, row.temperature = 0.8f;
    check_distribution(row, "top_k 20, top_p 0.9, min_p 0.02, temperature 0.8");
    row = plain, row.logit_bias = bias, row.n_logit_bias = 3, check_distribution(row, "bias");
    row = plain, row.allowed_ids = allowed, row.n_allowed_ids = 9, check_distribution(row, "allowed ids");
    row = plain, row.repetition_penalty = 1.4f, check_distribution(row, "repetition penalty");
}
END_TEST

START_TEST(test_rows_that_do_not_fit)
{
    int32_t id = 10, offsets[] = {0, 1};
    struct logit_bias bias = {-1, 1};
    for (size_t i = 0; i < 10; i++) logits[i] = 0;
    random_context(10);
    struct sample_row rows[10];
    for (int32_t i = 0; i < 10; i++) rows[i] = random_row(0, 1);
    rows[0].allowed_ids = &id, rows[0].n_allowed_ids = 1;
    rows[1].logits_row = 1;
    rows[2].position = MAX_LEN + 1;
    rows[3].target = 10;
    rows[4].banned_ids = &id, rows[4].n_banned_ids = 1;
    rows[5].logit_bias = &bias, rows[5].n_logit_bias = 1;
    rows[6].bad_word_ids = &id, rows[6].bad_word_offsets = offsets, rows[6].n_bad_words = 1;
    rows[7].history_row = MAX_ROWS;
    rows[8].n_logprobs = MAX_LOGPROBS + 1;
    rows[9].logits_row = -1;
    for (int32_t i = 0; i < 10; i++) {
        struct error e;
        ck_assert_int_eq(sample(&gpu, 1, 10, &rows[i], 1, &e), ERR_INVALID);
    }
    struct sample_row row = random_row(0, 1);
    run(&gpu, 1, 10, &row, 1); // and the device goes on
    ck_assert(!gpu.results[0].invalid);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda sample");
    TCase *tcase = tcase_create("cuda sample");
    tcase_set_timeout(tcase, 600);
    tcase_add_unchecked_fixture(tcase, open_sides, close_sides);
    tcase_add_test(tcase, test_each_parameter_alone);
    tcase_add_test(tcase, test_parameters_mixed);
    tcase_add_test(tcase, test_same_row_alone_and_in_company);
    tcase_add_test(tcase, test_many_candidates);
    tcase_add_test(tcase, test_rows_that_do_not_fit);
    if (!is_short()) {
        tcase_add_test(tcase, test_more_rows_than_a_launch_takes);
        tcase_add_test(tcase, test_what_filters_keep);
        tcase_add_test(tcase, test_distribution);
    }
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
