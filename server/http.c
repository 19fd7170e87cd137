#include "server/http.h"

#include "server/http_check.h"
#include "server/listener.h"

#include <microhttpd.h>

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

// What browsers are allowed to send: the official client's own headers among them.
static const char CORS_HEADERS[] =
    "Authorization, Content-Type, OpenAI-Organization, OpenAI-Project, X-Request-Id, X-Stainless-Arch, X-Stainless-Async, "
    "X-Stainless-Custom-Poll-Interval, X-Stainless-Helper-Method, X-Stainless-Lang, X-Stainless-OS, X-Stainless-Package-Version, "
    "X-Stainless-Poll-Helper, X-Stainless-Retry-Count, X-Stainless-Runtime, X-Stainless-Runtime-Version, X-Stainless-Timeout";

enum {
    CONNECTIONS_TO_REFUSE = 64, // beyond max_connections: they get a 503; beyond that they are closed unheard
    BODIES_AT_ONCE = 16, // total of bodies in memory, in units of max_body_bytes
    STREAM_BLOCK = 4096,
};

static const double LEFT = 0.5; // seconds that a client gets who has said that no more will come

struct http {
    const struct server_options *options;
    const struct route *routes; // [n_routes]
    size_t n_routes;
    struct server *server;
    struct metrics *metrics;
    struct notifier *notifier;
    struct watchdog *watchdog;
    struct listener *listener;
    struct MHD_Daemon *daemon;
    pthread_mutex_t lock;           // of handed_over
    struct connection *handed_over; // to libmicrohttpd, which has not begun them yet
    atomic_int n_connections;       // accepted and not closed
    atomic_int n_new;               // those of them whose first request has not come
    atomic_int n_active;
    atomic_size_t body_bytes;       // in memory, of all exchanges
    atomic_bool quiesced;
    _Atomic double last_end;        // see http_last_end
};

// A client's connection: libmicrohttpd's socket_context.
struct connection {
    struct watch watch;
    struct http *http;
    struct MHD_Connection *mhd;
    struct exchange *exchange; // valid while watch.phase is WATCH_RUNNING
    struct connection *next;   // among those handed over
    const char *target;        // of the request line that has come, whose bytes libmicrohttpd changes: to compare with
    size_t target_length;
    bool target_is_plain;
    bool is_new;               // its first request has not come: counted in n_new
    bool refused;              // one too many
    bool timed_out;            // answered 408 by the watchdog
};

// ---- answers ----

void exchange_header(struct exchange *x, const char *name, const char *value)
{
    if (x->n_headers == EXCHANGE_MAX_HEADERS) return;
    x->headers[x->n_headers].name = name;
    snprintf(x->headers[x->n_headers++].value, sizeof x->headers[0].value, "%s", value);
}

void exchange_header_constant(struct exchange *x, const char *name, const char *value)
{
    if (x->n_headers == EXCHANGE_MAX_HEADERS) return;
    x->headers[x->n_headers].name = name;
    x->headers[x->n_headers++].constant = value;
}

static void add_headers(struct exchange *x, struct MHD_Response *response, const char *content_type)
{
    char milliseconds[32];
    double elapsed = x->received > 0 ? watchdog_now() - x->received : 0;
    snprintf(milliseconds, sizeof milliseconds, "%.0f", 1e3 * elapsed);
    if (content_type) MHD_add_response_header(response, "Content-Type", content_type);
    MHD_add_response_header(response, "x-request-id", x->id);
    MHD_add_response_header(response, "openai-processing-ms", milliseconds);
    if (x->http->options->cors_origin)
        MHD_add_response_header(response, "Access-Control-Allow-Origin", x->http->options->cors_origin);
    for (int32_t i = 0; i < x->n_headers; i++)
        MHD_add_response_header(response, x->headers[i].name,
                                x->headers[i].constant ? x->headers[i].constant : x->headers[i].value);
    if (x->close || atomic_load(&x->http->quiesced)) MHD_add_response_header(response, "Connection", "close");
}

// Takes response (NULL: there was no memory for it).
static enum exchange_next queue_response(struct exchange *x, int32_t status, const char *content_type,
                                         struct MHD_Response *response)
{
    if (!response) return EXCHANGE_ABORT;
    add_headers(x, response, content_type);
    watchdog_set(x->http->watchdog, &x->connection->watch, WATCH_SENDING,
                 watchdog_now() + x->http->options->send_timeout);
    x->status = status;
    x->queued = MHD_queue_response(x->connection->mhd, (unsigned)status, response) == MHD_YES;
    MHD_destroy_response(response);
    return EXCHANGE_GO;
}

enum exchange_next exchange_reply(struct exchange *x, int32_t status, const char *content_type,
                                  struct text_buffer *body)
{
    static char no_memory[] = "{\"error\":{\"message\":\"out of memory\",\"type\":\"service_unavailable_error\","
                              "\"param\":null,\"code\":null}}";
    struct MHD_Response *response;
    if (body->failed) {
        text_deinit(body);
        exchange_header(x, "Retry-After", "1");
        http_error_set(&x->error, 503, NULL, NULL, "out of memory");
        response = MHD_create_response_from_buffer(strlen(no_memory), no_memory, MHD_RESPMEM_PERSISTENT);
        return queue_response(x, 503, "application/json", response);
    }
    response = MHD_create_response_from_buffer(body->length, body->data, MHD_RESPMEM_MUST_FREE);
    if (response)
        *body = (struct text_buffer){0};
    else
        text_deinit(body);
    return queue_response(x, status, content_type, response);
}

enum exchange_next exchange_reply_json(struct exchange *x, struct text_buffer *body)
{
    return exchange_reply(x, 200, "application/json", body);
}

enum exchange_next exchange_reply_error(struct exchange *x, const struct http_error *e)
{
    struct text_buffer body = {0};
    http_error_write(&body, e);
    if (e->retry_after) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%d", e->retry_after);
        exchange_header(x, "Retry-After", seconds);
    }
    if (e->status == 401) exchange_header(x, "WWW-Authenticate", "Bearer");
    if (e != &x->error) x->error = *e;
    return exchange_reply(x, e->status, "application/json", &body);
}

void exchange_drop_body(struct exchange *x)
{
    text_deinit(&x->body);
    atomic_fetch_sub(&x->http->body_bytes, x->n_counted);
    x->n_counted = 0;
}

// ---- waiting ----

static struct exchange *exchange_of(const struct waiter *w)
{
    return (struct exchange *)((char *)(uintptr_t)w - offsetof(struct exchange, waiter));
}

static void suspend(struct waiter *w) { MHD_suspend_connection(exchange_of(w)->connection->mhd); }
static void resume(struct waiter *w) { MHD_resume_connection(exchange_of(w)->connection->mhd); }

static bool is_ready(const struct waiter *w)
{
    const struct exchange *x = exchange_of(w);
    return x->route->ready(x);
}

// False: there is something to do after all.
static bool exchange_sleep(struct exchange *x)
{
    watchdog_set(x->http->watchdog, &x->connection->watch, WATCH_RUNNING, x->deadline);
    return notifier_wait(x->http->notifier, &x->waiter);
}

void exchange_finish_wait(struct exchange *x, atomic_bool *finished)
{
    notifier_wake(x->http->notifier, &x->waiter, finished);
}

// The answer is complete before libmicrohttpd could send one: nothing is in flight in these phases, but for an error answer of its
// own, behind which this one is read by nobody.
static void answer_timeout(int fd)
{
    static const char body[] = "{\"error\":{\"message\":\"the request did not arrive in time\","
                               "\"type\":\"invalid_request_error\",\"param\":null,\"code\":null}}";
    char text[512];
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                     "Connection: close\r\n\r\n%s",
                     sizeof body - 1, body);
    (void)!send(fd, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void on_watch(struct watch *w, enum watch_event what)
{
    struct connection *c = (struct connection *)w; // its first member
    if (w->phase == WATCH_RUNNING) {
        if (what == WATCH_GONE) atomic_store(&c->exchange->gone, true);
        if (!atomic_load(&c->exchange->held)) notifier_wake(c->http->notifier, &c->exchange->waiter, NULL);
        return;
    }
    if (w->phase == WATCH_HEADERS || w->phase == WATCH_BODY) {
        c->timed_out = true;
        answer_timeout(w->fd);
    }
    shutdown(w->fd, SHUT_RDWR); // libmicrohttpd sees the end and closes
}

// ---- streams ----

// Copies what is left of x->out. Returns the number of bytes.
static size_t send_out(struct exchange *x, char *buffer, size_t max)
{
    size_t n = x->out.length - x->n_sent;
    if (n > max) n = max;
    memcpy(buffer, x->out.data + x->n_sent, n);
    x->n_sent += n;
    watchdog_set(x->http->watchdog, &x->connection->watch, x->end ? WATCH_SENDING : WATCH_STREAMING,
                 watchdog_now() + x->http->options->send_timeout);
    return n;
}

// What is meant for this, MHD_CONTENT_READER_END_WITH_ERROR, makes libmicrohttpd (0.9.75 to 1.0.1) forget a connection that was
// suspended just before: open, out of its epoll set, until all older ones have gone. A byte that cannot be sent does not.
static ssize_t break_off(struct exchange *x, char *buffer)
{
    shutdown(x->connection->watch.fd, SHUT_RDWR);
    *buffer = '\n';
    return 1;
}

static ssize_t on_stream(void *cls, uint64_t position, char *buffer, size_t max)
{
    (void)position;
    struct exchange *x = cls;
    for (;;) {
        if (x->n_sent < x->out.length) return (ssize_t)send_out(x, buffer, max);
        if (x->end) return MHD_CONTENT_READER_END_OF_STREAM;
        text_clear(&x->out);
        x->n_sent = 0;
        enum exchange_next next = x->route->stream(x);
        if (x->out.failed || next == EXCHANGE_ABORT) return break_off(x, buffer);
        x->end = next == EXCHANGE_END;
        if (next == EXCHANGE_WAIT && x->out.length == 0 && exchange_sleep(x)) return 0;
    }
}

enum exchange_next exchange_reply_stream(struct exchange *x)
{
    exchange_header(x, "Cache-Control", "no-cache");
    exchange_header(x, "X-Accel-Buffering", "no");
    return queue_response(x, 200, "text/event-stream; charset=utf-8",
                          MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, STREAM_BLOCK, on_stream, x, NULL));
}

// ---- admission: everything that can be said before the body ----

static enum MHD_Result collect_header(void *cls, enum MHD_ValueKind kind, const char *key, size_t key_size,
                                      const char *value, size_t value_size)
{
    (void)kind;
    struct http_headers *h = cls;
    if (h->n == HTTP_MAX_HEADERS) {
        h->overflow = true;
        return MHD_NO;
    }
    h->list[h->n++] = (struct http_header){key, value ? value : "", key_size, value ? value_size : 0};
    return MHD_YES;
}

static void set_id(struct exchange *x, const struct http_headers *h)
{
    const struct http_header *given = http_header_find(h, "x-request-id");
    bool usable = given && given->value_length > 0 && given->value_length <= REQUEST_ID_MAX;
    for (size_t i = 0; usable && i < given->value_length; i++)
        usable = given->value[i] >= 0x20 && given->value[i] < 0x7f;
    if (usable) {
        memcpy(x->id, given->value, given->value_length);
        return;
    }
    uint64_t random[2] = {0};
    (void)!getrandom(random, sizeof random, 0);
    snprintf(x->id, sizeof x->id, "req-%016lx%016lx", (unsigned long)random[0], (unsigned long)random[1]);
}

static bool path_matches(const struct route *r, const char *path)
{
    size_t n = strlen(r->path);
    return n > 1 && r->path[n - 1] == '/' ? !strncmp(path, r->path, n) && path[n] : !strcmp(path, r->path);
}

static int check_route(struct exchange *x, const char *method)
{
    const struct http *h = x->http;
    for (size_t i = 0; i < h->n_routes && !x->route; i++)
        if (path_matches(&h->routes[i], x->path)) x->route = &h->routes[i];
    if (!x->route) return http_error_set(&x->error, 404, NULL, NULL, "there is nothing at this path");
    if (!strcmp(strcmp(method, "HEAD") ? method : "GET", x->route->method)) return 0;
    exchange_header(x, "Allow", !strcmp(x->route->method, "GET") ? "GET, HEAD, OPTIONS" : "POST, OPTIONS");
    if (strcmp(method, "OPTIONS"))
        return http_error_set(&x->error, 405, NULL, NULL, "%s is not allowed here", method);
    return http_error_set(&x->error, 204, NULL, NULL, "options");
}

static int check_key(struct exchange *x, const struct http_headers *headers)
{
    struct api_keys *keys = x->http->options->api_keys;
    if (x->route->open || !keys) return 0;
    const struct http_header *h = http_header_find(headers, "Authorization");
    static const char scheme[] = "Bearer ";
    size_t skip = sizeof scheme - 1;
    if (!h || h->value_length < skip || strncasecmp(h->value, scheme, skip))
        return http_error_set(&x->error, 401, "invalid_api_key", NULL,
                              "no API key: send it as `Authorization: Bearer KEY`");
    x->api_key = api_keys_find(keys, h->value + skip, h->value_length - skip);
    if (!x->api_key) return http_error_set(&x->error, 401, "invalid_api_key", NULL, "the API key is not valid");
    x->log.key = api_key_name(x->api_key);
    return api_key_may(x->api_key, x->route->role)
               ? 0
               : http_error_set(&x->error, 403, "insufficient_permissions", NULL, "this API key may not ask for this");
}

static bool is_json(const struct http_header *h)
{
    static const char json[] = "application/json";
    size_t n = sizeof json - 1;
    return h && h->value_length >= n && !strncasecmp(h->value, json, n) &&
           (h->value_length == n || strchr("; \t", h->value[n]));
}

static int check_body(struct exchange *x, const struct http_headers *headers, const struct http_framing *framing)
{
    size_t max = x->http->options->max_body_bytes;
    if (framing->has_length && framing->length > max)
        return http_error_set(&x->error, 413, NULL, NULL, "a body of %zu bytes; the most is %zu", framing->length, max);
    if (!strcmp(x->route->method, "GET")) return 0;
    if (!framing->has_length && !framing->chunked)
        return http_error_set(&x->error, 411, NULL, NULL, "a Content-Length is needed");
    if (!is_json(http_header_find(headers, "Content-Type")))
        return http_error_set(&x->error, 415, NULL, NULL, "the Content-Type must be application/json");
    const struct http_header *encoding = http_header_find(headers, "Content-Encoding");
    if (encoding && strcasecmp(encoding->value, "identity"))
        return http_error_set(&x->error, 415, NULL, NULL, "a Content-Encoding is not supported");
    return 0;
}

static int check_room(struct exchange *x)
{
    return x->connection->refused ? http_error_set(&x->error, 503, NULL, NULL, "too many connections") : 0;
}

static int check_quiesced(struct exchange *x)
{
    if (!atomic_load(&x->http->quiesced) || x->route->open || x->http->options->listen_fd) return 0;
    return http_error_set(&x->error, 503, NULL, NULL, "the server is shutting down");
}

// How 0.9.75 lays a request out in memory is known; what shows there alone is looked at there alone.
static bool layout_is_known(void) { return !strcmp(MHD_get_version(), "0.9.75"); }

// The parser takes spaces within a target and several before it, and shows what comes before a NUL. See check_layout.
static int check_request_line(const struct connection *c, const char *method, const char *version, struct http_error *e)
{
    bool plain = http_method_is_plain(method) && c->target_is_plain;
    if (layout_is_known())
        plain = plain && c->target == method + strlen(method) + 1 && version == c->target + c->target_length + 1;
    return plain ? 0 : http_error_set(e, 400, NULL, NULL, "a request line that is not three words of plain text");
}

// What the parser hides. It cuts lines at their ends by writing NULs over them, so that a request's headers lie one
// after another as they came; a bare line feed, a folded line or a NUL within a value leave another picture. This is
// how 0.9.75 works, and it is looked at there alone: later ones refuse these themselves when told to (http_start).
static int check_layout(const struct exchange *x, const struct http_headers *h, const char *method, const char *version,
                        struct http_error *e)
{
    if (!layout_is_known()) return 0;
    size_t size = MHD_get_connection_info(x->connection->mhd, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE)->header_size;
    const char *expected = version + strlen(version) + 2; // over CR and LF
    bool plain = true;
    for (size_t i = 0; i < h->n && plain; i++) {
        const struct http_header *header = &h->list[i];
        plain = header->name == expected && header->value > header->name + header->name_length;
        expected = header->value + header->value_length + 2;
    }
    // The empty line's CR and LF were cut too. A line that begins with NUL or a colon is taken for the empty one; where a bare line
    // feed makes it as long, this looks right. Such lines are for the proxy to refuse.
    plain = plain && !expected[-2] && !expected[-1] && !expected[0] && !expected[1] && expected + 2 == method + size;
    return plain ? 0 : http_error_set(e, 400, NULL, NULL, "a header line that is not plain text ended by CR and LF");
}

// Everything that can be wrong before the body. A doubtful framing is answered at once and ends the connection. Other
// refusals wait for the body, which is thrown away, so that the client reads its answer and not a reset connection;
// unless it asked first (Expect), or has far more to send than we would ever take.
static void admit(struct exchange *x, const char *method, const char *version)
{
    struct http_headers headers = {0};
    struct http_framing framing;
    MHD_get_connection_values_n(x->connection->mhd, MHD_HEADER_KIND, collect_header, &headers);
    set_id(x, &headers);
    http_trace_id(&headers, x->trace_id);
    if (http_check(&headers, version, &framing, &x->error) || check_request_line(x->connection, method, version, &x->error) ||
        check_layout(x, &headers, method, version, &x->error) || check_room(x)) {
        x->refused = x->close = true;
        return;
    }
    x->refused = check_route(x, method) || check_quiesced(x) || check_key(x, &headers) ||
                 check_body(x, &headers, &framing);
    x->discard = x->refused && !http_header_find(&headers, "Expect") && x->error.status != 411 &&
                 framing.length / 2 <= x->http->options->max_body_bytes;
    // Lines within chunked bodies may end in a bare line feed (0.9.75), so that others could see such a body end elsewhere: nothing
    // behind one is taken for a request.
    x->close = framing.chunked || (x->refused && (!x->discard || x->error.status == 413));
}

static enum exchange_next reply_refusal(struct exchange *x)
{
    if (x->error.status != 204) return exchange_reply_error(x, &x->error);
    if (x->http->options->cors_origin) {
        exchange_header(x, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
        exchange_header_constant(x, "Access-Control-Allow-Headers", CORS_HEADERS);
        exchange_header(x, "Access-Control-Max-Age", "86400");
    }
    x->error.status = 0;
    return exchange_reply(x, 204, NULL, &(struct text_buffer){0});
}

// ---- connections ----

static void connection_heard(struct connection *c)
{
    if (c->is_new) atomic_fetch_sub(&c->http->n_new, 1);
    c->is_new = false;
}

static void connection_end(struct connection *c)
{
    connection_heard(c);
    atomic_fetch_sub(&c->http->n_connections, 1);
    free(c);
}

static struct connection *take_handed_over(struct http *h, int fd)
{
    pthread_mutex_lock(&h->lock);
    struct connection **at = &h->handed_over, *c;
    while (*at && (*at)->watch.fd != fd) at = &(*at)->next;
    c = *at;
    if (c) *at = c->next;
    pthread_mutex_unlock(&h->lock);
    return c;
}

// libmicrohttpd closes what it has no memory for, mostly without a word to on_connection; we learn of it here: from its
// result, or later, when the descriptor comes again. Everyone else has been taken from the list before his socket is closed.
static void end_unbegun(struct http *h, int fd)
{
    struct connection *c = take_handed_over(h, fd);
    if (c) connection_end(c);
}

// On the listener's thread, which alone counts up: the limits are exact, however late libmicrohttpd begins a connection.
static void on_accept(void *context, int fd, const struct sockaddr *address, socklen_t length)
{
    struct http *h = context;
    end_unbegun(h, fd);
    bool room = atomic_load(&h->n_connections) < h->options->max_connections + CONNECTIONS_TO_REFUSE;
    struct connection *c = room ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        close(fd);
        return;
    }
    c->http = h;
    c->watch.fd = fd;
    c->refused = atomic_fetch_add(&h->n_connections, 1) >= h->options->max_connections;
    c->is_new = true;
    atomic_fetch_add(&h->n_new, 1);
    pthread_mutex_lock(&h->lock);
    c->next = h->handed_over;
    h->handed_over = c;
    pthread_mutex_unlock(&h->lock);
    if (MHD_add_connection(h->daemon, fd, address, length) != MHD_YES) end_unbegun(h, fd); // fd has been closed
}

// ---- libmicrohttpd's callbacks ----

// The path of a target that names the host as well (RFC 9112, 3.2.2: proxies send it so, servers must take it).
static const char *path_of(const char *target)
{
    if (strncasecmp(target, "http://", 7)) return target;
    const char *path = strchr(target + 7, '/');
    return path ? path : "/";
}

static const char *constant_method(const char *method)
{
    static const char *const known[] = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i], method)) return known[i];
    return "other";
}

static struct connection *connection_of(struct MHD_Connection *mhd)
{
    return MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
}

static struct exchange *exchange_begin(struct http *h, struct MHD_Connection *mhd, const char *path,
                                       const char *method, const char *version)
{
    struct connection *c = connection_of(mhd);
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    x->http = h;
    x->server = h->server;
    x->connection = c;
    c->exchange = x;
    x->path = path = path_of(path);
    x->waiter.ready = is_ready;
    x->deadline = INFINITY;
    x->log = (struct log_request){.method = constant_method(method), .path = path, .prompt_tokens = -1,
                                  .cached_tokens = -1, .completion_tokens = -1, .queue = -1, .prefill = -1, .ttft = -1,
                                  .decode = -1, .total = -1};
    atomic_fetch_add(&h->n_active, 1);
    connection_heard(c);
    watchdog_set(h->watchdog, &x->connection->watch, WATCH_BODY, watchdog_now() + h->options->body_timeout);
    admit(x, method, version);
    return x;
}

static void refuse_body(struct exchange *x, int32_t status, const char *message)
{
    x->refused = x->discard = x->close = true;
    exchange_drop_body(x);
    http_error_set(&x->error, status, NULL, NULL, "%s", message);
}

// Returns false when so much comes that the connection had better end.
static bool take_body(struct exchange *x, const char *data, size_t n)
{
    size_t max = x->http->options->max_body_bytes;
    x->n_received += n;
    if (x->discard) return x->n_received / 2 <= max;
    if (x->n_received > max) {
        refuse_body(x, 413, "the body is too long");
        return true;
    }
    x->n_counted += n;
    size_t total = atomic_fetch_add(&x->http->body_bytes, n) + n;
    if (total > BODIES_AT_ONCE * max || !text_reserve(&x->body, n + 1)) {
        refuse_body(x, 503, "too many long requests at once");
        return true;
    }
    text_append(&x->body, data, n);
    x->body.data[x->body.length] = '\0';
    return true;
}

static enum MHD_Result exchange_run(struct exchange *x)
{
    for (;;) {
        enum exchange_next next = x->refused ? reply_refusal(x) : x->route->handle(x);
        if (next != EXCHANGE_WAIT) return next == EXCHANGE_GO && x->queued ? MHD_YES : MHD_NO;
        if (exchange_sleep(x)) return MHD_YES;
    }
}

static enum MHD_Result on_request(void *cls, struct MHD_Connection *mhd, const char *path, const char *method,
                                  const char *version, const char *data, size_t *n, void **context)
{
    struct exchange *x = *context;
    if (!x) {
        *context = x = exchange_begin(cls, mhd, path, method, version);
        if (!x) return MHD_NO;
        return x->refused && !x->discard ? exchange_run(x) : MHD_YES;
    }
    if (*n) {
        bool more = take_body(x, data, *n);
        *n = 0;
        return more ? MHD_YES : MHD_NO;
    }
    if (x->received == 0) x->received = watchdog_now();
    return exchange_run(x);
}

static void on_completed(void *cls, struct MHD_Connection *mhd, void **context, enum MHD_RequestTerminationCode how)
{
    struct http *h = cls;
    struct connection *c = connection_of(mhd);
    struct exchange *x = *context;
    *context = NULL;
    // An end that came together with the request is never seen by libmicrohttpd, which read less than it had room for and waits
    // for another edge. Further requests may be in its buffer, and are begun at once.
    double idle = watch_gone(&c->watch) ? fmin(LEFT, h->options->idle_timeout) : h->options->idle_timeout;
    watchdog_set(h->watchdog, &c->watch, WATCH_IDLE, watchdog_now() + idle);
    if (!x) return;
    if (how != MHD_REQUEST_TERMINATED_COMPLETED_OK) atomic_store(&x->gone, true);
    if (c->timed_out && !x->status) {
        x->status = 408;
        http_error_set(&x->error, 408, NULL, NULL, "the request did not arrive in time");
    }
    x->log.id = x->id;
    x->log.trace_id = x->trace_id[0] ? x->trace_id : NULL;
    x->log.status = x->status;
    if (x->route && x->state) x->route->done(x);
    if (x->log.total < 0 && x->received > 0) x->log.total = watchdog_now() - x->received;
    if (x->error.status) x->log.error = x->error.message;
    log_request(&x->log);
    metrics_http(h->metrics, x->log.method, x->route ? x->route->path : "other", x->status);
    exchange_drop_body(x);
    text_deinit(&x->out);
    api_key_release(x->api_key);
    free(x);
    atomic_store(&h->last_end, watchdog_now());
    atomic_fetch_sub(&h->n_active, 1);
}

static void on_connection(void *cls, struct MHD_Connection *mhd, void **context,
                          enum MHD_ConnectionNotificationCode what)
{
    struct http *h = cls;
    struct connection *c = *context;
    if (what == MHD_CONNECTION_NOTIFY_CLOSED) {
        watchdog_remove(h->watchdog, &c->watch);
        connection_end(c);
        *context = NULL;
        return;
    }
    *context = c = take_handed_over(h, MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd);
    c->mhd = mhd;
    c->watch.phase = WATCH_HEADERS;
    c->watch.deadline = watchdog_now() + h->options->header_timeout;
    watchdog_add(h->watchdog, &c->watch);
}

// A NUL would end the path early ("/health%00x"): a path with one stays as it came, and is found nowhere.
static size_t on_unescape(void *cls, struct MHD_Connection *mhd, char *text)
{
    (void)cls;
    (void)mhd;
    return strstr(text, "%00") ? strlen(text) : MHD_http_unescape(text);
}

// The request line has come: the time for the headers begins.
static void *on_request_line(void *cls, const char *uri, struct MHD_Connection *mhd)
{
    struct http *h = cls;
    struct connection *c = connection_of(mhd);
    c->target = uri;
    c->target_length = uri ? strlen(uri) : 0;
    c->target_is_plain = uri && http_target_is_plain(uri);
    if (c->watch.phase == WATCH_IDLE) // set by this thread alone
        watchdog_set(h->watchdog, &c->watch, WATCH_HEADERS, watchdog_now() + h->options->header_timeout);
    return NULL;
}

static void on_log(void *cls, const char *format, va_list args)
{
    (void)cls;
    char line[512];
    vsnprintf(line, sizeof line, format, args);
    line[strcspn(line, "\r\n")] = '\0';
    log_message(LOG_LEVEL_DEBUG, "libmicrohttpd: %s", line);
}

// ---- life ----

int http_create(struct http **out, const struct server_options *options, const struct route *routes, size_t n_routes,
                struct server *server, struct metrics *metrics, struct error *e)
{
    struct http *h = calloc(1, sizeof *h);
    if (!h) return error_set(e, ERR_NOMEM, "out of memory");
    h->options = options;
    h->routes = routes;
    h->n_routes = n_routes;
    h->server = server;
    h->metrics = metrics;
    pthread_mutex_init(&h->lock, NULL);
    int failed = notifier_create(&h->notifier, suspend, resume, e);
    if (!failed) failed = watchdog_create(&h->watchdog, on_watch, e);
    if (!failed) failed = listener_create(&h->listener, options->listen_fd, options->host, options->port, on_accept, h, e);
    if (failed) {
        http_destroy(h);
        return failed;
    }
    *out = h;
    return 0;
}

int http_start(struct http *h, struct error *e)
{
    int failed = watchdog_start(h->watchdog, e);
    if (failed) return failed;
    unsigned n_threads = (unsigned)h->options->http_threads;
    // libmicrohttpd never listens (listener.h). Its limit, divided among its threads and counted late, is out of reach: on_accept
    // keeps ours.
    h->daemon = MHD_start_daemon(
        MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0,
        NULL, NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, on_log, NULL,
        MHD_OPTION_THREAD_POOL_SIZE, n_threads > 1 ? n_threads : 0, MHD_OPTION_CONNECTION_LIMIT, (unsigned)INT_MAX,
        MHD_OPTION_CONNECTION_TIMEOUT, 0u, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1,
        MHD_OPTION_NOTIFY_COMPLETED, on_completed, h, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h,
        MHD_OPTION_URI_LOG_CALLBACK, on_request_line, h, MHD_OPTION_UNESCAPE_CALLBACK, on_unescape, NULL,
#if MHD_VERSION >= 0x00097701
        MHD_OPTION_CLIENT_DISCIPLINE_LVL, 1, // no bare line feeds, no folded lines
#endif
        MHD_OPTION_END);
    return h->daemon ? 0 : error_set(e, ERR_IO, "cannot start the HTTP threads");
}

int http_listen(struct http *h, struct error *e) { return listener_start(h->listener, e); }

int http_notify_from(struct http *h, int event_fd, struct error *e)
{
    return notifier_start(h->notifier, event_fd, e);
}

uint16_t http_port(const struct http *h) { return listener_port(h->listener); }

void http_quiesce(struct http *h)
{
    if (!atomic_exchange(&h->quiesced, true)) atomic_store(&h->last_end, watchdog_now());
    listener_stop(h->listener);
}

int32_t http_n_connections(const struct http *h) { return atomic_load(&h->n_connections); }

int32_t http_n_new(const struct http *h) { return atomic_load(&h->n_new); }

double http_last_end(const struct http *h) { return atomic_load(&h->last_end); }

int32_t http_n_active(const struct http *h) { return atomic_load(&h->n_active); }

void http_wake_all(struct http *h) { notifier_close(h->notifier); }

void http_stop(struct http *h)
{
    http_quiesce(h);
    if (h->daemon) MHD_stop_daemon(h->daemon);
    h->daemon = NULL;
}

void http_destroy(struct http *h)
{
    if (!h) return;
    http_stop(h);
    notifier_destroy(h->notifier);
    watchdog_destroy(h->watchdog);
    listener_destroy(h->listener);
    for (struct connection *c; (c = h->handed_over);) {
        h->handed_over = c->next;
        connection_end(c);
    }
    pthread_mutex_destroy(&h->lock);
    free(h);
}
