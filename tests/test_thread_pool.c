#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "kernels/cpu/machine.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/progress.h"

enum { MAX_ITEMS = 1000, MAX_THREADS = 8 };

struct counts {
    int32_t n_threads;
    _Atomic int32_t items[MAX_ITEMS];
    _Atomic int32_t busy[MAX_THREADS]; // 1 while this thread index is inside work()
    _Atomic int32_t n_wrong;
};

static void count_item(void *arg, int32_t item, int32_t thread)
{
    struct counts *c = arg;
    if (thread < 0 || thread >= c->n_threads || atomic_fetch_add(&c->busy[thread], 1) != 0) {
        atomic_fetch_add(&c->n_wrong, 1);
        return;
    }
    atomic_fetch_add(&c->items[item], 1);
    atomic_fetch_sub(&c->busy[thread], 1);
}

static struct thread_pool *create(int32_t n_threads)
{
    struct thread_pool *pool;
    struct error e;
    ck_assert_int_eq(thread_pool_create(&pool, n_threads, &e), 0);
    return pool;
}

START_TEST(every_item_runs_once)
{
    static const int32_t sizes[] = {0, 1, 2, 3, 7, 64, MAX_ITEMS};
    for (int32_t n_threads = 1; n_threads <= MAX_THREADS; n_threads++) {
        struct thread_pool *pool = create(n_threads);
        ck_assert_int_eq(thread_pool_size(pool), n_threads);
        for (int round = 0; round < 20; round++)
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
                static struct counts c;
                memset(&c, 0, sizeof c);
                c.n_threads = n_threads;
                thread_pool_run(pool, sizes[s], count_item, &c);
                ck_assert_int_eq(c.n_wrong, 0);
                for (int32_t i = 0; i < MAX_ITEMS; i++) ck_assert_int_eq(c.items[i], i < sizes[s]);
            }
        thread_pool_destroy(pool);
    }
}
END_TEST

static void add_one(void *arg, int32_t item, int32_t thread)
{
    (void)thread;
    ((int64_t *)arg)[item]++; // not atomic: run() must order each job before the next
}

// Jobs in close succession, each on a stack frame of its own, with pauses long enough for the workers to fall asleep.
START_TEST(jobs_do_not_mix)
{
    struct thread_pool *pool = create(3);
    for (int pause = 0; pause < 5; pause++) {
        int64_t sums[16] = {0};
        for (int job = 0; job < 2000; job++) {
            int64_t items[16] = {0};
            thread_pool_run(pool, 16, add_one, items);
            for (int i = 0; i < 16; i++) sums[i] += items[i];
        }
        for (int i = 0; i < 16; i++) ck_assert_int_eq(sums[i], 2000);
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    thread_pool_destroy(pool);
}
END_TEST

static int64_t cpu_us(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (int64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000 + u.ru_utime.tv_usec + u.ru_stime.tv_usec;
}

START_TEST(idle_workers_sleep)
{
    struct thread_pool *pool = create(4);
    int64_t items[16] = {0};
    thread_pool_run(pool, 16, add_one, items);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL); // the spin after a job
    int64_t before = cpu_us();
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    ck_assert_int_lt(cpu_us() - before, 2000);
    thread_pool_run(pool, 16, add_one, items); // they wake up again
    for (int i = 0; i < 16; i++) ck_assert_int_eq(items[i], 2);
    thread_pool_destroy(pool);
}
END_TEST

// Whoever looks from outside sees that a long job gets on.
START_TEST(items_beat)
{
    struct thread_pool *pool = create(_i);
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    double begin = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec, seen = progress_time();
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    ck_assert(progress_time() == seen);
    thread_pool_run(pool, 2, count_item, &(struct counts){.n_threads = _i});
    ck_assert(progress_time() > begin);
    thread_pool_destroy(pool);
}
END_TEST

START_TEST(sizes_are_checked)
{
    struct thread_pool *pool;
    struct error e;
    ck_assert_int_eq(thread_pool_create(&pool, -1, &e), ERR_INVALID);
    ck_assert_ptr_null(pool);
    ck_assert_int_eq(thread_pool_create(&pool, 1025, &e), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(e.message, "1025"));
    pool = create(0);
    ck_assert_int_eq(thread_pool_size(pool), machine_cores());
    ck_assert_int_ge(machine_cores(), 1);
    thread_pool_destroy(pool);
    thread_pool_destroy(NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("thread_pool");
    TCase *tcase = tcase_create("thread_pool");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, every_item_runs_once);
    tcase_add_test(tcase, jobs_do_not_mix);
    tcase_add_test(tcase, idle_workers_sleep);
    tcase_add_loop_test(tcase, items_beat, 1, 3);
    tcase_add_test(tcase, sizes_are_checked);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
