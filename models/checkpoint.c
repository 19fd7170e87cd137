#include "models/checkpoint.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "models/json.h"

#define SINGLE_NAME "model.safetensors"
#define INDEX_NAME "model.safetensors.index.json"

enum { MAX_INDEX = 100000000, MAX_PATH = 4096 };

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 // Linux 5.14
#endif

static int file_open(struct checkpoint *c, const char *dir, const char *name, struct error *e)
{
    char path[MAX_PATH];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path) {
        return error_set(e, ERR_IO, "%.200s: the path is too long", name);
    }
    int rc = safetensors_open(&c->files[c->n_files], path, e);
    if (!rc) c->n_files++;
    return rc;
}

static int compare_strings(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Opens every file that the index names, in the order of their names. names is scratch for n of them.
static int shards_open(struct checkpoint *c, const char *dir, const cJSON *map, const char **names, struct error *e)
{
    size_t n = 0;
    const cJSON *entry;
    cJSON_ArrayForEach(entry, map) {
        if (!cJSON_IsString(entry) || strchr(entry->valuestring, '/')) {
            return error_set(e, ERR_FORMAT, "%s: weight_map: %.200s: not a file's name", INDEX_NAME, entry->string);
        }
        names[n++] = entry->valuestring;
    }
    qsort(names, n, sizeof *names, compare_strings);
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && strcmp(names[i - 1], names[i]) == 0) continue;
        int rc = file_open(c, dir, names[i], e);
        if (rc) return rc;
    }
    return 0;
}

static int index_open(struct checkpoint *c, const char *dir, const cJSON *index, struct error *e)
{
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(index, "weight_map"), *entry;
    if (!cJSON_IsObject(map)) return error_set(e, ERR_FORMAT, "%s: weight_map: not an object", INDEX_NAME);
    size_t n = 0;
    cJSON_ArrayForEach(entry, map) n++;
    const char **names = calloc(n + 1, sizeof *names);
    c->files = calloc(n + 1, sizeof *c->files);
    int rc = names && c->files ? 0 : error_set(e, ERR_NOMEM, "out of memory for %zu names", n);
    if (!rc) rc = shards_open(c, dir, map, names, e);
    free(names);
    return rc;
}

static int compare_tensors(const void *a, const void *b)
{
    const struct safetensors_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static int tensors_collect(struct checkpoint *c, struct error *e)
{
    size_t n = 0;
    for (size_t i = 0; i < c->n_files; i++) n += c->files[i].n_tensors;
    c->tensors = calloc(n + 1, sizeof *c->tensors);
    if (!c->tensors) return error_set(e, ERR_NOMEM, "out of memory for %zu tensors", n);
    for (size_t i = 0; i < c->n_files; i++) {
        for (size_t j = 0; j < c->files[i].n_tensors; j++) c->tensors[c->n_tensors++] = &c->files[i].tensors[j];
    }
    qsort(c->tensors, n, sizeof *c->tensors, compare_tensors);
    for (size_t i = 1; i < n; i++) {
        if (compare_tensors(&c->tensors[i - 1], &c->tensors[i]) == 0) {
            return error_set(e, ERR_FORMAT, "%.200s: in more than one file", c->tensors[i]->name);
        }
    }
    return 0;
}

// Each tensor must be in the file that the index names for it: a shard left over from elsewhere is not served.
static int index_check(const struct checkpoint *c, const cJSON *index, struct error *e)
{
    const cJSON *entry;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItemCaseSensitive(index, "weight_map")) {
        const struct safetensors_tensor *t = checkpoint_find(c, entry->string);
        const char *path = t ? safetensors_file_at(t->data) : NULL;
        const char *slash = path ? strrchr(path, '/') : NULL;
        if (!t || (t->size > 0 && (!slash || strcmp(slash + 1, entry->valuestring)))) {
            return error_set(e, ERR_FORMAT, "%s: %.150s is not in %.150s", INDEX_NAME, entry->string,
                             entry->valuestring);
        }
    }
    return 0;
}

int checkpoint_open(struct checkpoint *c, const char *dir, struct error *e)
{
    memset(c, 0, sizeof *c);
    char path[MAX_PATH];
    cJSON *index = NULL;
    int rc;
    if (snprintf(path, sizeof path, "%s/%s", dir, SINGLE_NAME) >= (int)sizeof path) {
        return error_set(e, ERR_IO, "%.200s: the path is too long", dir);
    }
    if (access(path, F_OK) == 0) {
        c->files = calloc(1, sizeof *c->files);
        rc = c->files ? file_open(c, dir, SINGLE_NAME, e) : error_set(e, ERR_NOMEM, "out of memory");
    } else {
        rc = json_read(&index, dir, INDEX_NAME, MAX_INDEX, e);
        if (rc == ERR_IO) rc = error_set(e, ERR_IO, "%.200s: neither %s nor %s", dir, SINGLE_NAME, INDEX_NAME);
        if (!rc) rc = index_open(c, dir, index, e);
    }
    if (!rc) rc = tensors_collect(c, e);
    if (!rc && index) rc = index_check(c, index, e);
    cJSON_Delete(index);
    if (rc) checkpoint_close(c);
    return rc;
}

void checkpoint_close(struct checkpoint *c)
{
    for (size_t i = 0; i < c->n_files; i++) safetensors_close(&c->files[i]);
    free(c->files);
    free(c->tensors);
    memset(c, 0, sizeof *c);
}

struct safetensors_tensor *checkpoint_find(const struct checkpoint *c, const char *name)
{
    struct safetensors_tensor wanted = {.name = name}, *key = &wanted, **found;
    if (c->n_tensors == 0) return NULL;
    found = bsearch(&key, c->tensors, c->n_tensors, sizeof *c->tensors, compare_tensors);
    return found ? *found : NULL;
}

int checkpoint_populate(const struct checkpoint *c, struct error *e)
{
    for (size_t i = 0; i < c->n_files; i++) {
        const struct safetensors *st = &c->files[i];
        if (madvise(st->map, st->map_size, MADV_POPULATE_READ) == 0) continue;
        if (errno != EINVAL) return error_set(e, ERR_IO, "%.300s: cannot be read whole: %m", st->path);
        madvise(st->map, st->map_size, MADV_WILLNEED); // an older kernel: at least start reading
    }
    return 0;
}

static const struct safetensors *file_at(const struct checkpoint *c, const void *address)
{
    const struct safetensors *st = c->files;
    while ((uintptr_t)address - (uintptr_t)st->map >= st->map_size) st++;
    return st;
}

int checkpoint_read(const struct checkpoint *c, void *to, const void *from, size_t n, struct error *e)
{
    const struct safetensors *st = file_at(c, from);
    char *at = to;
    off_t offset = (const char *)from - (const char *)st->map;
    while (n > 0) {
        ssize_t got = pread(st->fd, at, n, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return error_set(e, ERR_IO, "%.200s: cannot be read: %m", st->path);
        if (got == 0) return error_set(e, ERR_IO, "%.200s: was cut short", st->path);
        at += got, offset += got, n -= (size_t)got;
    }
    return 0;
}

void checkpoint_read_end(struct checkpoint *c)
{
    for (size_t i = 0; i < c->n_files; i++) {
        close(c->files[i].fd);
        c->files[i].fd = -1;
    }
}
