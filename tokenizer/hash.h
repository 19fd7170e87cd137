/* hash.h: spreads the bits of a number, for the tables of pieces and of merges. */
#ifndef GPTD_TOKENIZER_HASH_H
#define GPTD_TOKENIZER_HASH_H

#include <stdint.h>

static inline uint64_t hash_mix(uint64_t x)
{
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93u;
    return x ^ x >> 32;
}

#endif
