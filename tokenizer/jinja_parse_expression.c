/* Expressions, by Jinja2's grammar: condition > or > and > not > comparison > + - > ~ > * / // % > ** > unary > postfix. */
#include "tokenizer/jinja_internal.h"

#include <stdio.h>
#include <string.h>

// ---- tokens and nodes ----

void jinja_describe(const struct token *token, char out[64])
{
    static const char *const names[] = {"end of template", "text", "begin of statement block", "end of statement block",
                                        "begin of print statement", "end of print statement"};
    const struct string *s = token->value.string;
    if (token->kind <= T_PRINT_END) snprintf(out, 64, "%s", names[token->kind]);
    else if (token->kind == T_NAME) snprintf(out, 64, "%.*s", (int)(s->length < 40 ? s->length : 40), s->data);
    else if (token->kind == T_STRING) snprintf(out, 64, "string");
    else if (token->kind == T_INT) snprintf(out, 64, "integer");
    else if (token->kind == T_FLOAT) snprintf(out, 64, "float");
    else snprintf(out, 64, "%c%c", token->kind & 0x7F, token->kind >> 8);
}

static void __attribute__((noreturn)) unexpected(struct parser *p)
{
    char what[64];
    jinja_describe(p->at, what);
    p->j->line = p->at->line;
    jinja_fail(p->j, "unexpected '%s'", what);
}

struct node *jinja_node(struct parser *p, enum node_kind kind, int32_t line)
{
    struct node *node = jinja_alloc(p->j, sizeof *node);
    node->kind = kind;
    node->line = line;
    return node;
}

void jinja_push(struct jinja *j, struct nodes *list, struct node *node)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 4;
        struct node **at = jinja_alloc_array(j, capacity, sizeof *at);
        if (list->n > 0) memcpy(at, list->at, list->n * sizeof *at);
        list->at = at;
        list->capacity = capacity;
    }
    list->at[list->n++] = node;
}

// Deeper by one; the caller counts p->depth down again.
void jinja_parse_enter(struct parser *p)
{
    p->j->line = p->at->line;
    if (++p->depth > JINJA_MAX_PARSE_DEPTH) jinja_fail(p->j, "nested too deeply");
}

const struct string *jinja_intern(struct parser *p, const struct string *name)
{
    struct value *found = jinja_dict_find_string(p->j, p->names, name);
    if (found) return found->string;
    struct value value = {.kind = V_STRING, .string = name};
    jinja_dict_set(p->j, p->names, value, value);
    return name;
}

bool jinja_at_name(const struct parser *p, const char *name)
{
    return p->at->kind == T_NAME && jinja_is_c(p->at->value.string, name);
}

bool jinja_skip(struct parser *p, int32_t kind)
{
    if (p->at->kind != kind) return false;
    p->at++;
    return true;
}

bool jinja_skip_name(struct parser *p, const char *name)
{
    if (!jinja_at_name(p, name)) return false;
    p->at++;
    return true;
}

const struct token *jinja_expect(struct parser *p, int32_t kind, const char *what)
{
    char got[64];
    if (p->at->kind == kind) return p->at++;
    p->j->line = p->at->line;
    jinja_describe(p->at, got);
    jinja_fail(p->j, "expected '%s', got '%s'", what, got);
}

// ---- primaries ----

static struct node *constant(struct parser *p, int32_t line, struct value value)
{
    struct node *node = jinja_node(p, N_CONST, line);
    node->value = value;
    return node;
}

// What a macro's body mentions decides what its calls may give it.
static void mention(struct parser *p, const struct string *name)
{
    for (struct node *macro = p->macro; macro; macro = macro->c) {
        macro->takes_caller |= name == p->known.caller;
        macro->takes_varargs |= name == p->known.varargs;
        macro->takes_kwargs |= name == p->known.kwargs;
    }
}

static struct node *parse_name(struct parser *p, bool members)
{
    const struct token *token = p->at++;
    const struct string *name = token->value.string;
    if (jinja_is_c(name, "true") || jinja_is_c(name, "True")) return constant(p, token->line, jinja_bool(true));
    if (jinja_is_c(name, "false") || jinja_is_c(name, "False")) return constant(p, token->line, jinja_bool(false));
    if (jinja_is_c(name, "none") || jinja_is_c(name, "None")) return constant(p, token->line, jinja_none());
    struct node *node = jinja_node(p, N_NAME, token->line);
    node->name = jinja_intern(p, name);
    mention(p, node->name);
    if (members && jinja_skip(p, '.')) {
        node->kind = N_MEMBER_NAME;
        node->attribute = jinja_intern(p, jinja_expect(p, T_NAME, "name")->value.string);
    }
    return node;
}

// Strings side by side are one.
static struct node *parse_string(struct parser *p)
{
    const struct token *token = p->at++;
    if (p->at->kind != T_STRING) return constant(p, token->line, token->value);
    struct builder b = {.j = p->j};
    jinja_add(&b, token->value.string->data, token->value.string->length);
    for (; p->at->kind == T_STRING; p->at++) jinja_add(&b, p->at->value.string->data, p->at->value.string->length);
    return constant(p, token->line, jinja_built(&b));
}

static struct node *parse_list(struct parser *p)
{
    struct node *node = jinja_node(p, N_LIST, (p->at++)->line);
    while (p->at->kind != ']') {
        if (node->list.n > 0) jinja_expect(p, ',', ",");
        if (p->at->kind == ']') break;
        jinja_push(p->j, &node->list, jinja_parse_expression(p));
    }
    p->at++;
    return node;
}

static struct node *parse_dict(struct parser *p)
{
    struct node *node = jinja_node(p, N_DICT, (p->at++)->line);
    while (p->at->kind != '}') {
        if (node->list.n > 0) jinja_expect(p, ',', ",");
        if (p->at->kind == '}') break;
        jinja_push(p->j, &node->list, jinja_parse_expression(p));
        jinja_expect(p, ':', ":");
        jinja_push(p->j, &node->list, jinja_parse_expression(p));
    }
    p->at++;
    return node;
}

// members: names may be followed by .attribute, as targets of assignments.
struct node *jinja_parse_primary(struct parser *p, bool members)
{
    struct node *node = NULL;
    jinja_parse_enter(p);
    switch (p->at->kind) {
    case T_NAME: node = parse_name(p, members); break;
    case T_STRING: node = parse_string(p); break;
    case T_INT:
    case T_FLOAT: node = constant(p, p->at->line, p->at->value), p->at++; break;
    case '(':
        p->at++;
        node = jinja_parse_tuple(p, TUPLE_EMPTY);
        jinja_expect(p, ')', ")");
        break;
    case '[': node = parse_list(p); break;
    case '{': node = parse_dict(p); break;
    default: unexpected(p);
    }
    p->depth--;
    return node;
}

// ---- postfix: attributes, items, calls, filters, tests ----

static void parse_argument(struct parser *p, struct call_arguments *args)
{
    bool named = p->at->kind == T_NAME && p->at[1].kind == '=';
    if (args->star_star || (args->star && !named && p->at->kind != T_POW)) jinja_fail(p->j, "arguments in a wrong order");
    if (jinja_skip(p, '*')) {
        args->star = jinja_parse_expression(p);
    } else if (jinja_skip(p, T_POW)) {
        args->star_star = jinja_parse_expression(p);
    } else if (named) {
        // The names stand beside the nodes, in an array that grows with theirs.
        const struct string *name = jinja_intern(p, p->at->value.string);
        p->at += 2;
        jinja_push(p->j, &args->named, jinja_parse_expression(p));
        const struct string **names = jinja_alloc_array(p->j, args->named.n, sizeof *names);
        for (size_t i = 0; i + 1 < args->named.n; i++) {
            names[i] = args->names[i];
            if (names[i] == name) jinja_fail(p->j, "keyword argument '%.*s' twice", (int)name->length, name->data);
        }
        names[args->named.n - 1] = name;
        args->names = names;
    } else {
        if (args->named.n > 0) jinja_fail(p->j, "a positional argument behind a keyword argument");
        jinja_push(p->j, &args->values, jinja_parse_expression(p));
    }
}

static void parse_arguments(struct parser *p, struct call_arguments *args)
{
    jinja_expect(p, '(', "(");
    for (bool more = false; p->at->kind != ')'; more = true) {
        if (more) jinja_expect(p, ',', ",");
        if (p->at->kind == ')') break;
        parse_argument(p, args);
    }
    p->at++;
}

static struct node *parse_call(struct parser *p, struct node *callee)
{
    struct node *node = jinja_node(p, N_CALL, p->at->line);
    node->a = callee;
    if (callee->kind == N_NAME) jinja_push(p->j, &p->called, callee);
    parse_arguments(p, &node->args);
    return node;
}

static bool ends_slice_part(const struct parser *p)
{
    return p->at->kind == ':' || p->at->kind == ']' || p->at->kind == ',';
}

// One thing between brackets: an expression, or a slice of a, whose node it then returns.
static struct node *parse_subscript_part(struct parser *p, struct node *a)
{
    struct node *parts[3] = {0};
    int32_t line = p->at->line;
    if (p->at->kind != ':') {
        parts[0] = jinja_parse_expression(p);
        if (p->at->kind != ':') return parts[0];
    }
    p->at++;
    if (!ends_slice_part(p)) parts[1] = jinja_parse_expression(p);
    if (jinja_skip(p, ':') && !ends_slice_part(p)) parts[2] = jinja_parse_expression(p);
    struct node *slice = jinja_node(p, N_SLICE, line);
    slice->a = a;
    for (int i = 0; i < 3; i++) jinja_push(p->j, &slice->list, parts[i]);
    return slice;
}

static struct node *parse_subscript(struct parser *p, struct node *a)
{
    struct node *node = jinja_node(p, N_ITEM, (p->at++)->line), *tuple = jinja_node(p, N_TUPLE, node->line);
    node->a = a;
    while (p->at->kind != ']') {
        if (tuple->list.n > 0) jinja_expect(p, ',', ",");
        struct node *part = parse_subscript_part(p, a);
        if (part->kind == N_SLICE && part->a == a) { // not an expression that is a slice of something itself
            if (tuple->list.n > 0 || p->at->kind != ']') jinja_fail(p->j, "a slice beside something else is not supported");
            p->at++;
            return part;
        }
        jinja_push(p->j, &tuple->list, part);
    }
    p->at++;
    node->b = tuple->list.n == 1 ? tuple->list.at[0] : tuple;
    return node;
}

static struct node *parse_attribute(struct parser *p, struct node *a)
{
    struct node *node = jinja_node(p, N_ATTRIBUTE, (p->at++)->line);
    node->a = a;
    if (p->at->kind == T_INT) {
        node->kind = N_ITEM;
        node->b = constant(p, p->at->line, p->at->value);
        p->at++;
    } else {
        node->attribute = jinja_intern(p, jinja_expect(p, T_NAME, "name or number")->value.string);
    }
    return node;
}

static struct node *parse_postfix(struct parser *p, struct node *node)
{
    while (true) {
        if (p->at->kind == '.') node = parse_attribute(p, node);
        else if (p->at->kind == '[') node = parse_subscript(p, node);
        else if (p->at->kind == '(') node = parse_call(p, node);
        else return node;
    }
}

static void find_builtin(struct parser *p, struct node *node, const char *what,
                         const struct builtin *find(const struct string *name))
{
    const struct token *token = jinja_expect(p, T_NAME, "name");
    const struct string *name = token->value.string;
    node->builtin = find(name);
    p->j->line = token->line;
    if (p->at->kind == '.' || !node->builtin)
        jinja_fail(p->j, "unknown %s '%.*s'", what, (int)(name->length < 100 ? name->length : 100), name->data);
}

struct node *jinja_parse_filters(struct parser *p, struct node *a, bool inside)
{
    for (; inside || p->at->kind == '|'; inside = false) {
        struct node *node = jinja_node(p, N_FILTER, p->at->line);
        if (!inside) p->at++;
        find_builtin(p, node, "filter", jinja_find_filter);
        node->a = a;
        if (p->at->kind == '(') parse_arguments(p, &node->args);
        a = node;
    }
    return a;
}

static bool begins_test_argument(const struct parser *p)
{
    switch (p->at->kind) {
    case T_NAME: return !jinja_at_name(p, "else") && !jinja_at_name(p, "or") && !jinja_at_name(p, "and");
    case T_STRING:
    case T_INT:
    case T_FLOAT:
    case '[':
    case '{': return true;
    default: return false;
    }
}

static struct node *parse_test(struct parser *p, struct node *a)
{
    struct node *node = jinja_node(p, N_TEST, (p->at++)->line);
    bool negated = jinja_skip_name(p, "not");
    find_builtin(p, node, "test", jinja_find_test);
    node->a = a;
    if (p->at->kind == '(') {
        parse_arguments(p, &node->args);
    } else if (begins_test_argument(p)) {
        if (jinja_at_name(p, "is")) jinja_fail(p->j, "tests cannot be chained with is");
        jinja_push(p->j, &node->args.values, parse_postfix(p, jinja_parse_primary(p, false)));
    }
    if (!negated) return node;
    struct node *not = jinja_node(p, N_NOT, node->line);
    not->a = node;
    return not;
}

static struct node *parse_filters_and_tests(struct parser *p, struct node *node)
{
    while (true) {
        if (p->at->kind == '|') node = jinja_parse_filters(p, node, false);
        else if (jinja_at_name(p, "is")) node = parse_test(p, node);
        else if (p->at->kind == '(') node = parse_call(p, node);
        else return node;
    }
}

// ---- operators ----

static struct node *parse_unary(struct parser *p, bool with_filters)
{
    struct node *node;
    jinja_parse_enter(p);
    if (p->at->kind == '-' || p->at->kind == '+') {
        node = jinja_node(p, p->at->kind == '-' ? N_NEGATE : N_POSITIVE, p->at->line);
        p->at++;
        node->a = parse_unary(p, false);
    } else {
        node = jinja_parse_primary(p, false);
    }
    node = parse_postfix(p, node);
    if (with_filters) node = parse_filters_and_tests(p, node);
    p->depth--;
    return node;
}

static struct node *parse_power(struct parser *p);

// The operators of one level, from the loosest. Levels are lists, not trees: a long sum takes no depth.
static struct node *parse_level(struct parser *p, enum node_kind kind, const int32_t *operators, size_t n_operators,
                                struct node *next(struct parser *p))
{
    struct node *first = next(p), *node = NULL;
    size_t capacity = 0;
    while (true) {
        size_t i = 0;
        while (i < n_operators && p->at->kind != operators[i]) i++;
        if (i == n_operators) return node ? node : first;
        if (!node) {
            node = jinja_node(p, kind, p->at->line);
            jinja_push(p->j, &node->list, first);
        }
        if (node->list.n >= capacity) {
            capacity = node->list.n * 2 + 4;
            int32_t *ops = jinja_alloc_array(p->j, capacity, sizeof *ops);
            if (node->ops) memcpy(ops, node->ops, node->list.n * sizeof *ops);
            node->ops = ops;
        }
        node->ops[node->list.n] = (p->at++)->kind;
        jinja_push(p->j, &node->list, next(p));
    }
}

static struct node *unary_with_filters(struct parser *p)
{
    return parse_unary(p, true);
}

static struct node *parse_power(struct parser *p)
{
    static const int32_t operators[] = {T_POW};
    return parse_level(p, N_ARITHMETIC, operators, 1, unary_with_filters);
}

static struct node *parse_product(struct parser *p)
{
    static const int32_t operators[] = {'*', '/', T_FLOORDIV, '%'};
    return parse_level(p, N_ARITHMETIC, operators, 4, parse_power);
}

static struct node *parse_concatenation(struct parser *p)
{
    static const int32_t operators[] = {'~'};
    return parse_level(p, N_CONCAT, operators, 1, parse_product);
}

static struct node *parse_sum(struct parser *p)
{
    static const int32_t operators[] = {'+', '-'};
    return parse_level(p, N_ARITHMETIC, operators, 2, parse_concatenation);
}

static int32_t comparison(struct parser *p)
{
    int32_t kind = p->at->kind;
    if (kind == T_EQ || kind == T_NE || kind == '<' || kind == '>' || kind == T_LE || kind == T_GE) {
        p->at++;
        return kind;
    }
    if (jinja_skip_name(p, "in")) return OP_IN;
    if (!jinja_at_name(p, "not") || p->at[1].kind != T_NAME || !jinja_is_c(p->at[1].value.string, "in")) return 0;
    p->at += 2;
    return OP_NOT_IN;
}

static struct node *parse_comparison(struct parser *p)
{
    struct node *first = parse_sum(p), *node = NULL;
    for (int32_t op; (op = comparison(p));) {
        if (!node) {
            node = jinja_node(p, N_COMPARE, first->line);
            jinja_push(p->j, &node->list, first);
        }
        int32_t *ops = jinja_alloc_array(p->j, node->list.n + 1, sizeof *ops);
        if (node->ops) memcpy(ops, node->ops, node->list.n * sizeof *ops);
        ops[node->list.n] = op;
        node->ops = ops;
        jinja_push(p->j, &node->list, parse_sum(p));
    }
    return node ? node : first;
}

static struct node *parse_not(struct parser *p)
{
    if (!jinja_at_name(p, "not")) return parse_comparison(p);
    jinja_parse_enter(p);
    struct node *node = jinja_node(p, N_NOT, (p->at++)->line);
    node->a = parse_not(p);
    p->depth--;
    return node;
}

static struct node *parse_words(struct parser *p, enum node_kind kind, const char *word, struct node *next(struct parser *p))
{
    struct node *first = next(p), *node = NULL;
    while (jinja_skip_name(p, word)) {
        if (!node) {
            node = jinja_node(p, kind, first->line);
            jinja_push(p->j, &node->list, first);
        }
        jinja_push(p->j, &node->list, next(p));
    }
    return node ? node : first;
}

static struct node *parse_and(struct parser *p)
{
    return parse_words(p, N_AND, "and", parse_not);
}

static struct node *parse_or(struct parser *p)
{
    return parse_words(p, N_OR, "or", parse_and);
}

struct node *jinja_parse_expression(struct parser *p)
{
    jinja_parse_enter(p);
    struct node *value = parse_or(p);
    while (jinja_at_name(p, "if")) {
        struct node *node = jinja_node(p, N_CONDITION, (p->at++)->line);
        node->a = parse_or(p);
        node->b = value;
        if (jinja_skip_name(p, "else")) node->c = jinja_parse_expression(p);
        value = node;
    }
    p->depth--;
    return value;
}

static bool ends_tuple(const struct parser *p)
{
    return p->at->kind == T_PRINT_END || p->at->kind == T_BLOCK_END || p->at->kind == ')';
}

static struct node *tuple_part(struct parser *p, int32_t flags)
{
    if (flags & TUPLE_TARGET) return jinja_parse_primary(p, flags & TUPLE_MEMBERS);
    if (!(flags & TUPLE_NO_CONDITION)) return jinja_parse_expression(p);
    jinja_parse_enter(p);
    struct node *node = parse_or(p);
    p->depth--;
    return node;
}

struct node *jinja_parse_tuple(struct parser *p, int32_t flags)
{
    struct node *tuple = jinja_node(p, N_TUPLE, p->at->line);
    bool comma = false;
    while (!ends_tuple(p)) {
        jinja_push(p->j, &tuple->list, tuple_part(p, flags));
        if (!jinja_skip(p, ',')) break;
        comma = true;
    }
    if (!comma && tuple->list.n == 1) return tuple->list.at[0];
    if (tuple->list.n == 0 && !(flags & TUPLE_EMPTY)) unexpected(p);
    return tuple;
}
