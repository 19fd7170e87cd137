/* + - * / // % ** with Python's rules. */
#include "tokenizer/jinja_internal.h"

#include <math.h>
#include <string.h>

static void __attribute__((noreturn)) fail_operands(struct jinja *j, int32_t op, struct value a, struct value b)
{
    if (a.kind == V_UNDEFINED) jinja_fail_undefined(j, a);
    if (b.kind == V_UNDEFINED) jinja_fail_undefined(j, b);
    char name[3] = {(char)(op & 0x7F), (char)(op >> 8), 0};
    jinja_fail(j, "unsupported operand types for %s: '%s' and '%s'", name, jinja_type(a), jinja_type(b));
}

static void __attribute__((noreturn)) fail_overflow(struct jinja *j)
{
    jinja_fail(j, "integer overflow: more than 64 bits");
}

// ---- numbers ----

static struct value power_int(struct jinja *j, int64_t base, int64_t exponent)
{
    int64_t result = 1;
    if (exponent < 0) {
        if (base == 0) jinja_fail(j, "0.0 cannot be raised to a negative power");
        return jinja_float(pow((double)base, (double)exponent));
    }
    for (; exponent > 0; exponent >>= 1) {
        if ((exponent & 1) && __builtin_mul_overflow(result, base, &result)) fail_overflow(j);
        if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) fail_overflow(j);
    }
    return jinja_int(result);
}

static struct value divide_ints(struct jinja *j, int32_t op, int64_t x, int64_t y)
{
    if (y == 0) jinja_fail(j, op == '%' ? "integer modulo by zero" : "division by zero");
    if (op == '/') return jinja_float((double)x / (double)y);
    if (y == -1) { // x / -1 and x % -1 trap for the least integer
        if (op == '%') return jinja_int(0);
        if (__builtin_sub_overflow(0, x, &x)) fail_overflow(j);
        return jinja_int(x);
    }
    int64_t quotient = x / y, rest = x % y;
    if (rest != 0 && (rest < 0) != (y < 0)) { // towards minus infinity
        quotient--;
        rest += y;
    }
    return jinja_int(op == '%' ? rest : quotient);
}

static struct value with_ints(struct jinja *j, int32_t op, int64_t x, int64_t y)
{
    int64_t result;
    bool overflow;
    switch (op) {
    case '+': overflow = __builtin_add_overflow(x, y, &result); break;
    case '-': overflow = __builtin_sub_overflow(x, y, &result); break;
    case '*': overflow = __builtin_mul_overflow(x, y, &result); break;
    case T_POW: return power_int(j, x, y);
    default: return divide_ints(j, op, x, y);
    }
    if (overflow) fail_overflow(j);
    return jinja_int(result);
}

static double modulo(double x, double y)
{
    double rest = fmod(x, y);
    if (rest == 0) return copysign(0, y);
    return (rest < 0) != (y < 0) ? rest + y : rest;
}

static double floor_divide(double x, double y)
{
    double quotient = (x - modulo(x, y)) / y;
    if (quotient == 0) return copysign(0, x / y);
    double floored = floor(quotient);
    return quotient - floored > 0.5 ? floored + 1 : floored;
}

static struct value power_float(struct jinja *j, double x, double y)
{
    if (x == 0 && y < 0) jinja_fail(j, "0.0 cannot be raised to a negative power");
    if (x < 0 && isfinite(x) && isfinite(y) && y != floor(y)) jinja_fail(j, "complex numbers are not supported");
    double result = pow(x, y);
    if (isinf(result) && isfinite(x) && isfinite(y)) jinja_fail(j, "result of ** too large");
    return jinja_float(result);
}

static struct value with_floats(struct jinja *j, int32_t op, double x, double y)
{
    switch (op) {
    case '+': return jinja_float(x + y);
    case '-': return jinja_float(x - y);
    case '*': return jinja_float(x * y);
    case T_POW: return power_float(j, x, y);
    default: break;
    }
    if (y == 0) jinja_fail(j, "float division by zero");
    return jinja_float(op == '/' ? x / y : op == '%' ? modulo(x, y) : floor_divide(x, y));
}

// ---- strings and lists ----

// Markup + text escapes the text, whichever way round.
static struct value escaped(struct jinja *j, struct value v, bool wanted)
{
    if (!wanted || v.special) return v;
    struct string name = {.data = "escape", .length = 6, .n_chars = 6};
    return jinja_call_builtin(j, jinja_find_filter(&name), v, &(struct arguments){0});
}

struct value jinja_concatenate(struct jinja *j, const struct string *a, const struct string *b)
{
    struct string *s = jinja_alloc(j, sizeof *s);
    struct room *room = a->room;
    *s = (struct string){a->data, a->length + b->length, a->n_chars + b->n_chars, room};
    if (!room || room->end != a->data + a->length || room->left < b->length) {
        size_t spare = s->length / 2;
        room = s->room = jinja_alloc(j, sizeof *room);
        s->data = jinja_alloc(j, s->length + spare);
        *room = (struct room){(char *)s->data + a->length, b->length + spare};
        if (a->length > 0) memcpy((char *)s->data, a->data, a->length);
    }
    if (b->length > 0) memcpy(room->end, b->data, b->length);
    room->end += b->length;
    room->left -= b->length;
    return (struct value){.kind = V_STRING, .string = s};
}

static struct value add_strings(struct jinja *j, struct value a, struct value b)
{
    bool markup = a.special || b.special;
    struct value sum = jinja_concatenate(j, escaped(j, a, markup).string, escaped(j, b, markup).string);
    sum.special = markup;
    return sum;
}

static struct value add_lists(struct jinja *j, struct value a, struct value b)
{
    struct list *list = jinja_list_new(j, a.list->n + b.list->n);
    jinja_charge(j, (int64_t)(a.list->n + b.list->n));
    for (size_t i = 0; i < a.list->n; i++) jinja_append(j, list, a.list->items[i]);
    for (size_t i = 0; i < b.list->n; i++) jinja_append(j, list, b.list->items[i]);
    return (struct value){.kind = a.kind, .list = list};
}

static struct value repeat(struct jinja *j, struct value v, int64_t times)
{
    struct builder b = {.j = j};
    if (times < 0) times = 0;
    if (v.kind == V_STRING) {
        jinja_add_repeated(&b, v.string->data, v.string->length, times);
        struct value text = jinja_built(&b);
        text.special = v.special;
        return text;
    }
    int64_t n = (int64_t)v.list->n;
    if (n > 0 && times > j->steps_left / n) jinja_fail(j, "too many steps");
    jinja_charge(j, n * times);
    struct list *list = jinja_list_new(j, (size_t)(n * times));
    for (int64_t i = 0; i < n * times; i++) jinja_append(j, list, v.list->items[i % n]);
    return (struct value){.kind = v.kind, .list = list};
}

static bool is_sequence(struct value v)
{
    return v.kind == V_STRING || v.kind == V_LIST || v.kind == V_TUPLE;
}

struct value jinja_arithmetic(struct jinja *j, int32_t op, struct value a, struct value b)
{
    int64_t x, y;
    if (jinja_is_number(a) && jinja_is_number(b)) {
        if (jinja_as_int(a, &x) && jinja_as_int(b, &y)) return with_ints(j, op, x, y);
        return with_floats(j, op, jinja_as_double(a), jinja_as_double(b));
    }
    if (op == '+' && a.kind == b.kind && is_sequence(a)) return a.kind == V_STRING ? add_strings(j, a, b) : add_lists(j, a, b);
    if (op == '*' && is_sequence(a) && jinja_as_int(b, &y)) return repeat(j, a, y);
    if (op == '*' && is_sequence(b) && jinja_as_int(a, &x)) return repeat(j, b, x);
    if (op == '%' && a.kind == V_STRING) return jinja_percent(j, a.string, b);
    fail_operands(j, op, a, b);
}

struct value jinja_negate(struct jinja *j, struct value a)
{
    int64_t i;
    if (a.kind == V_FLOAT) return jinja_float(-a.f);
    if (a.kind == V_UNDEFINED) jinja_fail_undefined(j, a);
    if (!jinja_as_int(a, &i)) jinja_fail(j, "bad operand type for unary -: '%s'", jinja_type(a));
    if (__builtin_sub_overflow(0, i, &i)) fail_overflow(j);
    return jinja_int(i);
}
