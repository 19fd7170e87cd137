#include "tokenizer/detokenizer.h"

#include <string.h>

enum utf8 { UTF8_WHOLE, UTF8_PARTIAL, UTF8_BROKEN };

// What the n > 0 bytes at p begin with. *length: the character's bytes; for UTF8_PARTIAL n; for UTF8_BROKEN those of
// the maximal ill-formed subpart. The ranges are Unicode's table 3-7.
static enum utf8 utf8_next(const unsigned char *p, size_t n, size_t *length)
{
    unsigned char lead = p[0];
    size_t whole = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    *length = 1;
    if (whole == 0) return UTF8_BROKEN;
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (; *length < whole && *length < n; ++*length, low = 0x80, high = 0xBF)
        if (p[*length] < low || p[*length] > high) return UTF8_BROKEN;
    return *length == whole ? UTF8_WHOLE : UTF8_PARTIAL;
}

static size_t write_replacement(char *out)
{
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

size_t utf8_stream_push(struct utf8_stream *s, const char *bytes, size_t n, char *out)
{
    size_t written = 0;
    for (size_t i = 0; i < n; i++) {
        s->held[s->n_held++] = (unsigned char)bytes[i];
        // A byte that breaks a character may itself begin the next one: at most two rounds.
        while (s->n_held > 0) {
            size_t length;
            enum utf8 what = utf8_next(s->held, (size_t)s->n_held, &length);
            if (what == UTF8_PARTIAL) break;
            if (what == UTF8_WHOLE) {
                memcpy(out + written, s->held, length);
                written += length;
            } else {
                written += write_replacement(out + written);
            }
            s->n_held -= (int32_t)length;
            memmove(s->held, s->held + length, (size_t)s->n_held);
        }
    }
    return written;
}

size_t utf8_stream_finish(struct utf8_stream *s, char *out)
{
    if (s->n_held == 0) return 0;
    s->n_held = 0; // what is held is the beginning of one character: one maximal subpart
    return write_replacement(out);
}

size_t utf8_valid_prefix(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t i = 0, length;
    while (i < n) {
        if (p[i] < 0x80) {
            i++;
        } else {
            if (utf8_next(p + i, n - i, &length) != UTF8_WHOLE) break;
            i += length;
        }
    }
    return i;
}

int utf8_valid(const char *text, size_t n) { return utf8_valid_prefix(text, n) == n; }

size_t utf8_length(const char *text, size_t n)
{
    size_t length = 0;
    for (size_t i = 0; i < n; i++) length += ((unsigned char)text[i] & 0xC0) != 0x80;
    return length;
}
