#include "server/http_check.h"

#include <string.h>
#include <strings.h>

static bool name_is(const struct http_header *h, const char *name)
{
    return h->name_length == strlen(name) && !strncasecmp(h->name, name, h->name_length);
}

const struct http_header *http_header_find(const struct http_headers *h, const char *name)
{
    for (size_t i = 0; i < h->n; i++)
        if (name_is(&h->list[i], name)) return &h->list[i];
    return NULL;
}

bool http_header_is(const struct http_header *h, const char *text)
{
    return h->value_length == strlen(text) && !strncasecmp(h->value, text, h->value_length);
}

static size_t count(const struct http_headers *h, const char *name)
{
    size_t n = 0;
    for (size_t i = 0; i < h->n; i++) n += name_is(&h->list[i], name);
    return n;
}

// A token of RFC 9110, 5.6.2. "Content-Length " with its space is none: the parser would take it for another header.
static bool is_token(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        bool alphanumeric = (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
        if (!alphanumeric && (!c || !strchr("!#$%&'*+-.^_`|~", c))) return false;
    }
    return n > 0;
}

static bool has_control(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if ((c < 0x20 && c != '\t') || c == 0x7f) return true;
    }
    return false;
}

bool http_method_is_plain(const char *method) { return is_token(method, strlen(method)); }

bool http_target_is_plain(const char *target)
{
    for (; *target; target++)
        if (*target <= ' ' || *target > '~') return false;
    return true;
}

static bool parse_length(const struct http_header *h, size_t *out)
{
    size_t value = 0;
    for (size_t i = 0; i < h->value_length; i++) {
        char c = h->value[i];
        if (c < '0' || c > '9' || value > (SIZE_MAX - 9) / 10) return false;
        value = value * 10 + (size_t)(c - '0');
    }
    *out = value;
    return h->value_length > 0;
}

static int check_framing(const struct http_headers *h, bool is_11, struct http_framing *framing, struct http_error *e)
{
    const struct http_header *length = http_header_find(h, "Content-Length");
    const struct http_header *encoding = http_header_find(h, "Transfer-Encoding");
    *framing = (struct http_framing){.has_length = length, .chunked = encoding};
    if (count(h, "Content-Length") > 1) return http_error_set(e, 400, NULL, NULL, "more than one Content-Length");
    if (length && encoding)
        return http_error_set(e, 400, NULL, NULL, "both Content-Length and Transfer-Encoding");
    if (length && !parse_length(length, &framing->length))
        return http_error_set(e, 400, NULL, NULL, "Content-Length is not a number");
    if (encoding && (!is_11 || count(h, "Transfer-Encoding") > 1 || !http_header_is(encoding, "chunked")))
        return http_error_set(e, 400, NULL, NULL, "a Transfer-Encoding other than one `chunked`");
    return 0;
}

int http_check(const struct http_headers *h, const char *version, struct http_framing *framing, struct http_error *e)
{
    bool is_11 = !strcmp(version, "HTTP/1.1");
    if (!is_11 && strcmp(version, "HTTP/1.0"))
        return http_error_set(e, 505, NULL, NULL, "only HTTP/1.0 and HTTP/1.1 are spoken here");
    if (h->overflow) return http_error_set(e, 431, NULL, NULL, "more than %d header lines", HTTP_MAX_HEADERS);
    for (size_t i = 0; i < h->n; i++) {
        const struct http_header *header = &h->list[i];
        if (!is_token(header->name, header->name_length))
            return http_error_set(e, 400, NULL, NULL, "a header's name holds a character that it must not");
        if (has_control(header->value, header->value_length))
            return http_error_set(e, 400, NULL, NULL, "a header's value holds a control character");
    }
    size_t n_hosts = count(h, "Host");
    if (n_hosts > 1 || (is_11 && n_hosts == 0))
        return http_error_set(e, 400, NULL, NULL, "%s Host header", n_hosts ? "more than one" : "no");
    return check_framing(h, is_11, framing, e);
}

// Lower-case hexadecimal digits, not all of them 0 if `nonzero`.
static bool is_hex(const char *text, size_t n, bool nonzero)
{
    bool zero = true;
    for (size_t i = 0; i < n; i++) {
        if (!(text[i] >= '0' && text[i] <= '9') && !(text[i] >= 'a' && text[i] <= 'f')) return false;
        zero = zero && text[i] == '0';
    }
    return !nonzero || !zero;
}

void http_trace_id(const struct http_headers *h, char id[33])
{
    enum { TRACE = 3, PARENT = 36, FLAGS = 53, LENGTH = 55 }; // version-trace-parent-flags; later versions may go on after a dash
    const struct http_header *found = http_header_find(h, "traceparent");
    id[0] = '\0';
    if (!found || found->value_length < LENGTH || count(h, "traceparent") != 1) return;
    const char *v = found->value;
    bool whole = found->value_length == LENGTH || (v[LENGTH] == '-' && memcmp(v, "00", 2));
    if (!whole || !is_hex(v, 2, false) || !memcmp(v, "ff", 2) || v[TRACE - 1] != '-' || v[PARENT - 1] != '-' ||
        v[FLAGS - 1] != '-' || !is_hex(v + TRACE, 32, true) || !is_hex(v + PARENT, 16, true) || !is_hex(v + FLAGS, 2, false))
        return;
    memcpy(id, v + TRACE, 32);
    id[32] = '\0';
}
