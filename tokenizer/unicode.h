/* unicode.h: what tokenizers ask of a character, in valid UTF-8. */
#ifndef GPTD_TOKENIZER_UNICODE_H
#define GPTD_TOKENIZER_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <utf8proc.h>

// Bytes of the character that begins with `first`.
static inline size_t unicode_length(unsigned char first)
{
    return first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

// The character that text begins with, and its bytes; length > 0.
static inline int32_t unicode_first(const char *text, size_t length, size_t *n)
{
    utf8proc_int32_t c = -1;
    utf8proc_ssize_t step = utf8proc_iterate((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)length, &c);
    *n = step > 0 ? (size_t)step : 1;
    return c;
}

// The one that it ends with.
static inline int32_t unicode_last(const char *text, size_t length, size_t *n)
{
    size_t begin = length - 1;
    while (begin > 0 && ((unsigned char)text[begin] & 0xC0) == 0x80) begin--;
    return unicode_first(text + begin, length - begin, n);
}

// White_Space.
static inline bool unicode_is_space(int32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x85 || c == ' ' || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// \w of regular expressions: letters, marks, decimal digits, connectors.
static inline bool unicode_is_word(int32_t c)
{
    utf8proc_category_t k = c < 0 ? UTF8PROC_CATEGORY_CN : utf8proc_category(c);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_ND) || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_PC;
}

#endif
