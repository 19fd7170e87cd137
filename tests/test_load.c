/* test_load.c: a checkpoint's tensors are copied in whole, converted, transposed, in pieces and by several threads; what
 * cannot be read, held or copied is said. */
#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "models/load.h"
#include "models/parallel.h"

// One row, one column, one element; smaller than a piece of 2^20, a piece and one more, and several, with ragged ends.
static const size_t shapes[][2] = {{1, 1}, {7, 1}, {1, 300}, {33, 65}, {1, (1 << 20) + 1}, {1031, 1027}, {1025, 2051}};
enum { N = sizeof shapes / sizeof *shapes };

static unsigned seed;
static char dir[64], path[128];

// ---- a backend that fails on demand ---------------------------------------------------------------------------------

static struct kernels kernels;
static struct device *device;
static atomic_int copies_left; // until one fails; below 0: none does
static bool no_host_memory;
static int n_host;             // allocations of host memory held

static int copy_in(struct device *d, void *to, const void *from, size_t bytes, struct error *e)
{
    if (atomic_fetch_sub(&copies_left, 1) == 0) return error_set(e, ERR_DEVICE, "the bus is on fire");
    return kernels_cpu()->copy_in(d, to, from, bytes, e);
}

static void *alloc_host(struct device *d, size_t bytes)
{
    n_host += !no_host_memory;
    return no_host_memory ? NULL : kernels_cpu()->alloc_host(d, bytes);
}

static void free_host(struct device *d, void *memory)
{
    n_host--;
    kernels_cpu()->free_host(d, memory);
}

static void setup(void)
{
    struct device_options o = {.n_threads = 1, .max_vocab_size = 16, .max_context = 16, .max_dim = 16, .max_tokens = 1};
    struct error e;
    ck_assert_msg(kernels_cpu()->device_create(&device, &o, &e) == 0, "%s", e.message);
    kernels = *kernels_cpu();
    kernels.copy_in = copy_in, kernels.alloc_host = alloc_host, kernels.free_host = free_host;
    atomic_store(&copies_left, -1);
    no_host_memory = false, n_host = 0;
    strcpy(dir, "/tmp/gptd-load-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    srandom(seed);
}

static void teardown(void)
{
    ck_assert_int_eq(n_host, 0);
    kernels_cpu()->device_destroy(device);
    unlink(path);
    rmdir(dir);
}

// ---- a checkpoint and what it is loaded into ------------------------------------------------------------------------

struct rig {
    struct checkpoint checkpoint;
    struct load_item items[N];
};

static size_t count(int i) { return shapes[i][0] * shapes[i][1]; }

// Random bits of `dtype`, at an odd offset if the header is `padding` longer.
static void file_write(enum dtype dtype, int padding)
{
    char header[2048] = "{";
    size_t at = 0, size = dtype_size(dtype), n = 1;
    for (int i = 0; i < N; i++) {
        n += (size_t)sprintf(header + n, "%s\"t%d\":{\"dtype\":\"%s\",\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]}",
                             i ? "," : "", i, dtype_name(dtype), shapes[i][0], shapes[i][1], at, at + count(i) * size);
        at += count(i) * size;
    }
    n += (size_t)sprintf(header + n, "}%*s", padding, "");
    uint64_t n_header = n;
    uint32_t *bits = malloc(at + 4);
    for (size_t i = 0; i < at / 4 + 1; i++) bits[i] = (uint32_t)random() ^ (uint32_t)random() << 16;
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(&n_header, 1, 8, f) + fwrite(header, 1, n, f) + fwrite(bits, 1, at, f), 8 + n + at);
    fclose(f);
    free(bits);
}

static void rig_init(struct rig *r, enum dtype from, enum dtype to, bool transposed)
{
    struct error e = {0};
    char name[8];
    file_write(from, (int)(random() % 8));
    ck_assert_msg(checkpoint_open(&r->checkpoint, dir, &e) == 0, "%s", e.message);
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "t%d", i);
        struct safetensors_tensor *t = checkpoint_find(&r->checkpoint, name);
        r->items[i] = (struct load_item){t, 0, malloc(count(i) * dtype_size(to)), to, transposed, t->shape[transposed],
                                         t->shape[!transposed]};
        memset(r->items[i].to, 0xA5, count(i) * dtype_size(to));
    }
}

static void rig_deinit(struct rig *r)
{
    for (int i = 0; i < N; i++) free(r->items[i].to);
    checkpoint_read_end(&r->checkpoint);
    checkpoint_close(&r->checkpoint);
}

static void item_check(const struct load_item *item)
{
    size_t n = item->n_rows * item->n_cols, size = dtype_size((enum dtype)item->from->dtype);
    char *bits = malloc(n * size), *expected = malloc(n * 4);
    memcpy(bits, item->from->data, n * size);
    for (size_t r = 0; item->transposed && r < item->n_rows; r++)
        for (size_t c = 0; c < item->n_cols; c++)
            memcpy(bits + (r * item->n_cols + c) * size, (const char *)item->from->data + (c * item->n_rows + r) * size, size);
    if ((enum dtype)item->from->dtype == item->dtype) memcpy(expected, bits, n * size);
    else dtype_convert(expected, item->dtype, bits, (enum dtype)item->from->dtype, n);
    ck_assert_msg(memcmp(item->to, expected, n * dtype_size(item->dtype)) == 0, "%s: %s to %s%s", item->from->name,
                  item->from->type, dtype_name(item->dtype), item->transposed ? ", transposed" : "");
    free(bits), free(expected);
}

// ---- tests ----------------------------------------------------------------------------------------------------------

static const enum dtype conversions[][2] = {
    {DTYPE_F32, DTYPE_F32}, {DTYPE_F32, DTYPE_F16}, {DTYPE_F32, DTYPE_BF16}, {DTYPE_F16, DTYPE_F16},
    {DTYPE_F16, DTYPE_BF16}, {DTYPE_BF16, DTYPE_F16}, {DTYPE_BF16, DTYPE_BF16},
};
enum { N_CONVERSIONS = sizeof conversions / sizeof *conversions };

START_TEST(conversion)
{
    struct rig r;
    struct error e = {0};
    rig_init(&r, conversions[_i / 2][0], conversions[_i / 2][1], _i % 2);
    ck_assert_msg(load_run(r.items, N, &r.checkpoint, &kernels, device, &e) == 0, "%s", e.message);
    for (int i = 0; i < N; i++) item_check(&r.items[i]);
    rig_deinit(&r);
}
END_TEST

START_TEST(nothing_to_load)
{
    ck_assert_int_eq(load_run(NULL, 0, NULL, &kernels, device, NULL), 0);
}
END_TEST

// Not a signal: the map is not touched. The last tensor's end is gone.
START_TEST(file_cut_short)
{
    struct rig r;
    struct error e = {0};
    rig_init(&r, DTYPE_BF16, DTYPE_BF16, false);
    ck_assert_int_eq(truncate(path, (off_t)(r.checkpoint.files[0].map_size - 5000)), 0);
    ck_assert_int_eq(load_run(r.items, N, &r.checkpoint, &kernels, device, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, "t6: ") == e.message && strstr(e.message, path) && strstr(e.message, "cut short"), "%s",
                  e.message);
    rig_deinit(&r);
}
END_TEST

START_TEST(file_that_cannot_be_read)
{
    struct rig r;
    struct error e = {0};
    rig_init(&r, DTYPE_BF16, DTYPE_BF16, false);
    checkpoint_read_end(&r.checkpoint);
    ck_assert_int_eq(load_run(r.items, N, &r.checkpoint, &kernels, device, &e), ERR_IO);
    ck_assert_msg(strstr(e.message, path) && strstr(e.message, "cannot be read: Bad file descriptor"), "%s", e.message);
    rig_deinit(&r);
}
END_TEST

// Whichever copy it is that fails, no more than a piece a thread is loaded after it.
START_TEST(copy_that_fails)
{
    struct rig r;
    struct error e = {0};
    rig_init(&r, DTYPE_F32, DTYPE_F16, _i % 2);
    copies_left = _i;
    ck_assert_int_eq(load_run(r.items, N, &r.checkpoint, &kernels, device, &e), ERR_DEVICE);
    ck_assert_msg(e.message[0] == 't' && strstr(e.message, ": the bus is on fire"), "%s", e.message);
    ck_assert_int_ge(copies_left, -17);
    rig_deinit(&r);
}
END_TEST

START_TEST(no_memory_to_read_into)
{
    struct rig r;
    struct error e = {0};
    rig_init(&r, DTYPE_F32, DTYPE_F16, false);
    no_host_memory = true;
    ck_assert_int_eq(load_run(r.items, N, &r.checkpoint, &kernels, device, &e), ERR_NOMEM);
    ck_assert_msg(strstr(e.message, "to read weights into"), "%s", e.message);
    rig_deinit(&r);
}
END_TEST

static void *count_call(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
    return NULL;
}

START_TEST(parallel)
{
    for (size_t width = 1; width <= 16; width++) {
        atomic_int calls = 0;
        parallel_run(width, count_call, &calls);
        ck_assert_int_eq(calls, (int)width);
    }
    ck_assert_uint_eq(parallel_width(0), 1);
    ck_assert_uint_eq(parallel_width(1), 1);
    long n_cores = sysconf(_SC_NPROCESSORS_ONLN);
    ck_assert_uint_eq(parallel_width(1000), n_cores < 16 ? (size_t)n_cores : 16);
}
END_TEST

int main(void)
{
    seed = (unsigned)time(NULL);
    printf("seed %u\n", seed);
    fflush(stdout);
    Suite *suite = suite_create("load");
    TCase *tc = tcase_create("load");
    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, conversion, 0, 2 * N_CONVERSIONS);
    tcase_add_test(tc, nothing_to_load);
    tcase_add_test(tc, file_cut_short);
    tcase_add_test(tc, file_that_cannot_be_read);
    tcase_add_loop_test(tc, copy_that_fails, 0, 11);
    tcase_add_test(tc, no_memory_to_read_into);
    tcase_add_test(tc, parallel);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
