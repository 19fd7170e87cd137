/* http.h: HTTP exchanges for the route handlers, who know nothing of libmicrohttpd. http.c is the one file that does.
 *
 * An exchange is one request and its answer. Its handler runs on an event loop once the whole request is there and must
 * not block: it answers, or returns EXCHANGE_WAIT and is called again when the route's `ready` says so, when the
 * deadline it left in the exchange is due, or when the client has gone. While it waits its connection costs nothing.
 * http.c keeps the limits (connections, body, deadlines), checks headers and keys, and logs and counts each exchange.
 */
#ifndef GPTD_SERVER_HTTP_H
#define GPTD_SERVER_HTTP_H

#include "server/error_response.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/notifier.h"
#include "server/server.h"
#include "server/text_buffer.h"
#include "server/watchdog.h"

#include <stdatomic.h>

struct http;
struct exchange;

enum exchange_next {
    EXCHANGE_WAIT,  // nothing to do or say for now
    EXCHANGE_GO,    // handle: answered; stream: x->out holds something to send
    EXCHANGE_END,   // stream: what x->out holds is the end
    EXCHANGE_ABORT, // the client has gone: close the connection
};

struct route {
    const char *method, *path; // "GET" (answers HEAD too) or "POST"; a path that ends in '/' takes what follows too, "/" nothing
    bool open;                 // without a key, and while the server drains
    enum api_role role;        // else of a key that may
    enum exchange_next (*handle)(struct exchange *x);
    enum exchange_next (*stream)(struct exchange *x); // after exchange_reply_stream: appends to x->out, which is empty
    bool (*ready)(const struct exchange *x);          // see struct waiter
    void (*done)(struct exchange *x);                 // the exchange has ended: frees x->state, fills x->log
};

enum { REQUEST_ID_MAX = 128, EXCHANGE_MAX_HEADERS = 8 };

struct exchange {
    // for handlers
    struct server *server;
    const struct route *route;
    const char *path;             // as sent, without the query
    struct text_buffer body;      // NUL-terminated (not counted in length)
    struct api_key *api_key;      // the one that was used; NULL: none asked for
    double received;              // CLOCK_MONOTONIC seconds when the whole request was there
    double deadline;              // the next call comes at the latest then (INFINITY: never mind)
    atomic_bool gone;             // the client has closed or half-closed its connection
    atomic_bool held;             // another thread is at work on it: only exchange_finish_wait calls its handler again
    struct text_buffer out;       // stream: bytes to send
    void *state;                  // the handler's
    struct log_request log;       // numbers that `done` fills in
    struct http_error error;      // what was answered or met, for the log
    char id[REQUEST_ID_MAX + 1];  // x-request-id
    char trace_id[33];            // "": none

    // http.c's own
    struct http *http;
    struct connection *connection;
    struct waiter waiter;
    size_t n_sent;                // of out
    size_t n_received, n_counted; // bytes of the body that came; those of them in memory
    int32_t status;               // 0: not answered yet
    bool refused;                 // error is the answer
    bool discard;                 // but first the body is thrown away
    bool close;                   // the connection ends with the answer
    bool queued;                  // an answer has been given to libmicrohttpd
    bool end;                     // stream: out holds the last of it
    struct {
        const char *name, *constant; // constant: the value, NULL: it is in value
        char value[128];
    } headers[EXCHANGE_MAX_HEADERS]; // [n_headers] of the answer
    int32_t n_headers;
};

// Adds a header to the answer to come. name is a constant.
void exchange_header(struct exchange *x, const char *name, const char *value);
// The same with a value that is a constant, too, and may be long.
void exchange_header_constant(struct exchange *x, const char *name, const char *value);
// Answers with body, which is taken (and left empty). Out of memory in it: a 503 instead.
enum exchange_next exchange_reply(struct exchange *x, int32_t status, const char *content_type,
                                  struct text_buffer *body);
enum exchange_next exchange_reply_json(struct exchange *x, struct text_buffer *body); // 200
enum exchange_next exchange_reply_error(struct exchange *x, const struct http_error *e);
// Answers 200 with server-sent events, which the route's `stream` writes.
enum exchange_next exchange_reply_stream(struct exchange *x);
// Frees the body before the exchange ends: it no longer counts among those in memory.
void exchange_drop_body(struct exchange *x);
// For work done elsewhere: sets *finished, which `ready` looks at, and has x called again. x may be gone on return.
void exchange_finish_wait(struct exchange *x, atomic_bool *finished);

// options (with their keys), server and metrics are borrowed; routes: [n_routes]. Binds the port.
int http_create(struct http **out, const struct server_options *options, const struct route *routes, size_t n_routes,
                struct server *server, struct metrics *metrics, struct error *e);
int http_start(struct http *h, struct error *e);
// Accepts connections from now on.
int http_listen(struct http *h, struct error *e);
// The engine runs: from now on its eventfd wakes who waits.
int http_notify_from(struct http *h, int event_fd, struct error *e);
uint16_t http_port(const struct http *h);
// Stops accepting: who is connected already is taken, further clients are refused (with options->listen_fd: left to others).
// Connections are closed with their next answer, which is a 503, except for open routes and with listen_fd. Takes some 20 ms; any
// thread may call it, and more than once.
void http_quiesce(struct http *h);
// Connections there are.
int32_t http_n_connections(const struct http *h);
// Connections whose first request has not come yet. Asked before http_n_active: a request moves from here to there.
int32_t http_n_new(const struct http *h);
// CLOCK_MONOTONIC seconds when the last exchange ended, or accepting did.
double http_last_end(const struct http *h);
// Exchanges that have begun and not ended.
int32_t http_n_active(const struct http *h);
// Nobody waits any more: every handler is called and must come to an end.
void http_wake_all(struct http *h);
// Closes every connection, ends the threads. Exchanges must not wait any more.
void http_stop(struct http *h);
void http_destroy(struct http *h);

#endif
