/* json_get.h: a request's body as a checked JSON object, and typed getters whose errors name the field.
 *
 * json_body_init scans the text (json_scan.h), takes the token ids out of it, and gives the rest to cJSON. The getters
 * are case-sensitive, leave *out alone when the field is absent or null (so the caller puts the default there first),
 * and otherwise check type and range. They chain:
 *
 *     if (json_get_int32(o, "n", 1, 128, &p->n, e) || json_get_bool(o, "echo", &r->echo, e))
 *         return e->error.code;
 */
#ifndef GPTD_SERVER_JSON_GET_H
#define GPTD_SERVER_JSON_GET_H

#include "server/json_scan.h"

#include <cjson/cJSON.h>

enum { JSON_MAX_VALUES = 65536 }; // that cJSON may get from one body: about 6 MB; token ids are not among them

struct json_error {
    struct error error; // ERR_INVALID: a field is wrong; ERR_FORMAT: not JSON as we take it; ERR_NOMEM
    char param[64];     // the field at fault; "": none
};

struct json_body {
    struct json_scan scan; // borrows the text: for json_body_int64
    cJSON *root;           // an object
    bool has_ids;          // the member named to json_body_init was a list, but not of strings: it is in ids, 0 in root
    struct json_ids ids;
};

// Reads text, which it may change and borrows until json_body_deinit. ids_name: the member that may hold token ids
// ("prompt", "tokens"); NULL: none. On failure there is nothing to free.
int json_body_init(struct json_body *body, char *text, size_t length, const char *ids_name, struct json_error *e);
void json_body_deinit(struct json_body *body);

// Sets ERR_INVALID, param and the message (printf format, which should name the field). Returns ERR_INVALID.
int json_error_set(struct json_error *e, const char *param, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// Bytes of text, at most max, that end with a whole character: for %.*s.
int json_clip(const char *text, size_t max);

// The member called name; NULL: absent or null.
const cJSON *json_find(const cJSON *object, const char *name);
// Fails if name is absent or null.
int json_require(const cJSON *object, const char *name, struct json_error *e);
// Fails if object has a member that is not among known ([n_known] names, sorted by strcmp); it is named.
int json_check_known(const cJSON *object, const char *const *known, size_t n_known, struct json_error *e);

int json_get_bool(const cJSON *object, const char *name, bool *out, struct json_error *e);
// Integers may be written 16, 16.0 or 1.6e1. min..max inclusive.
int json_get_int32(const cJSON *object, const char *name, int32_t min, int32_t max, int32_t *out, struct json_error *e);
// A top-level integer of a body, exact over all of int64. *present: whether it was there and not null.
int json_body_int64(const struct json_body *body, const char *name, bool *present, int64_t *out, struct json_error *e);
// min..max inclusive; always finite.
int json_get_float(const cJSON *object, const char *name, float min, float max, float *out, struct json_error *e);
// Borrowed from object. min_length..max_length bytes (without NUL).
int json_get_string(const cJSON *object, const char *name, size_t min_length, size_t max_length, const char **out,
                    struct json_error *e);
// A list of min..max strings of min_length..max_length bytes; a lone string counts as a list of one.
// out: [max], borrowed from object. *n is left alone when absent.
int json_get_strings(const cJSON *object, const char *name, size_t min, size_t max, size_t min_length,
                     size_t max_length, const char **out, size_t *n, struct json_error *e);
// A list of at most max_n integers in min..max. *out is malloc'd (NULL when the list is empty), the caller frees.
int json_get_int32s(const cJSON *object, const char *name, int32_t min, int32_t max, size_t max_n, int32_t **out,
                    int32_t *n, struct json_error *e);
int json_get_object(const cJSON *object, const char *name, const cJSON **out, struct json_error *e);

#endif
