#include "models/safetensors.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "models/json.h"

enum { MAX_HEADER = 100000000 };
static const double MAX_EXACT = 9007199254740992.0; // 2^53: whole numbers up to here are exact in a double

static const struct { const char *name; size_t bits; int32_t dtype; } types[] = {
    {"F32", 32, DTYPE_F32}, {"F16", 16, DTYPE_F16}, {"BF16", 16, DTYPE_BF16},
    {"BOOL", 8, -1},        {"U8", 8, -1},          {"I8", 8, -1},
    {"F8_E5M2", 8, -1},     {"F8_E4M3", 8, -1},     {"I16", 16, -1},
    {"U16", 16, -1},        {"I32", 32, -1},        {"U32", 32, -1},
    {"F64", 64, -1},        {"I64", 64, -1},        {"U64", 64, -1},
};

static _Atomic(struct safetensors *) mapped_files;

// A whole number from an array's element. Returns false if it is none.
static bool size_get(const cJSON *item, size_t *out)
{
    if (!cJSON_IsNumber(item)) return false;
    double v = item->valuedouble;
    if (!(v >= 0 && v <= MAX_EXACT) || v != floor(v)) return false;
    *out = (size_t)v;
    return true;
}

// Fills the shape; *n_elements is the product of all dimensions.
static int shape_parse(struct safetensors_tensor *t, const cJSON *shape, size_t *n_elements, struct error *e)
{
    if (!cJSON_IsArray(shape)) return error_set(e, ERR_FORMAT, "shape is not an array");
    *n_elements = 1;
    const cJSON *item;
    cJSON_ArrayForEach(item, shape) {
        size_t dim;
        if (!size_get(item, &dim)) return error_set(e, ERR_FORMAT, "shape holds something that is no size");
        if (__builtin_mul_overflow(*n_elements, dim, n_elements)) return error_set(e, ERR_FORMAT, "shape overflows");
        if (t->n_dims < MAX_DIMS) t->shape[t->n_dims] = dim;
        t->n_dims++;
    }
    return 0;
}

// Checks one entry of the header against data [data_size]; fills t but for its name.
static int tensor_parse(struct safetensors_tensor *t, const cJSON *entry, const char *data, size_t data_size,
                        struct error *e)
{
    if (!cJSON_IsObject(entry)) return error_set(e, ERR_FORMAT, "not an object");
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    if (!cJSON_IsString(dtype)) return error_set(e, ERR_FORMAT, "dtype is not a string");
    size_t n_bits = 0;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (strcmp(types[i].name, dtype->valuestring)) continue;
        t->type = types[i].name, t->dtype = types[i].dtype, n_bits = types[i].bits;
    }
    if (n_bits == 0) return error_set(e, ERR_UNSUPPORTED, "dtype %.20s is unknown", dtype->valuestring);
    size_t n_elements = 0, begin, end;
    int rc = shape_parse(t, shape, &n_elements, e);
    if (rc) return rc;
    const cJSON *first = cJSON_IsArray(offsets) ? offsets->child : NULL;
    if (!first || !first->next || first->next->next || !size_get(first, &begin) || !size_get(first->next, &end)) {
        return error_set(e, ERR_FORMAT, "data_offsets are not two sizes");
    }
    if (begin > end || end > data_size) {
        return error_set(e, ERR_FORMAT, "data_offsets %zu to %zu do not lie in %zu bytes", begin, end, data_size);
    }
    size_t expected;
    if (__builtin_mul_overflow(n_elements, n_bits / 8, &expected) || expected != end - begin) {
        return error_set(e, ERR_FORMAT, "its shape does not need the %zu bytes it has", end - begin);
    }
    t->data = data + begin, t->size = end - begin;
    return 0;
}

static int metadata_check(const cJSON *metadata, struct error *e)
{
    const cJSON *item;
    bool ok = cJSON_IsObject(metadata);
    cJSON_ArrayForEach(item, metadata) ok = ok && cJSON_IsString(item);
    return ok ? 0 : error_set(e, ERR_FORMAT, "__metadata__ is not an object of strings");
}

// Empty tensors lie before the one that begins where they do.
static int compare_data(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->data != y->data) return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->size > y->size) - (x->size < y->size);
}

// The data must be covered without holes or overlaps, to its last byte. Sorts the tensors.
static int layout_check(struct safetensors *st, const char *data, size_t data_size, struct error *e)
{
    if (st->n_tensors) qsort(st->tensors, st->n_tensors, sizeof *st->tensors, compare_data);
    const char *at = data;
    for (size_t i = 0; i < st->n_tensors; i++) {
        const struct safetensors_tensor *t = &st->tensors[i];
        if (t->data != at) {
            return error_set(e, ERR_FORMAT, "%.200s: its data leaves a hole or overlaps", t->name);
        }
        at += t->size;
    }
    if (at == data + data_size) return 0;
    return error_set(e, ERR_FORMAT, "%zu bytes follow the last tensor", (size_t)(data + data_size - at));
}

// Allocates for, and fills, one tensor per entry of the header.
static int entries_parse(struct safetensors *st, const cJSON *root, const char *data, size_t data_size, struct error *e)
{
    size_t n = 0, names_size = 0;
    const cJSON *entry;
    cJSON_ArrayForEach(entry, root) n++, names_size += strlen(entry->string) + 1;
    st->tensors = calloc(n ? n : 1, sizeof *st->tensors);
    st->names = malloc(names_size ? names_size : 1);
    if (!st->tensors || !st->names) return error_set(e, ERR_NOMEM, "out of memory for %zu tensors", n);
    char *name = st->names;
    cJSON_ArrayForEach(entry, root) {
        if (strcmp(entry->string, "__metadata__") == 0) {
            int rc = metadata_check(entry, e);
            if (rc) return rc;
            continue;
        }
        struct safetensors_tensor *t = &st->tensors[st->n_tensors++];
        int rc = tensor_parse(t, entry, data, data_size, e);
        if (rc) return error_prefix(e, "%.200s", entry->string);
        t->name = name;
        name = stpcpy(name, entry->string) + 1;
    }
    return 0;
}

int safetensors_parse(struct safetensors *st, const void *bytes, size_t size, struct error *e)
{
    memset(st, 0, sizeof *st);
    st->fd = -1;
    const unsigned char *b = bytes;
    if (size < 8) return error_set(e, ERR_FORMAT, "%zu bytes are too few for a safetensors file", size);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | b[i];
    if (n > MAX_HEADER) return error_set(e, ERR_FORMAT, "a header of %ju bytes is too large", (uintmax_t)n);
    if (n > size - 8) return error_set(e, ERR_FORMAT, "the file ends inside its header");
    if (n == 0 || b[8] != '{') return error_set(e, ERR_FORMAT, "the header does not start with {");
    const char *header = (const char *)b + 8, *data = header + n;
    size_t data_size = size - 8 - n;
    cJSON *root;
    int rc = json_parse(&root, header, n, e);
    if (rc) return error_prefix(e, "header");
    rc = entries_parse(st, root, data, data_size, e);
    if (!rc) rc = layout_check(st, data, data_size, e);
    cJSON_Delete(root);
    if (rc) safetensors_close(st);
    return rc;
}

static int map_file(void **map, size_t *size, int *file, const char *path, struct error *e)
{
    int fd = *file = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return error_set(e, ERR_IO, "cannot be opened: %m");
    struct stat s;
    int rc = 0;
    if (fstat(fd, &s) < 0) {
        rc = error_set(e, ERR_IO, "cannot be examined: %m");
    } else if (!S_ISREG(s.st_mode) || s.st_size == 0) {
        rc = error_set(e, ERR_FORMAT, s.st_size ? "not a regular file" : "empty");
    } else {
        *size = (size_t)s.st_size;
        *map = mmap(NULL, *size, PROT_READ, MAP_SHARED, fd, 0);
        if (*map == MAP_FAILED) rc = error_set(e, ERR_IO, "cannot be mapped: %m");
    }
    if (rc) close(fd);
    return rc;
}

int safetensors_open(struct safetensors *st, const char *path, struct error *e)
{
    memset(st, 0, sizeof *st);
    void *map = NULL;
    size_t size = 0;
    int fd, rc = map_file(&map, &size, &fd, path, e);
    if (rc) return error_prefix(e, "%.300s", path);
    rc = safetensors_parse(st, map, size, e);
    char *name = rc ? NULL : strdup(path);
    if (!name) {
        if (!rc) rc = error_set(e, ERR_NOMEM, "out of memory");
        munmap(map, size);
        close(fd);
        safetensors_close(st);
        return error_prefix(e, "%.300s", path);
    }
    st->map = map, st->map_size = size, st->path = name, st->fd = fd;
    st->next = atomic_load(&mapped_files);
    atomic_store(&mapped_files, st);
    return 0;
}

static void unlist(struct safetensors *st)
{
    if (atomic_load(&mapped_files) == st) {
        atomic_store(&mapped_files, st->next);
        return;
    }
    struct safetensors *before = atomic_load(&mapped_files);
    while (before && before->next != st) before = before->next;
    if (before) before->next = st->next;
}

void safetensors_close(struct safetensors *st)
{
    if (st->map) {
        unlist(st);
        munmap(st->map, st->map_size);
        if (st->fd >= 0) close(st->fd);
    }
    free(st->path);
    free(st->tensors);
    free(st->names);
    memset(st, 0, sizeof *st);
}

const char *safetensors_file_at(const void *address)
{
    for (struct safetensors *st = atomic_load(&mapped_files); st; st = st->next) {
        if ((uintptr_t)address - (uintptr_t)st->map < st->map_size) return st->path;
    }
    return NULL;
}
