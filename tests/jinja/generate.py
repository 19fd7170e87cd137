"""Templates made at random from a grammar of what we know, mostly valid."""
import random
import re

NAMES = [
    "s", "e", "u", "n", "z", "neg", "f", "t", "no", "nil", "l", "ls", "el", "d", "ed", "mixed", "users", "missing", "x",
    "y", "ns",
]
STRINGS = [
    "''", "'a'", "'abc'", "\"B c\"", "'ü世🎉'", "' pad '", "'a,b,c'", "'12'", "'-3.5'", "'it\\'s'", "'l\\nm'", "'role'",
    "'k'", "'%s'", "'<&>'",
]
NUMBERS = [
    "0", "1", "2", "3", "-1", "7", "10", "1.5", "0.0", "2.0", "1e3", "100", "-2.5", "0.1",
]
BINARY = [
    "+", "+", "-", "*", "/", "//", "%", "**", "~", "~", "==", "!=", "<", ">", "<=", ">=", "in", "not in", "and", "or",
]
TESTS = [
    "defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "true", "false", "mapping",
    "iterable", "sequence", "even", "odd", "lower", "upper", "callable",
]
FILTERS = [
    "trim", "length", "count", "join", "upper", "lower", "capitalize", "title", "first", "last", "list", "string", "int",
    "float", "items|list", "dictsort", "unique|list", "sort", "reverse|list", "abs", "round", "sum", "min", "max",
    "indent", "safe", "escape", "wordcount", "tojson", "tojson(indent=2)", "default('D')", "default('D', true)", "d",
    "join('-')", "replace('a', 'bb')", "replace('', '.', 2)", "int(5)", "float(1)", "sort(reverse=true)", "round(1)",
    "round(1, 'floor')", "round(0, 'ceil')", "batch(2)|list", "slice(2)|list", "map('string')|list", "map('upper')|join",
    "map(attribute='name')|list", "map('length')|list", "select|list", "reject|list", "select('string')|list",
    "reject('none')|list", "select('gt', 1)|list", "selectattr('name')|list", "selectattr('age', 'gt', 26)|list",
    "indent(2, true, true)", "trim('a')", "dictsort(true)", "dictsort(by='value')",
    "tojson(separators=(',', ':'), sort_keys=true)", "e|length", "reverse", "select", "tojson(ensure_ascii=true)",
    "sort(attribute='name')", "min(attribute='age')", "groupby('age')", "first|default", "map", "batch(3, '-')|list",
]
METHODS = [
    "strip()", "lstrip()", "rstrip()", "strip('a')", "split()", "split(',')", "split(none, 1)", "rsplit(',', 1)",
    "splitlines()", "upper()", "lower()", "title()", "capitalize()", "startswith('a')", "endswith(('c', 'd'))",
    "replace('a', 'x')", "find('b')", "isdigit()", "count('a')", "items()|list", "keys()|list", "values()|list",
    "get('a')", "get('zz', 1)", "index(1)", "count(1)", "join(ls)", "join(l)", "name", "age", "a", "b", "items",
    "append(1)", "update({})", "isalpha()", "islower()", "rfind('a')", "removeprefix('a')", "format(1, 2)", "copy()", "0",
    "1", "missing",
]


# Expressions that mostly have a value: by type, with {str}, {int}, .. for expressions of that type.
TYPED = {
    "str": [
        "s", "u", "e", "q", "w", "multi", "html", "{literal}", "{str} + {str}", "{any} ~ {any}", "({str})|trim",
        "({str})|upper", "({str})|title", "({str}).title()", "({str})|capitalize", "({str})|replace({literal}, {literal})",
        "({str}).replace('a', {literal}, {small})", "({str}).strip({literal})", "({str})[{small}:]", "({str})[:{small}]",
        "({str})[::{step}]", "({str})[{small}:{small}]", "({str})[{small}]", "({list})|join({literal})", "({any})|string",
        "({any})|tojson", "({list})|tojson(indent={small})", "({str}) * {small}",
        "({str})|indent({small}, {bool}, {bool})", "({str}).split({literal})[0]", "({str}) if {bool} else ({str})",
        "({str})|e", "({str})|reverse", "({str}).rsplit(none, {small})|join('/')", "'%s=%r' % ({any}, {str})",
        "{literal}.join(({list})|map('string'))", "({any})|tojson(ensure_ascii={bool}, sort_keys=false)",
        "({str})|list|sort|join",
    ],
    "int": [
        "n", "z", "neg", "1", "2", "3", "({str})|length", "({list})|length", "{int} + {int}", "{int} - {int}",
        "({int}) * {int}", "({int}) // 3", "({int}) % 5", "-({int})", "({str}).find({literal})",
        "({str}).count({literal})", "({str})|wordcount", "({int})|abs", "({num})|int", "({str})|int",
        "({int}) if {bool} else ({int})",
    ],
    "num": [
        "f", "third", "tiny", "1.5", "({int}) / 4", "({int}) / 3", "{num} * 2", "{num} + {num}", "({num})|round({small})",
        "({num})|round(1, 'floor')", "({num}) ** 2", "({str})|float", "({num}) // 0.5", "({num}) % 0.3", "({int}) * 0.1",
        "({num})|abs",
    ],
    "list": [
        "l", "ls", "el", "[{any}, {any}]", "[{int}, {int}, {int}]", "({str}).split()", "({str}).split({literal})",
        "({str}).splitlines()", "({list}) + ({list})", "({list})[{small}:{small}]", "({list})[::-1]",
        "({list})|reverse|list", "({list})|map('string')|list", "({list})|map('string')|sort(reverse={bool})",
        "({list})|map('string')|map('upper')|unique|list", "({list})|select('string')|list",
        "({list})|reject('none')|list", "range({small})|list", "({str})|list", "({list})|batch(2)|list",
        "({list})|slice(2, {any})|list", "users|map(attribute='name')|list", "({dict})|list", "({dict})|items|list",
        "({dict}).values()|list", "({dict})|dictsort", "users|selectattr('age', 'gt', {int})|list",
        "users|sort(attribute='name')", "({list}) * 2",
    ],
    "dict": [
        "d", "ed", "users[0]", "{'a': {any}, 'b': {any}}", "dict(x={any}, a={any})", "({dict}).copy()", "{{str}: {any}}",
    ],
    "bool": [
        "t", "no", "{int} < {int}", "{int} == {int}", "{str} == {str}", "{str} in {str}", "{any} in {list}",
        "{any} not in {list}", "{any} is {test}", "not {bool}", "({bool}) and ({bool})", "({bool}) or ({bool})",
        "({str}).startswith({literal})", "({str}).endswith(({literal}, {literal}))", "{int} <= {num} < {int}",
        "{any} == {any}", "{any} is not {test}", "{str} in {dict}", "({any}) != ({any})", "{str} < {str}",
    ],
    "any": [
        "{str}", "{str}", "{int}", "{num}", "{list}", "{dict}", "{bool}", "nil", "missing|d({any})", "({any}, {any})",
        "({dict}).a", "({dict})['b']", "({dict}).get({str})", "({list})|first|d(0)", "({any}) or ({any})",
        "({any}) and ({any})", "({any}) if {bool} else ({any})",
    ],
}


class Generator:
    def __init__(self, seed):
        self.r = random.Random(seed)

    def atom(self):
        kind = self.r.random()
        if kind < 0.45:
            return self.r.choice(NAMES)
        if kind < 0.65:
            return self.r.choice(STRINGS)
        if kind < 0.85:
            return self.r.choice(NUMBERS)
        return self.r.choice(["true", "false", "none", "[]", "{}", "()", "range(4)", "d.a", "d.b", "users[0]", "l[1]", "mixed[-1]"])

    def typed(self, kind, depth):
        if kind == "literal":
            return self.r.choice(STRINGS)
        if kind == "small":
            return self.r.choice(["0", "1", "2", "3", "-1", "-2", "5"])
        if kind == "step":
            return self.r.choice(["1", "2", "-1", "-3"])
        if kind == "test":
            return self.r.choice([test for test in TESTS if test not in ("even", "odd")])
        choices = TYPED[kind]
        if depth <= 0 and kind == "any":
            return self.r.choice(["s", "n", "l", "nil", "t"])
        form = choices[self.r.randrange(2)] if depth <= 0 else self.r.choice(choices)
        kinds = r"\{(literal|small|step|test|str|int|num|list|dict|bool|any)\}"
        return re.sub(kinds, lambda m: self.typed(m.group(1), depth - 1), form)

    def subscript(self, depth):
        kind = self.r.randrange(4)
        if kind == 0:
            return "[" + self.expression(depth) + "]"
        if kind == 1:
            return "[" + self.r.choice(["0", "1", "-1", "99", "'a'", "'name'", "true"]) + "]"
        part = lambda: self.r.choice(["", "", "0", "1", "2", "-1", "-2", "9", "none"])
        return f"[{part()}:{part()}" + (":" + self.r.choice(["", "1", "2", "-1", "-2"]) if kind == 2 else "") + "]"

    def expression(self, depth):
        if depth <= 0:
            return self.atom()
        if self.r.random() < 0.5:
            return self.typed("any", depth)
        one = lambda: self.expression(depth - 1)
        kind = self.r.randrange(17)
        if kind < 4:
            return f"{one()} {self.r.choice(BINARY)} {one()}"
        if kind == 4:
            return f"({one()})"
        if kind == 5:
            return self.r.choice(["not ", "-", "+", "- "]) + one()
        if kind < 9:
            return f"({one()})|{self.r.choice(FILTERS)}"
        if kind == 9:
            return f"{self.atom()}|{self.r.choice(FILTERS)}"
        if kind == 10:
            return f"({one()}).{self.r.choice(METHODS)}"
        if kind == 11:
            return f"{self.r.choice(NAMES)}.{self.r.choice(METHODS)}"
        if kind == 12:
            return (f"({one()})" if self.r.random() < 0.5 else self.atom()) + self.subscript(depth - 1)
        if kind == 13:
            return f"{one()} is {self.r.choice(['', 'not '])}{self.r.choice(TESTS)}"
        if kind == 14:
            return f"{one()} if {one()}" + (f" else {one()}" if self.r.random() < 0.8 else "")
        if kind == 15:
            return f"[{one()}, {one()}]" if self.r.random() < 0.6 else f"({one()}, {one()})"
        return "{" + f"{self.r.choice(STRINGS + NUMBERS)}: {one()}, 'k': {one()}" + "}"

    def tag(self, text):
        return self.r.choice(["{%", "{%-", "{%", "{%+"]) + " " + text + " " + self.r.choice(["%}", "-%}", "%}", "+%}"])

    def text(self):
        return self.r.choice(["", " ", "\n", "  \n", "a", "b\n", "\n\n  ", " x ", "\t", "{# c #}", "{#- c -#}", "  {# c #}\n",
                              "ü"])

    def body(self, depth):
        return "".join(self.text() + self.statement(depth) for _ in range(self.r.randrange(1, 4))) + self.text()

    def statement(self, depth):
        expression = lambda: self.expression(self.r.randrange(0, 3))
        kind = self.r.randrange(5 if depth <= 0 else 16)
        if kind < 3:
            return self.r.choice(["{{ ", "{{- "]) + expression() + self.r.choice([" }}", " -}}"])
        if kind == 3:
            return self.tag(f"set {self.r.choice('xy')} = {expression()}")  # no variable: see scopes in jinja_internal.h
        if kind == 4:
            return self.tag(f"set ns.{self.r.choice('ab')} = {expression()}")
        inner = lambda: self.body(depth - 1)
        if kind < 8:
            out = self.tag(f"if {expression()}") + inner()
            if self.r.random() < 0.3:
                out += self.tag(f"elif {expression()}") + inner()
            if self.r.random() < 0.5:
                out += self.tag("else") + inner()
            return out + self.tag("endif")
        if kind < 12:
            source = self.r.choice(["l", "ls", "users", "d", "u", "mixed", "range(3)", "d.items()", "l|map('string')",
                                    "users|selectattr('age', 'gt', 26)", expression()])
            condition = f" if {expression()}" if self.r.random() < 0.2 else ""
            out = self.tag(f"for {self.r.choice(['x', 'x', 'y', 'x, y'])} in {source}" + condition)
            out += inner()
            if self.r.random() < 0.4:
                attribute = self.r.choice(["index", "index0", "first", "last", "length", "revindex", "revindex0", "previtem",
                                           "nextitem", "cycle(1, 2)", "changed(x)"])
                out += "{{ loop." + attribute + " }}"
            if self.r.random() < 0.15:
                out += self.tag(f"if {expression()}") + self.tag(self.r.choice(["break", "continue"])) + self.tag("endif") + inner()
            if self.r.random() < 0.2:
                out += self.tag("else") + inner()
            return out + self.tag("endfor")
        if kind == 12:
            name = self.r.choice(["m1", "m2"])
            call = "{{ " + name + self.r.choice(["(1)", "(x, 2)", "(b=3)", "()", "(1, 2, 3)", "(a=n)"]) + " }}"
            macro = self.tag(f"macro {name}(a, b={self.atom()})") + "{{ a }}" + inner() + "{{ b }}" + self.tag("endmacro")
            return macro + self.text() + call
        if kind == 13:
            return self.tag("set x" + self.r.choice(["", "|upper", "|trim"])) + inner() + self.tag("endset") + "{{ x }}"
        if kind == 14:
            return self.tag(f"with y = {expression()}") + inner() + self.tag("endwith")
        return self.wrapped(inner())

    def wrapped(self, inner):
        name, begin = self.r.choice([("filter", "filter upper"), ("filter", "filter trim|lower"), ("generation", "generation"),
                                     ("raw", "raw")])
        return self.tag(begin) + inner + self.tag("end" + name)

    def template(self):
        head = self.r.choice(["", "{% set ns = namespace(a=1) %}", "{% set ns = namespace() %}\n",
                              "{%- set ns = namespace(a=l, b='x') -%}\n"])
        if self.r.random() < 0.4:
            return "{{ " + self.typed("any", self.r.randrange(1, 6)) + " }}"
        if self.r.random() < 0.3:
            return "{{ " + self.expression(self.r.randrange(1, 5)) + " }}"
        return head + self.body(self.r.randrange(1, 4))


def mutated(r, template):
    """With a few characters lost, doubled or exchanged: mostly no template any more."""
    chars = list(template)
    for _ in range(r.randrange(1, 4)):
        if chars:
            at = r.randrange(len(chars))
            chars[at] = r.choice(["", chars[at] * 2, r.choice("{}%#-+()[]|.,'\"\\ \nabc1:=~"), r.choice(chars)])
    return "".join(chars)


def all_cases(seed, n):
    import cases
    generator = Generator(seed)
    for i in range(n):
        template = generator.template()
        yield (mutated(generator.r, template) if i % 5 == 4 else template), cases.VARIABLES
