/* attention_prefill_hopper.cu: Flash Attention of many query rows on Hopper (Shah et al., "FlashAttention-3", 2024): wgmma, bulk
 * tensor copies straight from the pages, warp specialisation. head_dim 64, 128, 256; the rest is attention_prefill.cu's.
 *
 * Shapes: q, out [T, H, D], k, v by strides (kernels/flash_attention.h). A tile is 64 rows for each of two warpgroups: as many q
 * heads of one KV head as fit, of some queries.
 * Grid: one block a multiprocessor, which asks a counter for tiles, in the order of attention_tiles.cuh, until there are none: one
 * warp finds them, one fetches (attention_prefill_hopper.cuh), two warpgroups compute, each on its own rows
 * (attention_compute_hopper.cuh).
 * Shared memory: Q of two tiles (of one at head_dim 256), a ring of 5 or 8 slots for K or V of a step.
 * FLOPs: 4 D per (query row, key seen). Bytes: q and out once, K and V once per tile (mostly from L2).
 * Bound by the tensor cores: at head_dim 128 a step of both warpgroups takes 2,450 cycles, the products 2,048. What keeps it from
 * these is a warpgroup's own chain: 700 cycles until its scores are there, 1,450 of softmax (512 are what exponentials take, but
 * the other's products use the same ports of the register file), 200 to the next products. At head_dim 64 by the exponentials: 16
 * a cycle. Where sequences are short, by what comes between tiles: masks (600 cycles), the next tile's notice (600), the store
 * (1,300), of which the latter two fall beside products.
 * Measured on an H200 (tests/bench/results/2026-11-29-attention-h200.md), causal, bf16, over FlashAttention-3: 1.13, 1.00, 1.03,
 * 1.04, 1.03, 1.01, 1.03 with 32 q heads of 8 KV heads at 512, 1k, 2k, 4k, 8k, 32k, 128k tokens; 1.10, 1.03, 1.02, 1.01, 0.99, 0.98
 * with 16 heads at 512 to 16k; over pages of 64 1.10 to 1.23, in a window 1.06. head_dim 64 and 256: 1.02 and 1.05 of cuDNN at 512
 * tokens, more beyond; 0.96 to 1.20 and 0.96 to 1.03 of FlashAttention-3.
 *
 * A step: scores of this step and values of the one before are begun together; the softmax of the scores runs while the values are
 * added. At head_dim 128 the warpgroups take turns to begin (named barriers): one's softmax falls into the other's products.
 * From tile to tile: the last values are begun, the next tile is taken notice of, its first scores are begun, and while these are
 * computed the results go to memory.
 * The same bits for a row in any batch, chunk or shape: steps begin at multiples of KEYS and are taken in descending order; of a
 * step of which a row sees nothing all weights are 0, and its maximum, sum and result stay as they are.
 *
 * Tried, and of no use: fewer scores where a tile's first step is half masked (products of another width beside those in flight
 * are serialised by ptxas), or half their softmax alone (-1 to -30 %, spills; in the first step alone +-1 %); two blocks a
 * multiprocessor at head_dim 64 (112 registers do not do), or three warpgroups (-10 % at 4k, spills); turns at head_dim 64 (-2
 * to -4 %) and 256 (no difference); asking for the next tile at the begin of this one (one multiprocessor worked 13 % longer
 * than another); passing the turn before the last products are begun (no difference); one exponential in eight by a polynomial
 * (-5 %: every instruction lengthens the chain); keys kept until the weights are final (-13 %: the ring is too short); results
 * by way of shared memory, in whole rows (-2 to -10 %: 1,900 cycles instead of 1,300), where Q was and from there by bulk copies
 * (-1 to -5 %: they end late), or from registers beside the next softmax (-3 to -15 %); one loop for all steps, masked or not
 * (-3 to -25 %); asking for the arguments' lines of the constant cache at the begin (no difference); values released in the
 * midst of the exponentials (-5 %).
 * What did: descriptors from uniform registers (+5 %), a warp of its own that finds tiles (+20 % at 512 tokens, +4 % at 4k), no
 * search for maxima (+5 %), asking for the next step's slots beside this one's products (+3 %), one elected lane that asks for
 * copies (over pages +7 %), masks by bits (+1 to +2 % at 512 and 1k), results stored beside the next scores (+5 % at 1k,
 * head_dim 64 +5 to +9 %: no register is spilled since), the keys' release before the exponentials (head_dim 128 20 %, 64 -8 %),
 * steps of 64 keys at head_dim 256 (+8 % at 512, +5 % at 1k, none beyond 4k). ALiBi, over plain: 13 % more time by a
 * multiply-add a score, 10 % (13 at 2k) where the tensor cores add the bias after the scores, 4 % (5 at 2k) before their turn.
 */
#include <atomic>

#include "kernels/cuda/attention_compute_hopper.cuh"

namespace {

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, typename shape, enum scoring_kind KIND>
__global__ void __launch_bounds__(shape::THREADS, 1)
attention_prefill_hopper_kernel(const __grid_constant__ hopper_args a)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    hopper_smem<shape> *smem = (hopper_smem<shape> *)raw;
    if (threadIdx.x == 0) {
        for (int i = 0; i < shape::Q_BUFFERS; i++) {
            mbarrier_init(shared_address(smem->q_full + i), 1);
            mbarrier_init(shared_address(smem->q_empty + i), shape::WARPGROUPS * 4);
        }
        for (int i = 0; i < shape::SLOTS; i++) {
            mbarrier_init(shared_address(smem->full + i), 1);
            mbarrier_init(shared_address(smem->empty + i), shape::WARPGROUPS * 4);
        }
        for (int i = 0; i < N_FOUND; i++) {
            mbarrier_init(shared_address(smem->found_full + i), 1);
            mbarrier_init(shared_address(smem->found_empty + i), 1);
        }
        smem->n_fetched = 0;
        mbarrier_init_fence();
    }
    if (KIND == ALIBI) write_key_numbers<shape>(smem);
    __syncthreads();
    previous_kernel_wait();
    next_kernel_allow();
    if (threadIdx.x >= shape::COMPUTE_THREADS) {
        registers_shrink<shape::FETCH_REGISTERS>();
        const int warp = uniform(((int)threadIdx.x - shape::COMPUTE_THREADS) / 32);
        if (warp == 0) fetch<shape>(a, smem);
        if (warp == 1) find_tiles<shape>(a, smem);
    } else {
        registers_grow<shape::COMPUTE_REGISTERS>();
        computer<T, shape, KIND>(a, smem).run();
    }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

// As many q heads of a KV head to a tile as leave the fewest of its rows empty, and the most heads of these.
void choose_pack(hopper_args *a, int32_t rows)
{
    int32_t best = 0;
    for (int32_t n = 1; n <= a->group; n++) {
        int32_t packed = (a->group + n - 1) / n, queries = rows / packed;
        if (packed > rows || queries > 256) continue;
        int32_t used = queries * a->group * 1024 / n; // rows of n tiles, times 1024
        if (used <= best) continue;
        best = used;
        a->n_packs = n;
        a->n_packed = packed;
        a->n_queries = queries;
    }
    a->pack_part = a->n_packed > 1 ? (uint32_t)((((uint64_t)1 << 32) + (uint64_t)a->n_packed - 1) / (uint64_t)a->n_packed) : 0;
}

cudaError_t make_maps(hopper_args *a, int32_t keys)
{
    const struct flash_attention_params *p = &a->p;
    const uint64_t columns = (uint64_t)p->head_dim / 64, kv_heads = (uint64_t)p->n_kv_heads, n_kv = p->n_kv ? (uint64_t)p->n_kv : 1;
    const bool is_bf16 = p->dtype == FLASH_ATTENTION_BF16;
    struct tensor_view q = {p->q,
                            {(uint64_t)a->group, columns, kv_heads, (uint64_t)p->n_tokens},
                            {p->q_head_stride, 64, (uint64_t)a->group * p->q_head_stride, p->q_stride},
                            {(uint32_t)a->n_packed, (uint32_t)a->n_queries}};
    a->box_tokens = p->block_table ? p->block_size : keys;
    struct tensor_view k = {p->k,
                            {p->block_table ? (uint64_t)p->block_size : n_kv, columns, kv_heads, p->block_table ? n_kv : 1},
                            {p->kv_stride, 64, p->kv_head_stride, p->block_table ? p->kv_block_stride : 8},
                            {(uint32_t)a->box_tokens, 1}};
    struct tensor_view v = k;
    v.base = p->v;
    cudaError_t status = make_tensor_map(&a->q, &q, is_bf16);
    if (status == cudaSuccess) status = make_tensor_map(&a->k, &k, is_bf16);
    if (status == cudaSuccess) status = make_tensor_map(&a->v, &v, is_bf16);
    return status;
}

std::atomic<uint32_t> n_launches; // of all shapes: which counter is next

template <typename T, typename shape, enum scoring_kind KIND>
cudaError_t launch_shape(hopper_args a, int n_sms, cudaStream_t stream)
{
    static_assert(sizeof(hopper_smem<shape>) <= 227 * 1024, "fits sm_90");
    choose_pack(&a, shape::ROWS);
    cudaError_t status = make_maps(&a, shape::KEYS);
    if (status != cudaSuccess) return status;
    a.order.n_heads = a.p.n_kv_heads * a.n_packs;
    a.order.rows = 1;
    a.order.divisor = a.n_queries;
    a.order.keys_at_once = KEYS_AT_ONCE / shape::D;
    size_t n_tiles = ((size_t)a.p.n_tokens / (size_t)a.n_queries + (size_t)a.p.n_seqs) * (size_t)a.order.n_heads;
    if (n_tiles > INT32_MAX / 2) return cudaErrorInvalidValue;
    uint64_t section = (uint64_t)(4 * n_sms / a.order.n_heads);
    if (section < 2) section = 2;
    a.order.section_part = (uint32_t)((((uint64_t)1 << 32) + section - 1) / section);
    a.counter = (int32_t)(n_launches++ % N_COUNTERS);
    unsigned n_blocks = n_tiles < (size_t)n_sms ? (unsigned)n_tiles : (unsigned)n_sms;
    return launch_kernel(attention_prefill_hopper_kernel<T, shape, KIND>, n_blocks, shape::THREADS,
                         sizeof(hopper_smem<shape>), sizeof(hopper_smem<shape>), 90, stream, a);
}

template <typename T, typename shape> cudaError_t launch_scoring(const hopper_args &a, int n_sms, cudaStream_t stream)
{
    if (a.scoring.softcap_in != 0) return launch_shape<T, shape, CAPPED>(a, n_sms, stream);
    if (a.scoring.slopes) return launch_shape<T, shape, ALIBI>(a, n_sms, stream);
    return launch_shape<T, shape, PLAIN>(a, n_sms, stream);
}

template <typename T> cudaError_t launch_dim(const hopper_args &a, int n_sms, cudaStream_t stream)
{
    if (a.p.head_dim == 128) return launch_scoring<T, hopper_shape<128>>(a, n_sms, stream);
    if (a.p.head_dim == 256) return launch_scoring<T, hopper_shape<256>>(a, n_sms, stream);
    return launch_scoring<T, hopper_shape<64>>(a, n_sms, stream);
}

} // namespace

// The driver may be made to run PTX alone, of which this kernel has none.
static bool has_code()
{
    cudaFuncAttributes code;
    const void *kernel = (const void *)attention_prefill_hopper_kernel<__half, hopper_shape<128>, PLAIN>;
    if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess) return true;
    (void)cudaGetLastError();
    return false;
}

bool prefill_fits_hopper(const struct flash_attention_params *p)
{
    static const bool has = has_code();
    const size_t most = (size_t)1 << 38; // of a stride: a map's end at 2^40 bytes
    return has && (p->head_dim == 64 || p->head_dim == 128 || p->head_dim == 256) && p->kv_head_stride < most &&
           (size_t)(p->n_heads / p->n_kv_heads) * p->q_head_stride < most;
}

cudaError_t launch_prefill_hopper(const struct flash_attention_params *p, int n_sms, cudaStream_t stream)
{
    hopper_args a = {};
    a.p = *p;
    a.scoring = scoring_of(p);
    a.group = p->n_heads / p->n_kv_heads;
    a.block_shift = p->block_size == 16 ? 4 : p->block_size == 32 ? 5 : 6;
    return p->dtype == FLASH_ATTENTION_BF16 ? launch_dim<__nv_bfloat16>(a, n_sms, stream) : launch_dim<__half>(a, n_sms, stream);
}
