/* Flash attention against the standard attention and a double-precision reference, and against itself bit for bit. */
#include "tests/kernel_helpers.h"

enum { MAX_SEQS = 8 };

struct shape {
    int32_t n_heads, n_kv_heads, head_dim, block_size, window;
    enum dtype dtype;
    float softcap;
    bool alibi;
    int32_t n_seqs, n_q[MAX_SEQS], context[MAX_SEQS];
};

// A batch of random sequences in a cache whose unused slots hold NaN.
struct batch {
    struct shape shape;
    struct attention_params params;
    float *kv[MAX_SEQS];                  // [context, 2, n_kv_heads, head_dim] before the cache's rounding: k, v
    int32_t cu_seqlens_q[MAX_SEQS + 1];
    int32_t *block_table;                 // [n_seqs, max_blocks]
    float *slopes, *qkv, *out;
    void *k, *v;
    int32_t n_tokens;
};

static const struct kernels *ops;

static size_t kv_index(const struct shape *s, int32_t position, int32_t which, int32_t kv_head)
{
    return (((size_t)position * 2 + (size_t)which) * (size_t)s->n_kv_heads + (size_t)kv_head) * (size_t)s->head_dim;
}

static float rounded(float x, enum dtype dtype)
{
    if (dtype == DTYPE_BF16) return bf16_to_f32(f32_to_bf16(x));
    if (dtype == DTYPE_F16) return f16_to_f32(f32_to_f16(x));
    return x;
}

// ---- building -------------------------------------------------------------------------------------------------------

// Blocks in random order; those no query of the chunk can see are -1.
static void place_blocks(struct batch *b, int32_t n_blocks)
{
    const struct shape *s = &b->shape;
    int32_t *order = malloc((size_t)n_blocks * sizeof(*order)), used = 0;
    for (int32_t i = 0; i < n_blocks; i++) {
        int32_t j = rng_below(i + 1);
        order[i] = order[j], order[j] = i;
    }
    for (int32_t q = 0; q < s->n_seqs; q++)
        for (int32_t i = 0; i < b->params.max_blocks; i++) {
            int32_t first_position = s->context[q] - s->n_q[q];
            bool behind = s->window && (i + 1) * s->block_size <= first_position - s->window + 1;
            bool needed = i * s->block_size < s->context[q] && !behind;
            b->block_table[q * b->params.max_blocks + i] = needed ? order[used++] : -1;
        }
    free(order);
}

static void write_sequence(struct batch *b, struct device *device, int32_t q)
{
    const struct shape *s = &b->shape;
    size_t heads = (size_t)(s->n_heads + 2 * s->n_kv_heads), dim = (size_t)s->head_dim, n = (size_t)s->context[q];
    size_t kv_row = 2 * (size_t)s->n_kv_heads * dim, row = heads * dim;
    float *qkv = poisoned(n * row);
    int32_t *slots = malloc(n * sizeof(*slots)), n_written = 0;
    for (int32_t i = 0; i < s->context[q]; i++) {
        int32_t block = b->block_table[q * b->params.max_blocks + i / s->block_size];
        if (block < 0) continue;
        memcpy(qkv + (size_t)n_written * row + (row - kv_row), b->kv[q] + (size_t)i * kv_row, kv_row * sizeof(float));
        slots[n_written++] = block * s->block_size + i % s->block_size;
    }
    struct rope_kv_write_params p = {
        .qkv = matrix(qkv, DTYPE_F32, (size_t)n_written, row), .cache = b->params.cache, .slot_mapping = slots,
        .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    ck_assert_int_eq(ops->rope_kv_write(device, &p, NULL), 0);
    free(qkv);
    free(slots);
}

static void batch_init(struct batch *b, const struct shape *s, struct device *device)
{
    *b = (struct batch){.shape = *s};
    int32_t n_blocks = 3;
    for (int32_t q = 0; q < s->n_seqs; q++) {
        int32_t blocks = (s->context[q] + s->block_size - 1) / s->block_size;
        n_blocks += blocks;
        if (blocks > b->params.max_blocks) b->params.max_blocks = blocks;
        b->kv[q] = rng_normals((size_t)s->context[q] * 2 * (size_t)(s->n_kv_heads * s->head_dim), 1);
        b->cu_seqlens_q[q + 1] = b->cu_seqlens_q[q] + s->n_q[q];
    }
    b->n_tokens = b->cu_seqlens_q[s->n_seqs];
    size_t tokens = (size_t)b->n_tokens, dim = (size_t)s->head_dim;
    size_t row = (size_t)(s->n_heads + 2 * s->n_kv_heads) * dim;
    size_t cache = (size_t)(n_blocks * s->n_kv_heads * s->block_size) * dim;
    b->block_table = malloc((size_t)(s->n_seqs * b->params.max_blocks) * sizeof(int32_t));
    b->qkv = rng_normals(tokens * row, 1);
    b->out = poisoned(tokens * (size_t)s->n_heads * dim);
    b->slopes = malloc((size_t)s->n_heads * sizeof(float));
    for (int32_t h = 0; h < s->n_heads; h++) b->slopes[h] = exp2f(-8.0f * (float)(h + 1) / (float)s->n_heads);
    b->k = poisoned(cache), b->v = poisoned(cache); // all ones: NaN in every type
    struct tensor tiles = {.dtype = s->dtype, .n_dims = 4,
                           .shape = {(size_t)n_blocks, (size_t)s->n_kv_heads, (size_t)s->block_size, dim}};
    struct attention_params *p = &b->params;
    p->cache.k = p->cache.v = tiles;
    p->cache.k.data = b->k, p->cache.v.data = b->v;
    p->out = matrix(b->out, DTYPE_F32, tokens, (size_t)s->n_heads * dim);
    p->qkv = matrix(b->qkv, DTYPE_F32, tokens, row);
    p->cu_seqlens_q = b->cu_seqlens_q, p->context_lens = b->shape.context, p->block_table = b->block_table;
    p->n_seqs = s->n_seqs, p->block_size = s->block_size, p->window = s->window;
    p->n_heads = s->n_heads, p->n_kv_heads = s->n_kv_heads, p->head_dim = s->head_dim;
    p->scale = 1 / sqrtf((float)s->head_dim), p->softcap = s->softcap;
    p->alibi_slopes = s->alibi ? b->slopes : NULL;
    place_blocks(b, n_blocks);
    for (int32_t q = 0; q < s->n_seqs; q++) write_sequence(b, device, q);
}

static void batch_deinit(struct batch *b)
{
    for (int32_t q = 0; q < b->shape.n_seqs; q++) free(b->kv[q]);
    free(b->block_table);
    free(b->qkv);
    free(b->out);
    free(b->slopes);
    free(b->k);
    free(b->v);
}

// ---- double precision -----------------------------------------------------------------------------------------------

static void exact_row(const struct batch *b, int32_t seq, int32_t query, int32_t head, double *out)
{
    const struct shape *s = &b->shape;
    int32_t position = s->context[seq] - s->n_q[seq] + query, kv_head = head / (s->n_heads / s->n_kv_heads);
    int32_t first = s->window && position >= s->window ? position - s->window + 1 : 0;
    const float *q = b->qkv + (size_t)(b->cu_seqlens_q[seq] + query) * b->params.qkv.shape[1] + head * s->head_dim;
    double *scores = malloc((size_t)(position + 1) * sizeof(*scores)), max = -INFINITY, sum = 0;
    for (int32_t key = first; key <= position; key++) {
        const float *k = b->kv[seq] + kv_index(s, key, 0, kv_head);
        double x = 0;
        for (int32_t i = 0; i < s->head_dim; i++) x += (double)q[i] * rounded(k[i], s->dtype);
        x /= sqrt(s->head_dim);
        if (s->softcap > 0) x = s->softcap * tanh(x / s->softcap);
        if (s->alibi) x += b->slopes[head] * (double)(key - position);
        scores[key] = x;
        max = fmax(max, x);
    }
    for (int32_t i = 0; i < s->head_dim; i++) out[i] = 0;
    for (int32_t key = first; key <= position; key++) {
        const float *v = b->kv[seq] + kv_index(s, key, 1, kv_head);
        double weight = exp(scores[key] - max);
        sum += weight;
        for (int32_t i = 0; i < s->head_dim; i++) out[i] += weight * rounded(v[i], s->dtype);
    }
    for (int32_t i = 0; i < s->head_dim; i++) out[i] /= sum;
    free(scores);
}

static double *exact(const struct batch *b)
{
    double *out = malloc((size_t)(b->n_tokens * b->shape.n_heads * b->shape.head_dim) * sizeof(*out));
    for (int32_t q = 0; q < b->shape.n_seqs; q++)
        for (int32_t i = 0; i < b->shape.n_q[q]; i++)
            for (int32_t h = 0; h < b->shape.n_heads; h++)
                exact_row(b, q, i, h, out + ((b->cu_seqlens_q[q] + i) * b->shape.n_heads + h) * b->shape.head_dim);
    return out;
}

static void compare(const struct batch *b, const double *expected, const char *what)
{
    size_t n = (size_t)(b->n_tokens * b->shape.n_heads * b->shape.head_dim);
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        CHECK_MSG(fabs(b->out[i] - expected[i]) < 2e-5, "%s: [%zu] %g instead of %g (D %d, block %d, window %d)", what,
                      i, b->out[i], expected[i], b->shape.head_dim, b->shape.block_size, b->shape.window);
        error += (b->out[i] - expected[i]) * (b->out[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    ck_assert_msg(sqrt(error / norm) < 1e-6, "%s: relative error %g", what, sqrt(error / norm));
}

// ---- tests ----------------------------------------------------------------------------------------------------------

static void check_accuracy(const struct shape *s)
{
    struct batch b;
    struct device *plain = device_open("generic", 2, true);
    batch_init(&b, s, plain);
    double *expected = exact(&b);
    size_t out_bytes = b.params.out.shape[0] * b.params.out.shape[1] * sizeof(float);
    ck_assert_int_eq(ops->attention(plain, &b.params, NULL), 0);
    compare(&b, expected, "reference");
    ops->device_destroy(plain);
    for (int32_t i = 0; i < N_ISA_NAMES; i++) {
        struct device *device = device_open(isa_names[i], 2, false);
        if (!device) continue;
        memset(b.out, 0xff, out_bytes);
        ck_assert_int_eq(ops->attention(device, &b.params, NULL), 0);
        compare(&b, expected, isa_names[i]);
        ops->device_destroy(device);
    }
    free(expected);
    batch_deinit(&b);
}

// Sequences of edge lengths: decodes, whole prompts, chunks behind a context.
static struct shape random_shape(int32_t block_size, enum dtype dtype)
{
    static const int32_t dims[] = {64, 12, 20, 80, 128, 256, 8, 96, 40, 1}, groups[] = {1, 2, 8, 3};
    struct shape s = {.block_size = block_size, .dtype = dtype};
    s.head_dim = dims[rng_below(10)];
    s.n_kv_heads = 1 + rng_below(2);
    s.n_heads = s.n_kv_heads * groups[rng_below(4)];
    const int32_t lengths[] = {1, block_size - 1, block_size, block_size + 1, 3 * block_size, 1 + rng_below(200)};
    s.n_seqs = 6;
    for (int32_t q = 0; q < 6; q++) {
        s.context[q] = lengths[q];
        s.n_q[q] = q % 3 == 0 ? 1 : q % 3 == 1 ? s.context[q] : 1 + rng_below(s.context[q]);
    }
    s.window = rng_below(2) ? 1 + rng_below(2 * block_size) : 0;
    s.softcap = rng_below(3) ? 0 : 2.5f;
    s.alibi = rng_below(3) == 0;
    return s;
}

START_TEST(test_ragged_batches)
{
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    for (int32_t i = 0; i < 36; i++) {
        struct shape s = random_shape(i / 3 % 2 ? 64 : 16, dtypes[i % 3]);
        check_accuracy(&s);
    }
}
END_TEST

START_TEST(test_long_contexts)
{
    struct shape s = {.n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .block_size = 64, .dtype = DTYPE_BF16, .n_seqs = 3,
                      .n_q = {1, 70, 3}, .context = {1009, 1000, 4300}};
    check_accuracy(&s);
    s.window = 300, s.alibi = true, s.dtype = DTYPE_F16;
    check_accuracy(&s);
}
END_TEST

START_TEST(test_more_heads_than_one_item_holds)
{
    struct shape s = {.n_heads = 150, .n_kv_heads = 1, .head_dim = 16, .block_size = 16, .dtype = DTYPE_F32,
                      .n_seqs = 2, .n_q = {5, 1}, .context = {33, 40}};
    check_accuracy(&s);
}
END_TEST

// Runs sequence q's queries first .. first+n-1 as a batch of their own; into out [n, H * D].
static void run_alone(const struct batch *b, struct device *device, int32_t q, int32_t first, int32_t n, float *out)
{
    struct attention_params p = b->params;
    int32_t cu_seqlens_q[] = {0, n}, context = b->shape.context[q] - b->shape.n_q[q] + first + n;
    size_t row = (size_t)(b->cu_seqlens_q[q] + first);
    p.qkv = matrix(b->qkv + row * p.qkv.shape[1], DTYPE_F32, (size_t)n, p.qkv.shape[1]);
    p.out = matrix(out, DTYPE_F32, (size_t)n, p.out.shape[1]);
    p.cu_seqlens_q = cu_seqlens_q, p.context_lens = &context, p.n_seqs = 1;
    p.block_table = b->block_table + q * p.max_blocks;
    ck_assert_int_eq(ops->attention(device, &p, NULL), 0);
}

static void check_same_bits(const struct shape *s, const char *isa)
{
    struct device *one = device_open(isa, 1, false), *two = device_open(isa, 2, false);
    if (!one) return;
    struct batch b;
    batch_init(&b, s, one);
    size_t row = b.params.out.shape[1];
    ck_assert_int_eq(ops->attention(two, &b.params, NULL), 0);
    for (int32_t q = 0; q < s->n_seqs; q++)
        for (int32_t max_chunk = 1; max_chunk <= 256; max_chunk *= 4)
            for (int32_t first = 0, n; first < s->n_q[q]; first += n) {
                n = 1 + rng_below(max_chunk);
                if (n > s->n_q[q] - first) n = s->n_q[q] - first;
                float *out = poisoned((size_t)n * row);
                run_alone(&b, first % 2 ? one : two, q, first, n, out);
                ck_assert_msg(memcmp(out, b.out + (size_t)(b.cu_seqlens_q[q] + first) * row,
                                     (size_t)n * row * sizeof(float)) == 0, "%s: D %d, group %d, chunk %d + %d differs",
                              isa, s->head_dim, s->n_heads / s->n_kv_heads, first, n);
                free(out);
            }
    batch_deinit(&b);
    ops->device_destroy(one);
    ops->device_destroy(two);
}

START_TEST(test_same_bits_alone_batched_chunked)
{
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    for (int32_t i = 0; i < 4 * N_ISA_NAMES; i++) {
        struct shape s = random_shape(i % 3 ? 64 : 16, dtypes[rng_below(3)]);
        check_same_bits(&s, isa_names[i % N_ISA_NAMES]);
    }
}
END_TEST

// A token that overflowed must not reach the rows before it in its chunk.
START_TEST(test_later_tokens_do_not_matter)
{
    for (int32_t i = 0; i < 8; i++) {
        struct shape s = {.n_heads = 1 << i % 4, .n_kv_heads = 1, .head_dim = 32, .block_size = 16,
                          .window = i < 4 ? 0 : 7, .dtype = DTYPE_BF16, .n_seqs = 1, .n_q = {40}, .context = {40}};
        struct device *device = device_open(NULL, 2, false);
        struct batch b;
        batch_init(&b, &s, device);
        size_t bytes = 40 * b.params.out.shape[1] * sizeof(float);
        ck_assert_int_eq(ops->attention(device, &b.params, NULL), 0);
        float *clean = malloc(bytes);
        memcpy(clean, b.out, bytes);
        int32_t bad = 20 + rng_below(12);
        for (size_t j = kv_index(&s, bad, 0, 0); j < kv_index(&s, bad + 1, 0, 0); j++) b.kv[0][j] = NAN;
        write_sequence(&b, device, 0);
        ck_assert_int_eq(ops->attention(device, &b.params, NULL), 0);
        size_t row = b.params.out.shape[1];
        ck_assert_int_eq(memcmp(clean, b.out, (size_t)bad * row * sizeof(float)), 0);
        ck_assert(isnan(b.out[(size_t)bad * row]));
        if (s.window) // those that see it no more
            ck_assert_int_eq(memcmp(clean + (size_t)(bad + 7) * row, b.out + (size_t)(bad + 7) * row,
                                    (size_t)(40 - bad - 7) * row * sizeof(float)), 0);
        free(clean);
        batch_deinit(&b);
        ops->device_destroy(device);
    }
}
END_TEST

START_TEST(test_shapes_that_do_not_fit)
{
    struct shape s = {.n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .block_size = 16, .dtype = DTYPE_F32, .n_seqs = 1,
                      .n_q = {3}, .context = {30}};
    struct device *device = device_open(NULL, 1, false);
    struct batch b;
    batch_init(&b, &s, device);
    struct error e;
    struct attention_params p = b.params;
    p.n_kv_heads = 3;
    ck_assert_int_eq(ops->attention(device, &p, &e), ERR_INVALID);
    p = b.params, p.max_blocks = 1;
    ck_assert_int_eq(ops->attention(device, &p, &e), ERR_INVALID);
    p = b.params, p.cache.v.shape[0] = 1;
    ck_assert_int_eq(ops->attention(device, &p, &e), ERR_INVALID);
    b.block_table[1] = -1;
    ck_assert_int_eq(ops->attention(device, &b.params, &e), ERR_INVALID);
    batch_deinit(&b);
    ops->device_destroy(device);
}
END_TEST

int main(void)
{
    ops = kernels_cpu();
    Suite *suite = suite_create("attention");
    TCase *tcase = tcase_create("flash");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_ragged_batches);
    tcase_add_test(tcase, test_long_contexts);
    tcase_add_test(tcase, test_more_heads_than_one_item_holds);
    tcase_add_test(tcase, test_same_bits_alone_batched_chunked);
    tcase_add_test(tcase, test_later_tokens_do_not_matter);
    tcase_add_test(tcase, test_shapes_that_do_not_fit);
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
