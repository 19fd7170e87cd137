/* watchdog.h: the thread that looks after connections: deadlines, and clients that went away.
 *
 * libmicrohttpd times out inactivity only (a byte every two seconds holds a connection for ever) and does not look at a
 * suspended connection at all. So each connection has a watch: a phase and one deadline, kept by the HTTP threads. Five
 * to ten times a second while there is something to watch, this thread tells about those that are due, and, while a
 * request runs, about those whose client has closed or half-closed its side.
 */
#ifndef GPTD_SERVER_WATCHDOG_H
#define GPTD_SERVER_WATCHDOG_H

#include "kernels/error.h"

#include <stdbool.h>
#include <stdint.h>

struct watchdog;

enum watch_phase {
    WATCH_IDLE,    // between requests
    WATCH_HEADERS, // reading headers
    WATCH_BODY,    // reading the body
    WATCH_RUNNING, // the request is worked on: a client that goes away is noticed
    WATCH_STREAMING, // the client is to take a part of what is still worked on: that he goes away is noticed, too
    WATCH_SENDING, // there is something for the client to take, and that is all
};

enum watch_event { WATCH_DUE, WATCH_GONE };

struct watch {
    int fd;
    enum watch_phase phase;
    double deadline;               // CLOCK_MONOTONIC seconds; INFINITY: none
    struct watch *next, *previous; // the watchdog's own
};

// Monotonic time in seconds.
double watchdog_now(void);
// Whether the client has closed or half-closed its side.
bool watch_gone(const struct watch *w);

// event is called on the watchdog's thread with its lock held, so that no watch goes away meanwhile: it must not call
// the watchdog. A watch stays due (gone) until its phase or deadline changes: it is told about again, each second
// (tick).
int watchdog_create(struct watchdog **out, void (*event)(struct watch *w, enum watch_event what), struct error *e);
int watchdog_start(struct watchdog *d, struct error *e);
void watchdog_add(struct watchdog *d, struct watch *w);
void watchdog_remove(struct watchdog *d, struct watch *w);
void watchdog_set(struct watchdog *d, struct watch *w, enum watch_phase phase, double deadline);
void watchdog_destroy(struct watchdog *d);

#endif
