/* Dictionaries that keep their order, as Python's do. Few members are searched one by one, more through a table of their hashes. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

enum { SEARCHED = 8 };

struct dict *jinja_dict_new(struct jinja *j)
{
    return jinja_alloc(j, sizeof(struct dict));
}

bool jinja_is_hashable(struct jinja *j, struct value v)
{
    bool hashable = true;
    if (v.kind == V_TUPLE) {
        jinja_enter(j);
        for (size_t i = 0; hashable && i < v.list->n; i++) hashable = jinja_is_hashable(j, v.list->items[i]);
        jinja_leave(j);
        return hashable;
    }
    return v.kind != V_LIST && v.kind != V_DICT && !(v.kind == V_VIEW && v.view->of != VIEW_VALUES);
}

static uint64_t mix(uint64_t h)
{
    h = (h ^ (h >> 31)) * 0x9E3779B97F4A7C15u;
    return h ^ (h >> 29);
}

// Equal values have equal hashes: 1, 1.0 and true are one key. Tuples are no deeper than jinja_is_hashable lets pass.
static uint64_t hash(struct value v)
{
    uint64_t h = 14695981039346656037u;
    int64_t i;
    if (v.kind == V_FLOAT && v.f >= -9e18 && v.f <= 9e18 && v.f == (double)(int64_t)v.f) v = jinja_int((int64_t)v.f);
    if (jinja_as_int(v, &i)) return mix((uint64_t)i);
    if (v.kind == V_FLOAT) {
        memcpy(&h, &v.f, sizeof h);
    } else if (v.kind == V_STRING) {
        for (size_t k = 0; k < v.string->length; k++) h = (h ^ (unsigned char)v.string->data[k]) * 1099511628211u;
    } else if (v.kind == V_TUPLE) {
        for (size_t k = 0; k < v.list->n; k++) h = mix(h + hash(v.list->items[k]));
    }
    return mix(h);
}

// Where the key is, or the free slot where it would be.
static uint32_t *slot_of(struct jinja *j, const struct dict *d, struct value key)
{
    for (size_t at = hash(key) & (d->n_slots - 1);; at = (at + 1) & (d->n_slots - 1)) {
        if (!d->slots[at] || jinja_equal(j, d->keys[d->slots[at] - 1], key)) return &d->slots[at];
    }
}

struct value *jinja_dict_find(struct jinja *j, const struct dict *d, struct value key)
{
    if (d->slots) {
        uint32_t slot = *slot_of(j, d, key);
        return slot ? &d->values[slot - 1] : NULL;
    }
    for (size_t i = 0; i < d->n; i++) {
        if (jinja_equal(j, d->keys[i], key)) return &d->values[i];
    }
    return NULL;
}

struct value *jinja_dict_find_string(struct jinja *j, const struct dict *d, const struct string *name)
{
    return jinja_dict_find(j, d, (struct value){.kind = V_STRING, .string = name});
}

static void grow(struct jinja *j, struct dict *d)
{
    size_t capacity = d->capacity ? d->capacity * 2 : 4;
    struct value *keys = jinja_alloc_array(j, capacity, sizeof *keys), *values = jinja_alloc_array(j, capacity, sizeof *values);
    if (d->n > 0) {
        memcpy(keys, d->keys, d->n * sizeof *keys);
        memcpy(values, d->values, d->n * sizeof *values);
    }
    d->keys = keys;
    d->values = values;
    d->capacity = capacity;
    if (capacity <= SEARCHED) return;
    if (capacity > UINT32_MAX / 2) jinja_fail(j, "out of memory");
    d->n_slots = capacity * 2;
    d->slots = jinja_alloc_array(j, d->n_slots, sizeof *d->slots);
    for (size_t i = 0; i < d->n; i++) *slot_of(j, d, keys[i]) = (uint32_t)i + 1;
}

void jinja_dict_set(struct jinja *j, struct dict *d, struct value key, struct value value)
{
    if (!jinja_is_hashable(j, key)) jinja_fail(j, "unhashable type: '%s'", jinja_type(key));
    struct value *found = jinja_dict_find(j, d, key);
    if (found) {
        *found = value;
        return;
    }
    if (d->n == d->capacity) grow(j, d);
    if (d->slots) *slot_of(j, d, key) = (uint32_t)d->n + 1;
    d->keys[d->n] = key;
    d->values[d->n++] = value;
}
