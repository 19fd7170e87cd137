#include "tokenizer/jinja.h"

#include "tokenizer/jinja_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SOURCE_BYTES = 1 << 22, MAX_TEMPLATE_BYTES = 1 << 28 };

const struct jinja_limits jinja_default_limits = {
    .steps = 4000000, .depth = 200, .memory_bytes = 256000000, .output_bytes = 64000000};

// The only setjmp: nothing here lives in a local variable across it.
static int run(struct jinja *j, void (*work)(struct jinja *j, void *data), void *data)
{
    if (setjmp(j->failed)) return j->result;
    work(j, data);
    return 0;
}

struct parse_job {
    const char *source;
    size_t length;
    struct nodes body;
    struct well_known names;
};

static void parse(struct jinja *j, void *data)
{
    struct parse_job *job = data;
    struct parser p = {.j = j, .names = jinja_dict_new(j), .assigned = jinja_dict_new(j)};
    p.known.loop = jinja_intern(&p, jinja_string_c(j, "loop").string);
    p.known.caller = jinja_intern(&p, jinja_string_c(j, "caller").string);
    p.known.varargs = jinja_intern(&p, jinja_string_c(j, "varargs").string);
    p.known.kwargs = jinja_intern(&p, jinja_string_c(j, "kwargs").string);
    p.at = jinja_tokenize(j, job->source, job->length);
    jinja_parse(&p, &job->body);
    job->names = p.known;
}

int jinja_create(struct jinja_template **out, const char *source, size_t length, char *error, size_t error_size)
{
    struct parse_job job = {.source = source, .length = length};
    struct jinja j = {.error = error, .error_size = error_size, .arena.limit = MAX_TEMPLATE_BYTES, .line = 1};
    j.steps_left = INT64_MAX;
    j.depth_left = JINJA_MAX_DEPTH;
    *out = NULL;
    if (length > MAX_SOURCE_BYTES) {
        snprintf(error, error_size, "line 1: more than %d bytes", MAX_SOURCE_BYTES);
        return -1;
    }
    struct jinja_template *t = malloc(sizeof *t);
    if (!t) snprintf(error, error_size, "line 1: out of memory");
    if (!t || run(&j, parse, &job)) {
        jinja_arena_free(&j.arena);
        free(t);
        return -1;
    }
    *t = (struct jinja_template){.arena = j.arena, .body = job.body, .names = job.names};
    *out = t;
    return 0;
}

void jinja_destroy(struct jinja_template *t)
{
    if (!t) return;
    jinja_arena_free(&t->arena);
    free(t);
}

static void render(struct jinja *j, void *data)
{
    const cJSON *variables = data;
    jinja_emit(j, "", 0); // room for the NUL
    struct value v = variables ? jinja_from_json(j, variables) : jinja_none();
    j->variables = v.kind == V_DICT ? v.dict : jinja_dict_new(j);
    j->scope = jinja_scope_new(j, NULL);
    jinja_exec(j, &j->template->body);
    j->out[j->out_length] = '\0';
}

int jinja_render(const struct jinja_template *t, const cJSON *variables, const struct jinja_limits *limits, time_t now,
                 char **text, size_t *length, char *error, size_t error_size)
{
    struct jinja j = {.error = error, .error_size = error_size, .template = t, .line = 1, .now = now};
    j.arena.limit = limits->memory_bytes;
    j.steps_left = limits->steps;
    j.depth_left = limits->depth < JINJA_MAX_DEPTH ? limits->depth : JINJA_MAX_DEPTH;
    j.out_limit = limits->output_bytes < SIZE_MAX / 4 ? limits->output_bytes : SIZE_MAX / 4;
    int result = run(&j, render, (void *)variables);
    jinja_arena_free(&j.arena);
    if (result) {
        free(j.out);
        return result;
    }
    *text = j.out;
    *length = j.out_length;
    return 0;
}
