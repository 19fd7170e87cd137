/* text_file.h: small files that options name, read whole. Called by options.c and api_keys.c. */
#ifndef GPTD_SERVER_TEXT_FILE_H
#define GPTD_SERVER_TEXT_FILE_H

#include "kernels/error.h"

#include <stddef.h>

// Reads at most 1 MiB; *text is malloc'd, [*n] bytes and a NUL. `where`: the option that names the file, for the error.
// ERR_IO (it cannot be read, or is longer), ERR_NOMEM.
int text_file_read(const char *path, const char *where, char **text, size_t *n, struct error *e);

#endif
