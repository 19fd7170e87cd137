/* arena.h: everything an engine's tables need, in one allocation whose size is known before it is made.
 *
 * A layout function takes its arrays from an arena. Walked once with base NULL it measures; walked again over `used`
 * bytes of zeroed memory it places. The same code does both, so the memory plan is exact.
 */
#ifndef GPTD_ENGINE_ARENA_H
#define GPTD_ENGINE_ARENA_H

#include <stddef.h>

enum { CACHE_LINE = 64 }; // bytes

struct arena {
    char *base;  // NULL: measure only
    size_t used; // bytes
};

// n elements of `size` bytes on a cache line of their own; NULL when measuring.
static inline void *arena_take(struct arena *arena, size_t n, size_t size)
{
    size_t at = arena->used;
    arena->used += (n * size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return arena->base != NULL ? arena->base + at : NULL;
}

#define ARENA_ARRAY(arena, field, n) ((field) = arena_take((arena), (size_t)(n), sizeof *(field)))

#endif
