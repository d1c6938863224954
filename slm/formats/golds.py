"""Gold answers as the published sets write them: behind ####, as numbers, as lists, only in the solution."""

import math
import re

from slm import BadInput
from slm.formats.rows import Row
from slm.grading import equal, extract

TEXT = re.compile(r"""\"(?:\\.|[^"\\])*\"|'(?:\\.|[^'\\])*'""")  # in quotes, as JSON or Python has it
LIST = re.compile(rf"\s*\[\s*(?:(?:{TEXT.pattern})(?:\s*,\s*|\s*(?=\])))+\]\s*")


def own_id(row: dict) -> str | None:
    """The id that a row brings, if it brings one."""
    return next((str(row[key]) for key in ("id", "unique_id", "ID") if row.get(key) not in (None, "")), None)


def gold_and_solution(found: Row, row: dict, source: str, where: str) -> tuple[str, str]:
    """A row's gold answer, '' if it has none, and its worked solution. Where no field holds the answer it is
    what the solution ends with: its last box, else what its last line calls the answer or holds alone."""
    names, solution = ", ".join(map(str, row)) or "no fields", found.solution or found.response
    if found.question is None:
        raise BadInput(f"{where}: no question; expected a text named question or problem, found {names}")
    if found.gold is None and not solution:
        raise BadInput(f"{where}: no gold answer; expected one named answer or gold, found {names}")
    if isinstance(found.gold, str) and "####" in found.gold:
        solution = solution or found.gold.rsplit("####", 1)[0].strip()
    gold = _gold(found.gold, source, where) or extract(solution, strict=True)
    line = solution.rstrip().rpartition("\n")[2]
    if not gold and found.gold is None and ("answer" in line.lower() or "####" in line or " " not in line):
        gold = extract(line, plain_gold=False)
    return gold or "", solution


def _gold(value, source: str, where: str) -> str:
    """The gold answer: what follows GSM8K's ####, 27 for 27.0, 25 for AIME's 025, '' for an empty one.

    A list, or a text that is a JSON list of texts (OlympiadBench, Skywork), may hold several. Those that are
    equal are one answer; else they are joined by commas: a response must give all of them, in any order."""
    if isinstance(value, str) and LIST.fullmatch(value):
        value = [text[1:-1].replace("\\\\", "\\") for text in TEXT.findall(value)]
    if isinstance(value, list):
        golds = [_gold(item, source, where) for item in value]
        return golds[0] if golds and all(equal(golds[0], gold) for gold in golds) else ", ".join(golds)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise BadInput(f"{where}: the gold answer is {str(value)[:40]!r}; expected a text or a number")
    gold = "" if value is None else str(value).strip()
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1].strip().replace(",", "")
    if source.startswith("aime") and gold.isdigit():
        gold = str(int(gold))
    return gold
