/* Filters of lists, dictionaries and whatever else can be gone through. */
#include "tokenizer/jinja_strings.h"

#include <string.h>

#define FILTER(name)                                                                                                    \
    static struct value name(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
#define UNUSED (void)j, (void)given, (void)all

static bool is_given(struct value v)
{
    return v.kind != V_MISSING && v.kind != V_NONE;
}

// What is sorted or compared by: an attribute, lowered if it is a string and case does not count.
static struct value key_of(struct jinja *j, struct value item, struct value attribute, bool case_sensitive)
{
    if (is_given(attribute)) item = jinja_path(j, item, attribute, jinja_none());
    if (case_sensitive || item.kind != V_STRING) return item;
    return jinja_recase(j, item.string, CASE_LOWER, CASE_LOWER);
}

FILTER(filter_join)
{
    UNUSED;
    struct list *items = jinja_items(j, self);
    for (size_t i = 0; is_given(given[1]) && i < items->n; i++)
        items->items[i] = jinja_path(j, items->items[i], given[1], jinja_none());
    return jinja_join(j, given[0].kind == V_MISSING ? jinja_string(j, "", 0).string : jinja_text(j, given[0]), items);
}

FILTER(filter_first)
{
    UNUSED;
    struct walk w;
    struct value item;
    jinja_walk(j, &w, self);
    return jinja_next(j, &w, &item) ? item : jinja_hint(j, "No first item, sequence was empty.");
}

FILTER(filter_last)
{
    UNUSED;
    if (self.kind == V_ITERATOR) jinja_fail(j, "'generator' object is not reversible");
    struct list *items = jinja_items(j, self);
    return items->n > 0 ? items->items[items->n - 1] : jinja_hint(j, "No last item, sequence was empty.");
}

FILTER(filter_list)
{
    UNUSED;
    return jinja_list(jinja_items(j, self));
}

FILTER(filter_reverse)
{
    UNUSED;
    struct builder b = {.j = j};
    struct list *items = jinja_items(j, self), *reversed = jinja_list_new(j, items->n);
    for (size_t i = items->n; i-- > 0;) jinja_append(j, reversed, items->items[i]);
    if (self.kind == V_ITERATOR) return jinja_list(reversed);
    if (self.kind != V_STRING) return jinja_iterator(j, reversed);
    for (size_t i = 0; i < reversed->n; i++) jinja_add_text(&b, reversed->items[i]);
    struct value text = jinja_built(&b);
    text.special = self.special;
    return text;
}

FILTER(filter_items)
{
    UNUSED;
    if (self.kind == V_UNDEFINED) return jinja_iterator(j, jinja_list_new(j, 0));
    if (self.kind != V_DICT) jinja_fail(j, "Can only get item pairs from a mapping.");
    struct view *view = jinja_alloc(j, sizeof *view);
    *view = (struct view){self.dict, VIEW_ITEMS};
    return jinja_iterator(j, jinja_items(j, (struct value){.kind = V_VIEW, .view = view}));
}

// ---- in order ----

static bool is_reverse(struct jinja *j, struct value reverse)
{
    if (reverse.kind == V_NONE) jinja_fail(j, "'NoneType' object cannot be interpreted as an integer");
    return jinja_int_argument(j, reverse, 0) != 0;
}

FILTER(filter_dictsort)
{
    UNUSED; // case_sensitive, by, reverse
    if (self.kind == V_UNDEFINED) jinja_fail_undefined(j, self);
    if (self.kind != V_DICT) jinja_fail(j, "only a dict can be sorted by dictsort");
    const struct string *by = given[1].kind == V_MISSING ? NULL : jinja_string_argument(j, given[1]);
    bool by_value = by && jinja_is_c(by, "value");
    if (by && !by_value && !jinja_is_c(by, "key")) jinja_fail(j, "You can only sort by either \"key\" or \"value\"");
    const struct dict *d = self.dict;
    struct list *pairs = jinja_list_new(j, d->n), *keys = jinja_list_new(j, d->n);
    for (size_t i = 0; i < d->n; i++) {
        struct list *pair = jinja_list_new(j, 2);
        jinja_append(j, pair, d->keys[i]);
        jinja_append(j, pair, d->values[i]);
        jinja_append(j, pairs, jinja_tuple(pair));
        jinja_append(j, keys, key_of(j, by_value ? d->values[i] : d->keys[i], jinja_none(), jinja_is_true(given[0])));
    }
    jinja_sort(j, pairs->items, keys->items, pairs->n, is_reverse(j, given[2]));
    return jinja_list(pairs);
}

// By the attributes of "a,b" one after the other. Without one, Jinja2 compares lists of one item: as the item.
static struct value sort_key(struct jinja *j, struct value item, struct value attribute, bool case_sensitive)
{
    struct list *keys = jinja_list_new(j, 1);
    struct string comma = {.data = ",", .length = 1, .n_chars = 1};
    if (attribute.kind == V_STRING) {
        struct list *names = jinja_split(j, attribute.string, &comma, -1, false);
        for (size_t i = 0; i < names->n; i++) jinja_append(j, keys, key_of(j, item, names->items[i], case_sensitive));
    } else {
        jinja_append(j, keys, key_of(j, item, attribute, case_sensitive));
    }
    return jinja_list(keys);
}

FILTER(filter_sort)
{
    UNUSED; // reverse, case_sensitive, attribute
    struct list *items = jinja_items(j, self), *keys = jinja_list_new(j, items->n);
    for (size_t i = 0; i < items->n; i++)
        jinja_append(j, keys, sort_key(j, items->items[i], given[2], jinja_is_true(given[1])));
    jinja_sort(j, items->items, keys->items, items->n, is_reverse(j, given[0]));
    return jinja_list(items);
}

FILTER(filter_unique)
{
    UNUSED; // case_sensitive, attribute
    struct list *items = jinja_items(j, self), *kept = jinja_list_new(j, 0);
    struct dict *seen = jinja_dict_new(j);
    for (size_t i = 0; i < items->n; i++) {
        struct value key = key_of(j, items->items[i], given[1], jinja_is_true(given[0]));
        if (!jinja_is_hashable(j, key)) jinja_fail(j, "unhashable type: '%s'", jinja_type(key));
        if (jinja_dict_find(j, seen, key)) continue;
        jinja_dict_set(j, seen, key, jinja_none());
        jinja_append(j, kept, items->items[i]);
    }
    return jinja_iterator(j, kept);
}

static struct value extreme(struct jinja *j, struct value self, const struct value *given, enum order better)
{
    struct list *items = jinja_items(j, self);
    if (items->n == 0) return jinja_hint(j, "No aggregated item, sequence was empty.");
    struct value best = items->items[0], best_key = key_of(j, best, given[1], jinja_is_true(given[0]));
    for (size_t i = 1; i < items->n; i++) {
        struct value key = key_of(j, items->items[i], given[1], jinja_is_true(given[0]));
        if (!jinja_ordered(j, better, key, best_key)) continue;
        best = items->items[i];
        best_key = key;
    }
    return best;
}

FILTER(filter_min)
{
    UNUSED;
    return extreme(j, self, given, ORDER_LT);
}

FILTER(filter_max)
{
    UNUSED;
    return extreme(j, self, given, ORDER_GT);
}

FILTER(filter_sum)
{
    UNUSED; // attribute, start
    struct list *items = jinja_items(j, self);
    struct value sum = given[1].kind == V_MISSING ? jinja_int(0) : given[1];
    if (sum.kind == V_STRING) jinja_fail(j, "sum() can't sum strings");
    for (size_t i = 0; i < items->n; i++) {
        struct value item = is_given(given[0]) ? jinja_path(j, items->items[i], given[0], jinja_none()) : items->items[i];
        sum = jinja_arithmetic(j, '+', sum, item);
    }
    return sum;
}

// ---- in groups ----

FILTER(filter_batch)
{
    UNUSED; // linecount, fill_with
    struct list *items = jinja_items(j, self), *rows = jinja_list_new(j, 0), *row = NULL;
    if (!jinja_is_number(given[0])) jinja_fail(j, "batch needs a number");
    int64_t size = jinja_int_argument(j, given[0], 0);
    for (size_t i = 0; i < items->n; i++) {
        if (!row || (int64_t)row->n == size) {
            row = jinja_list_new(j, 0);
            jinja_append(j, rows, jinja_list(row));
        }
        jinja_append(j, row, items->items[i]);
    }
    // A size of 0 gives rows that are never full, behind an empty one.
    while (row && is_given(given[1]) && (int64_t)row->n < size) {
        jinja_charge(j, 1);
        jinja_append(j, row, given[1]);
    }
    return jinja_iterator(j, rows);
}

FILTER(filter_slice)
{
    UNUSED; // slices, fill_with
    struct list *items = jinja_items(j, self), *columns = jinja_list_new(j, 0);
    int64_t n = (int64_t)items->n, slices = jinja_int_argument(j, given[0], 0), at = 0;
    if (slices == 0) jinja_fail(j, "integer division or modulo by zero");
    for (int64_t i = 0; i < slices; i++) {
        jinja_charge(j, 1);
        struct list *column = jinja_list_new(j, 0);
        bool longer = i < n % slices;
        for (int64_t k = 0; k < n / slices + longer; k++) jinja_append(j, column, items->items[at++]);
        if (is_given(given[1]) && !longer) jinja_append(j, column, given[1]);
        jinja_append(j, columns, jinja_list(column));
    }
    return jinja_iterator(j, columns);
}

static struct value group_of(struct jinja *j, struct value key, struct list *members)
{
    struct list *group = jinja_list_new(j, 2);
    jinja_append(j, group, key);
    jinja_append(j, group, jinja_list(members));
    struct value tuple = jinja_tuple(group);
    tuple.special = true;
    return tuple;
}

FILTER(filter_groupby)
{
    UNUSED; // attribute, default, case_sensitive
    bool case_sensitive = jinja_is_true(given[2]);
    struct list *items = jinja_items(j, self), *keys = jinja_list_new(j, items->n), *groups = jinja_list_new(j, 0), *group = NULL;
    for (size_t i = 0; i < items->n; i++) {
        struct value key = jinja_path(j, items->items[i], given[0], given[1]);
        jinja_append(j, keys, key_of(j, key, jinja_none(), case_sensitive));
    }
    jinja_sort(j, items->items, keys->items, items->n, false);
    for (size_t i = 0; i < items->n; i++) {
        if (!group || !jinja_equal(j, keys->items[i], keys->items[i - 1])) {
            group = jinja_list_new(j, 0);
            struct value key = jinja_path(j, items->items[i], given[0], given[1]);
            jinja_append(j, groups, group_of(j, key, group));
        }
        jinja_append(j, group, items->items[i]);
    }
    return jinja_list(groups);
}

const struct builtin jinja_list_filters[] = {
    {"batch", filter_batch, "linecount fill_with", 1, true},
    {"dictsort", filter_dictsort, "case_sensitive by reverse", 0, false},
    {"first", filter_first, "", 0, false},
    {"groupby", filter_groupby, "attribute default case_sensitive", 1, false},
    {"items", filter_items, "", 0, true},
    {"join", filter_join, "d attribute", 0, false},
    {"last", filter_last, "", 0, false},
    {"list", filter_list, "", 0, false},
    {"max", filter_max, "case_sensitive attribute", 0, false},
    {"min", filter_min, "case_sensitive attribute", 0, false},
    {"reverse", filter_reverse, "", 0, false},
    {"slice", filter_slice, "slices fill_with", 1, true},
    {"sort", filter_sort, "reverse case_sensitive attribute", 0, false},
    {"sum", filter_sum, "attribute start", 0, false},
    {"unique", filter_unique, "case_sensitive attribute", 0, true},
    {0},
};
