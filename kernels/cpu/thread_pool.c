#include "kernels/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cpu/machine.h"
#include "kernels/progress.h"

// How long a worker looks for the next op before it sleeps: the ops of a step follow one another within 20 µs.
enum { SPIN_NS = 100000 };

typedef void (*work_fn)(void *arg, int32_t item, int32_t thread);

// A job is published by storing `ticket` = epoch << 32 | next item. An item is claimed by a compare-and-swap of the
// whole ticket, so a worker that is late, and has read the fields of a job that is over, can never claim an item of
// another job: its swap names the old epoch and fails. Nor can it take the next job's n_items for its own job's: before
// the fields change, the old ticket is closed (no item left whatever n_items is).
struct thread_pool {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int32_t n_done;
    _Alignas(64) _Atomic int32_t n_items;
    _Atomic(work_fn) work;
    _Atomic(void *) arg;
    _Atomic bool stop;
    _Atomic int32_t n_sleeping;
    pthread_mutex_t mutex; // guards sleeping only
    pthread_cond_t wake;
    int32_t n_threads;     // the caller included
    int32_t n_started;
    struct worker *workers; // [n_threads - 1]
};

struct worker {
    pthread_t thread;
    struct thread_pool *pool;
    int32_t index; // 1 .. n_threads - 1; 0 is the caller
};

static inline void cpu_relax(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint32_t ticket_epoch(uint64_t ticket)
{
    return (uint32_t)(ticket >> 32);
}

// Works on the job of `epoch` until no item is left.
static void run_items(struct thread_pool *pool, uint32_t epoch, int32_t thread)
{
    int32_t n_items = atomic_load_explicit(&pool->n_items, memory_order_acquire);
    work_fn work = atomic_load_explicit(&pool->work, memory_order_acquire);
    void *arg = atomic_load_explicit(&pool->arg, memory_order_acquire);
    uint64_t ticket = atomic_load(&pool->ticket);
    while (ticket_epoch(ticket) == epoch && (int32_t)ticket < n_items) {
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        work(arg, (int32_t)ticket, thread);
        progress_beat();
        atomic_fetch_add_explicit(&pool->n_done, 1, memory_order_release);
        ticket = atomic_load(&pool->ticket);
    }
}

static bool has_news(struct thread_pool *pool, uint32_t seen)
{
    return ticket_epoch(atomic_load(&pool->ticket)) != seen || atomic_load(&pool->stop);
}

static void wait_for_news(struct thread_pool *pool, uint32_t seen)
{
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            if (has_news(pool, seen)) return;
            cpu_relax();
        }
    } while (now_ns() < end);
    pthread_mutex_lock(&pool->mutex);
    // Before the last look at the ticket: the publisher stores the ticket first and then looks here.
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (!has_news(pool, seen)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void wake_sleepers(struct thread_pool *pool)
{
    if (atomic_load(&pool->n_sleeping) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct thread_pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        wait_for_news(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        seen = ticket_epoch(atomic_load(&pool->ticket));
        run_items(pool, seen, worker->index);
    }
}

void thread_pool_run(struct thread_pool *pool, int32_t n_items, void (*work)(void *arg, int32_t item, int32_t thread),
                     void *arg)
{
    if (pool->n_threads == 1 || n_items <= 1) {
        for (int32_t i = 0; i < n_items; i++) {
            work(arg, i, 0);
            progress_beat();
        }
        return;
    }
    uint32_t epoch = ticket_epoch(atomic_load(&pool->ticket)) + 1;
    atomic_store(&pool->ticket, (uint64_t)(epoch - 1) << 32 | INT32_MAX);
    atomic_store_explicit(&pool->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->n_items, n_items, memory_order_release);
    atomic_store_explicit(&pool->work, work, memory_order_release);
    atomic_store_explicit(&pool->arg, arg, memory_order_release);
    atomic_store(&pool->ticket, (uint64_t)epoch << 32);
    wake_sleepers(pool);
    run_items(pool, epoch, 0);
    for (int spins = 0; atomic_load_explicit(&pool->n_done, memory_order_acquire) != n_items; spins++) {
        if (spins < 10000) cpu_relax();
        else sched_yield(); // a worker lost its core to another process: let it have this one
    }
}

int thread_pool_create(struct thread_pool **out, int32_t n_threads, struct error *e)
{
    *out = NULL;
    if (n_threads == 0) n_threads = machine_cores();
    if (n_threads < 1 || n_threads > 1024)
        return error_set(e, ERR_INVALID, "%d threads: must be from 1 to 1024", n_threads);
    struct thread_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool) return error_set(e, ERR_NOMEM, "thread pool: out of memory");
    *pool = (struct thread_pool){.n_threads = n_threads};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc((size_t)n_threads, sizeof *pool->workers);
    if (!pool->workers) {
        error_set(e, ERR_NOMEM, "thread pool: out of memory");
        goto fail;
    }
    for (int32_t i = 1; i < n_threads; i++) {
        struct worker *worker = &pool->workers[i - 1];
        *worker = (struct worker){.pool = pool, .index = i};
        if (pthread_create(&worker->thread, NULL, worker_main, worker)) {
            error_set(e, ERR_NOMEM, "thread pool: thread %d of %d could not be started", i + 1, n_threads);
            goto fail;
        }
        pool->n_started++;
    }
    *out = pool;
    return 0;
fail:
    thread_pool_destroy(pool);
    return e ? e->code : ERR_NOMEM;
}

void thread_pool_destroy(struct thread_pool *pool)
{
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int32_t i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

int32_t thread_pool_size(const struct thread_pool *pool)
{
    return pool->n_threads;
}
