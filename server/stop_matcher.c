#include "server/stop_matcher.h"

#include <stdlib.h>
#include <string.h>

struct stop_string {
    size_t length; // bytes
    char text[STOP_MAX_BYTES];
    uint16_t border[STOP_MAX_BYTES]; // [length]: of text[0..i], the longest proper prefix that is also its suffix
};

struct stop_matcher {
    bool include_stop;
    size_t n;
    struct stop_string strings[]; // [n]
};

// The bytes of s that a text ends with after byte c, if it ended with its first `matched` before.
static uint16_t advance(const struct stop_string *s, uint16_t matched, char c)
{
    while (matched > 0 && s->text[matched] != c) matched = s->border[matched - 1];
    return s->text[matched] == c ? matched + 1 : 0;
}

int stop_matcher_create(struct stop_matcher **out, const char *const *stops, size_t n, bool include_stop,
                        struct error *e)
{
    *out = NULL;
    if (n < 1 || n > STOP_MAX_STRINGS) return error_set(e, ERR_INVALID, "1 to %d stop strings", STOP_MAX_STRINGS);
    for (size_t i = 0; i < n; i++) {
        size_t length = strnlen(stops[i], STOP_MAX_BYTES + 1);
        if (length == 0) return error_set(e, ERR_INVALID, "a stop string is empty");
        if (length > STOP_MAX_BYTES)
            return error_set(e, ERR_INVALID, "a stop string has more than %d bytes", STOP_MAX_BYTES);
    }
    struct stop_matcher *m = malloc(sizeof *m + n * sizeof m->strings[0]);
    if (!m) return error_set(e, ERR_NOMEM, "out of memory");
    m->include_stop = include_stop;
    m->n = n;
    for (size_t i = 0; i < n; i++) {
        struct stop_string *s = &m->strings[i];
        s->length = strlen(stops[i]);
        memcpy(s->text, stops[i], s->length);
        s->border[0] = 0;
        for (size_t j = 1; j < s->length; j++) s->border[j] = advance(s, s->border[j - 1], s->text[j]);
    }
    *out = m;
    return 0;
}

void stop_matcher_destroy(struct stop_matcher *m) { free(m); }

// Index of the stop string of which most is matched: its beginning is what is held back.
static size_t longest(const struct stop_matcher *m, const struct stop_stream *s)
{
    size_t best = 0;
    for (size_t i = 1; i < m->n; i++)
        if (s->matched[i] > s->matched[best]) best = i;
    return best;
}

// Takes one byte; returns the index of the longest stop string that ends with it, or -1.
static int32_t step(const struct stop_matcher *m, struct stop_stream *s, char c)
{
    int32_t found = -1;
    for (size_t i = 0; i < m->n; i++) {
        s->matched[i] = advance(&m->strings[i], s->matched[i], c);
        if (s->matched[i] < m->strings[i].length) continue;
        if (found < 0 || m->strings[i].length > m->strings[found].length) found = (int32_t)i;
    }
    return found;
}

size_t stop_stream_push(const struct stop_matcher *m, struct stop_stream *s, const char *text, size_t n, char *out)
{
    if (s->stopped) return 0;
    size_t held = stop_stream_finish(m, s, out);
    if (n > 0) memcpy(out + held, text, n);
    for (size_t i = 0; i < n; i++) {
        int32_t found = step(m, s, text[i]);
        if (found < 0) continue;
        *s = (struct stop_stream){.stopped = true, .stop = found};
        return held + i + 1 - (m->include_stop ? 0 : m->strings[found].length);
    }
    return held + n - stop_stream_held(m, s);
}

size_t stop_stream_finish(const struct stop_matcher *m, struct stop_stream *s, char *out)
{
    size_t held = stop_stream_held(m, s);
    memcpy(out, m->strings[longest(m, s)].text, held);
    return held;
}

size_t stop_stream_held(const struct stop_matcher *m, const struct stop_stream *s)
{
    return s->matched[longest(m, s)];
}
