/* test_cuda_attention.c: the C interface of kernels/flash_attention.h against a plain softmax in double precision, on
 * small ragged batches: prefill over dense and paged keys, decode, every option. No PyTorch, and short: for sanitizers.
 * (tests/gpu/attention_check.py is the thorough check, and the one against other implementations.)
 *
 * Cache slots that hold no key of the sequence are NaN, and so are outputs before the call.
 */
#include <dlfcn.h>

#include "kernels/flash_attention.h"
#include "tests/kernel_helpers.h"

enum { MAX_SEQS = 6, MAX_HEADS = 16, MAX_CONTEXT = 1300, MAX_BLOCKS = (MAX_CONTEXT + 15) / 16, SPARE_BLOCKS = 3 };

static const struct kernels *gpu;
static struct device *device;
static struct error e;
static int (*prefill)(const struct flash_attention_params *, struct CUstream_st *);
static int (*decode)(const struct flash_attention_params *, struct CUstream_st *);
static size_t (*scratch_bytes)(const struct flash_attention_params *);
static int (*synchronize)(void);

static void check(int rc)
{
    CHECK_MSG(rc == 0, "%s", e.message);
}

static void *symbol(const char *library, const char *name, int flags)
{
    void *handle = dlopen(library, RTLD_NOW | flags), *found = handle ? dlsym(handle, name) : NULL;
    CHECK_MSG(found != NULL, "%s in %s: %s", name, library, dlerror());
    return found;
}

static void open_device(void)
{
    struct device_options o = {.max_vocab_size = 1000, .max_context = MAX_CONTEXT, .max_dim = 1024, .max_tokens = 64,
                               .max_seqs = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 64, .block_size = 64};
    check(kernels_open(&gpu, "cuda", &e));
    check(gpu->device_create(&device, &o, &e));
    *(void **)&prefill = symbol("libgptd_cuda.so", "gptd_flash_attention_prefill", RTLD_NOLOAD);
    *(void **)&decode = symbol("libgptd_cuda.so", "gptd_flash_attention_decode", RTLD_NOLOAD);
    *(void **)&scratch_bytes = symbol("libgptd_cuda.so", "gptd_flash_attention_scratch_bytes", RTLD_NOLOAD);
    *(void **)&synchronize = symbol("libcuda.so.1", "cuCtxSynchronize", 0);
    printf("%s\n", gpu->device_description(device));
}

static void close_device(void)
{
    gpu->device_destroy(device);
}

// ---- a problem ------------------------------------------------------------------------------------------------------

// A batch in F32, holding what 16 bits hold, and the options. KV tokens of sequence s are rows cu_k[s] .. cu_k[s+1] of k, v.
struct problem {
    enum dtype dtype;
    int32_t n_seqs, n_heads, n_kv_heads, head_dim, block_size;
    int32_t cu_q[MAX_SEQS + 1], cu_k[MAX_SEQS + 1], context[MAX_SEQS], table[MAX_SEQS * MAX_BLOCKS], n_blocks;
    int32_t causal, left, right;
    float scale, softcap, slopes[MAX_HEADS];
    bool has_slopes;
    float *q, *k, *v;    // [T, H, D], [all contexts, KV, D]
    float *out, *lse;    // [T, H, D], [T, H]: what must come out
};

static float *rounded_normals(enum dtype dtype, size_t n)
{
    void *bits = random_elements(dtype, n);
    float *x = malloc(n * sizeof *x);
    dtype_convert(x, DTYPE_F32, bits, dtype, n);
    free(bits);
    return x;
}

// decode: one query a sequence and, as it wants, causal.
static void problem_draw(struct problem *p, int32_t round, bool for_decode)
{
    static const int32_t heads[][2] = {{4, 2}, {8, 1}, {3, 3}, {16, 4}, {6, 2}, {1, 1}};
    static const int32_t dims[] = {64, 80, 96, 128, 256, 8, 40, 168};
    *p = (struct problem){.dtype = round % 2 ? DTYPE_F16 : DTYPE_BF16, .n_seqs = 1 + rng_below(MAX_SEQS),
                          .n_heads = heads[round % 6][0], .n_kv_heads = heads[round % 6][1], .head_dim = dims[round % 8],
                          .block_size = 16 << rng_below(3), .causal = for_decode || rng_below(4) != 0,
                          .left = rng_below(2) ? rng_below(400) : -1, .right = rng_below(2) ? rng_below(50) : -1,
                          .softcap = rng_below(3) ? 0 : 20, .has_slopes = rng_below(3) == 0};
    p->scale = 1 / sqrtf((float)p->head_dim);
    for (int32_t h = 0; h < p->n_heads; h++) p->slopes[h] = 0.5f / (float)(1 << h % 8);
    for (int32_t s = 0; s < p->n_seqs; s++) {
        int32_t n_q = for_decode ? 1 : 1 + rng_below(rng_below(2) ? 8 : 90), most = rng_below(3) ? 200 : MAX_CONTEXT;
        p->context[s] = n_q + rng_below(most - n_q);
        p->cu_q[s + 1] = p->cu_q[s] + n_q, p->cu_k[s + 1] = p->cu_k[s] + p->context[s];
        for (int32_t b = 0; b < MAX_BLOCKS; b++)
            p->table[s * MAX_BLOCKS + b] = b * p->block_size < p->context[s] ? p->n_blocks++ : -1;
    }
    p->n_blocks += SPARE_BLOCKS;
    size_t n_q = (size_t)(p->cu_q[p->n_seqs] * p->n_heads), n_k = (size_t)(p->cu_k[p->n_seqs] * p->n_kv_heads);
    p->q = rounded_normals(p->dtype, n_q * (size_t)p->head_dim), p->k = rounded_normals(p->dtype, n_k * (size_t)p->head_dim);
    p->v = rounded_normals(p->dtype, n_k * (size_t)p->head_dim);
    p->out = malloc(n_q * (size_t)p->head_dim * sizeof *p->out), p->lse = malloc(n_q * sizeof *p->lse);
}

static void problem_free(struct problem *p)
{
    free(p->q), free(p->k), free(p->v), free(p->out), free(p->lse);
}

static double score_of(const struct problem *p, const float *q, const float *k, int32_t head, int32_t distance)
{
    double x = 0;
    for (int32_t d = 0; d < p->head_dim; d++) x += (double)q[d] * k[d];
    x *= p->scale;
    if (p->softcap > 0) x = p->softcap * tanh(x / p->softcap);
    return p->has_slopes ? x + (double)p->slopes[head] * distance : x;
}

// Row t, query i of sequence s, of head h.
static void solve_row(struct problem *p, int32_t s, int32_t t, int32_t h)
{
    const int32_t D = p->head_dim, L = p->context[s], position = L - (p->cu_q[s + 1] - t);
    const int32_t kv_head = h / (p->n_heads / p->n_kv_heads), right = p->causal ? 0 : p->right;
    const int32_t first = p->left >= 0 && position > p->left ? position - p->left : 0;
    const int32_t end = right >= 0 && position + right + 1 < L ? position + right + 1 : L;
    double sum = 0, out[256] = {0};
    for (int32_t j = first; j < end; j++) {
        size_t row = ((size_t)(p->cu_k[s] + j) * (size_t)p->n_kv_heads + (size_t)kv_head) * (size_t)D;
        double weight = exp(score_of(p, p->q + ((size_t)t * (size_t)p->n_heads + (size_t)h) * (size_t)D, p->k + row, h,
                                     j - position));
        sum += weight;
        for (int32_t d = 0; d < D; d++) out[d] += weight * p->v[row + (size_t)d];
    }
    for (int32_t d = 0; d < D; d++) p->out[(t * p->n_heads + h) * D + d] = (float)(out[d] / sum);
    p->lse[t * p->n_heads + h] = (float)log(sum);
}

static void solve(struct problem *p)
{
    for (int32_t s = 0; s < p->n_seqs; s++)
        for (int32_t t = p->cu_q[s]; t < p->cu_q[s + 1]; t++)
            for (int32_t h = 0; h < p->n_heads; h++) solve_row(p, s, t, h);
}

// ---- on the device --------------------------------------------------------------------------------------------------

enum { MAX_ARRAYS = 16 };

// What a call was given, to be freed.
struct call {
    struct flash_attention_params f;
    void *arrays[MAX_ARRAYS];
    int32_t n_arrays;
    size_t out_bytes, lse_bytes, width; // width: of a row of out, elements
};

static void *upload(struct call *c, const void *from, size_t bytes)
{
    void *to = gpu->alloc(device, bytes);
    CHECK_MSG(to != NULL && c->n_arrays < MAX_ARRAYS, "no memory for %zu bytes", bytes);
    if (from) check(gpu->copy_in(device, to, from, bytes, &e));
    return c->arrays[c->n_arrays++] = to;
}

// Rows of `width` elements every `stride`, NaN between them.
static void *upload_rows(struct call *c, const struct problem *p, const float *x, size_t rows, size_t width, size_t stride)
{
    uint16_t *bits = memset(malloc(rows * stride * 2), 0xFF, rows * stride * 2);
    for (size_t r = 0; r < rows; r++) dtype_convert(bits + r * stride, p->dtype, x + r * width, DTYPE_F32, width);
    void *to = upload(c, bits, rows * stride * 2);
    free(bits);
    return to;
}

static void *upload_pages(struct call *c, const struct problem *p, const float *x)
{
    const size_t D = (size_t)p->head_dim, KV = (size_t)p->n_kv_heads, B = (size_t)p->block_size;
    size_t bytes = (size_t)p->n_blocks * KV * B * D * 2;
    uint16_t *bits = memset(malloc(bytes), 0xFF, bytes);
    for (int32_t s = 0; s < p->n_seqs; s++)
        for (int32_t j = 0; j < p->context[s]; j++)
            for (size_t h = 0; h < KV; h++) {
                size_t block = (size_t)p->table[s * MAX_BLOCKS + j / p->block_size], slot = (size_t)(j % p->block_size);
                dtype_convert(bits + ((block * KV + h) * B + slot) * D, p->dtype,
                              x + ((size_t)(p->cu_k[s] + j) * KV + h) * D, DTYPE_F32, D);
            }
    void *to = upload(c, bits, bytes);
    free(bits);
    return to;
}

static void call_open(struct call *c, const struct problem *p, bool paged)
{
    const size_t D = (size_t)p->head_dim, H = (size_t)p->n_heads, KV = (size_t)p->n_kv_heads, seqs = (size_t)p->n_seqs;
    const size_t T = (size_t)p->cu_q[p->n_seqs], K = (size_t)p->cu_k[p->n_seqs], size = sizeof(int32_t);
    struct flash_attention_params *f = &c->f;
    *c = (struct call){.width = H * D};
    f->out_stride = H * D + 8 * (size_t)rng_below(3), f->q_stride = (H + 2 * KV) * D;
    f->out_head_stride = f->q_head_stride = D;
    c->out_bytes = T * f->out_stride * 2, c->lse_bytes = T * H * sizeof(float);
    void *nan = memset(malloc(c->out_bytes + c->lse_bytes), 0xFF, c->out_bytes + c->lse_bytes);
    f->out = upload(c, nan, c->out_bytes), f->lse = upload(c, nan, c->lse_bytes);
    free(nan);
    f->q = upload_rows(c, p, p->q, T, H * D, f->q_stride);
    f->k = paged ? upload_pages(c, p, p->k) : upload_rows(c, p, p->k, K, KV * D, KV * D);
    f->v = paged ? upload_pages(c, p, p->v) : upload_rows(c, p, p->v, K, KV * D, KV * D);
    f->kv_stride = paged ? D : KV * D, f->kv_head_stride = paged ? (size_t)p->block_size * D : D;
    f->kv_block_stride = KV * (size_t)p->block_size * D;
    f->cu_seqlens_q = upload(c, p->cu_q, (seqs + 1) * size);
    f->cu_seqlens_k = paged ? NULL : upload(c, p->cu_k, (seqs + 1) * size);
    f->context_lens = paged ? upload(c, p->context, seqs * size) : NULL;
    f->block_table = paged ? upload(c, p->table, seqs * MAX_BLOCKS * size) : NULL;
    f->alibi_slopes = p->has_slopes ? upload(c, p->slopes, H * sizeof(float)) : NULL;
    f->tickets = upload(c, NULL, seqs * H * size);
    f->dtype = p->dtype == DTYPE_BF16 ? FLASH_ATTENTION_BF16 : FLASH_ATTENTION_F16;
    f->n_seqs = p->n_seqs, f->n_tokens = (int32_t)T, f->n_kv = paged ? p->n_blocks : (int32_t)K,
    f->n_heads = p->n_heads, f->n_kv_heads = p->n_kv_heads;
    f->head_dim = p->head_dim, f->block_size = p->block_size, f->max_blocks = MAX_BLOCKS, f->max_context = MAX_CONTEXT;
    f->causal = p->causal, f->window_left = p->left, f->window_right = p->right;
    f->scale = p->scale, f->softcap = p->softcap;
}

// What the call put out: rows of c->width elements, and lse.
static void call_close(struct call *c, uint16_t *out, float *lse)
{
    ck_assert_int_eq(synchronize(), 0);
    uint16_t *rows = malloc(c->out_bytes);
    check(gpu->copy_out(device, rows, c->f.out, c->out_bytes, &e));
    check(gpu->copy_out(device, lse, c->f.lse, c->lse_bytes, &e));
    for (size_t t = 0; t < (size_t)c->f.n_tokens; t++)
        memcpy(out + t * c->width, rows + t * c->f.out_stride, c->width * sizeof *out);
    free(rows);
    for (int32_t i = 0; i < c->n_arrays; i++) gpu->free(device, c->arrays[i]);
}

// Four roundings to the type, as the ops' suite allows; lse is F32 all along.
static void expect_solved(const struct problem *p, const uint16_t *out, const float *lse, int32_t round, const char *what)
{
    const size_t rows = (size_t)(p->cu_q[p->n_seqs] * p->n_heads), n = rows * (size_t)p->head_dim;
    float *values = malloc(n * sizeof *values);
    double difference = 0, norm = 0, unit = p->dtype == DTYPE_BF16 ? 0x1p-9 : 0x1p-12, worst = 0;
    dtype_convert(values, DTYPE_F32, out, p->dtype, n);
    for (size_t i = 0; i < n; i++) difference += pow((double)values[i] - p->out[i], 2), norm += pow(p->out[i], 2);
    for (size_t i = 0; i < rows; i++) worst = fmax(worst, isnan(lse[i]) ? INFINITY : fabs((double)lse[i] - p->lse[i]));
    free(values);
    double distance = sqrt(difference / norm);
    CHECK_MSG(distance <= 4 * unit && worst <= 1e-3,
              "%s, round %d: %s, %d/%d heads of %d, blocks of %d, causal %d, window %d %d, softcap %g, slopes %d: %g away, "
              "lse %g", what, round, dtype_name(p->dtype), p->n_heads, p->n_kv_heads, p->head_dim, p->block_size, p->causal,
              p->left, p->right, (double)p->softcap, p->has_slopes, distance, worst);
}

START_TEST(prefill_dense_and_paged)
{
    for (int32_t round = 0; round < (is_short() ? 8 : 48); round++) {
        static struct problem p;
        struct call c;
        problem_draw(&p, round, false);
        solve(&p);
        const size_t rows = (size_t)(p.cu_q[p.n_seqs] * p.n_heads), n = rows * (size_t)p.head_dim;
        uint16_t *dense = malloc(n * 2), *paged = malloc(n * 2);
        float *lse = malloc(rows * sizeof *lse);
        call_open(&c, &p, false);
        ck_assert_int_eq(prefill(&c.f, NULL), 0);
        call_close(&c, dense, lse);
        expect_solved(&p, dense, lse, round, "dense");
        call_open(&c, &p, true);
        ck_assert_int_eq(prefill(&c.f, NULL), 0);
        call_close(&c, paged, lse);
        expect_solved(&p, paged, lse, round, "paged");
        CHECK_MSG(!memcmp(dense, paged, n * 2), "round %d: paged and dense keys give other bits", round);
        free(dense), free(paged), free(lse);
        problem_free(&p);
    }
}
END_TEST

// The whole scratch, and room for one sequence at a time: the same bits.
START_TEST(decode_with_much_and_little_scratch)
{
    for (int32_t round = 0; round < (is_short() ? 8 : 48); round++) {
        static struct problem p;
        struct call c;
        problem_draw(&p, round, true);
        solve(&p);
        const size_t rows = (size_t)(p.n_seqs * p.n_heads), n = rows * (size_t)p.head_dim;
        uint16_t *out[2] = {malloc(n * 2), malloc(n * 2)};
        float *lse = malloc(rows * sizeof *lse);
        for (int32_t little = 0; little < 2; little++) {
            call_open(&c, &p, true);
            struct flash_attention_params one = c.f;
            if (little) one.n_seqs = 1;
            c.f.scratch_bytes = scratch_bytes(&one);
            c.f.scratch = upload(&c, NULL, c.f.scratch_bytes);
            if (round % 2) c.f.cu_seqlens_q = NULL;
            c.f.settled = round / 2 % 2;
            ck_assert_int_eq(decode(&c.f, NULL), 0);
            call_close(&c, out[little], lse);
            expect_solved(&p, out[little], lse, round, little ? "decode, little scratch" : "decode");
        }
        CHECK_MSG(!memcmp(out[0], out[1], n * 2), "round %d: scratch changes the bits", round);
        free(out[0]), free(out[1]), free(lse);
        problem_free(&p);
    }
}
END_TEST

// One batch, two calls: each takes its sequences and leaves the others' rows alone.
START_TEST(prefill_and_decode_share_a_batch)
{
    for (int32_t round = 0; round < (is_short() ? 3 : 12); round++) {
        static struct problem p;
        struct call c;
        do {
            problem_draw(&p, round, false);
            if (p.causal) break;
            problem_free(&p);
        } while (true);
        solve(&p);
        const size_t rows = (size_t)(p.cu_q[p.n_seqs] * p.n_heads);
        uint16_t *out = malloc(rows * (size_t)p.head_dim * 2);
        float *lse = malloc(rows * sizeof *lse);
        call_open(&c, &p, true);
        c.f.scratch_bytes = scratch_bytes(&c.f);
        c.f.scratch = upload(&c, NULL, c.f.scratch_bytes);
        c.f.skip_queries = 1;
        ck_assert_int_eq(decode(&c.f, NULL), 0);
        ck_assert_int_eq(prefill(&c.f, NULL), 0);
        call_close(&c, out, lse);
        expect_solved(&p, out, lse, round, "both");
        free(out), free(lse);
        problem_free(&p);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda attention");
    TCase *tcase = tcase_create("cuda attention");
    tcase_set_timeout(tcase, 0);
    tcase_add_unchecked_fixture(tcase, open_device, close_device);
    tcase_add_test(tcase, prefill_dense_and_paged);
    tcase_add_test(tcase, decode_with_much_and_little_scratch);
    tcase_add_test(tcase, prefill_and_decode_share_a_batch);
    suite_add_tcase(suite, tcase);
    return suite_run(suite);
}
