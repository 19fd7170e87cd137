#include "server/notifier.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct notifier {
    pthread_mutex_t lock;
    struct waiter *first;
    bool closed;
    void (*suspend)(struct waiter *), (*resume)(struct waiter *);
    pthread_t thread;
    bool started;
    int event_fd; // the engine's
    int end_fd;   // ours: readable when the thread shall end
};

int notifier_create(struct notifier **out, void (*suspend)(struct waiter *), void (*resume)(struct waiter *),
                    struct error *e)
{
    struct notifier *n = calloc(1, sizeof *n);
    if (!n) return error_set(e, ERR_NOMEM, "out of memory");
    n->end_fd = eventfd(0, EFD_CLOEXEC);
    if (n->end_fd < 0) {
        free(n);
        return error_set(e, ERR_IO, "eventfd: %s", strerror(errno));
    }
    n->suspend = suspend;
    n->resume = resume;
    pthread_mutex_init(&n->lock, NULL);
    *out = n;
    return 0;
}

// Under the lock.
static void wake(struct notifier *n, struct waiter *w)
{
    if (w->previous)
        w->previous->next = w->next;
    else
        n->first = w->next;
    if (w->next) w->next->previous = w->previous;
    w->waiting = false;
    n->resume(w);
}

bool notifier_wait(struct notifier *n, struct waiter *w)
{
    pthread_mutex_lock(&n->lock);
    bool sleeps = !n->closed && !w->ready(w);
    if (sleeps) {
        w->waiting = true;
        w->previous = NULL;
        w->next = n->first;
        if (n->first) n->first->previous = w;
        n->first = w;
        n->suspend(w);
    }
    pthread_mutex_unlock(&n->lock);
    return sleeps;
}

void notifier_wake(struct notifier *n, struct waiter *w, atomic_bool *flag)
{
    pthread_mutex_lock(&n->lock);
    if (w->waiting) wake(n, w);
    if (flag) atomic_store(flag, true);
    pthread_mutex_unlock(&n->lock);
}

void notifier_close(struct notifier *n)
{
    pthread_mutex_lock(&n->lock);
    n->closed = true;
    while (n->first) wake(n, n->first);
    pthread_mutex_unlock(&n->lock);
}

static void wake_ready(struct notifier *n)
{
    pthread_mutex_lock(&n->lock);
    for (struct waiter *w = n->first, *next; w; w = next) {
        next = w->next;
        if (w->ready(w)) wake(n, w);
    }
    pthread_mutex_unlock(&n->lock);
}

static void *notifier_run(void *arg)
{
    struct notifier *n = arg;
    struct pollfd fds[2] = {{.fd = n->event_fd, .events = POLLIN}, {.fd = n->end_fd, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 2, -1) < 0) continue; // EINTR
        if (fds[1].revents) return NULL;
        uint64_t count;
        if (read(n->event_fd, &count, sizeof count) == (ssize_t)sizeof count) wake_ready(n);
    }
}

int notifier_start(struct notifier *n, int event_fd, struct error *e)
{
    n->event_fd = event_fd;
    int failed = pthread_create(&n->thread, NULL, notifier_run, n);
    if (failed) return error_set(e, ERR_NOMEM, "cannot start the notifier's thread: %s", strerror(failed));
    n->started = true;
    return 0;
}

void notifier_destroy(struct notifier *n)
{
    if (!n) return;
    if (n->started) {
        uint64_t one = 1;
        while (write(n->end_fd, &one, sizeof one) < 0 && errno == EINTR) continue;
        pthread_join(n->thread, NULL);
    }
    close(n->end_fd);
    pthread_mutex_destroy(&n->lock);
    free(n);
}
