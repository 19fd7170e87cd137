/* test_cuda_experts.c: the CUDA backend's mixture of experts against the CPU's: the plan of pairs, products, their sum; the same
 * bits for a token alone and in any batch; a layer recorded as a graph.
 */
#include "tests/gpu/pairs.h"

enum { MOST_TOKENS = 8200 };

// ---- plans ----------------------------------------------------------------------------------------------------------

struct plan {
    struct expert_plan g, c; // c: on the host, too, as the CPU made it
    size_t T, P;
    struct pair logits;
};

static void *poisoned(size_t bytes)
{
    void *device = gpu->alloc(gpu_device, bytes), *bits = malloc(bytes);
    memset(bits, 0xFF, bytes);
    check(gpu->copy_in(gpu_device, device, bits, bytes, &e));
    free(bits);
    return device;
}

static void logits_set(struct plan *p)
{
    check(gpu->copy_in(gpu_device, p->logits.g.data, p->logits.c.data, p->T * (size_t)p->g.n_experts * sizeof(float), &e));
}

// Logits are multiples of `step`, so that what is not equal is so as a probability, too. Each of the first n_favoured experts is
// the likelier by 20; they have nearly all pairs.
static struct plan plan_make(size_t T, int32_t n_experts, int32_t n_chosen, float step, int32_t n_favoured)
{
    const size_t E = (size_t)n_experts, K = (size_t)n_chosen, P = T * K;
    struct plan p = {.T = T, .P = P, .logits = pair_of(DTYPE_F32, T, E)};
    float *logits = p.logits.c.data;
    for (size_t i = 0; i < T * E; i++) logits[i] = roundf(logits[i] / step) * step + ((int32_t)(i % E) < n_favoured ? 20 : 0);
    p.g = (struct expert_plan){poisoned(P * sizeof(float)), poisoned(P * 4), poisoned(P * 4), poisoned((E + 1) * 4), n_experts,
                               n_chosen};
    p.c = (struct expert_plan){malloc(P * sizeof(float)), malloc(P * 4), malloc(P * 4), malloc((E + 1) * 4), n_experts, n_chosen};
    logits_set(&p);
    return p;
}

static void plan_end(struct plan *p)
{
    gpu->free(gpu_device, p->g.weights), gpu->free(gpu_device, p->g.rows);
    gpu->free(gpu_device, p->g.tokens), gpu->free(gpu_device, p->g.offsets);
    free(p->c.weights), free(p->c.rows), free(p->c.tokens), free(p->c.offsets);
    pair_free(&p->logits);
}

// The plan of the GPU, on the host.
static struct expert_plan plan_read(const struct plan *p)
{
    const size_t E = (size_t)p->g.n_experts;
    struct expert_plan h = p->g;
    h.weights = bits_of(&(struct tensor){.data = p->g.weights, .dtype = DTYPE_F32}, p->P);
    h.rows = bits_of(&(struct tensor){.data = p->g.rows, .dtype = DTYPE_I32}, p->P);
    h.tokens = bits_of(&(struct tensor){.data = p->g.tokens, .dtype = DTYPE_I32}, p->P);
    h.offsets = bits_of(&(struct tensor){.data = p->g.offsets, .dtype = DTYPE_I32}, E + 1);
    return h;
}

static void read_end(struct expert_plan *h)
{
    free(h->weights), free(h->rows), free(h->tokens), free(h->offsets);
}

static int32_t expert_of(const struct expert_plan *h, int32_t row)
{
    int32_t e_id = 0;
    while (h->offsets[e_id + 1] <= row) e_id++;
    return e_id;
}

// Whatever the logits are: every token has K different experts in ascending order, every pair its place.
static void expect_valid(const struct expert_plan *h, size_t T)
{
    const int32_t P = (int32_t)T * h->n_chosen;
    ck_assert_int_eq(h->offsets[0], 0);
    ck_assert_int_eq(h->offsets[h->n_experts], P);
    for (int32_t i = 0; i < h->n_experts; i++) {
        ck_assert_int_le(h->offsets[i], h->offsets[i + 1]);
        for (int32_t j = h->offsets[i] + 1; j < h->offsets[i + 1]; j++) ck_assert_int_lt(h->tokens[j - 1], h->tokens[j]);
    }
    for (int32_t i = 0; i < P; i++) {
        ck_assert(h->rows[i] >= 0 && h->rows[i] < P);
        ck_assert_int_eq(h->tokens[h->rows[i]], i / h->n_chosen);
        if (i % h->n_chosen) ck_assert_int_gt(expert_of(h, h->rows[i]), expert_of(h, h->rows[i - 1]));
    }
}

static void route_both(struct plan *p, bool renormalize)
{
    check(gpu->route(gpu_device, &(struct route_params){p->logits.g, p->g, renormalize}, &e));
    check(cpu->route(cpu_device, &(struct route_params){p->logits.c, p->c, renormalize}, &e));
}

START_TEST(route)
{
    static const struct { size_t T; int32_t E, K; } shapes[] = {
        {1, 8, 2}, {3, 8, 2}, {8, 8, 2}, {64, 8, 2}, {65, 8, 2}, {300, 8, 1}, {1, 1, 1}, {70, 1, 1}, {5, 3, 3}, {1, 128, 8},
        {33, 128, 8}, {600, 128, 8}, {1, 256, 16}, {63, 256, 16}, {129, 256, 16}, {1000, 60, 4}, {2047, 33, 6},
        {8192, 8, 2}, {8192, 256, 8}, {8200, 64, 6}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int round = 0; round < 4; round++) {
            const size_t T = shapes[i].T;
            const int32_t E = shapes[i].E, K = shapes[i].K;
            if (rounds(6) < 6 && T > 1000) continue;
            struct plan p = plan_make(T, E, K, round % 2 ? 0.25f : 0x1p-10f, round < 2 ? 0 : random_int(0, E));
            route_both(&p, random_int(0, 1));
            struct expert_plan h = plan_read(&p);
            expect_valid(&h, T);
            ck_assert_msg(!memcmp(h.rows, p.c.rows, p.P * 4), "route: rows of %zu tokens, %d of %d experts", T, K, E);
            ck_assert_msg(!memcmp(h.tokens, p.c.tokens, p.P * 4), "route: tokens of %zu, %d of %d experts", T, K, E);
            ck_assert_msg(!memcmp(h.offsets, p.c.offsets, ((size_t)E + 1) * 4), "route: offsets, %zu tokens, %d of %d", T, K, E);
            for (size_t j = 0; j < p.P; j++)
                ck_assert_msg(fabsf(h.weights[j] - p.c.weights[j]) <= 1e-6f + 1e-5f * p.c.weights[j],
                              "route: weight %zu is %g, not %g", j, h.weights[j], p.c.weights[j]);
            read_end(&h), plan_end(&p);
        }
}
END_TEST

// Of token t, experts that hold NaN: all for t % 4 = 0, all but K for 1, a few for 2; infinities for 3.
START_TEST(route_of_what_is_not_a_number)
{
    static const size_t counts[] = {4, 130};
    for (int round = 0; round < 6; round++) {
        const size_t T = counts[round % 2];
        const int32_t E = (int32_t[]){8, 128, 200}[round / 2], K = 4;
        struct plan p = plan_make(T, E, K, 0x1p-10f, 0);
        float *x = p.logits.c.data;
        for (size_t t = 0; t < T; t++)
            for (int32_t i = 0; i < E; i++) {
                float *at = x + t * (size_t)E + i;
                if (t % 4 == 0 || (t % 4 == 1 && i % (E / K)) || (t % 4 == 2 && random_int(0, 3) == 0 && i >= K)) *at = NAN;
                if (t % 4 == 3) *at = i % 3 ? -INFINITY : INFINITY;
            }
        logits_set(&p);
        check(gpu->route(gpu_device, &(struct route_params){p.logits.g, p.g, true}, &e));
        struct expert_plan h = plan_read(&p);
        expect_valid(&h, T);
        for (size_t i = 0; i < p.P; i++) {
            const size_t t = i / (size_t)K;
            const int32_t chosen = expert_of(&h, h.rows[i]);
            if (t % 4 == 0) ck_assert_int_eq(chosen, (int32_t)i % K); // ties
            else ck_assert_msg(!isnan(x[t * (size_t)E + chosen]), "route: token %zu goes to %d, which is NaN", t, chosen);
            if (t % 4 == 1 || t % 4 == 2) ck_assert(h.weights[i] > 0 && h.weights[i] <= 1);
        }
        read_end(&h), plan_end(&p);
    }
}
END_TEST

// ---- products -------------------------------------------------------------------------------------------------------

// Experts' parts, one expert after the other with a gap between them.
struct experts {
    struct pair all;
    struct weight *g, *c; // [E]
    size_t n_rows;
};

static struct experts experts_draw(enum dtype dtype, int32_t n, int32_t n_parts, const size_t *rows, size_t n_cols)
{
    struct experts x = {.g = calloc((size_t)n, sizeof *x.g), .c = calloc((size_t)n, sizeof *x.c)};
    for (int32_t j = 0; j < n_parts; j++) x.n_rows += rows[j];
    const size_t apart = x.n_rows + 1;
    x.all = pair_of(dtype, apart * (size_t)n, n_cols);
    for (int32_t i = 0; i < n; i++) {
        size_t row = apart * (size_t)i;
        x.g[i] = x.c[i] = (struct weight){.n_parts = n_parts, .n_cols = n_cols};
        for (int32_t j = 0; j < n_parts; row += rows[j++]) {
            x.g[i].part[j] = (struct weight_part){.data = (char *)x.all.g.data + row * n_cols * 2, .dtype = dtype,
                                                  .n_rows = rows[j]};
            x.c[i].part[j] = (struct weight_part){.data = (float *)x.all.c.data + row * n_cols, .dtype = DTYPE_F32,
                                                  .n_rows = rows[j]};
        }
    }
    return x;
}

static void experts_end(struct experts *x)
{
    pair_free(&x->all);
    free(x->g), free(x->c);
}

START_TEST(linear_experts)
{
    static const size_t counts[] = {1, 2, 4, 5, 8, 9, 31, 64, 200, 600};
    static const size_t dims[] = {8, 40, 64, 136, 520, 1000};
    static const int32_t experts[][2] = {{8, 2}, {1, 1}, {5, 3}, {128, 8}, {16, 1}};
    for (int round = 0; round < rounds(120); round++) {
        const enum dtype dtype = round % 2 ? DTYPE_F16 : DTYPE_BF16;
        const int32_t *kind = experts[random_int(0, 4)], n_parts = random_int(1, 2);
        const size_t T = counts[round % 10], n_cols = dims[random_int(0, 5)];
        const size_t rows[] = {kind[0] > 64 ? 56 : dims[random_int(0, 5)], kind[0] > 64 ? 72 : dims[random_int(0, 5)]};
        const bool by_token = random_int(0, 1);
        struct experts w = experts_draw(dtype, kind[0], n_parts, rows, n_cols);
        // All pairs may be those of as few experts as can have them.
        struct plan p = plan_make(T, kind[0], kind[1], 0x1p-10f, random_int(0, 2) ? random_int(0, kind[0]) : kind[1]);
        struct pair x = pair_of(dtype, by_token ? T : p.P, n_cols), out = pair_of(dtype, p.P, w.n_rows);
        route_both(&p, true);
        poison(&out);
        check(gpu->linear_experts(gpu_device, &(struct linear_experts_params){out.g, x.g, w.g, p.g, by_token}, &e));
        check(cpu->linear_experts(cpu_device, &(struct linear_experts_params){out.c, x.c, w.c, p.c, by_token}, &e));
        char what[96];
        snprintf(what, sizeof what, "linear_experts, %zu tokens, %d of %d, K %zu%s", T, kind[1], kind[0], n_cols,
                 by_token ? ", by token" : "");
        expect_close(&out, 1.1, what);
        experts_end(&w), plan_end(&p), pair_free(&x), pair_free(&out);
    }
}
END_TEST

// Tokens first .. of a batch, by themselves: each pair has the bits that it has in the batch.
static void expect_same_alone(const struct plan *all, const struct expert_plan *h, const struct tensor *x, const uint16_t *want,
                              const struct experts *w, size_t first, size_t T)
{
    const size_t N = w->n_rows, E = (size_t)all->g.n_experts, K = (size_t)all->g.n_chosen;
    struct plan p = plan_make(T, all->g.n_experts, all->g.n_chosen, 1, 0);
    struct pair out = pair_of(x->dtype, p.P, N);
    struct tensor rows = *x;
    memcpy(p.logits.c.data, (float *)all->logits.c.data + first * E, T * E * sizeof(float));
    logits_set(&p);
    poison(&out);
    rows.data = (char *)x->data + first * x->shape[1] * 2, rows.shape[0] = T;
    check(gpu->route(gpu_device, &(struct route_params){p.logits.g, p.g, true}, &e));
    check(gpu->linear_experts(gpu_device, &(struct linear_experts_params){out.g, rows, w->g, p.g, true}, &e));
    struct expert_plan few = plan_read(&p);
    uint16_t *got = bits_of(&out.g, p.P * N);
    for (size_t i = 0; i < p.P; i++) {
        ck_assert(few.weights[i] == h->weights[first * K + i]);
        ck_assert_msg(!memcmp(got + (size_t)few.rows[i] * N, want + (size_t)h->rows[first * K + i] * N, N * 2),
                      "linear_experts: token %zu is not among %zu what it is among %zu, K %zu, N %zu", first + i / K, T, all->T,
                      x->shape[1], N);
    }
    free(got);
    read_end(&few), plan_end(&p), pair_free(&out);
}

START_TEST(linear_experts_of_any_batch)
{
    static const size_t counts[] = {1, 3, 7, 20, 150, 300}, dims[] = {1024, 520, 40};
    static const int32_t experts[][2] = {{8, 2}, {32, 4}, {2, 2}};
    for (int round = 0; round < rounds(12); round++) {
        const enum dtype dtype = round % 2 ? DTYPE_F16 : DTYPE_BF16;
        const int32_t *kind = experts[round / 2 % 3];
        const size_t T = rounds(6) == 6 ? 4096 : 600, n_cols = dims[random_int(0, 2)];
        struct experts w = experts_draw(dtype, kind[0], 2, (size_t[]){264, 200}, n_cols);
        struct plan p = plan_make(T, kind[0], kind[1], 0x1p-10f, 0);
        struct pair x = pair_of(dtype, T, n_cols), out = pair_of(dtype, p.P, w.n_rows);
        poison(&out);
        check(gpu->route(gpu_device, &(struct route_params){p.logits.g, p.g, true}, &e));
        check(gpu->linear_experts(gpu_device, &(struct linear_experts_params){out.g, x.g, w.g, p.g, true}, &e));
        struct expert_plan h = plan_read(&p);
        uint16_t *want = bits_of(&out.g, p.P * w.n_rows);
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
            for (int k = 0; k < 3; k++)
                expect_same_alone(&p, &h, &x.g, want, &w, (size_t)random_int(0, (int32_t)(T - counts[i])), counts[i]);
        free(want);
        read_end(&h), experts_end(&w), plan_end(&p), pair_free(&x), pair_free(&out);
    }
}
END_TEST

START_TEST(combine_experts)
{
    static const size_t dims[] = {1, 7, 64, 1000, 4096}, counts[] = {1, 8, 300};
    static const int32_t experts[][2] = {{8, 2}, {1, 1}, {128, 8}, {20, 16}};
    for (int round = 0; round < 60; round++) {
        const int32_t *kind = experts[round % 4];
        const size_t T = counts[round % 3], dim = dims[round % 5];
        struct plan p = plan_make(T, kind[0], kind[1], 0x1p-10f, 0);
        const enum dtype dtype = random_int(0, 1) ? DTYPE_F16 : DTYPE_BF16;
        struct pair x = pair_of(dtype, p.P, dim), out = pair_of(dtype, T, dim);
        route_both(&p, round % 2);
        check(gpu->combine_experts(gpu_device, &(struct combine_experts_params){out.g, x.g, p.g}, &e));
        check(cpu->combine_experts(cpu_device, &(struct combine_experts_params){out.c, x.c, p.c}, &e));
        expect_close(&out, dim == 1 ? 2 : 1.1, "combine_experts");
        plan_end(&p), pair_free(&x), pair_free(&out);
    }
}
END_TEST

START_TEST(what_does_not_fit_is_refused)
{
    struct experts w = experts_draw(DTYPE_BF16, 4, 1, (size_t[]){64}, 64);
    struct plan p = plan_make(8, 4, 2, 1, 0);
    struct pair x = pair_of(DTYPE_BF16, 8, 64), out = pair_of(DTYPE_BF16, p.P, 64);
    struct linear_experts_params params = {out.g, x.g, w.g, p.g, true}, other;
    check(gpu->route(gpu_device, &(struct route_params){p.logits.g, p.g, true}, &e));
    check(gpu->linear_experts(gpu_device, &params, &e));
    other = params, other.by_token = false; // x has not P rows
    ck_assert_int_eq(gpu->linear_experts(gpu_device, &other, &e), ERR_INVALID);
    other = params, other.x.dtype = other.out.dtype = DTYPE_F32;
    ck_assert_int_eq(gpu->linear_experts(gpu_device, &other, &e), ERR_UNSUPPORTED);
    w.g[3].part[0].data = w.g[0].part[0].data;
    ck_assert_int_eq(gpu->linear_experts(gpu_device, &params, &e), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(e.message, "distance"));
    struct route_params route = {p.logits.g, p.g, true};
    route.plan.n_chosen = 5;
    ck_assert_int_eq(gpu->route(gpu_device, &route, &e), ERR_INVALID);
    route.plan.n_chosen = 17, route.plan.n_experts = 400, route.logits.shape[1] = 400, route.logits.shape[0] = 1;
    ck_assert_int_eq(gpu->route(gpu_device, &route, &e), ERR_UNSUPPORTED);
    struct combine_experts_params combine = {x.g, x.g, p.g};
    ck_assert_int_eq(gpu->combine_experts(gpu_device, &combine, &e), ERR_INVALID);
    experts_end(&w), plan_end(&p), pair_free(&x), pair_free(&out);
}
END_TEST

// ---- a layer --------------------------------------------------------------------------------------------------------

struct layer {
    struct experts in, down;
    struct plan plan;
    struct pair x, inner, act, out_rows, out;
};

static struct layer layer_make(enum dtype dtype, size_t T, int32_t E, int32_t K, size_t dim, size_t inner)
{
    struct layer l = {.in = experts_draw(dtype, E, 2, (size_t[]){inner, inner}, dim), .plan = plan_make(T, E, K, 0x1p-10f, 0)};
    l.down = experts_draw(dtype, E, 1, &dim, inner);
    l.x = pair_of(dtype, T, dim), l.inner = pair_of(dtype, l.plan.P, 2 * inner), l.act = pair_of(dtype, l.plan.P, inner);
    l.out_rows = pair_of(dtype, l.plan.P, dim), l.out = pair_of(dtype, T, dim);
    return l;
}

static void layer_end(struct layer *l)
{
    experts_end(&l->in), experts_end(&l->down), plan_end(&l->plan);
    pair_free(&l->x), pair_free(&l->inner), pair_free(&l->act), pair_free(&l->out_rows), pair_free(&l->out);
}

static void layer_run(const struct layer *l)
{
    const struct expert_plan *plan = &l->plan.g;
    check(gpu->route(gpu_device, &(struct route_params){l->plan.logits.g, *plan, true}, &e));
    check(gpu->linear_experts(gpu_device, &(struct linear_experts_params){l->inner.g, l->x.g, l->in.g, *plan, true}, &e));
    check(gpu->activation(gpu_device, &(struct activation_params){l->act.g, l->inner.g, ACT_SILU, true}, &e));
    check(gpu->linear_experts(gpu_device, &(struct linear_experts_params){l->out_rows.g, l->act.g, l->down.g, *plan, false}, &e));
    check(gpu->combine_experts(gpu_device, &(struct combine_experts_params){l->out.g, l->out_rows.g, *plan}, &e));
}

// A record serves whatever the tokens' experts are.
START_TEST(layers_are_recorded)
{
    static const size_t counts[] = {1, 4, 8, 24, 300};
    static const char owners[5];
    for (int i = 0; i < 5; i++) {
        struct layer l = layer_make(i % 2 ? DTYPE_F16 : DTYPE_BF16, counts[i], 16, 4, 256, 136);
        const size_t n = counts[i] * 256, n_logits = counts[i] * 16;
        void *before = bits_of(&l.out.g, n);
        for (int step = 0; step < 6; step++) {
            bool replayed, launched = true;
            for (size_t j = 0; j < n_logits; j++) ((float *)l.plan.logits.c.data)[j] = random_normal() * (step % 2 ? 1 : 20);
            logits_set(&l.plan);
            check(gpu->copy_in(gpu_device, l.out.g.data, before, n * 2, &e));
            layer_run(&l);
            void *want = bits_of(&l.out.g, n);
            check(gpu->copy_in(gpu_device, l.out.g.data, before, n * 2, &e));
            poison(&l.inner), poison(&l.out_rows);
            check(gpu->graph_begin(gpu_device, &owners[i], (int32_t)counts[i], &replayed, &e));
            ck_assert_int_eq(replayed, step > 0);
            if (!replayed) layer_run(&l), check(gpu->graph_end(gpu_device, true, &launched, &e));
            ck_assert(launched);
            void *got = bits_of(&l.out.g, n);
            ck_assert_msg(!memcmp(got, want, n * 2), "a layer of %zu tokens, step %d", counts[i], step);
            free(want), free(got);
        }
        free(before), layer_end(&l);
    }
}
END_TEST

// With room for long batches: the plan's scratch is sized by it.
static void reopen_devices(void)
{
    struct device_options o = device_options();
    gpu->device_destroy(gpu_device), cpu->device_destroy(cpu_device);
    gpu_device = NULL, cpu_device = NULL;
    o.max_tokens = MOST_TOKENS;
    if (!gpu->device_create(&gpu_device, &o, &e) && !cpu->device_create(&cpu_device, &o, &e)) return;
    fprintf(stderr, "%s\n", e.message);
    exit(1);
}

int main(void)
{
    open_devices();
    reopen_devices();
    Suite *suite = suite_create("cuda_experts");
    TCase *tc = tcase_create("cuda_experts");
    tcase_set_timeout(tc, 0);
    tcase_add_test(tc, route);
    tcase_add_test(tc, route_of_what_is_not_a_number);
    tcase_add_test(tc, linear_experts);
    tcase_add_test(tc, linear_experts_of_any_batch);
    tcase_add_test(tc, combine_experts);
    tcase_add_test(tc, what_does_not_fit_is_refused);
    tcase_add_test(tc, layers_are_recorded);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
