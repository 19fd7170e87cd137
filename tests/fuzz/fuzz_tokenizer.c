// data: a tokenizer_config.json, byte 0, a text. What the files say can make a tokenizer fail to load, never misbehave:
// every id it gives is in its vocabulary, and ids decode to valid text. The model itself is a small, sound one: a crafted
// one is SentencePiece's to survive. Runs in the repository's root.
#include "tests/fuzz/tokenizer_fuzz.h"

#include <unistd.h>

static char directory[] = "/tmp/fuzz_tokenizer.XXXXXX", model_path[64], config_path[64];

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
    check_text(t, text, (size_t)(end - text), false, false);
    check_text(t, text, (size_t)(end - text), true, false);
    tokenizer_destroy(t);
    return 0;
}
