#include "engine/block_manager.h"

#include <assert.h>
#include <string.h>

static uint64_t rotl(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

static void sip_rounds(uint64_t v[4], int n)
{
    while (n-- > 0) {
        v[0] += v[1]; v[1] = rotl(v[1], 13) ^ v[0]; v[0] = rotl(v[0], 32);
        v[2] += v[3]; v[3] = rotl(v[3], 16) ^ v[2];
        v[0] += v[3]; v[3] = rotl(v[3], 21) ^ v[0];
        v[2] += v[1]; v[1] = rotl(v[1], 17) ^ v[2]; v[2] = rotl(v[2], 32);
    }
}

static void sip_word(uint64_t v[4], uint64_t word)
{
    v[3] ^= word;
    sip_rounds(v, 2);
    v[0] ^= word;
}

struct block_hash block_hash_next(struct hash_key key, struct block_hash parent, const int32_t *tokens, int32_t n)
{
    uint64_t v[4] = {key.k[0] ^ 0x736f6d6570736575, key.k[1] ^ 0x646f72616e646f6d ^ 0xee,
                     key.k[0] ^ 0x6c7967656e657261, key.k[1] ^ 0x7465646279746573};
    uint64_t words[MAX_BLOCK_SIZE / 2];
    assert(n % 2 == 0 && n <= MAX_BLOCK_SIZE);
    memcpy(words, tokens, (size_t)n * sizeof *tokens);
    sip_word(v, parent.h[0]);
    sip_word(v, parent.h[1]);
    for (int32_t i = 0; i < n / 2; i++)
        sip_word(v, words[i]);
    sip_word(v, (uint64_t)(16 + n * 4) << 56);
    struct block_hash hash;
    v[2] ^= 0xee;
    sip_rounds(v, 4);
    hash.h[0] = v[0] ^ v[1] ^ v[2] ^ v[3];
    v[1] ^= 0xdd;
    sip_rounds(v, 4);
    hash.h[1] = v[0] ^ v[1] ^ v[2] ^ v[3];
    return hash;
}

void block_manager_layout(struct block_manager *bm, struct arena *arena, int32_t n_blocks)
{
    bm->n_blocks = n_blocks;
    bm->n_buckets = 1;
    while (bm->n_buckets < n_blocks)
        bm->n_buckets *= 2;
    ARENA_ARRAY(arena, bm->blocks, bm->n_blocks);
    ARENA_ARRAY(arena, bm->buckets, bm->n_buckets);
}

static void free_list_remove(struct block_manager *bm, int32_t block)
{
    struct block *b = &bm->blocks[block];
    *(b->prev >= 0 ? &bm->blocks[b->prev].next : &bm->first) = b->next;
    *(b->next >= 0 ? &bm->blocks[b->next].prev : &bm->last) = b->prev;
    b->prev = b->next = -1;
    bm->n_free--;
}

static void free_list_push_front(struct block_manager *bm, int32_t block)
{
    struct block *b = &bm->blocks[block];
    b->prev = -1;
    b->next = bm->first;
    *(b->next >= 0 ? &bm->blocks[b->next].prev : &bm->last) = block;
    bm->first = block;
    bm->n_free++;
}

static void free_list_push_back(struct block_manager *bm, int32_t block)
{
    struct block *b = &bm->blocks[block];
    b->next = -1;
    b->prev = bm->last;
    *(b->prev >= 0 ? &bm->blocks[b->prev].next : &bm->first) = block;
    bm->last = block;
    bm->n_free++;
}

void block_manager_init(struct block_manager *bm)
{
    bm->first = bm->last = -1;
    bm->n_free = 0;
    for (int32_t i = 0; i < bm->n_buckets; i++)
        bm->buckets[i] = -1;
    for (int32_t i = 0; i < bm->n_blocks; i++)
        free_list_push_back(bm, i);
}

static int32_t *bucket_of(const struct block_manager *bm, struct block_hash hash)
{
    return &bm->buckets[hash.h[0] & (uint64_t)(bm->n_buckets - 1)];
}

static void uncache(struct block_manager *bm, int32_t block)
{
    struct block *b = &bm->blocks[block];
    int32_t *link = bucket_of(bm, b->hash);
    while (*link != block)
        link = &bm->blocks[*link].bucket_next;
    *link = b->bucket_next;
    b->cached = false;
}

int32_t block_manager_alloc(struct block_manager *bm)
{
    int32_t block = bm->first;
    if (block < 0)
        return -1;
    free_list_remove(bm, block);
    if (bm->blocks[block].cached)
        uncache(bm, block);
    bm->blocks[block].refs = 1;
    return block;
}

void block_manager_ref(struct block_manager *bm, int32_t block)
{
    if (bm->blocks[block].refs++ == 0)
        free_list_remove(bm, block);
}

void block_manager_unref(struct block_manager *bm, int32_t block)
{
    struct block *b = &bm->blocks[block];
    assert(b->refs > 0);
    if (--b->refs > 0)
        return;
    if (b->cached)
        free_list_push_back(bm, block);
    else
        free_list_push_front(bm, block);
}

int32_t block_manager_find(const struct block_manager *bm, struct block_hash hash)
{
    int32_t block = *bucket_of(bm, hash);
    while (block >= 0 && memcmp(&bm->blocks[block].hash, &hash, sizeof hash) != 0)
        block = bm->blocks[block].bucket_next;
    return block;
}

void block_manager_register(struct block_manager *bm, int32_t block, struct block_hash hash)
{
    struct block *b = &bm->blocks[block];
    assert(b->refs > 0);
    if (b->cached || block_manager_find(bm, hash) >= 0)
        return;
    int32_t *bucket = bucket_of(bm, hash);
    b->hash = hash;
    b->cached = true;
    b->bucket_next = *bucket;
    *bucket = block;
}

void block_manager_forget(struct block_manager *bm, int32_t block)
{
    if (bm->blocks[block].cached)
        uncache(bm, block);
}

static const char *check_free_list(const struct block_manager *bm)
{
    int32_t n = 0, prev = -1;
    for (int32_t i = bm->first; i >= 0; prev = i, i = bm->blocks[i].next) {
        if (bm->blocks[i].refs != 0)
            return "a held block is on the free list";
        if (bm->blocks[i].prev != prev || ++n > bm->n_blocks)
            return "the free list's links are broken";
    }
    if (bm->last != prev)
        return "the free list's end is wrong";
    return n == bm->n_free ? NULL : "the number of free blocks is wrong";
}

static const char *check_table(const struct block_manager *bm)
{
    int32_t n_cached = 0, n_found = 0;
    for (int32_t i = 0; i < bm->n_blocks; i++)
        n_cached += bm->blocks[i].cached;
    for (int32_t i = 0; i < bm->n_buckets; i++) {
        for (int32_t block = bm->buckets[i]; block >= 0; block = bm->blocks[block].bucket_next) {
            if (!bm->blocks[block].cached || ++n_found > n_cached)
                return "the hash table holds a block that is not cached";
            if (block_manager_find(bm, bm->blocks[block].hash) != block)
                return "two blocks have one hash, or one is in the wrong bucket";
        }
    }
    return n_found == n_cached ? NULL : "a cached block is not in the hash table";
}

static const char *check_refs(const struct block_manager *bm, const int32_t *refs)
{
    int32_t n_held = 0;
    for (int32_t i = 0; i < bm->n_blocks; i++) {
        n_held += bm->blocks[i].refs > 0;
        if (bm->blocks[i].refs < 0 || (refs != NULL && bm->blocks[i].refs != refs[i]))
            return "a block's references differ from its holders";
    }
    return n_held + bm->n_free == bm->n_blocks ? NULL : "free and held blocks do not add up";
}

bool block_manager_check(const struct block_manager *bm, const int32_t *refs, const char **why)
{
    const char *wrong = check_free_list(bm);
    if (wrong == NULL)
        wrong = check_table(bm);
    if (wrong == NULL)
        wrong = check_refs(bm, refs);
    if (why != NULL)
        *why = wrong;
    return wrong == NULL;
}
