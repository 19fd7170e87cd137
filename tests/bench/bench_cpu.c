/* bench_cpu: the CPU backend's linear op at the shapes of a Llama of 1.1 B, against the machine's ceilings measured in
 * the same run. Usage: bench_cpu [--json FILE] [--threads N]
 *
 * Weights: one array as large as the model's, of which each product takes the next slice, so that no cache serves it
 * twice; random normal numbers. A row's time is the median. Bytes: the weights once, x and out once; FLOPs: 2 T N K.
 * ceiling: the larger of bytes / read bandwidth and FLOPs / peak; the share is that time over the measured one.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/convert.h"
#include "kernels/kernels.h"
#include "tests/bench/ceilings.h"

enum { MAX_T = 512, MAX_REPEATS = 50, PATTERN = 1 << 20 };

struct shape {
    const char *name;
    size_t part_rows[MAX_WEIGHT_PARTS];
    size_t n_cols;
    int per_token; // times in one forward pass
};

static const struct shape shapes[] = {
    {"qkv", {2048, 256, 256}, 2048, 22},
    {"o", {2048}, 2048, 22},
    {"gate+up", {5632, 5632}, 2048, 22},
    {"down", {2048}, 5632, 22},
    {"lm_head", {32000}, 2048, 1},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct bench {
    const struct kernels *k;
    struct device *device;
    struct ceilings ceilings;
    char *weights;       // [model_elements] of the type under test
    size_t offset;       // element at which the next product's weights begin
    struct tensor x, out;
    FILE *json;          // NULL: none
    bool first_row;
};

static size_t shape_rows(const struct shape *s)
{
    size_t n = 0;
    for (int i = 0; i < MAX_WEIGHT_PARTS; i++) n += s->part_rows[i];
    return n;
}

static size_t model_elements(void)
{
    size_t n = 0;
    for (int i = 0; i < N_SHAPES; i++) n += shape_rows(&shapes[i]) * shapes[i].n_cols * (size_t)shapes[i].per_token;
    return n;
}

static float random_normal(void)
{
    double u = (rand() + 1.0) / (RAND_MAX + 1.0), v = rand() / (RAND_MAX + 1.0);
    return (float)(sqrt(-2 * log(u)) * cos(2 * M_PI * v));
}

static void fill_weights(struct bench *b, enum dtype dtype)
{
    size_t size = dtype_size(dtype), n = model_elements();
    for (size_t i = 0; i < PATTERN; i++) {
        float value = random_normal() * 0.02f;
        uint16_t half = dtype == DTYPE_F16 ? f32_to_f16(value) : f32_to_bf16(value);
        memcpy(b->weights + i * size, dtype == DTYPE_F32 ? (void *)&value : (void *)&half, size);
    }
    for (size_t i = PATTERN; i < n; i += PATTERN)
        memcpy(b->weights + i * size, b->weights, (n - i < PATTERN ? n - i : PATTERN) * size);
}

// One product on the next slice of the weights. Returns its seconds.
static double run_once(struct bench *b, const struct shape *s, enum dtype dtype, size_t n_tokens)
{
    size_t n = shape_rows(s) * s->n_cols, used = 0;
    if (b->offset + n > model_elements()) b->offset = 0;
    struct weight w = {.n_cols = s->n_cols};
    for (; w.n_parts < MAX_WEIGHT_PARTS && s->part_rows[w.n_parts]; w.n_parts++) {
        w.part[w.n_parts] = (struct weight_part){.data = b->weights + (b->offset + used) * dtype_size(dtype),
                                                 .dtype = dtype, .n_rows = s->part_rows[w.n_parts]};
        used += s->part_rows[w.n_parts] * s->n_cols;
    }
    b->offset += n;
    struct linear_params p = {.out = b->out, .x = b->x, .weight = &w};
    p.x.shape[0] = p.out.shape[0] = n_tokens;
    p.x.shape[1] = s->n_cols;
    p.out.shape[1] = shape_rows(s);
    struct error e;
    double start = bench_now();
    if (b->k->linear(b->device, &p, &e)) {
        fprintf(stderr, "%s\n", e.message);
        exit(1);
    }
    return bench_now() - start;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(struct bench *b, const char *name, enum dtype dtype, size_t n_tokens, double seconds, double bytes,
                   double flops)
{
    double peak = dtype == DTYPE_BF16 ? b->ceilings.bf16_flops : b->ceilings.fma_flops;
    double ceiling = fmax(bytes / b->ceilings.read_bytes_per_s, flops / peak);
    printf("%-5s %4zu  %-8s %10.1f %8.1f %8.1f %7.1f %%\n", dtype_name(dtype), n_tokens, name, seconds * 1e6,
           bytes / seconds * 1e-9, flops / seconds * 1e-9, 100 * ceiling / seconds);
    fflush(stdout);
    if (!b->json) return;
    fprintf(b->json, "%s\n    {\"dtype\": \"%s\", \"n_tokens\": %zu, \"product\": \"%s\", \"us\": %.2f, ",
            b->first_row ? "" : ",", dtype_name(dtype), n_tokens, name, seconds * 1e6);
    fprintf(b->json, "\"gb_per_s\": %.3f, \"gflops\": %.3f, \"share_of_ceiling\": %.4f}", bytes / seconds * 1e-9,
            flops / seconds * 1e-9, ceiling / seconds);
    b->first_row = false;
}

// Every shape, then their sum as one forward pass has them.
static void run_rows(struct bench *b, enum dtype dtype, size_t n_tokens)
{
    double all_seconds = 0, all_bytes = 0, all_flops = 0;
    for (int i = 0; i < N_SHAPES; i++) {
        const struct shape *s = &shapes[i];
        double times[MAX_REPEATS], n = (double)shape_rows(s), k = (double)s->n_cols, t = (double)n_tokens;
        int repeats = n_tokens == 1 ? (s->per_token == 1 ? 15 : MAX_REPEATS) : n_tokens <= 64 ? 15 : 5;
        for (int r = 0; r < repeats; r++) times[r] = run_once(b, s, dtype, n_tokens);
        qsort(times, (size_t)repeats, sizeof *times, compare);
        double seconds = times[repeats / 2], flops = 2 * t * n * k;
        double bytes = n * k * (double)dtype_size(dtype) + t * (n + k) * sizeof(float);
        report(b, s->name, dtype, n_tokens, seconds, bytes, flops);
        all_seconds += seconds * s->per_token, all_bytes += bytes * s->per_token, all_flops += flops * s->per_token;
    }
    report(b, "all", dtype, n_tokens, all_seconds, all_bytes, all_flops);
}

static void run_all(struct bench *b)
{
    static const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32};
    static const size_t n_tokens[] = {1, 64, 512};
    printf("%s\n", b->k->device_description(b->device));
    printf("ceilings: read %.1f GB/s, FMA %.0f GFLOP/s, BF16 %.0f GFLOP/s\n", b->ceilings.read_bytes_per_s * 1e-9,
           b->ceilings.fma_flops * 1e-9, b->ceilings.bf16_flops * 1e-9);
    printf("%-5s %4s  %-8s %10s %8s %8s %9s\n", "type", "T", "product", "us", "GB/s", "GFLOP/s", "ceiling");
    if (b->json) {
        fprintf(b->json, "{\"device\": \"%s\",\n", b->k->device_description(b->device));
        fprintf(b->json, "  \"read_gb_per_s\": %.3f, \"fma_gflops\": %.3f, \"bf16_gflops\": %.3f,\n  \"linear\": [",
                b->ceilings.read_bytes_per_s * 1e-9, b->ceilings.fma_flops * 1e-9, b->ceilings.bf16_flops * 1e-9);
    }
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        fill_weights(b, dtypes[d]);
        for (size_t t = 0; t < sizeof n_tokens / sizeof *n_tokens; t++) run_rows(b, dtypes[d], n_tokens[t]);
    }
    if (b->json) fprintf(b->json, "\n  ]}\n");
}

static int create(struct bench *b, int32_t n_threads, struct error *e)
{
    struct thread_pool *pool;
    int rc = thread_pool_create(&pool, n_threads, e);
    if (rc) return rc;
    rc = ceilings_measure(&b->ceilings, pool, e);
    thread_pool_destroy(pool);
    if (rc) return rc;
    struct device_options options = {.n_threads = n_threads, .max_vocab_size = 32000, .max_context = 2048,
                                     .max_dim = 2 * 5632, .max_tokens = MAX_T};
    rc = b->k->device_create(&b->device, &options, e);
    if (rc) return rc;
    b->weights = b->k->alloc(b->device, model_elements() * sizeof(float));
    b->x = (struct tensor){b->k->alloc(b->device, MAX_T * 5632 * sizeof(float)), DTYPE_F32, 2, {0}};
    b->out = (struct tensor){b->k->alloc(b->device, (size_t)MAX_T * 32000 * sizeof(float)), DTYPE_F32, 2, {0}};
    if (!b->weights || !b->x.data || !b->out.data) return error_set(e, ERR_NOMEM, "no memory for the model");
    for (size_t i = 0; i < MAX_T * 5632; i++) ((float *)b->x.data)[i] = random_normal();
    return 0;
}

int main(int argc, char **argv)
{
    struct bench b = {.k = kernels_cpu(), .first_row = true};
    int32_t n_threads = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json")) b.json = fopen(argv[i + 1], "w");
        if (!strcmp(argv[i], "--threads")) n_threads = atoi(argv[i + 1]);
    }
    struct error e;
    if (create(&b, n_threads, &e)) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    run_all(&b);
    b.k->free(b.device, b.weights);
    b.k->free(b.device, b.x.data);
    b.k->free(b.device, b.out.data);
    b.k->device_destroy(b.device);
    if (b.json) fclose(b.json);
    return 0;
}
