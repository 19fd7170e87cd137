/* sequence_blocks.h: the block tables of running sequences: growing, sharing, copying on write, freeing, and the
 * prefix cache. The half of the scheduler that handles blocks; it decides nothing about whose turn it is.
 */
#ifndef GPTD_ENGINE_SEQUENCE_BLOCKS_H
#define GPTD_ENGINE_SEQUENCE_BLOCKS_H

#include "engine/scheduler.h"

// What the prefix cache holds of a sequence: blocks 0 .. n_blocks-1, of which a windowed group needs those from
// first[g] on; `revived` of them are on the free list now.
struct prefix_match { int32_t n_blocks, first[MAX_KV_GROUPS], revived[MAX_KV_GROUPS]; };

// Takes no references.
void sequence_match_prefix(const struct scheduler *s, const struct sequence *seq, struct prefix_match *match);
void sequence_take_prefix(struct scheduler *s, struct sequence *seq, const struct prefix_match *match);

// Makes the table cover positions < end, one block in every group at a time; false when some group has none left (what
// was got stays).
bool sequence_grow(struct scheduler *s, struct sequence *seq, int32_t end);
// Makes the block of the next position to compute the sequence's own, by copies [n_groups]; false, and nothing done, when a
// group has none left.
bool sequence_own_block(struct scheduler *s, struct sequence *seq, struct block_copies *copies);
void sequence_share_blocks(struct scheduler *s, const struct sequence *from, struct sequence *to);
void sequence_free_behind_window(struct scheduler *s, struct sequence *seq);
void sequence_free_blocks(struct scheduler *s, struct sequence *seq, bool forget);
// Offers full blocks that are computed and whose tokens are known to the prefix cache.
void sequence_register_blocks(struct scheduler *s, struct sequence *seq);

static inline int32_t *sequence_table(const struct scheduler *s, const struct sequence *seq, int32_t g)
{
    return s->tables[g] + (size_t)seq->slot * (size_t)s->max_blocks;
}

#endif
