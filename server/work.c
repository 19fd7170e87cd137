/* Work on bodies, at once or on a worker, and whether it is still wanted. */
#include "server/context.h"

#include <math.h>
#include <unistd.h>

double request_deadline(const struct exchange *x)
{
    double timeout = x->server->options.request_timeout;
    return timeout > 0 ? x->received + timeout : INFINITY;
}

int request_check_time(const struct exchange *x, struct http_error *e)
{
    if (atomic_load(&x->server->stopping)) return http_error_set(e, 503, NULL, NULL, "the server is shutting down");
    if (watchdog_now() < request_deadline(x)) return 0;
    return http_error_set(e, 408, NULL, NULL, "the request took longer than %g s", x->server->options.request_timeout);
}

static bool is_wanted(const struct exchange *x)
{
    return !atomic_load(&x->gone) && !atomic_load(&x->server->stopping) && watchdog_now() < request_deadline(x);
}

static void run_work(struct job *job)
{
    struct work *w = (struct work *)job; // its first member
    atomic_store(&w->x->held, true);
    if (is_wanted(w->x)) w->run(w->x);
    atomic_store(&w->x->held, false);
    exchange_finish_wait(w->x, &w->finished);
}

bool work_begin(struct work *w, struct exchange *x, size_t short_body, void (*run)(struct exchange *x))
{
    w->job.run = run_work;
    w->job.size = x->body.length;
    w->x = x;
    w->run = run;
    x->deadline = request_deadline(x);
    if (x->body.length > short_body && workers_submit(x->server->workers, &w->job)) return true;
    atomic_store(&w->finished, true);
    if (x->body.length > short_body) return false;
    run(x);
    return true;
}

bool work_over(struct work *w)
{
    if (!is_wanted(w->x) && workers_cancel(w->x->server->workers, &w->job)) atomic_store(&w->finished, true);
    return atomic_load(&w->finished);
}

// libmicrohttpd may end the exchange of a client that has gone without asking its handler. While a worker holds it, its
// connection is not resumed, so that this waits for a job only if it was begun in between.
void work_end(struct work *w)
{
    if (!w->x || workers_cancel(w->x->server->workers, &w->job)) return;
    while (!atomic_load(&w->finished)) usleep(1000);
}
