/* philox.h: Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel Random Numbers: As Easy as
 * 1, 2, 3" (SC 2011): four 32-bit words from a counter and a key, with no state in between.
 */
#ifndef GPTD_KERNELS_CPU_PHILOX_H
#define GPTD_KERNELS_CPU_PHILOX_H

#include <stdint.h>

enum { PHILOX_ROUNDS = 10 };
static const uint32_t PHILOX_M0 = 0xd2511f53, PHILOX_M1 = 0xcd9e8d57; // multipliers
static const uint32_t PHILOX_W0 = 0x9e3779b9, PHILOX_W1 = 0xbb67ae85; // added to the key each round

static inline void philox4x32(uint32_t words[4], const uint32_t counter[4], const uint32_t key[2])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t product0 = (uint64_t)PHILOX_M0 * c0, product1 = (uint64_t)PHILOX_M1 * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)product1;
        c3 = (uint32_t)product0;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

#endif
