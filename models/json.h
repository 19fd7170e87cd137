/* json.h: JSON from a checkpoint's own files (config.json, safetensors headers), read strictly.
 *
 * Used by config.c, safetensors.c and checkpoint.c. cJSON builds the tree; what it lets through (hardening.md) is
 * refused before or after: bytes that are not UTF-8, control characters, NUL in a string, numbers like 01 or 1.,
 * nesting beyond 32, more than 2^21 values, text after the end, two equal keys in one object.
 */
#ifndef GPTD_MODELS_JSON_H
#define GPTD_MODELS_JSON_H

#include <cjson/cJSON.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

// Parses text [size], which must hold one object. The caller frees *out with cJSON_Delete. Errors name the line.
int json_parse(cJSON **out, const char *text, size_t size, struct error *e);

// Reads and parses dir/name. ERR_IO when it cannot be read or is larger than max_size bytes. Errors name the file.
int json_read(cJSON **out, const char *dir, const char *name, size_t max_size, struct error *e);

// Takes fields out of one object. The first failure is kept in *error and later ones change nothing, so that a caller
// reads every field and looks at `status` once. A field that is absent or null takes its fallback; with JSON_REQUIRED
// it is an error that names it. After a failure the getters return the least value allowed.
struct json_reader {
    const cJSON *object; // NULL: as if empty
    const char *prefix;  // before the field's name in messages: "" or "rope_scaling."
    int *status;         // 0, or the enum err of the first failure; readers may share one
    struct error *error;
};

#define JSON_REQUIRED NAN

// The value of a field that is there and not null; else NULL.
const cJSON *json_field(const struct json_reader *r, const char *key);
// A finite number in min..max.
double json_number(struct json_reader *r, const char *key, double min, double max, double fallback);
// Likewise, and whole.
int32_t json_integer(struct json_reader *r, const char *key, int32_t min, int32_t max, double fallback);
bool json_bool(struct json_reader *r, const char *key, bool fallback);
// Borrowed from the tree. fallback NULL: NULL when absent.
const char *json_string(struct json_reader *r, const char *key, const char *fallback);
// Records a failure about a field: "prefix+key: message" (printf format).
void json_fail(struct json_reader *r, enum err code, const char *key, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#endif
