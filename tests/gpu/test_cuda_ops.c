/* test_cuda_ops.c: the CUDA backend's ops against the CPU's, on fresh random data in both 16-bit types.
 *
 *   test_cuda_ops [errors.txt]        with PyTorch's errors in the same type (op_errors.py): at most 1.25 times those
 */
#include <stdarg.h>

#include "tests/gpu/pairs.h"

enum { MAX_ERRORS = 128, MANY = 4096 }; // elements whose mean error is no chance

// PyTorch's, with ours beside it: the worst.
static struct pytorch_error { char dtype[8], name[64]; double error, ours; } errors[MAX_ERRORS];
static int n_errors;

static void read_errors(const char *path)
{
    FILE *f = fopen(path, "r");
    struct pytorch_error *p = errors;
    while (f && p < errors + MAX_ERRORS && fscanf(f, "%7s %lf %63[^\n]", p->dtype, &p->error, p->name) == 3) p++;
    if (f) fclose(f);
    n_errors = (int)(p - errors);
    if (n_errors > 0) return;
    fprintf(stderr, "%s: no errors in it\n", path);
    exit(1);
}

// What was computed in `dtype` is as good as what PyTorch makes of the op of this name, if there is enough of it.
__attribute__((format(printf, 3, 4)))
static void expect_pytorch(const struct pair *p, enum dtype dtype, const char *format, ...)
{
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    if (n_errors == 0 || p->g.shape[0] * p->g.shape[1] < MANY) return;
    for (struct pytorch_error *x = errors; x < errors + n_errors; x++) {
        if (strcmp(x->name, name) || strcmp(x->dtype, dtype_name(dtype))) continue;
        double d = distance(p);
        if (d > x->ours) x->ours = d;
        ck_assert_msg(d <= 1.25 * x->error, "%s, %s [%zu, %zu]: %.3g away, PyTorch %.3g", name, x->dtype, p->g.shape[0],
                      p->g.shape[1], d, x->error);
        return;
    }
    ck_abort_msg("%s, %s: PyTorch's error is not known", name, dtype_name(dtype));
}

static void print_errors(void)
{
    for (struct pytorch_error *x = errors; x < errors + n_errors; x++)
        if (x->ours > 0) printf("%-4s %-32s %.3g, PyTorch %.3g: %.2f\n", x->dtype, x->name, x->ours, x->error, x->ours / x->error);
}

static const char *const norm_names[] = {[NORM_RMS] = "rms", [NORM_LAYER] = "layer"};
static const char *const activation_names[] = {[ACT_GELU_ERF] = "gelu", [ACT_GELU_TANH] = "gelu_tanh", [ACT_SILU] = "silu",
                                               [ACT_RELU] = "relu"};

static enum dtype type_of(int i)
{
    return i % 2 ? DTYPE_F16 : DTYPE_BF16;
}

// Rows first .. of p, and of its bits.
static struct pair rows_of(const struct pair *p, size_t first, size_t n)
{
    struct pair rows = *p;
    rows.g.data = (char *)p->g.data + first * p->g.shape[1] * dtype_size(p->g.dtype);
    rows.c.data = (float *)p->c.data + first * p->c.shape[1];
    rows.g.shape[0] = rows.c.shape[0] = n;
    return rows;
}

// Parts with and without rows between them: those that meet, with their biases, are one product. Biases of either type.
// The first n_counts numbers of tokens; on `device`, which pairs' device waits for.
static void expect_linear(struct device *device, size_t n_counts)
{
    static const size_t tokens[] = {1, 2, 3, 4, 5, 8, 17, 64, 300, 600};
    static const size_t dims[] = {8, 40, 64, 192, 264, 1000, 2048, 4096};
    const int32_t largest = rounds(6) == 6 ? 7 : 5; // of dims
    for (int round = 0; round < rounds(60); round++) {
        enum dtype dtype = type_of(round / (int)n_counts);
        size_t T = tokens[(size_t)round % n_counts], K = dims[random_int(0, largest)], n = 0, n_rows[3];
        size_t gap = random_int(0, 1) ? 8 : 0;
        struct weight gw = {.n_cols = K}, cw = {.n_cols = K};
        gw.n_parts = cw.n_parts = random_int(1, 3);
        bool bias = random_int(0, 2) > 0, accumulate = random_int(0, 1), wide = !accumulate && random_int(0, 1);
        for (int i = 0; i < gw.n_parts; i++) n += n_rows[i] = dims[random_int(0, largest - 1)];
        struct pair all = pair_of(dtype, n + 3 * gap, K), biases = pair_of(random_int(0, 1) ? dtype : DTYPE_F32, n + 3 * gap, 1);
        for (size_t i = 0, at = 0; i < (size_t)gw.n_parts; at += n_rows[i++] + gap) {
            struct pair part = rows_of(&all, at, n_rows[i]), b = rows_of(&biases, at, n_rows[i]);
            gw.part[i] = (struct weight_part){.data = part.g.data, .dtype = dtype, .n_rows = n_rows[i]};
            cw.part[i] = (struct weight_part){.data = part.c.data, .dtype = DTYPE_F32, .n_rows = n_rows[i]};
            b.g.n_dims = b.c.n_dims = 1;
            if (bias) gw.part[i].bias = b.g, cw.part[i].bias = b.c;
        }
        struct pair x = pair_of(dtype, T, K), out = pair_of(wide ? DTYPE_F32 : dtype, T, n);
        if (!accumulate) poison(&out);
        struct linear_params g = {out.g, x.g, &gw, accumulate}, c = {out.c, x.c, &cw, accumulate};
        check(gpu->linear(device, &g, &e));
        check(gpu->wait(device, gpu->record(device), &e));
        check(cpu->linear(cpu_device, &c, &e));
        char what[64];
        snprintf(what, sizeof what, "linear, K %zu%s%s", K, bias ? ", bias" : "", accumulate ? ", added" : "");
        expect_close(&out, wide ? 8 : bias || accumulate ? 1.6 : 1.1, what); // two roundings, or one
        if (!bias || biases.g.dtype == dtype)
            expect_pytorch(&out, dtype, "linear%s%s", bias ? ", bias" : "", accumulate ? ", added" : "");
        pair_free(&x), pair_free(&out), pair_free(&all), pair_free(&biases);
    }
}

START_TEST(linear) { expect_linear(gpu_device, 10); }
END_TEST

// Up to 8 rows deterministic products are no one else's.
START_TEST(linear_deterministic_few)
{
    struct device_options o = device_options();
    struct device *device;
    o.deterministic = true;
    check(gpu->device_create(&device, &o, &e));
    expect_linear(device, 6);
    gpu->device_destroy(device);
}
END_TEST

START_TEST(norm)
{
    static const size_t dims[] = {1, 7, 64, 192, 1000, 4096, 12288};
    for (int round = 0; round < 24; round++) {
        enum dtype dtype = type_of(round);
        size_t T = (size_t)random_int(1, 70), dim = dims[round % 7];
        struct pair x = pair_of(dtype, T, dim), out = pair_of(dtype, T, dim);
        struct pair w = pair_of(round % 3 ? dtype : DTYPE_F32, 1, dim), b = pair_of(DTYPE_F32, 1, dim);
        w.g.shape[0] = w.c.shape[0] = b.g.shape[0] = b.c.shape[0] = dim;
        w.g.n_dims = w.c.n_dims = b.g.n_dims = b.c.n_dims = 1;
        const bool added = round % 2;
        if (!added) poison(&out);
        struct norm_params g = {.out = out.g, .x = x.g, .weight = w.g, .kind = round % 4 < 2 ? NORM_RMS : NORM_LAYER,
                                .eps = 1e-5f, .weight_offset = (float)random_int(0, 2) / 2, .accumulate = added}, c = g;
        c.out = out.c, c.x = x.c, c.weight = w.c;
        if (g.kind == NORM_LAYER) g.bias = b.g, c.bias = b.c;
        if (dim == 1 && g.kind == NORM_LAYER) continue; // all rounding
        check(gpu->norm(gpu_device, &g, &e));
        check(cpu->norm(cpu_device, &c, &e));
        expect_close(&out, dim == 1 ? 2 : 1.5, "norm"); // of one value, no average
        expect_close(&x, 1, "norm's x");
        expect_pytorch(&out, dtype, "norm %s%s", norm_names[g.kind], added ? ", added" : "");
        pair_free(&x), pair_free(&out), pair_free(&w), pair_free(&b);
    }
}
END_TEST

START_TEST(activation)
{
    for (int round = 0; round < 32; round++) {
        enum dtype dtype = type_of(round);
        bool gated = round % 4 < 2;
        size_t T = (size_t)random_int(1, 50), m = (size_t)random_int(1, 3) * (size_t)random_int(1, 700);
        struct pair x = pair_of(dtype, T, gated ? 2 * m : m), out = pair_of(dtype, T, m);
        poison(&out);
        struct activation_params g = {out.g, x.g, (enum activation)(round / 4 % 4), gated}, c = {out.c, x.c, g.kind, gated};
        check(gpu->activation(gpu_device, &g, &e));
        check(cpu->activation(cpu_device, &c, &e));
        expect_close(&out, 1.2, "activation");
        expect_pytorch(&out, dtype, "%s%s", activation_names[g.kind], gated ? ", gated" : "");
        pair_free(&x), pair_free(&out);
    }
}
END_TEST

START_TEST(embedding_and_rows)
{
    struct history history = {gpu->alloc(gpu_device, 4 * CONTEXT * sizeof(int32_t)), 4, CONTEXT};
    struct history host = {calloc(4 * CONTEXT, sizeof(int32_t)), 4, CONTEXT};
    for (int32_t s = 0; s < 4; s++) {
        int32_t tokens[CONTEXT];
        for (int i = 0; i < CONTEXT; i++) tokens[i] = random_int(0, VOCAB - 1);
        check(gpu->history_write(gpu_device, history, s, s, tokens, CONTEXT - s, &e));
        check(cpu->history_write(cpu_device, host, s, s, tokens, CONTEXT - s, &e));
    }
    for (int round = 0; round < 24; round++) {
        enum dtype dtype = type_of(round), table_type = random_int(0, 2) ? dtype : DTYPE_F32;
        int32_t T = random_int(1, MAX_TOKENS), tokens[MAX_TOKENS], positions[MAX_TOKENS], rows[MAX_TOKENS];
        size_t dim = random_int(0, 1) ? (size_t)random_int(1, 500) : 8 * (size_t)random_int(1, 600);
        for (int32_t t = 0; t < T; t++) {
            tokens[t] = random_int(0, 2) ? random_int(0, VOCAB - 1) : -1;
            positions[t] = random_int(4, CONTEXT - 1), rows[t] = random_int(0, 3);
        }
        struct pair table = pair_of(table_type, VOCAB, dim), places = pair_of(dtype, CONTEXT, dim);
        struct pair out = pair_of(dtype, (size_t)T, dim);
        poison(&out);
        struct embedding_params g = {.out = out.g, .token_table = table.g, .tokens = tokens, .positions = positions,
                                     .history_rows = rows, .history = history,
                                     .scale = random_int(0, 1) ? 1 : 11.3f}, c = g;
        c.out = out.c, c.token_table = table.c, c.history = host;
        if (round % 2) g.pos_table = places.g, c.pos_table = places.c;
        check(gpu->embedding(gpu_device, &g, &e));
        check(cpu->embedding(cpu_device, &c, &e));
        expect_close(&out, 1, "embedding");
        if (table_type == dtype)
            expect_pytorch(&out, dtype, "embedding%s%s", g.scale != 1 ? ", scaled" : "", g.pos_table.data ? ", positions" : "");
        int32_t n = random_int(1, T), wanted[MAX_TOKENS];
        for (int32_t i = 0; i < n; i++) wanted[i] = random_int(0, T - 1);
        struct pair some = pair_of(dtype, (size_t)n, dim);
        poison(&some);
        check(gpu->gather_rows(gpu_device, &(struct gather_rows_params){some.g, out.g, wanted, n}, &e));
        check(cpu->gather_rows(cpu_device, &(struct gather_rows_params){some.c, out.c, wanted, n}, &e));
        expect_close(&some, 1, "gather_rows");
        pair_free(&table), pair_free(&places), pair_free(&out), pair_free(&some);
    }
    gpu->free(gpu_device, history.tokens);
    free(host.tokens);
}
END_TEST

// Heads, dims and lengths of one round of rope, KV write and attention on both sides.
struct attention_case {
    int32_t n_heads, n_kv_heads, head_dim, block_size, n_seqs, window;
    int32_t cu[MAX_SEQS + 1], context[MAX_SEQS], table[MAX_SEQS * (CONTEXT / 16)], max_blocks, n_blocks;
    int32_t slots[MAX_TOKENS], positions[MAX_TOKENS], n_tokens;
};

static void case_draw(struct attention_case *a)
{
    static const int32_t heads[][2] = {{1, 1}, {4, 2}, {8, 1}, {8, 8}, {16, 4}, {6, 2}}, dims[] = {64, 128, 80, 96, 256, 40, 72, 8};
    int i = random_int(0, 5);
    a->n_heads = heads[i][0], a->n_kv_heads = heads[i][1], a->head_dim = dims[random_int(0, 7)];
    a->block_size = 16 << random_int(0, 2);
    a->window = random_int(0, 2) ? 0 : random_int(1, 300);
    a->n_seqs = random_int(1, 12), a->n_tokens = 0, a->max_blocks = CONTEXT / a->block_size, a->n_blocks = 0;
    for (int32_t s = 0; s < a->n_seqs; s++) {
        int32_t context = random_int(0, 1) ? random_int(1, CONTEXT) : a->block_size * random_int(1, 6) + random_int(-1, 1);
        int32_t n_q = s < a->n_seqs / 2 ? 1 : random_int(1, 40);
        if (n_q > context) n_q = context;
        a->cu[s] = a->n_tokens, a->context[s] = context;
        for (int32_t b = 0; b < a->max_blocks; b++) a->table[s * a->max_blocks + b] = -1;
        for (int32_t b = 0; b <= (context - 1) / a->block_size; b++) a->table[s * a->max_blocks + b] = a->n_blocks++;
        for (int32_t q = 0; q < n_q; q++) {
            int32_t p = context - n_q + q;
            a->positions[a->n_tokens] = p;
            a->slots[a->n_tokens++] = a->table[s * a->max_blocks + p / a->block_size] * a->block_size + p % a->block_size;
        }
    }
    a->cu[a->n_seqs] = a->n_tokens;
}

static struct kv_layer layer_of(const struct kernels *k, struct device *d, const struct attention_case *a, enum dtype dtype)
{
    struct tensor t = {NULL, dtype, 4, {(size_t)a->n_blocks, (size_t)a->n_kv_heads, (size_t)a->block_size, (size_t)a->head_dim}};
    struct kv_layer layer = {t, t};
    size_t bytes = t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] * dtype_size(dtype);
    layer.k.data = k->alloc(d, bytes), layer.v.data = k->alloc(d, bytes);
    void *bits = malloc(bytes);
    memset(bits, 0xFF, bytes); // NaN wherever nothing is written: it must reach nobody
    check(k->copy_in(d, layer.k.data, bits, bytes, &e));
    check(k->copy_in(d, layer.v.data, bits, bytes, &e));
    free(bits);
    return layer;
}

// Fills the cache through rope_kv_write, a context at a time, then attends.
static void attention_round(const struct attention_case *a, enum dtype dtype)
{
    size_t width = (size_t)(a->n_heads + 2 * a->n_kv_heads) * (size_t)a->head_dim;
    struct kv_layer g_layer = layer_of(gpu, gpu_device, a, dtype), c_layer = layer_of(cpu, cpu_device, a, DTYPE_F32);
    int32_t half = a->head_dim / 4; // the rest passes through
    float inv_freq[128];
    for (int i = 0; i < half; i++) inv_freq[i] = powf(10000, -(float)i / (float)half);
    float *g_freq = gpu->alloc(gpu_device, sizeof inv_freq);
    check(gpu->copy_in(gpu_device, g_freq, inv_freq, sizeof inv_freq, &e));
    for (int32_t s = 0; s <= a->n_seqs; s++) { // all of each sequence's context, then the new tokens again, as queries
        int32_t n = s < a->n_seqs ? a->context[s] : a->n_tokens, slots[CONTEXT + MAX_TOKENS], places[CONTEXT + MAX_TOKENS];
        for (int32_t i = 0; s < a->n_seqs && i < n; i++) {
            places[i] = i;
            slots[i] = a->table[s * a->max_blocks + i / a->block_size] * a->block_size + i % a->block_size;
        }
        for (int32_t first = 0; first < n; first += MAX_TOKENS) {
            int32_t some = n - first < MAX_TOKENS ? n - first : MAX_TOKENS;
            const int32_t *positions = s < a->n_seqs ? places + first : a->positions;
            const int32_t *to = s < a->n_seqs ? slots + first : a->slots;
            struct pair qkv = pair_of(dtype, (size_t)some, width), cs = pair_of(DTYPE_F32, (size_t)some, (size_t)(2 * half));
            struct rope_table_params gt = {cs.g, positions, g_freq, 1}, ct = {cs.c, positions, inv_freq, 1};
            check(gpu->rope_table(gpu_device, &gt, &e)), check(cpu->rope_table(cpu_device, &ct, &e));
            ck_assert_msg(half == 0 || distance(&cs) < 1e-5, "rope_table: %g", distance(&cs));
            struct rope_kv_write_params g = {.qkv = qkv.g, .cos_sin = cs.g, .cache = g_layer, .slot_mapping = to,
                .n_heads = a->n_heads, .n_kv_heads = a->n_kv_heads, .head_dim = a->head_dim, .rope_dim = 2 * half}, c = g;
            c.qkv = qkv.c, c.cos_sin = cs.c, c.cache = c_layer;
            check(gpu->rope_kv_write(gpu_device, &g, &e)), check(cpu->rope_kv_write(cpu_device, &c, &e));
            expect_close(&qkv, 1.2, "rope");
            expect_pytorch(&qkv, dtype, "rope");
            if (s == a->n_seqs) {
                struct pair out = pair_of(dtype, (size_t)n, (size_t)(a->n_heads * a->head_dim));
                poison(&out);
                struct attention_params ga = {.out = out.g, .qkv = qkv.g, .cache = g_layer, .cu_seqlens_q = a->cu,
                    .context_lens = a->context, .block_table = a->table, .n_seqs = a->n_seqs, .max_blocks = a->max_blocks,
                    .block_size = a->block_size, .n_heads = a->n_heads, .n_kv_heads = a->n_kv_heads,
                    .head_dim = a->head_dim, .window = a->window, .scale = 1 / sqrtf((float)a->head_dim)}, ca = ga;
                ca.out = out.c, ca.qkv = qkv.c, ca.cache = c_layer;
                check(gpu->attention(gpu_device, &ga, &e)), check(cpu->attention(cpu_device, &ca, &e));
                expect_close(&out, 4, "attention");
                pair_free(&out);
            }
            pair_free(&qkv), pair_free(&cs);
        }
    }
    gpu->free(gpu_device, g_freq);
    gpu->free(gpu_device, g_layer.k.data), gpu->free(gpu_device, g_layer.v.data);
    cpu->free(cpu_device, c_layer.k.data), cpu->free(cpu_device, c_layer.v.data);
}

START_TEST(rope_and_attention)
{
    for (int round = 0; round < rounds(24); round++) {
        static struct attention_case a;
        case_draw(&a);
        attention_round(&a, type_of(round));
    }
}
END_TEST

// A vector of n on both sides.
static struct pair vector_of(enum dtype dtype, size_t n)
{
    struct pair p = pair_of(dtype, 1, n);
    p.g.n_dims = p.c.n_dims = 1, p.g.shape[0] = p.c.shape[0] = n;
    return p;
}

// What the cache has of each token are the bits of its k and v.
static void expect_cached(const struct kv_layer *layer, const struct tensor *qkv, const int32_t *slots, size_t n_heads)
{
    const size_t n_kv = layer->k.shape[1], block = layer->k.shape[2], dim = layer->k.shape[3], T = qkv->shape[0];
    const size_t n = layer->k.shape[0] * n_kv * block * dim;
    uint16_t *k = bits_of(&layer->k, n), *v = bits_of(&layer->v, n), *row = bits_of(qkv, T * qkv->shape[1]), *rows = row;
    for (size_t t = 0; t < T; t++, row += qkv->shape[1])
        for (size_t h = 0; h < n_kv; h++) {
            size_t at = (((size_t)slots[t] / block * n_kv + h) * block + (size_t)slots[t] % block) * dim;
            ck_assert_msg(!memcmp(k + at, row + (n_heads + h) * dim, dim * 2), "K of token %zu, head %zu, head_dim %zu", t, h, dim);
            ck_assert_msg(!memcmp(v + at, row + (n_heads + n_kv + h) * dim, dim * 2), "V of token %zu, head %zu", t, h);
        }
    free(k), free(v), free(rows);
}

// Norms of q and k before the rotation: of all of a head, of half of it, of none.
START_TEST(rope_with_norms)
{
    static const int32_t dims[] = {64, 80, 96, 128, 256, 40, 8, 36}, heads[][2] = {{1, 1}, {4, 2}, {32, 8}, {5, 5}};
    static const int32_t counts[] = {1, 7, 300};
    for (int round = 0; round < rounds(96); round++) {
        const enum dtype dtype = type_of(round);
        const int32_t dim = dims[round / 2 % 8], T = counts[random_int(0, 2)], *h = heads[random_int(0, 3)];
        const int32_t rope_dim = dim / 4 * 2 * random_int(0, 2), n_blocks = MAX_TOKENS / BLOCK + 1;
        const size_t width = (size_t)((h[0] + 2 * h[1]) * dim);
        struct attention_case a = {.n_heads = h[0], .n_kv_heads = h[1], .head_dim = dim, .block_size = BLOCK, .n_blocks = n_blocks};
        struct kv_layer g_layer = layer_of(gpu, gpu_device, &a, dtype), c_layer = layer_of(cpu, cpu_device, &a, DTYPE_F32);
        struct pair qkv = pair_of(dtype, (size_t)T, width), cs = pair_of(DTYPE_F32, (size_t)T, (size_t)rope_dim);
        struct pair q = vector_of(random_int(0, 2) ? dtype : DTYPE_F32, (size_t)dim), k = vector_of(q.g.dtype, (size_t)dim);
        struct pair again = pair_of(dtype, 1, width);
        int32_t slots[MAX_TOKENS];
        for (int32_t t = 0; t < T; t++) slots[t] = (t * 7 + 3) % (n_blocks * BLOCK); // 7 and the number have no common divisor
        struct rope_kv_write_params g = {.qkv = qkv.g, .q_norm = q.g, .k_norm = k.g, .norm_eps = 1e-6f,
            .norm_weight_offset = (float)random_int(0, 1), .cos_sin = cs.g, .cache = g_layer, .slot_mapping = slots,
            .n_heads = h[0], .n_kv_heads = h[1], .head_dim = dim, .rope_dim = rope_dim}, c = g;
        if (rope_dim == 0) g.cos_sin.data = NULL;
        c.qkv = qkv.c, c.q_norm = q.c, c.k_norm = k.c, c.cos_sin = rope_dim ? cs.c : g.cos_sin, c.cache = c_layer;
        void *first = bits_of(&qkv.g, width);
        check(gpu->copy_in(gpu_device, again.g.data, first, width * 2, &e));
        check(gpu->rope_kv_write(gpu_device, &g, &e)), check(cpu->rope_kv_write(cpu_device, &c, &e));
        expect_close(&qkv, 2, "norms of q and k, rope"); // of the norm, of the rotation
        expect_cached(&g_layer, &qkv.g, slots, (size_t)h[0]);
        g.qkv = again.g, g.cos_sin.shape[0] = 1; // the first token alone
        check(gpu->rope_kv_write(gpu_device, &g, &e));
        void *alone = bits_of(&again.g, width), *among = bits_of(&qkv.g, width);
        ck_assert_msg(!memcmp(alone, among, width * 2), "norms of q and k: a token of %d is not what it is alone", T);
        free(first), free(alone), free(among);
        pair_free(&qkv), pair_free(&cs), pair_free(&q), pair_free(&k), pair_free(&again);
        gpu->free(gpu_device, g_layer.k.data), gpu->free(gpu_device, g_layer.v.data);
        cpu->free(cpu_device, c_layer.k.data), cpu->free(cpu_device, c_layer.v.data);
    }
}
END_TEST

START_TEST(softcap)
{
    static const size_t sizes[][2] = {{1, 1}, {3, 7}, {1, 256000}, {5, 32003}, {64, 1000}};
    for (int round = 0; round < 10; round++) {
        struct pair x = pair_of(DTYPE_F32, sizes[round / 2][0], sizes[round / 2][1]);
        const float cap = round % 2 ? 30 : 1.5f;
        check(gpu->softcap(gpu_device, &(struct softcap_params){x.g, cap}, &e));
        check(cpu->softcap(cpu_device, &(struct softcap_params){x.c, cap}, &e));
        expect_close(&x, 1, "softcap");
        pair_free(&x);
    }
}
END_TEST

// ---- fused ops ------------------------------------------------------------------------------------------------------

// A weight of stacked parts on both sides, with biases or without.
struct weights { struct pair parts[3], biases[3]; struct weight g, c; size_t n_rows; };

static void weights_draw(struct weights *w, enum dtype dtype, int n_parts, const size_t *rows, size_t n_cols, bool bias)
{
    *w = (struct weights){.g = {.n_parts = n_parts, .n_cols = n_cols}, .c = {.n_parts = n_parts, .n_cols = n_cols}};
    for (int i = 0; i < n_parts; i++) {
        w->parts[i] = pair_of(dtype, rows[i], n_cols), w->biases[i] = pair_of(DTYPE_F32, 1, rows[i]);
        for (size_t j = 0; j < rows[i] * n_cols; j++) { // outputs of about 1
            float *x = (float *)w->parts[i].c.data + j;
            *x *= 1 / sqrtf((float)n_cols);
        }
        char *bits = malloc(rows[i] * n_cols * dtype_size(dtype));
        dtype_convert(bits, dtype, w->parts[i].c.data, DTYPE_F32, rows[i] * n_cols);
        check(gpu->copy_in(gpu_device, w->parts[i].g.data, bits, rows[i] * n_cols * dtype_size(dtype), &e));
        dtype_convert(w->parts[i].c.data, DTYPE_F32, bits, dtype, rows[i] * n_cols);
        free(bits);
        w->g.part[i] = (struct weight_part){.data = w->parts[i].g.data, .dtype = dtype, .n_rows = rows[i]};
        w->c.part[i] = (struct weight_part){.data = w->parts[i].c.data, .dtype = DTYPE_F32, .n_rows = rows[i]};
        w->biases[i].g.n_dims = w->biases[i].c.n_dims = 1;
        w->biases[i].g.shape[0] = w->biases[i].c.shape[0] = rows[i];
        if (bias) w->g.part[i].bias = w->biases[i].g, w->c.part[i].bias = w->biases[i].c;
        w->n_rows += rows[i];
    }
}

static void weights_end(struct weights *w)
{
    for (int i = 0; i < w->g.n_parts; i++) pair_free(&w->parts[i]), pair_free(&w->biases[i]);
}

struct norms { struct pair x, out, weight, bias; struct norm_params g, c; };

static void norms_draw(struct norms *n, enum dtype dtype, size_t T, size_t dim, enum norm_kind kind)
{
    n->x = pair_of(dtype, T, dim), n->out = pair_of(dtype, T, dim);
    n->weight = pair_of(dtype, 1, dim), n->bias = pair_of(dtype, 1, dim);
    n->weight.g.n_dims = n->weight.c.n_dims = n->bias.g.n_dims = n->bias.c.n_dims = 1;
    n->weight.g.shape[0] = n->weight.c.shape[0] = n->bias.g.shape[0] = n->bias.c.shape[0] = dim;
    n->g = (struct norm_params){.out = n->out.g, .x = n->x.g, .weight = n->weight.g, .kind = kind, .eps = 1e-5f};
    n->c = (struct norm_params){.out = n->out.c, .x = n->x.c, .weight = n->weight.c, .kind = kind, .eps = 1e-5f};
    if (kind == NORM_LAYER) n->g.bias = n->bias.g, n->c.bias = n->bias.c;
    n->g.weight_offset = n->c.weight_offset = random_int(0, 3) ? (float)random_int(0, 1) : 0.5f;
}

static void norms_end(struct norms *n)
{
    pair_free(&n->x), pair_free(&n->out), pair_free(&n->weight), pair_free(&n->bias);
}

// Row 0 again, alone: few rows have the same bits however many they are.
static void expect_row_alone(const struct pair *out, struct norm_params n, struct linear_params p, struct activation_params a)
{
    size_t m = out->g.shape[1], bytes = m * dtype_size(out->g.dtype);
    struct pair alone = pair_of(out->g.dtype, 1, m);
    char *bits = malloc(2 * bytes);
    poison(&alone);
    n.x.shape[0] = n.out.shape[0] = p.x.shape[0] = p.out.shape[0] = a.x.shape[0] = 1, a.out = alone.g;
    check(gpu->norm_linear_activation(gpu_device, &n, &p, &a, &e));
    check(gpu->copy_out(gpu_device, bits, out->g.data, bytes, &e));
    check(gpu->copy_out(gpu_device, bits + bytes, alone.g.data, bytes, &e));
    ck_assert_msg(!memcmp(bits, bits + bytes, bytes), "norm, linear, activation: row 0 of %zu is not what it is alone, K %zu",
                  out->g.shape[0], n.x.shape[1]);
    free(bits), pair_free(&alone);
}

static void expect_norm_linear_activation(int n_rounds, int first_T, int n_T)
{
    static const size_t dims[] = {64, 200, 520, 1024, 4096}, inner[] = {4, 36, 500, 1376};
    for (int round = 0; round < rounds(n_rounds); round++) {
        enum dtype dtype = type_of(round / n_T);
        size_t T = (size_t)(round % n_T + first_T), dim = dims[random_int(0, 4)], m = inner[random_int(0, 3)];
        bool gated = random_int(0, 3) > 0;
        struct weights w;
        struct norms n;
        weights_draw(&w, dtype, gated ? 2 : 1, (size_t[]){m, m}, dim, random_int(0, 1));
        norms_draw(&n, dtype, T, dim, random_int(0, 2) ? NORM_RMS : NORM_LAYER);
        struct pair in = pair_of(dtype, T, w.n_rows), out = pair_of(dtype, T, m);
        poison(&in), poison(&out), poison(&n.out);
        struct linear_params g = {in.g, n.out.g, &w.g, false}, c = {in.c, n.out.c, &w.c, false};
        struct activation_params ga = {out.g, in.g, (enum activation)random_int(0, 3), gated}, ca = {out.c, in.c, ga.kind, gated};
        check(gpu->norm_linear_activation(gpu_device, &n.g, &g, &ga, &e));
        check(cpu->norm(cpu_device, &n.c, &e)), check(cpu->linear(cpu_device, &c, &e));
        check(cpu->activation(cpu_device, &ca, &e));
        expect_close(&out, 4, "norm, linear, activation"); // roundings of norm, product, result; the product's two factors
        expect_pytorch(&out, dtype, "norm %s, linear, %s%s", norm_names[n.g.kind], activation_names[ga.kind],
                       gated ? ", gated" : "");
        if (T <= 8) expect_row_alone(&out, n.g, g, ga);
        weights_end(&w), norms_end(&n), pair_free(&in), pair_free(&out);
    }
}

START_TEST(norm_linear)
{
    static const size_t dims[] = {64, 200, 520, 1024, 4096}, vocab[] = {4, 36, 500, 5003};
    for (int round = 0; round < rounds(40); round++) {
        enum dtype dtype = type_of(round / 10), out_dtype = random_int(0, 4) ? DTYPE_F32 : dtype;
        size_t T = (size_t)(round % 10 + 1), dim = dims[random_int(0, 4)], m = vocab[random_int(0, 3)];
        struct weights w;
        struct norms n;
        weights_draw(&w, dtype, 1, &m, dim, random_int(0, 1));
        norms_draw(&n, dtype, T, dim, random_int(0, 2) ? NORM_RMS : NORM_LAYER);
        if (random_int(0, 1)) n.g.out = n.g.x, n.c.out = n.c.x; // as the last norm of a prompt: in place
        else poison(&n.out);
        struct pair out = pair_of(out_dtype, T, m);
        poison(&out);
        struct linear_params g = {out.g, n.g.out, &w.g, false}, c = {out.c, n.c.out, &w.c, false};
        check(gpu->norm_linear(gpu_device, &n.g, &g, &e));
        check(cpu->norm(cpu_device, &n.c, &e)), check(cpu->linear(cpu_device, &c, &e));
        double units = out_dtype == dtype ? 1 : dtype == DTYPE_BF16 ? 512 : 64; // what is rounded is of the activations' type
        expect_close(&out, 4 * units, "norm, linear"); // roundings of norm, product, result
        expect_pytorch(&out, dtype, "norm %s, linear", norm_names[n.g.kind]);
        if (T <= 8 && n.g.out.data != n.g.x.data) { // row 0 alone: few rows have the same bits however many they are
            size_t bytes = m * dtype_size(out_dtype);
            char *bits = malloc(2 * bytes);
            check(gpu->copy_out(gpu_device, bits, out.g.data, bytes, &e));
            poison(&out);
            g.out.shape[0] = g.x.shape[0] = n.g.x.shape[0] = n.g.out.shape[0] = 1;
            check(gpu->norm_linear(gpu_device, &n.g, &g, &e));
            check(gpu->copy_out(gpu_device, bits + bytes, out.g.data, bytes, &e));
            ck_assert_msg(!memcmp(bits, bits + bytes, bytes), "norm, linear: row 0 of %zu is not what it is alone", T);
            free(bits);
        }
        weights_end(&w), norms_end(&n), pair_free(&out);
    }
}
END_TEST

START_TEST(norm_linear_activation_few) { expect_norm_linear_activation(48, 1, 8); }
END_TEST

START_TEST(norm_linear_activation) { expect_norm_linear_activation(24, 9, 4); }
END_TEST

// V alone: the CPU's tiles of K are transposed.
static void expect_same_values(const struct kv_layer *g, const struct kv_layer *c, const int32_t *slots, size_t T)
{
    size_t n_kv = g->v.shape[1], block = g->v.shape[2], dim = g->v.shape[3], n = g->v.shape[0] * n_kv * block * dim;
    char *bits = malloc(n * dtype_size(g->v.dtype));
    float *values = malloc(n * sizeof *values);
    check(gpu->copy_out(gpu_device, bits, g->v.data, n * dtype_size(g->v.dtype), &e));
    dtype_convert(values, DTYPE_F32, bits, g->v.dtype, n);
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; slots[t] >= 0 && h < n_kv; h++)
            for (size_t i = 0; i < dim; i++) {
                size_t at = (((size_t)slots[t] / block * n_kv + h) * block + (size_t)slots[t] % block) * dim + i;
                float want = ((float *)c->v.data)[at];
                ck_assert_msg(fabsf(values[at] - want) < 0.03f * (1 + fabsf(want)), "V of token %zu: %g, not %g", t,
                              values[at], want);
            }
    free(bits), free(values);
}

// q and V against the CPU's, K against the GPU's own ops one by one.
START_TEST(norm_linear_rope)
{
    for (int round = 0; round < rounds(48); round++) {
        static struct attention_case a;
        enum dtype dtype = type_of(round / 12);
        int32_t T = round % 12 + 1;
        do case_draw(&a); while (a.n_tokens < T || a.head_dim % 8);
        size_t dim = 8 * (size_t)random_int(4, 60), head = (size_t)a.head_dim;
        size_t rows[3] = {(size_t)a.n_heads * head, (size_t)a.n_kv_heads * head, (size_t)a.n_kv_heads * head};
        int32_t half = a.head_dim / 2 / (1 << random_int(0, 1)), slots[12];
        for (int32_t t = 0; t < T; t++) slots[t] = t == 2 ? -1 : a.slots[t]; // one row of padding
        struct weights w;
        struct norms n;
        weights_draw(&w, dtype, 3, rows, dim, random_int(0, 1));
        norms_draw(&n, dtype, (size_t)T, dim, random_int(0, 2) ? NORM_RMS : NORM_LAYER);
        struct kv_layer fused = layer_of(gpu, gpu_device, &a, dtype), plain = layer_of(gpu, gpu_device, &a, dtype);
        struct kv_layer c_layer = layer_of(cpu, cpu_device, &a, DTYPE_F32);
        struct pair qkv = pair_of(dtype, (size_t)T, w.n_rows), cs = pair_of(DTYPE_F32, (size_t)T, (size_t)(2 * half));
        struct pair q = qkv;
        struct linear_params g = {qkv.g, n.out.g, &w.g, false}, c = {qkv.c, n.out.c, &w.c, false};
        struct pair q_norm = vector_of(dtype, head), k_norm = vector_of(dtype, head);
        const bool heads_normed = random_int(0, 2) == 0;
        struct rope_kv_write_params gr = {.qkv = qkv.g, .cos_sin = cs.g, .cache = fused, .slot_mapping = slots,
            .n_heads = a.n_heads, .n_kv_heads = a.n_kv_heads, .head_dim = a.head_dim, .rope_dim = 2 * half}, cr, pr;
        gr.norm_eps = 1e-6f, gr.norm_weight_offset = (float)(round % 2);
        if (heads_normed) gr.q_norm = q_norm.g, gr.k_norm = k_norm.g;
        cr = gr;
        if (heads_normed) cr.q_norm = q_norm.c, cr.k_norm = k_norm.c;
        cr.qkv = qkv.c, cr.cos_sin = cs.c, cr.cache = c_layer;
        cr.slot_mapping = a.slots;
        if (random_int(0, 3) == 0) gr.cos_sin.data = cr.cos_sin.data = NULL, gr.rope_dim = cr.rope_dim = 0;
        poison(&qkv), poison(&n.out);
        check(gpu->norm_linear_rope(gpu_device, &n.g, &g, &gr, &e));
        check(cpu->norm(cpu_device, &n.c, &e)), check(cpu->linear(cpu_device, &c, &e));
        check(cpu->rope_kv_write(cpu_device, &cr, &e));
        // q of every token: the columns before k's, as a tensor of their own on both sides.
        struct pair queries = pair_of(dtype, (size_t)T, rows[0]);
        char *bits = malloc((size_t)T * w.n_rows * 2), *some = malloc((size_t)T * rows[0] * 2);
        check(gpu->copy_out(gpu_device, bits, q.g.data, (size_t)T * w.n_rows * 2, &e));
        for (int32_t t = 0; t < T; t++) {
            memcpy(some + (size_t)t * rows[0] * 2, bits + (size_t)t * w.n_rows * 2, rows[0] * 2);
            memcpy((float *)queries.c.data + (size_t)t * rows[0], (float *)q.c.data + (size_t)t * w.n_rows,
                   rows[0] * sizeof(float));
        }
        check(gpu->copy_in(gpu_device, queries.g.data, some, (size_t)T * rows[0] * 2, &e));
        expect_close(&queries, heads_normed ? 5 : 4, "q of norm, linear, rope"); // and of its own norm
        if (!heads_normed) expect_pytorch(&queries, dtype, "norm %s, linear, rope", norm_names[n.g.kind]);
        free(bits), free(some);
        expect_same_values(&fused, &c_layer, slots, (size_t)T);
        // K against the GPU's own, op by op.
        pr = gr, pr.cache = plain;
        check(gpu->norm(gpu_device, &n.g, &e)), check(gpu->linear(gpu_device, &g, &e));
        check(gpu->rope_kv_write(gpu_device, &pr, &e));
        size_t n_cache = fused.k.shape[0] * fused.k.shape[1] * fused.k.shape[2] * fused.k.shape[3];
        uint16_t *x = malloc(n_cache * 2), *y = malloc(n_cache * 2);
        float *fx = malloc(n_cache * sizeof *fx), *fy = malloc(n_cache * sizeof *fy);
        check(gpu->copy_out(gpu_device, x, fused.k.data, n_cache * 2, &e));
        check(gpu->copy_out(gpu_device, y, plain.k.data, n_cache * 2, &e));
        dtype_convert(fx, DTYPE_F32, x, dtype, n_cache), dtype_convert(fy, DTYPE_F32, y, dtype, n_cache);
        for (size_t i = 0; i < n_cache; i++)
            ck_assert_msg(x[i] == y[i] || fabsf(fx[i] - fy[i]) < 0.03f * (1 + fabsf(fy[i])), "K at %zu: %g, not %g", i,
                          fx[i], fy[i]);
        free(x), free(y), free(fx), free(fy);
        weights_end(&w), norms_end(&n), pair_free(&qkv), pair_free(&cs), pair_free(&queries);
        pair_free(&q_norm), pair_free(&k_norm);
        gpu->free(gpu_device, fused.k.data), gpu->free(gpu_device, fused.v.data);
        gpu->free(gpu_device, plain.k.data), gpu->free(gpu_device, plain.v.data);
        cpu->free(cpu_device, c_layer.k.data), cpu->free(cpu_device, c_layer.v.data);
    }
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1) read_errors(argv[1]);
    open_devices();
    Suite *suite = suite_create("cuda_ops");
    TCase *tc = tcase_create("cuda_ops"), *products = tcase_create("linear"); // apart: it also runs code that is not ours
    tcase_set_timeout(tc, 0), tcase_set_timeout(products, 0);
    tcase_add_test(products, linear);
    tcase_add_test(products, linear_deterministic_few);
    tcase_add_test(tc, norm);
    tcase_add_test(tc, activation);
    tcase_add_test(tc, embedding_and_rows);
    tcase_add_test(tc, rope_and_attention);
    tcase_add_test(tc, rope_with_norms);
    tcase_add_test(tc, softcap);
    tcase_add_test(products, norm_linear_activation);
    tcase_add_test(tc, norm_linear_activation_few);
    tcase_add_test(tc, norm_linear);
    tcase_add_test(tc, norm_linear_rope);
    suite_add_tcase(suite, products);
    suite_add_tcase(suite, tc);
    int status = run_suite(suite);
    print_errors();
    return status;
}
