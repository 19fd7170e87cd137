/* The workers' queue: shortest first, bounded by what is ahead, and what is taken back is not run. */
#include "server/workers.h"

#include <check.h>
#include <semaphore.h>

enum { MAX_AHEAD = 17 }; // bytes

static sem_t begun, go_on;
static size_t order[16];
static int n_run;

static void hold(struct job *job)
{
    (void)job;
    sem_post(&begun);
    sem_wait(&go_on);
}

static void note(struct job *job) { order[n_run++] = job->size; }

// One worker, busy until go_on.
static struct workers *busy_workers(struct job *first)
{
    struct workers *w;
    struct error e;
    sem_init(&begun, 0, 0);
    sem_init(&go_on, 0, 0);
    n_run = 0;
    *first = (struct job){.run = hold, .size = 1};
    ck_assert_int_eq(workers_create(&w, 1, MAX_AHEAD, &e), 0);
    ck_assert(workers_submit(w, first));
    sem_wait(&begun);
    return w;
}

START_TEST(shortest_first)
{
    static const size_t sizes[] = {9, 5, 7, 5, 1};
    struct job first, jobs[5];
    struct workers *w = busy_workers(&first);
    for (int i = 0; i < 5; i++) {
        jobs[i] = (struct job){.run = note, .size = sizes[i]};
        ck_assert(workers_submit(w, &jobs[i]));
    }
    struct job too_long = {.run = note, .size = 8}, shorter = {.run = note, .size = 6};
    ck_assert(!workers_submit(w, &too_long)); // 18 bytes are ahead of it
    ck_assert(workers_submit(w, &shorter));
    ck_assert(workers_cancel(w, &jobs[2]));
    ck_assert(!workers_cancel(w, &jobs[2]));
    ck_assert(!workers_cancel(w, &first)); // it runs
    sem_post(&go_on);
    workers_close(w);
    static const size_t expected[] = {1, 5, 5, 6, 9};
    ck_assert_int_eq(n_run, 5);
    for (int i = 0; i < 5; i++) ck_assert_uint_eq(order[i], expected[i]);
    ck_assert(!workers_submit(w, &shorter));
    workers_destroy(w);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("workers");
    TCase *tc = tcase_create("workers");
    tcase_add_test(tc, shortest_first);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
