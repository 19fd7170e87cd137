#include "server/json_get.h"

#include "tokenizer/detokenizer.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int json_clip(const char *text, size_t max) { return (int)utf8_valid_prefix(text, strnlen(text, max)); }

int json_error_set(struct json_error *e, const char *param, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(e->error.message, sizeof e->error.message, format, args);
    va_end(args);
    snprintf(e->param, sizeof e->param, "%.*s", json_clip(param, sizeof e->param - 1), param);
    return e->error.code = ERR_INVALID;
}

// ---- the body ----

// If the member holds a list whose first value is not a string, reads it as token ids and leaves 0 in its place: cJSON
// never sees the list, and a getter that asks for the member anyway finds the wrong type, not an absent field.
static int take_ids(struct json_body *body, char *text, const char *name, size_t *n_values, struct json_error *e)
{
    struct json_member *m = json_scan_find(&body->scan, name);
    if (!m || m->value[0] != '[' || m->value[strspn(m->value, "[ \t\n\r")] == '"') return 0;
    struct error found;
    int err = json_member_ids(m, &body->ids, &found);
    if (err == ERR_INVALID) return json_error_set(e, name, "'%s' mixes types or holds what is %s", name, found.message);
    if (err) {
        e->error = found;
        return err;
    }
    body->has_ids = true;
    *n_values -= m->n_values - 1;
    char *value = text + (m->value - text);
    memset(value, ' ', m->value_length);
    value[0] = '0';
    m->value_length = m->n_values = 1;
    return 0;
}

int json_body_init(struct json_body *body, char *text, size_t length, const char *ids_name, struct json_error *e)
{
    *body = (struct json_body){0};
    *e = (struct json_error){0};
    int err = json_scan_init(&body->scan, text, length, &e->error);
    if (err) return err;
    size_t n_values = body->scan.n_values;
    if (ids_name && (err = take_ids(body, text, ids_name, &n_values, e))) goto fail;
    if (n_values > JSON_MAX_VALUES) {
        err = error_set(&e->error, ERR_FORMAT, "more than %d values", JSON_MAX_VALUES);
        goto fail;
    }
    body->root = cJSON_ParseWithLength(text, length);
    if (body->root) return 0;
    err = error_set(&e->error, ERR_NOMEM, "out of memory"); // the scan leaves no other reason
fail:
    json_body_deinit(body);
    return err;
}

void json_body_deinit(struct json_body *body)
{
    json_scan_deinit(&body->scan);
    json_ids_deinit(&body->ids);
    cJSON_Delete(body->root);
    *body = (struct json_body){0};
}

// ---- members ----

const cJSON *json_find(const cJSON *object, const char *name)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(object, name);
    return cJSON_IsNull(value) ? NULL : value;
}

int json_require(const cJSON *object, const char *name, struct json_error *e)
{
    return json_find(object, name) ? 0 : json_error_set(e, name, "'%s' is required", name);
}

static int compare_names(const void *key, const void *name) { return strcmp(key, *(const char *const *)name); }

int json_check_known(const cJSON *object, const char *const *known, size_t n_known, struct json_error *e)
{
    const cJSON *member;
    cJSON_ArrayForEach(member, object)
    {
        if (!bsearch(member->string, known, n_known, sizeof *known, compare_names))
            return json_error_set(e, member->string, "unknown field '%.*s'", json_clip(member->string, 60),
                                  member->string);
    }
    return 0;
}

// What value is, for "..., not %s".
static const char *describe(const cJSON *value, char buffer[32])
{
    if (cJSON_IsNumber(value)) {
        snprintf(buffer, 32, "%.17g", value->valuedouble);
        return buffer;
    }
    return cJSON_IsString(value) ? "a string" : cJSON_IsArray(value) ? "a list" : cJSON_IsObject(value) ? "an object"
           : cJSON_IsNull(value) ? "null" : "a boolean";
}

static int wrong_type(const cJSON *value, const char *name, const char *expected, struct json_error *e)
{
    char buffer[32];
    return json_error_set(e, name, "'%s' must be %s, not %s", name, expected, describe(value, buffer));
}

int json_get_bool(const cJSON *object, const char *name, bool *out, struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (!value) return 0;
    if (!cJSON_IsBool(value)) return wrong_type(value, name, "true or false", e);
    *out = cJSON_IsTrue(value);
    return 0;
}

static bool to_int32(const cJSON *value, int32_t min, int32_t max, int32_t *out)
{
    double d = cJSON_IsNumber(value) ? value->valuedouble : NAN;
    if (!(d >= min && d <= max) || d != trunc(d)) return false;
    *out = (int32_t)d;
    return true;
}

int json_get_int32(const cJSON *object, const char *name, int32_t min, int32_t max, int32_t *out, struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (!value || to_int32(value, min, max, out)) return 0;
    char expected[64];
    snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
    return wrong_type(value, name, expected, e);
}

int json_body_int64(const struct json_body *body, const char *name, bool *present, int64_t *out, struct json_error *e)
{
    const cJSON *value = json_find(body->root, name);
    *present = value != NULL;
    if (!value || json_member_int64(json_scan_find(&body->scan, name), out)) return 0;
    return wrong_type(value, name, "a 64-bit integer", e);
}

int json_get_float(const cJSON *object, const char *name, float min, float max, float *out, struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (!value) return 0;
    double d = cJSON_IsNumber(value) ? value->valuedouble : NAN;
    if (d >= min && d <= max) {
        *out = (float)d;
        return 0;
    }
    char expected[64];
    snprintf(expected, sizeof expected, "a number from %g to %g", (double)min, (double)max);
    return wrong_type(value, name, expected, e);
}

// what: "'stop'" or "a string of 'stop'".
static int check_length(const char *text, const char *what, const char *name, size_t min_length, size_t max_length,
                        struct json_error *e)
{
    size_t n = strlen(text);
    if (n < min_length) return json_error_set(e, name, "%s'%s' must not be empty", what, name);
    if (n <= max_length) return 0;
    return json_error_set(e, name, "%s'%s' has %zu bytes, more than %zu", what, name, n, max_length);
}

int json_get_string(const cJSON *object, const char *name, size_t min_length, size_t max_length, const char **out,
                    struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (!value) return 0;
    if (!cJSON_IsString(value)) return wrong_type(value, name, "a string", e);
    *out = value->valuestring;
    return check_length(*out, "", name, min_length, max_length, e);
}

int json_get_strings(const cJSON *object, const char *name, size_t min, size_t max, size_t min_length,
                     size_t max_length, const char **out, size_t *n, struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (!value) return 0;
    if (!cJSON_IsString(value) && !cJSON_IsArray(value))
        return wrong_type(value, name, "a string or a list of strings", e);
    size_t length = cJSON_IsString(value) ? 1 : (size_t)cJSON_GetArraySize(value);
    if (length < min || length > max)
        return json_error_set(e, name, "'%s' must hold %zu to %zu strings, not %zu", name, min, max, length);
    const cJSON *item = cJSON_IsString(value) ? value : value->child;
    for (size_t i = 0; i < length; i++, item = item->next) {
        if (!cJSON_IsString(item)) return wrong_type(item, name, "a string or a list of strings alone", e);
        int err = check_length(item->valuestring, length > 1 ? "a string in " : "", name, min_length, max_length, e);
        if (err) return err;
        out[i] = item->valuestring;
    }
    *n = length;
    return 0;
}

int json_get_int32s(const cJSON *object, const char *name, int32_t min, int32_t max, size_t max_n, int32_t **out,
                    int32_t *n, struct json_error *e)
{
    const cJSON *value = json_find(object, name), *item;
    if (!value) return 0;
    if (!cJSON_IsArray(value)) return wrong_type(value, name, "a list of integers", e);
    size_t length = (size_t)cJSON_GetArraySize(value);
    if (length > max_n) return json_error_set(e, name, "'%s' holds %zu integers, more than %zu", name, length, max_n);
    int32_t *integers = length ? malloc(length * sizeof *integers) : NULL, i = 0;
    if (length && !integers) return error_set(&e->error, ERR_NOMEM, "out of memory");
    cJSON_ArrayForEach(item, value)
    {
        if (to_int32(item, min, max, &integers[i++])) continue;
        char expected[80];
        snprintf(expected, sizeof expected, "a list of integers from %d to %d", min, max);
        free(integers);
        return wrong_type(item, name, expected, e);
    }
    *out = integers;
    *n = i;
    return 0;
}

int json_get_object(const cJSON *object, const char *name, const cJSON **out, struct json_error *e)
{
    const cJSON *value = json_find(object, name);
    if (value && !cJSON_IsObject(value)) return wrong_type(value, name, "an object", e);
    if (value) *out = value;
    return 0;
}
