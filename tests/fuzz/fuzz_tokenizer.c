// data: a tokenizer_config.json, byte 0, a text. What the files say can make a tokenizer fail to load, never misbehave:
// every id it gives is in its vocabulary, and ids decode to valid text. The model itself is a small, sound one: a crafted
// one is SentencePiece's to survive. Runs in the repository's root.
#include "tokenizer/detokenizer.h"
#include "tokenizer/tokenizer.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char directory[] = "/tmp/fuzz_tokenizer.XXXXXX", model_path[64], config_path[64];

static void write_file(const char *path, const void *data, size_t n)
{
    FILE *file = fopen(path, "wb");
    assert(file && fwrite(data, 1, n, file) == n);
    fclose(file);
}

static void clean_up(void)
{
    unlink(model_path);
    unlink(config_path);
    rmdir(directory);
}

static void set_up(void)
{
    static char model[1 << 16];
    FILE *file = fopen("tests/vectors/tokenizer/bpe_bytes/tokenizer.model", "rb");
    assert(file && mkdtemp(directory));
    size_t n = fread(model, 1, sizeof model, file);
    fclose(file);
    snprintf(model_path, sizeof model_path, "%s/tokenizer.model", directory);
    snprintf(config_path, sizeof config_path, "%s/tokenizer_config.json", directory);
    write_file(model_path, model, n);
    atexit(clean_up);
}

static void check_text(const struct tokenizer *t, const char *text, size_t length, bool parse_special)
{
    char error[256], *decoded;
    int32_t *ids;
    size_t n, n_decoded, n_bytes;
    int result = tokenizer_encode(t, text, length, true, parse_special, &ids, &n, error, sizeof error);
    assert((result == 0) == utf8_valid(text, length));
    if (result) return;
    for (size_t i = 0; i < n; i++) assert(tokenizer_token_bytes(t, ids[i], &n_bytes));
    for (int skip = 0; skip < 2; skip++) {
        assert(tokenizer_decode(t, ids, n, skip, &decoded, &n_decoded, error, sizeof error) == 0);
        assert(utf8_valid(decoded, n_decoded) && decoded[n_decoded] == '\0');
        free(decoded);
    }
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!model_path[0]) set_up();
    const uint8_t *split = size ? memchr(data, 0, size) : NULL;
    size_t n_config = split ? (size_t)(split - data) : size;
    write_file(config_path, data, n_config);
    struct tokenizer *t;
    char error[256] = "";
    int result = tokenizer_create(&t, directory, error, sizeof error);
    assert(result == 0 || (result == -1 && error[0] && !t));
    if (result) return 0;
    const char *text = split ? (const char *)split + 1 : "<|user|>", *end = split ? (const char *)data + size : text + 8;
    check_text(t, text, (size_t)(end - text), false);
    check_text(t, text, (size_t)(end - text), true);
    tokenizer_destroy(t);
    return 0;
}
