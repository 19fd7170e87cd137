/* linear_chain.cu: out[T, N] = x[T, K] w[N, K]^T for up to 8 rows of x, each element one chain of products: what --deterministic
 * promises.
 *
 * The sum of an element is that of mma.sync m16n8k16 over k ascending, in F32, from zero, plus the bias, rounded to out's type;
 * where the product is added to out, that is a sum of two such numbers, rounded again. On an H200 all of cuBLASLt's kernels
 * that do not split K have the same bits, whatever their tiles, but for some of odd sizes that add before they round. linear.cu
 * compares each with this kernel before it takes it.
 * K is not shared between warps, so that there is little to do at once: a warp takes tiles of 16 rows of w, and where tiles are
 * few, a block has fewer warps with longer rings. Bound by reading w once (64 to 104 KB on their way in a multiprocessor), or,
 * where a warp has one long tile, by its chain: K / 16 mma, of which each waits for the one before, and some 60 instructions for
 * four of them, between which they are put; operands of the next step are in registers by then. On an H200 one row of
 * Llama-3-8B's products takes 54 (gate and up), 13 (QKV), 25 us (mean of the other two); linear_few.cu 54, 14, 18.
 */
#include "kernels/cuda/few_rows.cuh"

namespace {

enum { MAX_WARPS = 8 };

// N_WARPS: of a block. A stage: rows of the tile, X_ROWS of x.
template <int X_ROWS, int N_WARPS> struct chain_shape {
    static constexpr int STAGE_BYTES = (TILE_ROWS + X_ROWS) * ROW_BYTES;
    static constexpr int STAGES = FEW_SMEM / STAGE_BYTES / N_WARPS;
    static constexpr int SMEM = STAGES * STAGE_BYTES * N_WARPS;
};

// The next stage of a ring. Made opaque: of a sum with a uniform part ptxas (13.0) makes an address that cp.async with a cache
// policy cannot have, an illegal instruction.
template <int STAGE_BYTES> __device__ __forceinline__ uint32_t stage_after(uint32_t stage, uint32_t ring, uint32_t ring_end)
{
    stage = stage + STAGE_BYTES == ring_end ? ring : stage + STAGE_BYTES;
    asm volatile("" : "+r"(stage));
    return stage;
}

// A step's operands: w as A, x as B.
struct chain_step {
    uint32_t w[STEP / 16][4], x[2][4];
};

__device__ __forceinline__ void load_step(chain_step &s, const lane_places &places, uint32_t stage, int i)
{
    ldmatrix(s.w[i], (stage + places.w) ^ (uint32_t)(i * 32));
    if (i < 2) ldmatrix(s.x[i], (stage + places.x) ^ (uint32_t)(i * 64));
}

// Element of a tile that a lane has in sum[i]: row lane / 4 + i / 2 * 8 of the tile, token lane % 4 * 2 + i % 2.
template <typename Out> __device__ __forceinline__ Out *element(const few_args &a, int32_t tile, int i)
{
    int32_t lane = (int32_t)threadIdx.x % 32, row = tile * TILE_ROWS + lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    return row < a.N && token < a.T ? (Out *)a.out + token * a.ldo + row : NULL;
}

template <typename Out> __device__ __forceinline__ void begin_tile(const few_args &a, int32_t tile, float (&addend)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Out *out = a.accumulate ? element<Out>(a, tile, i) : NULL;
        addend[i] = out ? to_float(*out) : 0;
    }
}

template <typename Out>
__device__ __forceinline__ void finish_tile(const few_args &a, int32_t tile, const float (&sum)[4], const float (&addend)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Out *out = element<Out>(a, tile, i);
        if (!out) continue;
        float x = sum[i];
        if (a.bias[0]) x = __fadd_rn(x, bias_of(a, tile * TILE_ROWS + (int32_t)threadIdx.x % 32 / 4 + i / 2 * 8));
        Out y = from_float<Out>(x);
        *out = a.accumulate ? from_float<Out>(__fadd_rn(to_float(y), addend[i])) : y;
    }
}

template <typename T, typename Out, int X_ROWS, int N_WARPS>
__global__ void __launch_bounds__(N_WARPS * 32, 1) linear_chain_kernel(const __grid_constant__ few_args a)
{
    using shape = chain_shape<X_ROWS, N_WARPS>;
    constexpr int STAGES = shape::STAGES;
    extern __shared__ __align__(128) unsigned char smem[];
    const uint32_t ring = shared_address(smem) + threadIdx.x / 32 * STAGES * shape::STAGE_BYTES;
    const uint32_t ring_end = ring + STAGES * shape::STAGE_BYTES;
    const int32_t n_tiles = (a.N + TILE_ROWS - 1) / TILE_ROWS, n_steps = (a.K + STEP - 1) / STEP;
    const x_rows<T, false, X_ROWS> x = rows_of_x<T, false, X_ROWS>(a);
    const lane_places places = places_of<X_ROWS>((int32_t)threadIdx.x % 32);
    few_cursor<T> ahead, x_ahead;
    next_kernel_allow();
    to_tile<T, STORE, STEP>(a, ahead, first_tile<STEP>());
    x_ahead = ahead;
    uint32_t stage = ring;
    auto after = [&](uint32_t at) { return stage_after<shape::STAGE_BYTES>(at, ring, ring_end); };
#pragma unroll 1
    for (int i = 0; i < STAGES; i++, stage = after(stage)) {
        fetch_weights(a, ahead, n_tiles, stage);
        advance<T, STORE, STEP>(a, ahead);
    }
    cp_async_commit();
    previous_kernel_wait(); // weights are on their way
#pragma unroll 1
    for (int i = 0; i < STAGES; i++, stage = after(stage)) {
        fetch_x(a, x_ahead, x, n_tiles, stage);
        advance<T, STORE, STEP>(a, x_ahead);
        cp_async_commit();
    }
    chain_step step[2]; // stage: of the one whose operands are in registers
    cp_async_wait<STAGES - 1>();
    __syncwarp(); // every lane's part
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) load_step(step[0], places, stage, i);
    float sum[4], addend[4];
    int32_t tile = first_tile<STEP>(), left = n_steps;
    if (tile < n_tiles) begin_tile<Out>(a, tile, addend);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = 0;
    // One step: its products, the next one's operands, and what its stage holds next.
    auto go = [&](const chain_step &now, chain_step &next) {
        const uint32_t freed = stage;
        stage = after(stage);
        cp_async_wait<STAGES - 2>();
        __syncwarp(); // every lane's part; all lanes have read what is freed
        mma<T>(sum, now.w[0], now.x[0][0], now.x[0][1]);
        load_step(next, places, stage, 0);
        load_step(next, places, stage, 1);
        mma<T>(sum, now.w[1], now.x[0][2], now.x[0][3]);
        load_step(next, places, stage, 2);
        load_step(next, places, stage, 3);
        mma<T>(sum, now.w[2], now.x[1][0], now.x[1][1]);
        if (ahead.tile < n_tiles) {
            fetch_weights(a, ahead, n_tiles, freed);
            fetch_x(a, ahead, x, n_tiles, freed);
            advance<T, STORE, STEP>(a, ahead);
        }
        cp_async_commit();
        mma<T>(sum, now.w[3], now.x[1][2], now.x[1][3]);
        if (--left > 0) return;
        finish_tile<Out>(a, tile, sum, addend);
        tile += tiles_apart<STEP>(), left = n_steps;
        if (tile < n_tiles) begin_tile<Out>(a, tile, addend);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = 0;
    };
    while (tile < n_tiles) {
        go(step[0], step[1]);
        if (tile >= n_tiles) break;
        go(step[1], step[0]);
    }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <typename T, typename Out, int X_ROWS, int N_WARPS> cudaError_t launch_warps(const struct device *d, const few_args &a)
{
    auto kernel = linear_chain_kernel<T, Out, X_ROWS, N_WARPS>;
    const int smem = chain_shape<X_ROWS, N_WARPS>::SMEM;
    cudaError_t status = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (status != cudaSuccess) return status;
    return launch_early(d, kernel, dim3((unsigned)d->n_sms), N_WARPS * 32, (size_t)smem, a);
}

template <typename T, typename Out, int X_ROWS> cudaError_t launch_rows(const struct device *d, const few_args &a)
{
    int32_t n_tiles = (a.N + TILE_ROWS - 1) / TILE_ROWS;
    if (n_tiles <= 2 * d->n_sms) return launch_warps<T, Out, X_ROWS, 2>(d, a);
    if (n_tiles <= 4 * d->n_sms) return launch_warps<T, Out, X_ROWS, 4>(d, a);
    return launch_warps<T, Out, X_ROWS, MAX_WARPS>(d, a);
}

template <typename T, typename Out> cudaError_t launch(const struct device *d, const few_args &a)
{
    if (a.T == 1) return launch_rows<T, Out, 1>(d, a);
    if (a.T <= 4) return launch_rows<T, Out, 4>(d, a);
    return launch_rows<T, Out, FEW_ROWS>(d, a);
}

} // namespace

bool linear_chain_fits(const struct chain_product *p)
{
    return p->K % VECTOR == 0 && p->x_dtype != DTYPE_F32 && is_aligned(p->w) && is_aligned(p->x);
}

int linear_chain(const struct device *d, const struct chain_product *p, struct error *e)
{
    few_args a = {};
    for (int32_t i = 0; i < MAX_WEIGHT_PARTS; i++) a.end[i] = INT32_MAX;
    a.w[0] = p->w, a.bias[0] = p->bias, a.bias_dtype[0] = p->out_dtype, a.x = p->x, a.out = p->out;
    a.T = (int32_t)p->T, a.N = (int32_t)p->N, a.K = (int32_t)p->K, a.ldo = p->ldo, a.accumulate = p->accumulate;
    const bool wide = p->out_dtype == DTYPE_F32;
    cudaError_t status;
    if (p->x_dtype == DTYPE_BF16 && wide) status = launch<__nv_bfloat16, float>(d, a);
    else if (p->x_dtype == DTYPE_BF16) status = launch<__nv_bfloat16, __nv_bfloat16>(d, a);
    else if (wide) status = launch<__half, float>(d, a);
    else status = launch<__half, __half>(d, a);
    return cuda_check(status, "linear", e);
}
