/* text_buffer.h: text that grows at its end, for answers written piece by piece.
 *
 * A failed allocation is remembered instead of returned: what comes after it is dropped, and whoever sends the text
 * looks at `failed` once. Zero-initialized is empty.
 */
#ifndef GPTD_SERVER_TEXT_BUFFER_H
#define GPTD_SERVER_TEXT_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct text_buffer {
    char *data; // [capacity], [length] of them written
    size_t length, capacity;
    bool failed;
};

void text_deinit(struct text_buffer *b);
// Empties b, keeps its memory.
static inline void text_clear(struct text_buffer *b) { b->length = 0; }

// Room for n bytes at the end, not yet counted in length; NULL: out of memory.
char *text_reserve(struct text_buffer *b, size_t n);
void text_append(struct text_buffer *b, const char *bytes, size_t n);
void text_string(struct text_buffer *b, const char *s); // NUL-terminated
void text_char(struct text_buffer *b, char c);
void text_printf(struct text_buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void text_int(struct text_buffer *b, int64_t value);
// A JSON string with its quotes. bytes is valid UTF-8.
void text_json_string(struct text_buffer *b, const char *bytes, size_t n);
// A JSON number: the fewest digits that read back as the same float; -9999 and 9999 for infinities, which JSON lacks.
void text_json_float(struct text_buffer *b, float value);

#endif
