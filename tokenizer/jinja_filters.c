/* Filters of strings and numbers, and the table of all filters. */
#include "tokenizer/jinja_strings.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILTER(name)                                                                                                    \
    static struct value name(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
#define UNUSED (void)j, (void)given, (void)all

// Markup stays markup.
static struct value like(struct value self, struct value text)
{
    text.special = self.kind == V_STRING && self.special;
    return text;
}

// ---- strings ----

FILTER(filter_upper)
{
    UNUSED;
    return like(self, jinja_recase(j, jinja_text(j, self), CASE_UPPER, CASE_UPPER));
}

FILTER(filter_lower)
{
    UNUSED;
    return like(self, jinja_recase(j, jinja_text(j, self), CASE_LOWER, CASE_LOWER));
}

FILTER(filter_capitalize)
{
    UNUSED;
    return like(self, jinja_recase(j, jinja_text(j, self), CASE_TITLE, CASE_LOWER));
}

// Words begin behind one of -({[< or a space; the first characters go through upper().
FILTER(filter_title)
{
    UNUSED;
    const struct string *s = jinja_text(j, self);
    struct builder b = {.j = j};
    bool start = true;
    uint32_t to[3];
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        bool separates = jinja_is_space(c) || (c > 0 && c < 0x80 && strchr("-({[<", (char)c));
        size_t n = jinja_convert(c, start ? CASE_UPPER : CASE_LOWER, to);
        for (size_t i = 0; i < n; i++) jinja_add_char(&b, to[i]);
        start = separates;
    }
    return jinja_built(&b);
}

FILTER(filter_trim)
{
    UNUSED;
    bool spaces = given[0].kind == V_MISSING || given[0].kind == V_NONE;
    return like(self, jinja_strip(j, jinja_text(j, self), spaces ? NULL : jinja_string_argument(j, given[0]), true, true));
}

FILTER(filter_replace)
{
    UNUSED;
    const struct string *from = jinja_text(j, given[0]), *to = jinja_text(j, given[1]);
    return jinja_replace(j, jinja_text(j, self), from, to, jinja_int_argument(j, given[2], -1));
}

FILTER(filter_string)
{
    UNUSED;
    return jinja_to_string(j, self);
}

FILTER(filter_safe)
{
    UNUSED;
    struct value text = jinja_to_string(j, self);
    text.special = true;
    return text;
}

FILTER(filter_escape)
{
    UNUSED;
    static const char from[] = "&<>'\"", *const to[] = {"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"};
    if (self.kind == V_STRING && self.special) return self;
    const struct string *s = jinja_text(j, self);
    struct builder b = {.j = j};
    for (size_t i = 0; i < s->length; i++) {
        const char *found = memchr(from, s->data[i], sizeof from - 1);
        if (found) jinja_add_c(&b, to[found - from]);
        else jinja_add(&b, s->data + i, 1);
    }
    struct value text = jinja_built(&b);
    text.special = true;
    return text;
}

FILTER(filter_indent)
{
    UNUSED;
    const struct string *s = jinja_string_argument(j, self);
    struct builder indent = {.j = j}, b = {.j = j}, whole = {.j = j};
    if (given[0].kind == V_STRING) jinja_add(&indent, given[0].string->data, given[0].string->length);
    else if (given[0].kind == V_NONE) jinja_fail(j, "indent needs a width");
    else jinja_add_repeated(&indent, " ", 1, jinja_int_argument(j, given[0], 4));
    bool first = jinja_is_true(given[1]), blank = jinja_is_true(given[2]);
    jinja_add(&whole, s->data, s->length);
    jinja_add_c(&whole, "\n");
    struct list *lines = jinja_split_lines(j, jinja_built(&whole).string, false);
    for (size_t i = 0; i < lines->n; i++) {
        const struct string *line = lines->items[i].string;
        if (i > 0) jinja_add_c(&b, "\n");
        if (i == 0 ? first : blank || line->length > 0) jinja_add(&b, indent.data, indent.length);
        jinja_add(&b, line->data, line->length);
    }
    return like(self, jinja_built(&b));
}

FILTER(filter_wordcount)
{
    UNUSED;
    const struct string *s = jinja_text(j, self);
    int64_t n = 0;
    bool inside = false;
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        bool word = c == '_' || jinja_is_alnum(c);
        n += word && !inside;
        inside = word;
    }
    return jinja_int(n);
}

FILTER(filter_format)
{
    (void)given;
    const struct string *format = jinja_text(j, self);
    if (all->n > 0 && all->n_named > 0) jinja_fail(j, "format takes positional or keyword arguments, not both");
    if (all->n_named == 0) {
        struct list *values = jinja_list_new(j, all->n);
        for (size_t i = 0; i < all->n; i++) jinja_append(j, values, all->values[i]);
        return jinja_percent(j, format, jinja_tuple(values));
    }
    struct dict *d = jinja_dict_new(j);
    for (size_t i = 0; i < all->n_named; i++)
        jinja_dict_set(j, d, (struct value){.kind = V_STRING, .string = all->names[i]}, all->named[i]);
    return jinja_percent(j, format, (struct value){.kind = V_DICT, .dict = d});
}

// ---- numbers ----

static bool double_to_int(double f, int64_t *i)
{
    if (!(f > -9223372036854775808.0 && f < 9223372036854775808.0)) return false;
    *i = (int64_t)f;
    return true;
}

FILTER(filter_int)
{
    UNUSED;
    int64_t i, base = jinja_int_argument(j, given[1], 10);
    double f;
    struct value otherwise = given[0].kind == V_MISSING ? jinja_int(0) : given[0];
    if (jinja_as_int(self, &i)) return jinja_int(i);
    if (self.kind == V_UNDEFINED) jinja_fail_undefined(j, self);
    if (self.kind == V_FLOAT) {
        if (isnan(self.f)) return otherwise;
        if (!double_to_int(self.f, &i)) jinja_fail(j, "cannot convert this float to an integer of 64 bits");
        return jinja_int(i);
    }
    if (self.kind != V_STRING) return otherwise;
    bool base_ok = base == 0 || (base >= 2 && base <= 36);
    if (base_ok && jinja_parse_int(self.string, base, &i)) return jinja_int(i);
    if (!jinja_parse_float(j, self.string, &f) || isnan(f) || isinf(f)) return otherwise;
    if (!double_to_int(f, &i)) jinja_fail(j, "integer overflow: more than 64 bits");
    return jinja_int(i);
}

FILTER(filter_float)
{
    UNUSED;
    double f;
    if (jinja_is_number(self)) return jinja_float(jinja_as_double(self));
    if (self.kind == V_UNDEFINED) jinja_fail_undefined(j, self);
    if (self.kind == V_STRING && jinja_parse_float(j, self.string, &f)) return jinja_float(f);
    return given[0].kind == V_MISSING ? jinja_float(0) : given[0];
}

FILTER(filter_abs)
{
    UNUSED;
    int64_t i;
    if (self.kind == V_FLOAT) return jinja_float(fabs(self.f));
    if (jinja_as_int(self, &i)) return i < 0 ? jinja_negate(j, self) : jinja_int(i);
    jinja_fail(j, "bad operand type for abs(): '%s'", jinja_type(self));
}

// To the nearest, halves to even, exactly: printf does it in decimal.
static double round_float(double f, int64_t digits)
{
    char text[400];
    if (!isfinite(f) || digits > 300) return f;
    if (digits < -308) return copysign(0, f);
    if (digits >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)(digits > 80 ? 80 : digits), f);
        return digits > 80 ? f : strtod(text, NULL);
    }
    double power = pow(10, (double)-digits);
    return nearbyint(f / power) * power;
}

static struct value round_int(struct jinja *j, int64_t i, int64_t digits)
{
    int64_t power = 1;
    if (digits >= 0) return jinja_int(i);
    for (; digits < 0; digits++) {
        if (__builtin_mul_overflow(power, 10, &power)) return jinja_int(0);
    }
    int64_t rest = i % power, down = i - rest, half = power / 2;
    if (rest < 0) {
        rest += power;
        if (__builtin_sub_overflow(down, power, &down)) jinja_fail(j, "integer overflow: more than 64 bits");
    }
    bool up = rest > half || (rest == half && (down / power) % 2 != 0);
    if (up && __builtin_add_overflow(down, power, &down)) jinja_fail(j, "integer overflow: more than 64 bits");
    return jinja_int(down);
}

FILTER(filter_round)
{
    UNUSED;
    int64_t i, digits = jinja_int_argument(j, given[0], 0);
    const struct string *method = given[1].kind == V_MISSING ? NULL : jinja_string_argument(j, given[1]);
    bool ceils = method && jinja_is_c(method, "ceil"), floors = method && jinja_is_c(method, "floor");
    if (method && !ceils && !floors && !jinja_is_c(method, "common")) jinja_fail(j, "method must be common, ceil or floor");
    if (!jinja_is_number(self)) jinja_fail(j, "type %s cannot be rounded", jinja_type(self));
    if (ceils || floors) {
        double power = pow(10, (double)digits), f = jinja_as_double(self) * power;
        if (!isfinite(f)) jinja_fail(j, "cannot round a float that is not finite");
        return jinja_float((ceils ? ceil(f) : floor(f)) / power + 0.0);
    }
    if (given[0].kind == V_NONE) digits = 0;
    if (jinja_as_int(self, &i)) return round_int(j, i, digits);
    if (given[0].kind == V_NONE) {
        if (!double_to_int(nearbyint(self.f), &i)) jinja_fail(j, "cannot convert this float to an integer of 64 bits");
        return jinja_int(i);
    }
    return jinja_float(round_float(self.f, digits));
}

// ---- any ----

FILTER(filter_default)
{
    UNUSED;
    if (self.kind != V_UNDEFINED && !(jinja_is_true(given[1]) && !jinja_is_true(self))) return self;
    return given[0].kind == V_MISSING ? jinja_string(j, "", 0) : given[0];
}

FILTER(filter_length)
{
    UNUSED;
    size_t n;
    if (!jinja_has_length(self, &n)) jinja_fail(j, "object of type '%s' has no len()", jinja_type(self));
    return jinja_int((int64_t)n);
}

// Like an attribute, but items are not looked for.
FILTER(filter_attr)
{
    UNUSED;
    const struct string *name = jinja_string_argument(j, given[0]);
    if (self.kind == V_DICT && !jinja_find_method(self, name)) return jinja_no_member(j, self, given[0]);
    return jinja_attribute(j, self, name);
}

static const struct builtin filters[] = {
    {"abs", filter_abs, "", 0, false},
    {"attr", filter_attr, "name", 1, false},
    {"capitalize", filter_capitalize, "", 0, false},
    {"count", filter_length, "", 0, false},
    {"d", filter_default, "default_value boolean", 0, false},
    {"default", filter_default, "default_value boolean", 0, false},
    {"e", filter_escape, "", 0, false},
    {"escape", filter_escape, "", 0, false},
    {"float", filter_float, "default", 0, false},
    {"format", filter_format, "*", 0, false},
    {"indent", filter_indent, "width first blank", 0, false},
    {"int", filter_int, "default base", 0, false},
    {"length", filter_length, "", 0, false},
    {"lower", filter_lower, "", 0, false},
    {"replace", filter_replace, "old new count", 2, false},
    {"round", filter_round, "precision method", 0, false},
    {"safe", filter_safe, "", 0, false},
    {"string", filter_string, "", 0, false},
    {"title", filter_title, "", 0, false},
    {"tojson", jinja_filter_tojson, "ensure_ascii indent separators sort_keys", 0, false},
    {"trim", filter_trim, "chars", 0, false},
    {"upper", filter_upper, "", 0, false},
    {"wordcount", filter_wordcount, "", 0, false},
    {0},
};

const struct builtin *jinja_find_filter(const struct string *name)
{
    const struct builtin *const tables[] = {filters, jinja_list_filters, jinja_select_filters};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        for (const struct builtin *b = tables[i]; b->name; b++) {
            if (jinja_is_c(name, b->name)) return b;
        }
    }
    return NULL;
}
