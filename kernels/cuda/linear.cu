/* linear.cu: out[T, N] = x[T, K] w[N, K]^T (+ bias) (+ out).
 *
 * Few rows of x: linear_few.cu. More: cuBLASLt, F32 accumulation, the first algorithm of its heuristic (kept, never timed)
 * for the shape, of which the rows count in classes: asking takes a quarter of a millisecond, and prompts have every length.
 * Deterministic: a row's bits are the same alone and in any batch, as each element is one chain of products (linear_chain.cu,
 * which also does few rows). An algorithm of cuBLASLt is taken if it has these bits for random x and the weight at hand; else
 * linear_chain.cu does those rows, too. It must add up an element in one loop over K to be asked: no split-K, and no workspace
 * that could hold the partial sums of a shared loop (counters of tiles that have been handed out are there). Where rows are no
 * multiple of 16 bytes, there is no chain: one algorithm does any number of rows.
 * Parts of a weight that lie one after the other in memory, with one type and alike in bias, are one product.
 */
#include <cublasLt.h>
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
    FIXED_ROWS = 256,      // deterministic, without a chain: the number of rows that the algorithm is chosen for
    CHECKED_ROWS = 8,      // of x, where bits are compared
    CHECK_ALIGNMENT = 4096,
    BIAS_ALIGNMENT = 16,
    MAX_CANDIDATES = 32,   // of which the first that does is taken; deterministic
    FEW_CANDIDATES = 4,    // the same, otherwise
};

// One matrix: a run of parts that lie together.
struct product {
    const void *w, *bias;
    enum dtype dtype, bias_dtype;
    size_t n_rows, column; // column of out where it begins
};

struct gemm_key {
    size_t T, N, K, ldo;   // T: the most rows of its class; FIXED_ROWS where the algorithm is one for all
    enum dtype x, out;
    uint32_t out_alignment; // bytes
    bool accumulate, biased; // biased: by the product itself, from a bias of out's type at a multiple of BIAS_ALIGNMENT
};

struct algo {
    struct gemm_key key;
    cublasLtMatmulAlgo_t algo;
    bool used;
    bool chain; // none: linear_chain.cu
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

static void *ask_first(void *arg)
{
    struct device *d = (struct device *)arg;
    const struct gemm_key key = {LEAST_CLASS, 4096, 4096, 4096, DTYPE_BF16, DTYPE_BF16, 16, false, false};
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

static cublasStatus_t multiply(struct device *d, struct gemm *g, const struct gemm_key *key, const struct product *m,
                               const void *x, void *out, const cublasLtMatmulAlgo_t *algo, void *workspace,
                               size_t workspace_bytes, cudaStream_t stream)
{
    const float one = 1, beta = key->accumulate ? 1 : 0;
    cublasStatus_t s = CUBLAS_STATUS_SUCCESS;
    if (key->biased) s = cublasLtMatmulDescSetAttribute(&g->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &m->bias, sizeof m->bias);
    return s ? s : cublasLtMatmul(d->cublas->handle, &g->op, &one, m->w, &g->w, x, &g->x, &beta, out, &g->out, out, &g->out,
                                  algo, workspace, workspace_bytes, stream);
}

static struct chain_product chain_of(const struct gemm_key *key, const struct product *m, const void *x, void *out)
{
    return {m->w, key->biased ? m->bias : NULL, x, out, key->x, key->out, key->T, key->N, key->K, key->ldo, key->accumulate};
}

// ---- whether an algorithm has a chain's bits ------------------------------------------------------------------------

// From -1 to 1, the same in every call.
template <typename T> __global__ void random_kernel(T *out, size_t n)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t x = (uint32_t)i * 0x9E3779B1u ^ 0x85EBCA77u;
    x = (x ^ x >> 15) * 0x2C1B3C6Du;
    x = (x ^ x >> 12) * 0x297A2D39u;
    if (i < n) out[i] = from_float<T>((float)(int32_t)(x ^ x >> 15) * 0x1p-31f);
}

static void fill_random(enum dtype dtype, void *out, size_t n, cudaStream_t stream)
{
    FOR_ACTIVATION_TYPE(dtype, T_, random_kernel<T_><<<(unsigned)((n + 255) / 256), 256, 0, stream>>>((T_ *)out, n));
}

__global__ void count_unequal_kernel(const uint32_t *a, const uint32_t *b, size_t n, uint32_t *count)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && a[i] != b[i]) atomicAdd(count, 1u);
}

static bool has_chain_bits(struct device *d, const struct gemm_key *key, const struct product *m,
                           const cublasLtMatmulAlgo_t *algo)
{
    struct cublas *c = d->cublas;
    struct device aside = *d;
    struct gemm_key k = *key;
    struct gemm g;
    aside.stream = c->aside;
    k.T = CHECKED_ROWS, k.ldo = k.N;
    const size_t n_out = k.T * k.N, out_bytes = n_out * dtype_size(k.out), x_bytes = k.T * k.K * dtype_size(k.x);
    const size_t sizes[] = {COUNTER_BYTES, COUNTER_BYTES, sizeof(uint32_t), x_bytes, out_bytes, out_bytes};
    char *at[sizeof sizes / sizeof *sizes], *free_from = (char *)c->workspace; // the first is what products have
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        at[i] = free_from;
        free_from += (sizes[i] + CHECK_ALIGNMENT - 1) / CHECK_ALIGNMENT * CHECK_ALIGNMENT;
    }
    if (free_from > (char *)c->workspace + WORKSPACE_BYTES || describe(&g, &k, NULL)) return false;
    struct chain_product chain = chain_of(&k, m, at[3], at[4]);
    uint32_t n_unequal = 1;
    fill_random(k.x, at[3], k.T * k.K, c->aside);
    fill_random(k.out, at[4], n_out, c->aside);
    fill_random(k.out, at[5], n_out, c->aside);
    bool ran = !linear_chain(&aside, &chain, NULL) &&
               !multiply(d, &g, &k, m, at[3], at[5], algo, at[1], COUNTER_BYTES, c->aside) &&
               !cudaMemsetAsync(at[2], 0, sizeof n_unequal, c->aside);
    if (ran) count_unequal_kernel<<<(unsigned)((out_bytes / 4 + 255) / 256), 256, 0, c->aside>>>(
        (uint32_t *)at[4], (uint32_t *)at[5], out_bytes / 4, (uint32_t *)at[2]);
    ran = ran && !cudaMemcpyAsync(&n_unequal, at[2], sizeof n_unequal, cudaMemcpyDeviceToHost, c->aside);
    return !cudaStreamSynchronize(c->aside) && ran && n_unequal == 0;
}

// Whether it has shown them for such a product before, of another class of rows.
static bool is_known(const struct cublas *c, const struct gemm_key *key, const cublasLtMatmulAlgo_t *algo)
{
    for (const struct algo *slot = c->algos; slot < c->algos + MAX_ALGOS; slot++) {
        struct gemm_key k = *key;
        k.T = slot->key.T;
        if (slot->used && !slot->chain && same_key(&slot->key, &k) && !memcmp(&slot->algo, algo, sizeof *algo)) return true;
    }
    return false;
}

// ---- which algorithm ------------------------------------------------------------------------------------------------

static size_t class_end(size_t T)
{
    return T <= LEAST_CLASS ? (size_t)LEAST_CLASS : (T + CLASS_WIDTH - 1) / CLASS_WIDTH * CLASS_WIDTH;
}

static bool suits(struct device *d, const struct gemm_key *key, const struct product *m, bool chain,
                  const cublasLtMatmulAlgo_t *algo)
{
    const size_t least = key->T <= LEAST_CLASS ? 1 : key->T - CLASS_WIDTH + 1, of_class[] = {least, key->T, CHECKED_ROWS};
    const size_t any[] = {1, 2, 7, FIXED_ROWS, 1000, (size_t)d->options.max_tokens};
    if (!d->options.deterministic) return serves(d, key, algo, of_class, 2, WORKSPACE_BYTES);
    if (!chain) return is_one_loop(algo) && serves(d, key, algo, any, sizeof any / sizeof *any, COUNTER_BYTES);
    return is_one_loop(algo) && serves(d, key, algo, of_class, 3, COUNTER_BYTES) &&
           (is_known(d->cublas, key, algo) || has_chain_bits(d, key, m, algo));
}

// chain: linear_chain.cu can do it.
static int find_algo(struct device *d, const struct gemm_key *key, const struct product *m, bool chain, struct algo **found,
                     struct error *e)
{
    struct algo *slot = &d->cublas->algos[hash(key)];
    *found = slot;
    if (slot->used && same_key(&slot->key, key)) return 0;
    end_first_ask(d->cublas);
    cublasLtMatmulHeuristicResult_t best[MAX_CANDIDATES];
    struct gemm g;
    int n = 0, i = 0;
    if (describe(&g, key, e)) return ERR_DEVICE;
    cublasStatus_t s = ask_heuristic(d->cublas, &g, key, d->options.deterministic, best,
                                     d->options.deterministic ? MAX_CANDIDATES : FEW_CANDIDATES, &n);
    while (!s && i < n && !suits(d, key, m, chain, &best[i].algo)) i++;
    if (!s && i == n) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (s && !chain)
        return error_set(e, ERR_DEVICE, "linear: no algorithm for [%zu, %zu] x [%zu, %zu]%s: %s", key->T, key->K, key->N,
                         key->K, d->options.deterministic ? " that serves all numbers of rows" : "",
                         cublasLtGetStatusString(s));
    slot->key = *key, slot->chain = s != CUBLAS_STATUS_SUCCESS, slot->used = true;
    if (!s) slot->algo = best[i].algo;
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
    struct chain_product chain = chain_of(&key, m, p->x.data, out);
    struct gemm g;
    struct algo *algo = NULL;
    bool may_chain = d->options.deterministic && linear_chain_fits(&chain), chained = may_chain && key.T <= FEW_ROWS;
    wanted.T = d->options.deterministic && !may_chain ? (size_t)FIXED_ROWS : class_end(key.T);
    if (blas_check(d->cublas->status, "cuBLASLt", e)) return ERR_DEVICE;
    if (!chained && (describe(&g, &key, e) || find_algo(d, &wanted, m, may_chain, &algo, e))) return ERR_DEVICE;
    if (m->bias && !biased) {
        FOR_ACTIVATION_TYPE(p->out.dtype, T_, bias_kernel<T_><<<(unsigned)key.T, 256, 0, d->stream>>>(
            (T_ *)out, key.ldo, m->bias, m->bias_dtype, (int32_t)m->n_rows, p->accumulate));
        if (launch_check("linear's bias", e)) return ERR_DEVICE;
    }
    if (chained || algo->chain) return linear_chain(d, &chain, e);
    cublasStatus_t s = multiply(d, &g, &key, m, p->x.data, out, &algo->algo, d->cublas->workspace, WORKSPACE_BYTES, d->stream);
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
