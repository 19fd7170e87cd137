/* bench_model.c: speed of whole models on the CPU backend, against this machine's own ceilings.
 *
 *   bench_model [--json FILE] [--threads N]
 *
 * A Llama of 1.1 B parameters with random weights (no checkpoint needed), driven through model_forward:
 *   decode, batch 1:     bytes of weights read a token / time, against measured read bandwidth
 *   decode, 64 streams:  time a step; linear FLOPs / time
 *   prefill, 512 tokens: FLOPs / time, against the BF16 (vdpbf16ps) or F32 (FMA) peak
 * FLOPs = 2 * T * linear parameters + attention 4 * n_layers * H * D * sum over queries of keys seen.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "models/model.h"
#include "tests/bench/ceilings.h"

enum { BLOCK_SIZE = 64, MAX_SEQS = 64, MAX_TOKENS = 512, CONTEXT = 1024 };

static void die(const struct error *e)
{
    fprintf(stderr, "bench_model: %s\n", e->message);
    exit(1);
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench {
    struct kernels kernels; // the CPU's, with an alloc that keeps where the largest piece, the weights, is
    struct device *device;
    struct model *model;
    const struct model_info *info;
    struct kv_cache kv;
    struct batch batch;
};

// ---- a model with random weights, a cache, and a batch to fill ----

static struct { void *memory; size_t bytes; } largest;

static void *keep_largest(struct device *device, size_t bytes)
{
    void *memory = kernels_cpu()->alloc(device, bytes);
    if (bytes > largest.bytes) largest.memory = memory, largest.bytes = bytes;
    return memory;
}

// Makes a directory of dir's pattern that holds config.json alone, whose path goes to path.
static void write_config(const char *dtype, char *dir, char path[64])
{
    if (!mkdtemp(dir)) exit(1);
    snprintf(path, 64, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f) exit(1);
    fprintf(f,
            "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 2048,"
            "\"intermediate_size\": 5632, \"num_hidden_layers\": 22, \"num_attention_heads\": 32,"
            "\"num_key_value_heads\": 4, \"vocab_size\": 32000, \"max_position_embeddings\": 2048,"
            "\"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": false,"
            "\"bos_token_id\": 1, \"eos_token_id\": 2, \"torch_dtype\": \"%s\"}\n",
            dtype);
    fclose(f);
}

static void bench_open(struct bench *b, const char *dtype, int32_t n_threads)
{
    struct error e = {0};
    memset(b, 0, sizeof *b);
    largest.bytes = 0;
    char dir[] = "/tmp/gptd-bench-XXXXXX", config[64];
    write_config(dtype, dir, config);
    struct model_options mo = {.dir = dir, .load_format = LOAD_DUMMY,
                               .max_num_batched_tokens = MAX_TOKENS, .max_logits_rows = MAX_SEQS,
                               .seed = 1, .tp_size = 1};
    if (model_create(&b->model, &mo, &e)) die(&e);
    b->info = model_info_get(b->model);
    struct device_options options = {.n_threads = n_threads, .max_vocab_size = b->info->vocab_size,
                                     .max_context = b->info->max_model_len, .max_dim = b->info->max_dim,
                                     .max_tokens = MAX_TOKENS};
    b->kernels = *kernels_cpu();
    b->kernels.alloc = keep_largest;
    if (b->kernels.device_create(&b->device, &options, &e)) die(&e);
    if (model_load(b->model, &b->kernels, b->device, &e)) die(&e);

    unlink(config);
    rmdir(dir);

    const struct kv_spec *spec = &b->info->kv_groups[0];
    size_t n_blocks = MAX_SEQS * CONTEXT / BLOCK_SIZE;
    struct kv_layer *layers = calloc((size_t)spec->n_layers, sizeof *layers);
    for (int32_t i = 0; i < spec->n_layers; i++) {
        struct tensor t = {.dtype = spec->dtype, .n_dims = 4,
                           .shape = {n_blocks, (size_t)spec->n_kv_heads, BLOCK_SIZE, (size_t)spec->k_dim}};
        size_t bytes = n_blocks * (size_t)spec->n_kv_heads * BLOCK_SIZE * (size_t)spec->k_dim * dtype_size(t.dtype);
        layers[i].k = layers[i].v = t;
        layers[i].k.data = b->kernels.alloc(b->device, bytes);
        layers[i].v.data = b->kernels.alloc(b->device, bytes);
    }
    b->kv.layers[0] = layers;
    b->kv.n_blocks[0] = (int32_t)n_blocks;

    struct batch *batch = &b->batch;
    batch->block_size = BLOCK_SIZE;
    batch->max_blocks = CONTEXT / BLOCK_SIZE;
    batch->tokens = calloc(MAX_TOKENS, sizeof(int32_t));
    batch->positions = calloc(MAX_TOKENS, sizeof(int32_t));
    batch->history_rows = calloc(MAX_TOKENS, sizeof(int32_t));
    batch->adapter_ids = calloc(MAX_TOKENS, sizeof(int32_t));
    batch->slot_mapping[0] = calloc(MAX_TOKENS, sizeof(int32_t));
    batch->cu_seqlens_q = calloc(MAX_SEQS + 1, sizeof(int32_t));
    batch->context_lens = calloc(MAX_SEQS, sizeof(int32_t));
    batch->block_tables[0] = calloc((size_t)MAX_SEQS * (size_t)batch->max_blocks, sizeof(int32_t));
    batch->logits_rows = calloc(MAX_SEQS, sizeof(int32_t));
    batch->history = (struct history){.tokens = b->kernels.alloc(b->device, MAX_SEQS * CONTEXT * sizeof(int32_t)),
                                      .n_slots = MAX_SEQS, .max_len = CONTEXT};
}

static void bench_close(struct bench *b)
{
    for (int32_t i = 0; i < b->info->kv_groups[0].n_layers; i++) {
        b->kernels.free(b->device, b->kv.layers[0][i].k.data);
        b->kernels.free(b->device, b->kv.layers[0][i].v.data);
    }
    free(b->kv.layers[0]);
    b->kernels.free(b->device, b->batch.history.tokens);
    int32_t *arrays[] = {b->batch.tokens, b->batch.positions, b->batch.history_rows, b->batch.adapter_ids,
                         b->batch.slot_mapping[0], b->batch.cu_seqlens_q, b->batch.context_lens,
                         b->batch.block_tables[0], b->batch.logits_rows};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    model_destroy(b->model);
    b->kernels.device_destroy(b->device);
}

// n_seqs sequences, each with n_new tokens after `start` tokens of context; blocks interleaved over the sequences.
static void fill_batch(struct bench *b, int32_t n_seqs, int32_t start, int32_t n_new)
{
    struct batch *batch = &b->batch;
    batch->n_seqs = n_seqs;
    batch->n_tokens = n_seqs * n_new;
    batch->n_logits_rows = n_seqs;
    for (int32_t s = 0; s < n_seqs; s++) {
        int32_t *table = batch->block_tables[0] + s * batch->max_blocks;
        for (int32_t j = 0; j < batch->max_blocks; j++) table[j] = j * MAX_SEQS + s;
        for (int32_t i = 0; i < n_new; i++) {
            int32_t t = s * n_new + i, position = start + i;
            batch->tokens[t] = rand() % b->info->vocab_size;
            batch->positions[t] = position;
            batch->history_rows[t] = s;
            batch->adapter_ids[t] = -1;
            batch->slot_mapping[0][t] = table[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
        }
        batch->cu_seqlens_q[s] = s * n_new;
        batch->context_lens[s] = start + n_new;
        batch->logits_rows[s] = (s + 1) * n_new - 1;
    }
    batch->cu_seqlens_q[n_seqs] = batch->n_tokens;
}

// Median seconds of one forward, over n steps whose context grows by n_new when `grow`.
static double time_forward(struct bench *b, int32_t n_seqs, int32_t start, int32_t n_new, bool grow, int n)
{
    double times[64];
    struct error e = {0};
    for (int i = 0; i < n; i++) {
        fill_batch(b, n_seqs, start + (grow ? i * n_new : 0), n_new);
        struct tensor logits;
        double t = bench_now();
        if (model_forward(b->model, &b->batch, &b->kv, &logits, &e)) die(&e);
        times[i] = bench_now() - t;
    }
    qsort(times, (size_t)n, sizeof *times, compare_double);
    return times[n / 2];
}

// ---- the table ----

static double linear_parameters(const struct model_info *info) // all that a token is multiplied with
{
    return (double)info->n_parameters - (double)info->vocab_size * info->hidden_dim; // less the embedding (untied)
}

static double attention_flops(const struct model_info *info, double start, double n_new)
{
    double keys = n_new * start + n_new * (n_new + 1) / 2;
    return 4.0 * info->n_layers * info->n_heads * info->head_dim * keys;
}

static FILE *json;

static void row(const char *name, double seconds, double achieved, const char *unit, double ceiling, const char *of)
{
    printf("%-34s %9.2f ms %9.1f %-8s %5.1f %% of %s (%.1f)\n", name, seconds * 1e3, achieved, unit,
           100 * achieved / ceiling, of, ceiling);
    fflush(stdout);
    if (json)
        fprintf(json, "{\"name\": \"%s\", \"seconds\": %.6g, \"achieved\": %.6g, \"unit\": \"%s\", \"ceiling\": %.6g, "
                      "\"share\": %.4g}\n", name, seconds, achieved, unit, ceiling, achieved / ceiling);
}

// Decode and the bandwidth at which the same weights can be read at all, in turns. The rounds' median share.
static void bench_decode(struct bench *b, const char *name, double bytes, struct thread_pool *pool)
{
    enum { N_ROUNDS = 5 };
    struct { double share, seconds, bandwidth; } rounds[N_ROUNDS];
    for (int i = 0; i < N_ROUNDS; i++) {
        double before = ceilings_read(pool, largest.memory, largest.bytes);
        rounds[i].seconds = time_forward(b, 1, 128, 1, true, 15);
        double after = ceilings_read(pool, largest.memory, largest.bytes);
        rounds[i].bandwidth = before > after ? before : after;
        rounds[i].share = bytes / rounds[i].seconds / rounds[i].bandwidth;
    }
    qsort(rounds, N_ROUNDS, sizeof *rounds, compare_double);
    double seconds = rounds[N_ROUNDS / 2].seconds;
    row(name, seconds, bytes / seconds / 1e9, "GB/s", rounds[N_ROUNDS / 2].bandwidth / 1e9, "read bandwidth");
}

static void bench_dtype(const char *dtype, const struct ceilings *c, struct thread_pool *pool, int32_t n_threads)
{
    struct bench b;
    bench_open(&b, dtype, n_threads);
    const struct model_info *info = b.info;
    bool bf16 = info->dtype == DTYPE_BF16;
    double peak = (bf16 ? c->bf16_flops : c->fma_flops) / 1e9;
    const char *peak_name = bf16 ? "BF16 peak" : "FMA peak";
    double linear = linear_parameters(info);
    char name[64];

    time_forward(&b, 1, 0, 8, false, 2); // touch every weight once
    snprintf(name, sizeof name, "%s decode, batch 1", dtype);
    bench_decode(&b, name, linear * (double)dtype_size(info->dtype), pool);

    double t = time_forward(&b, 1, 0, 512, false, 5);
    snprintf(name, sizeof name, "%s prefill, 512 tokens", dtype);
    double head = (double)info->vocab_size * info->hidden_dim; // logits of one row only
    row(name, t, (2 * 512 * (linear - head) + 2 * head + attention_flops(info, 0, 512)) / t / 1e9, "GFLOP/s", peak,
        peak_name);

    t = time_forward(&b, 64, 128, 1, true, 5);
    snprintf(name, sizeof name, "%s decode, 64 streams", dtype);
    row(name, t, (2 * 64 * linear + 64 * attention_flops(info, 128, 1)) / t / 1e9, "GFLOP/s", peak, peak_name);
    bench_close(&b);
}

int main(int argc, char **argv)
{
    int32_t n_threads = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json")) json = fopen(argv[i + 1], "w");
        else if (!strcmp(argv[i], "--threads")) n_threads = atoi(argv[i + 1]);
    }
    struct ceilings c;
    struct error e = {0};
    struct thread_pool *pool;
    if (thread_pool_create(&pool, n_threads, &e) || ceilings_measure(&c, pool, &e)) die(&e);
    printf("ceilings: read %.1f GB/s, FMA %.0f GFLOP/s, BF16 %.0f GFLOP/s\n", c.read_bytes_per_s / 1e9,
           c.fma_flops / 1e9, c.bf16_flops / 1e9);
    bench_dtype("bfloat16", &c, pool, n_threads);
    bench_dtype("float32", &c, pool, n_threads);
    thread_pool_destroy(pool);
    if (json) fclose(json);
    return 0;
}
