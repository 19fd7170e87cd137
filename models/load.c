#include "models/load.h"

#include <stdatomic.h>
#include <string.h>

#include "models/parallel.h"

enum { PIECE = 1 << 20 }; // elements

struct load {
    const struct load_item *items;
    size_t n_items;
    const struct checkpoint *checkpoint;
    const struct kernels *kernels;
    struct device *device;
    char *buffers;           // host, one of buffer_bytes a thread: a piece as the file has it
    size_t buffer_bytes;
    atomic_size_t n_threads; // that have begun
    atomic_size_t next;      // piece that nobody has taken yet
    atomic_bool failed;
    struct error error;      // of the thread that set failed
};

static size_t n_pieces(const struct load_item *item)
{
    return (item->n_rows * item->n_cols + PIECE - 1) / PIECE;
}

// Elements first .. first + n of the transpose, [n_rows, n_cols], of in. Called with a constant size, which inlines.
static inline void transpose(char *out, const char *in, size_t n_rows, size_t n_cols, size_t first, size_t n, size_t size)
{
    for (size_t c = 0; c < n_cols; c++) {
        size_t row = (first + n_cols - 1 - c) / n_cols, end = (first + n + n_cols - 1 - c) / n_cols;
        for (; row < end; row++) memcpy(out + (row * n_cols + c - first) * size, in + (c * n_rows + row) * size, size);
    }
}

static int piece_read(const struct load *l, const struct load_item *item, size_t first, size_t n, char *to,
                      struct error *e)
{
    size_t size = dtype_size((enum dtype)item->from->dtype);
    const char *data = (const char *)item->from->data + item->offset * size;
    if (!item->transposed) return checkpoint_read(l->checkpoint, to, data + first * size, n * size, e);
    if (size == 4) transpose(to, data, item->n_rows, item->n_cols, first, n, 4);
    else transpose(to, data, item->n_rows, item->n_cols, first, n, 2);
    return 0;
}

static int piece_load(const struct load *l, const struct load_item *item, size_t first, char *buffer, struct error *e)
{
    enum dtype from = (enum dtype)item->from->dtype;
    size_t left = item->n_rows * item->n_cols - first, n = left < PIECE ? left : PIECE, size = dtype_size(item->dtype);
    int rc = piece_read(l, item, first, n, buffer, e);
    if (rc) return rc;
    if (from != item->dtype) dtype_convert(buffer, item->dtype, buffer, from, n); // in place: to no wider a type
    return l->kernels->copy_in(l->device, (char *)item->to + first * size, buffer, n * size, e);
}

// Pieces are numbered through all items. A thread's numbers rise, so it walks the items once.
static void *load_pieces(void *arg)
{
    struct load *l = arg;
    struct error e;
    char *buffer = l->buffers + atomic_fetch_add(&l->n_threads, 1) * l->buffer_bytes;
    size_t item = 0, first = 0, piece; // first: the first piece of the item
    while (!atomic_load(&l->failed)) {
        piece = atomic_fetch_add(&l->next, 1);
        while (item < l->n_items && piece - first >= n_pieces(&l->items[item])) first += n_pieces(&l->items[item++]);
        if (item == l->n_items) break;
        if (piece_load(l, &l->items[item], (piece - first) * PIECE, buffer, &e) == 0) continue;
        if (atomic_exchange(&l->failed, true)) break;
        l->error = e;
        error_prefix(&l->error, "%.200s", l->items[item].from->name);
    }
    return NULL;
}

int load_run(const struct load_item *items, size_t n, const struct checkpoint *checkpoint, const struct kernels *kernels,
             struct device *device, struct error *e)
{
    struct load l = {.items = items, .n_items = n, .checkpoint = checkpoint, .kernels = kernels, .device = device};
    size_t total = 0, largest = 0; // largest: elements of a piece
    for (size_t i = 0; i < n; i++) {
        size_t size = items[i].n_rows * items[i].n_cols;
        total += n_pieces(&items[i]);
        if (size > largest) largest = size < PIECE ? size : PIECE;
    }
    if (total == 0) return 0;
    size_t width = parallel_width(total);
    l.buffer_bytes = largest * sizeof(float);
    l.buffers = kernels->alloc_host(device, width * l.buffer_bytes);
    if (!l.buffers) return error_set(e, ERR_NOMEM, "no memory for %zu bytes to read weights into", width * l.buffer_bytes);
    parallel_run(width, load_pieces, &l);
    kernels->free_host(device, l.buffers);
    if (!l.failed) return 0;
    return error_set(e, l.error.code, "%s", l.error.message);
}
