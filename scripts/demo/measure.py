"""Measures the demo model: held-out sums, recall by depth and length, stories.

    python scripts/demo/measure.py --url http://127.0.0.1:8000 --check
    python scripts/demo/measure.py --local models/demo --json

--check exits with 1 unless sums and recalls, of one planted fact and among several, are right in at least 95 %,
at every length, and every story is one. Recall among several asks for more than reading the right place.
"""

import argparse
import json
import random
import re
import sys

import backends
import stories
import tasks
import words

BAR = 0.95
DEPTHS = [i / 9 for i in range(10)]
LENGTHS = [128, 512, 1024, 1536, 2040]
ANSWER_TOKENS = 8  # of a recall: a space, four digits, the full stop, and room


def share(right):
    return sum(right) / len(right)


def measure_sums(backend, count):
    pairs = tasks.sum_prompts(count)
    answers = backend.complete([prompt for prompt, _ in pairs], 6)
    wrong = [f"{p}{got.split(chr(10))[0]}" for (p, want), (got, _) in zip(pairs, answers) if not tasks.check_sum(got, want)]
    return {"count": len(pairs), "right": 1 - len(wrong) / len(pairs), "wrong": wrong[:10]}


def measure_recall(backend, lengths, repeats, n_keys):
    """Prompts with n_keys facts, of which one is asked for.

    {"right": share, "by_length": {length: {"right", "tokens", "by_depth": [share per depth]}}}."""
    cases = [(length, d, r) for length in lengths for d in range(len(DEPTHS)) for r in range(repeats)]

    def build(case):
        length, d, r = case
        target = min(length, backend.max_model_len - ANSWER_TOKENS)
        return tasks.recall_prompt(f"measure {length} {d} {r}", target, DEPTHS[d], backend.count_tokens,
                                   n_keys=n_keys)

    prompts = backend.map(build, cases)
    answers = backend.complete([prompt for prompt, _, _ in prompts], ANSWER_TOKENS)
    right = [tasks.check_recall(got, want) for (_, want, _), (got, _) in zip(prompts, answers)]
    by_length = {}
    for length in lengths:
        rows = [i for i, case in enumerate(cases) if case[0] == length]
        by_length[length] = {
            "right": share([right[i] for i in rows]),
            "tokens": max(prompts[i][2] for i in rows),
            "by_depth": [share([right[i] for i in rows if cases[i][1] == d]) for d in range(len(DEPTHS))],
        }
    return {"count": len(cases), "n_keys": n_keys, "right": share(right), "by_length": by_length}


def loops(text, longest=8):
    """Whether a group of up to `longest` words follows itself three times at once."""
    words = text.split()
    for size in range(1, longest + 1):
        for i in range(len(words) - 3 * size + 1):
            if words[i:i + size] == words[i + size:i + 2 * size] == words[i + 2 * size:i + 3 * size]:
                return True
    return False


def names(text):
    """The characters' names in a text, each once, in order."""
    found = re.findall(r"[A-Z][a-z]+", text)
    return list(dict.fromkeys(name for name in found if name in words.GIRLS + words.BOYS))


def story_faults(prompt, text, reason, known):
    """What is wrong with a story's continuation; an empty list is a story of one or two named characters."""
    faults = []
    told = re.findall(r"[a-z]+", text.lower())
    if any(not (c.isprintable() or c == "\n") for c in text):
        faults.append("not printable")
    if reason == "stop" and len(told) < 60:
        faults.append(f"ends after {len(told)} words")
    if reason not in ("stop", "length"):
        faults.append(f"finish_reason {reason}")
    if not told or sum(word in known for word in told) / len(told) < 0.98:
        faults.append("words outside the grammar")
    if len(names(prompt + text)) > 2:
        faults.append("names drift: " + " ".join(names(prompt + text)))
    if not set(names(prompt)) <= set(names(text)):
        faults.append("forgets " + " ".join(names(prompt)))
    if loops(text):
        faults.append("loops")
    return faults


STORY_PROMPTS = [
    "Once upon a time", "Once upon a time, there was a brave fox named Ruby.", "Long ago, a kind bear named Tom",
    "One day, a little girl named Mia went to the forest.", "There was once a shy owl named Theo who lived by the lake.",
    "<|user|>\nTell me a story about a fox.<|end|>\n<|assistant|>\n",
]


def story_prompts(count):
    """The fixed ones, then first sentences of the grammar up to `count`."""
    rng = random.Random("measure stories")
    drawn = [stories.fill(rng, rng.choice(stories.OPENINGS), stories.make_cast(rng)).strip() for _ in range(count)]
    return (STORY_PROMPTS + drawn)[:count]


def measure_stories(backend, count, max_tokens=400):
    known = stories.vocabulary()
    prompts = story_prompts(count)
    answers = backend.complete(prompts, max_tokens)
    faults = {prompt: found for prompt, (text, reason) in zip(prompts, answers)
              if (found := story_faults(prompt, text, reason, known))}
    apart = [len(names(prompt + text)) == 2 for prompt, (text, _) in zip(prompts, answers)]
    return {"count": count, "right": 1 - len(faults) / count, "faults": faults, "two_names": share(apart),
            "ended": share([reason == "stop" for _, reason in answers]), "first": prompts[0] + answers[0][0]}


def table(result):
    lines = [f"sums      {result['sums']['right']:7.1%} of {result['sums']['count']} held-out sums"]
    if result["sums"]["wrong"]:
        lines.append("          wrong: " + ", ".join(result["sums"]["wrong"]))
    for recall in result["recall"]:
        lines.append(f"recall    {recall['right']:7.1%} of {recall['count']} prompts with {recall['n_keys']} "
                     f"fact{'s' * (recall['n_keys'] > 1)}")
        for found in recall["by_length"].values():
            depths = " ".join(f"{100 * v:3.0f}" for v in found["by_depth"])
            lines.append(f"  {found['tokens']:5} tokens {found['right']:7.1%}   by depth: {depths}")
    lines.append(f"stories   {result['stories']['right']:7.1%} of {result['stories']['count']}, "
                 f"{result['stories']['ended']:.0%} ended by themselves, "
                 f"{result['stories']['two_names']:.0%} with a name for each of two characters")
    for prompt, faults in result["stories"]["faults"].items():
        lines.append(f"          {prompt!r}: {', '.join(faults)}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="base address of a running server")
    where.add_argument("--local", metavar="FOLDER", help="measure with transformers instead")
    parser.add_argument("--model", help="the model's name at the server (default: the first it lists)")
    parser.add_argument("--dtype", default="bfloat16", help="of --local")
    parser.add_argument("--threads", type=int, default=8, help="requests at once")
    parser.add_argument("--sums", type=int, default=400)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the recall prompts")
    parser.add_argument("--repeats", type=int, default=4, help="recall prompts per length and depth")
    parser.add_argument("--crowded", type=int, nargs="*", default=[2, 6], help="also recall among this many facts")
    parser.add_argument("--stories", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 under the 95 %% bars")
    run = parser.parse_args()
    backend = backends.Http(run.url, run.model, run.threads) if run.url else backends.Local(run.local, run.dtype)
    result = {"sums": measure_sums(backend, run.sums),
              "recall": [measure_recall(backend, run.lengths, run.repeats, n) for n in [1, *run.crowded]],
              "stories": measure_stories(backend, run.stories)}
    shares = [result["sums"]["right"]] + [found["right"] for recall in result["recall"]
                                          for found in [recall, *recall["by_length"].values()]]
    result["passed"] = min(shares) >= BAR and result["stories"]["right"] == 1
    print(json.dumps(result, indent=1) if run.json else table(result))
    sys.exit(1 if run.check and not result["passed"] else 0)


if __name__ == "__main__":
    main()
