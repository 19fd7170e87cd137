/* Jinja2's lexer, with trim_blocks and lstrip_blocks on and the usual delimiters. */
#include "tokenizer/detokenizer.h"
#include "tokenizer/jinja_internal.h"

#include <stdlib.h>
#include <string.h>

struct lexer {
    struct jinja *j;
    const char *source; // [length], newlines normalized
    size_t length, at;
    int32_t line;
    struct token *tokens; // [capacity]
    size_t n, capacity;
    bool line_starting;   // the last tag swallowed its line break
    char *open;           // [open_capacity] closing brackets that are due, innermost last
    size_t n_open, open_capacity;
};

static bool looking_at(const struct lexer *l, size_t at, const char *text)
{
    size_t n = strlen(text);
    return n <= l->length - at && memcmp(l->source + at, text, n) == 0;
}

static size_t skip_spaces(const struct lexer *l, size_t at)
{
    for (size_t size; at < l->length; at += size) {
        if (!jinja_is_space(jinja_decode(l->source + at, l->length - at, &size))) break;
    }
    return at;
}

static struct token *push(struct lexer *l, int32_t kind)
{
    if (l->n == l->capacity) {
        size_t capacity = l->capacity ? l->capacity * 2 : 64;
        struct token *tokens = jinja_alloc_array(l->j, capacity, sizeof *tokens);
        if (l->n > 0) memcpy(tokens, l->tokens, l->n * sizeof *tokens);
        l->tokens = tokens;
        l->capacity = capacity;
    }
    l->tokens[l->n] = (struct token){kind, l->line, jinja_none()};
    return &l->tokens[l->n++];
}

static void advance(struct lexer *l, size_t to)
{
    for (; l->at < to; l->at++) l->line += l->source[l->at] == '\n';
    l->j->line = l->line;
}

// ---- text ----

// Where the text from .. to ends once the tag behind it has had its way with the spaces before it.
static size_t stripped_end(const struct lexer *l, size_t from, size_t to, char sign, bool is_print)
{
    size_t start = from;
    if (sign == '-') {
        size_t last = from;
        for (size_t at = from, size; at < to; at += size) {
            if (!jinja_is_space(jinja_decode(l->source + at, to - at, &size))) last = at + size;
        }
        return last;
    }
    if (sign == '+' || is_print) return to;
    for (size_t at = from; at < to; at++) {
        if (l->source[at] == '\n') start = at + 1;
    }
    if (start == from && !l->line_starting) return to;
    return skip_spaces(l, start) >= to ? start : to;
}

static void push_text(struct lexer *l, size_t end)
{
    if (end > l->at) push(l, T_TEXT)->value = jinja_string(l->j, l->source + l->at, end - l->at);
}

static char sign_at(const struct lexer *l, size_t at)
{
    return at < l->length && (l->source[at] == '-' || l->source[at] == '+') ? l->source[at] : 0;
}

// Past the end tag of a block or comment, whose mark is close and stands at `at`, with its sign before it.
static size_t after_close(const struct lexer *l, size_t at, char sign)
{
    if (sign == '-') return skip_spaces(l, at + 2);
    return at + 2 + (!sign && at + 2 < l->length && l->source[at + 2] == '\n');
}

static void lex_comment(struct lexer *l)
{
    if (l->at >= l->length) return; // as Jinja2 has it: nothing is missing where nothing follows
    for (size_t at = l->at; at + 1 < l->length; at++) {
        char sign = sign_at(l, at);
        if (!looking_at(l, at + (sign != 0), "#}")) continue;
        size_t end = after_close(l, at + (sign != 0), sign);
        l->line_starting = l->source[end - 1] == '\n';
        advance(l, end);
        return;
    }
    jinja_fail(l->j, "Missing end of comment tag");
}

// The end of "raw -%}" or "raw %}", after "{%" and its sign; 0: this is no raw tag.
static size_t raw_begin(const struct lexer *l, size_t at)
{
    at = skip_spaces(l, at);
    if (!looking_at(l, at, "raw")) return 0;
    at = skip_spaces(l, at + 3);
    if (looking_at(l, at, "-%}")) return skip_spaces(l, at + 3);
    return looking_at(l, at, "%}") ? at + 2 : 0;
}

static size_t raw_end(const struct lexer *l, size_t at)
{
    at = skip_spaces(l, at);
    if (!looking_at(l, at, "endraw")) return 0;
    at = skip_spaces(l, at + 6);
    char sign = at < l->length ? sign_at(l, at) : 0;
    return looking_at(l, at + (sign != 0), "%}") ? after_close(l, at + (sign != 0), sign) : 0;
}

static void lex_raw(struct lexer *l)
{
    if (l->at >= l->length) return;
    for (size_t at = l->at; at + 1 < l->length; at++) {
        if (!looking_at(l, at, "{%")) continue;
        char sign = sign_at(l, at + 2);
        size_t end = raw_end(l, at + 2 + (sign != 0));
        if (!end) continue;
        push_text(l, stripped_end(l, l->at, at, sign, false));
        l->line_starting = l->source[end - 1] == '\n';
        advance(l, end);
        return;
    }
    jinja_fail(l->j, "Missing end of raw directive");
}

// ---- inside tags ----

static bool is_digit(const struct lexer *l, size_t at)
{
    return at < l->length && l->source[at] >= '0' && l->source[at] <= '9';
}

// Digits that single underscores may separate. Returns where they end, or at itself.
static size_t skip_digits(const struct lexer *l, size_t at)
{
    while (is_digit(l, at) || (at > 0 && at < l->length && l->source[at] == '_' && is_digit(l, at - 1) && is_digit(l, at + 1)))
        at++;
    return at;
}

static size_t float_end(const struct lexer *l)
{
    size_t whole = skip_digits(l, l->at), at = whole;
    if (whole == l->at || (l->at > 0 && l->source[l->at - 1] == '.')) return 0;
    if (at < l->length && l->source[at] == '.' && is_digit(l, at + 1)) at = skip_digits(l, at + 1);
    if (at < l->length && (l->source[at] | 32) == 'e') {
        size_t exponent = at + 1 + (sign_at(l, at + 1) != 0);
        if (is_digit(l, exponent)) at = skip_digits(l, exponent);
    }
    return at > whole ? at : 0;
}

// Without underscores, NUL-terminated.
static char *number_text(struct lexer *l, size_t end)
{
    char *text = jinja_alloc(l->j, end - l->at + 1), *to = text;
    for (size_t at = l->at; at < end; at++) {
        if (l->source[at] != '_') *to++ = l->source[at];
    }
    return text;
}

static int digit_value(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
}

static int64_t parse_digits(struct lexer *l, const char *text, int base)
{
    int64_t n = 0;
    for (; *text; text++) {
        if (__builtin_mul_overflow(n, base, &n) || __builtin_add_overflow(n, digit_value(*text), &n))
            jinja_fail(l->j, "an integer beyond 64 bits");
    }
    return n;
}

static void lex_int(struct lexer *l)
{
    char letter = l->at + 1 < l->length ? (char)(l->source[l->at + 1] | 32) : 0;
    int base = l->source[l->at] != '0' ? 10 : letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 10;
    size_t end = l->at + (base != 10 ? 2 : 0), from = end;
    while (end < l->length) {
        size_t digit = end + (l->source[end] == '_' && (end > from || base != 10));
        if (digit >= l->length || digit_value(l->source[digit]) >= base) break;
        if (base == 10 && l->source[l->at] == '0' && l->source[digit] != '0') break; // 0 and 00, but not 01
        end = digit + 1;
    }
    if (end == from) { // "0x" is 0 and then a name
        base = 10;
        end = l->at + 1;
    }
    char *text = number_text(l, end);
    push(l, T_INT)->value = jinja_int(parse_digits(l, text + (base != 10 ? 2 : 0), base));
    l->at = end;
}

static void lex_number(struct lexer *l)
{
    size_t end = float_end(l);
    if (!end) {
        lex_int(l);
        return;
    }
    char *text = number_text(l, end);
    push(l, T_FLOAT)->value = jinja_float(strtod(text, NULL));
    l->at = end;
}

// The character of \x, \u or \U with so many hexadecimal digits.
static uint32_t hex_escape(struct lexer *l, size_t at, size_t end, int n_digits)
{
    uint32_t c = 0;
    for (int i = 0; i < n_digits; i++, at++) {
        if (at >= end || digit_value(l->source[at]) > 15) jinja_fail(l->j, "truncated escape in a string");
        c = c << 4 | (uint32_t)digit_value(l->source[at]);
    }
    if (c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) jinja_fail(l->j, "an escape in a string is no character");
    return c;
}

// One escape at the backslash. Returns where it ends.
static size_t unescape(struct lexer *l, struct builder *b, size_t at, size_t end)
{
    static const char from[] = "\\'\"abfnrtv", to[] = "\\'\"\a\b\f\n\r\t\v";
    char c = l->source[at + 1];
    const char *simple = memchr(from, c, sizeof from - 1);
    int n_digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (simple) {
        jinja_add_char(b, (unsigned char)to[simple - from]);
    } else if (n_digits) {
        jinja_add_char(b, hex_escape(l, at + 2, end, n_digits));
    } else if (c >= '0' && c <= '7') {
        uint32_t octal = 0;
        size_t digit = at + 1;
        for (; digit < end && digit < at + 4 && l->source[digit] >= '0' && l->source[digit] <= '7'; digit++)
            octal = octal * 8 + (uint32_t)(l->source[digit] - '0');
        jinja_add_char(b, octal);
        return digit;
    } else if (c == 'N') {
        jinja_fail(l->j, "\\N in a string is not supported");
    } else if (c != '\n') {
        jinja_add(b, l->source + at, 1);
        return at + 1;
    }
    return at + 2 + (size_t)n_digits;
}

static void lex_string(struct lexer *l)
{
    char quote = l->source[l->at];
    size_t end = l->at + 1;
    while (end < l->length && l->source[end] != quote) end += l->source[end] == '\\' ? 2 : 1;
    if (end >= l->length) jinja_fail(l->j, "a string without its end");
    struct builder b = {.j = l->j};
    for (size_t at = l->at + 1; at < end;) {
        const char *backslash = memchr(l->source + at, '\\', end - at);
        size_t plain = backslash ? (size_t)(backslash - l->source) : end;
        jinja_add(&b, l->source + at, plain - at);
        at = backslash ? unescape(l, &b, plain, end) : end;
    }
    struct value text = jinja_built(&b);
    push(l, T_STRING)->value = text;
    advance(l, end + 1);
}

static void lex_name(struct lexer *l)
{
    size_t end = l->at;
    for (size_t size; end < l->length; end += size) {
        uint32_t c = jinja_decode(l->source + end, l->length - end, &size);
        if (c != '_' && !jinja_is_alnum(c)) break;
    }
    if (end == l->at) {
        size_t size;
        jinja_decode(l->source + end, l->length - end, &size);
        jinja_fail(l->j, "unexpected character '%.*s'", (int)size, l->source + end);
    }
    struct value name = jinja_string(l->j, l->source + l->at, end - l->at);
    push(l, T_NAME)->value = name;
    l->at = end;
}

static void balance(struct lexer *l, char c)
{
    char closing = c == '(' ? ')' : c == '[' ? ']' : c == '{' ? '}' : 0;
    if (closing) {
        if (l->n_open == l->open_capacity) {
            char *open = jinja_alloc(l->j, l->open_capacity * 2 + 64);
            if (l->n_open > 0) memcpy(open, l->open, l->n_open);
            l->open = open;
            l->open_capacity = l->open_capacity * 2 + 64;
        }
        l->open[l->n_open++] = closing;
    } else if (c == ')' || c == ']' || c == '}') {
        if (l->n_open == 0) jinja_fail(l->j, "unexpected '%c'", c);
        if (l->open[--l->n_open] != c) jinja_fail(l->j, "unexpected '%c', expected '%c'", c, l->open[l->n_open]);
    }
}

static bool lex_operator(struct lexer *l)
{
    static const char *const pairs[] = {"//", "**", "==", "!=", ">=", "<="};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        if (!looking_at(l, l->at, pairs[i])) continue;
        push(l, pairs[i][0] | pairs[i][1] << 8);
        l->at += 2;
        return true;
    }
    char c = l->source[l->at];
    if (!c || !strchr("+-/*%~[](){}><=.:|,;", c)) return false;
    balance(l, c);
    push(l, c);
    l->at++;
    return true;
}

// The end of the tag, if it stands here: 0 if it does not.
static size_t tag_end(const struct lexer *l, bool is_print)
{
    if (l->n_open > 0) return 0;
    if (is_print) return looking_at(l, l->at, "-}}") ? skip_spaces(l, l->at + 3) : looking_at(l, l->at, "}}") ? l->at + 2 : 0;
    char sign = sign_at(l, l->at);
    return looking_at(l, l->at + (sign != 0), "%}") ? after_close(l, l->at + (sign != 0), sign) : 0;
}

static void lex_tag(struct lexer *l, bool is_print)
{
    push(l, is_print ? T_PRINT_BEGIN : T_BLOCK_BEGIN);
    while (true) {
        advance(l, skip_spaces(l, l->at));
        size_t end = l->at < l->length ? tag_end(l, is_print) : 0;
        if (end) {
            push(l, is_print ? T_PRINT_END : T_BLOCK_END);
            l->line_starting = l->source[end - 1] == '\n';
            advance(l, end);
            return;
        }
        if (l->at >= l->length) jinja_fail(l->j, "a tag without its end");
        char c = l->source[l->at];
        if (c >= '0' && c <= '9') lex_number(l);
        else if (c == '"' || c == '\'') lex_string(l);
        else if (!lex_operator(l)) lex_name(l);
    }
}

// ---- the whole ----

// Makes every line break a \n and drops one at the end.
static const char *normalize(struct jinja *j, const char *source, size_t *length)
{
    char *text = jinja_alloc(j, *length + 1);
    size_t n = 0;
    for (size_t i = 0; i < *length; i++) {
        if (source[i] == '\r' && i + 1 < *length && source[i + 1] == '\n') continue;
        text[n++] = source[i] == '\r' ? '\n' : source[i];
    }
    *length = n - (n > 0 && text[n - 1] == '\n');
    return text;
}

// The tag at `at`, which is a "{" and one of "{%#".
static void lex_from(struct lexer *l, size_t at)
{
    char kind = l->source[at + 1], sign = sign_at(l, at + 2);
    size_t inside = at + 2 + (sign != 0), raw = kind == '%' ? raw_begin(l, inside) : 0;
    push_text(l, stripped_end(l, l->at, at, sign, kind == '{'));
    advance(l, raw ? raw : inside);
    l->line_starting = l->source[l->at - 1] == '\n';
    l->j->line = l->line;
    if (raw) lex_raw(l);
    else if (kind == '#') lex_comment(l);
    else lex_tag(l, kind == '{');
}

struct token *jinja_tokenize(struct jinja *j, const char *source, size_t length)
{
    if (!utf8_valid(source, length)) jinja_fail(j, "the template is not UTF-8");
    struct lexer l = {.j = j, .line = 1, .line_starting = true};
    l.source = normalize(j, source, &length);
    l.length = length;
    while (l.at < length) {
        size_t at = l.at;
        while (at + 1 < length && (l.source[at] != '{' || !strchr("{%#", l.source[at + 1] ? l.source[at + 1] : ' '))) at++;
        if (at + 1 >= length) {
            push_text(&l, length);
            advance(&l, length);
        } else {
            lex_from(&l, at);
        }
    }
    push(&l, T_END);
    return l.tokens;
}
