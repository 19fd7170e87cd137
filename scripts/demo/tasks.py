"""The checkable tasks of the demo model: exact prompts and expected answers.

Standard library only: training, tests and measure.py all build their prompts here.

    sums     "12+30="                          -> "42"
    recall   filler lines and fact lines
             "The code of apple-river is 4821."
             and, as the last line,
             "The code of apple-river is"      -> " 4821"
"""

import hashlib
import random

import stories
import words as w

SUM_LOW, SUM_HIGH = 10, 99


def is_held_out(a, b):
    """True for the tenth of the unordered pairs {a, b} that no training text ever shows as a sum."""
    low, high = min(a, b), max(a, b)
    return hashlib.sha256(f"sum {low} {high}".encode()).digest()[0] % 10 == 0


def held_out_pairs():
    """All held-out (a, b) with both operands of two digits, in a fixed order."""
    operands = range(SUM_LOW, SUM_HIGH + 1)
    return [(a, b) for a in operands for b in operands if is_held_out(a, b)]


def training_pair(rng):
    """A random pair of two-digit operands that is not held out."""
    while True:
        a, b = rng.randint(SUM_LOW, SUM_HIGH), rng.randint(SUM_LOW, SUM_HIGH)
        if not is_held_out(a, b):
            return a, b


def sum_prompt(a, b):
    """(prompt, answer); the model ends its answer with a newline or the end of the text."""
    return f"{a}+{b}=", str(a + b)


def sum_prompts(count, seed=0):
    """`count` held-out sums, without repeats, as [(prompt, answer)]."""
    pairs = held_out_pairs()
    random.Random(seed).shuffle(pairs)
    return [sum_prompt(a, b) for a, b in pairs[:count]]


def check_sum(completion, answer):
    """Whether the completed text is exactly the answer, up to a line end."""
    return completion.split("\n")[0].strip() == answer


def random_key(rng):
    return f"{rng.choice(w.KEY_FIRST)}-{rng.choice(w.KEY_SECOND)}"


def random_code(rng):
    return "".join(rng.choice("0123456789") for _ in range(4))


def random_keys(rng, count):
    """`count` different keys; some share a word, so that half a match is not enough."""
    keys = []
    while len(keys) < count:
        key = random_key(rng)
        if keys and rng.random() < 0.3:
            first, second = rng.choice(keys).split("-")
            key = f"{first}-{rng.choice(w.KEY_SECOND)}" if rng.random() < 0.5 else f"{rng.choice(w.KEY_FIRST)}-{second}"
        if key not in keys:
            keys.append(key)
    return keys


def question(key):
    return f"The code of {key} is"


def fact(key, code):
    return f"{question(key)} {code}."


def assemble(lines, facts, asked):
    """The prompt text: `lines` with each of `facts` [(index, key, code)] put before lines[index]."""
    text = []
    at = {}
    for index, key, code in facts:
        at.setdefault(index, []).append(fact(key, code))
    for index in range(len(lines) + 1):
        text += at.get(index, [])
        text += lines[index:index + 1]
    return "\n".join([*text, question(asked)])


def recall_prompt(seed, target_tokens, depth, count_tokens, n_keys=1):
    """One recall prompt of at most `target_tokens` tokens, and nearly as many.

    depth          0.0 puts the asked fact on the first line, 1.0 just before the question
    count_tokens   text -> number of prompt tokens (with the begin-of-text token)
    n_keys         facts in the prompt: the asked one and n_keys - 1 others at random places
    Returns (prompt, answer, tokens).
    """
    rng = random.Random(f"recall {seed}")
    keys = random_keys(rng, n_keys)
    rng.shuffle(keys)
    codes = [random_code(rng) for _ in keys]
    places = [depth] + [rng.random() for _ in keys[1:]]
    source = stories.filler(rng)
    pool = [next(source) for _ in range(target_tokens // 6 + 8)]

    def build(n):
        facts = [(round(place * n), key, code) for place, key, code in zip(places, keys, codes)]
        if depth > 0.0:  # first among the facts of its line at depth 0, else last
            facts = facts[1:] + facts[:1]
        return assemble(pool[:n], facts, keys[0])

    low, high = 0, len(pool)
    while low < high:  # the largest n that fits
        middle = (low + high + 1) // 2
        if count_tokens(build(middle)) <= target_tokens:
            low = middle
        else:
            high = middle - 1
    prompt = build(low)
    return prompt, " " + codes[0], count_tokens(prompt)


def check_recall(completion, answer):
    """Whether the completion starts with the code, and the code ends there."""
    got = completion.strip()
    return got[:4] == answer.strip() and not got[4:5].isdigit()
