#include "tokenizer/jinja_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 16, FIRST_CHUNK = 4096, LARGEST_CHUNK = 1 << 18 };

struct chunk {
    struct chunk *next;
    size_t bytes; // with this header
};

void jinja_fail(struct jinja *j, const char *format, ...)
{
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    snprintf(j->error, j->error_size, "line %d: %s", j->line, message);
    j->result = -1;
    longjmp(j->failed, 1);
}

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
}

// Chunks double, so that small templates cost little and large ones few calls.
static void add_chunk(struct jinja *j, size_t bytes)
{
    struct arena *a = &j->arena;
    size_t header = aligned(sizeof(struct chunk)), usual = a->used < FIRST_CHUNK ? FIRST_CHUNK : a->used;
    if (usual > LARGEST_CHUNK) usual = LARGEST_CHUNK;
    size_t room = a->limit - a->used;
    if (room < header || bytes > room - header) jinja_fail(j, "more than %zu bytes of memory", a->limit);
    size_t total = bytes + header > usual ? bytes + header : usual;
    if (total > room) total = room;
    struct chunk *chunk = malloc(total);
    if (!chunk) jinja_fail(j, "out of memory");
    *chunk = (struct chunk){a->chunks, total};
    a->chunks = chunk;
    a->used += total;
    a->at = (char *)chunk + header;
    a->left = total - header;
}

void *jinja_alloc(struct jinja *j, size_t bytes)
{
    if (bytes > SIZE_MAX / 2) jinja_fail(j, "out of memory");
    bytes = aligned(bytes);
    // What is left of a chunk when something does not fit is given up.
    if (j->arena.left < bytes) add_chunk(j, bytes);
    char *memory = j->arena.at;
    j->arena.at += bytes;
    j->arena.left -= bytes;
    return memset(memory, 0, bytes);
}

void *jinja_alloc_array(struct jinja *j, size_t n, size_t size)
{
    if (n > SIZE_MAX / 2 / size) jinja_fail(j, "out of memory");
    return jinja_alloc(j, n * size);
}

void jinja_arena_free(struct arena *arena)
{
    for (struct chunk *chunk = arena->chunks, *next; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    arena->chunks = NULL;
}

void jinja_charge(struct jinja *j, int64_t steps)
{
    if (steps > j->steps_left) jinja_fail(j, "too many steps");
    j->steps_left -= steps;
}

void jinja_enter(struct jinja *j)
{
    if (--j->depth_left < 0) jinja_fail(j, "nested too deeply");
}

void jinja_leave(struct jinja *j)
{
    j->depth_left++;
}

void jinja_emit(struct jinja *j, const char *data, size_t length)
{
    if (length > j->out_limit - j->out_length) jinja_fail(j, "more than %zu bytes of output", j->out_limit);
    size_t needed = j->out_length + length + 1; // and a NUL
    if (needed > j->out_capacity) {
        size_t capacity = j->out_capacity * 2 > needed ? j->out_capacity * 2 : needed < 1024 ? 1024 : needed;
        char *out = realloc(j->out, capacity);
        if (!out) jinja_fail(j, "out of memory");
        j->out = out;
        j->out_capacity = capacity;
    }
    if (length > 0) memcpy(j->out + j->out_length, data, length);
    j->out_length += length;
}

// ---- text under construction ----

static void reserve(struct builder *b, size_t more)
{
    if (more <= b->capacity - b->length) return;
    if (more > SIZE_MAX / 4) jinja_fail(b->j, "out of memory");
    size_t capacity = b->capacity * 2 > b->length + more ? b->capacity * 2 : b->length + more;
    char *data = jinja_alloc(b->j, capacity);
    if (b->length > 0) memcpy(data, b->data, b->length);
    b->data = data;
    b->capacity = capacity;
}

void jinja_add(struct builder *b, const char *data, size_t length)
{
    if (length == 0) return;
    reserve(b, length);
    memcpy(b->data + b->length, data, length);
    b->length += length;
}

void jinja_add_c(struct builder *b, const char *text)
{
    jinja_add(b, text, strlen(text));
}

void jinja_add_repeated(struct builder *b, const char *data, size_t length, int64_t times)
{
    if (times <= 0 || length == 0) return;
    if ((uint64_t)times > b->j->arena.limit / length) jinja_fail(b->j, "more than %zu bytes of memory", b->j->arena.limit);
    reserve(b, (size_t)times * length);
    for (int64_t i = 0; i < times; i++) jinja_add(b, data, length);
}

void jinja_add_char(struct builder *b, uint32_t c)
{
    char bytes[4];
    jinja_add(b, bytes, jinja_encode(c, bytes));
}
