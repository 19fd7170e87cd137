"""Small templates: every construct, filter, test and method that we know. Those of one line are in cases.txt."""
import pathlib
import re
import sys

VARIABLES = {
    "s": "Hello, World", "e": "", "u": "Grüße, 世界 🎉 ß", "w": "  spaced out\t\n", "n": 7, "z": 0, "neg": -3, "f": 2.5,
    "t": True, "no": False, "nil": None, "l": [3, 1, 2], "ls": ["b", "A", "c", "a"], "el": [], "ed": {},
    "d": {"a": 1, "b": [1, 2], "items": "x"}, "multi": "one\ntwo\n\nthree", "q": "it's \"quoted\" \\ back",
    "users": [{"name": "Bo", "age": 30, "tags": ["x"]}, {"name": "al", "age": 25, "tags": []}, {"name": "Cy", "age": 30}],
    "nested": {"x": {"y": {"z": [10, 20, {"w": "deep"}]}}}, "float": 1e20, "tiny": 1.5e-7, "third": 0.1,
    "html": "<a href='x'>&</a>", "ctl": "\u0001\u007f\u200b\u00a0\ufeff",
    "mixed": [1, "a", None, True, 2.5, [1], {"k": "v"}],
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "bye"}],
}

# What jinja2 shows and we refuse: with an address in it, or not worth having.
REFUSED = [
    "{{ d.items }}", "{{ l|items }}", "{% print s %}", "{% for x in l recursive %}{{ x }}{% endfor %}", "{{ n.real }}",
    "{{ s.format }}", "{{ l|map('abs') }}", "{{ 9223372036854775807 + 1 }}", "{{ 9223372036854775808 }}", "{{ 2 ** 64 }}",
    "{{ -9223372036854775807 - 2 }}", "{{ 4611686018427387904 * 2 }}", "{{ s.zfill(3) }}", "{{ s|center }}",
    "{{ s|truncate }}", "{{ '\\ud83d\\ude00' }}", "{{ '%c' % 'x' }}", "{% if no %}{{ x|nosuchfilter }}{% endif %}",
    "{% if no %}{{ nosuch() }}{% endif %}", "{% block a %}{% endblock %}", "{{ '{:>5}'.format(1) }}",
    "{% if no %}{{ x is nosuchtest }}{% endif %}", "{% autoescape true %}{% endautoescape %}", "{{ '\\N{DIGIT ONE}' }}",
]

# Whitespace control, and templates of several lines.
BLOCKS = [
    "", "\n", "\n\n", "a\n", "a\n\n", "a\r\nb\r\n", "a\rb", "  a  ", "{{ 'x' }}\n", "{{ 'x' }}\n\n",
    "{% if t %}\nx\n{% endif %}\ny", "  {% if t %}  \n  x\n  {% endif %}  \n  y", "{% if t -%}\n x\n{%- endif %}\n y",
    "a {%- if t %} b {% endif -%} c", "a\n  {%+ if t %}b{% endif +%}\nc", "a\n\t{% if t %}\n\tb\n\t{% endif %}\nc",
    "  {{ s }}  \n  {{- s -}}  \n  x", "a {#- c -#} b\n  {# d #}\nc", "a\n  {#+ d #}\nc {# e +#}\nd {# f #}\ne",
    "a\n  {% raw %}  \n {{ x }} {% endraw %}  \nb", "{% raw -%}\n x {%- endraw %}\ny", "a {%- raw %} x {% endraw -%}\n y",
    "{% for x in l %}\n{{ x }}\n{% endfor %}\n", "{%- for x in l -%}\n  {{ x }}\n{%- endfor -%}\n",
    "{% for x in l %}  \n  {{ x }},\n  {% endfor %}end", "x{% if t %}\n{% endif %}\n\ny",
    "{% set a = 1 %}\n{% set b = 2 %}\n{{ a }}{{ b }}\n", "{%- set a = 1 %}\n\n{{- a }}\n",
    "{{ s }}\n{% if t %}\n\n{{ n }}\n\n{% endif %}\n\n{{ f }}\n", "a\u00a0{%- if t %} x{% endif %}",
    "\u3000{% if t %}y{% endif %}", "{% macro m(x) %}\n  <{{ x }}>\n{% endmacro %}\n{{ m(1) }}\n{{- m(2) }}",
    "{% macro m(x) -%}\n  <{{ x }}>\n{%- endmacro %}\n{{ m(1) }}|", "{{ {'a': 1}\n }}", "{{\n\ns\n\n}}",
    "{%\nif\nt\n%}x{%\nendif\n%}", "{% if t %}{# c #}\nx{% endif %}", "{{ s }}{# c #}\nx", "{# a #}\n{# b #}\nx",
    "  {# a #}x", "x  {# a #}  \n y", "a{% if t %}\r\nb{% endif %}\r\n", "{% if t %}\x0bx{% endif %}", "{{ '\n' }}x",
    "{{ 'a\r\nb' }}", "{% set x %}\n  a\n{% endset %}[{{ x }}]", "{{ '' }}\n", "{{ s -}}\n\n\n{{ n }}",
    "{{ s }}\n\n\n{{- n }}", "{% if t %}a{% else %}b{% endif %}\n", "   {%- if t %}a{% endif %}",
    "\n\n   {%- if t %}a{% endif %}", "{%- if t %}\n   a\n{%- endif %}\n",
    "{% for m in messages %}\n    {%- if m.role == 'user' %}\n        {{- '[U]' + m.content }}\n    {%- else "
    "%}\n        {{- '[A]' ~ m['content'] }}\n    {%- endif %}\n{%- endfor %}\n",
    "{% if t %}\n  {% if no %}\n  a\n  {% else %}\n  b\n  {% endif %}\n{% endif %}", "{ { x } } {% if t %}{ {% endif %} {",
    "{", "{{", "{%", "{#", "}}", "%}", "#}", "a{", "{% if t %}x{% endif %}{", "#{{ n }}", "{{ n }}%", "%{{ n }}%",
    "{{'a'}}{{'b'}}", "{% if t%}{{n}}{%endif%}", "{% if t: %}x{% endif %}", "{% for x in l: %}{{ x }}{% endfor %}",
    "{%set x=1%}{{x}}", "{{ 1if 1else 2 }}", "{% for x in l -%}\n   {{ x }}   \n{%- else -%} e {%- endfor %}!",
    "{%- if t -%}{%- endif -%}", " {%- if t -%} {%- endif -%} ", "{% call(x) s.upper() %}{% endcall %}",
    "{% set x = {'a': [1, {'b': 2}]} %}{{ x.a[1].b }}", "{{ (((((1))))) }}",
]


def all_cases():
    text = (pathlib.Path(__file__).parent / "cases.txt").read_text()
    for line in re.split(r"(?<!\\)\n", text.strip("\n")):
        yield line, VARIABLES
    for template in BLOCKS:
        yield template, VARIABLES


def characters():
    """Every character, several hundred at a time, through what asks the Unicode tables."""
    known = [chr(c) for c in range(1, sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    for at in range(0, len(known), 4096):
        s = "".join(known[at:at + 4096])
        for template in ("{{ s|upper }}", "{{ s|lower }}", "{{ [s] }}", "{{ s.split() }}{{ s.splitlines() }}{{ s|tojson }}",
                         "{% for c in s %}{{ c.title() }}{{ c|capitalize }}{% endfor %}", "{{ s|wordcount }}{{ s[::7] }}",
                         "{% for c in s %}{{ c.isdigit()|int }}{{ c.isalpha()|int }}{{ c.isalnum()|int }}{{ c.isspace()|int }}"
                         "{{ c.islower()|int }}{{ c.isupper()|int }}{% endfor %}"):
            yield template, {"s": s}


def refused():
    for template in REFUSED:
        yield template, VARIABLES
