/* hopper.cuh: instructions of sm_90a that CUDA C has no words for: mbarriers, bulk tensor copies (TMA), wgmma, register
 * reallocation, named barriers; and the maps that bulk tensor copies go by. (PTX ISA 8.0, "Asynchronous Warpgroup Level Matrix
 * Instructions" and "cp.async.bulk.tensor".)
 *
 * Tiles in shared memory are columns of 64 elements of 16 bits: [columns / 64][rows][64], rows of 128 bytes in the 128-byte
 * swizzle (16-byte chunk c of row r lies at chunk c XOR r % 8), which starts at multiples of 1,024 bytes.
 */
#ifndef GPTD_KERNELS_CUDA_HOPPER_CUH
#define GPTD_KERNELS_CUDA_HOPPER_CUH

#include <cuda.h> // types alone: the driver's functions are asked of the runtime

#include "kernels/cuda/mma.cuh"

enum { WARPGROUP = 128, ROW_BYTES = 128 /* of a tile's column of 64 */ };

// ---- barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and so many bytes that copies will bring before the phase ends.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
}

// Whether the phase of this parity has ended.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity)
{
    uint32_t ended;
    asm volatile("{\n\t.reg .pred p;\n\t"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return ended;
}

// Until it has.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity)
{
    uint32_t ended;
    do {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!ended);
}

// Barriers just made are known to copies, too.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What this thread stored to shared memory is seen by wgmma and bulk copies that begin after the barrier that follows.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void named_barrier_sync(int id, int n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// A fence that nothing needs: ptxas gives it a branch of its own where it is conditional, and moves nothing over that.
__device__ __forceinline__ void keep_branch() { asm volatile("membar.cta;" ::: "memory"); }

// To shared memory, in the order of the program.
__device__ __forceinline__ void store_volatile(uint32_t address, float x, float y)
{
    asm volatile("st.volatile.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void store_volatile(uint32_t address, float x)
{
    asm volatile("st.volatile.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// The same in all lanes, as the compiler then knows.
template <typename X> __device__ __forceinline__ X uniform(X x) { return __shfl_sync(0xffffffffu, x, 0); }

// True in one lane of the warp, which the compiler then knows to be alone: it takes uniform registers, as copies want.
__device__ __forceinline__ bool elect_lane()
{
    uint32_t is_elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is_elected));
    return is_elected;
}

// ---- registers ------------------------------------------------------------------------------------------------------

template <int N> __device__ __forceinline__ void registers_grow()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void registers_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- bulk tensor copies ---------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of the map's tensor to shared memory; its bytes count at the barrier. What is outside the tensor becomes zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int32_t c1, int32_t c2, int32_t c3,
                                         int32_t c4, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
                 ::"r"(to), "l"(map), "r"(0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
                 : "memory");
}

// A tensor of 16-bit elements of which the innermost dimension is 64: dimensions 1 to 4 and their strides in elements
// (multiples of 8). The box has all 64, box[0] of dimension 1, 1 of 2 and 3, box[1] of 4.
struct tensor_view {
    const void *base;
    uint64_t size[4], stride[4];
    uint32_t box[2];
};

cudaError_t make_tensor_map(CUtensorMap *map, const struct tensor_view *view, bool is_bf16);

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// The lower half of a tile's descriptor, the upper one being the same for all. The tile's rows are the operand's, along k (Q, K),
// or its rows are k ("transposed": V); it has n_rows. 16 of k further is 2 more within a column of 64 of the first kind, 128 more
// in the second. Products take it from `uniform`, so that the compiler keeps what is added to it in uniform registers: else each
// waits for those of the one before.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address, int n_rows)
{
    return (address & 0x3FFFF) >> 4 | (uint32_t)(n_rows * ROW_BYTES >> 4) << 16;
}

// 8 rows are 1,024 bytes, swizzled by 128.
#define DESCRIPTOR_UPPER "0x40000040"

// The lower half of that of a `narrow` operand, whose other half along k is the same once more: what it is multiplied by is 0.
__device__ __forceinline__ uint32_t narrow_descriptor(uint32_t address) { return (address & 0x3FFFF) >> 4; }

// 8 rows are 128 bytes.
#define NARROW_UPPER "0x00000008"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N of the thread's groups are still at work.
template <int N> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler is not to move what touches these registers past this point.
template <int N> __device__ __forceinline__ void hold_registers(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// An accumulator [64, N] of a warpgroup: warp w has rows 16 w and on, and of these a lane holds, of columns 8 i and on, at
// 4 i: (row lane / 4, columns 2 (lane % 4) and the next), then the same 8 rows further, as mma does.
template <typename T, int N> struct wgmma;

#define ACC_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                    "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC_32(d, i) ACC_8(d, i), ACC_8(d, i + 8), ACC_8(d, i + 16), ACC_8(d, i + 24)
#define ACC_64(d, i) ACC_32(d, i), ACC_32(d, i + 32)
#define ACC_128(d, i) ACC_64(d, i), ACC_64(d, i + 64)
#define REGS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
                "%29,%30,%31"
#define REGS_64 REGS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
                "%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS_128 REGS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," \
                 "%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110," \
                 "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// rows: c [64, N] (+)= a [64, 16] b [16, N], both in shared memory, rows of both along k. columns: c += a b, a in registers as
// mma has it, b's rows along N. narrow: c = a [64, 8] b [8, N], bf16, a in registers as the first half of mma's, b's rows along k,
// 16 bytes each, one after the other.
#define DEFINE_WGMMA(T, NAME, N, R, A0, A1, A2, A3, A4)                                                                       \
    template <> struct wgmma<T, N> {                                                                                          \
        static __device__ __forceinline__ void rows(float (&c)[N / 2], uint32_t a, uint32_t b, int add)                       \
        {                                                                                                                     \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 a, b;\n\tsetp.ne.b32 p, " A2 ", 0;\n\t"                             \
                         "mov.b64 a, {" A0 ", " DESCRIPTOR_UPPER "};\n\tmov.b64 b, {" A1 ", " DESCRIPTOR_UPPER "};\n\t"       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS_##R "}, a, b"              \
                         ", p, 1, 1, 0, 0;\n\t}"                                                                              \
                         : ACC_##R(c, 0)                                                                                      \
                         : "r"(a), "r"(b), "r"(add));                                                                         \
        }                                                                                                                     \
        static __device__ __forceinline__ void columns(float (&c)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                                       uint32_t b)                                                            \
        {                                                                                                                     \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 b;\n\tsetp.eq.u32 p, 0, 0;\n\t"                                     \
                         "mov.b64 b, {" A4 ", " DESCRIPTOR_UPPER "};\n\t"                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS_##R "}, {" A0 ", " A1      \
                         ", " A2 ", " A3 "}, b, p, 1, 1, 1;\n\t}"                                                             \
                         : ACC_##R(c, 0)                                                                                      \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b));                                                       \
        }                                                                                                                     \
        static __device__ __forceinline__ void narrow(float (&c)[N / 2], uint32_t a0, uint32_t a1, uint32_t b)                \
        {                                                                                                                     \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 b;\n\tsetp.ne.u32 p, 0, 0;\n\t"                                     \
                         "mov.b64 b, {" A3 ", " NARROW_UPPER "};\n\t"                                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS_##R "}, {" A0 ", " A1              \
                         ", " A2 ", " A2 "}, b, p, 1, 1, 0;\n\t}"                                                             \
                         : ACC_##R(c, 0)                                                                                      \
                         : "r"(a0), "r"(a1), "r"(0), "r"(b));                                                                 \
        }                                                                                                                     \
    };
#define DEFINE_WGMMA_TYPES(...)                      \
    DEFINE_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
    DEFINE_WGMMA(__half, "f16", __VA_ARGS__)
DEFINE_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35", "%36")
DEFINE_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67", "%68")
DEFINE_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131", "%132")

#endif
