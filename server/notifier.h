/* notifier.h: who waits for the engine, and the thread that tells them.
 *
 * The engine writes its token rings and signals one eventfd a step; it must never pay for waking connections. This
 * thread waits on that eventfd, asks everyone on its list whether there is something for him, and resumes those alone.
 * One lock orders waiting against waking: `ready` is asked under it before anyone goes to sleep, so no wake-up is lost.
 */
#ifndef GPTD_SERVER_NOTIFIER_H
#define GPTD_SERVER_NOTIFIER_H

#include "kernels/error.h"

#include <stdatomic.h>
#include <stdbool.h>

struct notifier;

// Part of whatever waits. Zero-initialized, then `ready` set.
struct waiter {
    bool (*ready)(const struct waiter *w); // cheap, does not block: is called under the lock, by any thread
    bool waiting;                          // on the list; the rest is the notifier's
    struct waiter *next, *previous;
};

// suspend and resume put a waiter to sleep and wake it; both are called under the lock and don't block.
int notifier_create(struct notifier **out, void (*suspend)(struct waiter *), void (*resume)(struct waiter *),
                    struct error *e);
// Starts the thread. It ends with notifier_destroy.
int notifier_start(struct notifier *n, int event_fd, struct error *e);
// Puts w to sleep, unless it is ready or the notifier closed; false then.
bool notifier_wait(struct notifier *n, struct waiter *w);
// Wakes w if it sleeps, ready or not; then sets *flag (may be NULL), after which w is not touched any more.
void notifier_wake(struct notifier *n, struct waiter *w, atomic_bool *flag);
// Wakes all. Nobody sleeps from now on.
void notifier_close(struct notifier *n);
void notifier_destroy(struct notifier *n);

#endif
