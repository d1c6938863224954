r"""Grade a response against the gold answer: what the answer is, whether it is right, and why not.

The answer is the last box of the response (boxes side by side are a list). Without a box, it is what follows
the last "answer is" or "####"; without these, the response itself if it is one formula, or the last number
if the gold answer is a plain number. Strict mode, for rewards, takes a box only.

parse.py reads an answer into a tree, values.py compares expressions. This file compares what is made of
expressions: lists, tuples, intervals, equations, units, choices.
"""

import math
import operator
import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from slm.grading.boxes import MAX_BOX, boxes
from slm.grading.parse import FIRST_CHILD, MAX_CHARS, Node, Unreadable, children, leaves, parse, rational
from slm.grading.values import bounded, equal_values, letters, names, proportional, real_value


@dataclass(frozen=True)
class Grade:
    correct: bool
    answer: str | None  # what was taken from the response
    reason: str  # one short phrase
    gold: str


def grade(response: str, gold: str, strict: bool = False) -> Grade:
    """Is the response's answer equal to the gold one? strict: an answer counts only in a box. `3,75` is right
    if the gold is 3.75; 3.75 is not if the gold is `3,75`, since that may be a list."""
    gold = gold_answer(gold)
    answer = extract(response, strict, plain_gold=bool(PLAIN_NUMBER.fullmatch(gold.strip("$ "))))
    if answer is None:
        return Grade(False, None, "no boxed answer" if strict else "no answer found", gold)
    comma = None if "," in gold else COMMA.fullmatch(answer)
    correct = equal(answer, gold) or bool(comma and equal(f"{comma[1]}.{comma[2]}", gold))
    return Grade(correct, answer, "same value" if correct else why_not(answer, gold), gold)


@bounded()
def equal(a: str, b: str) -> bool:
    """Do two written answers have the same value? Symmetric, never raises; a majority vote counts with it."""
    a, b = (x.replace(",", "") if LONG.fullmatch(x) else x for x in (a.strip(), b.strip()))
    if not a or not b or a == b:
        return a == b
    with suppress(RecursionError):  # the caller's stack was nearly full: an answer all the same
        x, y = parse(a), parse(b)
        if same(x, y):
            return True
        if "list" in (x[0], y[0]) and re.search(r"\d,\d{3}", a[:MAX_CHARS] + " " + b[:MAX_CHARS]):
            return same(parse(a, merge=x[0] == "list"), parse(b, merge=y[0] == "list"))
    return False


# ---- what the answer is ------------------------------------------------------------------------------------

LAYOUT = re.compile(r"\\(?:text|mbox|textrm)\b|\\q?quad|\\[()\[\],;:! \\]|[\s${}&]+")
GLUE = re.compile(r"[ ,;.]*(?:(?:[\w()'-]+ +){0,4}(?:and|or)(?: maybe| possibly| perhaps"  # girls and
                  r"| (?:the|its) (?!final|answer|sum|total|result)\w+ (?:is|are))?\b|"
                  r"(?!so|thus|hence|th|now)[\w'-]+(?: [\w'-]+)?,)?[ ,;]*(?:[a-z][\w() ]{0,9}= *)?", re.I)
TURN = re.compile(r"<\|(?:im_start|im_end|eot_id|endoftext|end_of_text|start_header_id|user|end)\|>|</s>")
MARKER = re.compile(r"(?:answer|correct (?:option|choice))\**\s*(?:is(?: then| therefore| thus| simply)?|:|=)"
                    r"\s*:?\**:?|####|答案[是为]?[:：]?", re.I)
SENTENCE_END = re.compile(r"\n|。|\.(?:\s|$)(?!(?:no|wait|actually|or|but|hmm)\b)"
                          r"|,? (?:because|since|which|so|as) ", re.I)
DISPLAY = re.compile(r"[*\s]*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", re.S)
FIRST_FORMULA = re.compile(r"\$[^$]+\$(?!\s*(?:,|or|and\b(?! not)))(?=[^$]*$)")
NUMBER = re.compile(r"(?:(?<![\w.)}\]])-)?(?<![\w.])\$?(?:\d{1,3}(?:\.\d{3})+,\d+|\d[\d,]*(?:\.\d+)?|\.\d+)"
                    r"(?:/\d+)?%?(?![a-zA-Z]*\d|[a-zA-Z]{20})")
SENTENCE = re.compile(r"[A-Za-z]+ [A-Za-z]{2}\D*?(" + NUMBER.pattern + r")\W*(?:[a-zA-Z]{1,20}\W*){0,3}")
COMMA = re.compile(r"(?!.*\b[1-9]\d{0,2},\d{3}\b)([^([{,]*\d),(\d[^,]*)")  # 3,75 cm; 1,234 is a thousand
PLAIN_NUMBER = re.compile(r"[-+$\s\\]*\d[\d,]*(?:\.\d*)?(?:/\d+)?\s*\\?%?")
FORMULA = r"\s*(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\])[a-z\s]{0,30}[.\s]*\Z"
LAST_FORMULA = re.compile(r"(?:\A|:|\b(?:is|are|get|gives?|have|find|that|by|answer|so|thus|hence|therefore"
                          r"|then)\b(?:(?!\band\b)[^$.\n]){0,40})" + FORMULA, re.I | re.S)
DOUBT = re.compile(r"\b(?:or|not?|never|maybe|perhaps|than|except|least|most|between|about|approximately"
                   r"|times|plus|minus|half|twice|double|root|without|(?:of|by|to)(?= \$?\d))\b|n't", re.I)
FORMULA_START = re.compile(r"[a-zA-Z]\w?\s*(?:=|<|>|\\[lg]e)|[-+−\d.\\({\[$|√π±]|[\w()]+[.\s]*$")
MAX_TAIL = 20_000
LONG = re.compile(r"-?\d[\d,]{1000,}")  # an integer too long to compute with, compared as written


def extract(response: str, strict: bool = False, plain_gold: bool = True) -> str | None:
    """The answer a response stands by, or None. plain_gold: the last number may stand in for a marker."""
    response = next(filter(str.strip, TURN.split(response)), "")  # what follows is another turn
    answer = boxed(response)
    if answer is not None or strict:
        return answer
    said = after_marker(response)
    sentence = SENTENCE.fullmatch(said) if said and plain_gold else None
    if sentence and not DOUBT.search(said):
        return sentence[1]  # "... is that she sold 12 tickets"
    return said or bare(response) or (last_number(response) if plain_gold else None)


def gold_answer(gold: str) -> str:
    """A gold answer may come plain, in boxes, or at the end of a solution, GSM8K's or another."""
    gold = str(gold).rsplit("####", 1)[-1]
    return boxed(gold) or (len(gold) > 200 and after_marker(gold)) or gold.strip()


def boxed(text: str) -> str | None:
    """The last box, joined by commas with those before it, unless they say the same. Between two that belong
    together stand a separator, a label, or a few words that end in "and" or "or"."""
    found = boxes(text)
    if not found:
        return None
    group = [found.pop()]
    while found and group[0].start - found[-1].stop <= 80 and GLUE.fullmatch(
            LAYOUT.sub(" ", text[found[-1].stop : group[0].start])):
        group.insert(0, found.pop())
    *others, last = (box.content.strip() for box in group)
    return last if all(equal(last, o) for o in others) else ", ".join(dict.fromkeys([*others, last]))


def after_marker(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or "####", to the end of the sentence or formula."""
    tail = text[-MAX_TAIL:]
    marks = list(MARKER.finditer(tail))
    if not marks:
        return None
    rest = tail[marks[-1].end() :].strip()[:MAX_BOX]
    if display := DISPLAY.match(rest):
        return (display[1] or display[2]).strip()
    line = SENTENCE_END.split(rest, maxsplit=1)[0].strip()
    formula = FIRST_FORMULA.match(line)
    return (formula[0] if formula else line).strip('* "') or None


def last_number(text: str) -> str | None:
    last = max(text.rfind(d, -1000) for d in "0123456789")
    found = NUMBER.findall(text, max(0, last - 1000), last + 22) if last >= 0 else None
    return found[-1].rstrip(",") if found else None


def bare(text: str) -> str | None:
    """A response that is nothing but one formula, or whose last sentence ends in one without a doubt."""
    text = text.strip()
    if "boxed" in text:
        return None
    tail = text[-600:]
    m = LAST_FORMULA.search(tail)
    if m and not DOUBT.search(re.split(r"[.$\n] +(?=[A-Z])", tail)[-1]):
        return next(filter(None, m.groups()))
    if len(text) > 300 or not FORMULA_START.match(text):
        return None
    return text if len(text.split()) == 1 or parse(text)[0] not in ("raw", "text") else None


# ---- are two answers the same ------------------------------------------------------------------------------

def same(a: Node, b: Node) -> bool:
    """Do two parsed answers have the same value? Symmetric."""
    if a == b:
        return True
    a, b = plain(a), plain(b)
    kinds = {a[0], b[0]}
    if a == b or "raw" in kinds:
        return a == b
    if "choice" in kinds:
        return same_choice(a, b)
    if "unit" in kinds:
        return same_units(a, b)
    if "time" in kinds:
        if kinds == {"time"} or (a if a[0] == "time" else b)[2]:
            return same_time(a, b)
        a, b = (("ratio", *x[3:]) if x[0] == "time" else x for x in (a, b))  # 7:32
    if "text" in kinds:
        return kinds <= {"text", "s"} and a[1].lower() == b[1].lower()
    if kinds & {"union", "meet", "minus", "rel", "tuple"} or inequalities(a) or inequalities(b):
        if (alike := same_regions(a, b)) is not None:
            return alike
    if "rel" in kinds:
        return same_relations(a, b)
    if kinds & {"list", "set", "tuple", "matrix"}:
        return same_collections(a, b)
    if kinds == {"ratio"}:
        return len(a) == len(b) and all(same(("/", x, a[1]), ("/", y, b[1])) for x, y in zip(a[2:], b[2:]))
    a, b = (("/", *x[1:]) if x[0] == "ratio" and len(x) == 3 else x for x in (a, b))
    x, y = rational(a), rational(b)
    if x is not None and y is not None:
        return x == y or rounds(x, y, 15) or rounds(y, x, 15)
    return "inf" not in kinds and equal_values(a, b)


def plain(node: Node) -> Node:
    """What an answer stands for: the result of a chain, the two values of ±, the only member of a list."""
    if node[0] == "rel":
        node = plain_relation(node)
    if node[0] not in ("list", "set", "matrix", "rel") and "±" in names(node):
        return ("list", with_sign(node, 1), with_sign(node, -1))
    if node[0] in ("list", "set"):
        items: list[Node] = []
        for item in map(plain, node[1:]):
            items += item[1:] if item[0] == "list" else [item]
        assigned = [assignment(i) for i in items]
        if items and all(assigned):
            items = without_names(assigned) or items
        if items and items[0][0] == "rel" and items[0][2] == ("!=",):  # x != 1, 2
            items = [i if i[0] == "rel" else ("rel", (items[0][1][0], i), ("!=",)) for i in items]
        node = (node[0], *items)
        if node[0] == "list" and len(items) == 2 and items[0] != items[1] and same(*items):
            return items[1]  # 3/4 or 0.75
    if node[0] in ("list", "set") and len(node) == 2:
        return plain(node[1])
    return plain(node[3]) if node[:3] == ("tuple", "[", "]") and len(node) == 4 else node


def without_names(assigned: list[tuple[str, Node]]) -> list[Node]:
    """`x = 1, x = 2` as 1, 2, and `b = 4, a = 3; a = 5, b = 4` as (3,4), (5,4). Empty if no name recurs."""
    size = len(dict(assigned))
    rounds = [dict(assigned[i : i + size]) for i in range(0, len(assigned), size)]
    if len(rounds) < 2 or any(r.keys() != rounds[0].keys() for r in rounds):
        return []
    return [r.popitem()[1] if size == 1 else ("tuple", "(", ")", *map(r.get, sorted(r))) for r in rounds]


def plain_relation(node: Node) -> Node:
    """`x in S` is S, `2/3 ~ 0.67` the exact side, `a => b` the last step, `2 + 3 = 5` its result. A chain
    that is false (`5 = 6 = 7`) or says nothing (`7 = 7`) is no answer. After a label, a false one gives its
    last member: `x = 2+4 = 7 = 8` is one answer, found in a wrong way."""
    nodes, ops = list(node[1]), list(node[2])
    while "=>" in ops:
        at = ops.index("=>") + 1
        nodes, ops = nodes[at:], ops[at:]
    if "~" in ops:
        at = ops.index("~")
        keep = at + 1 if at or not names(nodes[0]) else 2
        nodes, ops = nodes[:keep], ["=" if o == "~" else o for o in ops[: keep - 1]]
    if not ops or ops == ["in"]:
        return plain(nodes[-1])
    labelled = bool(letters(nodes[0])) or nodes[0][0] in ("tuple", "text")
    if set(ops) == {"="} and (len(ops) > 1 or not (labelled or letters(nodes[1]))):
        values = nodes[1:] if labelled else nodes
        exact = all(same(values[0], v) for v in values[1:])
        true = exact or all(equal_or_rounded(values[0], v) for v in values[1:])
        value = values[0] if true and not exact else values[-1]
        if labelled and (true or not any(map(letters, values))):
            return ("rel", (nodes[0], value), ("=",))
        if true and not labelled and values[0] != values[-1]:
            return plain(value)
    return ("rel", tuple(nodes), tuple(ops))


def equal_or_rounded(exact: Node, other: Node) -> bool:
    """Equal, or the second a decimal to which the first rounds."""
    if same(exact, other):
        return True
    x, y = (real_value(n[1] if n[0] == "unit" else n) for n in (exact, other))
    return x is not None and y is not None and rounds(x, y)


def rounds(exact: Fraction, decimal: Fraction, digits: int = 1) -> bool:
    """Is the second a decimal to which the first rounds or is cut off? One of 15 digits, as a program prints
    it, counts for a fraction, but not for an irrational number."""
    d = decimal.denominator
    places = 0 if pow(10, 60, d) else next(k for k in range(61) if 10**k % d == 0)
    unit = Fraction(1, 10**places)
    return places > 0 and abs(decimal) >= 10 ** (digits - 1) * unit and abs(decimal - exact) < unit


def with_sign(node: Node, sign: int) -> Node:
    """The tree with ± read as + or as -."""
    if node[0] == "±":
        return with_sign(node[1], sign) if sign > 0 else ("-", with_sign(node[1], sign))
    below = children(node)
    at = FIRST_CHILD.get(node[0], 1)
    return (*node[:at], *(with_sign(c, sign) for c in below), *node[at + len(below) :]) if below else node


def same_choice(a: Node, b: Node) -> bool:
    """`(C) 12` is the choice C and the value 12."""
    if a[0] == b[0]:
        return a[1] == b[1]
    a, b = (a, b) if a[0] == "choice" else (b, a)
    return b == ("s", a[1]) or same(a[2], b)


def same_units(a: Node, b: Node) -> bool:
    """Two known units must agree in dimension, and the values scaled by them; one left out says nothing."""
    if a[0] == b[0] and a[2] and b[2]:
        (dims_a, factor_a), (dims_b, factor_b) = a[2], b[2]
        if factor_a != factor_b:
            a, b = (("unit", ("*", ("n", f), x[1])) for f, x in ((factor_a, a), (factor_b, b)))
        return dims_a == dims_b and same(a[1], b[1])
    return same(*(x[1] if x[0] == "unit" else x for x in (a, b)))


def same_time(a: Node, b: Node) -> bool:
    if a[0] != b[0]:
        return b == a[3] if a[0] == "time" else a == b[3]  # 9 a.m. and 9
    if a[2] and b[2]:
        return a[1:] == b[1:]
    return a[1] == b[1] or ("p" in (a[2], b[2]) and abs(a[1] - b[1]) == 12 * 3600)


# ---- sets of the real line: intervals, unions, inequalities ------------------------------------------------

INFINITY = ("inf",)
FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
COMPARE = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "!=": operator.ne}


def inequalities(node: Node) -> bool:
    return node[0] == "list" and len(node) > 1 and all(n[0] == "rel" and n[2] != ("=",) for n in node[1:])


def same_regions(a: Node, b: Node) -> bool | None:
    """Are two sets of numbers equal? Tested at every end, between the ends and beyond them. None if one is no
    such set, or if both may be plain tuples or lists."""
    def open_to_doubt(x: Node) -> bool:
        return x[1:3] == ("(", ")") if x[0] == "tuple" else x[0] in ("list", "set") and not inequalities(x)
    if open_to_doubt(a) and open_to_doubt(b):
        return None
    ends: list[Node] = []
    subjects: set[Node] = set()
    try:
        left, right = (region(x, ends, subjects) for x in (a, b))
        if len(ends) > 40:
            return False
        at = positions(ends)
    except Unreadable:  # letters in an end: alike as written
        alike = a[0] == b[0] and len(a) == len(b) == {"tuple": 5, "union": 3, "meet": 3, "minus": 3}.get(a[0])
        return a[:-2] == b[:-2] and len(ends) < 20 and in_order(a[-2:], b[-2:]) if alike else None
    points = range(-1, 2 * len(at) + 1)
    in_a = inside(left, at, points)
    return len(subjects) < 2 and any(in_a) and in_a == inside(right, at, points)


def region(node: Node, ends: list[Node], subjects: set[Node]) -> Node:
    """The node as intervals, unions, comparisons and lists; `ends` and `subjects` get what these compare."""
    node = node if node[0] in ("union", "meet", "minus") else plain(node)
    kind = node[0]
    if kind in ("union", "meet", "minus"):
        return (kind, *(region(x, ends, subjects) for x in node[1:]))
    if inequalities(node):
        return ("list", *(region(x, ends, subjects) for x in node[1:]))
    if kind == "set" and len(node) > 1:
        ends += node[1:]
        return ("list", *(("tuple", "[", "]", x, x) for x in node[1:]))
    if kind == "rel":
        left, *right = node[1]
        if len(right) == 2 and right[0][:2] == ("f", "abs"):  # 1 < |x| < 2
            sides = [("rel", (right[0], left), (FLIP.get(node[2][0]),)), ("rel", tuple(right), node[2][1:])]
            return region(("meet", *sides), ends, subjects)
        if left[:2] == ("f", "abs") and left[2][0] == "s" and len(right) == 1:  # |x| < 2, |x| > 2
            sides = [("rel", (left[2], right[0]), node[2]), ("rel", (("-", right[0]), left[2]), node[2])]
            return region(("list" if node[2][0] in (">", ">=") else "meet", *sides), ends, subjects)
        subject = [n for n in node[1] if n[0] in ("s", "f") and {n[1], "f:" + n[1]} & letters(n)]
        if len(subject) != 1 or not COMPARE.keys() >= set(node[2]):
            raise Unreadable("not an interval")
        subjects.add(subject[0])
        ends += (n for n in node[1] if n != subject[0])
        return node
    if kind == "tuple" and len(node) == 5:
        ends += node[3:]
        return node
    ends.append(node)
    return ("tuple", "[", "]", node, node)


def place(node: Node) -> Fraction | float | None:
    """Where an end lies on the line; None if it has letters."""
    if node in (INFINITY, ("-", INFINITY)):
        return math.inf if node == INFINITY else -math.inf
    return real_value(node[1] if node[0] == "unit" else node)


def positions(ends: list[Node]) -> dict[Node, float]:
    """The ends in their order as even numbers, equal ones alike."""
    places = {x: place(x) for x in ends}
    if None in places.values():
        raise Unreadable("letters in an end")
    at: dict[Node, float] = {}
    last = None
    for x in sorted(places, key=places.get):
        step = 0 if last is None else at[last] + 2 * (not same(last, x))
        at[x], last = (places[x], last) if places[x] in (math.inf, -math.inf) else (step, x)
    return at


def holds(relation: Node, at: dict[Node, float], point: float) -> bool:
    """Is a chain of comparisons true if the letter in it, which has no place of its own, is at the point?"""
    values = [at.get(n, point) for n in relation[1]]
    return all(COMPARE[op](x, y) for op, (x, y) in zip(relation[2], pairwise(values)))


def inside(node: Node, at: dict[Node, float], points: range) -> list[bool]:
    """Which of the points belong to a region. Comparisons side by side are alternatives, unless these leave
    nothing out (`x > 1 and x < 2`)."""
    if node[0] == "rel":
        return [holds(node, at, t) for t in points]
    if node[0] == "tuple":
        low, high = (at[x] for x in node[3:])
        return [(low < t or (low == t and node[1] == "[")) and (t < high or (t == high and node[2] == "]"))
                for t in points]
    columns = list(zip(*(inside(x, at, points) for x in node[1:])))
    if node[0] == "minus":
        return [x and not y for x, y in columns]
    joined = [any(c) for c in columns]
    return [all(c) for c in columns] if node[0] == "meet" or (node[0] == "list" and all(joined)) else joined


# ---- equations and other relations -------------------------------------------------------------------------

def assignment(node: Node) -> tuple[str, Node] | None:
    """(name, value) of `x = 5`, `5 = x`, `f(x) = x + 1`; the name without its subscript."""
    if node[0] != "rel" or node[2] != ("=",):
        return None
    left, right = node[1]
    if left[0] != "s" and right[0] == "s" and not letters(left):
        left, right = right, left
    if left[0] == "s" and left[1] not in letters(right):
        return left[1].partition("_")[0], right
    return (left[1], right) if left[0] == "f" and left[1][0] == "?" else None


def bindings(node: Node) -> dict[str, Node] | None:
    """{name: value} of `x = 1, y = 2` or `(x, y) = (1, 2)`."""
    if node[0] == "rel" and node[2] == ("=",):
        left, right = node[1]
        if left[0] == right[0] == "tuple" and len(left) == len(right) and all(n[0] == "s" for n in left[3:]):
            return {n[1]: value for n, value in zip(left[3:], right[3:])}
    if node[0] in ("list", "set") and len(node) > 2:
        named = [assignment(n) for n in node[1:]]
        if all(named) and len({name for name, _ in named}) == len(named):
            return dict(named)
    return None


def same_relations(a: Node, b: Node) -> bool:
    """At least one is a relation. `x = 5` and `a + b = 5` stand for 5 too, but `2x = 5` and `x + 5y = 5` do
    not."""
    one, two = assignment(a), assignment(b)
    if bindings(a) or bindings(b):
        return same_collections(a, b)
    if a[0] == b[0]:
        if one and two and (one[0] == two[0] or len(one[0]) > 1 or len(two[0]) > 1):
            return same(one[1], two[1])
        return same_chain(a, b)
    if b[0] == "rel":
        a, b, one = b, a, two
    if one:
        return same(one[1], b)
    if a[2] != ("=",) or b[0] in ("list", "set"):
        return False
    left, right = a[1]
    factor = left[0] == "*" and left[1][0] == "n" and left[2][0] == "s"
    equation = factor or (left[0] == "+" and any(x[0] == "n" for x in leaves(left)))
    label = letters(left) and not equation and right != ("n", Fraction(0)) and (
        not letters(right) or left[0] in ("f", "/", "^", "*"))
    return bool(label or left[0] == "tuple") and same(right, b)


def same_chain(a: Node, b: Node) -> bool:
    """Equations up to a factor, inequalities up to a positive one, chains by member, in either direction."""
    (nodes_a, ops_a), (nodes_b, ops_b) = a[1:], b[1:]
    if len(nodes_a) != len(nodes_b):
        return False
    if len(nodes_a) == 2:
        left, right = (("+", x, ("-", y)) for x, y in (nodes_a, nodes_b))
        if ops_a == ops_b and ops_a[0] in ("=", "!="):
            return proportional(left, right)
        if ops_a == ops_b and ops_a[0] in FLIP:
            return proportional(left, right, positive=True)
        return FLIP.get(ops_a[0]) == ops_b[0] and proportional(("-", left), right, positive=True)
    backwards = tuple(FLIP.get(o, o) for o in reversed(ops_b))
    return (ops_a == ops_b and all(map(same, nodes_a, nodes_b))) or (
        ops_a == backwards and all(map(same, nodes_a, reversed(nodes_b))))


# ---- lists, sets, tuples, matrices -------------------------------------------------------------------------

def members(node: Node) -> tuple:
    return node[3:] if node[0] == "tuple" else node[1:]


def in_order(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def same_collections(a: Node, b: Node) -> bool:
    """Lists and sets in any order, lists with multiplicity unless of points; what is else in its order."""
    kinds = {a[0], b[0]}
    named_a, named_b = bindings(a), bindings(b)
    if named_a and named_b:
        return named_a.keys() == named_b.keys() and all(same(named_a[n], named_b[n]) for n in named_a)
    if named_a or named_b:  # y = 2, x = 1 is (1, 2): the values in the alphabetical order of their names
        named, other = (named_a, b) if named_a else (named_b, a)
        values = tuple(named[n] for n in sorted(named))
        return other[0] in ("tuple", "list") and in_order(values, members(other))
    if kinds == {"matrix"}:
        return len(a) == len(b) and all(map(in_order, a[1:], b[1:]))
    if "matrix" in kinds:
        grid, other = (a, b) if a[0] == "matrix" else (b, a)
        vector = grid[1] if len(grid) == 2 else tuple(row[0] for row in grid[1:])
        flat = len(vector) == len(sum(grid[1:], ()))
        return flat and other[0] == "tuple" and in_order(vector, members(other))
    if not kinds <= {"list", "set", "tuple"}:
        return False
    if "tuple" in kinds or any(("s", "ldots") in x for x in (a, b)):
        return "set" not in kinds and in_order(members(a), members(b))
    unique = "set" in kinds or all(x[0] == "tuple" for x in a[1:] + b[1:])
    left, right = (distinct(x[1:]) if unique else list(x[1:]) for x in (a, b))
    if all(x[0] == "unit" and not x[2] for x in left + right):  # 3 red, 4 blue
        left, right = (list(map(counted, items)) for items in (left, right))
    return len(left) == len(right) and matched(left, right)


def counted(unit: Node) -> Node:
    """`3 red` as the pair of 3 and `red`."""
    return ("tuple", "(", ")", unit[1], ("text", unit[3]))


def distinct(items: tuple) -> list[Node]:
    out: list[Node] = []
    for x in items:
        if x not in out and not (len(items) <= 12 and any(same(x, y) for y in out)):
            out.append(x)
    return out


def matched(left: list[Node], right: list[Node]) -> bool:
    """Can the members be paired off? Those written alike first; at most 16 others are compared by value."""
    rest, right = [], list(right)
    for x in left:
        right.remove(x) if x in right else rest.append(x)
    if len(rest) > 16:
        return False
    for x in rest:
        partner = next((y for y in right if same(x, y)), None)
        if partner is None:
            return False
        right.remove(partner)
    return True


# ---- why not -----------------------------------------------------------------------------------------------

COLLECTIONS = ("list", "set", "tuple")
NUMERIC = {"n", "s", "f", "unit", "deg", "+", "-", "*", "/", "^", "!", "%"}


@bounded()
def why_not(answer: str, gold: str) -> str:
    """One phrase on how a wrong answer differs, for the reader of a run's transcripts."""
    a = b = ("raw", "")
    with suppress(RecursionError):
        a, b = plain(parse(answer)), plain(parse(gold))
    if "raw" in (a[0], b[0]):
        return "too large or not understood"
    if a[0] in COLLECTIONS or b[0] in COLLECTIONS:
        size_a, size_b = (len(members(x)) if x[0] in COLLECTIONS else 1 for x in (a, b))
        if size_a != size_b:
            return "more than the answer" if size_a > size_b else "part of the answer"
        if a[0] == b[0] == "tuple" and in_order(members(a), members(b)):
            return "an end open or closed"
        if a[0] == b[0] == "tuple" and matched(list(members(a)), list(members(b))):
            return "same members in another order"
    if a[0] == b[0] == "unit" and a[2] and b[2] and a[2] != b[2]:
        return "another unit"
    if not {a[0], b[0]} <= NUMERIC or letters(a) or letters(b):
        return "different value"
    x, y = place(a), place(b)
    if x is None or y is None:
        return "too large or not understood"
    if equal_or_rounded(b, a):
        return "rounded"
    if x and x == -y:
        return "opposite sign"
    return "off by a factor of 100" if x and y and x / y in (100, Fraction(1, 100)) else "different value"
