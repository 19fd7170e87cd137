#include "tokenizer/unigram.h"

#include "tokenizer/unicode.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static const double unknown_penalty = 10;

// Of the pieces' trie; its children lie together, in order of their bytes.
struct node {
    uint32_t first_child;
    uint16_t n_children;
    unsigned char byte; // that leads to it
    int32_t id;         // of the piece that ends here; -1: none
    double score;
};

struct unigram {
    struct node *nodes; // [n_nodes]; the root first
    size_t n_nodes, capacity;
    const struct vocab *vocab;
    bool has_bytes;
    int32_t byte_ids[256], unk_id;
    double unknown_score;
};

// ---- the trie -------------------------------------------------------------------------------------------------------

static int compare_pieces(const void *a, const void *b)
{
    const struct unigram_piece *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->length < y->length ? x->length : y->length);
    if (order) return order;
    return x->length != y->length ? (x->length > y->length) - (x->length < y->length) : (x->id > y->id) - (x->id < y->id);
}

static bool reserve(struct unigram *u, size_t n)
{
    if (u->n_nodes + n <= u->capacity) return true;
    size_t capacity = (u->n_nodes + n) * 2;
    struct node *grown = realloc(u->nodes, capacity * sizeof *grown);
    if (!grown) return false;
    u->nodes = grown, u->capacity = capacity;
    return true;
}

// What a node stands for: pieces begin .. end - 1, which are alike up to `depth`.
struct range {
    size_t begin, end, depth;
};

// Appends the children of the node at `at`, and their ranges.
static bool add_children(struct unigram *u, size_t at, struct range r, const struct unigram_piece *pieces, struct range *ranges)
{
    u->nodes[at].first_child = (uint32_t)u->n_nodes;
    while (r.begin < r.end && pieces[r.begin].length == r.depth) { // of pieces that are named twice the first counts
        if (u->nodes[at].id < 0) u->nodes[at].id = pieces[r.begin].id, u->nodes[at].score = pieces[r.begin].score;
        r.begin++;
    }
    while (r.begin < r.end) {
        unsigned char byte = (unsigned char)pieces[r.begin].bytes[r.depth];
        size_t end = r.begin;
        while (end < r.end && (unsigned char)pieces[end].bytes[r.depth] == byte) end++;
        if (!reserve(u, 1)) return false;
        ranges[u->n_nodes] = (struct range){r.begin, end, r.depth + 1};
        u->nodes[u->n_nodes++] = (struct node){0, 0, byte, -1, 0};
        u->nodes[at].n_children++;
        r.begin = end;
    }
    return true;
}

struct unigram *unigram_create(struct unigram_piece *pieces, size_t n, const struct vocab *vocab, const int32_t *byte_ids,
                               int32_t unk_id)
{
    struct unigram *u = calloc(1, sizeof *u);
    size_t most = 1;
    double least = 0;
    for (size_t i = 0; i < n; i++) {
        most += pieces[i].length;
        if (i == 0 || pieces[i].score < least) least = pieces[i].score;
    }
    struct range *ranges = malloc(most * sizeof *ranges);
    bool good = u && ranges && most < UINT32_MAX && reserve(u, 1);
    if (good) {
        u->vocab = vocab, u->unk_id = unk_id, u->unknown_score = least - unknown_penalty, u->has_bytes = byte_ids != NULL;
        if (byte_ids) memcpy(u->byte_ids, byte_ids, sizeof u->byte_ids);
        if (n > 0) qsort(pieces, n, sizeof *pieces, compare_pieces);
        u->nodes[u->n_nodes++] = (struct node){0, 0, 0, -1, 0};
        ranges[0] = (struct range){0, n, 0};
        for (size_t at = 0; good && at < u->n_nodes; at++) good = add_children(u, at, ranges[at], pieces, ranges);
    }
    free(ranges);
    if (good) return u;
    unigram_destroy(u);
    return NULL;
}

void unigram_destroy(struct unigram *u)
{
    if (!u) return;
    free(u->nodes);
    free(u);
}

static const struct node *child_of(const struct unigram *u, const struct node *node, unsigned char byte)
{
    const struct node *first = u->nodes + node->first_child;
    size_t low = 0, high = node->n_children;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (first[middle].byte < byte) low = middle + 1;
        else high = middle;
    }
    return low < node->n_children && first[low].byte == byte ? first + low : NULL;
}

// ---- the best way ---------------------------------------------------------------------------------------------------

// The best way to a place in the word.
struct place {
    double score;
    size_t begin; // of its last piece; SIZE_MAX: there is no way yet
    int32_t id;   // of that
};

static void offer(struct place *p, double score, size_t begin, int32_t id)
{
    if (p->begin == SIZE_MAX || score > p->score) *p = (struct place){score, begin, id};
}

// All pieces that begin at `at`, and the character there as an unknown one if it is no piece.
static void extend(const struct unigram *u, const char *word, size_t length, size_t at, struct place *places)
{
    size_t character = unicode_length((unsigned char)word[at]);
    bool is_piece = false;
    if (character > length - at) character = length - at;
    const struct node *node = u->nodes;
    for (size_t end = at; end < length && (node = child_of(u, node, (unsigned char)word[end]));) {
        end++;
        if (node->id < 0) continue;
        offer(&places[end], places[at].score + node->score, at, node->id);
        is_piece |= end - at == character;
    }
    if (!is_piece) offer(&places[at + character], places[at].score + u->unknown_score, at, -1);
}

// What has no piece: its bytes' pieces if all are there, else the unknown one.
static int add_unknown(const struct unigram *u, const char *text, size_t length, struct id_list *out)
{
    bool whole = u->has_bytes;
    int32_t id = vocab_find(u->vocab, text, length); // neighbours that are unknown alone may be one together
    if (id >= 0) return id_list_append(out, &id, 1);
    for (size_t i = 0; i < length && whole; i++) whole = u->byte_ids[(unsigned char)text[i]] >= 0;
    for (size_t i = 0; i < length && whole; i++)
        if (id_list_append(out, &u->byte_ids[(unsigned char)text[i]], 1)) return -1;
    if (whole) return 0;
    return u->unk_id < 0 ? 1 : id_list_append(out, &u->unk_id, 1);
}

// The way to the end, turned round: places[p].begin becomes where the piece at p ends.
static void turn(struct place *places, size_t length)
{
    size_t end = length, next = SIZE_MAX;
    int32_t next_id = -1;
    for (;;) {
        struct place *p = &places[end];
        size_t begin = p->begin;
        int32_t id = p->id;
        p->begin = next, p->id = next_id;
        if (end == 0) return;
        next = end, next_id = id, end = begin;
    }
}

int unigram_encode(const struct unigram *u, const char *word, size_t length, struct id_list *out)
{
    struct place few[128], *places = few;
    int rc = 0;
    if (length + 1 > sizeof few / sizeof *few && !(places = malloc((length + 1) * sizeof *places))) return -1;
    for (size_t i = 0; i <= length; i++) places[i] = (struct place){0, SIZE_MAX, -1};
    places[0].begin = 0;
    for (size_t at = 0; at < length; at++)
        if (((unsigned char)word[at] & 0xC0) != 0x80) extend(u, word, length, at, places);
    turn(places, length);
    for (size_t at = 0; at < length && !rc;) {
        size_t end = places[at].begin;
        if (places[at].id >= 0) {
            rc = id_list_append(out, &places[at].id, 1);
        } else {
            while (end < length && places[end].id < 0) end = places[end].begin; // one with its neighbours
            rc = add_unknown(u, word + at, end - at, out);
        }
        at = end;
    }
    if (places != few) free(places);
    return rc;
}
