/* bench_cuda_layers.c: the products of a model's layers on the GPU with what is fused around them, and its attention, as a
 * decode step has them: layers of their own weights, keys and values in one graph. Microseconds and bytes of weights (or keys
 * and values) per second, for each kind alone and for all in turn, and what the host takes to launch those. Random weights and
 * activations.
 *
 *   bench_cuda_layers [8b | 1b] [T ...]        shapes of Llama-3-8B, or of Llama-3.2-1B; sequences
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/kernels.h"

enum { MAX_LAYERS = 32, HEADS = 32, KV = 8, BLOCK = 64, VOCAB = 128256, MAX_T = 256, CONTEXT = 512, WIDTH = CONTEXT / BLOCK,
       REPEATS = 20 };

static const struct shape { const char *name; int layers, hidden, inner, dim; } shapes[] = {{"8b", 32, 4096, 14336, 128},
                                                                                          {"1b", 16, 2048, 8192, 64}};
static struct shape shape;

static const struct kernels *gpu;
static struct device *d;
static struct error e;
static uint16_t table[DRAW_TABLE_SIZE];
static struct { struct weight qkv, out, in, down; struct tensor norm; struct kv_layer cache; } layer[MAX_LAYERS];
static struct weight head;
static struct tensor x, normed, qkv, attn, inner_out, act, cos_sin, logits;
static int32_t slots[MAX_T], starts[MAX_T + 1], lens[MAX_T], blocks[MAX_T * WIDTH];

static void check(int rc)
{
    if (rc == 0) return;
    fprintf(stderr, "%s\n", e.message);
    exit(1);
}

static struct tensor matrix(enum dtype dtype, size_t rows, size_t cols)
{
    static uint64_t key;
    struct tensor t = {gpu->alloc(d, rows * cols * dtype_size(dtype)), dtype, 2, {rows, cols}};
    if (!t.data) exit((fprintf(stderr, "out of memory\n"), 1));
    if (dtype == DTYPE_BF16) check(gpu->draw(d, &(struct draw_params){t.data, rows * cols, ++key, table}, &e));
    return t;
}

static struct weight weight(size_t rows, size_t cols)
{
    struct weight w = {.n_parts = 1, .n_cols = cols};
    w.part[0] = (struct weight_part){.data = matrix(DTYPE_BF16, rows, cols).data, .dtype = DTYPE_BF16, .n_rows = rows};
    return w;
}

static struct tensor rows_of(struct tensor t, size_t T)
{
    t.shape[0] = T;
    return t;
}

// What of a layer is in `kinds`: q qkv, a attention, o its out, u gate and up, d down; h: the head, once.
static void enqueue(const char *kinds, size_t T)
{
    for (int i = 0; i < shape.layers; i++) {
        struct norm_params n = {.out = rows_of(normed, T), .x = rows_of(x, T), .weight = layer[i].norm, .eps = 1e-5f};
        struct linear_params q = {rows_of(qkv, T), n.out, &layer[i].qkv, false};
        struct linear_params o = {rows_of(x, T), rows_of(attn, T), &layer[i].out, true};
        struct linear_params u = {rows_of(inner_out, T), n.out, &layer[i].in, false};
        struct linear_params w = {rows_of(x, T), rows_of(act, T), &layer[i].down, true};
        struct rope_kv_write_params r = {.qkv = q.out, .cos_sin = rows_of(cos_sin, T), .cache = layer[i].cache,
            .slot_mapping = slots, .n_heads = HEADS, .n_kv_heads = KV, .head_dim = shape.dim, .rope_dim = shape.dim};
        struct activation_params a = {rows_of(act, T), u.out, ACT_SILU, true};
        if (strchr(kinds, 'q')) check(gpu->norm_linear_rope(d, &n, &q, &r, &e));
        struct attention_params s = {.out = rows_of(attn, T), .qkv = q.out, .cache = layer[i].cache, .cu_seqlens_q = starts,
            .context_lens = lens, .block_table = blocks, .n_seqs = (int32_t)T, .max_blocks = WIDTH, .block_size = BLOCK,
            .n_heads = HEADS, .n_kv_heads = KV, .head_dim = shape.dim, .scale = 0.088f};
        if (strchr(kinds, 'a')) check(gpu->attention(d, &s, &e));
        if (strchr(kinds, 'o')) check(gpu->linear(d, &o, &e));
        if (strchr(kinds, 'u')) check(gpu->norm_linear_activation(d, &n, &u, &a, &e));
        if (strchr(kinds, 'd')) check(gpu->linear(d, &w, &e));
    }
    struct norm_params n = {.out = rows_of(normed, T), .x = rows_of(x, T), .weight = layer[0].norm, .eps = 1e-5f};
    struct linear_params h = {rows_of(logits, T), n.out, &head, false};
    if (strchr(kinds, 'h')) check(gpu->norm_linear(d, &n, &h, &e));
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double median(double times[REPEATS])
{
    for (int i = 1; i < REPEATS; i++)
        for (int j = i; j > 0 && times[j] < times[j - 1]; j--) {
            double t = times[j];
            times[j] = times[j - 1], times[j - 1] = t;
        }
    return times[REPEATS / 2];
}

// Seconds of one pass, the median of several; *launch: of its launch, on the host.
static double seconds(const char *kinds, int32_t T, double *launch)
{
    const size_t size = sizeof(int32_t), n = (size_t)T;
    const struct stage_array staged[] = {{slots, n * size, sizeof slots}, {starts, (n + 1) * size, sizeof starts},
                                         {lens, n * size, sizeof lens}};
    const struct stage_table table = {blocks, starts, lens, T, WIDTH, BLOCK, 0, NULL};
    double times[REPEATS], launches[REPEATS];
    for (int i = -2; i < REPEATS; i++) {
        bool replayed, launched;
        check(gpu->stage(d, staged, 3, &table, 1, &e));
        check(gpu->wait(d, gpu->record(d), &e));
        double begin = now();
        check(gpu->graph_begin(d, kinds, T, &replayed, &e));
        if (!replayed) enqueue(kinds, (size_t)T), check(gpu->graph_end(d, true, &launched, &e));
        if (i >= 0) launches[i] = now() - begin;
        check(gpu->wait(d, gpu->record(d), &e));
        if (i >= 0) times[i] = now() - begin;
    }
    *launch = median(launches);
    return median(times);
}

static void make_arrays(void)
{
    const size_t hidden = (size_t)shape.hidden, inner = (size_t)shape.inner, dim = (size_t)shape.dim,
                 n_qkv = (HEADS + 2 * KV) * dim;
    for (int i = 0; i < DRAW_TABLE_SIZE; i++) { // +-0.02, BF16
        float value = ((float)(i * 40503u % 65536) / 65536 - 0.5f) * 0.04f;
        dtype_convert(&table[i], DTYPE_BF16, &value, DTYPE_F32, 1);
    }
    for (int i = 0; i < shape.layers; i++) {
        layer[i].qkv = weight(n_qkv, hidden), layer[i].out = weight(hidden, hidden);
        layer[i].in = weight(2 * inner, hidden), layer[i].down = weight(hidden, inner);
        layer[i].norm = matrix(DTYPE_BF16, 1, hidden), layer[i].norm.n_dims = 1, layer[i].norm.shape[0] = hidden;
    }
    head = weight(VOCAB, hidden);
    x = matrix(DTYPE_BF16, MAX_T, hidden), normed = matrix(DTYPE_BF16, MAX_T, hidden);
    qkv = matrix(DTYPE_BF16, MAX_T, n_qkv), attn = matrix(DTYPE_BF16, MAX_T, hidden);
    inner_out = matrix(DTYPE_BF16, MAX_T, 2 * inner), act = matrix(DTYPE_BF16, MAX_T, inner);
    cos_sin = matrix(DTYPE_F32, MAX_T, dim), logits = matrix(DTYPE_F32, MAX_T, VOCAB);
    const size_t n_blocks = MAX_T * WIDTH;
    for (int i = 0; i < shape.layers; i++) {
        struct tensor kv = matrix(DTYPE_BF16, n_blocks * KV, BLOCK * dim);
        kv.n_dims = 4, kv.shape[0] = n_blocks, kv.shape[1] = KV, kv.shape[2] = BLOCK, kv.shape[3] = dim;
        layer[i].cache.k = layer[i].cache.v = kv;
        layer[i].cache.v.data = matrix(DTYPE_BF16, n_blocks * KV, BLOCK * dim).data;
    }
    for (int i = 0; i < MAX_T; i++) slots[i] = (i + 1) * WIDTH * BLOCK - 1, lens[i] = CONTEXT, starts[i + 1] = i + 1;
    for (int i = 0; i < MAX_T * WIDTH; i++) blocks[i] = i;
}

int main(int argc, char **argv)
{
    int first = 1;
    shape = shapes[0];
    for (size_t i = 0; argc > 1 && i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(argv[1], shapes[i].name)) shape = shapes[i], first = 2;
    struct device_options o = {.max_vocab_size = VOCAB, .max_context = 1024, .max_dim = 2 * shape.inner, .max_tokens = MAX_T,
                               .max_seqs = MAX_T, .n_heads = HEADS, .n_kv_heads = KV, .head_dim = shape.dim,
                               .block_size = BLOCK};
    if (kernels_open(&gpu, "cuda", &e) || gpu->device_create(&d, &o, &e)) check(1);
    printf("%s; %s\n", gpu->device_description(d), shape.name);
    make_arrays();
    const double hidden = shape.hidden, qkv_rows = (HEADS + 2 * KV) * shape.dim, inner = shape.inner, layers = shape.layers;
    const struct { const char *kinds, *name; double n_weights; } cases[] = {
        {"q", "norm, qkv, rope", qkv_rows * hidden * layers}, {"o", "out", hidden * hidden * layers},
        {"u", "norm, gate+up, act", 2 * inner * hidden * layers}, {"d", "down", hidden * inner * layers},
        {"h", "norm, head", VOCAB * hidden},
        {"a", "attention, 512", 2 * layers * KV * shape.dim * CONTEXT},
        {"qaoudh", "all", layers * hidden * (qkv_rows + hidden + 3 * inner) + VOCAB * hidden},
    };
    for (int i = first; i < argc || i == first; i++) {
        int32_t T = i < argc ? atoi(argv[i]) : 1;
        double launch;
        printf("T %3d:", T);
        for (size_t j = 0; j < sizeof cases / sizeof *cases; j++) {
            double t = seconds(cases[j].kinds, T, &launch);
            double bytes = 2 * cases[j].n_weights * (*cases[j].kinds == 'a' ? T : 1);
            printf("  %s %.0f us (%.0f GB/s)", cases[j].name, 1e6 * t, 1e-9 * bytes / t);
        }
        printf("  launched in %.0f us\n", 1e6 * launch);
    }
    gpu->device_destroy(d);
    return 0;
}
