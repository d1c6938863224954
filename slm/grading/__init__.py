r"""Which answer a text gives, and whether it equals the gold answer.

    grade(r"... so $x = \boxed{0.5}$.", r"\frac{1}{2}")
    -> Grade(correct=True, answer="0.5", reason="same value", gold=r"\frac{1}{2}")

The way of an answer through the files of this room:

    boxes.py    where the boxes of a text are; a sampler and an endpoint end a reply by it too
    grader.py   which box, formula or number is the answer; then both answers, read as trees, side by side:
                lists, tuples, intervals, equations, units, choices
    parse.py    a written answer, LaTeX or plain text, as a tree of tuples
    values.py   two expressions as numbers or functions: exact for rationals, else mpmath at a precision
                that the sizes ask for; letters get random values
    replies.py  what else is read in a reply: its code, what that printed, a checker's word, its steps

Wrong and right weigh alike here: a wrong answer that counts as right trains the model to give it. So nothing
is compared with a tolerance, and what cannot be read equals only itself.

All of it is pure functions, safe in threads. No text of a model is executed. Any input gets its answer within
milliseconds, since every size is bounded before anything is computed: characters, tokens, nesting, digits,
bits, steps. tests/grader_cases.jsonl has a reason for every rule; bench/grader.py measures.
"""

import hashlib
from pathlib import Path

from slm.grading.boxes import answered, boxes
from slm.grading.grader import Grade, equal, extract, grade
from slm.grading.replies import blocks_of, equations, printed, verdict

__all__ = [
    "Grade",
    "answered",
    "blocks_of",
    "boxes",
    "equal",
    "equations",
    "extract",
    "grade",
    "printed",
    "verdict",
    "version",
]


def version() -> str:
    """A short hash of this room's source: two runs that have the same one were graded by the same rules."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
