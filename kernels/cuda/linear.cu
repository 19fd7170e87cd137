/* linear.cu: out[T, N] = x[T, K] w[N, K]^T (+ bias) (+ out).
 *
 * Few rows of x: linear_few.cu. More: cuBLASLt, F32 accumulation, the first algorithm of its heuristic (kept, never timed)
 * for the shape, of which the rows count in classes: asking takes a quarter of a millisecond, and prompts have every length.
 * Deterministic: a row's bits are the same alone and in any batch, as each element is one chain of products: of few rows in
 * linear_chain.cu, of more in algorithms of cuBLASLt that have its bits, which is seen by comparing (has_chain_bits). Where
 * none has, or rows are no multiple of 16 bytes, one algorithm does any number of rows. To be asked at all an algorithm must
 * add up an element in one loop over K: no split-K, and no workspace that could hold the partial sums of a shared loop
 * (counters of tiles that have been handed out are there).
 * Parts of a weight that lie one after the other in memory, with one type and alike in bias, are one product.
 */
#include <cublasLt.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_few.cuh"
#include "kernels/cuda/types.cuh"

enum {
    MAX_ALGOS = 1024,
    WORKSPACE_BYTES = 32 << 20,
    COUNTER_BYTES = 256,   // deterministic: all that an algorithm may have of workspace
    CLASS_WIDTH = 8,       // rows; of two classes an octave an algorithm took up to 1.47 times as long, at 264 rows
    LEAST_CLASS = 16,      // the first: 1 to 16 rows
    ANY_ROWS = 0,
    FIXED_ROWS = 256,      // deterministic: the number of rows that an algorithm for any number is chosen for
    CHECKED_ROWS = 8,      // of x, where bits are compared
    CHECKED_COLUMNS = 240, // of out, and what N is beyond a multiple of 16
    CHECK_ALIGNMENT = 4096,
    BIAS_ALIGNMENT = 16,
    MAX_CANDIDATES = 32,   // deterministic: of which the first that does is taken
};

// One matrix: a run of parts that lie together.
struct product {
    const void *w, *bias;
    enum dtype dtype, bias_dtype;
    size_t n_rows, column; // column of out where it begins
};

struct gemm_key {
    size_t T, N, K, ldo;   // T: the most rows of its class; ANY_ROWS: of an algorithm for any number
    enum dtype x, out;
    uint32_t out_alignment; // bytes
    bool accumulate, biased; // biased: by the product itself, from a bias of out's type at a multiple of BIAS_ALIGNMENT
    bool may_chain;         // deterministic: linear_chain.cu can do it
};

struct algo {
    struct gemm_key key;
    cublasLtMatmulAlgo_t algo;
    bool used;
    bool chain; // it has a chain's bits
};

struct cublas {
    cublasLtHandle_t handle;
    cublasStatus_t status; // of its creation: whoever wants a product is told
    void *workspace;
    pthread_t first_ask;   // of the heuristic, which takes a tenth of a second: it is over by the time weights are loaded
    bool asking;
    cudaStream_t aside;    // deterministic: for comparisons, which a step that is being recorded leaves out
    struct algo algos[MAX_ALGOS]; // hashed by shape; a newcomer takes the place of what is there
};

// ---- cuBLASLt -------------------------------------------------------------------------------------------------------

static cudaDataType_t cuda_type(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? CUDA_R_16BF : dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static int blas_check(cublasStatus_t status, const char *what, struct error *e)
{
    if (status == CUBLAS_STATUS_SUCCESS) return 0;
    return error_set(e, ERR_DEVICE, "linear: %s: %s", what, cublasLtGetStatusString(status));
}

struct gemm {
    cublasLtMatmulDescOpaque_t op;
    cublasLtMatrixLayoutOpaque_t w, x, out;
};

// Our row-major out[T, N] is cuBLAS's column-major [N, T]: w^T (its [K, N]) times x (its [K, T]).
static int describe(struct gemm *g, const struct gemm_key *k, struct error *e)
{
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = k->biased ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    const void *aligned = (const void *)BIAS_ALIGNMENT; // what the heuristic is told of the place
    cublasStatus_t s = cublasLtMatmulDescInit(&g->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!s) s = cublasLtMatmulDescSetAttribute(&g->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    if (!s) s = cublasLtMatmulDescSetAttribute(&g->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (!s && k->biased)
        s = cublasLtMatmulDescSetAttribute(&g->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &aligned, sizeof aligned);
    if (!s) s = cublasLtMatrixLayoutInit(&g->w, cuda_type(k->x), k->K, k->N, (int64_t)k->K);
    if (!s) s = cublasLtMatrixLayoutInit(&g->x, cuda_type(k->x), k->K, k->T, (int64_t)k->K);
    if (!s) s = cublasLtMatrixLayoutInit(&g->out, cuda_type(k->out), k->N, k->T, (int64_t)k->ldo);
    return blas_check(s, "describing a product", e);
}

static size_t hash(const struct gemm_key *k)
{
    size_t h = k->T * 0x9E3779B97F4A7C15u ^ k->N * 0xC2B2AE3D27D4EB4Fu ^ k->K * 0x165667B19E3779F9u;
    h ^= (k->ldo * 4 + (size_t)k->out) * 0x27D4EB2F165667C5u ^ (size_t)k->x * 31 ^ (size_t)k->accumulate ^ (size_t)k->biased * 2 ^
         (size_t)k->may_chain * 4;
    return (h ^ h >> 29) % MAX_ALGOS;
}

static bool same_key(const struct gemm_key *a, const struct gemm_key *b)
{
    return a->T == b->T && a->N == b->N && a->K == b->K && a->ldo == b->ldo && a->x == b->x && a->out == b->out &&
           a->out_alignment == b->out_alignment && a->accumulate == b->accumulate && a->biased == b->biased &&
           a->may_chain == b->may_chain;
}

// The heuristic's algorithms for g, best first: `most` at most, n of them.
static cublasStatus_t ask_heuristic(struct cublas *c, struct gemm *g, const struct gemm_key *key, bool fixed,
                                    cublasLtMatmulHeuristicResult_t *found, int most, int *n)
{
    // Split-K: partial sums in F32, added in a fixed order.
    uint32_t reduction = fixed ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint64_t bytes = fixed ? COUNTER_BYTES : WORKSPACE_BYTES;
    const struct { cublasLtMatmulPreferenceAttributes_t name; const void *value; size_t size; } wishes[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key->out_alignment, sizeof key->out_alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key->out_alignment, sizeof key->out_alignment},
    };
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasStatus_t s = cublasLtMatmulPreferenceInit(&preference);
    for (size_t i = 0; i < sizeof wishes / sizeof *wishes && !s; i++)
        s = cublasLtMatmulPreferenceSetAttribute(&preference, wishes[i].name, wishes[i].value, wishes[i].size);
    return s ? s : cublasLtMatmulAlgoGetHeuristic(c->handle, &g->op, &g->w, &g->x, &g->out, &g->out, &preference, most,
                                                  found, n);
}

static void *ask_first(void *arg)
{
    struct device *d = (struct device *)arg;
    const struct gemm_key key = {LEAST_CLASS, 4096, 4096, 4096, DTYPE_BF16, DTYPE_BF16, 16, false, false, false};
    cublasLtMatmulHeuristicResult_t found;
    struct gemm g;
    int n;
    if (!cudaSetDevice(d->ordinal) && !describe(&g, &key, NULL)) ask_heuristic(d->cublas, &g, &key, false, &found, 1, &n);
    return NULL;
}

static void end_first_ask(struct cublas *c)
{
    if (c->asking) pthread_join(c->first_ask, NULL);
    c->asking = false;
}

// Whether the algorithm runs with each of these numbers of rows.
static bool serves(struct device *d, const struct gemm_key *key, const cublasLtMatmulAlgo_t *algo, const size_t *rows,
                   size_t n_rows, size_t workspace_bytes)
{
    for (size_t i = 0; i < n_rows; i++) {
        struct gemm_key k = *key;
        struct gemm g;
        cublasLtMatmulHeuristicResult_t result;
        k.T = rows[i];
        if (describe(&g, &k, NULL) || cublasLtMatmulAlgoCheck(d->cublas->handle, &g.op, &g.w, &g.x, &g.out, &g.out, algo,
                                                              &result) || result.workspaceSize > workspace_bytes)
            return false;
    }
    return true;
}

static bool is_one_loop(const cublasLtMatmulAlgo_t *algo)
{
    uint32_t n_splits = 0;
    size_t written;
    return !cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &n_splits, sizeof n_splits, &written) &&
           n_splits <= 1;
}

static cublasStatus_t multiply(struct device *d, struct gemm *g, const struct gemm_key *key, const struct chain_product *p,
                               const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    const float one = 1, beta = key->accumulate ? 1 : 0;
    cublasStatus_t s = CUBLAS_STATUS_SUCCESS;
    if (key->biased) s = cublasLtMatmulDescSetAttribute(&g->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    return s ? s : cublasLtMatmul(d->cublas->handle, &g->op, &one, p->w, &g->w, p->x, &g->x, &beta, p->out, &g->out, p->out,
                                  &g->out, algo, workspace, workspace_bytes, stream);
}

static struct chain_product chain_of(const struct gemm_key *key, const void *w, const void *bias, const void *x, void *out)
{
    return {w, key->biased ? bias : NULL, x, out, key->x, key->out, key->T, key->N, key->K, key->ldo, key->accumulate};
}

// ---- whether an algorithm has a chain's bits ------------------------------------------------------------------------

// Rows of K elements from -scale to scale, of many magnitudes, the same in every call. Turned: the second half of a row is the
// first half backwards, with the other sign if negative.
template <typename T>
__global__ void random_kernel(T *out, size_t n, size_t K, float scale, bool turned, bool negative)
{
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / K, k = at % K;
    bool second = turned && k >= K - K / 2;
    uint32_t x = (uint32_t)(row * K + (second ? K - 1 - k : k)) * 0x9E3779B1u ^ 0x85EBCA77u;
    x = (x ^ x >> 15) * 0x2C1B3C6Du;
    x = (x ^ x >> 12) * 0x297A2D39u;
    float u = (float)(int32_t)(x ^ x >> 15) * 0x1p-31f, value = u * u * u * scale;
    if (at < n) out[at] = from_float<T>(second && negative ? -value : value);
}

static void fill_random(enum dtype dtype, void *out, size_t rows, size_t K, float scale, bool turned, bool negative,
                        cudaStream_t stream)
{
    const size_t n = rows * K;
    FOR_ACTIVATION_TYPE(dtype, T_, random_kernel<T_><<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(
        (T_ *)out, n, K, scale, turned, negative));
}

__global__ void count_unequal_kernel(const uint16_t *a, const uint16_t *b, size_t n, uint32_t *count)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && a[i] != b[i]) atomicAdd(count, 1u);
}

// Compares the two on fewer columns; what a sum is made of does not depend on T and N, nor on the values. First each sum is
// zero but for its roundings, so that its bits tell of their order; then it is as large as what it is added to, so that they
// tell where it is rounded.
static bool has_chain_bits(struct device *d, const struct gemm_key *key, const cublasLtMatmulAlgo_t *algo)
{
    struct cublas *c = d->cublas;
    struct device aside = *d;
    struct gemm_key k = *key;
    struct gemm g;
    aside.stream = c->aside;
    k.T = CHECKED_ROWS, k.N = key->N < CHECKED_COLUMNS ? key->N : CHECKED_COLUMNS + key->N % 16;
    const size_t element = dtype_size(k.x), out_element = dtype_size(k.out), shift = k.out_alignment < 16 ? k.out_alignment : 0;
    const size_t x_bytes = k.T * k.K * element, w_bytes = k.N * k.K * element, out_bytes = k.T * k.ldo * out_element + shift;
    const size_t sizes[] = {COUNTER_BYTES, COUNTER_BYTES, sizeof(uint32_t), x_bytes, w_bytes, k.N * out_element, out_bytes,
                            out_bytes};
    char *at[sizeof sizes / sizeof *sizes], *free_from = (char *)c->workspace; // the first is what products have
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        at[i] = free_from;
        free_from += (sizes[i] + CHECK_ALIGNMENT - 1) / CHECK_ALIGNMENT * CHECK_ALIGNMENT;
    }
    if (free_from > (char *)c->workspace + WORKSPACE_BYTES || describe(&g, &k, NULL)) return false;
    struct chain_product chain = chain_of(&k, at[4], at[5], at[3], at[6] + shift), other = chain;
    other.out = at[7] + shift;
    const size_t n = k.T * k.ldo * out_element / 2;
    uint32_t n_unequal = 1;
    bool ran = !cudaMemsetAsync(at[2], 0, sizeof n_unequal, c->aside);
    for (int turned = 1; turned >= 0 && ran; turned--) {
        // The deviation of a cube is 0.378; roundings come to about 64 * 64 * 2^-24 * sqrt(K).
        const float scale = turned ? 64 : 1, added = turned ? 0x1p-6f : 0.378f * sqrtf((float)k.K);
        fill_random(k.x, at[3], k.T, k.K, scale, turned, true, c->aside);
        fill_random(k.x, at[4], k.N, k.K, scale, turned, false, c->aside);
        fill_random(k.out, at[5], 1, k.N, added, false, false, c->aside);
        for (int i = 6; i < 8; i++) fill_random(k.out, at[i] + shift, k.T, k.ldo, added, false, false, c->aside);
        ran = !linear_chain(&aside, &chain, NULL) && !multiply(d, &g, &k, &other, algo, at[1], COUNTER_BYTES, c->aside);
        count_unequal_kernel<<<(unsigned)((n + 255) / 256), 256, 0, c->aside>>>(
            (const uint16_t *)chain.out, (const uint16_t *)other.out, n, (uint32_t *)at[2]);
    }
    ran = ran && !cudaMemcpyAsync(&n_unequal, at[2], sizeof n_unequal, cudaMemcpyDeviceToHost, c->aside);
    ran = !cudaStreamSynchronize(c->aside) && ran;
    if (!ran) cudaGetLastError(); // an error that stays shows in the next op
    return ran && n_unequal == 0;
}

// Whether it has shown them for such a product before, of another class of rows.
static bool is_known(const struct cublas *c, const struct gemm_key *key, const cublasLtMatmulAlgo_t *algo)
{
    for (const struct algo *slot = c->algos; slot < c->algos + MAX_ALGOS; slot++) {
        struct gemm_key k = *key;
        k.T = slot->key.T;
        if (slot->used && slot->chain && same_key(&slot->key, &k) && !memcmp(&slot->algo, algo, sizeof *algo)) return true;
    }
    return false;
}

// ---- which algorithm ------------------------------------------------------------------------------------------------

static size_t class_end(size_t T)
{
    return T <= LEAST_CLASS ? (size_t)LEAST_CLASS : (T + CLASS_WIDTH - 1) / CLASS_WIDTH * CLASS_WIDTH;
}

// Deterministic: for any number of rows, one with a chain's bits before one without. *taken: which; `n`: there is none.
static bool find_for_any(struct device *d, const struct gemm_key *key, const cublasLtMatmulHeuristicResult_t *best, int n,
                         int *taken)
{
    const size_t rows[] = {1, 2, 7, CHECKED_ROWS, FIXED_ROWS, 1000, (size_t)d->options.max_tokens};
    int first = n;
    for (int i = 0; i < n; i++) {
        const cublasLtMatmulAlgo_t *algo = &best[i].algo;
        if (!is_one_loop(algo) || !serves(d, key, algo, rows, sizeof rows / sizeof *rows, COUNTER_BYTES)) continue;
        if (key->may_chain && has_chain_bits(d, key, algo)) return *taken = i, true;
        if (first == n) first = i;
    }
    return *taken = first, false;
}

// Deterministic: for a class of rows, with a chain's bits.
static int find_chained(struct device *d, const struct gemm_key *key, const cublasLtMatmulHeuristicResult_t *best, int n)
{
    const size_t rows[] = {key->T <= LEAST_CLASS ? 1 : key->T - CLASS_WIDTH + 1, key->T, CHECKED_ROWS};
    int i = 0;
    while (i < n && !(is_one_loop(&best[i].algo) && serves(d, key, &best[i].algo, rows, 3, COUNTER_BYTES) &&
                      (is_known(d->cublas, key, &best[i].algo) || has_chain_bits(d, key, &best[i].algo)))) i++;
    return i;
}

static int find_algo(struct device *d, const struct gemm_key *key, struct algo **found, struct error *e)
{
    struct algo *slot = &d->cublas->algos[hash(key)];
    *found = slot;
    if (slot->used && same_key(&slot->key, key)) return 0;
    end_first_ask(d->cublas);
    cublasLtMatmulHeuristicResult_t best[MAX_CANDIDATES];
    struct gemm_key shape = *key;
    struct gemm g;
    bool fixed = d->options.deterministic, chain = fixed && key->T != ANY_ROWS;
    int n = 0, i = 0;
    if (key->T == ANY_ROWS) shape.T = FIXED_ROWS;
    if (describe(&g, &shape, e)) return ERR_DEVICE;
    cublasStatus_t s = ask_heuristic(d->cublas, &g, &shape, fixed, best, fixed ? MAX_CANDIDATES : 1, &n);
    if (!s && key->T == ANY_ROWS) chain = find_for_any(d, &shape, best, n, &i);
    else if (!s && fixed) i = find_chained(d, key, best, n);
    if (!s && i == n) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (s == CUBLAS_STATUS_NOT_SUPPORTED && fixed && key->T != ANY_ROWS) { // the one for any number of rows
        struct gemm_key any = *key;
        struct algo *other;
        any.T = ANY_ROWS;
        if (find_algo(d, &any, &other, e)) return ERR_DEVICE;
        best[0].algo = other->algo, i = 0, s = CUBLAS_STATUS_SUCCESS;
    }
    if (s)
        return error_set(e, ERR_DEVICE, "linear: no algorithm for [%zu, %zu] x [%zu, %zu]%s: %s", shape.T, key->K, key->N,
                         key->K, fixed ? " that serves all numbers of rows" : "", cublasLtGetStatusString(s));
    slot->key = *key, slot->chain = chain, slot->algo = best[i].algo, slot->used = true;
    return 0;
}

// out[t][i] = bias[i], or += bias[i], for the product to be added to. One block a row.
template <typename T>
__global__ void bias_kernel(T *out, size_t ldo, const void *bias, enum dtype bias_dtype, int32_t n, bool accumulate)
{
    out += (size_t)blockIdx.x * ldo;
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = from_float<T>((accumulate ? to_float(out[i]) : 0) + load_as_float(bias, bias_dtype, i));
}

static int run_gemm(struct device *d, const struct linear_params *p, const struct product *m, struct error *e)
{
    char *out = (char *)p->out.data + m->column * dtype_size(p->out.dtype);
    uintptr_t multiple = (uintptr_t)out & -(uintptr_t)out; // the power of two that the address is a multiple of
    // A bias goes into the product's epilogue, or to where the product is added.
    bool biased = m->bias && m->bias_dtype == p->out.dtype && (uintptr_t)m->bias % BIAS_ALIGNMENT == 0;
    bool accumulate = p->accumulate || (m->bias && !biased);
    struct gemm_key key = {p->x.shape[0], m->n_rows, p->weight->n_cols, p->out.shape[1], p->x.dtype, p->out.dtype,
                           multiple < 16 ? (uint32_t)multiple : 16, accumulate, biased, false};
    struct chain_product product = chain_of(&key, m->w, m->bias, p->x.data, out);
    struct gemm g;
    struct algo *algo;
    key.may_chain = d->options.deterministic && linear_chain_fits(&product);
    if (blas_check(d->cublas->status, "cuBLASLt", e)) return ERR_DEVICE;
    struct gemm_key wanted = key;
    wanted.T = d->options.deterministic ? (size_t)ANY_ROWS : class_end(key.T);
    if (describe(&g, &key, e) || find_algo(d, &wanted, &algo, e)) return ERR_DEVICE;
    const bool chain = d->options.deterministic && algo->chain, few = key.T <= FEW_ROWS;
    wanted.T = class_end(key.T);
    if (chain && !few && find_algo(d, &wanted, &algo, e)) return ERR_DEVICE;
    if (m->bias && !biased) {
        FOR_ACTIVATION_TYPE(p->out.dtype, T_, bias_kernel<T_><<<(unsigned)key.T, 256, 0, d->stream>>>(
            (T_ *)out, key.ldo, m->bias, m->bias_dtype, (int32_t)m->n_rows, p->accumulate));
        if (launch_check("linear's bias", e)) return ERR_DEVICE;
    }
    if (chain && few) return linear_chain(d, &product, e);
    cublasStatus_t s = multiply(d, &g, &key, &product, &algo->algo, d->cublas->workspace, WORKSPACE_BYTES, d->stream);
    return blas_check(s, "a product", e) ? ERR_DEVICE : 0;
}

// ---- the op ---------------------------------------------------------------------------------------------------------

int linear_check(const struct linear_params *p, struct error *e)
{
    const struct weight *w = p->weight;
    if (w->n_parts < 1 || w->n_parts > MAX_WEIGHT_PARTS || w->n_cols < 1)
        return error_set(e, ERR_INVALID, "linear: %d parts of %zu columns", w->n_parts, w->n_cols);
    size_t n_rows = 0;
    for (int32_t i = 0; i < w->n_parts; i++) {
        if (w->part[i].dtype != p->x.dtype || w->part[i].scales)
            return error_set(e, ERR_UNSUPPORTED, "linear: part %d has %s weights%s, the activations are %s", i,
                             dtype_name(w->part[i].dtype), w->part[i].scales ? " with scales" : "", dtype_name(p->x.dtype));
        n_rows += w->part[i].n_rows;
    }
    if (p->x.n_dims != 2 || p->out.n_dims != 2 || p->x.shape[0] < 1 || p->x.shape[1] != w->n_cols ||
        p->out.shape[1] != n_rows || p->x.shape[0] != p->out.shape[0] ||
        (p->out.dtype != p->x.dtype && p->out.dtype != DTYPE_F32))
        return error_set(e, ERR_INVALID, "linear: x [%zu, %zu], weight [%zu, %zu], out [%zu, %zu]", p->x.shape[0],
                         p->x.shape[1], n_rows, w->n_cols, p->out.shape[0], p->out.shape[1]);
    return 0;
}

// The products that make up the weight. Returns how many.
static int32_t find_products(const struct weight *w, struct product products[MAX_WEIGHT_PARTS])
{
    int32_t n = 0;
    size_t column = 0;
    for (int32_t i = 0; i < w->n_parts; i++) {
        const struct weight_part *part = &w->part[i];
        struct product *last = n ? &products[n - 1] : NULL;
        const char *bias_end = last && last->bias ? (const char *)last->bias + last->n_rows * dtype_size(last->bias_dtype)
                                                  : NULL;
        bool joins = last && bias_end == part->bias.data && (!bias_end || last->bias_dtype == part->bias.dtype) &&
                     (const char *)last->w + last->n_rows * w->n_cols * dtype_size(last->dtype) == part->data;
        if (joins) last->n_rows += part->n_rows;
        else products[n++] = (struct product){part->data, part->bias.data, part->dtype, part->bias.dtype, part->n_rows,
                                              column};
        column += part->n_rows;
    }
    return n;
}

int cuda_linear(struct device *d, const struct linear_params *p, struct error *e)
{
    int rc = linear_check(p, e);
    if (rc) return rc;
    if (linear_is_few(d, p)) return linear_few(d, p, e);
    struct product products[MAX_WEIGHT_PARTS];
    int32_t n = find_products(p->weight, products);
    for (int32_t i = 0; i < n && !rc; i++) rc = run_gemm(d, p, &products[i], e);
    return rc;
}

int cuda_linear_create(struct device *d, struct error *e)
{
    d->cublas = (struct cublas *)calloc(1, sizeof *d->cublas);
    if (!d->cublas) return error_set(e, ERR_NOMEM, "device: out of memory");
    d->cublas->status = cublasLtCreate(&d->cublas->handle);
    cudaGetLastError();
    cudaError_t status = cudaMalloc(&d->cublas->workspace, WORKSPACE_BYTES);
    if (status == cudaSuccess && d->options.deterministic)
        status = cudaStreamCreateWithFlags(&d->cublas->aside, cudaStreamNonBlocking);
    d->cublas->asking = !d->cublas->status && !pthread_create(&d->cublas->first_ask, NULL, ask_first, d);
    return cuda_check(status, "linear: workspace", e);
}

void cuda_linear_destroy(struct device *d)
{
    if (!d->cublas) return;
    end_first_ask(d->cublas);
    cudaFree(d->cublas->workspace);
    if (d->cublas->aside) cudaStreamDestroy(d->cublas->aside);
    if (d->cublas->handle) cublasLtDestroy(d->cublas->handle);
    free(d->cublas);
}
