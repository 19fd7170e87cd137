#include "server/watchdog.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double TICK = 0.1;       // seconds between looks while a request runs
static const double SLOW_TICK = 0.25; // while there are only connections
static const double REPEAT = 1.0;     // until a watch that is due is told about again

struct watchdog {
    pthread_mutex_t lock;
    pthread_cond_t changed; // on CLOCK_MONOTONIC
    struct watch *first;
    bool ending, started;
    pthread_t thread;
    void (*event)(struct watch *w, enum watch_event what);
};

double watchdog_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool watch_gone(const struct watch *w)
{
    struct pollfd p = {.fd = w->fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

// Returns whether any request runs.
static bool look(struct watchdog *d)
{
    double now = watchdog_now();
    bool running = false;
    for (struct watch *w = d->first; w; w = w->next) {
        if (w->phase == WATCH_RUNNING || w->phase == WATCH_STREAMING) {
            running = true;
            if (watch_gone(w)) d->event(w, WATCH_GONE);
        }
        if (now < w->deadline) continue;
        d->event(w, WATCH_DUE);
        w->deadline = now + REPEAT;
    }
    return running;
}

static void wait_for(struct watchdog *d, double seconds)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += (long)(seconds * 1e9);
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&d->changed, &d->lock, &t);
}

static void *watchdog_run(void *arg)
{
    struct watchdog *d = arg;
    pthread_mutex_lock(&d->lock);
    while (!d->ending) {
        if (!d->first)
            pthread_cond_wait(&d->changed, &d->lock); // nobody is there: no tick at all
        else
            wait_for(d, look(d) ? TICK : SLOW_TICK);
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

int watchdog_create(struct watchdog **out, void (*event)(struct watch *w, enum watch_event what), struct error *e)
{
    struct watchdog *d = calloc(1, sizeof *d);
    if (!d) return error_set(e, ERR_NOMEM, "out of memory");
    d->event = event;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&d->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&d->lock, NULL);
    *out = d;
    return 0;
}

int watchdog_start(struct watchdog *d, struct error *e)
{
    int failed = pthread_create(&d->thread, NULL, watchdog_run, d);
    if (failed) return error_set(e, ERR_NOMEM, "cannot start the watchdog's thread: %s", strerror(failed));
    d->started = true;
    return 0;
}

void watchdog_add(struct watchdog *d, struct watch *w)
{
    pthread_mutex_lock(&d->lock);
    w->previous = NULL;
    w->next = d->first;
    if (d->first)
        d->first->previous = w;
    else
        pthread_cond_signal(&d->changed);
    d->first = w;
    pthread_mutex_unlock(&d->lock);
}

void watchdog_remove(struct watchdog *d, struct watch *w)
{
    pthread_mutex_lock(&d->lock);
    if (w->previous)
        w->previous->next = w->next;
    else
        d->first = w->next;
    if (w->next) w->next->previous = w->previous;
    pthread_mutex_unlock(&d->lock);
}

void watchdog_set(struct watchdog *d, struct watch *w, enum watch_phase phase, double deadline)
{
    pthread_mutex_lock(&d->lock);
    w->phase = phase;
    w->deadline = deadline;
    pthread_mutex_unlock(&d->lock);
}

void watchdog_destroy(struct watchdog *d)
{
    if (!d) return;
    if (d->started) {
        pthread_mutex_lock(&d->lock);
        d->ending = true;
        pthread_cond_signal(&d->changed);
        pthread_mutex_unlock(&d->lock);
        pthread_join(d->thread, NULL);
    }
    pthread_cond_destroy(&d->changed);
    pthread_mutex_destroy(&d->lock);
    free(d);
}
