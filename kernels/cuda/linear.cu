/* linear.cu: out[T, N] = x[T, K] w[N, K]^T (+ bias) (+ out).
 *
 * Few rows of x: linear_few.cu. More: cuBLASLt, F32 accumulation, the first algorithm of its heuristic for the shape (kept,
 * never timed). Deterministic: cuBLASLt for any number of rows, with one algorithm for all of them, so that a row's bits are
 * the same alone and in any batch. That algorithm must add up an element in one loop over K: no split-K, and no workspace
 * that could hold the partial sums of a shared loop (counters of tiles that have been handed out are there).
 * Parts of a weight that lie one after the other in memory, with one type and alike in bias, are one product.
 */
#include <cublasLt.h>
#include <stdlib.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_few.cuh"
#include "kernels/cuda/types.cuh"

enum {
    MAX_ALGOS = 1024,
    WORKSPACE_BYTES = 32 << 20,
    COUNTER_BYTES = 256,   // deterministic: all that an algorithm may have of workspace
    FIXED_ROWS = 256,      // deterministic: the number of rows that the algorithm is chosen for
    BIAS_ALIGNMENT = 16,
    MAX_CANDIDATES = 32,   // of which the first that does is taken
};

// One matrix: a run of parts that lie together.
struct product {
    const void *w, *bias;
    enum dtype dtype, bias_dtype;
    size_t n_rows, column; // column of out where it begins
};

struct gemm_key {
    size_t T, N, K, ldo;   // T: FIXED_ROWS where the algorithm is one for all
    enum dtype x, out;
    uint32_t out_alignment; // bytes
    bool accumulate, biased; // biased: by the product itself, from a bias of out's type at a multiple of BIAS_ALIGNMENT
};

struct algo {
    struct gemm_key key;
    cublasLtMatmulAlgo_t algo;
    bool used;
};

struct cublas {
    cublasLtHandle_t handle;
    cublasStatus_t status; // of its creation: whoever wants a product is told
    void *workspace;
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
    h ^= (k->ldo * 4 + (size_t)k->out) * 0x27D4EB2F165667C5u ^ (size_t)k->x * 31 ^ (size_t)k->accumulate ^ (size_t)k->biased * 2;
    return (h ^ h >> 29) % MAX_ALGOS;
}

static bool same_key(const struct gemm_key *a, const struct gemm_key *b)
{
    return a->T == b->T && a->N == b->N && a->K == b->K && a->ldo == b->ldo && a->x == b->x && a->out == b->out &&
           a->out_alignment == b->out_alignment && a->accumulate == b->accumulate && a->biased == b->biased;
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

// Whether the algorithm runs with any number of rows, each element summed in one loop.
static bool serves_all(struct device *d, const struct gemm_key *key, const cublasLtMatmulAlgo_t *algo)
{
    const size_t rows[] = {1, 2, 7, FIXED_ROWS, 1000, (size_t)d->options.max_tokens};
    uint32_t n_splits = 0;
    size_t written;
    if (cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &n_splits, sizeof n_splits, &written) ||
        n_splits > 1)
        return false;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct gemm_key k = *key;
        struct gemm g;
        cublasLtMatmulHeuristicResult_t result;
        k.T = rows[i];
        if (describe(&g, &k, NULL) || cublasLtMatmulAlgoCheck(d->cublas->handle, &g.op, &g.w, &g.x, &g.out, &g.out, algo,
                                                              &result) || result.workspaceSize > COUNTER_BYTES)
            return false;
    }
    return true;
}

static int find_algo(struct device *d, const struct gemm_key *key, struct algo **found, struct error *e)
{
    struct algo *slot = &d->cublas->algos[hash(key)];
    *found = slot;
    if (slot->used && same_key(&slot->key, key)) return 0;
    bool fixed = d->options.deterministic;
    cublasLtMatmulHeuristicResult_t best[MAX_CANDIDATES];
    struct gemm g;
    int n = 0, i = 0;
    if (describe(&g, key, e)) return ERR_DEVICE;
    cublasStatus_t s = ask_heuristic(d->cublas, &g, key, fixed, best, fixed ? MAX_CANDIDATES : 1, &n);
    while (!s && i < n && fixed && !serves_all(d, key, &best[i].algo)) i++;
    if (!s && i == n) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (s)
        return error_set(e, ERR_DEVICE, "linear: no algorithm for [%zu, %zu] x [%zu, %zu]%s: %s", key->T, key->K, key->N,
                         key->K, fixed ? " that serves all numbers of rows" : "", cublasLtGetStatusString(s));
    slot->key = *key, slot->algo = best[i].algo, slot->used = true;
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
                           multiple < 16 ? (uint32_t)multiple : 16, accumulate, biased}, wanted = key;
    struct gemm g;
    struct algo *algo;
    if (d->options.deterministic) wanted.T = FIXED_ROWS;
    if (blas_check(d->cublas->status, "cuBLASLt", e)) return ERR_DEVICE;
    if (describe(&g, &key, e) || find_algo(d, &wanted, &algo, e)) return ERR_DEVICE;
    if (m->bias && !biased) {
        FOR_ACTIVATION_TYPE(p->out.dtype, T_, bias_kernel<T_><<<(unsigned)key.T, 256, 0, d->stream>>>(
            (T_ *)out, key.ldo, m->bias, m->bias_dtype, (int32_t)m->n_rows, p->accumulate));
        if (launch_check("linear's bias", e)) return ERR_DEVICE;
    }
    const float one = 1, beta = accumulate ? 1 : 0;
    cublasStatus_t s = CUBLAS_STATUS_SUCCESS;
    if (biased) s = cublasLtMatmulDescSetAttribute(&g.op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &m->bias, sizeof m->bias);
    if (!s) s = cublasLtMatmul(d->cublas->handle, &g.op, &one, m->w, &g.w, p->x.data, &g.x, &beta, out, &g.out, out, &g.out,
                               &algo->algo, d->cublas->workspace, WORKSPACE_BYTES, d->stream);
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
    return cuda_check(cudaMalloc(&d->cublas->workspace, WORKSPACE_BYTES), "linear: workspace", e);
}

void cuda_linear_destroy(struct device *d)
{
    if (!d->cublas) return;
    cudaFree(d->cublas->workspace);
    if (d->cublas->handle) cublasLtDestroy(d->cublas->handle);
    free(d->cublas);
}
