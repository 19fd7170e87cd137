"""Prints tokenizer/jinja_unicode_tables.h: what Python's str methods know of characters, as ranges.

python3 tests/jinja/unicode_tables.py > tokenizer/jinja_unicode_tables.h
"""
import sys
import unicodedata

ALL = [c for c in range(0x80, sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]


def ranges(belongs):
    """[first, last] of each run of characters beyond ASCII that belongs() holds for."""
    found = []
    for c in ALL:
        if belongs(chr(c)):
            if found and found[-1][1] == c - 1:
                found[-1][1] = c
            else:
                found.append([c, c])
    return found


def steps(mapping):
    """[first, last, step, delta]: the characters first, first + step, .. last map to themselves plus delta."""
    found = []
    for c, to in sorted(mapping.items()):
        if found:
            first, last, step, delta = found[-1]
            gap = c - last
            if delta == to - c and (gap == step or (first == last and gap <= 2)):
                found[-1][1:3] = [c, gap]
                continue
        found.append([c, c, 1, to - c])
    return found


def cell_of(x):
    if isinstance(x, list):
        return "{" + ", ".join(map(cell_of, x)) + "}"
    return f"0x{x:X}" if x >= 0x80 else str(x)


def table(comment, declaration, rows):
    print(f"\n// {comment}\nstatic const {declaration} = {{")
    line = "   "
    for row in rows:
        cell = f" {cell_of(row)},"
        if len(line + cell) > 130:
            print(line)
            line = "   "
        line += cell
    print(line + "\n};")


def single(convert):
    return {c: ord(convert(chr(c))) for c in ALL if len(convert(chr(c))) == 1 and convert(chr(c)) != chr(c)}


def several(convert):
    return [[c, [ord(x) for x in convert(chr(c))]] for c in ALL if len(convert(chr(c))) > 1]


def main():
    def usual_title(c):
        return c.upper()[0] + c.upper()[1:].lower()

    print("/* jinja_unicode_tables.h: what Python's str methods know of characters beyond ASCII. Private to jinja_unicode.c.\n"
          f" * Written by tests/jinja/unicode_tables.py from Unicode {unicodedata.unidata_version}.\n */")
    print("#ifndef GPTD_TOKENIZER_JINJA_UNICODE_TABLES_H\n#define GPTD_TOKENIZER_JINJA_UNICODE_TABLES_H\n\n#include <stdint.h>")
    print("\nstruct char_range {\n    uint32_t first, last;\n};")
    print("\n// first, first + step, .. last become themselves plus delta.\n"
          "struct case_range {\n    uint32_t first, last;\n    int32_t step, delta;\n};")
    print("\nstruct case_special {\n    uint32_t from, to[3]; // 0: no more\n};")
    table("isspace()", "struct char_range spaces[]", ranges(str.isspace))
    table("isalpha()", "struct char_range letters[]", ranges(str.isalpha))
    table("isalnum() but not isalpha()", "struct char_range numerals[]",
          ranges(lambda c: c.isalnum() and not c.isalpha()))
    table("isdigit()", "struct char_range digits[]", ranges(str.isdigit))
    table("not isprintable()", "struct char_range unprintables[]", ranges(lambda c: not c.isprintable()))
    table("islower()", "struct char_range lower_letters[]", ranges(str.islower))
    table("isupper()", "struct char_range upper_letters[]", ranges(str.isupper))
    table("upper()", "struct case_range uppers[]", steps(single(str.upper)))
    table("lower()", "struct case_range lowers[]", steps(single(str.lower)))
    titles = {c: ord(chr(c).title()) for c in ALL if len(chr(c).title()) == 1 and chr(c).title() != usual_title(chr(c))}
    table("title(), where it is not upper()", "struct char_range only_titles[]", ranges(lambda c: ord(c) in titles))
    table("What they become", "struct case_range titles[]", steps({c: to for c, to in titles.items() if c != to}))
    table("upper() of several characters", "struct case_special special_uppers[]", several(str.upper))
    table("title() of several characters, where it is not upper() with all but the first lowered",
          "struct case_special special_titles[]",
          [row for row in several(str.title) if chr(row[0]).title() != usual_title(chr(row[0]))])
    print("\n#endif")


if __name__ == "__main__":
    main()
