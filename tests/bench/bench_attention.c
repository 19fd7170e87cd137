/* bench_attention: the CPU backend's attention and sampling, against the machine's ceilings measured in the same run.
 * Usage: bench_attention [--threads N]
 *
 * FLOPs: 4 * head_dim per (query, q head, key seen). Bytes: every K and V element of the context once a call. Layers:
 * as many caches as fill 256 MB, in turn, so that no cache of the CPU serves one twice. Times are the best of several,
 * as the ceilings are: the larger of FLOPs / FMA peak and bytes / read bandwidth. `standard` is the time of the
 * reference attention over that of flash.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/convert.h"
#include "kernels/kernels.h"
#include "tests/bench/ceilings.h"

enum { BLOCK = 64, MAX_REPEATS = 51, VOCAB = 131072, MAX_CONTEXT = 8192, MAX_SEQS = 8, MAX_TOKENS = 2048 };

static const size_t CACHE_BYTES = (size_t)256 << 20;

struct shape {
    const char *name;
    int32_t n_heads, n_kv_heads, head_dim;
    enum dtype dtype;
};

struct run {
    const char *name;
    int32_t n_seqs, n_q, context;
};

static const struct shape shapes[] = {
    {"32/4 x 64 BF16", 32, 4, 64, DTYPE_BF16}, {"32/4 x 64 F32", 32, 4, 64, DTYPE_F32},
    {"32/8 x 128 BF16", 32, 8, 128, DTYPE_BF16}, {"12/12 x 64 BF16", 12, 12, 64, DTYPE_BF16},
    {"12/12 x 64 F32", 12, 12, 64, DTYPE_F32}, {"8/1 x 64 BF16", 8, 1, 64, DTYPE_BF16},
};

static const struct run runs[] = {
    {"prefill 512", 1, 512, 512}, {"prefill 2048", 1, 2048, 2048}, {"decode 1k", 1, 1, 1024},
    {"decode 8k", 1, 1, 8192},    {"decode 8 x 1k", 8, 1, 1024},
};

struct bench {
    const struct kernels *k;
    struct device *flash, *standard;
    struct ceilings ceilings;
    struct kv_layer cache;  // n_layers of them, one after another
    size_t n_layers, layer;
    float *qkv, *out;
    int32_t block_table[MAX_SEQS * MAX_CONTEXT / BLOCK];
};

static double best(const double *times, int n) // as the ceilings are: what others take of the machine is no part of it
{
    double least = times[0];
    for (int i = 1; i < n; i++) least = fmin(least, times[i]);
    return least;
}

static float random_uniform(void)
{
    return (float)rand() / (float)RAND_MAX * 2 - 1;
}

static void check(int rc, const struct error *e)
{
    if (!rc) return;
    fprintf(stderr, "%s\n", e->message);
    exit(1);
}

static double attention_once(struct bench *b, struct device *device, const struct shape *s, const struct run *r)
{
    int32_t cu_seqlens_q[MAX_SEQS + 1], context_lens[MAX_SEQS];
    for (int32_t i = 0; i <= r->n_seqs; i++) cu_seqlens_q[i] = i * r->n_q;
    for (int32_t i = 0; i < r->n_seqs; i++) context_lens[i] = r->context;
    size_t tokens = (size_t)(r->n_seqs * r->n_q), dim = (size_t)s->head_dim;
    struct attention_params p = {
        .out = {b->out, DTYPE_F32, 2, {tokens, (size_t)s->n_heads * dim}},
        .qkv = {b->qkv, DTYPE_F32, 2, {tokens, (size_t)(s->n_heads + 2 * s->n_kv_heads) * dim}},
        .cache = b->cache, .cu_seqlens_q = cu_seqlens_q, .context_lens = context_lens, .block_table = b->block_table,
        .n_seqs = r->n_seqs, .max_blocks = r->context / BLOCK, .block_size = BLOCK, .n_heads = s->n_heads,
        .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .scale = 1 / sqrtf((float)s->head_dim)};
    size_t layer = b->cache.k.shape[0] * b->cache.k.shape[1] * BLOCK * dim * dtype_size(s->dtype);
    p.cache.k.data = (char *)b->cache.k.data + b->layer * layer;
    p.cache.v.data = (char *)b->cache.v.data + b->layer * layer;
    b->layer = (b->layer + 1) % b->n_layers;
    struct error e;
    double start = bench_now();
    check(b->k->attention(device, &p, &e), &e);
    return bench_now() - start;
}

static void attention_row(struct bench *b, const struct shape *s, const struct run *r)
{
    double times[MAX_REPEATS], standard = NAN, keys = 0;
    int repeats = r->n_q > 1 ? 5 : MAX_REPEATS;
    b->cache.k.shape[0] = b->cache.v.shape[0] = (size_t)(r->n_seqs * r->context / BLOCK);
    size_t elements = b->cache.k.shape[0] * b->cache.k.shape[1] * BLOCK * (size_t)s->head_dim;
    b->n_layers = CACHE_BYTES / dtype_size(s->dtype) / 2 / elements, b->layer = 0;
    for (int i = 0; i < repeats; i++) times[i] = attention_once(b, b->flash, s, r);
    double seconds = best(times, repeats);
    if (r->n_q <= 512) standard = attention_once(b, b->standard, s, r) / seconds;
    for (int32_t i = 0; i < r->n_q; i++) keys += r->context - i;
    double flops = 4.0 * s->head_dim * s->n_heads * keys * r->n_seqs;
    double bytes = 2.0 * (double)elements * (double)dtype_size(s->dtype);
    double ceiling = fmax(flops / b->ceilings.fma_flops, bytes / b->ceilings.read_bytes_per_s);
    printf("%-16s %-14s %10.1f %8.2f %8.1f %7.1f %% %8.1f\n", s->name, r->name, seconds * 1e6, bytes / seconds * 1e-9,
           flops / seconds * 1e-9, 100 * ceiling / seconds, standard);
    fflush(stdout);
}

static void attention_rows(struct bench *b, const struct shape *s)
{
    size_t n = CACHE_BYTES / 2 / dtype_size(s->dtype), dim = (size_t)s->head_dim;
    struct tensor tiles = {NULL, s->dtype, 4, {0, (size_t)s->n_kv_heads, BLOCK, dim}};
    void *k = b->cache.k.data, *v = b->cache.v.data;
    b->cache.k = b->cache.v = tiles;
    b->cache.k.data = k, b->cache.v.data = v;
    for (size_t i = 0; i < n; i++) {
        float x = random_uniform();
        if (s->dtype == DTYPE_F32) ((float *)k)[i] = ((float *)v)[i] = x;
        else ((uint16_t *)k)[i] = ((uint16_t *)v)[i] = f32_to_bf16(x);
    }
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) attention_row(b, s, &runs[i]);
}

// ---- sampling -------------------------------------------------------------------------------------------------------

static void sample_row(struct bench *b, const char *name, const float *logits, struct sample_row row, int32_t n_rows)
{
    double times[MAX_REPEATS];
    static int32_t tokens[64];
    static struct sample_result results[MAX_SEQS];
    struct sample_row rows[MAX_SEQS];
    for (int32_t i = 0; i < n_rows; i++) rows[i] = row, rows[i].seed = (uint64_t)i;
    struct sample_params p = {.logits = {(void *)logits, DTYPE_F32, 2, {1, VOCAB}}, .history = {tokens, 1, 64},
                              .rows = rows, .n_rows = n_rows, .results = results};
    struct error e;
    for (int i = 0; i < MAX_REPEATS; i++) {
        double start = bench_now();
        check(b->k->sample(b->flash, &p, &e), &e);
        times[i] = bench_now() - start;
    }
    printf("sample %-24s %d rows of %d: %8.1f us\n", name, n_rows, VOCAB, best(times, MAX_REPEATS) * 1e6);
}

static void sample_rows(struct bench *b)
{
    float *logits = malloc(VOCAB * sizeof *logits);
    for (size_t i = 0; i < VOCAB; i++) logits[i] = 4 * (random_uniform() + random_uniform() + random_uniform());
    struct sample_row row = {.position = 8, .n_prompt = 4, .target = -1, .n_logprobs = -1, .top_p = 1,
                             .repetition_penalty = 1};
    sample_row(b, "greedy", logits, row, 1);
    row.n_logprobs = 5;
    sample_row(b, "greedy, 5 logprobs", logits, row, 1);
    row.n_logprobs = -1, row.temperature = 0.8f;
    sample_row(b, "temperature", logits, row, 1);
    row.top_k = 50;
    sample_row(b, "top_k 50", logits, row, 1);
    row.top_k = 0, row.top_p = 0.95f;
    sample_row(b, "top_p 0.95", logits, row, 1);
    row.top_k = 50, row.repetition_penalty = 1.1f;
    sample_row(b, "top_k, top_p, penalty", logits, row, 1);
    sample_row(b, "top_k, top_p, penalty", logits, row, MAX_SEQS);
    free(logits);
}

static void create(struct bench *b, int32_t n_threads)
{
    struct thread_pool *pool;
    struct error e;
    check(thread_pool_create(&pool, n_threads, &e), &e);
    check(ceilings_measure(&b->ceilings, pool, &e), &e);
    thread_pool_destroy(pool);
    struct device_options o = {.n_threads = n_threads, .max_vocab_size = VOCAB, .max_context = MAX_CONTEXT,
                               .max_dim = 8192, .max_tokens = MAX_TOKENS};
    check(b->k->device_create(&b->flash, &o, &e), &e);
    o.reference_attention = true;
    check(b->k->device_create(&b->standard, &o, &e), &e);
    b->cache.k.data = b->k->alloc(b->flash, CACHE_BYTES / 2);
    b->cache.v.data = b->k->alloc(b->flash, CACHE_BYTES / 2);
    b->qkv = b->k->alloc(b->flash, (size_t)MAX_TOKENS * 8192 * sizeof(float));
    b->out = b->k->alloc(b->flash, (size_t)MAX_TOKENS * 8192 * sizeof(float));
    if (!b->cache.k.data || !b->cache.v.data || !b->qkv || !b->out) check(error_set(&e, ERR_NOMEM, "no memory"), &e);
    for (size_t i = 0; i < (size_t)MAX_TOKENS * 8192; i++) b->qkv[i] = random_uniform();
    for (int32_t i = 0; i < MAX_SEQS * MAX_CONTEXT / BLOCK; i++) b->block_table[i] = i;
}

int main(int argc, char **argv)
{
    static struct bench b;
    b.k = kernels_cpu();
    int32_t n_threads = argc == 3 && !strcmp(argv[1], "--threads") ? atoi(argv[2]) : 0;
    create(&b, n_threads);
    printf("%s\nceilings: read %.1f GB/s, FMA %.0f GFLOP/s\n", b.k->device_description(b.flash),
           b.ceilings.read_bytes_per_s * 1e-9, b.ceilings.fma_flops * 1e-9);
    printf("%-16s %-14s %10s %8s %8s %9s %8s\n", "q/kv heads x dim", "run", "us", "GB/s", "GFLOP/s", "ceiling",
           "standard");
    sample_rows(&b);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) attention_rows(&b, &shapes[i]);
    b.k->free(b.flash, b.cache.k.data);
    b.k->free(b.flash, b.cache.v.data);
    b.k->free(b.flash, b.qkv);
    b.k->free(b.flash, b.out);
    b.k->device_destroy(b.flash);
    b.k->device_destroy(b.standard);
    return 0;
}
