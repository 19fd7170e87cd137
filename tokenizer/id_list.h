/* id_list.h: token ids that grow as they come. */
#ifndef GPTD_TOKENIZER_ID_LIST_H
#define GPTD_TOKENIZER_ID_LIST_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct id_list {
    int32_t *ids; // [n]
    size_t n, capacity;
};

// Returns 0, or -1 when out of memory.
static inline int id_list_append(struct id_list *list, const int32_t *ids, size_t n)
{
    if (n > list->capacity - list->n) {
        size_t capacity = (list->n + n) * 2;
        int32_t *grown = realloc(list->ids, capacity * sizeof *grown);
        if (!grown) return -1;
        list->ids = grown;
        list->capacity = capacity;
    }
    if (n > 0) memcpy(list->ids + list->n, ids, n * sizeof *ids);
    list->n += n;
    return 0;
}

#endif
