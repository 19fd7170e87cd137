#!/usr/bin/env python3
"""Makes the documents of the tasks beside it, of what the demo model was trained on and of what it was not.

    python3 tests/e2e/lm_eval/make_tasks.py
"""

import json
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "scripts" / "demo"))
import tasks  # noqa: E402
import words  # noqa: E402


def write(name, documents):
    with open(HERE / name, "w") as f:
        f.writelines(json.dumps(d) + "\n" for d in documents)


def recall(rng):
    """Which of the codes in the text belongs to a key: the model knows."""
    keys = tasks.random_keys(rng, 4)
    codes = [tasks.random_code(rng) for _ in keys]
    lines = [tasks.fact(key, code) for key, code in zip(keys, codes)]
    gold = rng.randrange(4)
    return {"query": "\n".join([*lines, tasks.question(keys[gold])]), "choices": [" " + c for c in codes], "gold": gold}


def guess(rng):
    """Which animal a story is about before it says so: nobody knows."""
    choices = rng.sample(words.ANIMALS, 4)
    query = f"Once upon a time there was a {rng.choice(words.ADJECTIVES)}"
    return {"query": query, "choices": [" " + c for c in choices], "gold": rng.randrange(4)}


def sums(rng, low, high):
    a, b = rng.randint(low, high), rng.randint(low, high)
    return {"query": f"{a}+{b}=", "answer": str(a + b)}


def main():
    rng = random.Random(1)
    write("choices.jsonl", [recall(rng) for _ in range(40)] + [guess(rng) for _ in range(40)])
    two_digits = [{"query": q, "answer": a} for q, a in tasks.sum_prompts(60)]
    write("sums.jsonl", two_digits + [sums(rng, 100, 999) for _ in range(40)])  # three digits it never saw


if __name__ == "__main__":
    main()
