// tokenizer_fuzz.h: what the fuzz targets of both kinds of tokenizer do with one that could be loaded.
#ifndef GPTD_TESTS_FUZZ_TOKENIZER_FUZZ_H
#define GPTD_TESTS_FUZZ_TOKENIZER_FUZZ_H

#include "tokenizer/detokenizer.h"
#include "tokenizer/tokenizer.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_file(const char *path, const void *data, size_t n)
{
    FILE *file = fopen(path, "wb");
    assert(file && fwrite(data, 1, n, file) == n);
    fclose(file);
}

// may_fail: a regular expression of the file's may take too long.
static void check_text(const struct tokenizer *t, const char *text, size_t length, bool parse_special,
                       bool may_fail)
{
    char error[256], *decoded;
    int32_t *ids;
    size_t n, n_decoded, n_bytes;
    int result = tokenizer_encode(t, text, length, true, parse_special, &ids, &n, error, sizeof error);
    assert(result ? may_fail || !utf8_valid(text, length) : utf8_valid(text, length));
    if (result) return;
    for (size_t i = 0; i < n; i++) assert(tokenizer_token_bytes(t, ids[i], &n_bytes));
    for (int skip = 0; skip < 2; skip++) {
        assert(tokenizer_decode(t, ids, n, skip, &decoded, &n_decoded, error, sizeof error) == 0);
        assert(utf8_valid(decoded, n_decoded) && decoded[n_decoded] == '\0');
        free(decoded);
    }
    free(ids);
}

#endif
