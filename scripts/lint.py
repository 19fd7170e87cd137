#!/usr/bin/env python3
"""Checks the rules that a compiler does not: who may include what, sizes of files and functions, no leftovers.

Prints each breach as file:line: message and exits 1 if there is any.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# folder -> headers of ours that it may include beside its own. "x/" allows the whole folder.
MAY_INCLUDE = {
    "kernels": [],
    "models": ["kernels/kernels.h", "kernels/error.h", "kernels/progress.h"],
    "tokenizer": [],
    "engine": ["models/model.h", "kernels/kernels.h", "kernels/error.h", "kernels/progress.h", "kernels/sampling.h"],
    "server": ["engine/engine.h", "tokenizer/tokenizer.h", "tokenizer/detokenizer.h", "tokenizer/chat_template.h",
               "tokenizer/infill.h", "kernels/error.h"],
}
# folder -> headers of ours that it may not even see through others: the server knows no tensors.
NEVER_SEES = {
    "server": ["kernels/kernels.h", "models/model.h"],
}
# system header -> the files that may include it
ONLY_IN = {
    r"microhttpd\.h": r"server/http\.c",
    r"sentencepiece_processor\.h": r"tokenizer/sentencepiece_wrapper\.cc|tests/.*",
    r"gnutls/.*": r"server/api_keys\.c",
    r"(cjson/)?cJSON\.h": r"server/.*|models/.*|tokenizer/.*|tests/.*",
    r"cuda.*|cublas.*": r"kernels/cuda/.*",
    r"pcre2\.h": r"tokenizer/regex\.c",
    r"utf8proc\.h": r"tokenizer/(unicode\.h|normalizer\.c)",
}
MAX_FILE_LINES = 800
MAX_COLUMNS = 132
MAX_FUNCTION_LINES = 120
LONG_FUNCTIONS_IN = r"kernels/.*|models/forward\.c"  # style.md rule 8


def tracked(pattern):
    out = subprocess.run(["git", "ls-files", *pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in out.stdout.split("\n") if line and (ROOT / line).exists()]


def check_includes(path, lines, complain):
    folder = path.split("/")[0]
    for number, line in enumerate(lines, 1):
        match = re.match(r'\s*#\s*include\s+([<"])([^>"]+)[>"]', line)
        if not match:
            continue
        header = match.group(2)
        if match.group(1) == '"' and folder in MAY_INCLUDE and not header.startswith(folder + "/"):
            if header not in MAY_INCLUDE[folder]:
                complain(number, f'{folder}/ may not include "{header}"')
        for pattern, files in ONLY_IN.items():
            if re.fullmatch(pattern, header) and not re.fullmatch(files, path):
                complain(number, f"<{header}> belongs in {files}")


def included(path, seen):
    """Adds to seen every header of ours that path sees, itself or through others."""
    for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', (ROOT / path).read_text(), re.M):
        if header not in seen and (ROOT / header).exists():
            seen.add(header)
            included(header, seen)
    return seen


def check_sight(path, complain):
    for header in NEVER_SEES.get(path.split("/")[0], []):
        if header in included(path, set()):
            complain(1, f'sees "{header}" through what it includes')


def check_functions(path, lines, complain):
    if re.fullmatch(LONG_FUNCTIONS_IN, path):
        return
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start:
            if number - start - 1 > MAX_FUNCTION_LINES:
                complain(start, f"function of {number - start - 1} lines (at most {MAX_FUNCTION_LINES})")
            start = None


def main():
    breaches = []
    for path in tracked(["*.c", "*.h", "*.cc", "*.cu", "*.py", "*.sh", "Makefile"]):
        lines = (ROOT / path).read_text().split("\n")
        complain = lambda number, message: breaches.append(f"{path}:{number}: {message}")
        is_c = path.endswith((".c", ".h", ".cc", ".cu"))
        if is_c:
            check_includes(path, lines, complain)
            check_sight(path, complain)
            check_functions(path, lines, complain)
        if len(lines) > MAX_FILE_LINES:
            complain(len(lines), f"{len(lines)} lines (at most {MAX_FILE_LINES}): two files?")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS and not path.startswith("scripts/demo/"):
                complain(number, f"{len(line)} columns (at most {MAX_COLUMNS})")
            if line.rstrip() != line:
                complain(number, "space at the end of the line")
            if is_c and "\t" in line:
                complain(number, "tab")
    for breach in breaches:
        print(breach)
    print(f"lint: {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
