/* ceilings.h: what this machine can do at most, measured now: the yardstick of every figure a benchmark prints. */
#ifndef GPTD_TESTS_BENCH_CEILINGS_H
#define GPTD_TESTS_BENCH_CEILINGS_H

#include <stddef.h>

#include "kernels/cpu/thread_pool.h"

struct ceilings {
    double read_bytes_per_s; // best of ten reads of 2 GiB by all threads, with the widest loads
    double fma_flops;        // F32 multiply-adds (2 each) a second, all threads, register-only loop; best of ten
    double bf16_flops;       // the same of vdpbf16ps (a lane: 4); fma_flops where the CPU does not have it
};

// The first of them alone, of memory that is there: a machine's memory need not be equally near everywhere, and what
// is shared with other machines gives now more, now less.
double ceilings_read(struct thread_pool *pool, const void *memory, size_t bytes);
int ceilings_measure(struct ceilings *c, struct thread_pool *pool, struct error *e);

double bench_now(void); // seconds, monotonic

#endif
