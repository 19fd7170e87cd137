/* Calls: of what is ours, and of macros; and the global functions. */
#include "tokenizer/jinja_internal.h"

#include <stdio.h>
#include <string.h>

enum { MAX_RANGE = 100000 }; // the sandbox's

// ---- what is ours ----

// Which parameter has the name, -1: none.
static int32_t parameter(const char *params, const struct string *name)
{
    int32_t i = 0;
    for (const char *at = params; *at; i++) {
        size_t length = strcspn(at, " ");
        if (length == name->length && memcmp(at, name->data, length) == 0 && *at != '.') return i;
        at += length;
        at += *at == ' ';
    }
    return -1;
}

static int32_t count_params(const char *params)
{
    int32_t n = *params != '\0';
    for (; *params; params++) n += *params == ' ';
    return n;
}

static void bind(struct jinja *j, const struct builtin *b, const struct arguments *args, struct value given[JINJA_MAX_PARAMS])
{
    int32_t n = count_params(b->params);
    if (args->n > (size_t)n) jinja_fail(j, "%s takes at most %d arguments, %zu given", b->name, n, args->n);
    for (size_t i = 0; i < args->n; i++) given[i] = args->values[i];
    for (size_t i = 0; i < args->n_named; i++) {
        int32_t at = parameter(b->params, args->names[i]);
        int length = (int)(args->names[i]->length < 100 ? args->names[i]->length : 100);
        if (at < 0) jinja_fail(j, "%s got an unexpected keyword argument '%.*s'", b->name, length, args->names[i]->data);
        if (given[at].kind != V_MISSING) jinja_fail(j, "%s got '%.*s' twice", b->name, length, args->names[i]->data);
        given[at] = args->named[i];
    }
    for (int32_t i = 0; i < b->required; i++) {
        if (given[i].kind == V_MISSING) jinja_fail(j, "%s misses an argument", b->name);
    }
}

static struct value deferred(struct jinja *j, const struct builtin *b, struct value self, const struct value *given,
                             const struct arguments *args)
{
    struct value v = jinja_iterator(j, NULL);
    struct deferred *d = v.iterator->deferred = jinja_alloc(j, sizeof *d);
    *d = (struct deferred){.builtin = b, .self = self, .args = *args};
    memcpy(d->given, given, sizeof d->given);
    return v;
}

struct value jinja_call_builtin(struct jinja *j, const struct builtin *b, struct value self, const struct arguments *args)
{
    struct value given[JINJA_MAX_PARAMS] = {0};
    if (!b->call) jinja_fail(j, "'%s' is not supported", b->name);
    if (b->params[0] != '*') bind(j, b, args, given);
    if (b->lazy) return deferred(j, b, self, given, args);
    return b->call(j, self, given, args);
}

// ---- macros ----

static struct value named_argument(const struct arguments *args, const struct string *name, bool *used)
{
    for (size_t i = 0; i < args->n_named; i++) {
        if (!jinja_same_string(args->names[i], name)) continue;
        used[i] = true;
        return args->named[i];
    }
    return (struct value){.kind = V_MISSING};
}

static struct value not_provided(struct jinja *j, const struct string *name)
{
    struct builder b = {.j = j};
    jinja_add_c(&b, "parameter '");
    jinja_add(&b, name->data, name->length);
    jinja_add_c(&b, "' was not provided");
    jinja_add(&b, "", 1); // the NUL
    return jinja_hint(j, b.data);
}

// Parameters are bound in order, in the macro's own scope: a default sees those before it.
static void bind_parameters(struct jinja *j, const struct node *node, const struct arguments *args, bool *used)
{
    size_t first_default = node->list.n - node->args.values.n;
    for (size_t i = 0; i < node->list.n; i++) {
        const struct string *name = node->list.at[i]->name;
        struct value value = i < args->n ? args->values[i] : named_argument(args, name, used);
        if (value.kind == V_MISSING)
            value = i >= first_default ? jinja_eval(j, node->args.values.at[i - first_default]) : not_provided(j, name);
        jinja_bind_name(j, j->scope, name, value);
    }
}

static struct value rest_of_values(struct jinja *j, const struct arguments *args, size_t from)
{
    struct list *list = jinja_list_new(j, 0);
    for (size_t i = from; i < args->n; i++) jinja_append(j, list, args->values[i]);
    return jinja_tuple(list);
}

static struct value rest_of_named(struct jinja *j, const struct arguments *args, const bool *used)
{
    struct dict *d = jinja_dict_new(j);
    for (size_t i = 0; i < args->n_named; i++) {
        if (!used[i]) jinja_dict_set(j, d, (struct value){.kind = V_STRING, .string = args->names[i]}, args->named[i]);
    }
    return (struct value){.kind = V_DICT, .dict = d};
}

static void bind_specials(struct jinja *j, const struct node *node, const struct arguments *args, bool *used)
{
    const struct well_known *names = &j->template->names;
    if (node->takes_caller) {
        struct value caller = named_argument(args, names->caller, used);
        if (caller.kind == V_MISSING || caller.kind == V_NONE) caller = jinja_hint(j, "No caller defined");
        jinja_bind_name(j, j->scope, names->caller, caller);
    }
    if (node->takes_kwargs) jinja_bind_name(j, j->scope, names->kwargs, rest_of_named(j, args, used));
    for (size_t i = 0; i < args->n_named && !node->takes_kwargs; i++) {
        const struct string *name = args->names[i];
        if (!used[i]) jinja_fail(j, "macro takes no keyword argument '%.*s'", (int)(name->length & 127), name->data);
    }
    if (node->takes_varargs) jinja_bind_name(j, j->scope, names->varargs, rest_of_values(j, args, node->list.n));
    else if (args->n > node->list.n) jinja_fail(j, "macro takes not more than %zu arguments", node->list.n);
}

struct value jinja_call_macro(struct jinja *j, const struct macro *macro, const struct arguments *args)
{
    struct scope *outside = j->scope;
    int32_t line = j->line;
    bool *used = jinja_alloc(j, args->n_named + 1);
    jinja_enter(j);
    j->scope = jinja_scope_new(j, macro->scope);
    bind_parameters(j, macro->node, args, used);
    bind_specials(j, macro->node, args, used);
    struct value text = jinja_captured(j, &macro->node->body);
    j->scope = outside;
    j->line = line;
    jinja_leave(j);
    return text;
}

static struct value call_joiner(struct jinja *j, struct cycler *joiner, const struct arguments *args)
{
    if (args->n + args->n_named > 0) jinja_fail(j, "a joiner takes no arguments");
    return joiner->at++ == 0 ? jinja_string(j, "", 0) : joiner->items.items[0];
}

struct value jinja_call(struct jinja *j, struct value callee, struct arguments *args)
{
    switch (callee.kind) {
    case V_FUNCTION: return jinja_call_builtin(j, callee.function, jinja_none(), args);
    case V_METHOD: return jinja_call_builtin(j, callee.method->builtin, callee.method->self, args);
    case V_MACRO: return jinja_call_macro(j, callee.macro, args);
    case V_JOINER: return call_joiner(j, callee.cycler, args);
    case V_UNDEFINED: jinja_fail_undefined(j, callee);
    default: jinja_fail(j, "'%s' object is not callable", jinja_type(callee));
    }
}

// ---- global functions ----

static struct value call_range(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self;
    int64_t numbers[3] = {0, 0, 1};
    for (size_t i = 0; i < all->n; i++) {
        if (given[i].kind == V_NONE) jinja_fail(j, "'NoneType' object cannot be interpreted as an integer");
        numbers[all->n == 1 ? 1 : i] = jinja_int_argument(j, given[i], 0);
    }
    int64_t start = numbers[0], stop = numbers[1], step = numbers[2];
    if (step == 0) jinja_fail(j, "range() arg 3 must not be zero");
    // As unsigned: the distance may not fit otherwise.
    uint64_t distance = step > 0 ? (uint64_t)stop - (uint64_t)start : (uint64_t)start - (uint64_t)stop;
    uint64_t by = step > 0 ? (uint64_t)step : -(uint64_t)step, n = distance / by + (distance % by != 0);
    if (step > 0 ? start >= stop : start <= stop) n = 0;
    if (n > MAX_RANGE) jinja_fail(j, "Range too big. The sandbox blocks ranges larger than MAX_RANGE (%d).", MAX_RANGE);
    struct range *range = jinja_alloc(j, sizeof *range);
    *range = (struct range){start, stop, step, (int64_t)n};
    return (struct value){.kind = V_RANGE, .range = range};
}

static void add_pairs(struct jinja *j, struct dict *d, struct value source)
{
    if (source.kind == V_DICT) {
        for (size_t i = 0; i < source.dict->n; i++) jinja_dict_set(j, d, source.dict->keys[i], source.dict->values[i]);
        return;
    }
    struct list *pairs = jinja_items(j, source);
    for (size_t i = 0; i < pairs->n; i++) {
        struct list *pair = jinja_items(j, pairs->items[i]);
        if (pair->n != 2) jinja_fail(j, "dictionary update sequence element #%zu has length %zu; 2 is required", i, pair->n);
        jinja_dict_set(j, d, pair->items[0], pair->items[1]);
    }
}

static struct value call_dict(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self, (void)given;
    struct dict *d = jinja_dict_new(j);
    if (all->n > 1) jinja_fail(j, "dict expected at most 1 argument, got %zu", all->n);
    if (all->n == 1 && all->values[0].kind == V_UNDEFINED) jinja_fail_undefined(j, all->values[0]);
    if (all->n == 1) add_pairs(j, d, all->values[0]);
    for (size_t i = 0; i < all->n_named; i++)
        jinja_dict_set(j, d, (struct value){.kind = V_STRING, .string = all->names[i]}, all->named[i]);
    return (struct value){.kind = V_DICT, .dict = d};
}

static struct value call_namespace(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    struct value v = call_dict(j, self, given, all);
    v.kind = V_NAMESPACE;
    return v;
}

static struct value call_raise(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self, (void)all;
    const struct string *message = jinja_text(j, given[0]);
    int length = (int)(message->length < j->error_size ? message->length : j->error_size);
    snprintf(j->error, j->error_size, "%.*s", length, message->data);
    j->result = JINJA_RAISED;
    longjmp(j->failed, 1);
}

static struct value call_strftime(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self, (void)all;
    const struct string *format = jinja_string_argument(j, given[0]);
    char shown[512], *copy = jinja_alloc(j, format->length + 2);
    struct tm tm;
    copy[0] = ' '; // so that 0 means only that it did not fit
    memcpy(copy + 1, format->data, format->length);
    if (!localtime_r(&j->now, &tm)) jinja_fail(j, "the time cannot be shown");
    size_t length = strftime(shown, sizeof shown, copy, &tm);
    if (length == 0) jinja_fail(j, "strftime_now: more than %zu bytes", sizeof shown);
    return jinja_string_copy(j, shown + 1, length - 1);
}

static struct value call_cycler(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self, (void)given;
    if (all->n == 0 || all->n_named > 0) jinja_fail(j, "at least one item has to be provided");
    struct cycler *cycler = jinja_alloc(j, sizeof *cycler);
    cycler->items = (struct list){all->values, all->n, all->n};
    return (struct value){.kind = V_CYCLER, .cycler = cycler};
}

static struct value call_joiner_new(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)self, (void)all;
    struct cycler *joiner = jinja_alloc(j, sizeof *joiner);
    jinja_append(j, &joiner->items, given[0].kind == V_MISSING ? jinja_string(j, ", ", 2) : given[0]);
    return (struct value){.kind = V_JOINER, .cycler = joiner};
}

static const struct builtin functions[] = {
    {"range", call_range, ". . .", 1, false},
    {"namespace", call_namespace, "*", 0, false},
    {"dict", call_dict, "*", 0, false},
    {"raise_exception", call_raise, "message", 1, false},
    {"strftime_now", call_strftime, "format", 1, false},
    {"cycler", call_cycler, "*", 0, false},
    {"joiner", call_joiner_new, "sep", 0, false},
};

const struct builtin *jinja_find_function(const struct string *name)
{
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        if (jinja_is_c(name, functions[i].name)) return &functions[i];
    }
    return NULL;
}
