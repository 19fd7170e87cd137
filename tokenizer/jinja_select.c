/* map, select, reject and their likes: filters that apply others. And the tests. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

#define FILTER(name)                                                                                                    \
    static struct value name(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
#define TEST(name) FILTER(name)
#define UNUSED (void)j, (void)given, (void)all

// ---- attributes by path ----

static struct value path_part(const struct string *part)
{
    int64_t index;
    for (size_t at = 0, size; at < part->length; at += size) {
        if (!jinja_is_digit(jinja_decode(part->data + at, part->length - at, &size)))
            return (struct value){.kind = V_STRING, .string = part};
    }
    if (part->length == 0 || !jinja_parse_int(part, 10, &index)) return (struct value){.kind = V_STRING, .string = part};
    return jinja_int(index);
}

// The attribute of "a.b.0" or of a number. Where something is undefined on the way, otherwise takes its place unless it is none.
struct value jinja_path(struct jinja *j, struct value item, struct value attribute, struct value otherwise)
{
    size_t from = 0;
    if (attribute.kind == V_MISSING || attribute.kind == V_NONE) return item;
    while (true) {
        struct value part = attribute;
        bool last = true;
        if (attribute.kind == V_STRING) {
            const struct string *s = attribute.string;
            const char *dot = from < s->length ? memchr(s->data + from, '.', s->length - from) : NULL;
            size_t to = dot ? (size_t)(dot - s->data) : s->length;
            part = path_part(jinja_substring(j, s, from, to).string);
            last = !dot;
            from = to + 1;
        }
        item = jinja_item(j, item, part);
        bool has_default = otherwise.kind != V_MISSING && otherwise.kind != V_NONE;
        if (item.kind == V_UNDEFINED && has_default) item = otherwise;
        if (last) return item;
    }
}

// ---- filters that apply others ----

// The filter or test that the argument names, with those behind it as its own.
struct applied {
    const struct builtin *builtin;
    struct arguments args;
};

static struct applied applied(struct jinja *j, const struct arguments *all, size_t at,
                              const struct builtin *find(const struct string *name), const char *what)
{
    const struct string *name = jinja_string_argument(j, all->values[at]);
    struct applied a = {find(name), *all};
    if (!a.builtin) jinja_fail(j, "no %s named '%.*s'", what, (int)(name->length < 100 ? name->length : 100), name->data);
    a.args.values += at + 1;
    a.args.n -= at + 1;
    return a;
}

static struct value map_attribute(struct jinja *j, struct value self, const struct arguments *all)
{
    struct value attribute = {0}, otherwise = jinja_none();
    for (size_t i = 0; i < all->n_named; i++) {
        if (jinja_is_c(all->names[i], "attribute")) attribute = all->named[i];
        else if (jinja_is_c(all->names[i], "default")) otherwise = all->named[i];
        else jinja_fail(j, "map got an unexpected keyword argument");
    }
    if (attribute.kind == V_MISSING) jinja_fail(j, "map requires a filter argument");
    struct list *items = jinja_items(j, self);
    for (size_t i = 0; i < items->n; i++) items->items[i] = jinja_path(j, items->items[i], attribute, otherwise);
    return jinja_iterator(j, items);
}

FILTER(filter_map)
{
    (void)given;
    if (!jinja_is_true(self)) return jinja_iterator(j, jinja_list_new(j, 0));
    if (all->n == 0) return map_attribute(j, self, all);
    struct applied filter = applied(j, all, 0, jinja_find_filter, "filter");
    struct list *items = jinja_items(j, self);
    jinja_enter(j);
    for (size_t i = 0; i < items->n; i++)
        items->items[i] = jinja_call_builtin(j, filter.builtin, items->items[i], &filter.args);
    jinja_leave(j);
    return jinja_iterator(j, items);
}

static struct value select_items(struct jinja *j, struct value self, const struct arguments *all, bool by_attribute, bool wanted)
{
    size_t first = by_attribute;
    struct applied test = {0};
    struct list *kept = jinja_list_new(j, 0);
    if (!jinja_is_true(self)) return jinja_iterator(j, kept);
    if (by_attribute && all->n == 0) jinja_fail(j, "Missing parameter for attribute name");
    if (all->n > first) test = applied(j, all, first, jinja_find_test, "test");
    struct list *items = jinja_items(j, self);
    jinja_enter(j);
    for (size_t i = 0; i < items->n; i++) {
        struct value v = by_attribute ? jinja_path(j, items->items[i], all->values[0], jinja_none()) : items->items[i];
        if (test.builtin) v = jinja_call_builtin(j, test.builtin, v, &test.args);
        if (jinja_is_true(v) == wanted) jinja_append(j, kept, items->items[i]);
    }
    jinja_leave(j);
    return jinja_iterator(j, kept);
}

FILTER(filter_select)
{
    UNUSED;
    return select_items(j, self, all, false, true);
}

FILTER(filter_reject)
{
    UNUSED;
    return select_items(j, self, all, false, false);
}

FILTER(filter_selectattr)
{
    UNUSED;
    return select_items(j, self, all, true, true);
}

FILTER(filter_rejectattr)
{
    UNUSED;
    return select_items(j, self, all, true, false);
}

const struct builtin jinja_select_filters[] = {
    {"map", filter_map, "*", 0, true},
    {"reject", filter_reject, "*", 0, true},
    {"rejectattr", filter_rejectattr, "*", 0, true},
    {"select", filter_select, "*", 0, true},
    {"selectattr", filter_selectattr, "*", 0, true},
    {0},
};

// ---- tests ----

TEST(test_defined)
{
    UNUSED;
    return jinja_bool(self.kind != V_UNDEFINED);
}

TEST(test_undefined)
{
    UNUSED;
    return jinja_bool(self.kind == V_UNDEFINED);
}

TEST(test_none)
{
    UNUSED;
    return jinja_bool(self.kind == V_NONE);
}

TEST(test_string)
{
    UNUSED;
    return jinja_bool(self.kind == V_STRING);
}

TEST(test_number)
{
    UNUSED;
    return jinja_bool(jinja_is_number(self));
}

TEST(test_integer)
{
    UNUSED;
    return jinja_bool(self.kind == V_INT);
}

TEST(test_float)
{
    UNUSED;
    return jinja_bool(self.kind == V_FLOAT);
}

TEST(test_boolean)
{
    UNUSED;
    return jinja_bool(self.kind == V_BOOL);
}

TEST(test_true)
{
    UNUSED;
    return jinja_bool(self.kind == V_BOOL && self.b);
}

TEST(test_false)
{
    UNUSED;
    return jinja_bool(self.kind == V_BOOL && !self.b);
}

TEST(test_mapping)
{
    UNUSED;
    return jinja_bool(self.kind == V_DICT);
}

TEST(test_iterable)
{
    UNUSED;
    return jinja_bool(jinja_is_iterable(self) || self.kind == V_LOOP);
}

// What has a length and items by number or name.
TEST(test_sequence)
{
    UNUSED;
    size_t n;
    return jinja_bool(jinja_has_length(self, &n) && self.kind != V_VIEW);
}

TEST(test_callable)
{
    UNUSED;
    switch (self.kind) {
    case V_UNDEFINED:
    case V_FUNCTION:
    case V_METHOD:
    case V_MACRO:
    case V_JOINER:
    case V_LOOP: return jinja_bool(true);
    default: return jinja_bool(false);
    }
}

static struct value rest_is(struct jinja *j, struct value self, struct value by, int64_t rest)
{
    return jinja_bool(jinja_equal(j, jinja_arithmetic(j, '%', self, by), jinja_int(rest)));
}

TEST(test_even)
{
    UNUSED;
    return rest_is(j, self, jinja_int(2), 0);
}

TEST(test_odd)
{
    UNUSED;
    return rest_is(j, self, jinja_int(2), 1);
}

TEST(test_divisibleby)
{
    UNUSED;
    return rest_is(j, self, given[0], 0);
}

TEST(test_eq)
{
    UNUSED;
    return jinja_bool(jinja_equal(j, self, given[0]));
}

TEST(test_ne)
{
    UNUSED;
    return jinja_bool(!jinja_equal(j, self, given[0]));
}

TEST(test_lt)
{
    UNUSED;
    return jinja_bool(jinja_ordered(j, ORDER_LT, self, given[0]));
}

TEST(test_le)
{
    UNUSED;
    return jinja_bool(jinja_ordered(j, ORDER_LE, self, given[0]));
}

TEST(test_gt)
{
    UNUSED;
    return jinja_bool(jinja_ordered(j, ORDER_GT, self, given[0]));
}

TEST(test_ge)
{
    UNUSED;
    return jinja_bool(jinja_ordered(j, ORDER_GE, self, given[0]));
}

TEST(test_in)
{
    UNUSED;
    return jinja_bool(jinja_contains(j, given[0], self));
}

// The same object. Numbers and strings are the same when they are equal.
TEST(test_sameas)
{
    UNUSED;
    struct value other = given[0];
    if (self.kind != other.kind) return jinja_bool(false);
    bool scalar = self.kind == V_NONE || jinja_is_number(self) || self.kind == V_STRING;
    return jinja_bool(scalar ? jinja_equal(j, self, other) : self.macro == other.macro);
}

static struct value is_case(struct jinja *j, struct value self, bool upper)
{
    struct builder b = {.j = j};
    bool any = false;
    jinja_add_text(&b, self);
    for (size_t at = 0, size; at < b.length; at += size) {
        uint32_t c = jinja_decode(b.data + at, b.length - at, &size);
        if (upper ? jinja_is_lower(c) : jinja_is_upper(c)) return jinja_bool(false);
        any |= upper ? jinja_is_upper(c) : jinja_is_lower(c);
    }
    return jinja_bool(any);
}

TEST(test_lower)
{
    UNUSED;
    return is_case(j, self, false);
}

TEST(test_upper)
{
    UNUSED;
    return is_case(j, self, true);
}

static const struct builtin tests[] = {
    {"defined", test_defined, "", 0, false},
    {"undefined", test_undefined, "", 0, false},
    {"none", test_none, "", 0, false},
    {"string", test_string, "", 0, false},
    {"number", test_number, "", 0, false},
    {"integer", test_integer, "", 0, false},
    {"float", test_float, "", 0, false},
    {"boolean", test_boolean, "", 0, false},
    {"true", test_true, "", 0, false},
    {"false", test_false, "", 0, false},
    {"mapping", test_mapping, "", 0, false},
    {"iterable", test_iterable, "", 0, false},
    {"sequence", test_sequence, "", 0, false},
    {"callable", test_callable, "", 0, false},
    {"even", test_even, "", 0, false},
    {"odd", test_odd, "", 0, false},
    {"divisibleby", test_divisibleby, "num", 1, false},
    {"eq", test_eq, ".", 1, false},
    {"==", test_eq, ".", 1, false},
    {"equalto", test_eq, ".", 1, false},
    {"ne", test_ne, ".", 1, false},
    {"!=", test_ne, ".", 1, false},
    {"lt", test_lt, ".", 1, false},
    {"<", test_lt, ".", 1, false},
    {"lessthan", test_lt, ".", 1, false},
    {"le", test_le, ".", 1, false},
    {"<=", test_le, ".", 1, false},
    {"gt", test_gt, ".", 1, false},
    {">", test_gt, ".", 1, false},
    {"greaterthan", test_gt, ".", 1, false},
    {"ge", test_ge, ".", 1, false},
    {">=", test_ge, ".", 1, false},
    {"in", test_in, "seq", 1, false},
    {"sameas", test_sameas, "other", 1, false},
    {"lower", test_lower, "", 0, false},
    {"upper", test_upper, "", 0, false},
};

const struct builtin *jinja_find_test(const struct string *name)
{
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (jinja_is_c(name, tests[i].name)) return &tests[i];
    }
    return NULL;
}
