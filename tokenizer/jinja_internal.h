/* jinja_internal.h: what the files of the Jinja interpreter share. Private to tokenizer/jinja*.c.
 *
 * A struct jinja is one run: a parse or a render. Everything that a run makes (tokens, nodes, values, scopes) comes out of its
 * arena and goes away with it, so a failure needs no unwinding: jinja_fail leaves by longjmp to the one setjmp in jinja.c, and
 * functions here return values, not error codes. Nothing else may be held across a call that can fail.
 */
#ifndef GPTD_TOKENIZER_JINJA_INTERNAL_H
#define GPTD_TOKENIZER_JINJA_INTERNAL_H

#include "tokenizer/jinja.h"

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

// ---- runs and memory: jinja_memory.c ----

enum {
    JINJA_MAX_DEPTH = 500,       // whatever the limits say: a level takes under 1 KB of stack (2 KB with a sanitizer)
    JINJA_MAX_PARSE_DEPTH = 120, // of expressions and blocks in each other: a level takes a dozen frames
    JINJA_MAX_PARAMS = 5,        // of filters, tests, functions and methods of ours
};

struct chunk;

struct arena {
    struct chunk *chunks;
    char *at;
    size_t left;        // in the newest chunk
    size_t used, limit; // bytes of all chunks
};

struct jinja {
    struct arena arena;
    jmp_buf failed;
    char *error; // [error_size]
    size_t error_size;
    int result;   // of jinja_create or jinja_render, once failed
    int32_t line; // where we are, for messages

    // Of a render only.
    const struct jinja_template *template;
    struct dict *variables;
    struct scope *scope;
    int64_t steps_left;
    int32_t depth_left;
    time_t now;
    char *out; // [out_capacity], malloc'd. Captured text (macros, set blocks) lies behind what is already out
    size_t out_length, out_capacity, out_limit;
};

void jinja_fail(struct jinja *j, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void *jinja_alloc(struct jinja *j, size_t bytes); // zeroed, aligned; never NULL
void *jinja_alloc_array(struct jinja *j, size_t n, size_t size);
void jinja_arena_free(struct arena *arena);
void jinja_charge(struct jinja *j, int64_t steps);
void jinja_enter(struct jinja *j); // one level deeper; jinja_leave on the way back
void jinja_leave(struct jinja *j);
void jinja_emit(struct jinja *j, const char *data, size_t length);

// Text under construction, in the arena.
struct builder {
    struct jinja *j;
    char *data; // [capacity]
    size_t length, capacity;
};
void jinja_add(struct builder *b, const char *data, size_t length);
void jinja_add_c(struct builder *b, const char *text);
void jinja_add_repeated(struct builder *b, const char *data, size_t length, int64_t times);
void jinja_add_char(struct builder *b, uint32_t c);

// ---- characters: jinja_unicode.c ----

// The character at data, which has length > 0 bytes; *size: its bytes. A byte that is no UTF-8 is a character of its own.
uint32_t jinja_decode(const char *data, size_t length, size_t *size);
size_t jinja_encode(uint32_t c, char out[4]);
size_t jinja_count_chars(const char *data, size_t length);
size_t jinja_skip_chars(const char *data, size_t length, size_t n_chars); // bytes that they take
bool jinja_is_space(uint32_t c);
bool jinja_is_alpha(uint32_t c);
bool jinja_is_alnum(uint32_t c);
bool jinja_is_digit(uint32_t c);
bool jinja_is_printable(uint32_t c);
bool jinja_is_lower(uint32_t c);
bool jinja_is_upper(uint32_t c);
enum letter_case { CASE_LOWER, CASE_UPPER, CASE_TITLE };
size_t jinja_convert(uint32_t c, enum letter_case to, uint32_t out[3]); // returns how many

// ---- values: jinja_value.c, jinja_dict.c, jinja_walk.c ----

enum kind {
    V_MISSING, // no value at all: an argument that was not given
    V_UNDEFINED,
    V_NONE,
    V_BOOL,
    V_INT,
    V_FLOAT,
    V_STRING,
    V_LIST,
    V_TUPLE,
    V_DICT,
    V_RANGE,
    V_ITERATOR, // what Python has a generator for
    V_VIEW,     // dict.keys(), .values(), .items()
    V_NAMESPACE,
    V_MACRO,
    V_LOOP,
    V_FUNCTION,
    V_METHOD,
    V_CYCLER,
    V_JOINER,
};

struct string {
    const char *data; // [length], not NUL-terminated
    size_t length, n_chars;
    struct room *room; // NULL: none
};

// What is free behind a text that was put together, so that a template that appends to it again and again copies it seldom.
struct room {
    char *end; // of what is in use. A string that ends here may be appended to in place
    size_t left;
};

struct value {
    enum kind kind;
    bool special; // of a string: markup, as |safe makes it; of a tuple: (grouper, list) of |groupby
    union {
        bool b;
        int64_t i;
        double f;
        const struct string *string;
        const struct undefined *undefined;
        struct list *list; // V_LIST and V_TUPLE
        struct dict *dict; // V_DICT and V_NAMESPACE
        const struct range *range;
        struct iterator *iterator;
        const struct view *view;
        const struct macro *macro;
        struct loop *loop;
        const struct builtin *function;
        const struct method *method;
        struct cycler *cycler; // V_CYCLER and V_JOINER
    };
};

// Why there is no value: a message, or a name that is not known, of a value of that type or among the variables.
struct undefined {
    const char *hint, *type;
    struct value name;
};

struct list {
    struct value *items; // [n]
    size_t n, capacity;
};

struct dict {
    struct value *keys, *values; // [n], in order of insertion
    size_t n, capacity;
    uint32_t *slots; // [n_slots] index + 1 by hash, 0: free; NULL while there are few
    size_t n_slots;
};

struct range {
    int64_t start, stop, step, n;
};

// Goes through its items once. A filter that makes one does so when the first item is asked for: what nobody looks at cannot fail.
struct iterator {
    const struct list *items;
    size_t at;
    struct deferred *deferred; // NULL: the items are there
};

enum view_of { VIEW_KEYS, VIEW_VALUES, VIEW_ITEMS };
struct view {
    const struct dict *dict;
    enum view_of of;
};

struct cycler {
    struct list items; // of a joiner: the separator
    size_t at;
};

struct binding {
    const struct string *name; // interned: compared by address
    struct value value;
    struct binding *next;
};

struct scope {
    struct scope *parent;
    struct binding *first;
};

struct macro {
    const struct node *node;
    struct scope *scope; // where it was defined
};

struct arguments {
    struct value *values; // [n]
    size_t n;
    const struct string **names; // [n_named]
    struct value *named;         // [n_named]
    size_t n_named;
};

// A filter, test, function or method of ours. self: the value filtered, tested, or whose method it is.
struct builtin {
    const char *name;
    struct value (*call)(struct jinja *j, struct value self, const struct value *given, const struct arguments *all);
    const char *params; // names, in order, by spaces; "." for one that has no keyword; "*": any, left to call
    int32_t required;   // the first of them that must be given
    bool lazy;          // gives an iterator, and is called when that is gone through
};

struct deferred {
    const struct builtin *builtin;
    struct value self, given[JINJA_MAX_PARAMS];
    struct arguments args;
};

struct method {
    const struct builtin *builtin;
    struct value self;
};

static inline struct value jinja_none(void)
{
    return (struct value){.kind = V_NONE};
}

static inline struct value jinja_bool(bool b)
{
    return (struct value){.kind = V_BOOL, .b = b};
}

static inline struct value jinja_int(int64_t i)
{
    return (struct value){.kind = V_INT, .i = i};
}

static inline struct value jinja_float(double f)
{
    return (struct value){.kind = V_FLOAT, .f = f};
}

static inline struct value jinja_tuple(struct list *list)
{
    return (struct value){.kind = V_TUPLE, .list = list};
}

static inline struct value jinja_list(struct list *list)
{
    return (struct value){.kind = V_LIST, .list = list};
}

// data must live as long as the run; jinja_string_copy copies.
struct value jinja_string(struct jinja *j, const char *data, size_t length);
struct value jinja_string_copy(struct jinja *j, const char *data, size_t length);
struct value jinja_string_c(struct jinja *j, const char *text);
struct value jinja_built(struct builder *b);
struct value jinja_iterator(struct jinja *j, const struct list *items);
struct value jinja_hint(struct jinja *j, const char *hint);
struct value jinja_no_member(struct jinja *j, struct value object, struct value name);
void jinja_fail_undefined(struct jinja *j, struct value undefined) __attribute__((noreturn));
void jinja_append(struct jinja *j, struct list *list, struct value item);
struct list *jinja_list_new(struct jinja *j, size_t capacity);
const char *jinja_type(struct value v); // as Python names it
bool jinja_is_true(struct value v);
bool jinja_is_number(struct value v); // with booleans, as in Python
bool jinja_as_int(struct value v, int64_t *i); // of integers and booleans
double jinja_as_double(struct value v);        // of numbers
int64_t jinja_int_argument(struct jinja *j, struct value v, int64_t otherwise); // fails unless missing, none or an integer
const struct string *jinja_string_argument(struct jinja *j, struct value v);    // fails unless a string
bool jinja_is_c(const struct string *s, const char *text);
bool jinja_same_string(const struct string *a, const struct string *b);
int jinja_compare_strings(const struct string *a, const struct string *b);
bool jinja_equal(struct jinja *j, struct value a, struct value b);
enum order { ORDER_LT, ORDER_LE, ORDER_GT, ORDER_GE };
bool jinja_ordered(struct jinja *j, enum order order, struct value a, struct value b);
bool jinja_contains(struct jinja *j, struct value container, struct value item);
struct value jinja_substring(struct jinja *j, const struct string *s, size_t from, size_t to); // in bytes

struct dict *jinja_dict_new(struct jinja *j);
bool jinja_is_hashable(struct jinja *j, struct value v);
struct value *jinja_dict_find(struct jinja *j, const struct dict *d, struct value key); // NULL: not there
void jinja_dict_set(struct jinja *j, struct dict *d, struct value key, struct value value);
struct value *jinja_dict_find_string(struct jinja *j, const struct dict *d, const struct string *name);

// Goes through what a for loop can go through.
struct walk {
    struct value source;
    size_t at, byte;
};
bool jinja_is_iterable(struct value v);
bool jinja_has_length(struct value v, size_t *n);
void jinja_walk(struct jinja *j, struct walk *w, struct value source);
bool jinja_next(struct jinja *j, struct walk *w, struct value *item);
struct list *jinja_items(struct jinja *j, struct value source); // a copy
void jinja_sort(struct jinja *j, struct value *items, struct value *keys, size_t n, bool reverse); // stable, by keys

// ---- text of values: jinja_text.c, jinja_json.c, jinja_format.c ----

void jinja_add_text(struct builder *b, struct value v); // as str()
void jinja_add_repr(struct builder *b, struct value v);
struct value jinja_to_string(struct jinja *j, struct value v);
const struct string *jinja_text(struct jinja *j, struct value v); // as str()
void jinja_format_float(double f, char out[40]);
bool jinja_parse_int(const struct string *s, int64_t base, int64_t *i);
bool jinja_parse_float(struct jinja *j, const struct string *s, double *f);
struct value jinja_from_json(struct jinja *j, const cJSON *item);
struct value jinja_filter_tojson(struct jinja *j, struct value self, const struct value *given, const struct arguments *all);
struct value jinja_percent(struct jinja *j, const struct string *format, struct value arguments);
struct value jinja_format(struct jinja *j, const struct string *format, const struct arguments *all);

// ---- templates: jinja_lexer.c, jinja_parser.c, jinja_parse_expression.c ----

enum token_kind {
    T_END,
    T_TEXT,
    T_BLOCK_BEGIN,
    T_BLOCK_END,
    T_PRINT_BEGIN,
    T_PRINT_END,
    T_NAME,
    T_STRING,
    T_INT,
    T_FLOAT,
    // Operators. Two characters: the first, and the second << 8.
    T_OPERATOR = 0x20,
    T_FLOORDIV = '/' | '/' << 8,
    T_POW = '*' | '*' << 8,
    T_EQ = '=' | '=' << 8,
    T_NE = '!' | '=' << 8,
    T_GE = '>' | '=' << 8,
    T_LE = '<' | '=' << 8,
};

struct token {
    int32_t kind, line;
    struct value value; // of names, strings, numbers and text
};

struct token *jinja_tokenize(struct jinja *j, const char *source, size_t length); // the last one is T_END

enum node_kind {
    // Expressions
    N_CONST,
    N_NAME,
    N_MEMBER_NAME, // name.attribute, assigned to
    N_LIST,
    N_TUPLE,
    N_DICT, // list: key, value, key, value, ..
    N_ARITHMETIC, // left to right: list[0] ops[1] list[1] ops[2] ..
    N_COMPARE,    // chained: list[0] ops[1] list[1] and list[1] ops[2] ..
    N_CONCAT,
    N_AND,
    N_OR,
    N_NOT,
    N_NEGATE,
    N_POSITIVE,
    N_CONDITION, // b if a else c; c may be NULL
    N_ATTRIBUTE, // a.name
    N_ITEM,      // a[b]
    N_SLICE,     // a[list[0]:list[1]:list[2]], each may be NULL
    N_CALL,      // a(args)
    N_FILTER,    // a | builtin(args); a NULL: the text of a block
    N_TEST,      // a is builtin(args)
    // Statements
    N_TEXT,
    N_PRINT,
    N_FOR, // for a in b if c, body, other
    N_IF,  // if a, body, other
    N_SET, // a = b
    N_SET_BLOCK, // a = body, through the filters b
    N_MACRO,
    N_CALL_BLOCK, // b: the call, the rest a macro without a name
    N_FILTER_BLOCK, // b over body
    N_WITH,         // list: target, value, target, value, ..
    N_SCOPE,        // a generation block
    N_BREAK,
    N_CONTINUE,
};

enum { OP_IN = 1, OP_NOT_IN = 2 }; // beside the token kinds of operators

struct nodes {
    struct node **at; // [n]
    size_t n, capacity;
};

struct call_arguments {
    struct nodes values, named;
    const struct string **names; // [named.n]
    struct node *star, *star_star;
};

struct node {
    enum node_kind kind;
    int32_t line;
    struct value value;        // of a constant or text
    const struct string *name; // interned
    const struct string *attribute;
    struct node *a, *b, *c;
    struct nodes list, body, other; // of a macro: list has its parameters
    int32_t *ops;                   // [list.n]
    struct call_arguments args;     // of a macro: values has the defaults of its last parameters
    const struct builtin *builtin;
    bool takes_caller, takes_varargs, takes_kwargs; // of a macro: what its body mentions
};

struct well_known {
    const struct string *loop, *caller, *varargs, *kwargs;
};

struct jinja_template {
    struct arena arena;
    struct nodes body;
    struct well_known names;
};

struct parser {
    struct jinja *j;
    const struct token *at;
    int32_t depth, n_for, n_loops; // n_loops: those that a break here would leave
    struct dict *names;            // interned
    struct dict *assigned;         // names that something in the template is assigned to
    struct nodes called;           // names that are called
    struct node *macro;            // the innermost; its c is the one around it
    struct well_known known;
};

void jinja_parse(struct parser *p, struct nodes *body);
// Expressions, for statements. Each fails at what is none.
struct node *jinja_node(struct parser *p, enum node_kind kind, int32_t line);
void jinja_push(struct jinja *j, struct nodes *list, struct node *node);
void jinja_parse_enter(struct parser *p);
const struct string *jinja_intern(struct parser *p, const struct string *name);
bool jinja_at_name(const struct parser *p, const char *name);
bool jinja_skip(struct parser *p, int32_t kind);
bool jinja_skip_name(struct parser *p, const char *name);
const struct token *jinja_expect(struct parser *p, int32_t kind, const char *what);
struct node *jinja_parse_expression(struct parser *p);
struct node *jinja_parse_primary(struct parser *p, bool members);
enum { TUPLE_NO_CONDITION = 1, TUPLE_TARGET = 2, TUPLE_MEMBERS = 4, TUPLE_EMPTY = 8 };
struct node *jinja_parse_tuple(struct parser *p, int32_t flags);
struct node *jinja_parse_filters(struct parser *p, struct node *node, bool inside); // inside: the first has no |
void jinja_describe(const struct token *token, char out[64]);

// ---- evaluation: jinja_eval.c, jinja_operators.c, jinja_member.c, jinja_call.c, jinja_exec.c ----

struct value jinja_eval(struct jinja *j, const struct node *node);
struct value jinja_apply_filters(struct jinja *j, const struct node *node, struct value text); // of a block
struct value jinja_arithmetic(struct jinja *j, int32_t op, struct value a, struct value b);
struct value jinja_concatenate(struct jinja *j, const struct string *a, const struct string *b);
struct value jinja_negate(struct jinja *j, struct value a);
struct value jinja_attribute(struct jinja *j, struct value object, const struct string *name);
struct value jinja_item(struct jinja *j, struct value object, struct value key);
struct value jinja_slice(struct jinja *j, struct value object, struct value start, struct value stop, struct value step);
struct value jinja_path(struct jinja *j, struct value item, struct value attribute, struct value otherwise); // of map and so on
struct value jinja_loop_attribute(struct jinja *j, struct loop *loop, const struct string *name); // V_MISSING: none

struct value jinja_call(struct jinja *j, struct value callee, struct arguments *args);
struct value jinja_call_builtin(struct jinja *j, const struct builtin *b, struct value self, const struct arguments *args);
struct value jinja_call_macro(struct jinja *j, const struct macro *macro, const struct arguments *args);

void jinja_exec(struct jinja *j, const struct nodes *body);
void jinja_assign(struct jinja *j, const struct node *target, struct value value);
void jinja_bind_name(struct jinja *j, struct scope *scope, const struct string *name, struct value value);
struct scope *jinja_scope_new(struct jinja *j, struct scope *parent);
struct value jinja_captured(struct jinja *j, const struct nodes *body); // its text, not put out

const struct builtin *jinja_find_filter(const struct string *name);
const struct builtin *jinja_find_test(const struct string *name);
const struct builtin *jinja_find_function(const struct string *name);
const struct builtin *jinja_find_method(struct value object, const struct string *name);
bool jinja_is_mutator(struct value object, const struct string *name); // of those the sandbox refuses

// Scopes are looked through when a name is evaluated. Jinja2 settles what names mean beforehand, which differs in one case: a
// variable that an inner block reads before its own block sets it for the first time is not seen there, and is here.

// Filters by file. Tables end with a NULL name.
extern const struct builtin jinja_list_filters[], jinja_select_filters[];

#endif
