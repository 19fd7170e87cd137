/* The block manager against a naive model of itself, on random traces; and its hash against published values. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/block_manager.h"

enum { N_BLOCKS = 13, N_HASHES = 20, N_STEPS = 20000 };

// What the header promises, said as simply as possible: an array for the free queue, linear searches.
struct naive {
    int32_t refs[N_BLOCKS];  // holders
    int32_t hash[N_BLOCKS];  // -1: not cached
    int32_t queue[N_BLOCKS]; // free blocks, next to be allocated first
    int32_t n_free;
};

static struct block_hash hash_of(int32_t i)
{
    return (struct block_hash){{(uint64_t)(i % 3), (uint64_t)i}}; // three buckets: long chains
}

static void naive_take(struct naive *m, int32_t block)
{
    int32_t at = 0;
    while (m->queue[at] != block)
        at++;
    memmove(&m->queue[at], &m->queue[at + 1], (size_t)(--m->n_free - at) * sizeof *m->queue);
}

static void naive_unref(struct naive *m, int32_t block)
{
    if (--m->refs[block] > 0)
        return;
    bool cached = m->hash[block] >= 0;
    if (!cached)
        memmove(&m->queue[1], &m->queue[0], (size_t)m->n_free * sizeof *m->queue);
    m->queue[cached ? m->n_free : 0] = block;
    m->n_free++;
}

static int32_t naive_find(const struct naive *m, int32_t hash)
{
    for (int32_t i = 0; i < N_BLOCKS; i++) {
        if (m->hash[i] == hash)
            return i;
    }
    return -1;
}

static void compare(const struct block_manager *bm, const struct naive *m)
{
    const char *why = "";
    ck_assert_msg(block_manager_check(bm, m->refs, &why), "%s", why);
    int32_t n_wrong = 0, n = 0;
    for (int32_t h = 0; h < N_HASHES; h++)
        n_wrong += block_manager_find(bm, hash_of(h)) != naive_find(m, h);
    for (int32_t block = bm->first; block >= 0; block = bm->blocks[block].next)
        n_wrong += block != m->queue[n++];
    ck_assert(n_wrong == 0 && n == m->n_free);
}

static void random_step(struct block_manager *bm, struct naive *m)
{
    int32_t block = rand() % N_BLOCKS, hash = rand() % N_HASHES;
    switch (rand() % 8) {
    case 0: case 1: case 2:
        block = block_manager_alloc(bm);
        ck_assert_int_eq(block, m->n_free > 0 ? m->queue[0] : -1);
        if (block < 0)
            break;
        naive_take(m, block);
        m->refs[block] = 1;
        m->hash[block] = -1;
        break;
    case 3:
        block = block_manager_find(bm, hash_of(hash));
        if (block < 0)
            break;
        block_manager_ref(bm, block);
        if (m->refs[block]++ == 0)
            naive_take(m, block);
        break;
    case 4: case 5:
        if (m->refs[block] == 0)
            break;
        block_manager_unref(bm, block);
        naive_unref(m, block);
        break;
    case 6:
        if (m->refs[block] == 0)
            break;
        block_manager_register(bm, block, hash_of(hash));
        if (m->hash[block] < 0 && naive_find(m, hash) < 0)
            m->hash[block] = hash;
        break;
    default:
        if (rand() % 4 != 0)
            break;
        block_manager_forget(bm, block);
        m->hash[block] = -1;
    }
}

static struct block_manager create(void **memory, int32_t n_blocks)
{
    struct block_manager bm = {0};
    struct arena arena = {0};
    block_manager_layout(&bm, &arena, n_blocks);
    *memory = calloc(1, arena.used);
    arena = (struct arena){.base = *memory};
    block_manager_layout(&bm, &arena, n_blocks);
    block_manager_init(&bm);
    return bm;
}

START_TEST(test_random_trace)
{
    unsigned seed = (unsigned)time(NULL) * 31 + (unsigned)_i;
    printf("block manager trace: seed %u\n", seed);
    srand(seed);
    void *memory;
    struct block_manager bm = create(&memory, N_BLOCKS);
    struct naive m = {.n_free = N_BLOCKS};
    for (int32_t i = 0; i < N_BLOCKS; i++) {
        m.hash[i] = -1;
        m.queue[i] = i;
    }
    for (int32_t step = 0; step < N_STEPS; step++) {
        random_step(&bm, &m);
        compare(&bm, &m);
    }
    free(memory);
}
END_TEST

START_TEST(test_least_recently_used_goes_first)
{
    void *memory;
    struct block_manager bm = create(&memory, 3);
    for (int32_t i = 0; i < 3; i++)
        block_manager_register(&bm, block_manager_alloc(&bm), hash_of(i));
    block_manager_unref(&bm, 1);
    block_manager_unref(&bm, 0);
    block_manager_unref(&bm, 2);
    block_manager_ref(&bm, 1); // used again: now the youngest
    block_manager_unref(&bm, 1);
    ck_assert_int_eq(block_manager_alloc(&bm), 0);
    ck_assert_int_eq(block_manager_alloc(&bm), 2);
    ck_assert_int_eq(block_manager_find(&bm, hash_of(1)), 1);
    ck_assert_int_eq(block_manager_find(&bm, hash_of(0)), -1);
    ck_assert_int_eq(block_manager_alloc(&bm), 1);
    ck_assert_int_eq(block_manager_alloc(&bm), -1);
    free(memory);
}
END_TEST

// check must see what it is for: each corruption here is one of a class of bugs.
START_TEST(test_check_finds_corruption)
{
    void *memory;
    struct block_manager bm = create(&memory, 4);
    int32_t a = block_manager_alloc(&bm), b = block_manager_alloc(&bm);
    int32_t refs[4] = {0};
    refs[a] = refs[b] = 1;
    block_manager_register(&bm, a, hash_of(1));
    ck_assert(block_manager_check(&bm, refs, NULL));
    refs[a] = 2; // in two tables with one reference
    ck_assert(!block_manager_check(&bm, refs, NULL));
    refs[a] = 1;
    bm.blocks[b].refs = 0; // lost: neither free nor held
    ck_assert(!block_manager_check(&bm, NULL, NULL));
    bm.blocks[b].refs = 1;
    bm.n_free--;
    ck_assert(!block_manager_check(&bm, NULL, NULL));
    bm.n_free++;
    bm.blocks[bm.first].refs = 1; // held and free
    ck_assert(!block_manager_check(&bm, NULL, NULL));
    bm.blocks[bm.first].refs = 0;
    bm.blocks[b].cached = true; // cached but not in the table
    ck_assert(!block_manager_check(&bm, NULL, NULL));
    free(memory);
}
END_TEST

// Values from OpenSSL 3: openssl mac -macopt hexkey:000102030405060708090a0b0c0d0e0f -macopt size:16 -in FILE SIPHASH
// with FILE the bytes 0, 1, 2 ... (16 of them; 272 of them, modulo 256).
START_TEST(test_hash_is_siphash)
{
    struct hash_key key;
    struct block_hash parent, hash;
    int32_t tokens[64];
    uint8_t bytes[272];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)i;
    memcpy(&key, bytes, 16);
    memcpy(&parent, bytes, 16);
    memcpy(tokens, bytes + 16, sizeof tokens);
    static const uint8_t of_16[16] = {
        0x6e, 0xe2, 0xa4, 0xca, 0x67, 0xb0, 0x54, 0xbb, 0xfd, 0x33, 0x15, 0xbf, 0x85, 0x23, 0x05, 0x77};
    static const uint8_t of_272[16] = {
        0xec, 0x83, 0x31, 0xf9, 0xa6, 0x8a, 0x08, 0xea, 0x1e, 0xb4, 0x51, 0x44, 0x51, 0x6e, 0xe8, 0x96};
    hash = block_hash_next(key, parent, tokens, 0);
    ck_assert_mem_eq(&hash, of_16, 16);
    hash = block_hash_next(key, parent, tokens, 64);
    ck_assert_mem_eq(&hash, of_272, 16);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("block_manager");
    TCase *tc = tcase_create("block_manager");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, test_random_trace, 0, 4);
    tcase_add_test(tc, test_least_recently_used_goes_first);
    tcase_add_test(tc, test_check_finds_corruption);
    tcase_add_test(tc, test_hash_is_siphash);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
