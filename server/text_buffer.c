#include "server/text_buffer.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void text_deinit(struct text_buffer *b)
{
    free(b->data);
    *b = (struct text_buffer){0};
}

char *text_reserve(struct text_buffer *b, size_t n)
{
    if (b->failed) return NULL;
    if (b->capacity - b->length < n) {
        size_t capacity = b->capacity ? b->capacity : 256;
        while (capacity - b->length < n && capacity <= SIZE_MAX / 2) capacity *= 2;
        char *data = capacity - b->length < n ? NULL : realloc(b->data, capacity);
        if (!data) {
            b->failed = true;
            return NULL;
        }
        b->data = data;
        b->capacity = capacity;
    }
    return b->data + b->length;
}

void text_append(struct text_buffer *b, const char *bytes, size_t n)
{
    char *out = n ? text_reserve(b, n) : NULL;
    if (!out) return;
    memcpy(out, bytes, n);
    b->length += n;
}

void text_string(struct text_buffer *b, const char *s) { text_append(b, s, strlen(s)); }

void text_char(struct text_buffer *b, char c) { text_append(b, &c, 1); }

void text_printf(struct text_buffer *b, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    char *out = text_reserve(b, (size_t)n + 1);
    if (out) {
        vsnprintf(out, (size_t)n + 1, format, again);
        b->length += (size_t)n;
    }
    va_end(again);
    va_end(args);
}

void text_int(struct text_buffer *b, int64_t value)
{
    char digits[24];
    char *p = digits + sizeof digits;
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do *--p = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0) *--p = '-';
    text_append(b, p, (size_t)(digits + sizeof digits - p));
}

// Writes the escape of c and returns its length, at most 6.
static size_t escape(char *out, unsigned char c)
{
    static const char hex[] = "0123456789abcdef", from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *found = c ? strchr(from, c) : NULL;
    out[0] = '\\';
    if (found) {
        out[1] = to[found - from];
        return 2;
    }
    memcpy(out + 1, "u00", 3);
    out[4] = hex[c >> 4];
    out[5] = hex[c & 15];
    return 6;
}

void text_json_string(struct text_buffer *b, const char *bytes, size_t n)
{
    if (n > (SIZE_MAX - 2) / 6) {
        b->failed = true;
        return;
    }
    text_char(b, '"');
    size_t plain = 0; // first byte not yet written
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        char escaped[6];
        text_append(b, bytes + plain, i - plain);
        text_append(b, escaped, escape(escaped, c));
        plain = i + 1;
    }
    text_append(b, bytes + plain, n - plain);
    text_char(b, '"');
}

void text_json_float(struct text_buffer *b, float value)
{
    if (!isfinite(value)) value = value > 0 ? 9999 : -9999;
    char digits[32];
    int n = 0;
    for (int precision = 6; precision <= 9; precision++) {
        n = snprintf(digits, sizeof digits, "%.*g", precision, (double)value);
        if (strtof(digits, NULL) == value) break;
    }
    text_append(b, digits, (size_t)n);
}
