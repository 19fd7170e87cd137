"""Short stories from a small grammar.

A template is text with `[a|b|c]` (one of, may nest) and `{slot}` (a name filled from the story's
cast). Templates are parsed once; a story draws a cast, one plot, and one template per beat.
"""

import random
import re

import words as w

_TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")


def _parse(text):
    """Template text -> sequence of str, ("slot", name) and ("alt", [sequence, ...])."""
    stack = [[[]]]  # a frame is a list of alternatives, an alternative a list of parts
    for piece in _TOKEN.findall(text):
        if piece == "[":
            stack.append([[]])
        elif piece == "|":
            stack[-1].append([])
        elif piece == "]":
            alternatives = stack.pop()
            stack[-1][-1].append(("alt", alternatives))
        elif piece[0] == "{":
            stack[-1][-1].append(("slot", piece[1:-1]))
        else:
            stack[-1][-1].append(piece)
    assert len(stack) == 1 and len(stack[0]) == 1, text
    return stack[0][0]


def _expand(rng, parts, cast, out):
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif part[0] == "slot":
            out.append(cast[part[1]])
        else:
            _expand(rng, rng.choice(part[1]), cast, out)


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_CACHE = {}


def fill(rng, template, cast):
    """One random expansion of `template`, with "a" turned into "an" where needed."""
    parts = _CACHE.get(template)
    if parts is None:
        parts = _CACHE[template] = _parse(template)
    out = []
    _expand(rng, parts, cast, out)
    return _ARTICLE.sub(r"\1n ", "".join(out))


OPENINGS = [
    "Once upon a time[,|] there was a {adj} {kind} named {hero}. ",
    "Once upon a time, in a {adj2} {place}, there lived a {adj} {kind} named {hero}. ",
    "Once upon a time, a {adj} {kind} named {hero} lived [near|by|in] the {place}. ",
    "Long ago, a {adj} {kind} named {hero} lived [near|by|in] the {place}. ",
    "[One day|One {weather} morning], a {adj} {kind} named {hero} [went to|walked to|came to] the {place}. ",
    "There was once a {adj} {kind} named {hero} who lived [near|by|in] the {place}. ",
    "{hero} was a {adj} {kind} who lived [near|by] the {place}. ",
]
SECOND = [
    "{He} liked to [play|sing|run|read|walk] [in the sun|by the water|every morning|with {his} friends]. ",
    "{He} had a {color} {thing} and took it [everywhere|to the {place2}|to bed]. ",
    "Every [morning|evening|day], {he} [looked at the sky|ate some {food}|walked to the {place2}] and [smiled|sang a song|said hello to everyone]. ",
    "{He} lived with {his} [mother|father|grandmother|sister|brother] in a [little|old|{color}] house. ",
    "Everyone in the {place} [knew|loved|liked] {him}. ",
]
WEATHER = [
    "It was a {weather} day, and [the wind sang in the trees|the birds were singing|the air smelled of {food}]. ",
    "The sky was [{color}|gray|blue] and the day was {weather}. ",
    "That [morning|day] it was {weather}. ",
    "",
    "",
]
FEELING = [
    "{hero} was [very|so] [happy|glad|excited]. ",
    "{hero} [smiled|laughed|danced] and [clapped|jumped for joy|sang a song]. ",
    "{He} felt [warm inside|proud and happy|like the luckiest {kind} in the {place}]. ",
]
SAD = [
    "{hero} was [very|so] sad. ",
    "{He} sat down [under a tree|on a stone|by the road] and began to cry. ",
    "{He} did not know what to do. ",
    "{hero} felt [small|sad|lost] and [alone|tired]. ",
]
MEET = [
    "Then {he} [met|saw] a {adj3} {kind2} named {friend}. ",
    "On the way, {he} met a {adj3} {kind2}. [The {kind2}'s name was {friend}|Its name was {friend}]. ",
    "Just then, a {adj3} {kind2} named {friend} came [by|down the road|out of the {place2}]. ",
]
ASK = [
    '"[What is wrong|Why are you sad|What happened]?" asked {friend}. ',
    '"Can I help you?" asked {friend}. ',
    '"Hello, {hero}," said {friend}. "[Do you need help|Why do you look so sad]?" ',
]
ENDINGS = [
    "[From that day on|After that day], {hero} and {friend} were [best|good] friends.",
    "That night, {hero} [fell asleep with a smile|dreamed of the {place2}|slept very well]. The end.",
    "And they [all lived happily|lived happily ever after].",
    '"[Thank you|You are a true friend], {friend}," said {hero}. And they [walked home together|shared some {food}|laughed all the way home].',
    "{hero} learned that [it is good to share|a friend is the best gift|being kind is never wrong|even a small {kind} can be brave].",
    "And whenever it was {weather}, {hero} [remembered|thought of] that day and smiled.",
]

# A plot is a list of paragraphs, a paragraph a list of beats, a beat a list of templates.
PLOTS = {
    "lost": [
        [["One day, {hero} lost {his} {color} {thing}. ", "One {weather} morning, {his} {color} {thing} was gone. "],
         ["{He} looked [under the bed|behind the door] and [in the {place}|by the well], but [could not find it|it was not there]. "], SAD],
        [MEET, ASK,
         ['"I lost my {thing}," said {hero}. "I have looked everywhere." ', '"I cannot find my {color} {thing}," {hero} said. '],
         ['"Let us look [together|in the {place2}]," said {friend}. ', '"Do not worry," said {friend}. "We will find it." ']],
        [["They looked [all day|for a long time|until the sun went down]. ", "They went to the {place2} and looked [behind every tree|under every stone]. "],
         ["At last, {friend} saw something {color} [in the grass|under a bush|high in a tree]. ", "Then {hero} saw [a bit of {color}|something {color}] [by the water|between two stones]. "],
         ["It was the {thing}! "], FEELING],
    ],
    "storm": [
        [["One night, a [big|great|terrible] storm came to the {place}. ", "Dark clouds came over the {place}, and [it began to rain|the wind began to blow]. "],
         ["The rain [fell and fell|fell hard on the roof]. ", "The thunder was [very loud|so loud that the windows shook]. "],
         ["{hero} was afraid, but {he} wanted to be brave. ", "{hero} hid under a {color} blanket. "]],
        [["Then {he} heard a [small voice|knock at the door]. "],
         ['It was a {adj3} {kind2} named {friend}. "[Please let me in|I am cold and wet]," said {friend}. '],
         ['"Come in," said {hero}. "[You can sit by the fire|I have some warm {food}]." ', "{hero} opened the door [at once|slowly] and gave {friend} some {food}. "]],
        [["They [told stories|sang songs|played games] until the storm was over. ", "They sat by the fire and shared the {food}. "],
         ["In the morning, the sun came out and [the {place} was bright|everything was clean and new]. "], FEELING],
    ],
    "baking": [
        [["One day, {hero} wanted to make {food} for {friend}, a {adj3} {kind2}. ", "It was {friend}'s birthday, and {hero} wanted to make {food}. {friend} was a {adj3} {kind2}. "],
         ["{He} [looked in the kitchen|opened every box], but there [was no sugar|was nothing to cook with]. "],
         ['"I will go to the {place2}," said {hero}. ', "So {he} took a basket and walked to the {place2}. "]],
        [["At the {place2}, {he} found [all that {he} needed|sugar and {food2}|a kind old woman who sold {food2}]. "],
         ["But on the way home, {he} dropped the basket [in the mud|on the road]. ", "But the basket was very heavy. "], SAD],
        [["Just then, {friend} came [by|down the road]. "],
         ['"[Let me help you|We can carry it together]," said {friend}. '],
         ["They went home and made the {food} together. ", "Soon the whole house smelled of {food}. "], FEELING],
    ],
    "race": [
        [["One day, there was a race [in the {place}|from the {place} to the {place2}]. "],
         ["A {adj3} {kind2} named {friend} wanted to win. ", '"I will win," said {friend}, a {adj3} {kind2}. "No one is as fast as me." '],
         ['"I will try too," said {hero}. ', "{hero} wanted to run too, and everyone laughed. "]],
        [["[One, two, three, go|Ready, set, go]! They ran [down the hill|along the river|past the old mill]. "],
         ["{friend} was [first|far ahead], but then {friend} fell [into a hole|over a stone]. "],
         ["{hero} could win the race now. But {he} stopped and [helped {friend} up|ran back to help]. "]],
        [['"Why did you stop?" asked {friend}. '],
         ['"A friend is better than a [prize|race]," said {hero}. '],
         ["They walked to the end [side by side|hand in hand], and everyone [clapped|was happy]. "], FEELING],
    ],
    "seed": [
        [["One day, {hero} found a {color} seed [on the road|in {his} pocket|in an old box]. "],
         ["{He} put it in the ground and gave it water every [day|morning]. "],
         ["[Days went by|A week went by], but nothing happened. "], SAD],
        [MEET, ['"Seeds need [time|sun and time]," said {friend}. "[Wait a little|Do not give up]." ', '"Sing to it," said {friend}. "Plants like songs." '],
         ["So {hero} [waited|sang] and {friend} [waited|sang] too. "]],
        [["One {weather} morning, there was a [small|tiny] green leaf. ", "Then, one day, something green came out of the ground. "],
         ["It grew and grew until it was [as tall as a house|a big tree|full of {color} flowers]. "], FEELING],
    ],
    "trip": [
        [["One day, {hero} wanted to see the {place2}. ", '"I want to see the {place2}," {hero} said one morning. '],
         ["{He} packed some {food} and a {thing} and [set off|left the house]. "], WEATHER,
         ["The road was long, and {his} feet were tired. ", "{He} walked over the hill and past the {place}. "]],
        [MEET, ['"Where are you going?" asked {friend}. '],
         ['"To the {place2}," said {hero}. "[Come with me|Do you know the way]?" '],
         ["{friend} [said yes|smiled and showed the way]. ", '"I know the way," said {friend}. "[Follow me|It is not far]." ']],
        [["When they came to the {place2}, [the sun was going down|it was already night]. "],
         ["They saw [a thousand stars|{color} flowers everywhere|boats on the water|lights in every window]. "],
         ['"It is [beautiful|wonderful]," said {hero}. '], FEELING],
    ],
    "gift": [
        [["One day, {hero} found a {color} {thing} [by the road|in the grass|under a tree]. "],
         ['"Whose {thing} is this?" {he} [asked|thought]. '],
         ["{He} wanted to keep it, but it was not {his2}. ", "It was the most beautiful {thing} {he} had ever seen. "]],
        [["{He} asked [the baker|the old man at the mill|every house in the {place}], but no one knew. "],
         ["At last {he} came to a {adj3} {kind2} named {friend}, who was crying. "],
         ['"I lost my {thing}," said {friend}. "It was a gift from my [mother|grandmother|brother]." ']],
        [['"Is this your {thing}?" asked {hero}. ', "{hero} held out the {color} {thing}. "],
         ['"Yes! [Thank you|You found it]!" said {friend}. '],
         ["{friend} gave {hero} [some {food}|a big hug|a {thing2}]. "], FEELING],
    ],
}


def make_cast(rng, animal=None):
    """The slots of one story; `animal` forces what the hero is."""
    kind = animal or rng.choice(w.ANIMALS + ["girl", "boy"] * 6)
    girl = kind == "girl" or (kind != "boy" and rng.random() < 0.5)
    hero = rng.choice(w.GIRLS if girl else w.BOYS)
    friend = rng.choice([n for n in w.GIRLS + w.BOYS if n != hero])
    kind2 = rng.choice([a for a in w.ANIMALS if a != kind])
    adj, adj2, adj3 = rng.sample(w.ADJECTIVES, 3)
    place, place2 = rng.sample(w.PLACES, 2)
    thing, thing2 = rng.sample(w.OBJECTS, 2)
    food, food2 = rng.sample(w.FOODS, 2)
    return {
        "hero": hero, "friend": friend, "kind": kind, "kind2": kind2, "adj": adj, "adj2": adj2, "adj3": adj3,
        "place": place, "place2": place2, "thing": thing, "thing2": thing2, "food": food, "food2": food2,
        "color": rng.choice(w.COLORS), "weather": rng.choice(w.WEATHER),
        "he": "she" if girl else "he", "He": "She" if girl else "He", "his": "her" if girl else "his",
        "him": "her" if girl else "him", "his2": "hers" if girl else "his",
    }


def story(rng, animal=None):
    """One story: about five paragraphs separated by an empty line, 150 to 300 tokens."""
    cast = make_cast(rng, animal)
    paragraphs = [[OPENINGS, SECOND, WEATHER], *PLOTS[rng.choice(list(PLOTS))], [ENDINGS]]
    text = []
    for beats in paragraphs:
        text.append("".join(fill(rng, rng.choice(beat), cast) for beat in beats).strip())
    return "\n\n".join(text)


_SENTENCE = re.compile(r'[^.!?]*[.!?]+"?(?: (?:said|asked) \w+\.)?')


def filler(rng):
    """Endless short paragraphs (one line each, no code in them) cut from stories."""
    while True:
        for paragraph in story(rng).split("\n\n"):
            sentences = [s.strip() for s in _SENTENCE.findall(paragraph)]
            while sentences:
                n = rng.randint(1, 3)
                yield " ".join(sentences[:n])
                sentences = sentences[n:]


def vocabulary():
    """Every lower-cased word the grammar can print (for measuring how much of a text is made of it)."""
    found = set()

    def visit(value):
        if isinstance(value, str):
            found.update(re.findall(r"[a-z]+", value.lower()))
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(key)
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for name in dir(w):
        if name.isupper() or name[0].isupper():
            visit(getattr(w, name))
    for group in (OPENINGS, SECOND, WEATHER, FEELING, SAD, MEET, ASK, ENDINGS, PLOTS):
        visit(group)
    found.update(["she", "he", "her", "his", "him", "hers", "an", "s"])
    return found


if __name__ == "__main__":
    generator = random.Random(1)
    for _ in range(3):
        print(story(generator), end="\n\n---\n\n")
