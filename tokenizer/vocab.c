#include "tokenizer/vocab.h"

#include "tokenizer/hash.h"

#include <stdlib.h>
#include <string.h>

// Open addressing; id -1: free.
struct entry {
    uint32_t offset, length; // into `text`
    int32_t id;
};

struct vocab {
    struct entry *entries; // [mask + 1]
    size_t mask, n_text;
    char *text;
};

static uint64_t hash_bytes(const char *bytes, size_t length)
{
    uint64_t h = length * 0x9E3779B97F4A7C15u, word = 0;
    for (; length >= 8; bytes += 8, length -= 8) {
        memcpy(&word, bytes, 8);
        h = hash_mix(h ^ word) * 0x9E3779B97F4A7C15u;
    }
    word = 0;
    memcpy(&word, bytes, length);
    return hash_mix(h ^ word);
}

struct vocab *vocab_create(size_t n_pieces, size_t n_bytes)
{
    struct vocab *v = calloc(1, sizeof *v);
    size_t size = 16;
    while (size < n_pieces * 2) size *= 2;
    if (!v) return NULL;
    v->mask = size - 1;
    v->entries = malloc(size * sizeof *v->entries);
    v->text = malloc(n_bytes + 1);
    if (!v->entries || !v->text || n_bytes >= UINT32_MAX) {
        vocab_destroy(v);
        return NULL;
    }
    for (size_t i = 0; i < size; i++) v->entries[i].id = -1;
    return v;
}

void vocab_destroy(struct vocab *v)
{
    if (!v) return;
    free(v->entries);
    free(v->text);
    free(v);
}

static struct entry *find(const struct vocab *v, const char *bytes, size_t length)
{
    for (size_t at = hash_bytes(bytes, length) & v->mask;; at = (at + 1) & v->mask) {
        struct entry *e = &v->entries[at];
        if (e->id < 0 || (e->length == length && memcmp(v->text + e->offset, bytes, length) == 0)) return e;
    }
}

void vocab_add(struct vocab *v, const char *bytes, size_t length, int32_t id)
{
    struct entry *e = find(v, bytes, length);
    if (e->id >= 0) return;
    *e = (struct entry){(uint32_t)v->n_text, (uint32_t)length, id};
    if (length > 0) memcpy(v->text + v->n_text, bytes, length);
    v->n_text += length;
}

int32_t vocab_find(const struct vocab *v, const char *bytes, size_t length) { return find(v, bytes, length)->id; }
