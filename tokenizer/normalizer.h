/* normalizer.h: what a tokenizer.json does to text before it is cut ("normalizer").
 *
 * Called by json_tokenizer.c. Immutable after creation; any number of threads may use it at once. Unicode's forms are utf8proc's.
 */
#ifndef GPTD_TOKENIZER_NORMALIZER_H
#define GPTD_TOKENIZER_NORMALIZER_H

#include <stddef.h>

#include <cjson/cJSON.h>

struct normalizer;

// spec: the "normalizer" of a tokenizer.json; NULL or null: text stays as it is. Returns 0, or -1 with a message; what we do not
// know is refused by name.
int normalizer_create(struct normalizer **out, const cJSON *spec, char *error, size_t error_size);
void normalizer_destroy(struct normalizer *n);

// Valid UTF-8 to valid UTF-8. *out is malloc'd, the caller frees. Returns 0, or -1 with a message.
int normalizer_apply(const struct normalizer *n, const char *text, size_t length, char **out, size_t *out_length, char *error,
                     size_t error_size);

#endif
