r"""What replies hold beside an answer: code, the answer that it printed, a checker's verdict, steps."""

import re
from itertools import pairwise
from textwrap import dedent

from slm.grading.parse import parse
from slm.grading.values import bounded, real_value

OPENING = re.compile(r"""
    (?: ^ (?P<lead> (?: [ \t>] | [-*+][ \t] | \d{1,9}[.)][ \t] )* )  # indents, quotes, marks of list items
      | ^ (?: [^`\n] | (?<!`)``?(?!`) )* (?= ```+\w*\s*$ )          # words before it
      | (?<=```) [^`\n]* (?= ```\w+\s*$ ) )                        # or the end of another one
    (?P<fence> `{3,99} | ~{3,99} ) (?P<info>[^`\n]*) $ \n?""", re.X | re.M)
CLOSING = r"""(?xm)
    ^ [ \t>]{{0,{width}}} (?: (?= {fence}\w ) | {fence} (?= {fence}\w ) | {fence}+ (?![`~'"]) )
    | (?<=[^\s`~'"]) [ \t]* {fence}+ \s* $"""
PYTHON = re.compile(r"\W*i?py(thon)?3?\b", re.I)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def blocks_of(reply) -> list[str]:
    """The code of every Python fence in a Reply, or of every fence without a name if it has none. The last
    fence may be left open, unless the reply was cut.

    A fence is what CommonMark calls one: three or more backticks or tildes, in list items and quotes too; its
    name is the first word after them. Models write more than that, and it is understood: any indentation,
    words before an opening fence, code before or words after a closing one, an opening fence that closes the
    one before. Code is moved to the left as far as all its lines allow.

    >>> from slm.episode import Reply
    >>> blocks_of(Reply("1. So:\\n   ``` Python\\n   print(6 * 7)\\n   ```\\nDone."))
    ['print(6 * 7)\\n']
    """
    fences, at = [], 0
    while start := OPENING.search(reply.text, at):
        lead = start["lead"] or ""
        closing = re.compile(CLOSING.format(fence=start["fence"], width=len(lead) + 3))
        end = closing.search(reply.text, start.end())
        code, at = reply.text[start.end():end and end.start()], end.end() if end else len(reply.text)
        margin = r"[ \t>]" if ">" in lead else r"[ \t]"
        width = min(len(lead), len(re.match(f"{margin}*", code.lstrip("\n"))[0]))
        code = dedent(re.sub(f"(?m)^{margin}{{0,{width}}}", "", code))
        if code.strip() and (end or reply.finish != "length"):
            fences.append((start["info"].strip(), code))
    python = [code for info, code in fences if PYTHON.match(info)]
    return python or [code for info, code in fences if not info]


def printed(outcome) -> str | None:
    """The answer that code printed, from its Outcome: its last line with a digit, or the last number of that
    line if it has words. None if there is no outcome, if the code failed or if it printed no digit. Rounding
    noise goes: 0.30000000000000004 is read as 0.3."""
    if outcome is None or outcome.error or outcome.timed_out:
        return None
    lines = [line for line in outcome.stdout.strip().splitlines() if re.search(r"\d", line)]
    line = re.split(r"=|:\s", lines[-1])[-1].strip() if lines else ""  # after a label
    if re.search(r"[A-Za-z]{2}|[$%]", re.sub(r"sqrt|pi|frac", "", line)):
        line = ["", *NUMBER.findall(line)][-1]
    return re.sub(r"-?\d+\.\d{9,}", lambda m: f"{float(m[0]):.10g}", line) or None


def verdict(text: str) -> bool | None:
    """A checker's word: True for CORRECT, False for INCORRECT, None for neither. What follows VERDICT counts,
    else the word that the text opens with, else the last one in capitals, else a Yes or No that it opens with
    (to "is it right?"), else what is said in passing.

    >>> verdict("INCORRECT. The correct way is"), verdict("3 + 4 = 7. CORRECT"), verdict("Let's see")
    (False, True, None)
    """
    for pattern in (r"(?i)verdict\W*(in)?correct", r"(?i)\A\W*(in)?correct\b(?! answer)", r"\b(IN)?CORRECT\b",
                    r"(?i)\A\W*(?:yes|(no))\b(?! (?:error|mistake|issue)s?\b)",
                    r"(?i)\b(incorrect|not correct|not right|wrong)\b|\b(?:is|looks) (?:right|correct)\b"):
        found = list(re.finditer(pattern, text))
        if found:
            return not found[-1][1]
    return None


NOISE = re.compile(r"\\?\$|\\[()\[\]]|\\left|\\right|^[ \t]*(?:[-*+•]|\d+[.)])\s", re.M)  # and marks of lists
TERM = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\\[dt]?frac\{\d+\}\{\d+\}|\\(?:times|cdot|div)(?![a-z])|[-+*/^()=×÷·−])"
PART_OF_MORE = re.compile(r"(?<! )\w|[\\%!^{]|[a-zA-Z]\b")  # after a number: 7x, 7%, 7 x, but not 7 nuts


def equations(text: str) -> list[tuple[str, str]]:
    r"""The steps of a text, each once, at most 256: a left side with an operator, a right side, both numbers.

    >>> equations("So $1,000 \\times 2 = 2000$. x + 3 * 2 = 7. Then 2 + 3 = 1 + 4 = 5 nuts")
    [('1,000 \\times 2', '2000'), ('2 + 3', '1 + 4'), ('1 + 4', '5')]
    """
    text = re.sub(r"(?<=\d) ?[xX] ?(?=\d)", "*", NOISE.sub(" ", text))
    pairs = []
    for run in re.finditer(rf"(?:{TERM}[ \t]*)+", text):
        sides = [side.strip() for side in run[0].split("=")]
        before = text[max(0, run.start() - 9):run.start()]
        signed = sides[0].startswith(("+", "-", "*", "/", "^"))
        if re.search(r"[\w.)}\\][ \t]*\Z" if signed else r"[\w.}\\]\Z", before):
            sides[0] = ""
        if PART_OF_MORE.match(text, run.end()):
            sides[-1] = ""
        pairs += pairwise(sides)
    found = [(a, b) for a, b in dict.fromkeys(pairs) if re.search(r"frac|[\d)}][ \t]*[-+*/^×÷·−\\]", a)]
    return [(a, b) for a, b in found[:256] if has_value(a) and has_value(b)]


@bounded()
def has_value(text: str) -> bool:
    return real_value(parse(text)) is not None
