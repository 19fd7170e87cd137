/* Embedding, norm, rope and KV write, activation, rows against references in double precision, on every instruction
 * set; and the same bits whatever else is in the batch. */
#include "tests/kernel_helpers.h"

static const struct kernels *ops;
static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
static const int32_t dims[] = {1, 7, 16, 33, 100, 768, 2048};
enum { N_DIMS = 7 };

static void check_close(const float *got, const double *expected, size_t n, double tolerance, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        double bound = tolerance * (fabs(expected[i]) + 1);
        CHECK_MSG(fabs(got[i] - expected[i]) <= bound, "%s: [%zu] of %zu: %.9g instead of %.9g", what, i, n, got[i],
                      expected[i]);
    }
}

// ---- conversions ----------------------------------------------------------------------------------------------------

START_TEST(test_every_f16_and_bf16_survives)
{
    for (uint32_t h = 0; h < 65536; h++) {
        float half = f16_to_f32((uint16_t)h), brain = bf16_to_f32((uint16_t)h);
        if (isnan(half)) CHECK(isnan(f16_to_f32(f32_to_f16(half))));
        else CHECK(f32_to_f16(half) == (h));
        if (isnan(brain)) CHECK(isnan(bf16_to_f32(f32_to_bf16(brain))));
        else CHECK(f32_to_bf16(brain) == (h));
    }
}
END_TEST

// Between two neighbours lies the middle, which goes to the even one; what is next to it goes to the nearer one.
START_TEST(test_rounding_to_nearest_even)
{
    for (uint32_t h = 0; h < 0x7bff; h++) {
        double low = f16_to_f32((uint16_t)h), high = f16_to_f32((uint16_t)(h + 1));
        float middle = (float)((low + high) / 2);
        CHECK(f32_to_f16(middle) == (h + (h & 1)));
        CHECK(f32_to_f16(nextafterf(middle, 0)) == (h));
        CHECK(f32_to_f16(nextafterf(-middle, -INFINITY)) == (0x8000 + h + 1));
    }
    for (uint32_t h = 0; h < 0x7f7f; h++) {
        float middle = f32_from_bits(h << 16 | 0x8000);
        CHECK(f32_to_bf16(middle) == (h + (h & 1)));
        CHECK(f32_to_bf16(f32_from_bits(f32_bits(middle) - 1)) == (h));
        CHECK(f32_to_bf16(f32_from_bits(f32_bits(-middle) + 1)) == (0x8000 + h + 1));
    }
    CHECK(f32_to_f16(65519.9f) == (0x7bff));
    CHECK(f32_to_f16(65520) == (0x7c00));
    CHECK(isnan(bf16_to_f32(f32_to_bf16(f32_from_bits(0x7f800001)))));
}
END_TEST

// ---- embedding ------------------------------------------------------------------------------------------------------

static void check_embedding(struct device *device, enum dtype dtype, size_t hidden, bool learned)
{
    enum { VOCAB = 50, POSITIONS = 40, T = 9, SLOTS = 3 };
    char *tokens_at = random_elements(dtype, VOCAB * hidden + 1);
    // An element further: a mapped table need not begin at a multiple of anything but its element.
    const char *table = tokens_at + dtype_size(dtype);
    void *positions_at = random_elements(dtype, POSITIONS * hidden);
    int32_t history[SLOTS * POSITIONS], tokens[T], positions[T], rows[T];
    for (int32_t i = 0; i < SLOTS * POSITIONS; i++) history[i] = rng_below(VOCAB);
    for (int32_t t = 0; t < T; t++)
        tokens[t] = rng_below(2) ? -1 : rng_below(VOCAB), positions[t] = rng_below(POSITIONS),
        rows[t] = rng_below(SLOTS);
    float *out = poisoned(T * hidden), scale = rng_below(2) ? 1 : 2.5f;
    struct embedding_params p = {
        .out = matrix(out, DTYPE_F32, T, hidden), .token_table = matrix((void *)table, dtype, VOCAB, hidden),
        .pos_table = matrix(learned ? positions_at : NULL, dtype, POSITIONS, hidden), .tokens = tokens,
        .positions = positions, .history_rows = rows, .history = {history, SLOTS, POSITIONS}, .scale = scale};
    ck_assert_int_eq(ops->embedding(device, &p, NULL), 0);
    for (size_t t = 0; t < T; t++) {
        int32_t id = tokens[t] >= 0 ? tokens[t] : history[rows[t] * POSITIONS + positions[t]];
        for (size_t i = 0; i < hidden; i++) {
            float expected = element_get(table, dtype, (size_t)id * hidden + i) * scale;
            if (learned) expected += element_get(positions_at, dtype, (size_t)positions[t] * hidden + i);
            CHECK(out[t * hidden + i] == expected);
        }
    }
    struct error e;
    tokens[T - 1] = VOCAB;
    ck_assert_int_eq(ops->embedding(device, &p, &e), ERR_INVALID);
    free(tokens_at);
    free(positions_at);
    free(out);
}

START_TEST(test_embedding)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 18; i++) check_embedding(device, dtypes[i % 3], (size_t)dims[rng_below(N_DIMS)], i & 1);
}
END_TEST

// ---- norm -----------------------------------------------------------------------------------------------------------

static void exact_norm(const struct norm_params *p, const double *x, double *out)
{
    size_t dim = p->x.shape[1];
    double mean = 0, square = 0;
    if (p->kind == NORM_LAYER)
        for (size_t i = 0; i < dim; i++) mean += x[i] / (double)dim;
    for (size_t i = 0; i < dim; i++) square += (x[i] - mean) * (x[i] - mean) / (double)dim;
    for (size_t i = 0; i < dim; i++) {
        out[i] = (x[i] - mean) / sqrt(square + p->eps) * (element_get(p->weight.data, p->weight.dtype, i) + p->weight_offset);
        if (p->bias.data) out[i] += element_get(p->bias.data, p->bias.dtype, i);
    }
}

static void check_norm(struct device *device, enum norm_kind kind, enum dtype dtype, size_t dim)
{
    enum { T = 40 };
    bool add = rng_below(2), has_bias = rng_below(2), in_place = !add && rng_below(2);
    float *x = rng_normals(T * dim, 3), *before = rng_normals(T * dim, 1), *x_row = malloc(dim * sizeof(*x_row));
    float *out = add ? before : poisoned(T * dim), *one = poisoned(dim), *old = malloc(T * dim * sizeof(*old));
    void *weight = random_elements(dtype, dim), *bias = random_elements(dtype, dim);
    double *exact = malloc(T * dim * sizeof(*exact)), *expected = malloc(dim * sizeof(*expected));
    for (size_t i = 0; i < T * dim; i++) exact[i] = x[i] += 1;
    memcpy(x_row, x + 3 * dim, dim * sizeof(*x_row));
    memcpy(old, before, T * dim * sizeof(*old));
    if (add) memcpy(one, old + 3 * dim, dim * sizeof(*one));
    struct norm_params p = {
        .out = matrix(in_place ? x : out, DTYPE_F32, T, dim), .x = matrix(x, DTYPE_F32, T, dim),
        .weight = vector(weight, dtype, dim), .bias = vector(has_bias ? bias : NULL, dtype, dim), .kind = kind,
        .eps = 1e-5f, .weight_offset = (float)rng_below(2), .accumulate = add};
    ck_assert_int_eq(ops->norm(device, &p, NULL), 0);
    for (size_t t = 0; t < T; t++) {
        for (size_t i = 0; i < dim && !in_place; i++) CHECK(x[t * dim + i] == (float)exact[t * dim + i]);
        exact_norm(&p, exact + t * dim, expected);
        for (size_t i = 0; i < dim && add; i++) expected[i] += old[t * dim + i];
        check_close((float *)p.out.data + t * dim, expected, dim, dim == 1 && kind == NORM_LAYER ? 1e-3 : 4e-6, "norm");
    }
    struct norm_params alone = p; // row 3 by itself: the same bits
    alone.x = matrix(x_row, DTYPE_F32, 1, dim), alone.out = matrix(one, DTYPE_F32, 1, dim);
    ck_assert_int_eq(ops->norm(device, &alone, NULL), 0);
    ck_assert_int_eq(memcmp(one, (float *)p.out.data + 3 * dim, dim * sizeof(float)), 0);
    if (!add) free(before);
    free(x), free(out), free(one), free(old), free(weight), free(bias), free(exact), free(expected), free(x_row);
}

START_TEST(test_norm)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 42; i++)
            check_norm(device, i & 1 ? NORM_LAYER : NORM_RMS, dtypes[i % 3], (size_t)dims[i % N_DIMS]);
}
END_TEST

// ---- rope -----------------------------------------------------------------------------------------------------------

START_TEST(test_rope_table)
{
    enum { T = 30, HALF = 18 };
    float inv_freq[HALF], *out = poisoned(T * 2 * HALF);
    int32_t positions[T];
    for (int32_t i = 0; i < HALF; i++) inv_freq[i] = powf(10000, -(float)i / HALF);
    for (int32_t t = 0; t < T; t++) positions[t] = t < 10 ? t : rng_below(100000);
    struct device *device = device_open(NULL, 2, false);
    struct rope_table_params p = {.cos_sin = matrix(out, DTYPE_F32, T, 2 * HALF), .positions = positions,
                                  .inv_freq = inv_freq, .attention_factor = 1.25f};
    ck_assert_int_eq(ops->rope_table(device, &p, NULL), 0);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < HALF; i++) { // the angle in single precision, as transformers has it
            float angle = (float)positions[t] * inv_freq[i];
            CHECK(fabs(out[t * 2 * HALF + i] - 1.25 * cos(angle)) < 3e-7);
            CHECK(fabs(out[t * 2 * HALF + HALF + i] - 1.25 * sin(angle)) < 3e-7);
        }
    free(out);
    ops->device_destroy(device);
}
END_TEST

static double rotated(const float *head, size_t i, const float *cos_sin, size_t rope_dim)
{
    size_t half = rope_dim / 2;
    if (i >= rope_dim) return head[i];
    if (i < half) return (double)head[i] * cos_sin[i] - (double)head[i + half] * cos_sin[half + i];
    return (double)head[i] * cos_sin[i - half] + (double)head[i - half] * cos_sin[i];
}

// Element of a tile: K transposed, V as it came (kernels/cpu/rope.c).
static size_t cache_index(const struct tensor *cache, bool is_k, size_t slot, size_t kv_head, size_t i)
{
    size_t n_kv = cache->shape[1], block_size = cache->shape[2], dim = cache->shape[3], offset = slot % block_size;
    size_t tile = slot / block_size * n_kv + kv_head;
    return tile * block_size * dim + (is_k ? i * block_size + offset : offset * dim + i);
}

static void check_stored(const struct tensor *cache, bool is_k, size_t slot, size_t kv_head, const float *row)
{
    for (size_t i = 0; i < cache->shape[3]; i++) {
        size_t index = cache_index(cache, is_k, slot, kv_head, i);
        float x = row[i], stored = element_get(cache->data, cache->dtype, index);
        float expected = cache->dtype == DTYPE_BF16  ? bf16_to_f32(f32_to_bf16(x))
                         : cache->dtype == DTYPE_F16 ? f16_to_f32(f32_to_f16(x))
                                                     : x;
        CHECK(stored == expected || (isnan(stored) && isnan(expected)));
    }
}

// RMS norm of one head, in single precision at the end, as it goes into the rotation.
static void norm_head(float *head, const struct tensor *weight, const struct rope_kv_write_params *p)
{
    double square = 0;
    for (int32_t i = 0; i < p->head_dim; i++) square += (double)head[i] * head[i] / p->head_dim;
    for (int32_t i = 0; i < p->head_dim; i++) {
        double w = element_get(weight->data, weight->dtype, (size_t)i) + p->norm_weight_offset;
        head[i] = (float)(head[i] / sqrt(square + p->norm_eps) * w);
    }
}

static void check_rope(struct device *device, enum dtype dtype, size_t head_dim, size_t rope_dim, bool rotates, bool norms)
{
    enum { T = 70, H = 6, KV = 2, BLOCKS = 8, BLOCK = 16 };
    size_t row = (H + 2 * KV) * head_dim, cache_size = BLOCKS * KV * BLOCK * head_dim;
    float *qkv = rng_normals(T * row, 1), *before = malloc(T * row * sizeof(float));
    float *cos_sin = rng_normals(T * rope_dim, 1);
    qkv[(H + 2 * KV) * head_dim - 1] = NAN; // in v of the last head of token 0
    memcpy(before, qkv, T * row * sizeof(float));
    void *k = poisoned(cache_size), *v = poisoned(cache_size);
    struct tensor cache = {.dtype = dtype, .n_dims = 4, .shape = {BLOCKS, KV, BLOCK, head_dim}};
    struct rope_kv_write_params p = {.qkv = matrix(qkv, DTYPE_F32, T, row), .n_heads = H, .n_kv_heads = KV,
                                     .cos_sin = matrix(rotates ? cos_sin : NULL, DTYPE_F32, T, rope_dim),
                                     .head_dim = (int32_t)head_dim, .rope_dim = (int32_t)rope_dim,
                                     .cache = {cache, cache}};
    void *q_norm = random_elements(dtype, head_dim), *k_norm = random_elements(dtype, head_dim);
    int32_t slots[T];
    for (int32_t t = 0; t < T; t++) slots[t] = (t * 37 + 5) % (BLOCKS * BLOCK);
    if (norms) {
        p.q_norm = vector(q_norm, dtype, head_dim), p.k_norm = vector(k_norm, dtype, head_dim);
        p.norm_eps = 1e-5f, p.norm_weight_offset = (float)rng_below(2);
    }
    for (size_t i = 0; norms && i < T * (H + KV); i++) {
        size_t t = i / (H + KV), h = i % (H + KV);
        norm_head(before + t * row + h * head_dim, h < H ? &p.q_norm : &p.k_norm, &p);
    }
    p.cache.k.data = k, p.cache.v.data = v, p.slot_mapping = slots;
    ck_assert_int_eq(ops->rope_kv_write(device, &p, NULL), 0);
    for (size_t t = 0; t < T; t++) {
        for (size_t h = 0; h < H + KV; h++)
            for (size_t i = 0; i < head_dim; i++) {
                size_t at = t * row + h * head_dim;
                double expected = rotates ? rotated(before + at, i, cos_sin + t * rope_dim, rope_dim) : before[at + i];
                CHECK(fabs(qkv[at + i] - expected) < 2e-6 * (1 + fabs(expected)));
            }
        ck_assert_int_eq(memcmp(qkv + t * row + (H + KV) * head_dim, before + t * row + (H + KV) * head_dim,
                                KV * head_dim * sizeof(float)), 0);
        for (size_t h = 0; h < KV; h++) {
            check_stored(&p.cache.k, true, (size_t)slots[t], h, qkv + t * row + (H + h) * head_dim);
            check_stored(&p.cache.v, false, (size_t)slots[t], h, qkv + t * row + (H + KV + h) * head_dim);
        }
    }
    struct error e;
    slots[3] = BLOCKS * BLOCK;
    ck_assert_int_eq(ops->rope_kv_write(device, &p, &e), ERR_INVALID);
    slots[3] = 0;
    p.q_norm = vector(q_norm, dtype, head_dim), p.k_norm.data = NULL;
    ck_assert_int_eq(ops->rope_kv_write(device, &p, &e), ERR_INVALID); // one without the other
    free(qkv), free(before), free(cos_sin), free(k), free(v), free(q_norm), free(k_norm);
}

START_TEST(test_rope_kv_write)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 3; i++) {
            check_rope(device, dtypes[i], 64, 64, true, i % 2);
            check_rope(device, dtypes[i], 20, 10, true, false);
            check_rope(device, dtypes[i], 12, 12, false, false);
            check_rope(device, dtypes[i], 80, 32, true, true);
            check_rope(device, dtypes[i], 40, 40, false, true);
        }
}
END_TEST

// ---- activation -----------------------------------------------------------------------------------------------------

static double exact_activation(double x, enum activation kind)
{
    switch (kind) {
    case ACT_GELU_ERF: return 0.5 * x * (1 + erf(x / sqrt(2)));
    case ACT_GELU_TANH: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ACT_SILU: return x / (1 + exp(-x));
    case ACT_RELU: return x > 0 ? x : 0;
    }
    return NAN;
}

static void check_activation(struct device *device, enum activation kind, bool gated, size_t m)
{
    enum { T = 12 };
    size_t cols = gated ? 2 * m : m;
    float *x = rng_normals(T * cols, 4), *out = poisoned(T * m);
    float edge[] = {0, -0.0f, 1e-30f, -100, 100, 88.5f, -88.5f, 1e30f};
    double *expected = malloc(m * sizeof(*expected));
    for (size_t i = 0; i < 8 && i < m; i++) x[i] = edge[i];
    for (size_t t = 0; t < T; t++) {
        struct activation_params p = {.out = matrix(out + t * m, DTYPE_F32, 1, m),
                                      .x = matrix(x + t * cols, DTYPE_F32, 1, cols), .kind = kind, .gated = gated};
        if (t == 2) p.out.shape[0] = p.x.shape[0] = T - t;
        if (t <= 2) ck_assert_int_eq(ops->activation(device, &p, NULL), 0);
        for (size_t i = 0; i < m; i++) {
            expected[i] = exact_activation(x[t * cols + i], kind);
            if (gated) expected[i] *= x[t * cols + m + i];
        }
        check_close(out + t * m, expected, m, 1e-6, "activation");
    }
    if (!gated) { // in place
        struct activation_params p = {.out = matrix(x, DTYPE_F32, T, m), .x = matrix(x, DTYPE_F32, T, m), .kind = kind};
        ck_assert_int_eq(ops->activation(device, &p, NULL), 0);
        ck_assert_int_eq(memcmp(x, out, T * m * sizeof(float)), 0);
    }
    free(x), free(out), free(expected);
}

START_TEST(test_activation)
{
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < 8 * N_DIMS; i++)
            check_activation(device, (enum activation)(i % 4), i / 4 % 2, (size_t)dims[i / 8]);
}
END_TEST

// Close to zero and over the range where the polynomials meet, relative to the result.
START_TEST(test_softcap)
{
    enum { T = 5 };
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t i = 0; i < N_DIMS; i++) {
            size_t n = (size_t)dims[i];
            float cap = 3 + (float)rng_below(40), *x = rng_normals(T * n, 50);
            double *expected = malloc(T * n * sizeof(*expected));
            x[0] = 1e30f, x[T * n - 1] = -INFINITY;
            for (size_t j = 0; j < T * n; j++) expected[j] = cap * tanh(x[j] / (double)cap);
            struct softcap_params p = {.x = matrix(x, DTYPE_F32, T, n), .cap = cap};
            ck_assert_int_eq(ops->softcap(device, &p, NULL), 0);
            check_close(x, expected, T * n, 1e-6, "softcap");
            free(x), free(expected);
        }
}
END_TEST

START_TEST(test_activation_relative_error)
{
    enum { N = 40000 };
    float *x = malloc(N * sizeof(*x)), *out = poisoned(N);
    for (int32_t i = 0; i < N; i++) x[i] = ldexpf(1 + (float)rng_uniform(), rng_below(24) - 20) * (i & 1 ? 1 : -0.25f);
    for (struct device *device = device_first(); device; device = device_next(device))
        for (int32_t kind = ACT_GELU_ERF; kind <= ACT_SILU; kind++) {
            struct activation_params p = {.out = matrix(out, DTYPE_F32, 1, N), .x = matrix(x, DTYPE_F32, 1, N),
                                          .kind = (enum activation)kind};
            ck_assert_int_eq(ops->activation(device, &p, NULL), 0);
            for (int32_t i = 0; i < N; i++) {
                double expected = exact_activation(x[i], (enum activation)kind);
                CHECK_MSG(fabs(out[i] - expected) <= 1e-6 * fmax(1, x[i] * x[i] / 4) * fabs(expected),
                              "%s, kind %d: f(%.9g) = %.9g, not %.9g",
                              ops->device_description(device), kind, x[i], out[i], expected);
            }
        }
    free(x), free(out);
}
END_TEST

// ---- rows -----------------------------------------------------------------------------------------------------------

START_TEST(test_gather_rows)
{
    enum { T = 50, DIM = 700, N = 40 };
    float *x = rng_normals(T * DIM, 1), *out = poisoned(N * DIM);
    int32_t rows[N];
    for (int32_t i = 0; i < N; i++) rows[i] = rng_below(T);
    struct device *device = device_open(NULL, 2, false);
    struct gather_rows_params p = {.out = matrix(out, DTYPE_F32, N, DIM), .x = matrix(x, DTYPE_F32, T, DIM),
                                   .rows = rows, .n = N};
    ck_assert_int_eq(ops->gather_rows(device, &p, NULL), 0);
    for (size_t i = 0; i < N; i++)
        ck_assert_int_eq(memcmp(out + i * DIM, x + (size_t)rows[i] * DIM, DIM * sizeof(float)), 0);
    struct error e;
    rows[5] = T;
    ck_assert_int_eq(ops->gather_rows(device, &p, &e), ERR_INVALID);
    free(x), free(out);
    ops->device_destroy(device);
}
END_TEST

START_TEST(test_history_write)
{
    int32_t tokens[3 * 10] = {0}, new_tokens[] = {7, 8, 9};
    struct history history = {tokens, 3, 10};
    struct device *device = device_open(NULL, 1, false);
    struct error e;
    ck_assert_int_eq(ops->history_write(device, history, 1, 7, new_tokens, 3, &e), 0);
    for (int32_t i = 0; i < 30; i++) ck_assert_int_eq(tokens[i], i >= 17 && i < 20 ? i - 10 : 0);
    ck_assert_int_eq(ops->history_write(device, history, 1, 8, new_tokens, 3, &e), ERR_INVALID);
    ck_assert_int_eq(ops->history_write(device, history, 3, 0, new_tokens, 3, &e), ERR_INVALID);
    ops->device_destroy(device);
}
END_TEST

START_TEST(test_copy_blocks)
{
    enum { BLOCKS = 6, TILE = 2 * 16 * 8 };
    uint16_t *k = random_elements(DTYPE_BF16, BLOCKS * TILE), *v = random_elements(DTYPE_BF16, BLOCKS * TILE);
    uint16_t *k_before = malloc(BLOCKS * TILE * 2), *v_before = malloc(BLOCKS * TILE * 2);
    memcpy(k_before, k, BLOCKS * TILE * 2), memcpy(v_before, v, BLOCKS * TILE * 2);
    struct tensor tiles = {.dtype = DTYPE_BF16, .n_dims = 4, .shape = {BLOCKS, 2, 16, 8}};
    struct kv_layer cache = {tiles, tiles};
    cache.k.data = k, cache.v.data = v;
    int32_t from[] = {1, 4}, to[] = {0, 5}, source[] = {1, 1, 2, 3, 4, 4};
    struct device *device = device_open(NULL, 1, false);
    struct error e;
    ck_assert_int_eq(ops->copy_blocks(device, cache, from, to, 2, &e), 0);
    for (int32_t i = 0; i < BLOCKS; i++) {
        ck_assert_int_eq(memcmp(k + i * TILE, k_before + source[i] * TILE, TILE * 2), 0);
        ck_assert_int_eq(memcmp(v + i * TILE, v_before + source[i] * TILE, TILE * 2), 0);
    }
    to[1] = BLOCKS;
    ck_assert_int_eq(ops->copy_blocks(device, cache, from, to, 2, &e), ERR_INVALID);
    free(k), free(v), free(k_before), free(v_before);
    ops->device_destroy(device);
}
END_TEST

int main(void)
{
    ops = kernels_cpu();
    Suite *suite = suite_create("ops");
    TCase *tcase = tcase_create("ops");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_every_f16_and_bf16_survives);
    tcase_add_test(tcase, test_rounding_to_nearest_even);
    tcase_add_test(tcase, test_embedding);
    tcase_add_test(tcase, test_norm);
    tcase_add_test(tcase, test_rope_table);
    tcase_add_test(tcase, test_rope_kv_write);
    tcase_add_test(tcase, test_activation);
    tcase_add_test(tcase, test_activation_relative_error);
    tcase_add_test(tcase, test_softcap);
    tcase_add_test(tcase, test_gather_rows);
    tcase_add_test(tcase, test_history_write);
    tcase_add_test(tcase, test_copy_blocks);
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
