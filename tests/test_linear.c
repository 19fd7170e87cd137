/* The linear op against sums in double precision, and against itself: the bits of a row must depend on nothing but the
 * row and the weights. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/machine.h"
#include "kernels/kernels.h"

enum { MAX_T = 600, MAX_K = 700, LONG_K = 20000 }; // LONG_K: several chunks of columns, whatever the type

static const char *const isa_names[] = {"generic", "avx2", "avx512", "avx512bf16"};
static const struct kernels *k;
static struct error e;
static uint64_t seed;

static uint32_t random_u32(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 32);
}

static int32_t random_int(int32_t low, int32_t high)
{
    return low + (int32_t)(random_u32() % (uint32_t)(high - low + 1));
}

// About normal: the sum of four uniform numbers.
static float random_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)(random_u32() >> 8) * 0x1p-24f - 0.5f;
    return sum * 1.7f;
}

static void element_set(char *array, enum dtype dtype, size_t i, float value)
{
    uint16_t half = dtype == DTYPE_F16 ? f32_to_f16(value) : f32_to_bf16(value);
    if (dtype == DTYPE_F32) memcpy(array + 4 * i, &value, 4);
    else memcpy(array + 2 * i, &half, 2);
}

static float element_at(const char *array, enum dtype dtype, size_t i)
{
    uint32_t element[2] = {0}; // copied out: the array may stand at an odd address
    memcpy(element, array + dtype_size(dtype) * i, dtype_size(dtype));
    return element_get(element, dtype, 0);
}

// A random array as it lies in a mapped checkpoint: at any multiple of two bytes. Freed through *memory.
static char *random_array(char **memory, enum dtype dtype, size_t n)
{
    size_t offset = 2 * (size_t)random_int(0, 3);
    *memory = malloc(offset + n * dtype_size(dtype));
    for (size_t i = 0; i < n; i++) element_set(*memory + offset, dtype, i, random_normal());
    return *memory + offset;
}

struct product {
    struct weight weight;
    char *memory[2 * MAX_WEIGHT_PARTS];
    size_t n_rows; // of all parts
    float *x;      // [T, K]
};

static void product_init(struct product *p, size_t T, size_t K, int32_t n_parts, int32_t max_rows,
                         const enum dtype *dtype)
{
    *p = (struct product){.weight = {.n_parts = n_parts, .n_cols = K}};
    for (int32_t i = 0; i < n_parts; i++) {
        struct weight_part *part = &p->weight.part[i];
        part->dtype = dtype ? *dtype : (enum dtype)random_int(DTYPE_F32, DTYPE_BF16);
        part->n_rows = (size_t)random_int(1, max_rows);
        part->data = random_array(&p->memory[2 * i], part->dtype, part->n_rows * K);
        enum dtype bias = (enum dtype)random_int(DTYPE_F32, DTYPE_BF16);
        part->bias = (struct tensor){.dtype = bias, .n_dims = 1, .shape = {part->n_rows}};
        if (random_int(0, 1)) part->bias.data = random_array(&p->memory[2 * i + 1], bias, part->n_rows);
        p->n_rows += part->n_rows;
    }
    p->x = malloc(T * K * sizeof *p->x);
    for (size_t i = 0; i < T * K; i++) p->x[i] = random_normal();
}

static void product_deinit(struct product *p)
{
    for (size_t i = 0; i < sizeof p->memory / sizeof *p->memory; i++) free(p->memory[i]);
    free(p->x);
}

// Rows first .. first + T of the product into out.
static int multiply(struct device *d, const struct product *p, size_t first, size_t T, float *out, bool accumulate)
{
    size_t K = p->weight.n_cols;
    struct linear_params params = {
        .out = {out, DTYPE_F32, 2, {T, p->n_rows}},
        .x = {p->x + first * K, DTYPE_F32, 2, {T, K}},
        .weight = &p->weight,
        .accumulate = accumulate,
    };
    return k->linear(d, &params, &e);
}

static struct device *device_create(const char *isa, int32_t n_threads)
{
    struct device *d;
    struct device_options options = {.n_threads = n_threads, .isa = isa, .max_vocab_size = 100, .max_context = 64,
                                     .max_dim = LONG_K, .max_tokens = MAX_T};
    ck_assert_msg(k->device_create(&d, &options, &e) == 0, "%s", e.message);
    return d;
}

static void check_product(struct device *d, bool bf16_products, const struct product *p, size_t T, bool accumulate)
{
    enum { GUARD = 16 };
    size_t n = T * p->n_rows, K = p->weight.n_cols;
    float *out = malloc((n + GUARD) * sizeof *out), *old = malloc((n + GUARD) * sizeof *old);
    for (size_t i = 0; i < n + GUARD; i++) out[i] = old[i] = accumulate ? random_normal() : NAN;
    ck_assert_msg(multiply(d, p, 0, T, out, accumulate) == 0, "%s", e.message);
    ck_assert_mem_eq(out + n, old + n, GUARD * sizeof *out);
    for (size_t t = 0; t < T; t++) {
        size_t column = 0;
        for (int32_t i = 0; i < p->weight.n_parts; i++) {
            const struct weight_part *w = &p->weight.part[i];
            for (size_t r = 0; r < w->n_rows; r++, column++) {
                double sum = 0, size = 1;
                for (size_t c = 0; c < K; c++) {
                    float x = p->x[t * K + c];
                    if (bf16_products && w->dtype == DTYPE_BF16) x = bf16_to_f32(f32_to_bf16(x));
                    double term = (double)x * element_at(w->data, w->dtype, r * K + c);
                    sum += term, size += fabs(term);
                }
                if (w->bias.data) sum += element_at(w->bias.data, w->bias.dtype, r);
                if (accumulate) sum += old[t * p->n_rows + column];
                float got = out[t * p->n_rows + column];
                ck_assert_msg(fabs(got - sum) <= 1e-6 * size, "T %zu K %zu row %zu column %zu (%s): %g, not %g", T, K,
                              t, column, dtype_name(w->dtype), (double)got, sum);
            }
        }
    }
    free(out), free(old);
}

START_TEST(equals_sums_in_double)
{
    static const int32_t n_tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 23, 50};
    for (int isa = 0; isa <= (int)machine_isa(); isa++) {
        struct device *d = device_create(isa_names[isa], 0);
        for (int round = 0; round < 120; round++) {
            struct product p;
            size_t T = (size_t)n_tokens[random_int(0, 10)], K = (size_t)random_int(1, random_int(0, 3) ? 80 : MAX_K);
            if (round % 20 == 0) K = (size_t)random_int(MAX_K, LONG_K);
            product_init(&p, T, K, random_int(1, MAX_WEIGHT_PARTS), random_int(1, K > MAX_K ? 9 : 40), NULL);
            check_product(d, isa == 3, &p, T, random_int(0, 1));
            product_deinit(&p);
        }
        k->device_destroy(d);
    }
}
END_TEST

// Every row of a product of T rows has the bits that it has in a product of its own, whatever T and its place.
static void check_rows_alone(struct device *d, const struct product *p, size_t T, const float *all)
{
    float *some = malloc(T * p->n_rows * sizeof *some);
    for (size_t first = 0, n; first < T; first += n) {
        n = (size_t)random_int(1, random_int(0, 1) ? 7 : 70);
        if (n > T - first) n = T - first;
        memset(some, 0xFF, n * p->n_rows * sizeof *some);
        ck_assert_int_eq(multiply(d, p, first, n, some, false), 0);
        ck_assert_msg(!memcmp(some, all + first * p->n_rows, n * p->n_rows * sizeof *some),
                      "K %zu: rows %zu..%zu of %zu differ from the same rows alone", p->weight.n_cols, first,
                      first + n, T);
    }
    free(some);
}

START_TEST(bits_do_not_depend_on_the_batch_or_threads)
{
    for (int isa = 0; isa <= (int)machine_isa(); isa++) {
        struct device *devices[] = {device_create(isa_names[isa], 1), device_create(isa_names[isa], 2),
                                    device_create(isa_names[isa], 5)};
        for (int round = 0; round < 12; round++) {
            struct product p;
            enum dtype dtype = (enum dtype)(round % 3);
            bool is_long = round >= 9;
            size_t T = round < 3 ? MAX_T : (size_t)random_int(2, is_long ? 20 : 200);
            size_t K = (size_t)random_int(is_long ? LONG_K / 2 : 1, is_long ? LONG_K : MAX_K);
            product_init(&p, T, K, random_int(1, MAX_WEIGHT_PARTS), random_int(1, is_long ? 70 : 300), &dtype);
            size_t bytes = T * p.n_rows * sizeof(float);
            float *all = malloc(bytes), *again = malloc(bytes);
            memset(all, 0xFF, bytes);
            ck_assert_int_eq(multiply(devices[0], &p, 0, T, all, false), 0);
            for (int i = 1; i < 3; i++) {
                memset(again, 0xFF, bytes);
                ck_assert_int_eq(multiply(devices[i], &p, 0, T, again, false), 0);
                ck_assert_mem_eq(all, again, bytes);
            }
            check_rows_alone(devices[round % 3], &p, T, all);
            free(all), free(again);
            product_deinit(&p);
        }
        for (int i = 0; i < 3; i++) k->device_destroy(devices[i]);
    }
}
END_TEST

// Infinities and NaNs come out where they go in, and nowhere else.
START_TEST(special_values_stay_in_their_row)
{
    for (int isa = 0; isa <= (int)machine_isa(); isa++) {
        struct device *d = device_create(isa_names[isa], 2);
        for (enum dtype dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
            struct product p;
            enum { T = 20, K = 37 };
            product_init(&p, T, K, 1, 30, &dtype);
            p.x[3 * K + 36] = NAN;
            p.x[11 * K + 1] = INFINITY;
            float *out = malloc(T * p.n_rows * sizeof *out);
            ck_assert_int_eq(multiply(d, &p, 0, T, out, false), 0);
            for (size_t i = 0; i < T * p.n_rows; i++) {
                size_t t = i / p.n_rows;
                ck_assert_msg(t == 3 ? isnan(out[i]) : t == 11 ? !isfinite(out[i]) : isfinite(out[i]), "row %zu: %g", t,
                              (double)out[i]);
            }
            free(out);
            product_deinit(&p);
        }
        k->device_destroy(d);
    }
}
END_TEST

START_TEST(shapes_are_checked)
{
    struct device *d = device_create(NULL, 1);
    struct product p;
    enum dtype dtype = DTYPE_F32;
    product_init(&p, 2, 8, 1, 4, &dtype);
    float out[2 * 4];
    struct linear_params good = {
        .out = {out, DTYPE_F32, 2, {2, p.n_rows}}, .x = {p.x, DTYPE_F32, 2, {2, 8}}, .weight = &p.weight};
    ck_assert_int_eq(k->linear(d, &good, &e), 0);
    struct linear_params bad = good;
    bad.x.shape[1] = 7;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    bad = good, bad.out.shape[0] = 1;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    bad = good, bad.out.shape[1]++;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    bad = good, bad.x.dtype = DTYPE_F16;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    bad = good, bad.x.shape[0] = bad.out.shape[0] = MAX_T + 1;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    struct weight w = p.weight;
    bad = good, bad.weight = &w;
    w.part[0].dtype = DTYPE_I32;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    w = p.weight, w.n_parts = 4;
    ck_assert_int_eq(k->linear(d, &bad, &e), ERR_INVALID);
    product_deinit(&p);
    k->device_destroy(d);
}
END_TEST

int main(void)
{
    k = kernels_cpu();
    seed = (uint64_t)time(NULL);
    printf("seed %llu\n", (unsigned long long)seed);
    Suite *suite = suite_create("linear");
    TCase *tcase = tcase_create("linear");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, equals_sums_in_double);
    tcase_add_test(tcase, bits_do_not_depend_on_the_batch_or_threads);
    tcase_add_test(tcase, special_values_stay_in_their_row);
    tcase_add_test(tcase, shapes_are_checked);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
