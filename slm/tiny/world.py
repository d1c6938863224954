"""The tiny world: word problems that are put together from the quantities and relations of relations.txt.

A story opens with a quantity, such as hours, and goes on with 1 to 4 relations whose types fit: hours ->
dollars -> dollars. Its kind is the list of their names; there are thousands of kinds. A Story is one problem
with its solution as a list of Steps. From it this module writes every text that the built-in model and its
teacher need: the question, a terse answer, worked solutions (equations only, or with the arithmetic spelled
out), a Python program, and wrong solutions for checkers to find.

    story = problems("train", 1)[0]
    story.kind, story.question, story.answer
    solve(story, "detailed")

Splits: one pair of relations in eight never occurs in a row in training (`held_out`). The stories with such a
pair are "unseen": each of their relations is known, the composition is new. Of the others a story belongs to
"test" when the SHA-1 of its question is 0 modulo 10, else to "train", so the two share kinds and no problem.
"""

import hashlib
import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

GIRLS = "Anna Mia Lily Emma Sara Nora Kate Julia Rosa Zoe Ella Maya".split()
BOYS = "Tom Ben Jack Leo Max Sam Paul Finn Omar Luke Noah Adam".split()
THINGS = ("apples books cards coins stamps marbles pencils shells stickers balls oranges cookies flowers "
          "stones buttons toys nuts plums").split()
PARTS = {2: "half", 3: "a third", 4: "a quarter"}
LENGTHS = {1: 2, 2: 4, 3: 3, 4: 1}  # how many relations a story has: how often
LARGEST = 999  # of any number in a solution


@dataclass(frozen=True)
class Step:
    """name = left op right, with a and b the values of left and right."""
    name: str
    left: str      # a variable's name or a number
    op: str
    right: str
    sentence: str  # {=} is the equation's place in a story, {name} in a relation
    a: int = 0     # a relation has no values
    b: int = 0
    value: int = 0

    def worked_out(self, values: dict[str, int]) -> "Step":
        """The step with the values of the variables put in; its value is 0 if it is not whole."""
        a, b = (values[x] if x in values else int(x) for x in (self.left, self.right))
        return replace(self, a=a, b=b, value=compute(a, self.op, b))


@dataclass(frozen=True)
class Story:
    """One word problem. `kind`: its first quantity and its relations; `given`: its numbers by variable name,
    in the order of the question."""
    id: str
    kind: tuple[str, ...]
    question: str
    given: dict[str, int]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        return str(self.steps[-1].value)


# ---- arithmetic ------------------------------------------------------------------------------------------

def compute(a: int, op: str, b: int) -> int:
    """a op b, or 0 if that is not whole. % is a percent of b."""
    if op == "/":
        return a // b if a % b == 0 else 0
    return {"+": a + b, "-": a - b, "*": a * b, "%": 0 if a * b % 100 else a * b // 100}[op]


def expression(a: int, op: str, b: int) -> str:
    return f"{a}% of {b}" if op == "%" else f"{a} {op} {b}"


def places(n: int) -> list[int]:
    """The parts of a number below 10,000 by decimal place, without zeros.

    >>> places(307)
    [300, 7]
    """
    parts = (n // unit % 10 * unit for unit in (1000, 100, 10, 1))
    return [part for part in parts if part]


def running_sum(parts: list[int]) -> list[str]:
    """The sums on the way to the total: [1800, 240, 30] -> ['1800 + 240 + 30', '2040 + 30']."""
    return [" + ".join(map(str, [sum(parts[:i]), *parts[i:]])) for i in range(1, len(parts))]


def spelled_out(a: int, op: str, b: int) -> list[str]:
    """The expressions between `a op b` and its value, each easy to get from the one before.

    >>> spelled_out(37, "*", 6)
    ['180 + 42']
    """
    if op == "+" and min(a, b) >= 10:
        by_place = [(a // p % 10 + b // p % 10) * p for p in (1000, 100, 10, 1)]
        return running_sum([part for part in by_place if part])
    if op == "-":
        parts = places(b)
        return [" - ".join(map(str, [a - sum(parts[:i]), *parts[i:]])) for i in range(1, len(parts))]
    if op == "*":
        return running_sum([part * min(a, b) for part in places(max(a, b))])
    if op == "/" and len(places(a // b)) > 1:
        parts = places(a // b)
        return [" + ".join(f"{part * b} / {b}" for part in parts), " + ".join(map(str, parts))]
    if op == "%":
        return [f"{b} * {a} / 100", f"{a * b} / 100"]
    return []


def equation(step: Step, detailed: bool) -> str:
    middle = spelled_out(step.a, step.op, step.b) if detailed else []
    return " = ".join([expression(step.a, step.op, step.b), *middle, str(step.value)])


# ---- the table -> stories --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Relation:
    """One block of relations.txt. What opens a story has no `source`; its `question` can end one. `moves`:
    the new quantity is B's. A step's variables: x the quantity before, n the number, r the quantity after."""
    name: str
    source: str
    target: str
    moves: bool
    sentence: str
    question: str
    numbers: tuple[int, ...]
    steps: tuple[Step, ...]

    def apply(self, x: int, n: int) -> int:
        """The quantity after it, or 0 if a step gives one that is not whole, too small or too large."""
        values = {"x": x, "n": n, "r": n}  # r: what an opening gives
        for step in self.steps:
            values[step.name] = step.worked_out(values).value
            if not 1 < values[step.name] <= LARGEST:
                return 0
        return values["r"]


@lru_cache
def relations() -> dict[str, Relation]:
    """Everything in relations.txt by name, first what opens a story."""
    text = (Path(__file__).parent / "relations.txt").read_text(encoding="utf-8")
    found = [_relation(block) for block in text.split("\n\n") if "\nO " in block]
    return {r.name: r for r in sorted(found, key=lambda r: bool(r.source))}


def _relation(block: str) -> Relation:
    name, source, moves, target = re.match(r"# ([\w-]+)(?:: (\w+) > (B )?(\w+))?\n", block).groups()
    sentence, question, numbers = (re.search(rf"^{letter} (.+)$", f"{block}\n{letter} none", re.M)[1]
                                   for letter in "OQV")
    low, dash, high = numbers.partition("-")
    drawn = range(int(low), int(high) + 1) if dash else map(int, numbers.split(","))
    steps = re.findall(r"^S (\w) = (\w) (\S) (\w) \| (.+)$", block, re.M)
    return Relation(name, source or "", target or name, bool(moves), sentence, question, tuple(drawn),
                    tuple(Step(*step) for step in steps))


def _draw(rng: random.Random) -> tuple[list[Relation], list[int]]:
    """What opens a story and the relations that follow, and a number for each of them."""
    everything = list(relations().values())
    while True:
        chain = [rng.choice([r for r in everything if not r.source])]
        for _ in range(rng.choices(list(LENGTHS), LENGTHS.values())[0]):
            chain.append(rng.choice([r for r in everything if r.source == chain[-1].target]))
        for _ in range(50):  # some chains fit few numbers
            numbers, value = [], 1
            for relation in chain:
                numbers.append(rng.choice(relation.numbers))
                value = value and relation.apply(value, numbers[-1])
            if value:
                return chain, numbers


def tell(rng: random.Random, id: str = "") -> Story:
    """A story of any kind, with relations, numbers, names and things drawn from rng."""
    chain, numbers = _draw(rng)
    names = {True: rng.sample(GIRLS, len(GIRLS)), False: rng.sample(BOYS, len(BOYS))}
    female, things = rng.random() < 0.5, rng.choice(THINGS)
    hero, present, result = names[female].pop(), "a", iter("pqrstuvw")
    given, values, sentences, steps = {}, {}, [], []
    for variable, relation, number in zip("abcde", chain, numbers):
        other = names[not female].pop()
        words = _words(hero, other, female, things) | {"n": str(number), "part": PARTS.get(number)}
        sentences.append(relation.sentence.format(**words))
        given[variable] = values[variable] = number
        here = {"x": present, "n": variable}
        for step in relation.steps:
            here[step.name] = next(result)
            step = replace(step, name=here[step.name], left=here[step.left], right=here[step.right],
                           sentence=step.sentence.format(**words | {step.name: "{=}"})).worked_out(values)
            values[step.name] = step.value
            steps.append(step)
        present = here.get("r", variable)
        if relation.moves:
            hero, female = other, not female
    asked = relations()[chain[-1].target].question
    text = " ".join([*sentences, asked.format(**_words(hero, "", female, things))])
    question = re.sub(r"\[(.+?)\]", lambda m: rng.choice(m[1].split("|")), text)
    return Story(id, tuple(relation.name for relation in chain), question, given, tuple(steps))


def _words(hero: str, other: str, female: bool, things: str) -> dict[str, str]:
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {"A": hero, "B": other, "things": things, "he": he, "him": him, "his": his, "He": he.title()}


def held_out(first: str, then: str) -> bool:
    """Whether no training story has these two relations in a row."""
    return int(hashlib.sha1(f"{first} {then}".encode()).hexdigest(), 16) % 8 == 0


def split_of(story: Story) -> str:
    """"train", "test" or "unseen"."""
    if any(held_out(*pair) for pair in pairwise(story.kind[1:])):
        return "unseen"
    return "train" if int(hashlib.sha1(story.question.encode()).hexdigest(), 16) % 10 else "test"


def training_story(rng: random.Random) -> Story:
    """A story for pretraining, never one of "test" or "unseen"."""
    while split_of(story := tell(rng)) != "train":
        pass
    return story


@lru_cache(maxsize=8)
def problems(split: str = "train", n: int | None = None) -> list[Story]:
    """The first n different stories of a split: "train" (default 4,000), "test" (500) or "unseen" (500).
    A shorter list is always the start of a longer one."""
    n = n or {"train": 4000, "test": 500, "unseen": 500}[split]
    rng = random.Random(f"tiny world, {split}")
    stories: dict[str, Story] = {}
    while len(stories) < n:
        story = tell(rng, f"tiny-{split}-{len(stories)}")
        if split_of(story) == split:
            stories.setdefault(story.question, story)
    return list(stories.values())


# ---- stories -> texts ------------------------------------------------------------------------------------

def solve(story: Story, style: str = "short") -> str:
    """The solution as text. terse: the bare answer; short: one sentence with its equation a step; detailed:
    the same with the arithmetic spelled out; python: a program that prints the answer (without the fence)."""
    if style == "terse":
        return f"The answer is {story.answer}."
    if style == "python":
        return program(story)
    detailed = style == "detailed"
    return "\n".join(step.sentence.replace("{=}", equation(step, detailed)) for step in story.steps)


def restate(story: Story) -> str:
    """The steps with their results alone, as a solution that follows a longer train of thought."""
    return " ".join(step.sentence.replace("{=}", str(step.value)) for step in story.steps)


def plan(story: Story) -> str:
    """The operations in order, without numbers: "First add, then divide." """
    verbs = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide", "%": "take the percentage"}
    return "First " + ", then ".join(verbs[step.op] for step in story.steps) + "."


def program(story: Story) -> str:
    """Python that prints the answer: the given numbers, one assignment a step, one print."""
    lines = [f"{name} = {value}" for name, value in story.given.items()]
    for s in story.steps:
        python = {"/": f"{s.left} // {s.right}", "%": f"{s.left} * {s.right} // 100"}
        lines.append(f"{s.name} = " + python.get(s.op, f"{s.left} {s.op} {s.right}"))
    return "\n".join([*lines, f"print({story.steps[-1].name})"])


def corrupt(story: Story, rng: random.Random) -> Story:
    """The same story solved with one mistake, carried on to the end: a slip in one result, or another
    operation. The answer always differs from the right one."""
    while True:
        wrong_at, values, steps = rng.randrange(len(story.steps)), dict(story.given), []
        for i, step in enumerate(story.steps):
            step = step.worked_out(values)
            if i == wrong_at and step.op in "+-*" and rng.random() < 0.3:
                other = rng.choice([op for op in "+-*" if op != step.op])
                step = replace(step, op=other, value=compute(step.a, other, step.b))
            elif i == wrong_at:
                step = replace(step, value=step.value + rng.choice([-10, -2, -1, 1, 2, 10]))
            steps.append(step)
            values[step.name] = step.value
        if all(0 < s.value <= LARGEST for s in steps) and steps[-1].value != story.steps[-1].value:
            return replace(story, steps=tuple(steps))
