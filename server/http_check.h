/* http_check.h: what libmicrohttpd's lenient parser lets through and a server behind a proxy must not.
 *
 * A request whose end two parties may see at different places is how requests are smuggled; every doubt about its
 * framing is a 400, and the connection ends. (A Content-Length that is no number never gets here: 0.9.75 answers that
 * itself, with its header twice, and closes.)
 */
#ifndef GPTD_SERVER_HTTP_CHECK_H
#define GPTD_SERVER_HTTP_CHECK_H

#include "server/error_response.h"

#include <stdbool.h>
#include <stddef.h>

enum { HTTP_MAX_HEADERS = 100 };

struct http_header {
    const char *name, *value; // not necessarily NUL-terminated
    size_t name_length, value_length;
};

struct http_headers {
    struct http_header list[HTTP_MAX_HEADERS]; // [n]
    size_t n;
    bool overflow; // there were more
};

// What the framing says about the body.
struct http_framing {
    bool has_length, chunked;
    size_t length; // if has_length
};

// The first header of that name (ASCII, any case); NULL: none.
const struct http_header *http_header_find(const struct http_headers *h, const char *name);
// Whether the header's value is text, without regard to case.
bool http_header_is(const struct http_header *h, const char *text);
// The trace that the client's `traceparent` makes this request part of, 32 hexadecimal digits; "" where there is none, or two,
// or it is malformed. https://www.w3.org/TR/trace-context/
void http_trace_id(const struct http_headers *h, char id[33]);
// Whether method is a token, and target, as it came, of visible ASCII characters.
bool http_method_is_plain(const char *method);
bool http_target_is_plain(const char *target);
// Checks version ("HTTP/1.1"), the spelling of every header, Host, Content-Length and Transfer-Encoding.
int http_check(const struct http_headers *h, const char *version, struct http_framing *framing, struct http_error *e);

#endif
