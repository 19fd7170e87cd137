/* Statements. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

enum jump { GO_ON, BREAK, CONTINUE };

struct loop {
    struct walk walk;
    const struct node *node;
    struct scope *outside;            // where the condition of the loop is evaluated
    struct value previous, current;   // items; V_MISSING: none
    struct value after;               // already taken, to know whether there is one
    bool has_after;
    int64_t index0;
    int64_t length;                   // -1: not known yet
    struct value changed;             // what loop.changed() was last called with
};

static enum jump exec_body(struct jinja *j, const struct nodes *body);

// ---- scopes ----

struct scope *jinja_scope_new(struct jinja *j, struct scope *parent)
{
    struct scope *scope = jinja_alloc(j, sizeof *scope);
    scope->parent = parent;
    return scope;
}

void jinja_bind_name(struct jinja *j, struct scope *scope, const struct string *name, struct value value)
{
    for (struct binding *b = scope->first; b; b = b->next) {
        if (b->name != name) continue;
        b->value = value;
        return;
    }
    struct binding *b = jinja_alloc(j, sizeof *b);
    *b = (struct binding){name, value, scope->first};
    scope->first = b;
}

static void assign_member(struct jinja *j, const struct node *target, struct value value)
{
    struct node name = {.kind = N_NAME, .line = target->line, .name = target->name};
    struct value object = jinja_eval(j, &name);
    if (object.kind != V_NAMESPACE) jinja_fail(j, "cannot assign attribute on non-namespace object");
    jinja_dict_set(j, object.dict, (struct value){.kind = V_STRING, .string = target->attribute}, value);
}

void jinja_assign(struct jinja *j, const struct node *target, struct value value)
{
    jinja_charge(j, 1);
    if (target->kind == N_NAME) {
        jinja_bind_name(j, j->scope, target->name, value);
    } else if (target->kind == N_MEMBER_NAME) {
        assign_member(j, target, value);
    } else {
        struct list *items = jinja_items(j, value);
        if (items->n != target->list.n)
            jinja_fail(j, "%zu values to unpack, expected %zu", items->n, target->list.n);
        jinja_enter(j);
        for (size_t i = 0; i < items->n; i++) jinja_assign(j, target->list.at[i], items->items[i]);
        jinja_leave(j);
    }
}

// ---- captured text ----

// What was put out since start, taken back.
static struct value taken(struct jinja *j, size_t start)
{
    struct value text = jinja_string_copy(j, j->out + start, j->out_length - start);
    j->out_length = start;
    return text;
}

// ---- for ----

static bool passes(struct jinja *j, struct loop *loop, struct value item)
{
    if (!loop->node->c) return true;
    struct scope *inside = j->scope;
    j->scope = jinja_scope_new(j, loop->outside);
    jinja_assign(j, loop->node->a, item);
    bool result = jinja_is_true(jinja_eval(j, loop->node->c));
    j->scope = inside;
    return result;
}

// The next item that the condition lets through. Conditions are evaluated as late as Jinja2 does: bodies may change what they see.
static bool take(struct jinja *j, struct loop *loop, struct value *item)
{
    if (loop->has_after) {
        loop->has_after = false;
        *item = loop->after;
        return true;
    }
    while (jinja_next(j, &loop->walk, item)) {
        if (passes(j, loop, *item)) return true;
    }
    return false;
}

static bool peek(struct jinja *j, struct loop *loop)
{
    struct value item;
    if (loop->has_after) return true;
    if (!take(j, loop, &item)) return false;
    loop->after = item;
    loop->has_after = true;
    return true;
}

// Where the length cannot be asked for, all items are taken first.
static int64_t loop_length(struct jinja *j, struct loop *loop)
{
    size_t n;
    if (loop->length >= 0) return loop->length;
    if (!loop->node->c && jinja_has_length(loop->walk.source, &n)) {
        loop->length = (int64_t)n;
        return loop->length;
    }
    struct value item, after = loop->after;
    bool has_after = loop->has_after;
    struct list *rest = jinja_list_new(j, 0);
    loop->has_after = false;
    while (take(j, loop, &item)) jinja_append(j, rest, item);
    static const struct node unconditional = {.kind = N_FOR};
    loop->node = &unconditional; // they have passed
    loop->walk = (struct walk){.source = jinja_list(rest)};
    loop->after = after;
    loop->has_after = has_after;
    loop->length = (int64_t)rest->n + loop->index0 + 1 + has_after;
    return loop->length;
}

static struct value loop_cycle(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)given;
    if (all->n == 0 || all->n_named > 0) jinja_fail(j, "no items for cycling given");
    return all->values[self.loop->index0 % (int64_t)all->n];
}

static struct value loop_changed(struct jinja *j, struct value self, const struct value *given, const struct arguments *all)
{
    (void)given;
    struct list *values = jinja_list_new(j, all->n);
    for (size_t i = 0; i < all->n; i++) jinja_append(j, values, all->values[i]);
    struct value now = jinja_tuple(values);
    if (self.loop->changed.kind != V_MISSING && jinja_equal(j, self.loop->changed, now)) return jinja_bool(false);
    self.loop->changed = now;
    return jinja_bool(true);
}

static struct value loop_method(struct jinja *j, struct loop *loop, bool cycle)
{
    static const struct builtin methods[] = {{"changed", loop_changed, "*", 0, false}, {"cycle", loop_cycle, "*", 0, false}};
    struct method *method = jinja_alloc(j, sizeof *method);
    *method = (struct method){&methods[cycle], {.kind = V_LOOP, .loop = loop}};
    return (struct value){.kind = V_METHOD, .method = method};
}

struct value jinja_loop_attribute(struct jinja *j, struct loop *loop, const struct string *name)
{
    if (jinja_is_c(name, "index0")) return jinja_int(loop->index0);
    if (jinja_is_c(name, "index")) return jinja_int(loop->index0 + 1);
    if (jinja_is_c(name, "first")) return jinja_bool(loop->index0 == 0);
    if (jinja_is_c(name, "last")) return jinja_bool(!peek(j, loop));
    if (jinja_is_c(name, "length")) return jinja_int(loop_length(j, loop));
    if (jinja_is_c(name, "revindex")) return jinja_int(loop_length(j, loop) - loop->index0);
    if (jinja_is_c(name, "revindex0")) return jinja_int(loop_length(j, loop) - loop->index0 - 1);
    if (jinja_is_c(name, "depth")) return jinja_int(1);
    if (jinja_is_c(name, "depth0")) return jinja_int(0);
    if (jinja_is_c(name, "previtem")) return loop->index0 > 0 ? loop->previous : jinja_hint(j, "there is no previous item");
    if (jinja_is_c(name, "nextitem")) return peek(j, loop) ? loop->after : jinja_hint(j, "there is no next item");
    if (jinja_is_c(name, "cycle")) return loop_method(j, loop, true);
    if (jinja_is_c(name, "changed")) return loop_method(j, loop, false);
    return (struct value){.kind = V_MISSING};
}

static enum jump iterate(struct jinja *j, const struct node *node, struct loop *loop, struct value item)
{
    loop->index0++;
    loop->previous = loop->current;
    loop->current = item;
    j->scope = jinja_scope_new(j, loop->outside); // what a body sets is gone in the next round
    jinja_assign(j, node->a, item);
    jinja_bind_name(j, j->scope, j->template->names.loop, (struct value){.kind = V_LOOP, .loop = loop});
    return exec_body(j, &node->body);
}

static enum jump exec_for(struct jinja *j, const struct node *node)
{
    struct value item;
    struct scope *outside = j->scope;
    struct loop *loop = jinja_alloc(j, sizeof *loop);
    *loop = (struct loop){.node = node, .outside = outside, .index0 = -1, .length = -1};
    jinja_walk(j, &loop->walk, jinja_eval(j, node->b));
    bool any = false; // Jinja2 counts rounds that were gone through to the end
    for (enum jump round = GO_ON; round != BREAK && take(j, loop, &item); any |= round == GO_ON)
        round = iterate(j, node, loop, item);
    enum jump jump = GO_ON;
    if (!any && node->other.n > 0) {
        j->scope = jinja_scope_new(j, outside);
        jump = exec_body(j, &node->other); // of a loop around this one
    }
    j->scope = outside;
    return jump;
}

// ---- the others ----

static enum jump exec_if(struct jinja *j, const struct node *node)
{
    for (; node; node = node->b) {
        if (jinja_is_true(jinja_eval(j, node->a))) return exec_body(j, &node->body);
        if (!node->b) return exec_body(j, &node->other);
    }
    return GO_ON;
}

// The body in a scope of its own; its text through the filters, into *text. A jump out of it leaves no text.
static enum jump exec_captured(struct jinja *j, const struct node *node, struct value *text)
{
    struct scope *outside = j->scope;
    size_t start = j->out_length;
    j->scope = jinja_scope_new(j, outside);
    enum jump jump = exec_body(j, &node->body);
    *text = taken(j, start);
    if (jump == GO_ON) *text = jinja_apply_filters(j, node->b, *text);
    j->scope = outside;
    return jump;
}

static enum jump exec_set_block(struct jinja *j, const struct node *node)
{
    struct value text;
    enum jump jump = exec_captured(j, node, &text);
    if (jump == GO_ON) jinja_assign(j, node->a, text);
    return jump;
}

static enum jump exec_filter_block(struct jinja *j, const struct node *node)
{
    struct value text;
    enum jump jump = exec_captured(j, node, &text);
    if (jump != GO_ON) return jump;
    const struct string *s = jinja_text(j, text);
    jinja_emit(j, s->data, s->length);
    return GO_ON;
}

static struct value macro_of(struct jinja *j, const struct node *node)
{
    struct macro *macro = jinja_alloc(j, sizeof *macro);
    *macro = (struct macro){node, j->scope};
    return (struct value){.kind = V_MACRO, .macro = macro};
}

// The caller is passed as a keyword argument: behind those of the call, in a copy of its node.
static void exec_call_block(struct jinja *j, const struct node *node)
{
    struct node call = *node->b, caller = {.kind = N_CONST, .line = node->line, .value = macro_of(j, node)};
    size_t n = call.args.named.n;
    const struct string **names = jinja_alloc_array(j, n + 1, sizeof *names);
    if (n > 0) memcpy(names, call.args.names, n * sizeof *names);
    names[n] = j->template->names.caller;
    struct nodes named = {.at = jinja_alloc_array(j, n + 1, sizeof *named.at), .n = n + 1, .capacity = n + 1};
    if (n > 0) memcpy(named.at, call.args.named.at, n * sizeof *named.at);
    named.at[n] = &caller;
    call.args.named = named;
    call.args.names = names;
    const struct string *s = jinja_text(j, jinja_eval(j, &call));
    jinja_emit(j, s->data, s->length);
}

static enum jump exec_with(struct jinja *j, const struct node *node)
{
    struct scope *outside = j->scope, *inside = jinja_scope_new(j, outside);
    for (size_t i = 0; i < node->list.n; i += 2) {
        j->scope = outside;
        struct value value = jinja_eval(j, node->list.at[i + 1]);
        j->scope = inside;
        jinja_assign(j, node->list.at[i], value);
    }
    j->scope = inside;
    enum jump jump = exec_body(j, &node->body);
    j->scope = outside;
    return jump;
}

static void exec_print(struct jinja *j, const struct node *node)
{
    struct value v = jinja_eval(j, node->a);
    j->line = node->line;
    const struct string *s = jinja_text(j, v);
    jinja_emit(j, s->data, s->length);
}

static enum jump exec_statement(struct jinja *j, const struct node *node)
{
    switch (node->kind) {
    case N_TEXT: jinja_emit(j, node->value.string->data, node->value.string->length); return GO_ON;
    case N_PRINT: exec_print(j, node); return GO_ON;
    case N_FOR: return exec_for(j, node);
    case N_IF: return exec_if(j, node);
    case N_SET: jinja_assign(j, node->a, jinja_eval(j, node->b)); return GO_ON;
    case N_SET_BLOCK: return exec_set_block(j, node);
    case N_FILTER_BLOCK: return exec_filter_block(j, node);
    case N_MACRO: jinja_bind_name(j, j->scope, node->name, macro_of(j, node)); return GO_ON;
    case N_CALL_BLOCK: exec_call_block(j, node); return GO_ON;
    case N_WITH:
    case N_SCOPE: return exec_with(j, node);
    case N_BREAK: return BREAK;
    case N_CONTINUE: return CONTINUE;
    default: jinja_fail(j, "this is not a statement");
    }
}

static enum jump exec_body(struct jinja *j, const struct nodes *body)
{
    enum jump jump = GO_ON;
    jinja_enter(j);
    for (size_t i = 0; i < body->n && jump == GO_ON; i++) {
        j->line = body->at[i]->line;
        jinja_charge(j, 1);
        jump = exec_statement(j, body->at[i]);
    }
    jinja_leave(j);
    return jump;
}

void jinja_exec(struct jinja *j, const struct nodes *body)
{
    exec_body(j, body);
}

struct value jinja_captured(struct jinja *j, const struct nodes *body)
{
    size_t start = j->out_length;
    exec_body(j, body);
    return taken(j, start);
}
