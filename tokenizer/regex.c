#include "tokenizer/regex.h"

#include "tokenizer/fail.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct regex {
    pcre2_code *code;
};

// White_Space of Unicode; PCRE2's \s is Perl's, which has U+180E, too.
static const char white_space[] = "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";

static size_t append(char *out, size_t n, const char *text, size_t length)
{
    if (out) memcpy(out + n, text, length);
    return n + length;
}

// What does not count in a class of classes: brackets of a class within, which is one with the outer, as Oniguruma has it, where
// PCRE2 would take them for themselves. A class within that is negated is left for PCRE2 to refuse.
static bool is_inner_bracket(const char *pattern, size_t length, size_t i, int *depth)
{
    if (pattern[i] == '[' && i + 1 < length && pattern[i + 1] != ':' && pattern[i + 1] != '^') return ++*depth > 0;
    if (pattern[i] == ']' && *depth > 0) return (*depth)-- > 0;
    return false;
}

// The pattern with \s and \S written out and classes of classes as one, into `out` if it is there. Returns its length.
static size_t write_out(const char *pattern, size_t length, char *out)
{
    size_t n = 0;
    bool in_class = false;
    int depth = 0; // of classes within the class
    for (size_t i = 0; i < length; i++) {
        bool escape = pattern[i] == '\\' && i + 1 < length;
        char next = escape ? pattern[i + 1] : 0;
        if (in_class && !escape && is_inner_bracket(pattern, length, i, &depth)) continue;
        if (escape && (next == 's' || (next == 'S' && !in_class))) {
            if (!in_class) n = append(out, n, next == 's' ? "[" : "[^", next == 's' ? 1 : 2);
            n = append(out, n, white_space, sizeof white_space - 1);
            if (!in_class) n = append(out, n, "]", 1);
        } else {
            n = append(out, n, pattern + i, escape ? 2 : 1);
        }
        if (!escape && pattern[i] == '[' && !in_class) {
            in_class = true; // a bracket that comes first is itself
            if (i + 1 < length && pattern[i + 1] == '^') n = append(out, n, pattern + ++i, 1);
            if (i + 1 < length && pattern[i + 1] == ']') n = append(out, n, pattern + ++i, 1);
        } else if (!escape && pattern[i] == ']') {
            in_class = false;
        }
        i += escape;
    }
    return n;
}

static struct regex *compile(const char *pattern, size_t length, uint32_t options, char *error, size_t error_size)
{
    int code;
    PCRE2_SIZE offset;
    PCRE2_UCHAR message[120] = "out of memory";
    struct regex *r = calloc(1, sizeof *r);
    if (r) r->code = pcre2_compile((PCRE2_SPTR)pattern, length, options | PCRE2_UTF | PCRE2_NO_UTF_CHECK, &code, &offset, NULL);
    if (r && !r->code) pcre2_get_error_message(code, message, sizeof message);
    if (!r || !r->code) {
        snprintf(error, error_size, "regular expression \"%.*s\": %s", length < 80 ? (int)length : 80, pattern, (char *)message);
        free(r);
        return NULL;
    }
    pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE); // without it, it is slower
    return r;
}

struct regex *regex_create(const char *pattern, size_t length, char *error, size_t error_size)
{
    size_t n = write_out(pattern, length, NULL);
    char *text = malloc(n + 1);
    if (!text) {
        snprintf(error, error_size, "out of memory");
        return NULL;
    }
    write_out(pattern, length, text);
    struct regex *r = compile(text, n, PCRE2_UCP, error, error_size);
    free(text);
    return r;
}

struct regex *regex_create_literal(const char *text, size_t length, char *error, size_t error_size)
{
    return compile(text, length, PCRE2_LITERAL, error, error_size);
}

struct regex *regex_of_pattern(const cJSON *pattern, char *error, size_t error_size)
{
    const char *regex = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(pattern, "Regex"));
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(pattern, "String"));
    if (regex) return regex_create(regex, strlen(regex), error, error_size);
    if (text) return regex_create_literal(text, strlen(text), error, error_size);
    fail(error, error_size, "a pattern without \"Regex\" or \"String\"");
    return NULL;
}

void regex_destroy(struct regex *r)
{
    if (!r) return;
    pcre2_code_free(r->code);
    free(r);
}

struct regex_match *regex_match_create(const struct regex *r)
{
    return (struct regex_match *)pcre2_match_data_create_from_pattern(r->code, NULL);
}

void regex_match_destroy(struct regex_match *m)
{
    pcre2_match_data_free((pcre2_match_data *)m);
}

int regex_next(const struct regex *r, struct regex_match *m, const char *text, size_t length, size_t from, size_t *begin,
               size_t *end, char *error, size_t error_size)
{
    pcre2_match_data *data = (pcre2_match_data *)m;
    int rc = pcre2_match(r->code, (PCRE2_SPTR)text, length, from, PCRE2_NO_UTF_CHECK, data, NULL);
    if (rc == PCRE2_ERROR_NOMATCH) return 0;
    if (rc < 0) {
        PCRE2_UCHAR message[120] = "";
        pcre2_get_error_message(rc, message, sizeof message);
        snprintf(error, error_size, "splitting the text at byte %zu: %s", from, (char *)message);
        return -1;
    }
    const PCRE2_SIZE *at = pcre2_get_ovector_pointer(data);
    *begin = at[0], *end = at[1];
    return 1;
}
