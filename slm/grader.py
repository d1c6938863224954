r"""Grade a response against the gold answer: what the answer is, whether it is right, and why.

The answer is the last complete \boxed{} or \fbox{} (boxes side by side are a list); without one, what follows the last
"answer is" or "####"; without one, the last number where the gold is a plain number. A response that is nothing but one
formula is that formula. Strict mode, for rewards, takes a box only. Equality is decided in slm/answers.py, exactly.

Pure functions: no signals, threads, clocks or global state; any input is answered within milliseconds.
"""

import re
from dataclasses import dataclass

from slm import answers


@dataclass(frozen=True)
class Grade:
    correct: bool
    answer: str | None  # what was extracted from the response
    reason: str  # one short phrase
    gold: str


BOX_START = re.compile(r"\\(?:boxed|fbox)\s*")
GLUE = re.compile(r"[\s$,;.&]*(?:\\(?:text|mbox|textrm)\{\s*)?(?:and|or|,|;)?(?:\s*\})?[\s$,;.&]*(?:\\(?:quad|qquad|,|;|\\)\s*)*"
                  r"(?:and|or)?[\s$]*(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?\$?", re.I)
MAX_BOX, MAX_TRIES = 2000, 16
MARKER = re.compile(r"(?:final answer|answer)\**\s*(?:is|:|=)\s*:?\**:?|####", re.I)
NUMBER = re.compile(r"(?:(?<![\w.)}\]])-)?(?<![\w.])\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?(?![a-zA-Z]*\d)")


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last complete, non-empty boxes, in order of appearance, nested ones inside their
    outer box. At most MAX_TRIES openings are looked at, from the end, MAX_BOX characters each."""
    found: list[tuple[int, int, str]] = []
    at, tries = len(text), 0
    while tries < MAX_TRIES:
        at = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        if at < 0:
            break
        tries += 1
        end = BOX_START.match(text, at).end()
        if text[end : end + 1] == "{":
            try:
                stop = answers.braced(text[: end + MAX_BOX], end)
            except answers.Unreadable:
                continue
            content = text[end + 1 : stop - 1]
        else:
            number = re.compile(r"-?\d[\d,.]*").match(text, end)
            if not number:
                continue
            stop, content = number.end(), number[0]
        if content.strip():
            found = [f for f in found if f[0] >= stop]
            found.insert(0, (at, stop, content))
    return found


def boxed(text: str) -> str | None:
    """The last box, joined by commas with the ones directly beside it."""
    found = boxes(text)
    if not found:
        return None
    group = [found.pop()]
    while found and group[0][0] - found[-1][1] <= 40 and GLUE.fullmatch(text, found[-1][1], group[0][0]):
        group.insert(0, found.pop())
    last = group[-1][2].strip()
    others = [content.strip() for _, _, content in group[:-1]]
    return last if all(answers.equal(last, o) for o in others) else ", ".join(dict.fromkeys([*others, last]))


def after_marker(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or "####", to the end of the sentence."""
    marks = list(MARKER.finditer(text[-20_000:]))
    if not marks:
        return None
    rest = text[-20_000:][marks[-1].end() :].strip()
    if display := re.match(r"[*\s]*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", rest[:MAX_BOX], re.S):
        return (display[1] or display[2]).strip()
    line = re.split(r"\n|(?<!\d)\.(?:\s|$)|(?<=\d)\.(?:\s|$)|,? (?:because|since|which|so|as) ", rest, maxsplit=1)[0].strip()
    formula = re.match(r"\$[^$]+\$(?!\s*(?:,|or|and\b(?! not)))(?=[^$]*$)", line)
    line = formula[0] if formula else line
    return line[: MAX_BOX + 1].strip("* ") or None


def last_number(text: str) -> str | None:
    last = max(text.rfind(d) for d in "0123456789")
    if last < 0:
        return None
    found = NUMBER.findall(text[max(0, last - 1000) : last + 2])
    return found[-1].rstrip(",") if found else None


FORMULA = re.compile(r"(?:(?:so|thus|hence|therefore|finally|then|we (?:get|have|find))\b[^$.]{0,40}[,:]?\s*)?"
                     r"(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\])[.\s]*", re.I | re.S)


def bare(text: str) -> str | None:
    """A response that is nothing but one formula, at most behind a "so" or "thus": the formula."""
    text = text.strip()
    if not 0 < len(text) <= 300:
        return None
    if m := FORMULA.fullmatch(text):
        return next(filter(None, m.groups()))
    if not re.match(r"[a-zA-Z]\w?\s*(?:=|<|>|\\[lg]e)|[-+−\d.\\({\[$|√π±]|[\w()]+[.\s]*$", text) or "boxed" in text:
        return None
    return text if len(text.split()) == 1 or answers.parse(text)[0] not in ("raw", "text") else None


def extract(response: str, strict: bool = False, plain_gold: bool = True) -> str | None:
    """The answer a response stands by, or None. plain_gold: the last number may stand in for a missing marker."""
    answer = boxed(response)
    if answer is not None or strict:
        return answer
    return after_marker(response) or bare(response) or (last_number(response) if plain_gold else None)


def gold_answer(gold: str) -> str:
    """The gold may come as `$x$`, in a box, or at the end of a GSM8K rationale."""
    gold = str(gold)
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1]
    return boxed(gold) or gold.strip()


PLAIN = re.compile(r"[-+$\s\\]*\d[\d,]*(?:\.\d*)?(?:/\d+)?\s*\\?%?")


def grade(response: str, gold: str, strict: bool = False) -> Grade:
    gold = gold_answer(gold)
    is_plain = bool(PLAIN.fullmatch(gold.strip("$ ")))
    answer = extract(response, strict, plain_gold=is_plain)
    if answer is None:
        return Grade(False, None, "no boxed answer" if strict else "no answer found", gold)
    correct = answers.equal(answer, gold)
    return Grade(correct, answer, "same value" if correct else why_not(answer, gold), gold)


def why_not(answer: str, gold: str) -> str:
    """One phrase on how a wrong answer differs, for the reader of a run's transcripts."""
    a, b = answers.plain(answers.parse(answer)), answers.plain(answers.parse(gold))
    if "raw" in (a[0], b[0]):
        return "too large or not understood"
    many = ("list", "set", "tuple")
    if a[0] in many or b[0] in many:
        size_a, size_b = (len(answers.children(x)) if x[0] in many else 1 for x in (a, b))
        if size_a != size_b:
            return "more than the answer" if size_a > size_b else "part of the answer"
        if a[0] == b[0] == "tuple":
            if all(map(answers.same, a[3:], b[3:])):
                return "an end open or closed"
            if answers.same(("list", *a[3:]), ("list", *b[3:])):
                return "same members in another order"
    if a[0] == b[0] == "unit" and a[2] and b[2] and a[2] != b[2]:
        return "another unit"
    if a[0] in (*many, "text", "rel", "union", "matrix") or b[0] in (*many, "text", "rel", "union", "matrix") or answers.letters_of(a):
        return "different value"
    x, y = answers.place(a), answers.place(b)
    if x is None or y is None:
        return "too large or not understood"
    if answers.equal_or_rounded(b, a):
        return "rounded"
    if x and x == -y:
        return "opposite sign"
    return "off by a factor of 100" if y and x and round(x / y, 12) in (100, 0.01) else "different value"


def equal(a: str, b: str) -> bool:
    """Are two written answers equal in value? What a majority vote counts with."""
    return answers.equal(a, b)
