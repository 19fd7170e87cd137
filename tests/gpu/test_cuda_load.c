/* test_cuda_load.c: what fills the GPU's memory: copies from many threads at once, from pinned memory and from any other,
 * and dummy weights drawn on the device against those drawn on the host. GPU suites do not fork.
 */
#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "models/dummy.h"

enum { N_THREADS = 8, N_SIZES = 9, MARGIN = 64 };

static const size_t sizes[N_SIZES] = {1, 2, 3, 255, 4097, (1 << 20) - 1, (2 << 20) + 5, (9 << 20) + 17, (40 << 20) - 3};

static const struct kernels *gpu;
static struct device *device;
static struct error e;
static unsigned seed;
static atomic_int n_wrong;

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void fill(unsigned char *to, size_t n, uint64_t x)
{
    for (size_t i = 0; i < n; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        to[i] = (unsigned char)(x >> 56);
    }
}

// One thread copies every size from and to odd addresses and reads it back, the bytes around it too. The source is changed
// as soon as copy_in returns.
static void *copy_and_read(void *arg)
{
    size_t number = (size_t)arg, largest = sizes[N_SIZES - 1] + 2 * MARGIN;
    struct error own;
    bool pinned = number % 2;
    unsigned char *from = pinned ? gpu->alloc_host(device, largest) : malloc(largest);
    unsigned char *expected = malloc(largest), *got = malloc(largest);
    char *to = gpu->alloc(device, largest);
    if (!from || !to) atomic_fetch_add(&n_wrong, 1);
    for (size_t i = 0; from && to && i < N_SIZES; i++) {
        size_t n = sizes[(i + number) % N_SIZES], at = (number * 7 + i * 3) % MARGIN, whole = n + 2 * MARGIN;
        memset(expected, 0xC3, whole);
        int rc = gpu->copy_in(device, to, expected, whole, &own);
        fill(expected + at, n, seed + number * 100 + i);
        memcpy(from + at / 2, expected + at, n);
        rc = rc ? rc : gpu->copy_in(device, to + at, from + at / 2, n, &own);
        memset(from + at / 2, 0, n);
        rc = rc ? rc : gpu->copy_out(device, got, to, whole, &own);
        if (rc || memcmp(got, expected, whole)) atomic_fetch_add(&n_wrong, 1);
    }
    gpu->free(device, to);
    if (pinned) gpu->free_host(device, from);
    else free(from);
    free(expected), free(got);
    return NULL;
}

START_TEST(copies_from_many_threads)
{
    pthread_t threads[N_THREADS];
    for (size_t i = 0; i < N_THREADS; i++) ck_assert_int_eq(pthread_create(&threads[i], NULL, copy_and_read, (void *)i), 0);
    for (size_t i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
    ck_assert_int_eq(n_wrong, 0);
}
END_TEST

// The host's path is taken when the table has no `draw`; it stores through the same copy_in.
START_TEST(drawn_as_on_the_host)
{
    static const size_t counts[] = {1, 3, 7, 8, 9, 1000, 65537, (3 << 20) + 5, 128256 * 512 + 4};
    struct kernels host = *gpu;
    host.draw = NULL;
    struct dummy *dummy = dummy_create(_i ? DTYPE_F16 : DTYPE_BF16, seed);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        size_t n = counts[i], bytes = 2 * n + MARGIN;
        char *to = gpu->alloc(device, bytes), *drawn = malloc(bytes), *expected = malloc(bytes);
        memset(drawn, 0xFF, bytes);
        ck_assert_int_eq(gpu->copy_in(device, to, drawn, bytes, &e), 0);
        ck_assert_msg(dummy_fill_normal(dummy, i, gpu, device, to, n, &e) == 0, "%s", e.message);
        ck_assert_msg(gpu->copy_out(device, drawn, to, bytes, &e) == 0, "%s", e.message);
        memset(expected, 0xFF, bytes);
        ck_assert_int_eq(gpu->copy_in(device, to, expected, bytes, &e), 0);
        ck_assert_int_eq(dummy_fill_normal(dummy, i, &host, device, to, n, &e), 0);
        ck_assert_int_eq(gpu->copy_out(device, expected, to, bytes, &e), 0);
        ck_assert_msg(memcmp(drawn, expected, bytes) == 0, "%zu elements", n);
        gpu->free(device, to);
        free(drawn), free(expected);
    }
    dummy_destroy(dummy);
}
END_TEST

START_TEST(draw_to_an_odd_address)
{
    static uint16_t table[DRAW_TABLE_SIZE];
    char *to = gpu->alloc(device, 64);
    ck_assert_int_eq(gpu->draw(device, &(struct draw_params){to + 2, 8, 1, table}, &e), ERR_INVALID);
    ck_assert_msg(strstr(e.message, "not aligned"), "%s", e.message);
    ck_assert_int_eq(gpu->draw(device, &(struct draw_params){to, 0, 1, table}, &e), 0);
    gpu->free(device, to);
}
END_TEST

// ---- how fast -------------------------------------------------------------------------------------------------------

enum { PIECE = 2 << 20, N_COPIES = 400 };

static char *target;

static void *copy_pinned(void *arg)
{
    for (int i = 0; i < N_COPIES; i++)
        if (gpu->copy_in(device, target, arg, PIECE, NULL)) atomic_fetch_add(&n_wrong, 1);
    return NULL;
}

START_TEST(speed)
{
    pthread_t threads[N_THREADS];
    size_t n = (size_t)2 << 30; // elements
    target = gpu->alloc(device, 2 * n);
    char *pinned = gpu->alloc_host(device, (size_t)N_THREADS * PIECE);
    ck_assert(target && pinned);
    double begin = seconds();
    for (size_t i = 0; i < N_THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, copy_pinned, pinned + i * PIECE), 0);
    for (size_t i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
    printf("copy_in, pinned, %d threads: %.1f GB/s\n", N_THREADS,
           1e-9 * N_THREADS * N_COPIES * PIECE / (seconds() - begin));
    ck_assert_int_eq(n_wrong, 0);
    struct dummy *dummy = dummy_create(DTYPE_BF16, seed);
    for (int i = 0; i < 2; i++) {
        begin = seconds();
        ck_assert_int_eq(dummy_fill_normal(dummy, 0, gpu, device, target, n, &e), 0);
        ck_assert_int_eq(gpu->wait(device, gpu->record(device), &e), 0);
    }
    printf("draw: %.0f GB/s\n", 2e-9 * (double)n / (seconds() - begin));
    dummy_destroy(dummy);
    gpu->free(device, target);
    gpu->free_host(device, pinned);
}
END_TEST

int main(void)
{
    seed = (unsigned)time(NULL);
    printf("seed %u\n", seed);
    struct device_options o = {.max_vocab_size = 1000, .max_context = 1024, .max_dim = 1024, .max_tokens = 64, .max_seqs = 4,
                               .n_heads = 4, .n_kv_heads = 4, .head_dim = 64, .block_size = 16};
    if (kernels_open(&gpu, "cuda", &e) || gpu->device_create(&device, &o, &e)) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    Suite *suite = suite_create("cuda_load");
    TCase *tc = tcase_create("cuda_load");
    tcase_set_timeout(tc, 0);
    tcase_add_test(tc, copies_from_many_threads);
    tcase_add_loop_test(tc, drawn_as_on_the_host, 0, 2);
    tcase_add_test(tc, draw_to_an_odd_address);
    tcase_add_test(tc, speed);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    gpu->device_destroy(device);
    return failed != 0;
}
