/* workers.h: threads for the work that is too long for an event loop: parsing and tokenizing long prompts.
 *
 * The queue is bounded; who finds it full tells his client so.
 */
#ifndef GPTD_SERVER_WORKERS_H
#define GPTD_SERVER_WORKERS_H

#include "kernels/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct workers;

struct job {
    void (*run)(struct job *job); // on a worker; the job may be gone when it returns
    struct job *next;             // the workers' own
};

int workers_create(struct workers **out, int32_t n_threads, size_t max_queued, struct error *e);
// Hands job over. False: the queue is full, or closed.
bool workers_submit(struct workers *w, struct job *job);
// Runs what is queued, then ends the threads. Takes nothing more.
void workers_close(struct workers *w);
void workers_destroy(struct workers *w);

#endif
