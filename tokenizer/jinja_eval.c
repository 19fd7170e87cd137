/* Expressions. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

static struct value eval_name(struct jinja *j, const struct string *name)
{
    for (const struct scope *scope = j->scope; scope; scope = scope->parent) {
        for (const struct binding *b = scope->first; b; b = b->next) {
            if (b->name == name) return b->value;
        }
    }
    struct value *variable = jinja_dict_find_string(j, j->variables, name);
    if (variable) return *variable;
    const struct builtin *function = jinja_find_function(name);
    if (function) return (struct value){.kind = V_FUNCTION, .function = function};
    struct undefined *u = jinja_alloc(j, sizeof *u);
    u->name = (struct value){.kind = V_STRING, .string = name};
    return (struct value){.kind = V_UNDEFINED, .undefined = u};
}

static struct list *eval_list(struct jinja *j, const struct nodes *nodes)
{
    struct list *list = jinja_list_new(j, nodes->n);
    for (size_t i = 0; i < nodes->n; i++) jinja_append(j, list, jinja_eval(j, nodes->at[i]));
    return list;
}

static struct value eval_dict(struct jinja *j, const struct nodes *nodes)
{
    struct dict *d = jinja_dict_new(j);
    for (size_t i = 0; i < nodes->n; i += 2) {
        struct value key = jinja_eval(j, nodes->at[i]);
        jinja_dict_set(j, d, key, jinja_eval(j, nodes->at[i + 1]));
    }
    return (struct value){.kind = V_DICT, .dict = d};
}

static struct value eval_arithmetic(struct jinja *j, const struct node *node)
{
    struct value left = jinja_eval(j, node->list.at[0]);
    for (size_t i = 1; i < node->list.n; i++) {
        struct value right = jinja_eval(j, node->list.at[i]);
        left = jinja_arithmetic(j, node->ops[i], left, right);
    }
    return left;
}

static bool compare(struct jinja *j, int32_t op, struct value a, struct value b)
{
    switch (op) {
    case T_EQ: return jinja_equal(j, a, b);
    case T_NE: return !jinja_equal(j, a, b);
    case '<': return jinja_ordered(j, ORDER_LT, a, b);
    case T_LE: return jinja_ordered(j, ORDER_LE, a, b);
    case '>': return jinja_ordered(j, ORDER_GT, a, b);
    case T_GE: return jinja_ordered(j, ORDER_GE, a, b);
    case OP_IN: return jinja_contains(j, b, a);
    default: return !jinja_contains(j, b, a);
    }
}

// a < b < c is a < b and b < c, with b evaluated once.
static struct value eval_compare(struct jinja *j, const struct node *node)
{
    struct value left = jinja_eval(j, node->list.at[0]);
    for (size_t i = 1; i < node->list.n; i++) {
        struct value right = jinja_eval(j, node->list.at[i]);
        if (!compare(j, node->ops[i], left, right)) return jinja_bool(false);
        left = right;
    }
    return jinja_bool(true);
}

static struct value eval_concat(struct jinja *j, const struct node *node)
{
    struct value text = jinja_to_string(j, jinja_eval(j, node->list.at[0]));
    for (size_t i = 1; i < node->list.n; i++)
        text = jinja_concatenate(j, text.string, jinja_text(j, jinja_eval(j, node->list.at[i])));
    return text;
}

static struct value eval_words(struct jinja *j, const struct node *node)
{
    struct value v = jinja_none();
    for (size_t i = 0; i < node->list.n; i++) {
        v = jinja_eval(j, node->list.at[i]);
        if (jinja_is_true(v) == (node->kind == N_OR)) break;
    }
    return v;
}

static struct value eval_condition(struct jinja *j, const struct node *node)
{
    if (jinja_is_true(jinja_eval(j, node->a))) return jinja_eval(j, node->b);
    if (node->c) return jinja_eval(j, node->c);
    return jinja_hint(j, "the inline if-expression evaluated to false and no else section was defined.");
}

static struct value eval_slice(struct jinja *j, const struct node *node)
{
    struct value parts[3], object = jinja_eval(j, node->a);
    for (int i = 0; i < 3; i++)
        parts[i] = node->list.at[i] ? jinja_eval(j, node->list.at[i]) : (struct value){.kind = V_MISSING};
    return jinja_slice(j, object, parts[0], parts[1], parts[2]);
}

// ---- calls ----

static void add_named(struct jinja *j, struct arguments *args, const struct string *name, struct value value)
{
    for (size_t i = 0; i < args->n_named; i++) {
        if (jinja_same_string(args->names[i], name)) jinja_fail(j, "a keyword argument twice");
    }
    args->names[args->n_named] = name;
    args->named[args->n_named++] = value;
}

static void eval_arguments(struct jinja *j, const struct call_arguments *call, struct arguments *args)
{
    *args = (struct arguments){0};
    struct list *values = eval_list(j, &call->values);
    if (call->star) {
        struct list *more = jinja_items(j, jinja_eval(j, call->star));
        for (size_t i = 0; i < more->n; i++) jinja_append(j, values, more->items[i]);
    }
    args->values = values->items;
    args->n = values->n;
    struct list *named = eval_list(j, &call->named);
    struct value more = call->star_star ? jinja_eval(j, call->star_star) : jinja_none();
    if (call->star_star && more.kind != V_DICT) jinja_fail(j, "a mapping is needed after **");
    size_t n = named->n + (call->star_star ? more.dict->n : 0);
    if (n == 0) return;
    args->names = jinja_alloc_array(j, n, sizeof *args->names);
    args->named = jinja_alloc_array(j, n, sizeof *args->named);
    for (size_t i = 0; i < named->n; i++) add_named(j, args, call->names[i], named->items[i]);
    for (size_t i = 0; call->star_star && i < more.dict->n; i++)
        add_named(j, args, jinja_string_argument(j, more.dict->keys[i]), more.dict->values[i]);
}

static struct value eval_call(struct jinja *j, const struct node *node)
{
    struct arguments args;
    struct value callee = jinja_eval(j, node->a);
    eval_arguments(j, &node->args, &args);
    j->line = node->line;
    return jinja_call(j, callee, &args);
}

static struct value apply(struct jinja *j, const struct node *node, struct value self)
{
    struct arguments args;
    eval_arguments(j, &node->args, &args);
    j->line = node->line;
    return jinja_call_builtin(j, node->builtin, self, &args);
}

struct value jinja_apply_filters(struct jinja *j, const struct node *node, struct value text)
{
    if (!node) return text;
    jinja_enter(j);
    struct value self = jinja_apply_filters(j, node->a, text);
    jinja_leave(j);
    return apply(j, node, self);
}

static struct value eval_kind(struct jinja *j, const struct node *node)
{
    struct value v;
    switch (node->kind) {
    case N_CONST: return node->value;
    case N_NAME: return eval_name(j, node->name);
    case N_LIST: return jinja_list(eval_list(j, &node->list));
    case N_TUPLE: return jinja_tuple(eval_list(j, &node->list));
    case N_DICT: return eval_dict(j, &node->list);
    case N_ARITHMETIC: return eval_arithmetic(j, node);
    case N_COMPARE: return eval_compare(j, node);
    case N_CONCAT: return eval_concat(j, node);
    case N_AND:
    case N_OR: return eval_words(j, node);
    case N_NOT: return jinja_bool(!jinja_is_true(jinja_eval(j, node->a)));
    case N_NEGATE: return jinja_negate(j, jinja_eval(j, node->a));
    case N_POSITIVE:
        v = jinja_eval(j, node->a);
        if (v.kind != V_FLOAT) v = jinja_negate(j, jinja_negate(j, v));
        return v;
    case N_CONDITION: return eval_condition(j, node);
    case N_ATTRIBUTE: return jinja_attribute(j, jinja_eval(j, node->a), node->attribute);
    case N_ITEM: v = jinja_eval(j, node->a); return jinja_item(j, v, jinja_eval(j, node->b));
    case N_SLICE: return eval_slice(j, node);
    case N_CALL: return eval_call(j, node);
    case N_FILTER:
    case N_TEST: return apply(j, node, jinja_eval(j, node->a));
    default: jinja_fail(j, "this is not an expression");
    }
}

struct value jinja_eval(struct jinja *j, const struct node *node)
{
    j->line = node->line;
    jinja_charge(j, 1);
    jinja_enter(j);
    struct value v = eval_kind(j, node);
    jinja_leave(j);
    return v;
}
