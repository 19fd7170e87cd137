/* kernel_helpers.h: what the suites of the CPU backend's ops share: seeds, random numbers, devices, tensors. */
#ifndef GPTD_TESTS_KERNEL_HELPERS_H
#define GPTD_TESTS_KERNEL_HELPERS_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/convert.h"
#include "kernels/kernels.h"

// For loops over elements: a passing ck_assert writes to a pipe every time.
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) ck_abort_msg("%s is false", #condition);                                                     \
    } while (0)
#define CHECK_MSG(condition, ...)                                                                                      \
    do {                                                                                                               \
        if (!(condition)) ck_abort_msg(__VA_ARGS__);                                                                   \
    } while (0)

// GPTD_TEST_SHORT: fewer rounds, for tools that slow a GPU down a hundredfold.
static inline bool is_short(void)
{
    return getenv("GPTD_TEST_SHORT") != NULL;
}

static uint64_t rng_state;

static inline void rng_seed(void) // SEED=n repeats a run
{
    const char *given = getenv("SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    rng_state = given ? strtoull(given, NULL, 10) : (uint64_t)now.tv_sec * 1000003 + (uint64_t)now.tv_nsec;
    printf("seed %llu\n", (unsigned long long)rng_state);
    fflush(stdout);
}

static inline uint64_t rng_next(void) // splitmix64
{
    uint64_t z = rng_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static inline int32_t rng_below(int32_t n)
{
    return (int32_t)(rng_next() >> 33) % n;
}

static inline double rng_uniform(void) // in (0, 1)
{
    return ((double)(rng_next() >> 12) + 0.5) * 0x1p-52;
}

static inline float rng_normal(void)
{
    return (float)(sqrt(-2 * log(rng_uniform())) * cos(2 * M_PI * rng_uniform()));
}

static inline float *rng_normals(size_t n, float scale)
{
    float *x = malloc(n * sizeof(*x));
    for (size_t i = 0; i < n; i++) x[i] = rng_normal() * scale;
    return x;
}

static const char *const isa_names[] = {"generic", "avx2", "avx512", "avx512bf16"};
enum { N_ISA_NAMES = 4 };

// NULL when the machine lacks the instruction set.
static inline struct device *device_open(const char *isa, int32_t n_threads, bool reference_attention)
{
    struct device_options options = {.n_threads = n_threads, .isa = isa, .reference_attention = reference_attention,
                                     .max_vocab_size = 150000, .max_context = 16384, .max_dim = 16384,
                                     .max_tokens = 8192};
    struct device *device = NULL;
    struct error e;
    int rc = kernels_cpu()->device_create(&device, &options, &e);
    ck_assert_msg(rc == 0 || rc == ERR_UNSUPPORTED, "%s", e.message);
    return device;
}

// One device per instruction set of this machine: for (d = device_first(); d; d = device_next(d)).
static inline struct device *device_next(struct device *device)
{
    static int32_t next;
    if (device)
        kernels_cpu()->device_destroy(device);
    else
        next = 0;
    for (device = NULL; !device && next < N_ISA_NAMES; next++) device = device_open(isa_names[next], 2, false);
    return device;
}

static inline struct device *device_first(void)
{
    return device_next(NULL);
}

static inline struct tensor matrix(void *data, enum dtype dtype, size_t rows, size_t cols)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 2, .shape = {rows, cols}};
}

static inline struct tensor vector(void *data, enum dtype dtype, size_t n)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 1, .shape = {n}};
}

// n random elements of any type.
static inline void *random_elements(enum dtype dtype, size_t n)
{
    void *data = malloc(n * 4);
    for (size_t i = 0; i < n; i++) {
        float x = rng_normal();
        if (dtype == DTYPE_F32) ((float *)data)[i] = x;
        if (dtype == DTYPE_F16) ((uint16_t *)data)[i] = f32_to_f16(x);
        if (dtype == DTYPE_BF16) ((uint16_t *)data)[i] = f32_to_bf16(x);
    }
    return data;
}

static inline float *poisoned(size_t n) // NaN everywhere
{
    float *x = malloc(n * sizeof(*x));
    memset(x, 0xff, n * sizeof(*x));
    return x;
}

static inline int suite_run(Suite *suite)
{
    rng_seed();
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK); // one sequence of random numbers
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
