#include "models/json.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 32, MAX_VALUES = 1 << 21, FEW_KEYS = 16 };

// Bytes of the well-formed UTF-8 character at s (Unicode 15, table 3-7); 0 if there is none.
static size_t utf8_length(const unsigned char *s, size_t size)
{
    static const struct { unsigned char lead_min, lead_max, second_min, second_max, length; } forms[] = {
        {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3}, {0xE1, 0xEC, 0x80, 0xBF, 3},
        {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3}, {0xF0, 0xF0, 0x90, 0xBF, 4},
        {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4},
    };
    if (s[0] < 0x80) return 1;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        if (s[0] < forms[i].lead_min || s[0] > forms[i].lead_max) continue;
        if (size < forms[i].length || s[1] < forms[i].second_min || s[1] > forms[i].second_max) return 0;
        for (size_t j = 2; j < forms[i].length; j++) {
            if ((s[j] & 0xC0) != 0x80) return 0;
        }
        return forms[i].length;
    }
    return 0;
}

// The bytes of the string that opens at s, both quotes included; 0 if it breaks a rule.
static size_t string_length(const unsigned char *s, size_t size)
{
    size_t i = 1;
    while (i < size && s[i] != '"') {
        if (s[i] < 0x20) return 0;
        if (s[i] == '\\') {
            if (size - i >= 6 && memcmp(s + i, "\\u0000", 6) == 0) return 0; // cJSON would end the string there
            i += 2;
            continue;
        }
        size_t n = utf8_length(s + i, size - i);
        if (n == 0) return 0;
        i += n;
    }
    return i < size ? i + 1 : 0;
}

static size_t digits(const unsigned char *s, size_t size)
{
    size_t n = 0;
    while (n < size && s[n] >= '0' && s[n] <= '9') n++;
    return n;
}

// The bytes of the number that starts at s (RFC 8259, section 6); 0 if it breaks a rule.
static size_t number_length(const unsigned char *s, size_t size)
{
    size_t i = s[0] == '-';
    size_t n = digits(s + i, size - i);
    if (n == 0 || (n > 1 && s[i] == '0')) return 0;
    i += n;
    if (i < size && s[i] == '.') {
        n = digits(s + i + 1, size - i - 1);
        if (n == 0) return 0;
        i += 1 + n;
    }
    if (i < size && (s[i] == 'e' || s[i] == 'E')) {
        i++;
        if (i < size && (s[i] == '+' || s[i] == '-')) i++;
        n = digits(s + i, size - i);
        if (n == 0) return 0;
        i += n;
    }
    return i;
}

// Checks what cJSON does not. Returns the offset of the first byte that breaks a rule (its rule in *rule), or size.
static size_t scan(const unsigned char *s, size_t size, const char **rule)
{
    size_t depth = 0, values = 0;
    for (size_t i = 0, n = 1; i < size; i += n, n = 1) {
        unsigned char c = s[i];
        if (c == '"') {
            *rule = "not a valid string", n = string_length(s + i, size - i), values++;
        } else if (c == '-' || (c >= '0' && c <= '9')) {
            *rule = "not a valid number", n = number_length(s + i, size - i), values++;
        } else if (c == '{' || c == '[') {
            *rule = "nested too deeply", n = ++depth <= MAX_DEPTH, values++;
        } else if (c == '}' || c == ']') {
            *rule = "closed but never opened", n = depth-- > 0;
        } else {
            *rule = "not JSON", n = strchr(" \t\r\n:,truefalsn", c) != NULL && c != 0;
        }
        if (n > 0 && values > MAX_VALUES) *rule = "more than 2097152 values", n = 0;
        if (n == 0) return i;
    }
    return size;
}

static int compare_keys(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Sets *key to a key that the object holds twice, or to NULL.
static int find_duplicate(const cJSON *object, const char **key, struct error *e)
{
    size_t n = 0;
    const cJSON *child;
    cJSON_ArrayForEach(child, object) n++;
    const char *few[FEW_KEYS];
    const char **keys = n <= FEW_KEYS ? few : malloc(n * sizeof *keys);
    if (!keys) return error_set(e, ERR_NOMEM, "out of memory for %zu JSON keys", n);
    n = 0;
    cJSON_ArrayForEach(child, object) keys[n++] = child->string;
    qsort(keys, n, sizeof *keys, compare_keys);
    *key = NULL;
    for (size_t i = 1; i < n && !*key; i++) {
        if (strcmp(keys[i - 1], keys[i]) == 0) *key = keys[i];
    }
    if (keys != few) free(keys);
    return 0;
}

static int refuse_duplicates(const cJSON *value, struct error *e)
{
    const char *key = NULL;
    if (cJSON_IsObject(value)) {
        int rc = find_duplicate(value, &key, e);
        if (rc) return rc;
        if (key) return error_set(e, ERR_FORMAT, "\"%.100s\" stands twice in one object", key);
    }
    const cJSON *child;
    cJSON_ArrayForEach(child, value) {
        int rc = cJSON_IsObject(child) || cJSON_IsArray(child) ? refuse_duplicates(child, e) : 0;
        if (rc) return rc;
    }
    return 0;
}

// An error at text[at]: the line's number and what it says, so that `"head_dim": NaN` is named.
static int fail_at(const char *text, size_t size, size_t at, const char *rule, struct error *e)
{
    size_t line = 1, begin = 0;
    for (size_t i = 0; i < at; i++) {
        if (text[i] == '\n') line++, begin = i + 1;
    }
    if (at - begin > 60) begin = at - 60;
    char shown[81];
    size_t n = 0;
    for (size_t i = begin; i < size && text[i] != '\n' && n < sizeof shown - 1; i++) {
        shown[n++] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    }
    shown[n] = 0;
    return error_set(e, ERR_FORMAT, "line %zu: %s: %s", line, rule, shown);
}

int json_parse(cJSON **out, const char *text, size_t size, struct error *e)
{
    *out = NULL;
    const char *rule = NULL, *end = NULL;
    size_t at = scan((const unsigned char *)text, size, &rule);
    if (at < size) return fail_at(text, size, at, rule, e);
    cJSON *root = cJSON_ParseWithLengthOpts(text, size, &end, false);
    at = end ? (size_t)(end - text) : 0;
    if (!root) return fail_at(text, size, at, "not JSON", e);
    int rc = 0;
    while (at < size && strchr(" \t\r\n", text[at])) at++;
    if (at < size) rc = fail_at(text, size, at, "text after the end", e);
    if (!rc && !cJSON_IsObject(root)) rc = error_set(e, ERR_FORMAT, "not a JSON object");
    if (!rc) rc = refuse_duplicates(root, e);
    if (rc) cJSON_Delete(root);
    else *out = root;
    return rc;
}

// Reads a whole file of at most max_size bytes into malloc'd memory.
static int read_file(char **out, size_t *size, const char *path, size_t max_size, struct error *e)
{
    *out = NULL;
    FILE *f = fopen(path, "rb");
    if (!f) return error_set(e, ERR_IO, "cannot be opened: %m");
    int rc = 0;
    char *text = NULL;
    long n = -1;
    if (fseek(f, 0, SEEK_END) == 0) n = ftell(f);
    rewind(f);
    if (n < 0 || n == LONG_MAX) { // a directory "has" LONG_MAX bytes
        rc = error_set(e, ERR_IO, "not a regular file");
        goto done;
    }
    if ((size_t)n > max_size) {
        rc = error_set(e, ERR_FORMAT, "%ld bytes, more than the %zu allowed", n, max_size);
        goto done;
    }
    text = malloc((size_t)n + 1);
    if (!text) {
        rc = error_set(e, ERR_NOMEM, "out of memory for %ld bytes", n);
    } else if (fread(text, 1, (size_t)n, f) != (size_t)n) {
        rc = error_set(e, ERR_IO, "cannot be read: %m");
    } else {
        *out = text, *size = (size_t)n, text = NULL;
    }
done:
    free(text);
    fclose(f);
    return rc;
}

int json_read(cJSON **out, const char *dir, const char *name, size_t max_size, struct error *e)
{
    *out = NULL;
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path) {
        return error_set(e, ERR_IO, "%s: the path is too long", name);
    }
    char *text;
    size_t size = 0;
    int rc = read_file(&text, &size, path, max_size, e);
    if (!rc) {
        rc = json_parse(out, text, size, e);
        free(text);
    }
    if (rc) error_prefix(e, "%s", name);
    return rc;
}

void json_fail(struct json_reader *r, enum err code, const char *key, const char *format, ...)
{
    if (*r->status) return;
    char message[256];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    *r->status = error_set(r->error, code, "%s%s: %s", r->prefix, key, message);
}

const cJSON *json_field(const struct json_reader *r, const char *key)
{
    const cJSON *field = cJSON_GetObjectItemCaseSensitive(r->object, key);
    return cJSON_IsNull(field) ? NULL : field;
}

double json_number(struct json_reader *r, const char *key, double min, double max, double fallback)
{
    const cJSON *field = json_field(r, key);
    if (!field && !isnan(fallback)) return fallback;
    if (!field) {
        json_fail(r, ERR_FORMAT, key, "missing");
    } else if (!cJSON_IsNumber(field)) {
        json_fail(r, ERR_FORMAT, key, "not a number");
    } else if (!(field->valuedouble >= min && field->valuedouble <= max)) {
        json_fail(r, ERR_FORMAT, key, "%.15g is not in %.15g to %.15g", field->valuedouble, min, max);
    } else {
        return field->valuedouble;
    }
    return min;
}

int32_t json_integer(struct json_reader *r, const char *key, int32_t min, int32_t max, double fallback)
{
    double value = json_number(r, key, min, max, fallback);
    if (value == floor(value)) return (int32_t)value;
    json_fail(r, ERR_FORMAT, key, "%.15g is not a whole number", value);
    return min;
}

bool json_bool(struct json_reader *r, const char *key, bool fallback)
{
    const cJSON *field = json_field(r, key);
    if (field && !cJSON_IsBool(field)) json_fail(r, ERR_FORMAT, key, "not true or false");
    return field ? cJSON_IsTrue(field) : fallback;
}

const char *json_string(struct json_reader *r, const char *key, const char *fallback)
{
    const cJSON *field = json_field(r, key);
    if (field && !cJSON_IsString(field)) json_fail(r, ERR_FORMAT, key, "not a string");
    return cJSON_IsString(field) ? field->valuestring : fallback;
}
