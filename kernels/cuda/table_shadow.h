/* table_shadow.h: what the host knows of the device's block table, so that of a step's table only what changed travels.
 *
 * Plain C, so that it is tested where there is no GPU. A row that has the stamp it had when it was last looked at is not
 * looked at again: with hundreds of sequences the rows are more memory than a step's all else.
 */
#ifndef GPTD_KERNELS_CUDA_TABLE_SHADOW_H
#define GPTD_KERNELS_CUDA_TABLE_SHADOW_H

#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

struct table_update { int32_t at, block; };

// Of a row, when it was last looked at: entries first .. end - 1 are on the device.
struct shadow_row {
    uint64_t stamp;
    int32_t first, end;
};

struct table_shadow {
    int32_t *blocks;         // [n_entries]: the table as the device has it
    struct shadow_row *rows; // [n_rows]
    size_t n_entries, n_rows;
    int32_t width;           // of a row of the table
};

// Returns 0 or ERR_NOMEM; deinit also takes a zeroed shadow.
static inline int table_shadow_init(struct table_shadow *s, size_t n_rows, size_t n_entries)
{
    s->n_rows = n_rows;
    s->n_entries = n_entries;
    s->width = 0;
    s->blocks = (int32_t *)malloc(n_entries * sizeof *s->blocks);
    s->rows = (struct shadow_row *)calloc(n_rows, sizeof *s->rows);
    return s->blocks == NULL || s->rows == NULL ? ERR_NOMEM : 0;
}

static inline void table_shadow_deinit(struct table_shadow *s)
{
    free(s->blocks);
    free(s->rows);
    s->blocks = NULL;
    s->rows = NULL;
}

// What the device lacks of entries that a query of the step sees, to updates [n_seqs * width]; how many. The table has at
// most n_entries.
static inline uint32_t table_shadow_update(struct table_shadow *s, const struct stage_table *t, struct table_update *updates)
{
    uint32_t n = 0;
    if (t->width != s->width) { // nothing is known
        memset(s->blocks, 0x80, s->n_entries * sizeof *s->blocks);
        memset(s->rows, 0, s->n_rows * sizeof *s->rows);
    }
    s->width = t->width;
    for (int32_t i = 0; i < t->n_seqs; i++) {
        int32_t context = t->context_lens[i], first = 0, end = (context + t->block_size - 1) / t->block_size;
        int32_t position = context - (t->cu_seqlens_q[i + 1] - t->cu_seqlens_q[i]);
        if (t->window > 0 && position >= t->window)
            first = (position - t->window + 1) / t->block_size;
        if (end <= first)
            continue;
        uint64_t stamp = t->stamps != NULL ? t->stamps[i] : 0;
        if ((size_t)i < s->n_rows) {
            struct shadow_row *row = &s->rows[i];
            if (stamp != 0 && row->stamp == stamp && first >= row->first && end <= row->end)
                continue;
            row->stamp = stamp, row->first = first, row->end = end;
        }
        for (size_t at = (size_t)i * (size_t)t->width + (size_t)first, stop = at + (size_t)(end - first); at < stop; at++) {
            if (s->blocks[at] == t->host[at])
                continue;
            s->blocks[at] = updates[n].block = t->host[at];
            updates[n++].at = (int32_t)at;
        }
    }
    return n;
}

#endif
