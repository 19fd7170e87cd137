/* read_file.h: a checkpoint's small files, whole. Called by tokenizer.c and chat_template.c. */
#ifndef GPTD_TOKENIZER_READ_FILE_H
#define GPTD_TOKENIZER_READ_FILE_H

#include <stddef.h>

enum { READ_FILE_ABSENT = 1 };

// Reads dir/name into malloc'd, NUL-terminated memory (256 MB at most). Returns 0; READ_FILE_ABSENT when there is none; -1 with a
// message that begins with the path.
int read_file(const char *dir, const char *name, char **data, size_t *size, char *error, size_t error_size);

#endif
