/* pairs.h: for suites that hold the CUDA backend against the CPU's: both, and tensors of the same random numbers on both sides.
 *
 * The CPU backend computes in F32 on the same rounded inputs, so what separates the two is the rounding of the output and
 * the order of sums. Outputs are poisoned first. GPU suites do not fork. GPTD_TEST_SHORT: fewer rounds, smaller products.
 */
#ifndef GPTD_TESTS_GPU_PAIRS_H
#define GPTD_TESTS_GPU_PAIRS_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/kernels.h"

enum { MAX_TOKENS = 600, MAX_DIM = 4096, MAX_SEQS = 64, VOCAB = 1000, BLOCK = 64, CONTEXT = 1024, FEW_ELEMENTS = 64 };

static const struct kernels *gpu, *cpu;
static struct device *gpu_device, *cpu_device;
static struct error e;

static void check(int rc)
{
    ck_assert_msg(rc == 0, "%s", e.message);
}

static float random_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)rand() / (float)RAND_MAX - 0.5f;
    return sum * 1.7f;
}

static int32_t random_int(int32_t low, int32_t high)
{
    return low + rand() % (high - low + 1);
}

static int rounds(int n)
{
    return getenv("GPTD_TEST_SHORT") ? n / 6 : n;
}

// The same numbers on both sides: of `dtype` on the GPU, the same values in F32 on the CPU.
struct pair {
    struct tensor g, c;
};

static struct pair pair_of(enum dtype dtype, size_t rows, size_t cols)
{
    size_t n = rows * cols;
    struct pair p = {{NULL, dtype, 2, {rows, cols}}, {NULL, DTYPE_F32, 2, {rows, cols}}};
    float *values = malloc(n * sizeof *values);
    char *bits = malloc(n * dtype_size(dtype));
    for (size_t i = 0; i < n; i++) values[i] = random_normal();
    dtype_convert(bits, dtype, values, DTYPE_F32, n);
    p.g.data = gpu->alloc(gpu_device, n * dtype_size(dtype));
    check(gpu->copy_in(gpu_device, p.g.data, bits, n * dtype_size(dtype), &e));
    p.c.data = values;
    dtype_convert(values, DTYPE_F32, bits, dtype, n);
    free(bits);
    return p;
}

static void poison(struct pair *p)
{
    size_t n = p->g.shape[0] * p->g.shape[1], bytes = n * dtype_size(p->g.dtype);
    void *bits = malloc(bytes);
    memset(bits, 0xFF, bytes);
    check(gpu->copy_in(gpu_device, p->g.data, bits, bytes, &e));
    memset(p->c.data, 0xFF, n * sizeof(float));
    free(bits);
}

static void pair_free(struct pair *p)
{
    gpu->free(gpu_device, p->g.data);
    free(p->c.data);
}

// The bits of the first n elements of a tensor on the GPU.
static inline void *bits_of(const struct tensor *t, size_t n)
{
    void *bits = malloc(n * dtype_size(t->dtype));
    check(gpu->copy_out(gpu_device, bits, t->data, n * dtype_size(t->dtype), &e));
    return bits;
}

// ‖gpu − cpu‖ / ‖cpu‖ of both tensors.
static double distance(const struct pair *p)
{
    size_t n = p->g.shape[0] * p->g.shape[1], bytes = n * dtype_size(p->g.dtype);
    char *bits = malloc(bytes);
    float *values = malloc(n * sizeof *values);
    check(gpu->wait(gpu_device, gpu->record(gpu_device), &e));
    check(gpu->copy_out(gpu_device, bits, p->g.data, bytes, &e));
    dtype_convert(values, DTYPE_F32, bits, p->g.dtype, n);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double want = ((float *)p->c.data)[i];
        difference += (values[i] - want) * (values[i] - want);
        norm += want * want;
    }
    free(bits), free(values);
    // A few elements may all be next to nothing (an activation's, of the negative), and far from it in their own terms.
    if (n < FEW_ELEMENTS && norm < 0.25 * (double)n) norm = 0.25 * (double)n;
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

// One rounding costs about 0.85 units: 2^-7 / sqrt 12 at 1, half of that at 2, for BF16. That is the mean of many: of a few
// elements, one may have all the weight, and its rounding costs up to 2 units.
static void expect_close(const struct pair *p, double factor, const char *what)
{
    factor *= 1 + 1.5 / sqrt((double)(p->g.shape[0] * p->g.shape[1]));
    double unit = p->g.dtype == DTYPE_BF16 ? 0x1p-9 : p->g.dtype == DTYPE_F16 ? 0x1p-12 : 0x1p-18, d = distance(p);
    ck_assert_msg(d <= factor * unit, "%s, %s [%zu, %zu]: %.3g away, more than %.3g", what, dtype_name(p->g.dtype),
                  p->g.shape[0], p->g.shape[1], d, factor * unit);
}

static struct device_options device_options(void)
{
    return (struct device_options){.max_vocab_size = 128256, .max_context = CONTEXT, .max_dim = 3 * MAX_DIM,
                                   .max_tokens = MAX_TOKENS, .max_seqs = MAX_SEQS, .n_heads = 16, .n_kv_heads = 16,
                                   .head_dim = 256, .block_size = 16};
}

// Both backends' devices; a program that has none ends with status 1.
static void open_devices(void)
{
    unsigned seed = (unsigned)time(NULL);
    printf("seed %u\n", seed);
    srand(seed);
    struct device_options o = device_options();
    cpu = kernels_cpu();
    if (kernels_open(&gpu, "cuda", &e) || gpu->device_create(&gpu_device, &o, &e) || cpu->device_create(&cpu_device, &o, &e)) {
        fprintf(stderr, "%s\n", e.message);
        exit(1);
    }
    printf("%s\n", gpu->device_description(gpu_device));
}

// Runs the suite and lets the devices go. The program's exit status.
static int run_suite(Suite *suite)
{
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    gpu->device_destroy(gpu_device);
    cpu->device_destroy(cpu_device);
    return failed != 0;
}

#endif
