"""The tiny world: word problems of 1 to 5 steps, from templates.txt (training) and unseen.txt (never seen).

A Story is one problem with its solution as a list of Steps. From it this module writes every text that the
built-in model and its teacher need: the question, a terse answer, worked solutions (equations only, or with
the arithmetic spelled out), a Python program, and wrong solutions for checkers to find.

    story = problems("train", 1)[0]
    story.question, story.answer
    solve(story, "detailed")

Splits: a story belongs to the test set when the SHA-1 of its question is 0 modulo 10, else to the training
set, so the two share no problem however many are drawn. "unseen" draws from the templates of unseen.txt.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
GIRLS = "Anna Mia Lily Emma Sara Nora Kate Julia Rosa Zoe Ella Maya".split()
BOYS = "Tom Ben Jack Leo Max Sam Paul Finn Omar Luke Noah Adam".split()
THINGS = ("apples books cards coins stamps marbles pencils shells stickers balls oranges cookies flowers "
          "stones buttons toys nuts plums").split()
LARGEST = 9999  # of any number in a solution


@dataclass(frozen=True)
class Step:
    """name = left op right, with a and b the values of left and right."""
    name: str
    left: str      # a variable's name or a number as written in the template
    op: str
    right: str
    sentence: str  # {=} is the equation's place in a story, {name} in a template
    a: Fraction = Fraction(0)  # a template has no values
    b: Fraction = Fraction(0)
    value: Fraction = Fraction(0)

    def worked_out(self, values: dict[str, Fraction]) -> "Step":
        """The step with the values of the variables put in."""
        a, b = (values[x] if x in values else Fraction(x) for x in (self.left, self.right))
        return replace(self, a=a, b=b, value=compute(a, self.op, b))


@dataclass(frozen=True)
class Story:
    """One word problem. `given` are its numbers by variable name, in the order of the template."""
    id: str
    template: str
    question: str
    given: dict[str, Fraction]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        return written(self.steps[-1].value)


# ---- numbers and arithmetic ------------------------------------------------------------------------------

def written(x: Fraction) -> str:
    """An integer, a short decimal, or a fraction a/b, as people write it.

    >>> written(Fraction(15, 2)), written(Fraction(2, 3))
    ('7.5', '2/3')
    """
    if x.denominator == 1:
        return str(x.numerator)
    if 1000 % x.denominator == 0 and x > 1:
        return f"{float(x):g}"
    return f"{x.numerator}/{x.denominator}"


def compute(a: Fraction, op: str, b: Fraction) -> Fraction:
    return {"+": a + b, "-": a - b, "*": a * b, "%": a * b / 100, "/": a / b, "frac": a / b}[op]


def expression(a: Fraction, op: str, b: Fraction) -> str:
    x, y = written(a), written(b)
    return {"%": f"{x}% of {y}", "frac": f"{x}/{y}"}.get(op, f"{x} {op} {y}")


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


def spelled_out(a: Fraction, op: str, b: Fraction) -> list[str]:
    """The expressions between `a op b` and its value, each easy to get from the one before.

    >>> spelled_out(Fraction(37), "*", Fraction(6))
    ['180 + 42']
    """
    if a.denominator != 1 or b.denominator != 1:
        return []
    a, b = int(a), int(b)
    if op == "+" and min(a, b) >= 10:
        by_place = [(a // p % 10 + b // p % 10) * p for p in (1000, 100, 10, 1)]
        return running_sum([part for part in by_place if part])
    if op == "-":
        parts = places(b)
        return [" - ".join(map(str, [a - sum(parts[:i]), *parts[i:]])) for i in range(1, len(parts))]
    if op == "*":
        a, b = max(a, b), min(a, b)
        if b >= 10 and len(places(b)) > 1:
            split = " + ".join(f"{a} * {part}" for part in places(b))
            return [split, *running_sum([x * part for part in places(b) for x in places(a)])]
        return running_sum([part * b for part in places(a)])
    if op == "/" and a // b >= 10 and len(places(a // b)) > 1:
        parts = places(a // b)
        return [" + ".join(f"{part * b} / {b}" for part in parts), " + ".join(map(str, parts))]
    if op == "%":
        return [f"{b} * {a} / 100", f"{a * b} / 100"]
    if op == "frac" and (divisor := a // Fraction(a, b).numerator) > 1:
        return [f"({a} / {divisor})/({b} / {divisor})"]
    return []


def equation(step: Step, detailed: bool) -> str:
    middle = spelled_out(step.a, step.op, step.b) if detailed else []
    return " = ".join([expression(step.a, step.op, step.b), *middle, written(step.value)])


# ---- templates -> stories --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    name: str
    question: str
    ranges: dict[str, list[Fraction]]
    steps: list[Step]
    kind: str  # "" whole numbers, "decimal" or "fraction"


@lru_cache
def templates(unseen: bool = False) -> list[Template]:
    text = (HERE / ("unseen.txt" if unseen else "templates.txt")).read_text(encoding="utf-8")
    return [_template(block) for block in text.split("\n\n") if "\nQ " in block]


def _template(block: str) -> Template:
    name, question, variables = (re.search(pattern, block, re.M)[1] for pattern in
                                 (r"^# (.+)\nQ", r"^Q (.+)$", r"^V (.+)$"))
    ranges, kind = {}, ""
    for item in variables.split("; "):
        variable, _, values = item.partition(" ")
        if not values:
            kind = item
        elif "-" in values:
            low, high = map(int, values.split("-"))
            ranges[variable] = [Fraction(n) for n in range(low, high + 1)]
        else:
            ranges[variable] = [Fraction(v) for v in values.split(",")]
    steps = re.findall(r"^S (\w+) = (\w+) (\S+) (\w+) \| (.+)$", block, re.M)
    return Template(name, question, ranges, [Step(*step) for step in steps], kind)


def _draw(template: Template, rng: random.Random) -> tuple[dict[str, Fraction], list[Step]]:
    """Numbers for the template's variables for which every step gives a fair value, and these steps."""
    while True:
        given = {name: rng.choice(choices) for name, choices in template.ranges.items()}
        values, steps = dict(given), []
        for step in template.steps:
            steps.append(step.worked_out(values))
            value = values[step.name] = steps[-1].value
            whole, frac = value.denominator == 1, step.op == "frac"
            fair = {"": whole, "decimal": 100 % value.denominator == 0,
                    "fraction": value < 1 and not whole if frac else whole}[template.kind]
            if not fair or not 0 < value <= LARGEST:
                break
        else:
            return given, steps


def tell(template: Template, rng: random.Random, id: str = "") -> Story:
    """One story of the template, with names, things and numbers drawn from rng."""
    given, steps = _draw(template, rng)
    girls, boys = rng.sample(GIRLS, 3), rng.sample(BOYS, 3)
    female = rng.random() < 0.5
    hero, others = (girls[0], [boys[0], girls[1]]) if female else (boys[0], [girls[0], boys[1]])
    rng.shuffle(others)
    words = {"A": hero, "B": others[0], "C": others[1], "things": rng.choice(THINGS),
             "he": "she" if female else "he", "He": "She" if female else "He",
             "his": "her" if female else "his", "him": "her" if female else "him"}
    text = re.sub(r"\[(.+?)\]", lambda m: rng.choice(m[1].split("|")), template.question)
    words |= {name: written(value) for name, value in given.items()}
    words |= {step.name: written(step.value) for step in steps}
    steps = [replace(s, sentence=s.sentence.format(**words | {s.name: "{=}"})) for s in steps]
    return Story(id, template.name, re.sub(r" +([.,?])", r"\1", text.format(**words)), given, tuple(steps))


def is_test(question: str) -> bool:
    return int(hashlib.sha1(question.encode()).hexdigest(), 16) % 10 == 0


def training_story(rng: random.Random) -> Story:
    """A story for pretraining: of any training template, never one of the test set."""
    while True:
        story = tell(rng.choice(templates()), rng)
        if not is_test(story.question):
            return story


@lru_cache(maxsize=8)
def problems(split: str = "train", n: int | None = None) -> list[Story]:
    """The first n different stories of a split: "train" (default 4,000), "test" (500) or "unseen" (500).

    Templates take turns, so every n is balanced. A shorter list is always the start of a longer one.
    """
    n = n or {"train": 4000, "test": 500, "unseen": 500}[split]
    pool = templates(split == "unseen")
    rng = random.Random(f"tiny world, {split}")
    stories, seen, turns = [], set(), itertools.cycle(pool)
    while len(stories) < n:
        story = tell(next(turns), rng, f"tiny-{split}-{len(stories)}")
        fits = split == "unseen" or is_test(story.question) == (split == "test")
        if fits and story.question not in seen:
            seen.add(story.question)
            stories.append(story)
    return stories


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
    return " ".join(step.sentence.replace("{=}", written(step.value)) for step in story.steps)


def plan(story: Story) -> str:
    """The operations in order, without numbers: "First add, then divide." """
    verbs = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide", "%": "take the percentage",
             "frac": "write the fraction"}
    return "First " + ", then ".join(verbs[step.op] for step in story.steps) + "."


def program(story: Story) -> str:
    """Python that prints the answer: the given numbers, one assignment a step, one print."""
    divide = "//" if all(value.denominator == 1 for value in story.given.values()) else "/"
    lines = ["from fractions import Fraction"] if story.steps[-1].op == "frac" else []
    lines += [f"{name} = {written(value)}" for name, value in story.given.items()]
    for s in story.steps:
        python = {"/": f"{s.left} {divide} {s.right}", "%": f"{s.left} * {s.right} {divide} 100",
                  "frac": f"Fraction({s.left}, {s.right})"}
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
                unit = 1 / step.b if step.op == "frac" else 1
                step = replace(step, value=step.value + rng.choice([-10, -2, -1, 1, 2, 10]) * unit)
            steps.append(step)
            values[step.name] = step.value
            if step.value <= 0:  # a later step may divide by it
                break
        fair = all(0 < s.value <= LARGEST and written(s.value).count(".") < 2 for s in steps)
        simple = all(s.value.denominator <= 100 for s in steps)
        if fair and simple and steps[-1].value != story.steps[-1].value:
            return replace(story, steps=tuple(steps))
