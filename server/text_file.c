#include "server/text_file.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int text_file_read(const char *path, const char *where, char **text, size_t *n, struct error *e)
{
    enum { MOST = 1 << 20 };
    FILE *f = fopen(path, "rb");
    if (!f) return error_set(e, ERR_IO, "%s: cannot open %s: %s", where, path, strerror(errno));
    *text = malloc(MOST + 1);
    *n = *text ? fread(*text, 1, MOST + 1, f) : 0;
    bool failed = ferror(f);
    fclose(f);
    if (!*text) return error_set(e, ERR_NOMEM, "out of memory");
    if (!failed && *n <= MOST) {
        (*text)[*n] = '\0';
        return 0;
    }
    free(*text);
    return error_set(e, ERR_IO, "%s: %s %s", where, failed ? "cannot read" : "over 1 MiB:", path);
}
