/* linear_few.cu: out[T, N] = x[T, K] w[N, K]^T for up to 8 rows of x (decode with few sequences), and what comes before and
 * after it in a layer: RMS norm before; rotation and the cache's write, or act(gate) * up, after.
 *
 * Bound by reading w once: N K 2 bytes, which at decode are nearly all bytes there are. Grid: a block a multiprocessor, which
 * takes tiles of 16 rows of w in turns; its 8 warps take 64 columns of a tile in turns, each through a ring of its own in
 * shared memory (cp.async), which runs on over the ends of tiles: 64 to 96 KB of w are on their way all the time. A block
 * needs less than half of a multiprocessor's shared memory, so that the next kernel's blocks fill their rings with weights
 * while this one ends. Products are mma.sync with w as A [16 rows, 16 k] and x as B [16 k, 8 tokens]: any T costs the same. When
 * the kernel before is over, what the rings hold is there, and how soon it has been worked through is a matter of the
 * instructions of a step: hence few of them (75).
 * RMS norm: x times the norm's weight is rounded where the norm's own kernel rounds, the factor of the row, from squares that
 * are summed up while the first of x is on its way, is multiplied in at the end: BF16 alone, in F16 x could overflow. Where
 * checkpoints keep weight - 1, x w + x takes the place of x w: as many instructions.
 * Rows of a tile: 16 in order; gated: 8 of gate and the same 8 of up; rotated heads: 8 and their 8 partners.
 * Sum of an element: a warp's columns ascending, then the warps in order: the same bits for any T.
 * Tried, slower: asking L2 for weights beyond the ring; letting the next kernel come later than at once; x whole in shared
 * memory; last tiles shared by two blocks; blocks that begin at different columns. What is idle between kernels is used by
 * the next one's rings.
 */
#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/few_rows.cuh"

namespace {

enum {
    WARPS = 8,
    THREADS = WARPS * 32,
    APART = WARPS * STEP,
};

// What a norm before the product multiplies by: its weight, or, as some checkpoints keep weight - 1, that and 1.
enum norming { UNNORMED, BY_WEIGHT, BY_WEIGHT_AND_1 };

// Two elements of x times the norm's weight, rounded once: in one instruction either way.
template <enum norming NORM> __device__ __forceinline__ uint32_t weigh(uint32_t x, uint32_t norm)
{
    union { uint32_t bits; __nv_bfloat162 pair; } a, b;
    a.bits = x, b.bits = norm;
    a.pair = NORM == BY_WEIGHT_AND_1 ? __hfma2(a.pair, b.pair, a.pair) : __hmul2(a.pair, b.pair);
    return a.bits;
}

// ---- the end of a tile ----------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void end_rope(const few_args &a, int32_t tile, int32_t token, int32_t i, float value)
{
    float other = __shfl_xor_sync(~0u, value, TILE_ROWS / 2);
    if (token >= a.T) return;
    int32_t row = row_of<ROPE>(a, tile, i), head = row / a.head_dim, column = row % a.head_dim, half = a.rope_dim / 2;
    if (head < a.n_heads + a.n_kv_heads && column < a.rope_dim) {
        const float *angle = a.cos_sin + (size_t)token * a.rope_dim + column % half;
        value = value * angle[0] + (column < half ? -other : other) * angle[half];
    }
    if (head < a.n_heads) {
        ((T *)a.out)[token * a.ldo + row] = from_float<T>(value);
        return;
    }
    int32_t slot = a.slots[token], kv_head = (head - a.n_heads) % a.n_kv_heads;
    if (slot < 0) return;
    size_t at = ((size_t)(slot / a.block_size) * a.n_kv_heads + kv_head) * a.block_size + slot % a.block_size;
    T *cache = (T *)(head < a.n_heads + a.n_kv_heads ? a.k_cache : a.v_cache);
    cache[at * a.head_dim + column] = from_float<T>(value);
}

// What is to be added to element i of a tile's row for a token, read long before its sum is there.
template <typename Out, enum ending ENDING>
__device__ __forceinline__ float addend_of(const few_args &a, int32_t tile, int32_t token, int32_t i)
{
    int32_t row = row_of<ENDING>(a, tile, i);
    if (ENDING != STORE || !a.accumulate || token >= a.T || row >= a.N) return 0;
    return to_float(((const Out *)a.out)[token * a.ldo + row]);
}

template <typename T, typename Out, enum ending ENDING>
__device__ __forceinline__ void end_element(const few_args &a, int32_t tile, int32_t token, int32_t i, float value,
                                            float addend)
{
    int32_t row = row_of<ENDING>(a, tile, i);
    if (row < a.N) value += bias_of(a, row);
    if (ENDING == ROPE) {
        end_rope<T>(a, tile, token, i, value);
    } else if (ENDING == GATED) {
        float up = __shfl_xor_sync(~0u, value, TILE_ROWS / 2);
        int32_t column = tile * (TILE_ROWS / 2) + i;
        if (token < a.T && i < TILE_ROWS / 2 && column < a.N / 2)
            ((Out *)a.out)[token * a.ldo + column] = from_float<Out>(activate(value, a.kind) * up);
    } else if (token < a.T && row < a.N) {
        ((Out *)a.out)[token * a.ldo + row] = from_float<Out>(value + addend);
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// What the warps have of a tile; two, so that the next tile's sums can be written while these are read. Squares: of parts of x.
template <int X_ROWS> struct tile_sums {
    float sum[2][WARPS][X_ROWS][TILE_ROWS], squares[X_ROWS][WARPS];
};

// A stage: rows of the tile, X_ROWS of x, one of the norm's weight.
template <int X_ROWS> struct few_shape {
    static constexpr int STAGES = X_ROWS == 1 ? 6 : X_ROWS == 4 ? 5 : 4;
    static constexpr int STAGE_BYTES = (TILE_ROWS + X_ROWS + 1) * ROW_BYTES;
    static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
    static constexpr int SMEM = RING_BYTES + (int)sizeof(tile_sums<X_ROWS>);
    static_assert(SMEM <= FEW_SMEM, "two fit a multiprocessor of sm_90");
};

// Adds a step's products to sum, in two chains; tokens from X_ROWS on are the last one again.
template <typename T, enum norming NORM, int X_ROWS>
__device__ __forceinline__ void add_step(uint32_t stage, const lane_places &places, float (&sum)[2][4])
{
    uint32_t x[2][4], norm[4], w[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        ldmatrix(x[half], (stage + places.x) ^ (uint32_t)(half * 64));
        if (NORM == UNNORMED) continue;
        ldmatrix(norm, (stage + places.norm) ^ (uint32_t)(half * 64));
#pragma unroll
        for (int i = 0; i < 4; i++) x[half][i] = weigh<NORM>(x[half][i], norm[i]);
    }
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        ldmatrix(w, (stage + places.w) ^ (uint32_t)(k * 32));
        mma<T>(sum[k % 2], w, x[k / 2][k % 2 * 2], x[k / 2][k % 2 * 2 + 1]);
    }
}

// Sums up squares of x, a token's in WARPS sums of the same columns for any T; WARPS / X_ROWS warps have a token.
template <typename T, int X_ROWS> __device__ __forceinline__ void add_squares(const few_args &a, tile_sums<X_ROWS> &sums)
{
    constexpr int PER_TOKEN = WARPS / X_ROWS, N_SUMS = WARPS / PER_TOKEN, COLUMNS = 32 * VECTOR;
    const int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32;
    const int32_t token = warp / PER_TOKEN, part = warp % PER_TOKEN;
    const T *x = (const T *)a.x + (size_t)min(token, a.T - 1) * a.K;
    float squares[N_SUMS] = {};
#pragma unroll(8 / N_SUMS)
    for (int32_t begin = part * COLUMNS + lane * VECTOR; begin < a.K; begin += WARPS * COLUMNS) {
#pragma unroll
        for (int i = 0; i < N_SUMS; i++) {
            union { uint4 bits; T element[VECTOR]; } vector;
            int32_t at = begin + i * PER_TOKEN * COLUMNS;
            vector.bits = at < a.K ? *(const uint4 *)(x + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < VECTOR; j++)
                squares[i] = fmaf(to_float(vector.element[j]), to_float(vector.element[j]), squares[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < N_SUMS; i++) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) squares[i] += __shfl_xor_sync(~0u, squares[i], d);
        if (lane == 0) sums.squares[token][part + i * PER_TOKEN] = squares[i];
    }
}

template <typename T, typename Out, enum ending ENDING, bool NORMED, int X_ROWS>
__device__ __forceinline__ void finish_tile(const few_args &a, int32_t tile, tile_sums<X_ROWS> &sums, int turn,
                                            const float (&sum)[2][4], float addend)
{
    int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int32_t mine = lane % 4 * 2 + i % 2;
        if (mine < X_ROWS) sums.sum[turn][warp][mine][i / 2 * 8 + lane / 4] = sum[0][i] + sum[1][i];
    }
    __syncthreads();
    if (warp * 2 >= a.T) return; // 32 threads have the elements of two tokens
    int32_t token = min((int32_t)threadIdx.x / TILE_ROWS, X_ROWS - 1), i = (int32_t)threadIdx.x % TILE_ROWS;
    float value = 0, all = 0;
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
        value += sums.sum[turn][j][token][i];
        if (NORMED) all += sums.squares[token][j];
    }
    if (NORMED) value *= 1.0f / sqrtf(all / (float)a.K + a.eps);
    end_element<T, Out, ENDING>(a, tile, (int32_t)threadIdx.x / TILE_ROWS, i, value, addend);
}

template <typename T, typename Out, enum ending ENDING, enum norming NORM, int X_ROWS>
__global__ void __launch_bounds__(THREADS, 1) linear_few_kernel(const __grid_constant__ few_args a)
{
    using shape = few_shape<X_ROWS>;
    constexpr bool NORMED = NORM != UNNORMED;
    extern __shared__ __align__(128) unsigned char smem[];
    tile_sums<X_ROWS> &sums = *(tile_sums<X_ROWS> *)(smem + shape::RING_BYTES);
    uint32_t ring = shared_address(smem) + threadIdx.x / 32 * shape::STAGES * shape::STAGE_BYTES;
    int32_t n_tiles = ENDING == GATED ? (a.N / 2 + TILE_ROWS / 2 - 1) / (TILE_ROWS / 2) : (a.N + TILE_ROWS - 1) / TILE_ROWS;
    few_cursor<T> ahead, x_ahead;
    const x_rows<T, NORMED, X_ROWS> x = rows_of_x<T, NORMED, X_ROWS>(a);
    const lane_places places = places_of<X_ROWS>((int32_t)threadIdx.x % 32);
    next_kernel_allow();
    to_tile<T, ENDING, APART>(a, ahead, (int32_t)blockIdx.x);
    x_ahead = ahead;
#pragma unroll
    for (int i = 0; i < shape::STAGES; i++) {
        fetch_weights(a, ahead, n_tiles, ring + i * shape::STAGE_BYTES);
        advance<T, ENDING, APART>(a, ahead);
    }
    cp_async_commit();
    previous_kernel_wait(); // weights are on their way
#pragma unroll
    for (int i = 0; i < shape::STAGES; i++) {
        fetch_x(a, x_ahead, x, n_tiles, ring + i * shape::STAGE_BYTES);
        advance<T, ENDING, APART>(a, x_ahead);
        cp_async_commit();
    }
    if (NORMED) add_squares<T>(a, sums);
    int stage = 0, turn = 0;
    for (int32_t tile = (int32_t)blockIdx.x; tile < n_tiles; tile += (int32_t)gridDim.x, turn ^= 1) {
        float sum[2][4] = {};
        float addend = addend_of<Out, ENDING>(a, tile, (int32_t)threadIdx.x / TILE_ROWS, (int32_t)threadIdx.x % TILE_ROWS);
        for (int32_t column = (int32_t)threadIdx.x / 32 * STEP, end = a.K + column; column < end; column += APART) {
            uint32_t at = ring + (uint32_t)(stage * shape::STAGE_BYTES);
            cp_async_wait<shape::STAGES - 1>();
            __syncwarp(); // every lane's part
            add_step<T, NORM, X_ROWS>(at, places, sum);
            __syncwarp(); // all lanes have read the stage
            if (ahead.tile < n_tiles) {
                fetch_weights(a, ahead, n_tiles, at);
                fetch_x(a, ahead, x, n_tiles, at);
                advance<T, ENDING, APART>(a, ahead);
            }
            cp_async_commit();
            stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
        }
        finish_tile<T, Out, ENDING, NORMED, X_ROWS>(a, tile, sums, turn, sum, addend);
    }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

few_args args_of(const struct linear_params *p)
{
    few_args a = {};
    int32_t n = 0;
    for (int32_t i = 0; i < MAX_WEIGHT_PARTS; i++) {
        a.end[i] = INT32_MAX; // of the last part and those that are not there
        if (i >= p->weight->n_parts) continue;
        const struct weight_part *part = &p->weight->part[i];
        n += (int32_t)part->n_rows;
        if (i + 1 < p->weight->n_parts) a.end[i] = n;
        a.w[i] = part->data, a.bias[i] = part->bias.data, a.bias_dtype[i] = part->bias.dtype;
    }
    a.x = p->x.data, a.out = p->out.data, a.ldo = p->out.shape[1], a.accumulate = p->accumulate;
    a.T = (int32_t)p->x.shape[0], a.N = n, a.K = (int32_t)p->weight->n_cols;
    return a;
}

template <typename T, typename Out, enum ending ENDING, enum norming NORM, int X_ROWS>
cudaError_t launch_rows(const struct device *d, const few_args &a)
{
    auto kernel = linear_few_kernel<T, Out, ENDING, NORM, X_ROWS>;
    const int smem = few_shape<X_ROWS>::SMEM;
    cudaError_t status = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (status != cudaSuccess) return status;
    // Blocks without a tile wait, too: where there are none, two of the next kernel's would come to one multiprocessor.
    return launch_early(d, kernel, dim3((unsigned)d->n_sms), THREADS, smem, a);
}

template <typename T, typename Out, enum ending ENDING, enum norming NORM>
cudaError_t launch(const struct device *d, const few_args &a)
{
    if (a.T == 1) return launch_rows<T, Out, ENDING, NORM, 1>(d, a);
    if (a.T <= 4) return launch_rows<T, Out, ENDING, NORM, 4>(d, a);
    return launch_rows<T, Out, ENDING, NORM, FEW_ROWS>(d, a);
}

// Of BF16, with the norm before it if there is one.
template <typename Out, enum ending ENDING> cudaError_t launch_normed(const struct device *d, const few_args &a)
{
    if (!a.norm) return launch<__nv_bfloat16, Out, ENDING, UNNORMED>(d, a);
    if (a.add_1) return launch<__nv_bfloat16, Out, ENDING, BY_WEIGHT_AND_1>(d, a);
    return launch<__nv_bfloat16, Out, ENDING, BY_WEIGHT>(d, a);
}

template <enum ending ENDING> int launch_fused(struct device *d, enum dtype dtype, const few_args &a, struct error *e)
{
    cudaError_t status = dtype == DTYPE_F16 ? launch<__half, __half, ENDING, UNNORMED>(d, a)
                                            : launch_normed<__nv_bfloat16, ENDING>(d, a);
    return cuda_check(status, "linear", e);
}

// The norm goes into the kernel, or is done before it.
int fuse_norm(struct device *d, const struct norm_params *norm, few_args *a, struct error *e)
{
    bool fits = norm->kind == NORM_RMS && !norm->bias.data && !norm->accumulate && norm->x.dtype == DTYPE_BF16 &&
                (norm->weight_offset == 0 || norm->weight_offset == 1) && norm->weight.dtype == DTYPE_BF16 &&
                is_aligned(norm->weight.data) && is_aligned(norm->x.data);
    if (!fits) return cuda_norm(d, norm, e);
    a->x = norm->x.data, a->norm = norm->weight.data, a->eps = norm->eps, a->add_1 = norm->weight_offset == 1;
    return 0;
}

// Whether the norm's rows are those of the product.
bool is_of_norm(const struct norm_params *norm, const struct linear_params *p)
{
    return norm->out.data == p->x.data && norm->x.shape[0] == p->x.shape[0] && norm->x.shape[1] == p->x.shape[1] &&
           norm->x.dtype == p->x.dtype && p->out.data != norm->x.data && !p->accumulate;
}

// Whether they are, and the product's out is the next op's `x`.
bool are_chained(const struct norm_params *norm, const struct linear_params *p, const struct tensor *x)
{
    return is_of_norm(norm, p) && x->data == p->out.data && x->dtype == p->x.dtype && p->out.dtype == p->x.dtype;
}

} // namespace

bool linear_is_few(const struct device *d, const struct linear_params *p)
{
    bool fits = !d->options.deterministic && p->x.shape[0] <= FEW_ROWS && p->x.dtype != DTYPE_F32 &&
                p->weight->n_cols % VECTOR == 0 && is_aligned(p->x.data);
    for (int32_t i = 0; i < p->weight->n_parts; i++) fits = fits && is_aligned(p->weight->part[i].data);
    return fits;
}

int linear_few(struct device *d, const struct linear_params *p, struct error *e)
{
    few_args a = args_of(p);
    bool wide = p->out.dtype == DTYPE_F32;
    cudaError_t status;
    if (p->x.dtype == DTYPE_BF16 && wide) status = launch<__nv_bfloat16, float, STORE, UNNORMED>(d, a);
    else if (p->x.dtype == DTYPE_BF16) status = launch<__nv_bfloat16, __nv_bfloat16, STORE, UNNORMED>(d, a);
    else if (wide) status = launch<__half, float, STORE, UNNORMED>(d, a);
    else status = launch<__half, __half, STORE, UNNORMED>(d, a);
    return cuda_check(status, "linear", e);
}

bool linear_few_norm_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p)
{
    return linear_is_few(d, p) && is_of_norm(norm, p) && p->x.dtype == DTYPE_BF16;
}

int linear_few_norm(struct device *d, const struct norm_params *norm, const struct linear_params *p, struct error *e)
{
    few_args a = args_of(p);
    int rc = fuse_norm(d, norm, &a, e);
    if (rc) return rc;
    cudaError_t status = p->out.dtype == DTYPE_F32 ? launch_normed<float, STORE>(d, a) : launch_normed<__nv_bfloat16, STORE>(d, a);
    return cuda_check(status, "linear", e);
}

bool linear_few_rope_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                          const struct rope_kv_write_params *rope)
{
    int32_t half = rope->cos_sin.data ? rope->rope_dim / 2 : 0;
    return linear_is_few(d, p) && are_chained(norm, p, &rope->qkv) && !rope->q_norm.data &&
           (!rope->cos_sin.data || rope->cos_sin.shape[0] == p->x.shape[0]) && rope->head_dim % TILE_ROWS == 0 &&
           half % (TILE_ROWS / 2) == 0;
}

int linear_few_rope(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                    const struct rope_kv_write_params *rope, struct error *e)
{
    few_args a = args_of(p);
    a.cos_sin = (const float *)rope->cos_sin.data, a.k_cache = rope->cache.k.data, a.v_cache = rope->cache.v.data;
    a.slots = (const int32_t *)device_array(d, rope->slot_mapping, (size_t)a.T * sizeof(int32_t), e);
    if (!a.slots || fuse_norm(d, norm, &a, e)) return e ? e->code : ERR_DEVICE;
    a.n_heads = rope->n_heads, a.n_kv_heads = rope->n_kv_heads, a.head_dim = rope->head_dim;
    a.rope_dim = a.cos_sin ? rope->rope_dim : 0, a.block_size = (int32_t)rope->cache.k.shape[2];
    return launch_fused<ROPE>(d, p->x.dtype, a, e);
}

bool linear_few_gated_fits(const struct device *d, const struct norm_params *norm, const struct linear_params *p,
                           const struct activation_params *activation)
{
    const struct tensor *out = &activation->out;
    return linear_is_few(d, p) && are_chained(norm, p, &activation->x) && activation->gated && out->data != norm->x.data &&
           out->n_dims == 2 && out->dtype == p->x.dtype && out->shape[0] == p->x.shape[0] &&
           out->shape[1] * 2 == p->out.shape[1];
}

int linear_few_gated(struct device *d, const struct norm_params *norm, const struct linear_params *p,
                     const struct activation_params *activation, struct error *e)
{
    few_args a = args_of(p);
    int rc = fuse_norm(d, norm, &a, e);
    a.out = activation->out.data, a.ldo = activation->out.shape[1], a.kind = activation->kind;
    return rc ? rc : launch_fused<GATED>(d, p->x.dtype, a, e);
}
