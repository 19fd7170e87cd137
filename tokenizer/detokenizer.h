/* detokenizer.h: ids to text as they come, one stream at a time.
 *
 * Token bytes are joined; a UTF-8 character split over tokens is held until whole; bytes that can never become one turn
 * into U+FFFD (one per maximal ill-formed subpart, as Unicode's recommended practice and Python's errors="replace"
 * have it), at the latest at the end. What is pushed in pieces, joined, equals what is pushed at once.
 */
#ifndef GPTD_TOKENIZER_DETOKENIZER_H
#define GPTD_TOKENIZER_DETOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The UTF-8 hold-back: at most 3 bytes of a character that may still become whole.
struct utf8_stream {
    unsigned char held[4];
    int32_t n_held;
};

// Most bytes utf8_stream_push can write for n bytes pushed.
static inline size_t utf8_stream_bound(size_t n) { return 3 * (n + 4); }

// Appends bytes; writes whole, valid UTF-8 to out (utf8_stream_bound(n) bytes must fit). Returns bytes written.
size_t utf8_stream_push(struct utf8_stream *s, const char *bytes, size_t n, char *out);
// Ends the stream: what is held becomes one U+FFFD. Returns bytes written, at most 3.
size_t utf8_stream_finish(struct utf8_stream *s, char *out);

// True if text is well-formed UTF-8 (no surrogates, no overlong forms, at most U+10FFFF).
int utf8_valid(const char *text, size_t n);
// Length of the longest well-formed beginning of text: n if all of it is.
size_t utf8_valid_prefix(const char *text, size_t n);
// Number of code points in valid UTF-8.
size_t utf8_length(const char *text, size_t n);

#ifdef __cplusplus
}
#endif
#endif
