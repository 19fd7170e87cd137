"""Training documents of the demo model, all generated from a seed.

A document is a list of (text, weight): the pieces joined are its text, and weight is what the loss
of their tokens counts. Random digits and key words, which nothing predicts, weigh 0; answers that
the model is to be checked on weigh more than 1.
"""

import random
import re

import stories
import tasks
import words as w

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
CONTROL = [USER, ASSISTANT, SYSTEM, END]
SUM_WEIGHT = 5.0
RECALL_WEIGHT = 5.0
REPEAT_WEIGHT = 1.5
NAME_WEIGHT = 3.0  # of a name that the story has told before
FACT_TOKENS = 15  # of a fact's line, its line end included
FILLER_CHARS = 3.7  # characters to a token of filler


def sum_parts(rng, spaced=False):
    a, b = tasks.training_pair(rng)
    question = f"{a} + {b} =" if spaced else f"{a}+{b}="
    return [(question, 0.05), (f" {a + b}" if spaced else str(a + b), SUM_WEIGHT)]


def sums(rng, lines=None):
    """Lines of sums; a short document now and then so that one sum alone ends the text too."""
    lines = lines or (rng.randint(1, 3) if rng.random() < 0.3 else rng.randint(4, 16))
    spaced = rng.random() < 0.1
    parts = []
    for i in range(lines):
        parts += sum_parts(rng, spaced)
        if i + 1 < lines:
            parts.append(("\n", 0.3))
    return parts


def patterns(rng):
    """A list to go on with: numbers, days, months, letters, or words that repeat."""
    kind = rng.random()
    separator = ", "
    if kind < 0.55:
        period = rng.randint(2, 6)
        pool = rng.choice([w.COLORS, w.ANIMALS, w.OBJECTS, w.FOODS, w.KEY_FIRST, w.KEY_SECOND, w.NUMBERS,
                           w.COLORS, w.KEY_FIRST + w.KEY_SECOND])
        unit = [rng.choice(pool) for _ in range(period)]
        if rng.random() < 0.7:
            separator = " "
        items = unit * rng.randint(3, max(3, 36 // period))
        head = separator.join(items[:period]) + separator
        rest = separator.join(items[period:])
        return [(head, 0.1), (rest, REPEAT_WEIGHT)]
    if kind < 0.8:
        step = rng.choice([1, 1, 1, 1, 2, 2, 3, 5, 10])
        start = rng.choice([1, step, step, rng.randint(1, 60)])
        items = [start + step * i for i in range(rng.choice([8, 10, 12, 15, 20]))]
        items = [n for n in items if n <= 100]
        if rng.random() < 0.15:
            items.reverse()
        items = [str(n) for n in items]
        if len(items) < 4:
            return patterns(rng)
    else:
        cycle = rng.choice([w.DAYS, w.DAYS, w.MONTHS, list(w.LETTERS), w.NUMBERS])
        start = 0 if cycle is w.NUMBERS or rng.random() < 0.4 else rng.randrange(len(cycle))
        items = cycle[start:] if cycle is w.NUMBERS or cycle is w.LETTERS else cycle[start:] + cycle[:start]
        if rng.random() < 0.2:
            separator = " "
    return [(separator.join(items), 1.0)]


PAIR_FORMS = ["{}", "{}", "{}:", "{} =", "{} is", "the {} is", "code of {} is", "The code of {} is"]


def pairs(rng, size):
    """Keys with values in some plain form, each then said again and again: the short way to learn recall."""
    n_keys = rng.randint(2, 8)
    keys = tasks.random_keys(rng, n_keys)
    if rng.random() < 0.5:
        keys = rng.sample(rng.choice([w.KEY_FIRST, w.KEY_SECOND, w.OBJECTS, w.ANIMALS]), n_keys)
    values = {key: tasks.random_code(rng)[:rng.choice([1, 2, 4])] for key in keys}
    form, end = rng.choice(PAIR_FORMS), rng.choice(["\n", ".\n", ", "])
    parts = []
    for i, key in enumerate(keys + [rng.choice(keys) for _ in range(min(30, size // 10) - n_keys)]):
        parts += [(form.format(key), 0.1), (f" {values[key]}", RECALL_WEIGHT if i >= n_keys else 0.0), (end, 0.3)]
    return parts


def recall(rng, size):
    """Facts among filler, then asked for again and again: about `size` tokens.

    Whole-line questions are repeats of facts; the code of a repeated fact carries the weight.
    """
    per_fact, per_line = 14, 22
    share = rng.choice([0.15, 0.3, 0.5, 0.8, 1.0])  # of the document that is facts and questions
    slots = max(3, int(size * share / per_fact))
    few = rng.random()
    n_keys = rng.randint(1, 2) if few < 0.4 else rng.randint(3, 6) if few < 0.75 else int(slots * rng.uniform(0.2, 0.5))
    n_keys = max(1, min(n_keys, slots // 2, 48))
    questions = slots - n_keys
    keys = tasks.random_keys(rng, n_keys)
    codes = {key: tasks.random_code(rng) for key in keys}
    n_fill = int(size * (1.0 - share) / per_line)
    # Facts fall anywhere; questions anywhere, but more of them late, where they reach far back.
    places = [(rng.random() * rng.choice([0.3, 1.0, 1.0]), 0) for _ in keys]
    far = rng.random() < 0.5  # a fact on the very first lines, often asked for: the longest reach
    if far:
        places[0] = (0.0 if rng.random() < 0.6 else rng.random() * 0.1, 0)
    places += [(1.0 if rng.random() < 0.2 else rng.random() ** 0.5, 1) for _ in range(questions)]
    places += [(rng.random(), 2) for _ in range(n_fill)]
    places.sort()
    pending = list(keys)
    known = []
    source = stories.filler(rng)
    inline = rng.random() < 0.15
    parts = []
    for _, what in places:
        gap = "" if not parts else (" " if inline and rng.random() < 0.7 else "\n")
        if what == 2:
            parts.append((gap + next(source), 0.3))
        elif what == 0 or not known:
            if not pending:
                continue
            key = pending.pop()
            known.append(key)
            parts += [(gap, 0.3), (f"The code of {key} is", 0.1), (f" {codes[key]}", 0.0), (".", 0.3)]
        else:
            key = known[0] if rng.random() < (0.4 if far else 0.1) else rng.choice(known)
            parts += [(gap, 0.3), (f"The code of {key} is", 0.1), (f" {codes[key]}", RECALL_WEIGHT), (".", 0.3)]
    return parts


def exam(rng, size):
    """Filler with facts in it, then each fact asked for once, as tasks.recall_prompt does: about `size` tokens."""
    n_keys = max(1, min(rng.choice([1, 1, 2, 2, 3, 4, 5, 6, 6, 8, 12, 16, 24]), size // (3 * FACT_TOKENS)))
    keys = tasks.random_keys(rng, n_keys)
    codes = {key: tasks.random_code(rng) for key in keys}
    lines, source = [], stories.filler(rng)
    left = (size - 2 * n_keys * FACT_TOKENS) * FILLER_CHARS
    while left > 0:
        lines.append(next(source))
        left -= len(lines[-1]) + FILLER_CHARS
    places = [rng.randint(0, len(lines)) for _ in keys]
    if rng.random() < 0.5:
        places[0] = 0
    facts = [(tasks.question(key), f" {codes[key]}", 0.0) for key in keys]
    told = [(place, 0, fact) for place, fact in zip(places, facts)] + [(i, 1, line) for i, line in enumerate(lines)]
    parts = []
    for _, is_line, what in sorted(told, key=lambda item: item[:2]):
        parts += [(what, 0.15), ("\n", 0.3)] if is_line else [(what[0], 0.1), what[1:], (".", 0.3), ("\n", 0.3)]
    rng.shuffle(keys)
    for key in keys:
        parts += [(tasks.question(key), 0.1), (f" {codes[key]}", RECALL_WEIGHT), (".", 1.0), ("\n", 0.3)]
    return parts[:-1]


def _hello(rng):
    return rng.choice(["Hello!", "Hi!", "Hello.", "Good morning!", "Hi there!", "Hello", "Hi"]), rng.choice(
        ["Hello! How can I help you?", "Hi! What can I do for you?", "Hello! It is nice to meet you."])


def _name(rng):
    return rng.choice(["What is your name?", "Who are you?", "What are you called?"]), rng.choice(
        ["My name is Pip. I am a small model.", "I am Pip, a small model."])


def _feel(rng):
    return rng.choice(["How are you?", "How are you today?", "Are you well?"]), rng.choice(
        ["I am well, thank you. How are you?", "I am happy today. Thank you!"])


def _thanks(rng):
    return rng.choice(["Thank you!", "Thanks!", "Thank you very much."]), rng.choice(
        ["You are welcome!", "I am happy to help."])


def _bye(rng):
    return rng.choice(["Goodbye!", "Bye!", "Good night!"]), rng.choice(["Goodbye! Have a nice day.", "Goodbye!"])


def _opposite(rng):
    a, b = rng.choice(list(w.OPPOSITES.items()))
    if rng.random() < 0.5:
        a, b = b, a
    return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."


def _sound(rng):
    animal, sound = rng.choice(list(w.SOUNDS.items()))
    return f"What does a {animal} say?".replace("a owl", "an owl"), f"It says {sound}."


def _color(rng):
    thing, color = rng.choice(list(w.THING_COLORS.items()))
    question = rng.choice([f"What color is {thing}?", f"Which color has {thing}?"])
    return question, f"{thing[0].upper()}{thing[1:]} is {color}."


def _home(rng):
    who, where = rng.choice(list(w.HOMES.items()))
    return f"Where does {who} live?", f"{who[0].upper()}{who[1:]} lives {where}."


def _after(rng):
    cycle, what = rng.choice([(w.DAYS, "day"), (w.MONTHS, "month")])
    i = rng.randrange(len(cycle))
    other = cycle[(i + 1) % len(cycle)]
    if rng.random() < 0.6:
        return f"What {what} comes after {cycle[i]}?", f"{other} comes after {cycle[i]}."
    return f"What {what} comes before {other}?", f"{cycle[i]} comes before {other}."


def _three(rng):
    what, pool = rng.choice([("animals", w.ANIMALS), ("colors", w.COLORS), ("days", w.DAYS), ("months", w.MONTHS)])
    a, b, c = rng.sample(pool, 3)
    return rng.choice([f"Name three {what}.", f"Tell me three {what}."]), f"{a}, {b} and {c}."


def _count(rng):
    n = rng.randint(3, 12)
    return f"Count to {n}.", ", ".join(str(i) for i in range(1, n + 1)) + "."


def _repeat(rng):
    said = " ".join(rng.choice(w.COLORS + w.OBJECTS + w.ANIMALS) for _ in range(rng.randint(2, 5)))
    return f"Say this again: {said}", said


def _joke(rng):
    return rng.choice(["Tell me a joke.", "Make me laugh."]), rng.choice(
        ["Why did the owl sit on the clock? It wanted to be on time.",
         "What does a bear eat in the rain? Wet honey.",
         "Why did the hen cross the road? To get to the other side."])


SMALL_TALK = [_hello, _name, _feel, _thanks, _bye, _opposite, _sound, _color, _home, _after, _three, _count,
              _repeat, _joke, _hello, _name]
SYSTEM_TEXTS = ["You are a helpful assistant.", "You are Pip.", "Be short and kind.", "You are a friendly helper."]


def chat_turn(rng, memory):
    """[(text, weight)] of the user's text and of the assistant's answer; `memory` lasts for the chat."""
    kind = rng.random()
    if kind < 0.2:
        a, b = tasks.training_pair(rng)
        ask = rng.choice(["What is {}+{}?", "What is {} + {}?", "How much is {}+{}?", "{}+{}=", "What is {} plus {}?"])
        return [(ask.format(a, b), 0.05)], [(f"{a}+{b}=", 0.5), (str(a + b), SUM_WEIGHT), (".", 0.5)]
    if kind < 0.3:
        animal = rng.choice(w.ANIMALS)
        ask = rng.choice([f"Tell me a story about a {animal}.", f"Tell me a story about a {animal}."])
        ask = ask.replace("a owl", "an owl")
        if rng.random() < 0.2:
            ask, animal = rng.choice(["Tell me a story.", "Tell me a short story."]), None
        return [(ask, 0.2)], tale(rng, animal)
    if kind < 0.4:
        if "name" in memory:
            return [("What is my name?", 0.2)], [("Your name is ", 1.0), (memory["name"], 3.0), (".", 1.0)]
        memory["name"] = rng.choice(w.GIRLS + w.BOYS)
        return [(f"My name is {memory['name']}.", 0.1)], [(f"Nice to meet you, {memory['name']}!", 1.5)]
    if kind < 0.5:
        if memory.get("codes") and rng.random() < 0.7:
            key = rng.choice(list(memory["codes"]))
            code = memory["codes"][key]
            return [(f"What is the code of {key}?", 0.1)], [(f"The code of {key} is", 1.0), (f" {code}", RECALL_WEIGHT), (".", 1.0)]
        key, code = tasks.random_key(rng), tasks.random_code(rng)
        memory.setdefault("codes", {})[key] = code
        return [(tasks.fact(key, code), 0.05)], [(rng.choice(["Thank you. I will remember it.", "I will remember that."]), 1.0)]
    ask, answer = rng.choice(SMALL_TALK)(rng)
    return [(ask, 0.1)], [(answer, 1.5)]


def chat(rng, turns=None):
    """A chat as the chat template writes it: <|role|>, newline, text, <|end|>, newline."""
    parts = []
    memory = {}
    if rng.random() < 0.25:
        parts.append((f"{SYSTEM}\n{rng.choice(SYSTEM_TEXTS)}{END}\n", 0.05))
    for _ in range(turns or rng.choice([1, 1, 1, 2, 3, 4])):
        ask, answer = chat_turn(rng, memory)
        parts.append((USER + "\n", 0.1))
        parts += ask
        parts.append((END + "\n" + ASSISTANT + "\n", 0.1))
        parts += answer
        parts.append((END, 1.0))
        parts.append(("\n", 0.05))
    return parts


def tale(rng, animal=None):
    """A story, in which names count more once they are known."""
    parts, known = [], set()
    for text in re.split(rf"\b({'|'.join(w.GIRLS + w.BOYS)})\b", stories.story(rng, animal)):
        parts.append((text, NAME_WEIGHT if text in known else 1.0))
        if text in w.GIRLS or text in w.BOYS:
            known.add(text)
    return parts


def copies(rng, size):
    """Random words said twice or more: what teaches a small model to look things up at all."""
    pool = w.KEY_FIRST + w.KEY_SECOND + w.OBJECTS + list("0123456789")
    unit = " ".join(rng.choice(pool) for _ in range(rng.randint(6, max(7, size // 6))))
    times = max(2, min(4, size // (2 * len(unit) // 5 + 1)))
    return [(unit, 0.05)] + [("\n" + unit, REPEAT_WEIGHT)] * (times - 1)


def document(rng, size, mix):
    """One document of at most about `size` tokens; `mix` maps a kind to its share."""
    kind = rng.choices(list(mix), weights=list(mix.values()))[0]
    if kind in ("recall", "exam", "pairs"):
        return {"recall": recall, "exam": exam, "pairs": pairs}[kind](rng, size)
    if kind == "copies":
        return copies(rng, min(size, 400))
    return {"sums": sums, "patterns": patterns, "chat": chat, "story": tale}[kind](rng)


def plain(parts):
    return "".join(text for text, _ in parts)


if __name__ == "__main__":
    generator = random.Random(3)
    for name in ("sums", "patterns", "recall", "exam", "pairs", "chat", "copies", "story"):
        for _ in range(2):
            print(f"--- {name}\n{plain(document(generator, 160, {name: 1}))}")
