/* Sampling against naive sorts and double precision; the draw's distribution; the same token whatever is beside it. */
#include "kernels/cpu/philox.h"
#include "tests/kernel_helpers.h"

enum { SLOTS = 4, MAX_LEN = 64 };

static const struct kernels *ops;
static int32_t history_tokens[SLOTS * MAX_LEN];
static const struct history history = {history_tokens, SLOTS, MAX_LEN};

static struct sample_row plain_row(void)
{
    return (struct sample_row){.position = 10, .n_prompt = 4, .target = -1, .n_logprobs = -1, .temperature = 1,
                               .top_p = 1, .repetition_penalty = 1};
}

static struct sample_result sample_one(struct device *device, float *logits, size_t vocab_size, struct sample_row row)
{
    struct sample_result result;
    memset(&result, 0xff, sizeof(result));
    row.logits_row = 0;
    struct sample_params p = {.logits = matrix(logits, DTYPE_F32, 1, vocab_size), .history = history, .rows = &row,
                              .n_rows = 1, .results = &result};
    ck_assert_int_eq(ops->sample(device, &p, NULL), 0);
    return result;
}

// ---- naive ----------------------------------------------------------------------------------------------------------

static const float *sorted_by;

static int by_descending(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (sorted_by[i] != sorted_by[j]) return sorted_by[i] > sorted_by[j] ? -1 : 1;
    return i - j;
}

static int32_t *sorted_ids(const float *x, size_t n) // highest first, ties by lower id
{
    int32_t *ids = malloc(n * sizeof(*ids));
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)i;
    sorted_by = x;
    qsort(ids, n, sizeof(*ids), by_descending);
    return ids;
}

static double naive_gumbel(int32_t id, const struct sample_row *row)
{
    uint32_t counter[4] = {(uint32_t)id / 4, (uint32_t)row->position, (uint32_t)row->choice, 0}, words[4];
    philox4x32(words, counter, (uint32_t[]){(uint32_t)row->seed, (uint32_t)(row->seed >> 32)});
    return -log(-log1p(-(words[id % 4] + 0.5) * 0x1p-32));
}

// Processed logits to the kept ones; the rest is -infinity. False when top_p's cut is too close to call.
static bool naive_filter(const struct sample_row *row, float *x, size_t n)
{
    int32_t *ids = sorted_ids(x, n);
    double highest = x[ids[0]], total = 0, sum = 0;
    bool clear = true;
    size_t kept = n;
    while (kept > 0 && x[ids[kept - 1]] == -INFINITY) kept--;
    if (row->min_p > 0)
        while ((x[ids[kept - 1]] - highest) / row->temperature < log(row->min_p)) kept--;
    if (row->top_k > 0 && (size_t)row->top_k < kept) kept = (size_t)row->top_k;
    for (size_t i = 0; i < kept; i++) total += exp((x[ids[i]] - highest) / row->temperature);
    if (row->top_p < 1) {
        size_t i = 0;
        while (i < kept && sum / total < row->top_p) {
            sum += exp((x[ids[i++]] - highest) / row->temperature);
            if (fabs(sum / total - row->top_p) < 2e-6) clear = false;
        }
        kept = i;
    }
    for (size_t i = kept; i < n; i++) x[ids[i]] = -INFINITY;
    free(ids);
    return clear;
}

// What the draw is worth: logit / temperature + noise.
static double naive_value(const struct sample_row *row, const float *x, int32_t id)
{
    return x[id] == -INFINITY ? -INFINITY : x[id] / row->temperature + naive_gumbel(id, row);
}

static int32_t naive_draw(const struct sample_row *row, const float *x, size_t n)
{
    int32_t best = 0;
    for (size_t id = 0; id < n; id++)
        if (naive_value(row, x, (int32_t)id) > naive_value(row, x, best)) best = (int32_t)id;
    return best;
}

// The sampled id is the naive one, or as good to within rounding.
static void check_draw(const struct sample_row *row, const float *x, size_t n, int32_t id)
{
    int32_t expected = naive_draw(row, x, n);
    double tolerance = 1e-5 * (fabs(x[expected]) / row->temperature + 20);
    CHECK_MSG(id >= 0 && naive_value(row, x, id) >= naive_value(row, x, expected) - tolerance,
              "%d (logit %g) instead of %d (logit %g): V %zu, T %g, k %d, p %g, min_p %g", id, id < 0 ? 0 : x[id],
              expected, x[expected], n, row->temperature, row->top_k, row->top_p, row->min_p);
}

static float *random_logits(size_t n, bool ties)
{
    float *x = rng_normals(n, 3);
    for (size_t i = 0; ties && i < n; i++) x[i] = roundf(x[i]);
    return x;
}

// ---- tests ----------------------------------------------------------------------------------------------------------

START_TEST(test_philox_known_answers) // Random123's kat_vectors, philox4x32 10
{
    static const uint32_t vectors[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    for (int32_t i = 0; i < 3; i++) {
        uint32_t words[4];
        philox4x32(words, vectors[i], vectors[i] + 4);
        ck_assert_int_eq(memcmp(words, vectors[i] + 6, sizeof(words)), 0);
    }
}
END_TEST

START_TEST(test_draw_and_filters)
{
    static const int32_t sizes[] = {1, 3, 17, 64, 100, 1000, 5003};
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 300; i++) {
            size_t n = (size_t)sizes[rng_below(7)];
            float *logits = random_logits(n, i & 1), *x = malloc(n * sizeof(*x));
            if (i % 5 == 0) logits[rng_below((int32_t)n)] = 4; // one that stands out
            memcpy(x, logits, n * sizeof(*x));
            struct sample_row row = plain_row();
            row.seed = rng_next(), row.position = rng_below(MAX_LEN + 1), row.choice = rng_below(4);
            row.temperature = (float)exp(2 * rng_normal());
            if (rng_below(2)) row.top_k = 1 + rng_below(rng_below(2) ? 10 : 2000);
            if (rng_below(2)) row.top_p = (float)rng_uniform();
            if (rng_below(3) == 0) row.min_p = (float)rng_uniform() * 0.3f;
            bool clear = naive_filter(&row, x, n);
            struct sample_result r = sample_one(device, logits, n, row);
            ck_assert(!r.invalid);
            if (clear) check_draw(&row, x, n, r.id);
            if (row.position < MAX_LEN) ck_assert_int_eq(history_tokens[row.position], r.id);
            free(logits), free(x);
        }
}
END_TEST

START_TEST(test_large_vocabulary)
{
    enum { V = 128256 };
    float *logits = random_logits(V, false), *x = malloc(V * sizeof(*x));
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 6; i++) {
            struct sample_row row = plain_row();
            row.seed = rng_next(), row.temperature = 0.8f;
            row.top_k = i % 3 == 1 ? 50 : 0, row.top_p = i % 3 == 2 ? 0.9f : 1;
            memcpy(x, logits, V * sizeof(*x));
            if (naive_filter(&row, x, V)) check_draw(&row, x, V, sample_one(device, logits, V, row).id);
        }
    free(logits), free(x);
}
END_TEST

START_TEST(test_distribution)
{
    enum { V = 24, DRAWS = 20000 };
    float *logits = rng_normals(V, 1);
    double total = 0, chi2 = 0;
    int32_t counts[V] = {0};
    struct device *device = device_open(NULL, 1, false);
    struct sample_row row = plain_row();
    row.seed = rng_next(), row.temperature = 0.7f;
    for (int32_t i = 0; i < DRAWS; i++) {
        if (i % MAX_LEN == 0) row.seed++;
        row.position = i % MAX_LEN, row.choice = i % 3;
        counts[sample_one(device, logits, V, row).id]++;
    }
    for (int32_t id = 0; id < V; id++) total += exp(logits[id] / 0.7);
    for (int32_t id = 0; id < V; id++) {
        double expected = DRAWS * exp(logits[id] / 0.7) / total;
        chi2 += (counts[id] - expected) * (counts[id] - expected) / expected;
    }
    ck_assert_msg(chi2 < 71, "chi-square %g with 23 degrees of freedom", chi2); // exceeded once in a million runs
    free(logits);
    ops->device_destroy(device);
}
END_TEST

START_TEST(test_greedy_and_tiny_temperature)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 100; i++) {
            size_t n = 1 + (size_t)rng_below(700);
            float *logits = random_logits(n, true);
            int32_t *ids = sorted_ids(logits, n);
            struct sample_row row = plain_row();
            row.temperature = 0;
            ck_assert_int_eq(sample_one(device, logits, n, row).id, ids[0]);
            row.temperature = i & 1 ? 1e-30f : 1e-42f, row.seed = rng_next(), row.top_p = 0.5f;
            ck_assert(logits[sample_one(device, logits, n, row).id] == logits[ids[0]]);
            row.top_k = 1; // the lowest of those that tie
            ck_assert_int_eq(sample_one(device, logits, n, row).id, ids[0]);
            free(logits), free(ids);
        }
}
END_TEST

// ---- processors -----------------------------------------------------------------------------------------------------

static void naive_penalties(const struct sample_row *row, const int32_t *context, float *x, size_t n)
{
    for (size_t id = 0; id < n; id++) {
        int32_t seen = 0, generated = 0;
        for (int32_t i = 0; i < row->position; i++) {
            if (context[i] != (int32_t)id) continue;
            seen++;
            generated += i >= row->n_prompt;
        }
        if (seen) x[id] = x[id] > 0 ? x[id] / row->repetition_penalty : x[id] * row->repetition_penalty;
        x[id] -= row->frequency_penalty * (float)generated;
        if (generated) x[id] -= row->presence_penalty;
    }
}

static bool ends_in(const int32_t *context, int32_t n_context, const int32_t *ids, int32_t n)
{
    return n <= n_context && !memcmp(context + n_context - n, ids, (size_t)n * sizeof(*ids));
}

static void naive_process(const struct sample_row *row, float *x, size_t n)
{
    const int32_t *context = history_tokens + row->history_row * MAX_LEN;
    for (size_t id = 0; id < n; id++) {
        bool allowed = row->n_allowed_ids == 0;
        for (int32_t i = 0; i < row->n_allowed_ids; i++) allowed |= row->allowed_ids[i] == (int32_t)id;
        if (row->mask && !(row->mask[id / 32] & 1u << id % 32)) allowed = false;
        if (!allowed) x[id] = -INFINITY;
    }
    for (int32_t i = 0; i < row->n_logit_bias; i++) x[row->logit_bias[i].id] += row->logit_bias[i].bias;
    for (int32_t i = 0; i < row->n_bad_words; i++) {
        const int32_t *word = row->bad_word_ids + row->bad_word_offsets[i];
        int32_t length = row->bad_word_offsets[i + 1] - row->bad_word_offsets[i];
        if (ends_in(context + row->n_prompt, row->position - row->n_prompt, word, length - 1))
            x[word[length - 1]] = -INFINITY;
    }
    for (int32_t i = 0; i < row->n_banned_ids; i++) x[row->banned_ids[i]] = -INFINITY;
    naive_penalties(row, context, x, n);
}

START_TEST(test_processors)
{
    enum { V = 40 };
    struct device *device = device_open(NULL, 2, false);
    for (int32_t i = 0; i < 2000; i++) {
        for (int32_t j = 0; j < SLOTS * MAX_LEN; j++) history_tokens[j] = rng_below(8);
        int32_t allowed[] = {rng_below(V), rng_below(V), rng_below(V), rng_below(V), rng_below(V)};
        int32_t banned[] = {rng_below(V), rng_below(V)}, offsets[] = {0, 1, 3, 6};
        int32_t words[] = {rng_below(8), rng_below(8), rng_below(8), rng_below(8), rng_below(8), rng_below(8)};
        struct logit_bias bias[] = {{rng_below(V), rng_normal() * 5}, {rng_below(V), 20}};
        uint32_t mask[] = {(uint32_t)rng_next() | 0xff, (uint32_t)rng_next()};
        float *logits = rng_normals(V, 3), x[V];
        for (int32_t j = 0; j < 8; j++) logits[j] += 6;
        memcpy(x, logits, sizeof(x));
        struct sample_row row = plain_row();
        row.history_row = rng_below(SLOTS), row.position = rng_below(MAX_LEN);
        row.n_prompt = rng_below(row.position + 1);
        row.temperature = i & 1 ? 0 : 0.9f, row.seed = rng_next();
        if (rng_below(4) == 0) row.allowed_ids = allowed, row.n_allowed_ids = 5;
        if (rng_below(4) == 0) row.banned_ids = banned, row.n_banned_ids = 2;
        if (rng_below(2) == 0) row.bad_word_ids = words, row.bad_word_offsets = offsets, row.n_bad_words = 3;
        if (rng_below(4) == 0) row.logit_bias = bias, row.n_logit_bias = 2;
        if (rng_below(4) == 0) row.mask = mask;
        if (rng_below(2) == 0) row.repetition_penalty = 1.5f;
        if (rng_below(2) == 0) row.frequency_penalty = 0.25f;
        if (rng_below(2) == 0) row.presence_penalty = -0.5f;
        naive_process(&row, x, V);
        int32_t best = 0;
        for (int32_t id = 0; id < V; id++)
            if (x[id] > x[best]) best = id;
        bool nothing = x[best] == -INFINITY;
        struct sample_result r = sample_one(device, logits, V, row);
        ck_assert_int_eq(r.barred, nothing);
        ck_assert(!r.invalid);
        if (nothing) ck_assert_int_eq(r.id, 0);
        else if (row.temperature == 0) ck_assert_int_eq(r.id, best);
        else check_draw(&row, x, V, r.id);
        free(logits);
    }
    ops->device_destroy(device);
}
END_TEST

// ---- log-probabilities, faults, company -----------------------------------------------------------------------------

static void check_logprobs(const struct sample_result *r, const float *x, size_t n, int32_t wanted)
{
    int32_t *ids = sorted_ids(x, n);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - x[ids[0]]);
    double log_sum = log(sum) + x[ids[0]];
    ck_assert(fabs(r->logprob - (x[r->id] - log_sum)) < 3e-6);
    ck_assert_int_eq(ids[r->rank - 1], r->id);
    ck_assert_int_eq(r->n_top, (size_t)wanted < n ? wanted : (int32_t)n);
    for (int32_t i = 0; i < r->n_top; i++) {
        ck_assert_int_eq(r->top[i].id, ids[i]);
        ck_assert(fabs(r->top[i].logprob - (x[ids[i]] - log_sum)) < 3e-6);
    }
    free(ids);
}

START_TEST(test_logprobs_are_those_of_the_raw_logits)
{
    static const int32_t sizes[] = {1, 5, 63, 64, 65, 1000, 32000};
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 56; i++) {
            size_t n = (size_t)sizes[i % 7];
            float *logits = random_logits(n, i & 8), *before = malloc(n * sizeof(*before));
            memcpy(before, logits, n * sizeof(*before));
            struct sample_row row = plain_row();
            row.n_logprobs = i % 3 == 0 ? MAX_LOGPROBS : rng_below(MAX_LOGPROBS), row.seed = rng_next();
            row.temperature = i % 2 ? 0.5f : 0, row.top_k = 3, row.repetition_penalty = 1.3f;
            memset(history_tokens, 0, sizeof(history_tokens));
            if (i & 4) row.target = rng_below((int32_t)n);
            struct sample_result r = sample_one(device, logits, n, row);
            if (row.target >= 0) {
                ck_assert_int_eq(r.id, row.target);
                ck_assert_int_eq(history_tokens[row.position], 0); // nothing was sampled
            }
            check_logprobs(&r, before, n, row.n_logprobs);
            free(logits), free(before);
        }
}
END_TEST

START_TEST(test_rows_without_an_answer)
{
    const float faults[] = {NAN, INFINITY, -INFINITY};
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 60; i++) {
            size_t n = 1 + (size_t)rng_below(200);
            float *logits = random_logits(n, false);
            for (size_t id = 0; id < n && i % 3 == 2; id++) logits[id] = -INFINITY;
            logits[rng_below((int32_t)n)] = faults[i % 3];
            struct sample_row row = plain_row();
            row.temperature = (float)(i & 1), row.n_logprobs = i % 5 - 1, row.top_p = i & 4 ? 0.5f : 1;
            struct sample_result r = sample_one(device, logits, n, row);
            ck_assert(r.invalid && !r.barred);
            ck_assert_int_eq(r.id, 0);
            free(logits);
        }
}
END_TEST

START_TEST(test_same_token_alone_and_in_company)
{
    enum { N = 24, V = 9000 };
    float *logits = random_logits(N * V, true), *copy = malloc(N * V * sizeof(*copy));
    struct sample_row rows[N];
    struct sample_result together[N], alone;
    struct device *one = device_open(NULL, 1, false), *two = device_open(NULL, 2, false);
    for (int32_t i = 0; i < N; i++) {
        rows[i] = plain_row();
        rows[i].logits_row = i, rows[i].seed = rng_next(), rows[i].position = 30 + i, rows[i].n_logprobs = i % 4 - 1;
        rows[i].top_k = i % 2 * 40, rows[i].top_p = i % 3 ? 1 : 0.8f, rows[i].temperature = (float)(i % 5) * 0.5f;
    }
    memcpy(copy, logits, N * V * sizeof(*copy));
    struct sample_params p = {.logits = matrix(copy, DTYPE_F32, N, V), .history = history, .rows = rows, .n_rows = N,
                              .results = together};
    ck_assert_int_eq(ops->sample(two, &p, NULL), 0);
    for (int32_t i = 0; i < N; i++) {
        alone = sample_one(one, logits + i * V, V, rows[i]);
        ck_assert_int_eq(memcmp(&alone, &together[i], offsetof(struct sample_result, invalid)), 0);
    }
    free(logits), free(copy);
    ops->device_destroy(one);
    ops->device_destroy(two);
}
END_TEST

START_TEST(test_rows_that_do_not_fit)
{
    float logits[10] = {0};
    struct device *device = device_open(NULL, 1, false);
    struct sample_result result;
    int32_t id = 10;
    struct sample_row rows[4] = {plain_row(), plain_row(), plain_row(), plain_row()};
    rows[0].allowed_ids = &id, rows[0].n_allowed_ids = 1;
    rows[1].logits_row = 1;
    rows[2].position = MAX_LEN + 1;
    rows[3].target = 10;
    for (int32_t i = 0; i < 4; i++) {
        struct error e;
        struct sample_params p = {.logits = matrix(logits, DTYPE_F32, 1, 10), .history = history, .rows = &rows[i],
                                  .n_rows = 1, .results = &result};
        ck_assert_int_eq(ops->sample(device, &p, &e), ERR_INVALID);
    }
    ops->device_destroy(device);
}
END_TEST

int main(void)
{
    ops = kernels_cpu();
    Suite *suite = suite_create("sample");
    TCase *tcase = tcase_create("sample");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_philox_known_answers);
    tcase_add_test(tcase, test_draw_and_filters);
    tcase_add_test(tcase, test_large_vocabulary);
    tcase_add_test(tcase, test_distribution);
    tcase_add_test(tcase, test_greedy_and_tiny_temperature);
    tcase_add_test(tcase, test_processors);
    tcase_add_test(tcase, test_logprobs_are_those_of_the_raw_logits);
    tcase_add_test(tcase, test_rows_without_an_answer);
    tcase_add_test(tcase, test_same_token_alone_and_in_company);
    tcase_add_test(tcase, test_rows_that_do_not_fit);
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
