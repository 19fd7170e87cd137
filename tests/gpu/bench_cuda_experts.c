/* bench_cuda_experts.c: a mixture of experts on the GPU, as a layer has it: the plan, gate and up, activation, down, the sum;
 * each alone and all in turn, in one graph. Random weights, activations and logits, other logits in each pass.
 *
 *   bench_cuda_experts [mixtral | qwen3] [T ...]        shapes of Mixtral-8x7B, or of Qwen3-30B-A3B; tokens
 *
 * Products print microseconds; the bytes of the weights of experts that have pairs, over time; FLOPs over time; and the time of a
 * dense product beside them. Up to 8 tokens that reads as many weights for one row (bound by reading, as the experts'), beyond it
 * does the same FLOPs on the weights of one expert (cuBLASLt).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/kernels.h"

enum { MAX_PASSES = 32, MAX_T = 8192, MAX_E = 128, REPEATS = 10, FEW = 8 };

static const struct shape { const char *name; int32_t E, K, hidden, inner; } shapes[] = {{"mixtral", 8, 2, 4096, 14336},
                                                                                     {"qwen3", 128, 8, 2048, 768}};
static struct shape shape;

static const struct kernels *gpu;
static struct device *d;
static struct error e;
static uint16_t table[DRAW_TABLE_SIZE];
static struct weight in[MAX_E], down[MAX_E];
static struct tensor x, inner, act, rows, out, logits[MAX_PASSES];
static struct expert_plan plans[MAX_PASSES];

static void check(int rc)
{
    if (rc == 0) return;
    fprintf(stderr, "%s\n", e.message);
    exit(1);
}

static void *device_memory(size_t bytes)
{
    void *memory = gpu->alloc(d, bytes);
    if (!memory) exit((fprintf(stderr, "out of memory\n"), 1));
    return memory;
}

static struct tensor matrix(size_t n_rows, size_t n_cols)
{
    static uint64_t key;
    struct tensor t = {device_memory(n_rows * n_cols * 2), DTYPE_BF16, 2, {n_rows, n_cols}};
    check(gpu->draw(d, &(struct draw_params){t.data, n_rows * n_cols, ++key, table}, &e));
    return t;
}

static struct tensor part_of(struct tensor t, size_t n_rows, size_t n_cols)
{
    t.shape[0] = n_rows, t.shape[1] = n_cols;
    return t;
}

static struct weight dense_weight(const struct weight *first, size_t n_rows)
{
    struct weight w = {.n_parts = 1, .n_cols = first->n_cols};
    w.part[0] = first->part[0];
    w.part[0].n_rows = n_rows;
    return w;
}

// A dense product in the place of an experts': `hit` of them are read for one row, or all pairs are rows of one expert's.
static void dense(const struct weight *experts, struct tensor from, struct tensor to, size_t N, size_t T, size_t hit, int32_t pass)
{
    const bool few = T <= FEW;
    const size_t P = few ? 1 : T * (size_t)shape.K, first = (size_t)pass * hit % ((size_t)shape.E - hit + 1);
    const struct weight w = dense_weight(&experts[few ? first : 0], few ? hit * N : N);
    const struct linear_params p = {part_of(to, P, few ? hit * N : N), part_of(from, P, w.n_cols), &w, false};
    check(gpu->linear(d, &p, &e));
}

// What of a pass is in `kinds`: r route, g gate and up, a activation, d down, c combine; G and D: dense for g and d.
static void enqueue(const char *kinds, size_t T, int32_t n_passes, size_t hit)
{
    const size_t P = T * (size_t)shape.K, n = (size_t)shape.inner, dim = (size_t)shape.hidden;
    for (int32_t i = 0; i < n_passes; i++) {
        const struct expert_plan *plan = &plans[i];
        const struct tensor x_rows = part_of(x, T, dim), in_rows = part_of(inner, P, 2 * n), act_rows = part_of(act, P, n);
        const struct tensor out_rows = part_of(rows, P, dim);
        const struct route_params r = {part_of(logits[i], T, (size_t)shape.E), *plan, true};
        const struct linear_experts_params g = {in_rows, x_rows, in, *plan, true}, w = {out_rows, act_rows, down, *plan, false};
        const struct activation_params a = {act_rows, in_rows, ACT_SILU, true};
        const struct combine_experts_params c = {part_of(out, T, dim), out_rows, *plan};
        if (strchr(kinds, 'r')) check(gpu->route(d, &r, &e));
        if (strchr(kinds, 'g')) check(gpu->linear_experts(d, &g, &e));
        if (strchr(kinds, 'a')) check(gpu->activation(d, &a, &e));
        if (strchr(kinds, 'd')) check(gpu->linear_experts(d, &w, &e));
        if (strchr(kinds, 'c')) check(gpu->combine_experts(d, &c, &e));
        if (strchr(kinds, 'G')) dense(in, act, inner, 2 * n, T, hit, i); // any numbers will do for x
        if (strchr(kinds, 'D')) dense(down, act, inner, dim, T, hit, i);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

// Seconds of a pass, the median of several runs of all.
static double seconds(const char *kinds, size_t T, int32_t n_passes, size_t hit)
{
    double times[REPEATS];
    for (int i = -2; i < REPEATS; i++) {
        bool replayed, launched;
        check(gpu->wait(d, gpu->record(d), &e));
        const double begin = now();
        check(gpu->graph_begin(d, kinds, (int32_t)T, &replayed, &e));
        if (!replayed) enqueue(kinds, T, n_passes, hit), check(gpu->graph_end(d, true, &launched, &e));
        check(gpu->wait(d, gpu->record(d), &e));
        if (i >= 0) times[i] = (now() - begin) / n_passes;
    }
    qsort(times, REPEATS, sizeof *times, compare);
    return times[REPEATS / 2];
}

static void make_arrays(size_t most)
{
    const size_t dim = (size_t)shape.hidden, n = (size_t)shape.inner, P = most * (size_t)shape.K, E = (size_t)shape.E;
    for (int i = 0; i < DRAW_TABLE_SIZE; i++) { // +-0.02, BF16
        float value = ((float)(i * 40503u % 65536) / 65536 - 0.5f) * 0.04f;
        dtype_convert(&table[i], DTYPE_BF16, &value, DTYPE_F32, 1);
    }
    const struct tensor all_in = matrix(E * 2 * n, dim), all_down = matrix(E * dim, n);
    for (size_t i = 0; i < E; i++) {
        in[i] = (struct weight){.n_parts = 2, .n_cols = dim}, down[i] = (struct weight){.n_parts = 1, .n_cols = n};
        for (size_t j = 0; j < 2; j++)
            in[i].part[j] = (struct weight_part){.data = (char *)all_in.data + (2 * i + j) * n * dim * 2, .dtype = DTYPE_BF16,
                                                 .n_rows = n};
        down[i].part[0] = (struct weight_part){.data = (char *)all_down.data + i * dim * n * 2, .dtype = DTYPE_BF16, .n_rows = dim};
    }
    x = matrix(most, dim), rows = matrix(P, dim), out = matrix(most, dim);
    act = matrix(P, n > dim ? n : dim), inner = matrix(P, 2 * n > dim ? 2 * n : dim); // as wide as the dense products have them
    float *host = malloc(most * E * sizeof *host);
    for (int i = 0; i < MAX_PASSES; i++) {
        for (size_t j = 0; j < most * E; j++) host[j] = (float)rand() / (float)RAND_MAX;
        logits[i] = (struct tensor){device_memory(most * E * sizeof *host), DTYPE_F32, 2, {most, E}};
        check(gpu->copy_in(d, logits[i].data, host, most * E * sizeof *host, &e));
        plans[i] = (struct expert_plan){device_memory(P * 4), device_memory(P * 4), device_memory(P * 4), device_memory(E * 4 + 4),
                                        shape.E, shape.K};
    }
    free(host);
}

// Experts of a pass that have pairs, in the mean of all passes.
static double experts_hit(int32_t n_passes)
{
    int32_t offsets[MAX_E + 1], n = 0;
    for (int32_t i = 0; i < n_passes; i++) {
        check(gpu->copy_out(d, offsets, plans[i].offsets, ((size_t)shape.E + 1) * sizeof *offsets, &e));
        for (int32_t j = 0; j < shape.E; j++) n += offsets[j + 1] > offsets[j];
    }
    return (double)n / n_passes;
}

static void print_product(const char *name, const char *kind, const char *baseline, size_t T, int32_t n_passes, double hit,
                          double n_weights)
{
    const double t = seconds(kind, T, n_passes, 1), other = seconds(baseline, T, n_passes, (size_t)(hit + 0.5));
    const double flops = 2 * (double)T * shape.K * n_weights, bytes = 2 * hit * n_weights;
    printf("  %-8s %9.1f us  %5.2f TB/s of weights  %6.1f TFLOP/s  dense %9.1f us: %.2f\n", name, 1e6 * t, 1e-12 * bytes / t,
           1e-12 * flops / t, 1e6 * other, other / t);
}

static void bench(size_t T)
{
    static const char route[] = "r", in_kind[] = "g", activation[] = "a", down_kind[] = "d", combine[] = "c", all[] = "rgadc",
                      dense_in[] = "G", dense_down[] = "D";
    const int32_t n_passes = T <= 64 ? MAX_PASSES : T <= 1024 ? 4 : 1;
    const double n_weights = (double)shape.hidden * shape.inner, plan = seconds(route, T, n_passes, 1), hit = experts_hit(n_passes);
    printf("T %zu: %.1f of %d experts\n", T, hit, shape.E);
    printf("  %-8s %9.1f us\n", "route", 1e6 * plan);
    print_product("gate+up", in_kind, dense_in, T, n_passes, hit, 2 * n_weights);
    printf("  %-8s %9.1f us\n", "act", 1e6 * seconds(activation, T, n_passes, 1));
    print_product("down", down_kind, dense_down, T, n_passes, hit, n_weights);
    printf("  %-8s %9.1f us\n", "combine", 1e6 * seconds(combine, T, n_passes, 1));
    printf("  %-8s %9.1f us\n", "all", 1e6 * seconds(all, T, n_passes, 1));
}

int main(int argc, char **argv)
{
    static const size_t usual[] = {1, 2, 8, 64, 1024, 8192};
    int first = 1;
    shape = shapes[0];
    for (size_t i = 0; argc > 1 && i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(argv[1], shapes[i].name)) shape = shapes[i], first = 2;
    struct device_options o = {.max_vocab_size = 32000, .max_context = 1024, .max_dim = 2 * shape.inner, .max_tokens = MAX_T,
                               .max_seqs = 8, .n_heads = 32, .n_kv_heads = 8, .head_dim = 128, .block_size = 64};
    if (kernels_open(&gpu, "cuda", &e) || gpu->device_create(&d, &o, &e)) check(1);
    printf("%s; %s\n", gpu->device_description(d), shape.name);
    make_arrays(MAX_T);
    for (int i = first; i < argc; i++) {
        const int T = atoi(argv[i]);
        if (T < 1 || T > MAX_T) exit((fprintf(stderr, "%s tokens: 1 to %d\n", argv[i], MAX_T), 1));
        bench((size_t)T);
    }
    for (size_t i = 0; first == argc && i < sizeof usual / sizeof *usual; i++) bench(usual[i]);
    gpu->device_destroy(d);
    return 0;
}
