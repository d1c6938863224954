"""Table 1 on a real model: the runs of recipes/half_billion.sh as small files, tables and a figure.

    python bench/half_billion.py --collect runs/half_billion   copies finished runs to results/half_billion
    python bench/half_billion.py                               tables of RESULTS.md, docs/half_billion.svg

A collected run is its settings.json (and the device, without folders of this machine), summary.json or
table.json, metrics.jsonl and answers.jsonl without token ids, questions and all but the end of each response,
80 characters of it or, if these would be graded otherwise, 200: enough to make the tables and to grade again.
All of it stays under 5 MB.

The tables: greedy answers, sampled ones, those on MATH-500, each row over base; then for each model that was
asked in workflows these over its single pass on the same problems; what is over what; and the searches. A row
is named as `bash recipes/half_billion.sh ROW` takes it. The figure: reward, share solved and held-out
accuracy of the GRPO runs by step, over four steps, the placebo in grey.
"""

import argparse
import copy
import json
import re
import sys
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
import agents
import eval as evaluation
from bench.shared import ROOT, processor, rows, save, shortened, smooth
from slm.grading import grade
from slm.runs import stats
from slm.runs.files import read_json

RESULTS, FIGURE = ROOT / "results/half_billion", ROOT / "docs/half_billion.svg"
ROWS = ["base", "sft-self", "sft-human", "sft-full", "sft-full-report", "grpo", "grpo-placebo",
        "sft-self-seed1", "sft-self-long", "grpo-seed1", "dapo", "dapo-base"]
WORKFLOWS = ["majority_vote", "python_tools", "solver_checker_with_tools", "solver_checker_stateless",
             "solver_verifier"]
WORKED = [f"{row}-{workflow}" for row in ROWS for workflow in WORKFLOWS]
OVER = [("sft-self", "base"), ("sft-human", "base"), ("sft-full", "base"), ("sft-full-report", "base"),
        ("grpo", "sft-self"), ("grpo", "grpo-placebo"), ("sft-self-seed1", "base"),
        ("sft-self-long", "base"), ("grpo-seed1", "sft-self-seed1"),
        ("dapo", "sft-self-seed1"), ("dapo-base", "base")]
FIELDS = ("id", "data", "level", "subject", "gold", "answer", "correct", "reason", "sample", "tokens",
          "finish")
ENDS = 80, 200  # characters of a response
SUMMARIES = "summary.json", "table.json"  # what eval.py and agents.py end with
LIMIT = 5e6  # bytes
CURVES = {"reward": "reward", "solved": "solved while sampling (share)", "evaluated": "held out (share)"}
FOLDER = re.compile(r"(?<![\w.:/~-])/(?:[^/\s\"':,=]+/)+")  # /home/me/runs/


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--collect", type=Path, metavar="RUNS", help="copy the finished runs of this folder first")
    p.add_argument("--device", default=f"one thread, {processor()}", help="where they ran (%(default)s)")
    args = p.parse_args()
    if args.collect:
        collect(args.collect, RESULTS, args.device)
    if not RESULTS.is_dir():
        return print(f"{RESULTS.relative_to(ROOT)} is not there yet: --collect makes it")
    print(tables(RESULTS))
    if draw(RESULTS, FIGURE):
        print(f"\nfigure: {FIGURE.relative_to(ROOT)}")


# ---- runs -> small files ---------------------------------------------------------------------------------

def collect(runs: Path, results: Path, device: str) -> None:
    """Copy what is finished; print what is not, and the size of all."""
    for settings in sorted(runs.glob("*/settings.json")):
        run, to = settings.parent, results / settings.parent.name
        if not any((run / made).exists() for made in (*SUMMARIES, "adapter", "model")):
            print(f"{run.name}: not finished, left out")
            continue
        to.mkdir(parents=True, exist_ok=True)
        about = json.loads(without_folders(settings.read_text(), runs))
        (to / "settings.json").write_text(json.dumps(about | {"device": device}, indent=1) + "\n")
        for made in SUMMARIES:
            if (run / made).exists():
                (to / made).write_text(without_folders((run / made).read_text(), runs))
        for name, short in (("metrics", shorter), ("answers", stripped)):
            if found := rows(run / f"{name}.jsonl"):
                lines = (json.dumps(short(row), ensure_ascii=False, separators=(",", ":")) for row in found)
                (to / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    size = sum(file.stat().st_size for file in results.rglob("*") if file.is_file())
    print(f"{results}: {size / 1e6:.2f} MB{'' if size < LIMIT else ', which is too much'}\n")


def without_folders(text: str, runs: Path) -> str:
    """A text without absolute folders: the one in which `runs` lies goes, of others the last name stays."""
    for root in {str(ROOT), str(runs.resolve().parents[1])}:
        text = text.replace(f"{root}/", "")
    return FOLDER.sub("", text)


def shorter(row: dict) -> dict:
    return {name: shortened(value) for name, value in row.items()}


def stripped(row: dict) -> dict:
    """An answer without ids, question and the start of its response; the first answer where it is another."""
    first = ("first_answer", "first_correct") if row["first_answer"] != row["answer"] else ()
    return {name: row[name] for name in FIELDS + first if name in row} | {
        "boxed": evaluation.in_box(row), "response": end_of(row)}


def end_of(row: dict) -> str:
    """The shortest of the ends that is graded as the whole was, else the longest."""
    for end in (row["response"][-count:] for count in ENDS):
        graded = grade(end, row["gold"])
        if (graded.correct, graded.answer) == (row["correct"], row["answer"]):
            break
    return end


# ---- tables ----------------------------------------------------------------------------------------------

def saved(results: Path, kind: str) -> dict[str, evaluation.Saved]:
    """Row -> its run, for kind "eval", "sampled" or "math": those that are there, the known ones first."""
    there = {folder.name.removeprefix(f"{kind}-") for folder in results.glob(f"{kind}-*")}
    names = [name for name in [*ROWS, *WORKED] if name in there]
    names += sorted(there - set(names))
    return {name: evaluation.saved(results / f"{kind}-{name}")[0] for name in names}


def tables(results: Path) -> str:
    greedy, sampled, math = (saved(results, kind) for kind in ("eval", "sampled", "math"))
    text, devices, commits = [], set(), set()
    for kind, runs in (("eval", greedy), ("sampled", sampled), ("math", math)):
        for name, run in runs.items():
            about = json.loads((run.path / "settings.json").read_text())
            devices.add(about["device"])
            commits.add(about["versions"]["commit"])
            row, _, workflow = name.rpartition("-") if name in WORKED else (name, "", "")
            run.name = f"{kind}-{row}{':' * bool(workflow)}{workflow}"
        if plain := [run for name, run in runs.items() if name not in WORKED]:
            text += [evaluation.table(plain, markdown=True), ""]
    for group in worked(greedy):
        text += [evaluation.table(group, markdown=True), ""]
    text += ["| row | over | greedy | p | sampled |", "| --- | --- | --- | --- | --- |"]
    for name, other in OVER:
        gains = [gain(runs, other, name) for runs in (greedy, sampled)]
        if any(gains):
            (points, p), (sampled_points, _) = (found or ("", "") for found in gains)
            text.append(f"| {name} | {other} | {points} | {p} | {sampled_points} |")
    if found := read_json(results / "searches/table.json", {}):
        text += ["", "```", agents.table(found, len(found["solver"]["right"])).strip(),
                 agents.against_control(found), "```"]
    text += ["", f"Device: {'; '.join(sorted(devices))}. Commits: {', '.join(sorted(commits))}."]
    return "\n".join(text)


def worked(greedy: dict[str, evaluation.Saved]) -> list[list[evaluation.Saved]]:
    """For each model the single pass and its workflows on the same problems, those on fewer apart."""
    groups = {}
    for name in WORKED:
        row = name.rpartition("-")[0]
        if name in greedy and row in greedy:
            ids = frozenset(greedy[name].problems[1])
            groups.setdefault((row, ids), [only(greedy[row], ids)]).append(only(greedy[name], ids))
    return list(groups.values())


def only(run: evaluation.Saved, ids: frozenset[str]) -> evaluation.Saved:
    """A run on some of its problems, in proportionate seconds."""
    part, whole = copy.copy(run), sum(map(len, run.rows.values()))
    part.rows = {data: [row for row in found if row["id"] in ids] for data, found in run.rows.items()}
    share = sum(map(len, part.rows.values())) / whole
    part.problems, part.seconds = ids, {data: share * took for data, took in run.seconds.items()}
    return part


def gain(runs: dict[str, evaluation.Saved], a: str, b: str) -> tuple[str, str] | None:
    """(accuracy of b over that of a with its interval, McNemar's p), if both are there."""
    if a not in runs or b not in runs:
        return None
    before, now = (evaluation.shares(list(chain(*runs[name].rows.values()))) for name in (a, b))
    p = stats.p_value(stats.mcnemar(before, now)) if set(before + now) <= {0, 1} else ""
    return stats.points(*stats.difference(before, now)), p


# ---- figure ----------------------------------------------------------------------------------------------

def draw(results: Path, to: Path) -> bool:
    """A panel for each curve that there is; whether there was one."""
    runs = {path.parent.name: rows(path) for path in sorted(results.glob("*/metrics.jsonl"))
            if path.parent.name.startswith(("grpo", "dapo"))}
    shown = [key for key in CURVES if any(key in row for found in runs.values() for row in found)]
    if not shown:
        return False
    figure, axes = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.4), squeeze=False)
    for axis, key in zip(axes.flat, shown):
        for i, (name, found) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in found if key in row]
            steps, values = zip(*points) if points else ((), ())
            colour = "0.6" if "placebo" in name else f"C{i}"
            if key == "evaluated":
                axis.plot(steps, values, color=colour, marker="o", markersize=3, label=name)
            else:
                axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.4)
                axis.plot(steps, smooth(list(values), 4), color=colour, label=name)
        axis.set_title(CURVES[key], fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, to)
    plt.close(figure)
    return True


if __name__ == "__main__":
    main()
