r"""The grader beside math-verify: right answers, false positives, hangs, crashes and time per case.

    python bench/grader.py                         # the tables of tests/, then the data sets
    python bench/grader.py --limit 300             # the same on fewer golds
    python bench/grader.py --audit runs/x/answers.jsonl     # answers that graders judge differently, to read
    python bench/grader.py --math-verify ../Math-Verify     # the peer's public tests too, which are not here

Both graders get the same strings in the same process, one case after the other: the response, or the answer
in \boxed{}, and the gold, which math-verify gets in \boxed{} too. Time is of parsing and comparing together.
math-verify runs with its default time limits and sees --peer-limit golds, since it is slow. Times are CPU
times of this process, so that a busy machine does not change them. A shuffled gold that is the response's own
by chance is left out.

--math-verify takes a checkout or an unpacked source archive of Math-Verify (`pip download --no-binary :all:
--no-deps math-verify` fetches one). The cases are read from its tests as literals; nothing
there is run. Both graders get the gold as it stands. Some of its verdicts are debatable; LOG.md names those
that this grader does not share.
"""

import argparse
import ast
import json
import logging
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from slm.grading import grade
from slm.runs import cli

try:
    from math_verify import parse, verify
except ImportError:  # then our figures stand alone
    verify = None

HANG = 1.0  # seconds


def arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--limit", type=cli.positive, help="golds of each data set; default: all")
    p.add_argument("--peer-limit", type=cli.positive, default=300, help="golds that math-verify sees")
    p.add_argument("--math-verify", metavar="DIR", help="a copy of Math-Verify: its public tests as cases")
    p.add_argument("--audit", metavar="FILE", help="print the disagreements on an answers.jsonl and stop")
    return p.parse_args()


def ours(response: str, gold: str) -> bool:
    return grade(response, gold).correct


def peer(response: str, gold: str) -> bool:
    return verify(parse(rf"\boxed{{{gold}}}"), parse(response))


def peer_as_tested(response: str, gold: str) -> bool:
    return verify(parse(gold), parse(response))


# ---- cases: (response, gold, right) ------------------------------------------------------------------------

def table(name: str) -> list[tuple[str, str, bool]]:
    rows = map(json.loads, (ROOT / "tests" / f"{name}.jsonl").read_text().splitlines())
    return [(r["response"] if "response" in r else rf"\boxed{{{r['answer']}}}", r["gold"], r["right"])
            for r in rows]


def load(limit: int | None) -> dict[str, list[dict]]:
    """{set: rows of gold and, where there is one, solution} of the data folder."""
    folder = Path(os.environ.get("SLM_DATA", ROOT.parent / "shared" / "data"))
    found = {}
    for name in ("math/train", "math500/test", "gsm8k/train", "gsm8k/test", "aime24/test", "amc23/test"):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()][:limit]
            found[name] = [{"gold": str(r["answer"]).rsplit("####", 1)[-1].strip(),
                            "solution": r["answer"] if "gsm8k" in name else r.get("solution", "")}
                           for r in rows if r["answer"] != ""]
    return found


def public_tests(folder: Path) -> list[tuple[str, str, bool]]:
    """The rows (gold, pred, expected, ...) of every `parametrize` in the folder's tests, without those that
    are no literals or that test an option which is off by default."""
    usual = {"strict": True, "precision": 6, "allow_set_relation_comp": False}
    found = []
    for path in sorted((folder / "tests").glob("test_*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        for call in calls:
            if getattr(call.func, "attr", "") != "parametrize":
                continue
            names = [name.strip() for name in ast.literal_eval(call.args[0]).split(",")]
            for row in call.args[1].elts if {"gold", "pred"} <= set(names) else []:
                try:
                    case = usual | dict(zip(names, ast.literal_eval(row)))
                except ValueError:
                    print(f"{path.name}:{row.lineno}: not a literal, left out")
                    continue
                if any(case[option] != value for option, value in usual.items()):
                    print(f"{path.name}:{row.lineno}: an option of theirs, left out")
                    continue
                right = bool(case["expected"] if "expected" in case else case["result"])
                found.append((case["pred"], case["gold"], right))
    return found


def forms(gold: str) -> list[str]:
    """Five ways to write the same answer."""
    plain = re.sub(r"(?<![\d}\w ])\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", gold)
    signs = {r"\pi": "π", r"\infty": "∞", r"\cup": "∪", r"^\circ": "°", "-": "−", r"\pm": "±"}
    sign = re.sub(r"\\sqrt\{([^{}]+)\}", r"√(\1)", gold)
    for latex, char in signs.items():
        sign = sign.replace(latex, char)
    sized = re.sub(r"(?<!\\left)(?<!\\)([(])", r"\\left\1", gold)
    sized = re.sub(r"(?<!\\right)(?<!\\)([)])", r"\\right\1", sized)
    return [f"${gold}$", gold.replace(r"\frac", r"\dfrac") + ".", plain, sign, f" {sized} "]


def data_cases(data: dict[str, list[dict]], rng: random.Random) -> tuple[list, list, list]:
    """(gold in five forms, gold against other golds, solutions as responses)."""
    golds = sorted({r["gold"] for rows in data.values() for r in rows})
    rng.shuffle(golds)
    same = [(rf"\boxed{{{f}}}", g, True) for g in golds for f in forms(g)]
    pairs = [(rng.choice(golds), g) for g in golds for _ in range(2)]
    cross = [(rf"\boxed{{{p}}}", g, False) for p, g in pairs if p != g]
    solved = [(r["solution"], r["gold"], True) for rows in data.values() for r in rows if r["solution"]]
    return same, cross, solved


# ---- measuring ---------------------------------------------------------------------------------------------

def measure(name: str, grader, cases: list, show: int = 0) -> dict:
    """Run one grader over cases and print one line; the first `show` mistakes after it."""
    seconds, wrong, count = [], [], Counter()
    for response, gold, right in cases:
        start = time.process_time()
        try:
            said = grader(response, gold)
        except Exception as e:
            count["crashes"] += 1
            said = repr(e)
        seconds.append(time.process_time() - start)
        count["hangs"] += seconds[-1] > HANG
        if said is not right:
            count["false positives" if not right else "false negatives"] += 1
            wrong.append((response, gold))
    seconds.sort()
    p99 = seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)]
    figures = {"cases": len(cases), "right": 1 - len(wrong) / len(cases),
               **{k: count[k] for k in ("false positives", "false negatives", "hangs", "crashes")},
               "median ms": 1e3 * statistics.median(seconds), "p99 ms": 1e3 * p99,
               "worst ms": 1e3 * seconds[-1],
               "cases/s": len(cases) / sum(seconds)}
    line = "{:40}{:7,}{:9.2%}{:6}{:6}{:6}{:7}{:9.3f}{:9.2f}{:9.1f}{:11,.0f}"
    print(line.format(name, *figures.values()), flush=True)
    for response, gold in wrong[:show]:
        print(f"    {response[-90:]!r} against {gold!r}")
    return figures


def audit(path: Path) -> None:
    """The saved answers that the saved grade, today's grader and math-verify do not all judge alike."""
    differ = total = 0
    for row in map(json.loads, path.read_text().splitlines()):
        total += 1
        now = grade(row["response"], row["gold"])
        words = {"saved": row.get("correct"), "now": now.correct,
                 "math-verify": peer(row["response"], row["gold"]) if verify else None}
        words = {who: right for who, right in words.items() if right is not None}
        if len(set(words.values())) > 1:
            differ += 1
            print(f"{row.get('id', total)}: gold {row['gold']!r}, answer {now.answer!r} ({now.reason})")
            said = (f"{who} {'right' if right else 'wrong'}" for who, right in words.items())
            print("    " + ", ".join(said))
            print(f"    ...{row['response'][-160:]!r}")
    print(f"{differ} of {total} answers judged differently")


def main() -> None:
    args = arguments()
    logging.disable(logging.CRITICAL)  # math-verify's
    public = public_tests(Path(args.math_verify)) if args.math_verify else []
    if args.audit:
        return audit(Path(args.audit))
    print(("{:40}{:>7}{:>9}" + 3 * "{:>6}" + "{:>7}" + 3 * "{:>9}" + "{:>11}   (times in ms)").format(
        "", "cases", "right", "fp", "fn", "hangs", "crash", "median", "p99", "worst", "cases/s"))
    results = {}
    rng = random.Random(0)
    data = load(args.limit)
    same, cross, solutions = data_cases(data, rng)
    golds = [g for _, g, _ in solutions]
    shuffled = [(s, g, False) for (s, own, _), g in zip(solutions, rng.sample(golds, len(golds)))
                if own.replace(" ", "") != g.replace(" ", "")]
    rng.shuffle(solutions)
    if public:
        results["Math-Verify's tests"] = {"slm": measure("Math-Verify's tests, slm", ours, public, show=99)}
        if verify:
            measure("Math-Verify's tests, math-verify", peer_as_tested, public)
    for name, cases in {"table": table("grader_cases"), "wild table": table("grader_wild"),
                        "golds in five forms": same, "golds against others": cross,
                        "solutions as responses": solutions, "solutions shuffled": shuffled}.items():
        if not cases:
            print(f"{name}: no data folder here (SLM_DATA)")
            continue
        some = cases if "table" in name else cases[: args.peer_limit]
        results[name] = {"slm": measure(f"{name}, slm", ours, cases, show=25)}
        if verify:
            results[name]["math-verify"] = measure(f"{name}, math-verify", peer, some)
            if len(some) < len(cases):
                results[name]["slm on the same"] = measure(f"{name}, slm on the same", ours, some)
    for name, r in results.items():
        if "math-verify" in r:
            fair = r.get("slm on the same", r["slm"])
            ratio = fair["cases/s"] / r["math-verify"]["cases/s"]
            print(f"{name}: {ratio:.0f}x math-verify's cases per second")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
