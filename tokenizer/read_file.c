#include "tokenizer/read_file.h"

#include "tokenizer/fail.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 1 << 28 };

int read_file(const char *dir, const char *name, char **data, size_t *size, char *error, size_t error_size)
{
    char path[4096];
    int result = -1;
    *data = NULL;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "rb");
    if (!file) return errno == ENOENT ? READ_FILE_ABSENT : fail(error, error_size, "%s: %s", path, strerror(errno));
    long length = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    if (length < 0 || length > MAX_FILE_BYTES || fseek(file, 0, SEEK_SET) != 0) {
        fail(error, error_size, "%s: cannot be read, or has more than %d bytes", path, MAX_FILE_BYTES);
    } else if (!(*data = malloc((size_t)length + 1))) {
        fail(error, error_size, "%s: out of memory", path);
    } else if ((*size = fread(*data, 1, (size_t)length, file)) != (size_t)length) {
        fail(error, error_size, "%s: read failed", path);
    } else {
        (*data)[*size] = '\0';
        result = 0;
    }
    fclose(file);
    if (result) free(*data);
    return result;
}
