"""The README's tables of families, tokenizers, fields and clients against what is there."""

import ast
import glob
import importlib
import json
import os
import re
import unittest

from harness import ROOT


def read(*path):
    with open(os.path.join(ROOT, *path)) as f:
        return f.read()


def table(head):
    """Rows of the README's table whose first cell is `head`, as lists of cells."""
    lines = read("README.md").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[begin + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


class Readme(unittest.TestCase):
    def test_families(self):
        listed = {names(row[0])[0] for row in table("`architectures`")}
        compared = set()
        for path in glob.glob(os.path.join(ROOT, "tests", "vectors", "*", "expected.safetensors")):
            with open(os.path.join(os.path.dirname(path), "config.json")) as f:
                compared.update(json.load(f)["architectures"])
        known = set(re.findall(r'\.architecture = "(\w+)"', read("models", "families.c")))
        self.assertEqual(listed, compared)
        self.assertEqual(listed, known)

    def test_tokenizers(self):
        tree = ast.parse(read("tests", "tokenizer", "compare.py"))
        kinds = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "KINDS")
        compared = {e.id for e in kinds.generators[0].iter.elts}
        shown = {"gpt2": "GPT-2", "llama3": "Llama-3", "qwen2": "Qwen2", "o200k": "GPT-4o", "bloom": "BLOOM",
                 "deepseek": "DeepSeek", "neox": "GPT-NeoX", "mistral": "Llama-2", "metaspace": "Mistral",
                 "gemma": "Gemma", "unigram": "Metaspace pieces",
                 "unigram_bytes": "with and without byte fallback"}
        self.assertEqual(compared, set(shown))
        text = " ".join(row[1] for row in table("tokenizer"))
        for kind, name in shown.items():
            self.assertIn(name, text, kind)

    def fields(self, head):
        return {name for row in table(head) if "400 that names" not in row[1] for name in names(row[0])}

    def test_fields(self):
        schemas = json.loads(read("server", "openapi.json"))["components"]["schemas"]
        completion, chat = (set(schemas[name]["properties"]) for name in ("CompletionRequest", "ChatRequest"))
        of_completion, of_chat = self.fields("field of `/v1/completions`"), self.fields("where `/v1/chat/completions` differs")
        self.assertEqual(of_completion, completion)
        self.assertEqual(of_chat | of_completion - {"prompt", "best_of", "echo", "suffix"}, chat)

    def test_clients(self):
        tested = {"curl": ("test_clients", "Curl"), "OpenAI's Python client": ("test_clients", "OpenAIClient"),
                  "LangChain": ("test_tools", "LangChain"), "schemathesis": ("test_tools", "Description"),
                  "litellm": ("test_tools", "LiteLLM"), "lm-evaluation-harness": ("test_lm_eval", "LmEval"),
                  "Gradio": ("test_gradio", "Gradio")}
        listed = {row[0].split(" (")[0] for row in table("client")}
        self.assertEqual(listed, set(tested))
        for module, name in tested.values():
            self.assertTrue(hasattr(importlib.import_module(module), name), f"{module}.{name}")
