#!/usr/bin/env python3
"""Compares our Jinja interpreter with Python's jinja2, set up as transformers does, byte for byte.

python tests/jinja/compare.py [--renderer PATH] [--seed N] [--random N] [--keep-going]

Without --renderer, render.c and tokenizer/jinja*.c are compiled into a temporary folder. Cases: cases.py and chats.py beside this
file; then templates made at random by generate.py. Where jinja2 fails we must fail, in whatever words; what the template raises
itself must be the same text. Exits 1 if anything differs.
"""
import argparse
import copy
import datetime
import functools
import glob
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import unicodedata
import warnings

import jinja2
import jinja2.ext
import jinja2.sandbox

import cases
import chats
import generate

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TABLES = ROOT / "tokenizer/jinja_unicode_tables.h"  # comparable with a Python of the same Unicode version
NOW = 1735732800 + 45296  # a time of the year 2025
os.environ["TZ"] = "UTC"
warnings.simplefilter("ignore")  # of Python about what the templates become


class Generation(jinja2.ext.Extension):
    """{% generation %} as transformers' AssistantTracker has it when nobody tracks."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _generation_support(self, context, caller):
        return caller()


class Raised(Exception):
    pass


def raise_exception(message):
    raise Raised(str(message))


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(fmt)
    return env


@functools.lru_cache(maxsize=64)
def compiled(env, template):
    return env.from_string(template)


def reference(env, template, variables):
    try:
        text = compiled(env, template).render(**copy.deepcopy(variables))  # |indent changes lists
        text.encode()
        return {"text": text}
    except Raised as e:
        return {"raised": str(e)}
    except Exception as e:  # whatever Python objects to
        return {"error": f"{type(e).__name__}: {e}"}


def compile_renderer(folder):
    out = os.path.join(folder, "render")
    sources = [str(ROOT / "tests/jinja/render.c"), str(ROOT / "tokenizer/detokenizer.c"),
               *sorted(glob.glob(str(ROOT / "tokenizer/jinja*.c")))]
    subprocess.run(["gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", f"-I{ROOT}",
                    "-o", out, *sources, "-lcjson", "-lm"], check=True)
    return out


class Renderer:
    def __init__(self, path):
        self.path = path
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def __call__(self, template, variables):
        request = {"template": template, "variables": variables, "now": NOW}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.start()
            return {"crash": code}
        return json.loads(line)


# What jinja2 can and we refuse, knowingly. (It can slice numbers, if they are constants: to nothing.)
REFUSED = ("integer overflow", "beyond 64 bits", "not supported", "cannot be shown as text", "of 64 bits", "too many steps",
           "bytes of memory", "cannot be sliced", "unknown filter", "unknown test", "unknown function",
           "nested too deeply")


def agree(expected, ours):
    if "error" in expected:
        return "error" in ours
    return expected == ours


def show(template, variables, expected, ours):
    print(f"--- {template!r}\n    with {json.dumps(variables)[:400]}\n    jinja2: {json.dumps(expected)[:600]}\n"
          f"    ours:   {json.dumps(ours)[:600]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--renderer")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--random", type=int, default=3000)
    parser.add_argument("--most", type=int, default=20, help="differences to show")
    options = parser.parse_args()
    env = environment()
    with tempfile.TemporaryDirectory() as folder:
        renderer = Renderer(options.renderer or compile_renderer(folder))
        differing = 0

        def compare(template, variables, lenient):
            nonlocal differing
            expected, ours = reference(env, template, variables), renderer(template, variables)
            if agree(expected, ours):
                return "error" if "error" in expected else "raised" if "raised" in expected else "same"
            if lenient and "error" in ours and (" at 0x" in str(expected) or any(word in ours["error"] for word in REFUSED)):
                return "refused"
            differing += 1
            if differing <= options.most:
                show(template, variables, expected, ours)
            return "different"

        sections = [] if unicodedata.unidata_version not in TABLES.read_text() else [("characters", cases.characters(), False)]
        sections += [("cases", cases.all_cases(), False), ("chats", chats.all_cases(), False)]
        installed = chats.installed()
        if installed:
            sections.append((f"chats of {len(installed)} models' own templates", chats.all_cases(installed), False))
        elif os.environ.get("CI"):
            sys.exit("the package trl, with models' own templates, is not installed, and CI is set")
        else:
            print("models' own templates: skipped: the package trl is not installed (see scripts/setup.sh check)")
        sections.append((f"random (seed {options.seed})", generate.all_cases(options.seed, options.random), True))
        for name, source, lenient in sections:
            counts = {}
            for template, variables in source:
                result = compare(template, variables, lenient)
                counts[result] = counts.get(result, 0) + 1
            print(f"{name}: {sum(counts.values())}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
        for template, variables in cases.refused():
            expected, ours = reference(env, template, variables), renderer(template, variables)
            if "error" not in ours:
                differing += 1
                show(template, variables, expected, ours)
        renderer.process.stdin.close()
        if renderer.process.wait() != 0:
            print("the renderer ended badly")
            differing += 1
    return differing != 0


if __name__ == "__main__":
    sys.exit(main())
