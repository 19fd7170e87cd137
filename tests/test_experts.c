/* Mixture of experts on the CPU: who is chosen and with what weight, the products of sorted pairs, their sum; and the same
 * bits whatever else is in the batch. */
#include "tests/kernel_helpers.h"

enum { MAX_T = 700 };

static const struct kernels *ops;

static void plan_init(struct expert_plan *plan, int32_t n_experts, int32_t n_chosen)
{
    size_t n_pairs = (size_t)MAX_T * (size_t)n_chosen;
    *plan = (struct expert_plan){.weights = poisoned(n_pairs), .rows = malloc(n_pairs * sizeof(int32_t)),
                                 .tokens = malloc(n_pairs * sizeof(int32_t)),
                                 .offsets = malloc(((size_t)n_experts + 1) * sizeof(int32_t)), .n_experts = n_experts,
                                 .n_chosen = n_chosen};
}

static void plan_deinit(struct expert_plan *plan)
{
    free(plan->weights), free(plan->rows), free(plan->tokens), free(plan->offsets);
}

// ---- route ----------------------------------------------------------------------------------------------------------

static int32_t expert_of_row(const struct expert_plan *plan, int32_t row)
{
    int32_t e = 0;
    while (plan->offsets[e + 1] <= row) e++;
    return e;
}

static bool ranks_before(const float *logits, int32_t a, int32_t b)
{
    if (isnan(logits[a]) || isnan(logits[b])) return isnan(logits[b]) && (!isnan(logits[a]) || a < b);
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

// The token's experts ascend, and each has fewer than n_chosen before it; weights as the softmax has them.
static void check_token(const struct expert_plan *plan, const float *logits, int32_t t, bool renormalize, bool finite)
{
    double sum = 0, chosen = 0;
    int32_t before = -1;
    for (int32_t e = 0; e < plan->n_experts; e++) sum += exp(logits[e]);
    for (int32_t i = 0; i < plan->n_chosen; i++)
        chosen += exp(logits[expert_of_row(plan, plan->rows[t * plan->n_chosen + i])]) / sum;
    for (int32_t i = 0; i < plan->n_chosen; i++) {
        int32_t row = plan->rows[t * plan->n_chosen + i], e = expert_of_row(plan, row), n_before = 0;
        for (int32_t other = 0; other < plan->n_experts; other++) n_before += ranks_before(logits, other, e);
        CHECK(plan->tokens[row] == t && e > before && n_before < plan->n_chosen);
        double weight = exp(logits[e]) / sum / (renormalize ? chosen : 1);
        CHECK(!finite || fabs(plan->weights[t * plan->n_chosen + i] - weight) < 1e-6);
        before = e;
    }
}

static void check_route(struct device *device, int32_t n_experts, int32_t n_chosen, int32_t n_tokens, bool odd)
{
    struct expert_plan plan;
    float *logits = rng_normals((size_t)(n_tokens * n_experts), 2);
    for (int32_t i = 0; odd && i < n_tokens * n_experts; i++) // ties, NaN, infinities
        logits[i] = (const float[]){1, 1, 2, NAN, INFINITY, -INFINITY}[rng_below(6)];
    plan_init(&plan, n_experts, n_chosen);
    struct route_params p = {.logits = matrix(logits, DTYPE_F32, (size_t)n_tokens, (size_t)n_experts), .plan = plan,
                             .renormalize = rng_below(2)};
    ck_assert_int_eq(ops->route(device, &p, NULL), 0);
    CHECK(plan.offsets[0] == 0 && plan.offsets[n_experts] == n_tokens * n_chosen);
    for (int32_t e = 0; e < n_experts; e++) {
        CHECK(plan.offsets[e] <= plan.offsets[e + 1]);
        for (int32_t i = plan.offsets[e] + 1; i < plan.offsets[e + 1]; i++) CHECK(plan.tokens[i - 1] < plan.tokens[i]);
    }
    for (int32_t t = 0; t < n_tokens; t++) check_token(&plan, logits + t * n_experts, t, p.renormalize, !odd);
    free(logits);
    plan_deinit(&plan);
}

START_TEST(test_route)
{
    struct device *device = device_open(NULL, 2, false);
    for (int32_t i = 0; i < 60; i++) {
        int32_t n_experts = 1 + rng_below(i % 3 ? 16 : 128), most = n_experts < MAX_CHOSEN_EXPERTS ? n_experts : MAX_CHOSEN_EXPERTS;
        check_route(device, n_experts, 1 + rng_below(most), 1 + rng_below(i % 4 ? 20 : MAX_T), i % 5 == 0);
    }
    float logits[4] = {0};
    struct error e;
    struct route_params p = {.logits = matrix(logits, DTYPE_F32, 1, 4), .plan = {.n_experts = 4, .n_chosen = 5}};
    ck_assert_int_eq(ops->route(device, &p, &e), ERR_INVALID);
    ops->device_destroy(device);
}
END_TEST

// ---- products and their sum -----------------------------------------------------------------------------------------

struct mix {
    int32_t n_tokens, n_experts, n_chosen;
    size_t n_in, n_out; // columns; rows of a part
    struct weight *weights;
    struct expert_plan plan;
    float *x;
};

static void mix_init(struct mix *m, struct device *device, enum dtype dtype)
{
    m->n_experts = 2 + rng_below(9), m->n_chosen = 1 + rng_below(2), m->n_tokens = 1 + rng_below(40);
    m->n_in = 8 * (1 + (size_t)rng_below(12)), m->n_out = 1 + (size_t)rng_below(60);
    m->x = rng_normals((size_t)m->n_tokens * m->n_in, 1);
    m->weights = calloc((size_t)m->n_experts, sizeof *m->weights);
    for (int32_t e = 0; e < m->n_experts; e++) {
        m->weights[e] = (struct weight){.n_parts = 2, .n_cols = m->n_in};
        for (int32_t i = 0; i < 2; i++)
            m->weights[e].part[i] = (struct weight_part){.data = random_elements(dtype, m->n_out * m->n_in), .dtype = dtype,
                                                         .n_rows = m->n_out};
    }
    float *logits = rng_normals((size_t)(m->n_tokens * m->n_experts), 1);
    plan_init(&m->plan, m->n_experts, m->n_chosen);
    struct route_params p = {.logits = matrix(logits, DTYPE_F32, (size_t)m->n_tokens, (size_t)m->n_experts), .plan = m->plan};
    ck_assert_int_eq(ops->route(device, &p, NULL), 0);
    free(logits);
}

static void mix_deinit(struct mix *m)
{
    for (int32_t e = 0; e < m->n_experts; e++)
        for (int32_t i = 0; i < 2; i++) free((void *)m->weights[e].part[i].data);
    free(m->weights), free(m->x);
    plan_deinit(&m->plan);
}

// Each pair's row is what its expert's own product gives for its token's row alone: bit for bit.
static void check_products(struct device *device, enum dtype dtype)
{
    struct mix m;
    mix_init(&m, device, dtype);
    size_t n_pairs = (size_t)(m.n_tokens * m.n_chosen), cols = 2 * m.n_out;
    float *out = poisoned(n_pairs * cols), *again = poisoned(n_pairs * cols), *one = poisoned(cols);
    float *sorted = malloc(n_pairs * m.n_in * sizeof(float));
    struct linear_experts_params p = {.out = matrix(out, DTYPE_F32, n_pairs, cols), .weights = m.weights, .plan = m.plan,
                                      .x = matrix(m.x, DTYPE_F32, (size_t)m.n_tokens, m.n_in), .by_token = true};
    ck_assert_int_eq(ops->linear_experts(device, &p, NULL), 0);
    for (size_t i = 0; i < n_pairs; i++) {
        float *x = m.x + (size_t)m.plan.tokens[i] * m.n_in;
        memcpy(sorted + i * m.n_in, x, m.n_in * sizeof(float));
        struct linear_params alone = {.out = matrix(one, DTYPE_F32, 1, cols), .x = matrix(x, DTYPE_F32, 1, m.n_in),
                                      .weight = &m.weights[expert_of_row(&m.plan, (int32_t)i)]};
        ck_assert_int_eq(ops->linear(device, &alone, NULL), 0);
        CHECK(memcmp(one, out + i * cols, cols * sizeof(float)) == 0);
    }
    p.out.data = again, p.x = matrix(sorted, DTYPE_F32, n_pairs, m.n_in), p.by_token = false;
    ck_assert_int_eq(ops->linear_experts(device, &p, NULL), 0);
    CHECK(memcmp(out, again, n_pairs * cols * sizeof(float)) == 0);
    struct error e;
    p.by_token = m.n_chosen > 1;
    p.x.shape[0] = n_pairs + 1;
    ck_assert_int_eq(ops->linear_experts(device, &p, &e), ERR_INVALID);
    free(out), free(again), free(one), free(sorted);
    mix_deinit(&m);
}

static void check_combine(struct device *device)
{
    struct mix m;
    mix_init(&m, device, DTYPE_F32);
    size_t n_tokens = (size_t)m.n_tokens, k = (size_t)m.n_chosen, dim = 1 + (size_t)rng_below(90);
    float *x = rng_normals(n_tokens * k * dim, 1), *out = rng_normals(n_tokens * dim, 1);
    float *before = malloc(n_tokens * dim * sizeof(float));
    memcpy(before, out, n_tokens * dim * sizeof(float));
    struct combine_experts_params p = {.out = matrix(out, DTYPE_F32, n_tokens, dim),
                                       .x = matrix(x, DTYPE_F32, n_tokens * k, dim), .plan = m.plan};
    ck_assert_int_eq(ops->combine_experts(device, &p, NULL), 0);
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t j = 0; j < dim; j++) {
            double sum = before[t * dim + j];
            for (size_t i = 0; i < k; i++)
                sum += (double)m.plan.weights[t * k + i] * x[(size_t)m.plan.rows[t * k + i] * dim + j];
            CHECK(fabs(out[t * dim + j] - sum) < 1e-6 * (1 + fabs(sum)));
        }
    free(x), free(out), free(before);
    mix_deinit(&m);
}

START_TEST(test_products)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 30; i++) check_products(device, (enum dtype)(i % 3));
}
END_TEST

START_TEST(test_combine)
{
    struct device *device = device_open(NULL, 2, false);
    for (int32_t i = 0; i < 30; i++) check_combine(device);
    ops->device_destroy(device);
}
END_TEST

int main(void)
{
    ops = kernels_cpu();
    Suite *suite = suite_create("experts");
    TCase *tcase = tcase_create("experts");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_route);
    tcase_add_test(tcase, test_products);
    tcase_add_test(tcase, test_combine);
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
