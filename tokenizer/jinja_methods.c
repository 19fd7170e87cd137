/* Methods of strings, lists, dictionaries and cyclers. */
#include "tokenizer/jinja_strings.h"

#include <string.h>

#define METHOD(name)                                                                                                    \
    static struct value name(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
#define UNUSED (void)j, (void)given, (void)all

static bool is_given(struct value v)
{
    return v.kind != V_MISSING && v.kind != V_NONE;
}

static const struct string *optional(struct jinja *j, struct value v)
{
    return is_given(v) ? jinja_string_argument(j, v) : NULL;
}

static struct value like(struct value self, struct value text)
{
    text.special = self.special;
    return text;
}

static struct value all_like(struct value self, struct list *parts)
{
    for (size_t i = 0; i < parts->n; i++) parts->items[i].special = self.special;
    return jinja_list(parts);
}

// ---- str ----

METHOD(str_strip)
{
    UNUSED;
    return like(self, jinja_strip(j, self.string, optional(j, given[0]), true, true));
}

METHOD(str_lstrip)
{
    UNUSED;
    return like(self, jinja_strip(j, self.string, optional(j, given[0]), true, false));
}

METHOD(str_rstrip)
{
    UNUSED;
    return like(self, jinja_strip(j, self.string, optional(j, given[0]), false, true));
}

static int64_t number(struct jinja *j, struct value v, int64_t otherwise)
{
    if (v.kind == V_NONE) jinja_fail(j, "'NoneType' object cannot be interpreted as an integer");
    return jinja_int_argument(j, v, otherwise);
}

METHOD(str_split)
{
    UNUSED;
    return all_like(self, jinja_split(j, self.string, optional(j, given[0]), number(j, given[1], -1), false));
}

METHOD(str_rsplit)
{
    UNUSED;
    return all_like(self, jinja_split(j, self.string, optional(j, given[0]), number(j, given[1], -1), true));
}

METHOD(str_splitlines)
{
    UNUSED;
    if (given[0].kind == V_UNDEFINED) jinja_fail_undefined(j, given[0]);
    return all_like(self, jinja_split_lines(j, self.string, jinja_is_true(given[0])));
}

// The part of s from the given start to the given end, which count characters as slices do. false: start is behind the end.
static bool part(struct jinja *j, const struct string *s, struct value start, struct value end, struct string *out, int64_t *from)
{
    int64_t n = (int64_t)s->n_chars, a = jinja_int_argument(j, start, 0), b = jinja_int_argument(j, end, n);
    if (a < 0) a = a + n < 0 ? 0 : a + n;
    if (b < 0) b = b + n < 0 ? 0 : b + n;
    if (b > n) b = n;
    if (a > b) return false;
    size_t skipped = jinja_skip_chars(s->data, s->length, (size_t)a);
    size_t length = jinja_skip_chars(s->data + skipped, s->length - skipped, (size_t)(b - a));
    *out = (struct string){.data = s->data + skipped, .length = length, .n_chars = (size_t)(b - a)};
    *from = a;
    return true;
}

static bool begins_or_ends(const struct string *s, const struct string *with, bool begins)
{
    if (with->length > s->length) return false;
    return with->length == 0 || memcmp(begins ? s->data : s->data + s->length - with->length, with->data, with->length) == 0;
}

static struct value affix(struct jinja *j, struct value self, const struct value *given, bool begins)
{
    struct string s;
    int64_t from;
    bool result = false, inside = part(j, self.string, given[1], given[2], &s, &from);
    if (given[0].kind == V_TUPLE) {
        for (size_t i = 0; i < given[0].list->n && !result; i++) {
            const struct string *with = jinja_string_argument(j, given[0].list->items[i]);
            result = inside && begins_or_ends(&s, with, begins);
        }
    } else {
        const struct string *with = jinja_string_argument(j, given[0]);
        result = inside && begins_or_ends(&s, with, begins);
    }
    return jinja_bool(result);
}

METHOD(str_startswith)
{
    UNUSED;
    return affix(j, self, given, true);
}

METHOD(str_endswith)
{
    UNUSED;
    return affix(j, self, given, false);
}

METHOD(str_upper)
{
    UNUSED;
    return like(self, jinja_recase(j, self.string, CASE_UPPER, CASE_UPPER));
}

METHOD(str_lower)
{
    UNUSED;
    return like(self, jinja_recase(j, self.string, CASE_LOWER, CASE_LOWER));
}

METHOD(str_capitalize)
{
    UNUSED;
    return like(self, jinja_recase(j, self.string, CASE_TITLE, CASE_LOWER));
}

// Words begin behind whatever has no case.
METHOD(str_title)
{
    UNUSED;
    const struct string *s = self.string;
    struct builder b = {.j = j};
    bool inside = false;
    uint32_t to[3];
    for (size_t at = 0, size; at < s->length; at += size) {
        uint32_t c = jinja_decode(s->data + at, s->length - at, &size);
        size_t n = jinja_convert(c, inside ? CASE_LOWER : CASE_TITLE, to);
        for (size_t i = 0; i < n; i++) jinja_add_char(&b, to[i]);
        uint32_t other[3];
        jinja_convert(c, CASE_UPPER, other);
        inside = jinja_is_lower(c) || jinja_is_upper(c) || other[0] != c;
    }
    return like(self, jinja_built(&b));
}

METHOD(str_replace)
{
    UNUSED;
    const struct string *from = jinja_string_argument(j, given[0]), *to = jinja_string_argument(j, given[1]);
    return like(self, jinja_replace(j, self.string, from, to, number(j, given[2], -1)));
}

static int64_t find(struct jinja *j, struct value self, const struct value *given)
{
    struct string s;
    int64_t from;
    const struct string *wanted = jinja_string_argument(j, given[0]);
    if (!part(j, self.string, given[1], given[2], &s, &from)) return -1;
    jinja_charge(j, (int64_t)(s.length / 256));
    if (wanted->length == 0) return from;
    const char *found = s.length > 0 ? memmem(s.data, s.length, wanted->data, wanted->length) : NULL;
    return found ? from + (int64_t)jinja_count_chars(s.data, (size_t)(found - s.data)) : -1;
}

METHOD(str_find)
{
    UNUSED;
    return jinja_int(find(j, self, given));
}

METHOD(str_index)
{
    UNUSED;
    int64_t at = find(j, self, given);
    if (at < 0) jinja_fail(j, "substring not found");
    return jinja_int(at);
}

METHOD(str_rfind)
{
    UNUSED;
    struct string s;
    int64_t from;
    const struct string *wanted = jinja_string_argument(j, given[0]);
    if (!part(j, self.string, given[1], given[2], &s, &from)) return jinja_int(-1);
    jinja_charge(j, (int64_t)(s.length / 16));
    for (size_t at = s.length + 1; at-- > 0;) {
        if (wanted->length > s.length - at) continue;
        if (wanted->length > 0 && memcmp(s.data + at, wanted->data, wanted->length) != 0) continue;
        return jinja_int(from + (int64_t)jinja_count_chars(s.data, at));
    }
    return jinja_int(-1);
}

METHOD(str_count)
{
    UNUSED;
    struct string s;
    int64_t from, n = 0;
    const struct string *wanted = jinja_string_argument(j, given[0]);
    if (!part(j, self.string, given[1], given[2], &s, &from)) return jinja_int(0);
    jinja_charge(j, (int64_t)(s.length / 64));
    if (wanted->length == 0) return jinja_int((int64_t)s.n_chars + 1);
    const char *end = s.data + s.length;
    for (const char *at = s.data; at < end; n++) {
        at = memmem(at, (size_t)(end - at), wanted->data, wanted->length);
        if (!at) break;
        at += wanted->length;
    }
    return jinja_int(n);
}

METHOD(str_join)
{
    UNUSED;
    struct list *items = jinja_items(j, given[0]);
    for (size_t i = 0; i < items->n; i++) {
        if (items->items[i].kind != V_STRING)
            jinja_fail(j, "sequence item %zu: expected str instance, %s found", i, jinja_type(items->items[i]));
    }
    return like(self, jinja_join(j, self.string, items));
}

static struct value every(const struct string *s, bool belongs(uint32_t c))
{
    for (size_t at = 0, size; at < s->length; at += size) {
        if (!belongs(jinja_decode(s->data + at, s->length - at, &size))) return jinja_bool(false);
    }
    return jinja_bool(s->length > 0);
}

METHOD(str_isdigit)
{
    UNUSED;
    return every(self.string, jinja_is_digit);
}

METHOD(str_isalpha)
{
    UNUSED;
    return every(self.string, jinja_is_alpha);
}

METHOD(str_isalnum)
{
    UNUSED;
    return every(self.string, jinja_is_alnum);
}

METHOD(str_isspace)
{
    UNUSED;
    return every(self.string, jinja_is_space);
}

METHOD(str_islower)
{
    UNUSED;
    struct string name = {.data = "lower", .length = 5};
    return jinja_call_builtin(j, jinja_find_test(&name), self, &(struct arguments){0});
}

METHOD(str_isupper)
{
    UNUSED;
    struct string name = {.data = "upper", .length = 5};
    return jinja_call_builtin(j, jinja_find_test(&name), self, &(struct arguments){0});
}

METHOD(str_removeprefix)
{
    UNUSED;
    const struct string *s = self.string, *prefix = jinja_string_argument(j, given[0]);
    if (!begins_or_ends(s, prefix, true)) return self;
    return like(self, jinja_substring(j, s, prefix->length, s->length));
}

METHOD(str_removesuffix)
{
    UNUSED;
    const struct string *s = self.string, *suffix = jinja_string_argument(j, given[0]);
    if (!begins_or_ends(s, suffix, false)) return self;
    return like(self, jinja_substring(j, s, 0, s->length - suffix->length));
}

METHOD(str_format)
{
    (void)given;
    return jinja_format(j, self.string, all);
}

static const struct builtin string_methods[] = {
    {"strip", str_strip, ".", 0, false},
    {"lstrip", str_lstrip, ".", 0, false},
    {"rstrip", str_rstrip, ".", 0, false},
    {"split", str_split, "sep maxsplit", 0, false},
    {"rsplit", str_rsplit, "sep maxsplit", 0, false},
    {"splitlines", str_splitlines, "keepends", 0, false},
    {"startswith", str_startswith, ". . .", 1, false},
    {"endswith", str_endswith, ". . .", 1, false},
    {"upper", str_upper, "", 0, false},
    {"lower", str_lower, "", 0, false},
    {"capitalize", str_capitalize, "", 0, false},
    {"title", str_title, "", 0, false},
    {"replace", str_replace, ". . .", 2, false},
    {"find", str_find, ". . .", 1, false},
    {"rfind", str_rfind, ". . .", 1, false},
    {"index", str_index, ". . .", 1, false},
    {"count", str_count, ". . .", 1, false},
    {"join", str_join, ".", 1, false},
    {"isdigit", str_isdigit, "", 0, false},
    {"isalpha", str_isalpha, "", 0, false},
    {"isalnum", str_isalnum, "", 0, false},
    {"isspace", str_isspace, "", 0, false},
    {"islower", str_islower, "", 0, false},
    {"isupper", str_isupper, "", 0, false},
    {"removeprefix", str_removeprefix, ".", 1, false},
    {"removesuffix", str_removesuffix, ".", 1, false},
    {"format", str_format, "*", 0, false},
    // Python's, but not ours: a call says so.
    {"casefold", NULL, "*", 0, false},
    {"center", NULL, "*", 0, false},
    {"encode", NULL, "*", 0, false},
    {"expandtabs", NULL, "*", 0, false},
    {"format_map", NULL, "*", 0, false},
    {"isascii", NULL, "*", 0, false},
    {"isdecimal", NULL, "*", 0, false},
    {"isidentifier", NULL, "*", 0, false},
    {"isnumeric", NULL, "*", 0, false},
    {"isprintable", NULL, "*", 0, false},
    {"istitle", NULL, "*", 0, false},
    {"ljust", NULL, "*", 0, false},
    {"maketrans", NULL, "*", 0, false},
    {"partition", NULL, "*", 0, false},
    {"rindex", NULL, "*", 0, false},
    {"rjust", NULL, "*", 0, false},
    {"rpartition", NULL, "*", 0, false},
    {"swapcase", NULL, "*", 0, false},
    {"translate", NULL, "*", 0, false},
    {"zfill", NULL, "*", 0, false},
    {0},
};

// ---- dict ----

static struct value view_of(struct jinja *j, struct value self, enum view_of of)
{
    struct view *view = jinja_alloc(j, sizeof *view);
    *view = (struct view){self.dict, of};
    return (struct value){.kind = V_VIEW, .view = view};
}

METHOD(dict_keys)
{
    UNUSED;
    return view_of(j, self, VIEW_KEYS);
}

METHOD(dict_values)
{
    UNUSED;
    return view_of(j, self, VIEW_VALUES);
}

METHOD(dict_items)
{
    UNUSED;
    return view_of(j, self, VIEW_ITEMS);
}

METHOD(dict_get)
{
    UNUSED;
    if (!jinja_is_hashable(j, given[0])) jinja_fail(j, "unhashable type: '%s'", jinja_type(given[0]));
    struct value *found = jinja_dict_find(j, self.dict, given[0]);
    if (found) return *found;
    return given[1].kind == V_MISSING ? jinja_none() : given[1];
}

METHOD(dict_copy)
{
    UNUSED;
    struct dict *d = jinja_dict_new(j);
    for (size_t i = 0; i < self.dict->n; i++) jinja_dict_set(j, d, self.dict->keys[i], self.dict->values[i]);
    return (struct value){.kind = V_DICT, .dict = d};
}

static const struct builtin dict_methods[] = {
    {"items", dict_items, "", 0, false}, {"keys", dict_keys, "", 0, false}, {"values", dict_values, "", 0, false},
    {"get", dict_get, ". .", 1, false},  {"copy", dict_copy, "", 0, false}, {"fromkeys", NULL, "*", 0, false},
    {0},
};

// ---- list, tuple, range ----

METHOD(list_index)
{
    UNUSED;
    size_t n;
    jinja_has_length(self, &n);
    int64_t length = (int64_t)n, from = number(j, given[1], 0), to = number(j, given[2], length);
    if (from < 0) from = from + length < 0 ? 0 : from + length;
    if (to < 0) to += length;
    for (int64_t i = from; i < to && i < length; i++) {
        jinja_charge(j, 1);
        if (jinja_equal(j, jinja_item(j, self, jinja_int(i)), given[0])) return jinja_int(i);
    }
    jinja_fail(j, "the value is not in the list");
}

METHOD(list_count)
{
    UNUSED;
    int64_t n = 0;
    struct list *items = jinja_items(j, self);
    for (size_t i = 0; i < items->n; i++) n += jinja_equal(j, items->items[i], given[0]);
    return jinja_int(n);
}

METHOD(list_copy)
{
    UNUSED;
    return jinja_list(jinja_items(j, self));
}

static const struct builtin list_methods[] = {
    {"index", list_index, ". . .", 1, false}, {"count", list_count, ".", 1, false}, {"copy", list_copy, "", 0, false}, {0},
};

static const struct builtin tuple_methods[] = {{"index", list_index, ". . .", 1, false}, {"count", list_count, ".", 1, false}, {0}};

// ---- cycler ----

METHOD(cycler_next)
{
    UNUSED;
    struct cycler *c = self.cycler;
    struct value item = c->items.items[c->at];
    c->at = (c->at + 1) % c->items.n;
    return item;
}

METHOD(cycler_reset)
{
    UNUSED;
    self.cycler->at = 0;
    return jinja_none();
}

static const struct builtin cycler_methods[] = {{"next", cycler_next, "", 0, false}, {"reset", cycler_reset, "", 0, false}, {0}};

// Of numbers: nothing that a chat template would want.
static const struct builtin number_methods[] = {
    {"as_integer_ratio", NULL, "*", 0, false},
    {"bit_count", NULL, "*", 0, false},
    {"bit_length", NULL, "*", 0, false},
    {"conjugate", NULL, "*", 0, false},
    {"denominator", NULL, "*", 0, false},
    {"from_bytes", NULL, "*", 0, false},
    {"fromhex", NULL, "*", 0, false},
    {"hex", NULL, "*", 0, false},
    {"imag", NULL, "*", 0, false},
    {"is_integer", NULL, "*", 0, false},
    {"numerator", NULL, "*", 0, false},
    {"real", NULL, "*", 0, false},
    {"to_bytes", NULL, "*", 0, false},
    {0},
};

const struct builtin *jinja_find_method(struct value object, const struct string *name)
{
    static const struct builtin none[] = {{0}};
    const struct builtin *table = none;
    switch (object.kind) {
    case V_STRING: table = string_methods; break;
    case V_DICT: table = dict_methods; break;
    case V_LIST: table = list_methods; break;
    case V_TUPLE:
    case V_RANGE: table = tuple_methods; break;
    case V_CYCLER: table = cycler_methods; break;
    case V_BOOL:
    case V_INT:
    case V_FLOAT: table = number_methods; break;
    default: break;
    }
    for (; table->name; table++) {
        if (jinja_is_c(name, table->name)) return table;
    }
    return NULL;
}

bool jinja_is_mutator(struct value object, const struct string *name)
{
    static const char *const of_lists[] = {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"};
    static const char *const of_dicts[] = {"clear", "pop", "popitem", "setdefault", "update"};
    if (object.kind != V_LIST && object.kind != V_DICT) return false;
    const char *const *names = object.kind == V_LIST ? of_lists : of_dicts;
    size_t n = object.kind == V_LIST ? sizeof of_lists / sizeof *of_lists : sizeof of_dicts / sizeof *of_dicts;
    for (size_t i = 0; i < n; i++) {
        if (jinja_is_c(name, names[i])) return true;
    }
    return false;
}
