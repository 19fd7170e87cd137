/* Statements. Blocks of templates (extends, include, import, block) have no place in a chat template and are not known here. */
#include "tokenizer/jinja_internal.h"

#include <string.h>

static void parse_body(struct parser *p, struct nodes *body, const char *const ends[]);

static void skip_block_end(struct parser *p)
{
    jinja_skip(p, ':'); // as Python has it
    jinja_expect(p, T_BLOCK_END, "%}");
}

// ---- targets of assignments ----

static void check_target(struct parser *p, const struct node *target)
{
    if (target->kind == N_MEMBER_NAME) return;
    p->j->line = target->line;
    if (target->kind == N_TUPLE || target->kind == N_LIST) {
        if (target->kind == N_LIST) jinja_fail(p->j, "cannot assign to a list");
        for (size_t i = 0; i < target->list.n; i++) check_target(p, target->list.at[i]);
        return;
    }
    if (target->kind != N_NAME) jinja_fail(p->j, "cannot assign to this expression");
    if (target->name == p->known.loop && p->n_for > 0) jinja_fail(p->j, "cannot assign to loop inside a for loop");
    struct value name = {.kind = V_STRING, .string = target->name};
    jinja_dict_set(p->j, p->assigned, name, name);
}

static struct node *parse_target(struct parser *p, int32_t flags)
{
    struct node *target = jinja_parse_tuple(p, TUPLE_TARGET | flags);
    check_target(p, target);
    return target;
}

static struct node *parse_name_target(struct parser *p)
{
    const struct token *token = jinja_expect(p, T_NAME, "name");
    struct node *target = jinja_node(p, N_NAME, token->line);
    target->name = jinja_intern(p, token->value.string);
    check_target(p, target);
    return target;
}

// ---- statements ----

static struct node *parse_for(struct parser *p)
{
    static const char *const ends[] = {"endfor", "else", NULL}, *const else_ends[] = {"endfor", NULL};
    struct node *node = jinja_node(p, N_FOR, (p->at++)->line);
    p->n_for++;
    node->a = parse_target(p, 0);
    if (!jinja_skip_name(p, "in")) jinja_expect(p, T_END, "in");
    node->b = jinja_parse_tuple(p, TUPLE_NO_CONDITION);
    if (jinja_skip_name(p, "if")) node->c = jinja_parse_expression(p);
    if (jinja_at_name(p, "recursive")) jinja_fail(p->j, "recursive loops are not supported");
    p->n_loops++;
    skip_block_end(p);
    parse_body(p, &node->body, ends);
    p->n_loops--;
    if (jinja_skip_name(p, "else")) {
        skip_block_end(p);
        parse_body(p, &node->other, else_ends);
    }
    p->at++; // endfor
    p->n_for--;
    return node;
}

static struct node *parse_if(struct parser *p)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL}, *const else_ends[] = {"endif", NULL};
    struct node *first = jinja_node(p, N_IF, p->at->line), *node = first;
    while (true) {
        p->at++; // if or elif
        node->a = jinja_parse_tuple(p, TUPLE_NO_CONDITION);
        skip_block_end(p);
        parse_body(p, &node->body, ends);
        if (!jinja_at_name(p, "elif")) break;
        node->b = jinja_node(p, N_IF, p->at->line); // a chain, however long, is one level
        node = node->b;
    }
    if (jinja_skip_name(p, "else")) {
        skip_block_end(p);
        parse_body(p, &node->other, else_ends);
    }
    p->at++; // endif
    return first;
}

static struct node *parse_set(struct parser *p)
{
    static const char *const ends[] = {"endset", NULL};
    struct node *node = jinja_node(p, N_SET, (p->at++)->line);
    node->a = parse_target(p, TUPLE_MEMBERS);
    if (jinja_skip(p, '=')) {
        node->b = jinja_parse_tuple(p, 0);
        return node;
    }
    node->kind = N_SET_BLOCK;
    node->b = jinja_parse_filters(p, NULL, false);
    skip_block_end(p);
    parse_body(p, &node->body, ends);
    p->at++;
    return node;
}

// The parameters into list, the defaults of the last of them into args.values.
static void parse_signature(struct parser *p, struct node *macro)
{
    jinja_expect(p, '(', "(");
    while (p->at->kind != ')') {
        if (macro->list.n > 0) jinja_expect(p, ',', ",");
        jinja_push(p->j, &macro->list, parse_name_target(p));
        if (jinja_skip(p, '=')) jinja_push(p->j, &macro->args.values, jinja_parse_expression(p));
        else if (macro->args.values.n > 0) jinja_fail(p->j, "a parameter without a default behind one with a default");
    }
    p->at++;
}

// What a macro is given for caller, varargs and kwargs depends on whether its parameters already have the name.
static void settle_specials(struct parser *p, struct node *macro)
{
    for (size_t i = 0; i < macro->list.n; i++) {
        const struct string *name = macro->list.at[i]->name;
        if (name == p->known.caller && macro->takes_caller && i < macro->list.n - macro->args.values.n)
            jinja_fail(p->j, "the parameter caller needs a default");
        if (name == p->known.caller) macro->takes_caller = false;
        if (name == p->known.varargs) macro->takes_varargs = false;
        if (name == p->known.kwargs) macro->takes_kwargs = false;
    }
}

// The body of a macro, a call block or a generation block, which are functions in Jinja2: no break leaves them.
static void parse_macro_body(struct parser *p, struct node *macro, const char *const ends[])
{
    int32_t n_loops = p->n_loops;
    skip_block_end(p);
    macro->c = p->macro;
    p->macro = macro;
    p->n_loops = 0;
    parse_body(p, &macro->body, ends);
    p->macro = macro->c;
    p->n_loops = n_loops;
    p->at++;
    settle_specials(p, macro);
}

static struct node *parse_macro(struct parser *p)
{
    static const char *const ends[] = {"endmacro", NULL};
    struct node *macro = jinja_node(p, N_MACRO, (p->at++)->line);
    struct node *name = parse_name_target(p);
    macro->name = name->name;
    parse_signature(p, macro);
    parse_macro_body(p, macro, ends);
    return macro;
}

static struct node *parse_call_block(struct parser *p)
{
    static const char *const ends[] = {"endcall", NULL};
    struct node *node = jinja_node(p, N_CALL_BLOCK, (p->at++)->line);
    if (p->at->kind == '(') parse_signature(p, node);
    node->b = jinja_parse_expression(p);
    if (node->b->kind != N_CALL) jinja_fail(p->j, "expected a call");
    parse_macro_body(p, node, ends);
    return node;
}

static struct node *parse_generation(struct parser *p)
{
    static const char *const ends[] = {"endgeneration", NULL};
    struct node *node = jinja_node(p, N_SCOPE, (p->at++)->line);
    parse_macro_body(p, node, ends);
    return node;
}

static struct node *parse_filter_block(struct parser *p)
{
    static const char *const ends[] = {"endfilter", NULL};
    struct node *node = jinja_node(p, N_FILTER_BLOCK, (p->at++)->line);
    node->b = jinja_parse_filters(p, NULL, true);
    skip_block_end(p);
    parse_body(p, &node->body, ends);
    p->at++;
    return node;
}

static struct node *parse_with(struct parser *p)
{
    static const char *const ends[] = {"endwith", NULL};
    struct node *node = jinja_node(p, N_WITH, (p->at++)->line);
    while (p->at->kind != T_BLOCK_END && p->at->kind != ':') {
        if (node->list.n > 0) jinja_expect(p, ',', ",");
        struct node *target = jinja_parse_primary(p, false);
        check_target(p, target);
        jinja_push(p->j, &node->list, target);
        jinja_expect(p, '=', "=");
        jinja_push(p->j, &node->list, jinja_parse_expression(p));
    }
    skip_block_end(p);
    parse_body(p, &node->body, ends);
    p->at++;
    return node;
}

static struct node *parse_jump(struct parser *p)
{
    struct node *node = jinja_node(p, jinja_at_name(p, "break") ? N_BREAK : N_CONTINUE, p->at->line);
    if (p->n_loops == 0) jinja_fail(p->j, "break or continue outside a loop");
    p->at++;
    return node;
}

static const struct statement {
    const char *tag;
    struct node *(*parse)(struct parser *p);
} statements[] = {
    {"for", parse_for},       {"if", parse_if},           {"set", parse_set},
    {"macro", parse_macro},   {"call", parse_call_block}, {"generation", parse_generation},
    {"with", parse_with},     {"break", parse_jump},      {"filter", parse_filter_block},
    {"continue", parse_jump},
};

static struct node *parse_statement(struct parser *p)
{
    char what[64];
    jinja_parse_enter(p);
    for (size_t i = 0; i < sizeof statements / sizeof *statements; i++) {
        if (!jinja_at_name(p, statements[i].tag)) continue;
        struct node *node = statements[i].parse(p);
        p->depth--;
        return node;
    }
    jinja_describe(p->at, what);
    jinja_fail(p->j, "unknown tag '%s'", what);
}

static bool at_end(const struct parser *p, const char *const ends[])
{
    for (; ends && *ends; ends++) {
        if (jinja_at_name(p, *ends)) return true;
    }
    return false;
}

// Statements and text up to one of the end tags, whose name is the next token then. No ends: up to the end of the template.
static void parse_body(struct parser *p, struct nodes *body, const char *const ends[])
{
    int32_t line = p->at->line;
    for (; p->at->kind != T_END;) {
        struct node *node;
        if (p->at->kind == T_TEXT) {
            node = jinja_node(p, N_TEXT, p->at->line);
            node->value = (p->at++)->value;
        } else if (jinja_skip(p, T_PRINT_BEGIN)) {
            node = jinja_node(p, N_PRINT, p->at->line);
            node->a = jinja_parse_tuple(p, 0);
            jinja_expect(p, T_PRINT_END, "}}");
        } else {
            p->at++; // T_BLOCK_BEGIN
            if (at_end(p, ends)) return;
            node = parse_statement(p);
            jinja_expect(p, T_BLOCK_END, "%}");
        }
        jinja_push(p->j, body, node);
    }
    p->j->line = line;
    if (ends) jinja_fail(p->j, "a block without '%s'", ends[0]);
}

// Names that are called must be functions of ours or names that the template gives a value: variables are no functions.
static void check_called(struct parser *p)
{
    for (size_t i = 0; i < p->called.n; i++) {
        const struct node *node = p->called.at[i];
        const struct string *name = node->name;
        if (jinja_find_function(name) || name == p->known.caller || jinja_dict_find_string(p->j, p->assigned, name)) continue;
        p->j->line = node->line;
        jinja_fail(p->j, "unknown function '%.*s'", (int)(name->length < 100 ? name->length : 100), name->data);
    }
}

void jinja_parse(struct parser *p, struct nodes *body)
{
    parse_body(p, body, NULL);
    check_called(p);
}
