// data: a tokenizer.json, byte 0, a text. What the file says can make a tokenizer fail to load, never misbehave: every id it
// gives is in its vocabulary, and ids decode to valid text.
#include "tests/fuzz/tokenizer_fuzz.h"

#include <unistd.h>

static char directory[] = "/tmp/fuzz_json_tokenizer.XXXXXX", path[64];

static void clean_up(void)
{
    unlink(path);
    rmdir(directory);
}

static void set_up(void)
{
    assert(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    atexit(clean_up);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!path[0]) set_up();
    const uint8_t *split = size ? memchr(data, 0, size) : NULL;
    write_file(path, data, split ? (size_t)(split - data) : size);
    struct tokenizer *t;
    char error[512] = "";
    int result = tokenizer_create(&t, directory, error, sizeof error);
    assert(result == 0 || (result == -1 && error[0] && !t));
    if (result) return 0;
    const char *text = split ? (const char *)split + 1 : "a bc", *end = split ? (const char *)data + size : text + 4;
    check_text(t, text, (size_t)(end - text), false, true);
    check_text(t, text, (size_t)(end - text), true, true);
    tokenizer_destroy(t);
    return 0;
}
