/* fail.h: error messages of tokenizer/: text in the caller's buffer. */
#ifndef GPTD_TOKENIZER_FAIL_H
#define GPTD_TOKENIZER_FAIL_H

#include <stdarg.h>
#include <stdio.h>

// Returns -1.
__attribute__((format(printf, 3, 4)))
static inline int fail(char *error, size_t error_size, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error, error_size, format, args);
    va_end(args);
    return -1;
}

#endif
