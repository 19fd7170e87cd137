#include "server/workers.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WORKERS = 64 };

struct workers {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *first; // by size
    size_t max_ahead; // bytes
    bool closed;
    int32_t n_threads;
    pthread_t threads[MAX_WORKERS];
};

static void *worker_run(void *arg)
{
    struct workers *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (!w->first && !w->closed) pthread_cond_wait(&w->work, &w->lock);
        struct job *job = w->first;
        if (!job) break;
        w->first = job->next;
        pthread_mutex_unlock(&w->lock);
        job->run(job);
        pthread_mutex_lock(&w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

int workers_create(struct workers **out, int32_t n_threads, size_t max_ahead, struct error *e)
{
    if (n_threads < 1 || n_threads > MAX_WORKERS)
        return error_set(e, ERR_INVALID, "worker threads: %d is not between 1 and %d", n_threads, MAX_WORKERS);
    struct workers *w = calloc(1, sizeof *w);
    if (!w) return error_set(e, ERR_NOMEM, "out of memory");
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, NULL);
    w->max_ahead = max_ahead;
    for (; w->n_threads < n_threads; w->n_threads++) {
        int failed = pthread_create(&w->threads[w->n_threads], NULL, worker_run, w);
        if (failed) {
            workers_destroy(w);
            return error_set(e, ERR_NOMEM, "cannot start a worker thread: %s", strerror(failed));
        }
    }
    *out = w;
    return 0;
}

bool workers_submit(struct workers *w, struct job *job)
{
    pthread_mutex_lock(&w->lock);
    struct job **at = &w->first;
    size_t ahead = 0;
    for (; *at && (*at)->size <= job->size; at = &(*at)->next) ahead += (*at)->size;
    bool taken = !w->closed && ahead <= w->max_ahead;
    if (taken) {
        job->next = *at;
        *at = job;
        pthread_cond_signal(&w->work);
    }
    pthread_mutex_unlock(&w->lock);
    return taken;
}

bool workers_cancel(struct workers *w, struct job *job)
{
    pthread_mutex_lock(&w->lock);
    struct job **at = &w->first;
    while (*at && *at != job) at = &(*at)->next;
    bool found = *at;
    if (found) *at = job->next;
    pthread_mutex_unlock(&w->lock);
    return found;
}

void workers_close(struct workers *w)
{
    pthread_mutex_lock(&w->lock);
    w->closed = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    for (; w->n_threads > 0; w->n_threads--) pthread_join(w->threads[w->n_threads - 1], NULL);
}

void workers_destroy(struct workers *w)
{
    if (!w) return;
    workers_close(w);
    pthread_cond_destroy(&w->work);
    pthread_mutex_destroy(&w->lock);
    free(w);
}
