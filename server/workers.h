/* workers.h: threads for the work that is too long for an event loop: parsing and tokenizing long prompts.
 *
 * The shortest job goes first, so that nobody waits behind texts far longer than his own, and the bound of the queue is
 * on the bytes ahead, which is time: who finds too many tells his client so. (All jobs together are bounded by the connections.)
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
    size_t size;                  // bytes of the text: of equal ones, the first come goes first
    struct job *next;             // the workers' own
};

// max_ahead: bytes.
int workers_create(struct workers **out, int32_t n_threads, size_t max_ahead, struct error *e);
// Hands job over. False: jobs of more than max_ahead bytes would go before it, or the queue is closed.
bool workers_submit(struct workers *w, struct job *job);
// Takes job back. False: a worker has begun it.
bool workers_cancel(struct workers *w, struct job *job);
// Runs what is queued, then ends the threads. Takes nothing more.
void workers_close(struct workers *w);
void workers_destroy(struct workers *w);

#endif
