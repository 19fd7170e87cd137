#include "tests/bench/ceilings.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels/cpu/machine.h"

enum { N_TRIES = 10, N_CHAINS = 16, N_READS = 8, N_ROUNDS = 1 << 20, MAX_BENCH_THREADS = 1024 };
static const size_t READ_BYTES = (size_t)2 << 30;

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Both loops for vectors of `width` bytes. The sums go to a sink, or the compiler would drop the work.
#define DEFINE_LOOPS(suffix, width, attributes)                                                                        \
    attributes static void read_##suffix(const char *from, size_t bytes, float *sink)                                  \
    {                                                                                                                  \
        typedef int64_t vec __attribute__((vector_size(width), aligned(16)));                                          \
        vec sum[N_READS] = {0}, any = {0};                                                                             \
        for (size_t i = 0; i < bytes; i += N_READS * width)                                                            \
            _Pragma("GCC unroll 8") for (int j = 0; j < N_READS; j++) sum[j] |= *(const vec *)(from + i + j * width);  \
        for (int j = 0; j < N_READS; j++) any |= sum[j];                                                               \
        sink[0] += (float)any[0];                                                                                      \
    }                                                                                                                  \
    attributes static void fma_##suffix(float *sink)                                                                   \
    {                                                                                                                  \
        typedef float vec __attribute__((vector_size(width)));                                                         \
        vec sum[N_CHAINS], a = (vec){0} + sink[0], b = (vec){0} + sink[1];                                             \
        for (int j = 0; j < N_CHAINS; j++) sum[j] = (vec){0} + (float)j;                                               \
        for (int i = 0; i < N_ROUNDS; i++)                                                                             \
            _Pragma("GCC unroll 16") for (int j = 0; j < N_CHAINS; j++) sum[j] = a * b + sum[j];                       \
        for (int j = 0; j < N_CHAINS; j++) sink[j % 4] += sum[j][j % 4];                                               \
    }

#define FAST __attribute__((optimize("O3", "fp-contract=fast")))
DEFINE_LOOPS(generic, 16, FAST)

#ifdef __x86_64__
#include <immintrin.h>

DEFINE_LOOPS(avx2, 32, FAST __attribute__((target("avx2,fma"))))
DEFINE_LOOPS(avx512, 64, FAST __attribute__((target("avx512f"))))

FAST __attribute__((target("avx512f,avx512bf16"))) static void bf16_avx512(float *sink)
{
    __m512 sum[N_CHAINS];
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(sink[0]), _mm512_set1_ps(sink[1]));
    for (int j = 0; j < N_CHAINS; j++) sum[j] = _mm512_set1_ps((float)j);
    for (int i = 0; i < N_ROUNDS; i++)
        _Pragma("GCC unroll 16") for (int j = 0; j < N_CHAINS; j++) sum[j] = _mm512_dpbf16_ps(sum[j], a, a);
    for (int j = 0; j < N_CHAINS; j++) sink[j % 4] += _mm512_reduce_add_ps(sum[j]);
}
#endif

struct loops {
    void (*read)(const char *from, size_t bytes, float *sink);
    void (*fma)(float *sink);
    void (*bf16)(float *sink); // NULL: the CPU has none
    int vector_bytes;
};

static struct loops choose_loops(void)
{
#ifdef __x86_64__
    switch (machine_isa()) {
    case ISA_AVX512BF16: return (struct loops){read_avx512, fma_avx512, bf16_avx512, 64};
    case ISA_AVX512: return (struct loops){read_avx512, fma_avx512, NULL, 64};
    case ISA_AVX2: return (struct loops){read_avx2, fma_avx2, NULL, 32};
    default: break;
    }
#endif
    return (struct loops){read_generic, fma_generic, NULL, 16};
}

struct try {
    struct loops loops;
    void (*arithmetic)(float *sink);
    const char *memory;
    size_t bytes; // per thread
};

static volatile float sinks[MAX_BENCH_THREADS];

static void run_read(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    const struct try *t = arg;
    float sink[4] = {0};
    t->loops.read(t->memory + (size_t)item * t->bytes, t->bytes, sink);
    sinks[item] = sink[0];
}

static void run_arithmetic(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    const struct try *t = arg;
    float sink[4] = {1e-3f, 1e-3f};
    t->arithmetic(sink);
    sinks[item] = sink[0] + sink[1] + sink[2] + sink[3];
}

static double best_seconds(struct thread_pool *pool, void (*work)(void *, int32_t, int32_t), struct try *t)
{
    double best = 1e9;
    for (int i = 0; i < N_TRIES; i++) {
        double start = bench_now();
        thread_pool_run(pool, thread_pool_size(pool), work, t);
        double seconds = bench_now() - start;
        if (seconds < best) best = seconds;
    }
    return best;
}

double ceilings_read(struct thread_pool *pool, const void *memory, size_t bytes)
{
    size_t n_threads = (size_t)thread_pool_size(pool);
    struct try t = {.loops = choose_loops(), .memory = memory, .bytes = bytes / n_threads / 4096 * 4096};
    return (double)(t.bytes * n_threads) / best_seconds(pool, run_read, &t);
}

int ceilings_measure(struct ceilings *c, struct thread_pool *pool, struct error *e)
{
    char *memory = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return error_set(e, ERR_NOMEM, "ceilings: no memory for %zu bytes", READ_BYTES);
    madvise(memory, READ_BYTES, MADV_HUGEPAGE);
    memset(memory, 0x5A, READ_BYTES);
    c->read_bytes_per_s = ceilings_read(pool, memory, READ_BYTES);
    munmap(memory, READ_BYTES);
    struct try t = {.loops = choose_loops()};
    double fmas = (double)thread_pool_size(pool) * N_ROUNDS * N_CHAINS * t.loops.vector_bytes / 4;
    t.arithmetic = t.loops.fma;
    c->fma_flops = c->bf16_flops = 2 * fmas / best_seconds(pool, run_arithmetic, &t);
    if (t.loops.bf16) {
        t.arithmetic = t.loops.bf16;
        c->bf16_flops = 4 * fmas / best_seconds(pool, run_arithmetic, &t);
    }
    return 0;
}
