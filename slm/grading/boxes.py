r"""The one reader of boxes, \boxed{...} or \fbox{...}, for the grader, the sampler and the endpoint.

A box is complete when its braces balance; `\{` and `\}` are characters, not braces. White space may stand
before the brace. An empty box is no box. A box longer than MAX_BOX characters is none either, so that a
million open braces cost no more than one long box.
"""

import re
from typing import NamedTuple

MAX_BOX, MAX_TRIES = 8000, 16

BRACE = re.compile(r"\\.|[{}]", re.S)
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
DIGITS = re.compile(r"-?\d[\d,.]*")  # \boxed 5
MARK = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<think></?think>)|(?P<open>\{)|(?P<close>\})"
                  r"|(?P<line>\n)|\\(?!\\(?:boxed|fbox))[^\n]")


class Box(NamedTuple):
    """text[start:stop] is the box with its command and braces; content is what the braces hold."""
    start: int
    stop: int
    content: str


def closing_brace(text: str, start: int) -> int | None:
    """The index just after the brace that closes the one at `start`; None if none does."""
    depth = 0
    for m in BRACE.finditer(text, start, start + MAX_BOX):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return m.end()
    return None


def box_at(text: str, start: int, brace: int) -> Box | None:
    """The complete, non-empty box with its command at `start` and its opening brace at `brace`."""
    stop = closing_brace(text, brace)
    content = text[brace + 1 : stop - 1] if stop else ""
    return Box(start, stop, content) if content.strip() else None


def boxes(text: str) -> list[Box]:
    r"""The last boxes of a text in order, without those inside another; `\boxed 5` counts as one. Only the
    last MAX_TRIES openings are looked at."""
    found: list[Box] = []
    at = len(text)
    for _ in range(MAX_TRIES):
        at = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        if at < 0:
            break
        inside = BOX.match(text, at).end()
        if text.startswith("{", inside):
            box = box_at(text, at, inside)
        else:
            digits = DIGITS.match(text, inside)
            box = Box(at, digits.end(), digits[0]) if digits else None
        if box:
            found = [box, *(later for later in found if later.start >= box.stop)]
    return found


def answered(text: str, thinking: bool = False) -> int | None:
    """The end of the first line with a box that is not in the thinking; None if there is no such line yet.

    A sampler and an endpoint end a reply here. The grader takes the last box, and joins boxes that stand side
    by side, so a reply may go on to the end of the line; most models end their turn before. What comes later
    in a text never changes the place. Thinking is what follows an open <think>; thinking=True: the prompt has
    opened it. A box without braces ends nothing. The time is linear in the text.
    """
    found = False
    opened: list[int | None] = []  # for each open brace, where the content of its box starts
    for m in MARK.finditer(text):
        if m.lastgroup == "line" and found:
            return m.start()
        if m.lastgroup == "think":
            thinking = m[0] == "<think>"
        elif m.lastgroup == "box":
            opened.append(None if thinking else m.end())
        elif m.lastgroup == "open":
            opened.append(None)
        elif m.lastgroup == "close" and opened:
            start = opened.pop()
            if start and m.end() - start < MAX_BOX and text[start : m.start()].strip():
                found = True
    return None
