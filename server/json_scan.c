#include "server/json_scan.h"

#include "tokenizer/detokenizer.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct scanner {
    const char *text;
    size_t length, at; // bytes
    int32_t depth;
    size_t n_values, n_members_seen;
    struct json_member *members; // [n_members]: those of the objects that are open, outermost first
    size_t n_members, capacity;
    struct error *e;
};

static int scan_value(struct scanner *s);

static int scan_fail(struct scanner *s, size_t at, const char *what)
{
    return error_set(s->e, ERR_FORMAT, "%s at byte %zu", what, at);
}

// The next byte; 0 at the end, which no rule accepts either.
static char scan_peek(const struct scanner *s) { return s->at < s->length ? s->text[s->at] : 0; }

static int scan_unexpected(struct scanner *s)
{
    return scan_fail(s, s->at, s->at < s->length ? "unexpected character" : "unexpected end of the text");
}

static void skip_space(struct scanner *s)
{
    while (s->at < s->length && strchr(" \t\n\r", s->text[s->at]) && s->text[s->at]) s->at++;
}

// ---- strings ----

// The value of four hexadecimal digits; -1: they are not.
static int32_t hex4(const char *p)
{
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        if (!isxdigit((unsigned char)c)) return -1;
        value = value * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return value;
}

static int scan_unicode_escape(struct scanner *s)
{
    size_t start = s->at;
    int32_t unit = s->length - s->at >= 6 ? hex4(s->text + s->at + 2) : -1;
    if (unit < 0) return scan_fail(s, start, "bad \\u escape");
    if (unit == 0) return scan_fail(s, start, "NUL (\\u0000) in a string");
    s->at += 6;
    if (unit < 0xD800 || unit > 0xDFFF) return 0;
    bool pair = unit < 0xDC00 && s->length - s->at >= 6 && s->text[s->at] == '\\' && s->text[s->at + 1] == 'u';
    int32_t low = pair ? hex4(s->text + s->at + 2) : -1;
    if (low < 0xDC00 || low > 0xDFFF) return scan_fail(s, start, "lone surrogate");
    s->at += 6;
    return 0;
}

static int scan_string(struct scanner *s)
{
    for (s->at++;;) {
        unsigned char c = (unsigned char)scan_peek(s);
        if (c == '"') {
            s->at++;
            return 0;
        }
        if (s->at == s->length) return scan_fail(s, s->at, "unterminated string");
        if (c < 0x20) return scan_fail(s, s->at, "control character in a string");
        if (c != '\\') {
            s->at++;
            continue;
        }
        char escape = s->at + 1 < s->length ? s->text[s->at + 1] : 0;
        if (escape == 'u') {
            if (scan_unicode_escape(s)) return ERR_FORMAT;
        } else if (escape && strchr("\"\\/bfnrt", escape)) {
            s->at += 2;
        } else {
            return scan_fail(s, s->at, "bad escape");
        }
    }
}

// The code point at *at, an escape or a character of a string that has passed the scan; moves *at behind it.
static uint32_t next_char(const char **at)
{
    const unsigned char *p = (const unsigned char *)*at;
    if (*p != '\\') {
        int n = *p < 0x80 ? 1 : *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : 4;
        uint32_t c = n == 1 ? *p : *p & (0x7Fu >> n);
        for (int i = 1; i < n; i++) c = c << 6 | (p[i] & 0x3Fu);
        *at += n;
        return c;
    }
    if (p[1] != 'u') {
        static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
        *at += 2;
        return (uint32_t)values[strchr(names, p[1]) - names];
    }
    uint32_t c = (uint32_t)hex4(*at + 2);
    *at += 6;
    if (c < 0xD800 || c > 0xDFFF) return c;
    uint32_t low = (uint32_t)hex4(*at + 2);
    *at += 6;
    return 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
}

// strcmp over what two keys mean, however they are written.
static int compare_keys(const char *a, size_t a_length, const char *b, size_t b_length)
{
    const char *a_end = a + a_length, *b_end = b + b_length;
    while (a < a_end && b < b_end) {
        uint32_t x = next_char(&a), y = next_char(&b);
        if (x != y) return x < y ? -1 : 1;
    }
    return (a < a_end) - (b < b_end);
}

static int compare_members(const void *a, const void *b)
{
    const struct json_member *x = a, *y = b;
    return compare_keys(x->key, x->key_length, y->key, y->key_length);
}

// ---- numbers ----

static bool skip_digits(struct scanner *s)
{
    size_t start = s->at;
    while (scan_peek(s) >= '0' && scan_peek(s) <= '9') s->at++;
    return s->at > start;
}

// Copies a number's text, which has passed the scan, to where strtod finds its end.
static const char *number_text(char buffer[JSON_MAX_NUMBER + 1], const char *text, size_t length)
{
    memcpy(buffer, text, length);
    buffer[length] = '\0';
    return buffer;
}

static int scan_number(struct scanner *s)
{
    size_t start = s->at;
    bool has_exponent = false;
    if (scan_peek(s) == '-') s->at++;
    if (scan_peek(s) == '0') {
        s->at++;
        if (scan_peek(s) >= '0' && scan_peek(s) <= '9') return scan_fail(s, start, "number with a leading zero");
    } else if (!skip_digits(s)) {
        return scan_unexpected(s);
    }
    if (scan_peek(s) == '.') {
        s->at++;
        if (!skip_digits(s)) return scan_unexpected(s);
    }
    if (scan_peek(s) == 'e' || scan_peek(s) == 'E') {
        has_exponent = true;
        s->at++;
        if (scan_peek(s) == '+' || scan_peek(s) == '-') s->at++;
        if (!skip_digits(s)) return scan_unexpected(s);
    }
    if (s->at - start > JSON_MAX_NUMBER) return scan_fail(s, start, "number of more than 63 characters");
    char buffer[JSON_MAX_NUMBER + 1]; // without an exponent so few digits cannot overflow
    if (has_exponent && !isfinite(strtod(number_text(buffer, s->text + start, s->at - start), NULL)))
        return scan_fail(s, start, "number too large");
    return 0;
}

// ---- objects, arrays ----

static int push_member(struct scanner *s, const char *key, size_t key_length)
{
    if (++s->n_members_seen > JSON_MAX_MEMBERS) return scan_fail(s, s->at, "too many object members");
    if (s->n_members == s->capacity) {
        size_t capacity = s->capacity ? s->capacity * 2 : 32;
        struct json_member *members = realloc(s->members, capacity * sizeof *members);
        if (!members) return error_set(s->e, ERR_NOMEM, "out of memory");
        s->members = members;
        s->capacity = capacity;
    }
    s->members[s->n_members++] = (struct json_member){.key = key, .key_length = key_length};
    return 0;
}

static int scan_member(struct scanner *s)
{
    if (scan_peek(s) != '"') return scan_unexpected(s);
    const char *key = s->text + s->at + 1;
    int err = scan_string(s);
    if (err) return err;
    size_t key_length = (size_t)(s->text + s->at - 1 - key);
    skip_space(s);
    if (scan_peek(s) != ':') return scan_unexpected(s);
    s->at++;
    skip_space(s);
    size_t i = s->n_members, start = s->at, n_values = s->n_values;
    if ((err = push_member(s, key, key_length)) || (err = scan_value(s))) return err;
    s->members[i].value = s->text + start;
    s->members[i].value_length = s->at - start;
    s->members[i].n_values = s->n_values - n_values;
    return 0;
}

static int refuse_duplicates(struct scanner *s, size_t first)
{
    struct json_member *m = s->members + first;
    size_t n = s->n_members - first;
    if (n > 1) qsort(m, n, sizeof *m, compare_members);
    for (size_t i = 1; i < n; i++) {
        if (compare_members(&m[i - 1], &m[i]) != 0) continue;
        const struct json_member *second = m[i - 1].key < m[i].key ? &m[i] : &m[i - 1];
        return scan_fail(s, (size_t)(second->key - s->text) - 1, "duplicate object member");
    }
    return 0;
}

static int scan_object(struct scanner *s)
{
    size_t first = s->n_members;
    int err;
    s->at++;
    skip_space(s);
    if (scan_peek(s) == '}') {
        s->at++;
        return 0;
    }
    for (;; s->at++) {
        skip_space(s);
        if ((err = scan_member(s))) return err;
        skip_space(s);
        if (scan_peek(s) != ',') break;
    }
    if (scan_peek(s) != '}') return scan_unexpected(s);
    s->at++;
    if ((err = refuse_duplicates(s, first))) return err;
    if (s->depth > 1) s->n_members = first; // the outermost object's members are the result
    return 0;
}

static int scan_array(struct scanner *s)
{
    s->at++;
    skip_space(s);
    if (scan_peek(s) == ']') {
        s->at++;
        return 0;
    }
    for (;; s->at++) {
        skip_space(s);
        int err = scan_value(s);
        if (err) return err;
        skip_space(s);
        if (scan_peek(s) != ',') break;
    }
    if (scan_peek(s) != ']') return scan_unexpected(s);
    s->at++;
    return 0;
}

static int scan_literal(struct scanner *s, const char *literal)
{
    size_t n = strlen(literal);
    if (s->length - s->at < n || memcmp(s->text + s->at, literal, n) != 0) return scan_unexpected(s);
    s->at += n;
    return 0;
}

static int scan_nested(struct scanner *s, int (*scan)(struct scanner *))
{
    if (s->depth == JSON_MAX_DEPTH) return scan_fail(s, s->at, "nesting of more than 32 levels");
    s->depth++;
    int err = scan(s);
    s->depth--;
    return err;
}

static int scan_value(struct scanner *s)
{
    s->n_values++;
    switch (scan_peek(s)) {
    case '{': return scan_nested(s, scan_object);
    case '[': return scan_nested(s, scan_array);
    case '"': return scan_string(s);
    case 't': return scan_literal(s, "true");
    case 'f': return scan_literal(s, "false");
    case 'n': return scan_literal(s, "null");
    default: return scan_number(s);
    }
}

static int scan_text(struct scanner *s)
{
    size_t valid = utf8_valid_prefix(s->text, s->length);
    if (valid < s->length) return scan_fail(s, valid, "invalid UTF-8");
    if (s->length >= 3 && memcmp(s->text, "\xEF\xBB\xBF", 3) == 0) return scan_fail(s, 0, "byte order mark");
    skip_space(s);
    if (s->at < s->length && scan_peek(s) != '{') return scan_fail(s, s->at, "something other than an object");
    int err = scan_value(s);
    if (err) return err;
    skip_space(s);
    return s->at == s->length ? 0 : scan_fail(s, s->at, "text after the object");
}

int json_scan_init(struct json_scan *scan, const char *text, size_t length, struct error *e)
{
    struct scanner s = {.text = text, .length = length, .e = e};
    int err = scan_text(&s);
    if (err) {
        free(s.members);
        return err;
    }
    *scan = (struct json_scan){.members = s.members, .n_members = s.n_members, .n_values = s.n_values};
    return 0;
}

void json_scan_deinit(struct json_scan *scan)
{
    free(scan->members);
    *scan = (struct json_scan){0};
}

// ---- raw values ----

struct json_member *json_scan_find(const struct json_scan *scan, const char *name)
{
    for (size_t i = 0; i < scan->n_members; i++)
        if (compare_keys(scan->members[i].key, scan->members[i].key_length, name, strlen(name)) == 0)
            return &scan->members[i];
    return NULL;
}

bool json_member_int64(const struct json_member *m, int64_t *out)
{
    char buffer[JSON_MAX_NUMBER + 1];
    if (m->value[0] != '-' && (m->value[0] < '0' || m->value[0] > '9')) return false;
    const char *text = number_text(buffer, m->value, m->value_length);
    if (!strpbrk(text, ".eE")) {
        errno = 0;
        *out = strtoll(text, NULL, 10);
        return errno == 0;
    }
    double value = strtod(text, NULL);
    if (value != trunc(value) || fabs(value) > 0x1p53) return false;
    *out = (int64_t)value;
    return true;
}

// Parses the integer at *at into ids; false: not a plain integer of 0..INT32_MAX.
static bool parse_id(const char **at, int32_t *id)
{
    int64_t value = 0;
    const char *p = *at;
    for (; *p >= '0' && *p <= '9' && value <= INT32_MAX; p++) value = value * 10 + (*p - '0');
    if (p == *at || value > INT32_MAX || strchr(".eE", *p)) return false;
    *at = p;
    *id = (int32_t)value;
    return true;
}

static int parse_ids(const struct json_member *m, struct json_ids *out, struct error *e)
{
    const char *p = m->value + 1, *end = m->value + m->value_length - 1; // between the outer brackets
    bool open = !out->nested;
    size_t n = 0, list = 0;
    out->offsets[0] = 0;
    while (p < end) {
        if (strchr(" \t\n\r,", *p)) {
            p++;
        } else if (*p == '[' && !open) {
            open = true;
            p++;
        } else if (*p == ']' && open && out->nested) {
            open = false;
            out->offsets[++list] = n;
            p++;
        } else if (!open || !parse_id(&p, &out->ids[n++])) {
            size_t length = utf8_valid_prefix(p, (size_t)(end - p) < 24 ? (size_t)(end - p) : 24);
            return error_set(e, ERR_INVALID, "not a token id: %.*s", (int)length, p);
        }
    }
    if (!out->nested) out->offsets[1] = n;
    return 0;
}

int json_member_ids(const struct json_member *m, struct json_ids *out, struct error *e)
{
    if (m->value[0] != '[') return error_set(e, ERR_INVALID, "not a list of token ids");
    size_t n_brackets = 0;
    for (size_t i = 0; i < m->value_length; i++) n_brackets += m->value[i] == '[';
    bool nested = m->value[1 + strspn(m->value + 1, " \t\n\r")] == '[';
    *out = (struct json_ids){.nested = nested, .n_lists = nested ? n_brackets - 1 : 1};
    out->ids = malloc(m->n_values * sizeof *out->ids); // n_values and n_brackets are at most the text's length
    out->offsets = malloc((out->n_lists + 1) * sizeof *out->offsets);
    int err = out->ids && out->offsets ? parse_ids(m, out, e) : error_set(e, ERR_NOMEM, "out of memory");
    if (err) json_ids_deinit(out);
    return err;
}

void json_ids_deinit(struct json_ids *ids)
{
    free(ids->ids);
    free(ids->offsets);
    *ids = (struct json_ids){0};
}
