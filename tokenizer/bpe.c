#include "tokenizer/bpe.h"

#include "tokenizer/hash.h"
#include "tokenizer/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { SHORT_WORD = 24 }; // symbols: up to there looking at all pairs after each merge is faster than a heap

// What a pair of symbols becomes. Open addressing; rank UINT32_MAX: free.
struct pair_entry {
    int32_t left, right, merged;
    uint32_t rank;
};

struct bpe {
    struct bpe_options options;
    struct pair_entry *pairs;    // [pair_mask + 1]
    size_t pair_mask;
    const struct vocab *vocab;
    int32_t byte_symbols[256];   // byte_level: the piece of a byte alone; else <0x..>; -1: none
};

// ---- tables ---------------------------------------------------------------------------------------------------------

static size_t table_mask(size_t n)
{
    size_t size = 16;
    while (size < n * 2) size *= 2;
    return size - 1;
}

static struct pair_entry *find_pair(const struct bpe *bpe, int32_t left, int32_t right)
{
    size_t at = hash_mix((uint64_t)(uint32_t)left << 32 | (uint32_t)right) & bpe->pair_mask;
    for (;; at = (at + 1) & bpe->pair_mask) {
        struct pair_entry *p = &bpe->pairs[at];
        if (p->rank == UINT32_MAX || (p->left == left && p->right == right)) return p;
    }
}

// Of a pair that is named twice the later rank counts, as in a map that is filled in order.
static void add_merges(struct bpe *bpe, const struct bpe_merge *merges, size_t n)
{
    for (size_t i = 0; i <= bpe->pair_mask; i++) bpe->pairs[i].rank = UINT32_MAX;
    for (size_t i = 0; i < n; i++)
        *find_pair(bpe, merges[i].left, merges[i].right) =
            (struct pair_entry){merges[i].left, merges[i].right, merges[i].merged, (uint32_t)i};
}

struct bpe *bpe_create(const struct bpe_options *options, const struct vocab *vocab, const int32_t *byte_ids,
                       const struct bpe_merge *merges, size_t n_merges)
{
    struct bpe *bpe = calloc(1, sizeof *bpe);
    if (!bpe) return NULL;
    bpe->options = *options;
    bpe->vocab = vocab;
    bpe->pair_mask = table_mask(n_merges);
    bpe->pairs = malloc((bpe->pair_mask + 1) * sizeof *bpe->pairs);
    if (!bpe->pairs) {
        bpe_destroy(bpe);
        return NULL;
    }
    add_merges(bpe, merges, n_merges);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        bpe->byte_symbols[b] = options->byte_level ? vocab_find(vocab, &byte, 1) : byte_ids[b];
    }
    return bpe;
}

void bpe_destroy(struct bpe *bpe)
{
    if (!bpe) return;
    free(bpe->pairs);
    free(bpe);
}

// ---- symbols --------------------------------------------------------------------------------------------------------

static bool has_bytes(const struct bpe *bpe, const char *bytes, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if (bpe->byte_symbols[(unsigned char)bytes[i]] < 0) return false;
    return true;
}

// The symbols that a word begins as: at most one a byte, into `out`. *fused: the last is an unknown one that grows.
static size_t begin_symbols(const struct bpe *bpe, const char *word, size_t length, int32_t *out)
{
    const struct bpe_options *o = &bpe->options;
    size_t n = 0, step;
    bool after_unknown = false;
    for (size_t i = 0; i < length; i += step) {
        step = o->byte_level ? 1 : unicode_length((unsigned char)word[i]);
        if (step > length - i) step = length - i;
        int32_t id = o->byte_level ? bpe->byte_symbols[(unsigned char)word[i]] : vocab_find(bpe->vocab, word + i, step);
        bool unknown = id < 0;
        if (unknown && o->byte_fallback && !o->byte_level && has_bytes(bpe, word + i, step)) {
            for (size_t k = 0; k < step; k++) out[n++] = bpe->byte_symbols[(unsigned char)word[i + k]];
            after_unknown = false;
            continue;
        }
        if (unknown && o->unk_id >= 0 && !(after_unknown && o->fuse_unk)) out[n++] = o->unk_id;
        if (!unknown) out[n++] = id;
        after_unknown = unknown;
    }
    return n;
}

// ---- merging --------------------------------------------------------------------------------------------------------

static size_t merge_short(const struct bpe *bpe, int32_t *symbols, size_t n)
{
    const struct pair_entry *pairs[SHORT_WORD];
    for (size_t i = 0; i + 1 < n; i++) pairs[i] = find_pair(bpe, symbols[i], symbols[i + 1]);
    for (;;) {
        size_t best = 0;
        uint32_t rank = UINT32_MAX;
        for (size_t i = 0; i + 1 < n; i++)
            if (pairs[i]->rank < rank) rank = pairs[i]->rank, best = i;
        if (rank == UINT32_MAX) return n;
        symbols[best] = pairs[best]->merged;
        n--;
        memmove(symbols + best + 1, symbols + best + 2, (n - best - 1) * sizeof *symbols);
        if (n - best > 1) memmove(pairs + best + 1, pairs + best + 2, (n - best - 2) * sizeof *pairs);
        if (best > 0) pairs[best - 1] = find_pair(bpe, symbols[best - 1], symbols[best]);
        if (best + 1 < n) pairs[best] = find_pair(bpe, symbols[best], symbols[best + 1]);
    }
}

// A pair to be merged, of lowest rank first, then leftmost; old once its symbols have changed.
struct candidate {
    uint32_t rank, at;
    int32_t merged;
};

struct chain {
    int32_t id;
    uint32_t prev, next; // UINT32_MAX: none
    bool gone;
};

static bool goes_first(const struct candidate *a, const struct candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct candidate *heap, size_t *n, struct candidate c)
{
    size_t i = (*n)++;
    for (; i > 0 && goes_first(&c, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
}

static struct candidate heap_pop(struct candidate *heap, size_t *n)
{
    struct candidate top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n) break;
        if (child + 1 < *n && goes_first(&heap[child + 1], &heap[child])) child++;
        if (!goes_first(&heap[child], &last)) break;
        heap[i] = heap[child];
        i = child;
    }
    if (*n > 0) heap[i] = last;
    return top;
}

static void push_pair(const struct bpe *bpe, const struct chain *chain, uint32_t at, struct candidate *heap, size_t *n)
{
    if (at == UINT32_MAX || chain[at].next == UINT32_MAX) return;
    const struct pair_entry *p = find_pair(bpe, chain[at].id, chain[chain[at].next].id);
    if (p->rank != UINT32_MAX) heap_push(heap, n, (struct candidate){p->rank, at, p->merged});
}

// Each merge pushes two pairs at most: three times n candidates in all.
static int merge_long(const struct bpe *bpe, int32_t *symbols, size_t *n_symbols)
{
    const size_t n = *n_symbols;
    struct chain *chain = malloc(n * sizeof *chain);
    struct candidate *heap = malloc(3 * n * sizeof *heap);
    size_t n_heap = 0, end = 0;
    if (!chain || !heap) {
        free(chain), free(heap);
        return -1;
    }
    for (size_t i = 0; i < n; i++)
        chain[i] = (struct chain){symbols[i], (uint32_t)i - 1, i + 1 < n ? (uint32_t)i + 1 : UINT32_MAX, false};
    for (size_t i = 0; i + 1 < n; i++) push_pair(bpe, chain, (uint32_t)i, heap, &n_heap);
    while (n_heap > 0) {
        struct candidate c = heap_pop(heap, &n_heap);
        struct chain *left = &chain[c.at], *right = left->gone || left->next == UINT32_MAX ? NULL : &chain[left->next];
        if (!right) continue;
        const struct pair_entry *p = find_pair(bpe, left->id, right->id);
        if (p->rank == UINT32_MAX || p->merged != c.merged) continue; // what it was about is gone
        left->id = c.merged;
        left->next = right->next;
        right->gone = true;
        if (left->next != UINT32_MAX) chain[left->next].prev = c.at;
        push_pair(bpe, chain, left->prev, heap, &n_heap);
        push_pair(bpe, chain, c.at, heap, &n_heap);
    }
    for (size_t i = 0; i < n; i++)
        if (!chain[i].gone) symbols[end++] = chain[i].id;
    *n_symbols = end;
    free(chain), free(heap);
    return 0;
}

int bpe_encode(const struct bpe *bpe, const char *word, size_t length, struct id_list *out)
{
    int32_t few[SHORT_WORD * 4], *symbols = few;
    if (length == 0) return 0;
    if (bpe->options.ignore_merges) {
        int32_t id = vocab_find(bpe->vocab, word, length);
        if (id >= 0) return id_list_append(out, &id, 1);
    }
    if (length > sizeof few / sizeof *few && !(symbols = malloc(length * sizeof *symbols))) return -1;
    size_t n = begin_symbols(bpe, word, length, symbols);
    int rc = 0;
    if (n > SHORT_WORD) rc = merge_long(bpe, symbols, &n);
    else if (n > 1) n = merge_short(bpe, symbols, n);
    if (!rc) rc = id_list_append(out, symbols, n);
    if (symbols != few) free(symbols);
    return rc;
}
