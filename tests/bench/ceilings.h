/* ceilings.h: what this machine can do at most, measured now: the yardstick of every figure a benchmark prints. */
#ifndef GPTD_TESTS_BENCH_CEILINGS_H
#define GPTD_TESTS_BENCH_CEILINGS_H

#include "kernels/cpu/thread_pool.h"

struct ceilings {
    double read_bytes_per_s; // best of ten reads of 2 GiB by all threads, with the widest loads
    double fma_flops;        // F32 multiply-adds (2 each) a second, all threads, register-only loop; best of ten
    double bf16_flops;       // the same of vdpbf16ps (a lane: 4); fma_flops where the CPU does not have it
};

// The first of them alone: memory shared with other machines' loads gives now more, now less.
int ceilings_read(double *bytes_per_s, struct thread_pool *pool, struct error *e);
int ceilings_measure(struct ceilings *c, struct thread_pool *pool, struct error *e);

double bench_now(void); // seconds, monotonic

#endif
