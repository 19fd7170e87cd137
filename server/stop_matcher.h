/* stop_matcher.h: finds stop strings in text that arrives in pieces.
 *
 * The server puts one stop_stream per choice between the detokenizer and the answer. Text that can no longer be part of
 * a stop string comes out at once; the longest suffix that still could be is held back. The match that ends first wins;
 * of those that end at the same byte, the longest. Whatever way the text is split, the joined output is the same.
 *
 * Knuth, Morris and Pratt's automaton for each stop string: O(number of stops) amortized per byte, no buffer (what is
 * held back is a prefix of a stop string, so it is read from there) and no allocation after stop_matcher_create.
 */
#ifndef GPTD_SERVER_STOP_MATCHER_H
#define GPTD_SERVER_STOP_MATCHER_H

#include "kernels/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    STOP_MAX_STRINGS = 16,
    STOP_MAX_BYTES = 1024, // of one stop string
};

struct stop_matcher; // the strings of a request: immutable, shared by its choices

// State of one text; zero-initialized at its start.
struct stop_stream {
    uint16_t matched[STOP_MAX_STRINGS]; // bytes of each stop string that the text's end matches
    bool stopped;                       // a stop string was found: the text has ended
    int32_t stop;                       // which, if stopped
};

// Copies stops ([n] UTF-8 strings, NUL-terminated). include_stop: the stop string itself stays in the text.
// ERR_INVALID: n is not 1..STOP_MAX_STRINGS, or a string is empty or longer than STOP_MAX_BYTES; ERR_NOMEM.
int stop_matcher_create(struct stop_matcher **out, const char *const *stops, size_t n, bool include_stop,
                        struct error *e);
void stop_matcher_destroy(struct stop_matcher *m);

// Most bytes stop_stream_push can write for n bytes pushed.
static inline size_t stop_stream_bound(size_t n) { return n + STOP_MAX_BYTES; }

// Appends n bytes of text. Writes to out (stop_stream_bound(n) bytes must fit; no overlap) what is now certain. Returns
// the bytes written. After a match, s->stopped is true and everything pushed later is dropped.
size_t stop_stream_push(const struct stop_matcher *m, struct stop_stream *s, const char *text, size_t n, char *out);
// Ends the text: writes what is held back (less than STOP_MAX_BYTES). Returns the bytes written.
size_t stop_stream_finish(const struct stop_matcher *m, struct stop_stream *s, char *out);
// Bytes held back at the moment.
size_t stop_stream_held(const struct stop_matcher *m, const struct stop_stream *s);

#endif
