/* The threads beside the event loops: notifier, watchdog, workers. */
#include "server/notifier.h"
#include "server/watchdog.h"
#include "server/workers.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { N_WAITERS = 50, N_ROUNDS = 400 };

// ---- notifier ----

// Stands for a connection: a thread that sleeps on a condition where an event loop would suspend.
struct sleeper {
    struct waiter waiter; // first
    struct notifier *notifier;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool suspended;
    atomic_int produced, consumed; // what the engine wrote, what was taken
    pthread_t thread;
};

static bool sleeper_ready(const struct waiter *w)
{
    const struct sleeper *s = (const struct sleeper *)w;
    return atomic_load(&s->produced) > atomic_load(&s->consumed);
}

static void sleeper_suspend(struct waiter *w)
{
    struct sleeper *s = (struct sleeper *)w;
    pthread_mutex_lock(&s->lock);
    s->suspended = true;
    pthread_mutex_unlock(&s->lock);
}

static void sleeper_resume(struct waiter *w)
{
    struct sleeper *s = (struct sleeper *)w;
    pthread_mutex_lock(&s->lock);
    s->suspended = false;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

static void *sleeper_run(void *arg)
{
    struct sleeper *s = arg;
    while (atomic_load(&s->consumed) < N_ROUNDS) {
        if (sleeper_ready(&s->waiter)) {
            atomic_fetch_add(&s->consumed, 1);
            continue;
        }
        if (!notifier_wait(s->notifier, &s->waiter)) continue;
        pthread_mutex_lock(&s->lock);
        while (s->suspended) pthread_cond_wait(&s->wake, &s->lock);
        pthread_mutex_unlock(&s->lock);
    }
    return NULL;
}

// No wake-up is lost: every sleeper gets everything, though it is told once per signal alone.
START_TEST(nothing_is_lost)
{
    static struct sleeper sleepers[N_WAITERS];
    struct notifier *n;
    struct error e;
    int event_fd = eventfd(0, EFD_CLOEXEC);
    ck_assert_int_eq(notifier_create(&n, sleeper_suspend, sleeper_resume, &e), 0);
    ck_assert_int_eq(notifier_start(n, event_fd, &e), 0);
    for (int i = 0; i < N_WAITERS; i++) {
        struct sleeper *s = &sleepers[i];
        s->waiter.ready = sleeper_ready;
        s->notifier = n;
        pthread_mutex_init(&s->lock, NULL);
        pthread_cond_init(&s->wake, NULL);
        pthread_create(&s->thread, NULL, sleeper_run, s);
    }
    for (int round = 0; round < N_ROUNDS; round++) {
        for (int i = 0; i < N_WAITERS; i++) atomic_fetch_add(&sleepers[i].produced, 1);
        ck_assert_int_eq(eventfd_write(event_fd, 1), 0);
    }
    for (int i = 0; i < N_WAITERS; i++) pthread_join(sleepers[i].thread, NULL);
    notifier_destroy(n);
    close(event_fd);
}
END_TEST

START_TEST(wake_flag_and_close)
{
    struct notifier *n;
    struct error e;
    struct sleeper s = {
        .waiter.ready = sleeper_ready, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
    atomic_bool flag = false;
    ck_assert_int_eq(notifier_create(&n, sleeper_suspend, sleeper_resume, &e), 0);
    ck_assert(notifier_wait(n, &s.waiter));
    ck_assert(s.suspended && s.waiter.waiting);
    notifier_wake(n, &s.waiter, &flag);
    ck_assert(!s.suspended && !s.waiter.waiting && atomic_load(&flag));
    notifier_wake(n, &s.waiter, NULL); // awake already
    ck_assert(notifier_wait(n, &s.waiter));
    notifier_close(n);
    ck_assert(!s.suspended);
    ck_assert(!notifier_wait(n, &s.waiter));
    notifier_destroy(n);
}
END_TEST

// ---- watchdog ----

static atomic_int n_due, n_gone;

static void count_event(struct watch *w, enum watch_event what)
{
    (void)w;
    atomic_fetch_add(what == WATCH_DUE ? &n_due : &n_gone, 1);
}

static bool wait_for(atomic_int *count, double seconds)
{
    for (double end = watchdog_now() + seconds; watchdog_now() < end; usleep(1000))
        if (atomic_load(count) > 0) return true;
    return false;
}

START_TEST(deadlines_and_departures)
{
    struct watchdog *d;
    struct error e;
    int pair[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    ck_assert_int_eq(watchdog_create(&d, count_event, &e), 0);
    ck_assert_int_eq(watchdog_start(d, &e), 0);
    struct watch w = {.fd = pair[0], .phase = WATCH_HEADERS, .deadline = INFINITY};
    watchdog_add(d, &w);
    ck_assert(!wait_for(&n_due, 0.4));
    watchdog_set(d, &w, WATCH_BODY, watchdog_now() + 0.1);
    ck_assert(wait_for(&n_due, 5));

    // A half-close is noticed while a request runs, and then alone.
    shutdown(pair[1], SHUT_WR);
    watchdog_set(d, &w, WATCH_SENDING, INFINITY);
    ck_assert(!wait_for(&n_gone, 0.4));
    watchdog_set(d, &w, WATCH_RUNNING, INFINITY);
    ck_assert(wait_for(&n_gone, 5));
    watchdog_remove(d, &w);
    watchdog_destroy(d);
    close(pair[0]);
    close(pair[1]);
}
END_TEST

// ---- workers ----

struct task {
    struct job job; // first
    atomic_int *n_done, *gate;
};

static void task_run(struct job *job)
{
    struct task *t = (struct task *)job;
    while (!atomic_load(t->gate)) usleep(100);
    atomic_fetch_add(t->n_done, 1);
}

START_TEST(queue_is_bounded_and_emptied)
{
    enum { N = 8, QUEUED = 3 };
    struct workers *w;
    struct error e;
    atomic_int n_done = 0, gate = 0;
    struct task tasks[N];
    ck_assert_int_ne(workers_create(&w, 0, 1, &e), 0);
    ck_assert_int_eq(workers_create(&w, 1, QUEUED - 1, &e), 0);
    int taken = 0;
    for (int i = 0; i < N; i++) {
        tasks[i] = (struct task){{.run = task_run, .size = 1}, &n_done, &gate};
        taken += workers_submit(w, &tasks[i].job);
    }
    ck_assert(taken == QUEUED || taken == QUEUED + 1); // one may be running already
    atomic_store(&gate, 1);
    workers_close(w);
    ck_assert_int_eq(atomic_load(&n_done), taken);
    ck_assert(!workers_submit(w, &tasks[0].job));
    workers_destroy(w);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("notifier");
    TCase *tc = tcase_create("threads");
    tcase_add_test(tc, nothing_is_lost);
    tcase_add_test(tc, wake_flag_and_close);
    tcase_add_test(tc, deadlines_and_departures);
    tcase_add_test(tc, queue_is_bounded_and_emptied);
    tcase_set_timeout(tc, 60);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
