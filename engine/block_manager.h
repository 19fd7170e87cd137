/* block_manager.h: who holds which block of the paged KV cache. Used by the scheduler, one manager per KV group.
 *
 * Blocks are numbers; what lies in them is the device's. A block is held (refs > 0) or free. A free block keeps its
 * content, and its hash if it has one, until it is allocated again: the free list is a queue in which blocks without a
 * hash go to the front and cached ones to the back, so that allocation evicts the least recently used. Every operation
 * but block_manager_check is O(1).
 *
 * A full block is known by the hash of its tokens and of the block before it, so equal hashes mean equal prefixes. The
 * hash is SipHash-2-4 with 128 bits of output (Aumasson and Bernstein) under a key drawn at start: a client cannot
 * construct a collision, and one by chance is not to be expected in the life of the machine.
 */
#ifndef GPTD_ENGINE_BLOCK_MANAGER_H
#define GPTD_ENGINE_BLOCK_MANAGER_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/arena.h"

enum { MAX_BLOCK_SIZE = 64 }; // tokens

struct hash_key { uint64_t k[2]; };
struct block_hash { uint64_t h[2]; };

// The hash of a full block of n tokens (a multiple of 2, at most MAX_BLOCK_SIZE) that follows `parent`. The parent of a
// first block is what sets a request's cache apart: {salt, adapter}.
struct block_hash block_hash_next(struct hash_key key, struct block_hash parent, const int32_t *tokens, int32_t n);

struct block {
    int32_t refs;
    bool cached;            // hash is valid and in the table
    struct block_hash hash;
    int32_t bucket_next;    // next cached block of the same bucket; -1: none
    int32_t prev, next;     // in the free list; -1: none
};

struct block_manager {
    struct block *blocks;   // [n_blocks]
    int32_t *buckets;       // [n_buckets] first cached block; -1: none
    int32_t n_blocks, n_buckets;
    int32_t n_free;         // blocks nobody holds, cached ones included
    int32_t first, last;    // free list
};

void block_manager_layout(struct block_manager *bm, struct arena *arena, int32_t n_blocks);
void block_manager_init(struct block_manager *bm); // after the placing layout: all blocks free, nothing cached

// A block with one reference, its old content forgotten; -1: none is free.
int32_t block_manager_alloc(struct block_manager *bm);
void block_manager_ref(struct block_manager *bm, int32_t block);   // also takes a cached block off the free list
void block_manager_unref(struct block_manager *bm, int32_t block);

// The block known by hash, held or free; -1: none. No reference is taken.
int32_t block_manager_find(const struct block_manager *bm, struct block_hash hash);
// Makes a held block known by hash; if another block is already, that one stays and this one remains unknown.
void block_manager_register(struct block_manager *bm, int32_t block, struct block_hash hash);
void block_manager_forget(struct block_manager *bm, int32_t block); // its content is not to be reused

// Whether free + held = total, the free list and the table are sound, and, if refs [n_blocks] is given, every block has
// exactly that many holders. *why (if not NULL) gets the first thing wrong. O(n_blocks): for tests.
bool block_manager_check(const struct block_manager *bm, const int32_t *refs, const char **why);

#endif
