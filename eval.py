"""Score any model, adapter, endpoint or workflow; compare saved runs; grade saved answers again.

    python eval.py                                        the built-in model on its 500 test problems, greedy
    python eval.py --data tiny,tiny-unseen --adapter runs/sft-tiny-lora/adapter
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data gsm8k,math500
    python eval.py --workflow majority_vote               any workflow of agents.py
    python eval.py --endpoint http://localhost:8000/v1 --model NAME --data math500
    python eval.py --compare runs/a runs/b                one table, differences paired problem by problem
    python eval.py --regrade runs/a                       today's grader on the answers of runs/a

Greedy decoding and the standard prompt by default, so that the rows of a table are alike. Each answer is
written as it lands (answers.jsonl: question, gold, response, answer, correct and why, boxed or not, token
ids, finish), so a stopped run goes on with --resume. In float32 an answer does not depend on the batch; in
bfloat16 it may.
"""

import argparse

from slm.runs import cli

PAPER = {"max_tokens": 2048, "limit": 500, "step_rule": "paragraph"}
TINY = {"max_tokens": 320, "step_rule": "line"}
NOT_SETTINGS = ("compare", "dry_run", "markdown", "regrade", "resume")
DECODING = {"samples": 1, "temperature": 0.0, "max_tokens": None}  # agents.py has the first two fixed


def options() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    cli.answer_options(p, both)
    g = p.add_argument_group("how")
    g.add_argument("--workflow", default="solver", metavar="NAME",
                   help="of agents.py (default solver: a single pass); FILE.py:NAME is yours, dvts@8 has "
                        "a budget of 8")
    g.add_argument("--samples", type=cli.positive, default=1, metavar="K",
                   help="answers a problem (default 1)")
    g.add_argument("--temperature", type=cli.number(0), default=0.0, help="0 is greedy (default)")
    g.add_argument("--max-tokens", type=cli.positive, help=f"new tokens of a reply ({both('max_tokens')})")
    g.add_argument("--batch", type=cli.positive, help="replies decoded at once (default 64, on a GPU 256)")
    cli.run_options(p, "runs/eval-<model>")
    g = p.add_argument_group("saved runs, instead of scoring")
    g = g.add_mutually_exclusive_group()
    g.add_argument("--compare", nargs="+", metavar="RUN",
                   help="a table of runs of eval.py or agents.py on the same problems")
    g.add_argument("--regrade", metavar="RUN", help="grade saved answers again; prints and saves changes")
    p.add_argument("--markdown", action="store_true", help="--compare prints a Markdown table")
    return p


if __name__ == "__main__":
    args = cli.resolve(options().parse_args(), PAPER, TINY)  # before the heavy imports

import contextlib
import hashlib
import shlex
import shutil
import time
from collections import Counter, defaultdict
from functools import partial
from operator import itemgetter
from pathlib import Path

from slm import BadInput, checkpoint, problems, workflows
from slm.answers import GROUPS, finished, right_answer, run_graded
from slm.backends import asked_with, open_backend
from slm.episode import Sampling
from slm.grading import extract, grade, version
from slm.report import write as write_report
from slm.runs import stats
from slm.runs.files import as_lines, read_json, read_rows, write_json, write_whole
from slm.runs.forecast import rehearse
from slm.runs.rundir import RunDir, name_of, new_path
from slm.sandbox import Sandbox
from slm.search import tally


def main(args: argparse.Namespace) -> None:
    if args.compare:
        print(table([run for path in args.compare for run in saved(path)], args.markdown))
    elif args.regrade:
        regrade(saved(args.regrade)[0])
    else:
        evaluate(args)


# ---- scoring ---------------------------------------------------------------------------------------------

def evaluate(args: argparse.Namespace) -> None:
    workflow = workflows.workflow(args.workflow)
    if args.samples > 1 and args.temperature == 0:
        raise BadInput(f"--samples {args.samples} at temperature 0 draws the same answer each time; "
                       "add --temperature 0.7, for one")
    sets = {name: problems.load(name, args.split, args.limit, args.draw) for name in args.data}
    everything = [p for items in sets.values() for p in items]
    args.out = new_path(args.out, f"eval-{label(args)}")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    cli.show(settings)
    backend, adapters = open_backend(args, args.batch)
    problems.refuse_long(everything, backend)
    sampling = Sampling(args.max_tokens, args.temperature, stop_at_box=True, step_rule=args.step_rule)
    how = {"samples": args.samples, "sampling": sampling, "seed": args.seed, "adapters": adapters}
    if args.dry_run:
        return rehearse(everything, [workflow], backend, **how)
    run = RunDir(args.out, settings | identity(args) | asked_with(backend),
                 problems.fingerprint(everything), args.resume)
    done = finished(run.journal("answers")) if args.resume else []
    results, earlier = {}, read_json(run.path / "summary.json", {"data": {}})["data"]
    with contextlib.closing(backend), contextlib.closing(Sandbox()) as sandbox:
        for name, items in sets.items():
            start = time.monotonic()
            rows = run_graded(items, workflow, backend, sandbox, bar=stats.shorten(name),
                              have=[row for row in done if row["data"] == name],
                              write=partial(run.log, "answers"), **how)
            seconds = round(time.monotonic() - start, 1)  # a finished run that is resumed keeps its own
            results[name] = s = {**score(rows), "seconds": earlier.get(name, {}).get("seconds", seconds)}
            texts = {"problems": f"{s['problems']}"} | cells(s, {}, ("truncated", "no_box", "no_answer"))
            if len(results) == 1:
                print(stats.line("data", {heading: heading for heading in texts}))
            print(stats.line(name, texts) + more(s))
    write_json(run.path / "summary.json", {"model": args.model, "workflow": args.workflow, "data": results})
    print(f"answers, settings and a page to read: {write_report(run.path)}\n"
          f"compare with another run: python eval.py --compare {shlex.quote(args.out)} OTHER")


def identity(args: argparse.Namespace) -> dict:
    """What identifies a run beside its options: hashes of the grader and of the weights."""
    found = {"grader": version()}
    if not args.endpoint:
        folders = [args.model, *(given.rpartition("=")[2] for given in args.adapter)]
        weights = (file for name in folders for file in checkpoint.resolve(name).glob("*.safetensors"))
        digest = hashlib.sha256()
        for path in sorted(weights):
            with path.open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        found["weights"] = digest.hexdigest()[:12]
    return found


def label(args: argparse.Namespace) -> str:
    """A run's default name: what answered, and how."""
    name = name_of(args.adapter[-1].rpartition("=")[2] if args.adapter else args.model)
    return name if args.workflow == "solver" else f"{name}-{args.workflow.rpartition(':')[2]}"


# ---- figures ---------------------------------------------------------------------------------------------

def score(rows: list[dict]) -> dict:
    """The figures of one data set; `tokens` and the counts are sums over all samples. Every interval draws
    problems again, not samples."""
    values = {name: stats.estimate(of_problems) for name, of_problems in figures(rows).items()}
    (accuracy, *interval), problems = values["lenient"], len(by(rows, "id"))
    found = {
        "problems": problems, "samples": len(rows) // problems,
        "right": sum(row["correct"] for row in rows), "accuracy": accuracy, "interval": interval,
        "figures": values,
        "truncated": sum(row["finish"] == "length" for row in rows),
        "no_box": sum(not in_box(row) for row in rows),
        "no_answer": sum(row["answer"] is None for row in rows),
        "failures": dict(Counter(cause for row in rows for cause in row.get("failures", []))),
        "tokens": sum(row["tokens"] for row in rows)}
    for name in GROUPS:
        if groups := by(rows, name):
            found[name] = {value: stats.estimate(shares(some)) for value, some in groups.items()}
    return found


def by(rows: list[dict], name: str) -> dict[str, list[dict]]:
    """The rows that have a field, by its value."""
    groups = defaultdict(list)
    for row in rows:
        if name in row:
            groups[row[name]].append(row)
    return dict(sorted(groups.items()))


def shares(rows: list[dict], right=itemgetter("correct")) -> list[float]:
    """Each problem's share of right samples, in the order of their ids."""
    return [sum(map(right, samples)) / len(samples) for samples in by(rows, "id").values()]


def figures(rows: list[dict]) -> dict[str, list[float]]:
    """Name of a figure -> its value for each problem, in the order of their ids; their mean is the figure.

    lenient, strict: share of samples with the right answer, anywhere or in a box: mean@n, which is pass@1.
    pass@k: chance that one of k samples is right (lenient). maj@n: whether the vote of all n samples is.
    """
    problems = list(by(rows, "id").values())
    n, right = len(problems[0]), [sum(map(itemgetter("correct"), samples)) for samples in problems]
    values = {"lenient": shares(rows), "strict": shares(rows, lambda row: row["correct"] and in_box(row))}
    for k in sorted({n, *(2 ** i for i in range(n.bit_length()))} - {1}):
        values[f"pass@{k}"] = [stats.pass_at_k(n, c, k) for c in right]
    if n > 1:
        values[f"maj@{n}"] = [majority(samples) for samples in problems]
    return values


def majority(samples: list[dict]) -> float:
    """Whether the most frequent answer is right. Equivalent ones count together, and no answer is no vote. A
    tie is settled by lot: the share of right ones among the most frequent."""
    votes = tally([row["answer"] for row in samples])
    right = {row["answer"] for row in samples if row["correct"]}
    first = [answer in right for answer, count in votes if count == votes[0][1]]
    return sum(first) / max(1, len(first))


def in_box(row: dict) -> bool:
    """Whether the answer stands in a box. Rows of older runs do not say it."""
    return row["boxed"] if "boxed" in row else extract(row["response"], strict=True) is not None


def cells(s: dict, compared: dict[str, str], counts: tuple[str, ...]) -> dict[str, str]:
    """What the tables show of a data set: heading -> text."""
    names, answers = ["lenient", "strict"], s["problems"] * s["samples"]
    some = [f"pass@{s['samples']}"] if s["samples"] > 1 else []
    shown = {f"{name} %": stats.percent(s["figures"][name]) for name in names + some}
    rates = {f"{name.replace('_', ' ')} %": f"{100 * s[name] / answers:.1f}" for name in counts}
    return shown | compared | rates | {"tokens": f"{s['tokens'] / answers:.0f}",
                                       "seconds": "" if s["seconds"] is None else f"{s['seconds']:.0f}"}


def more(s: dict) -> str:
    """What has no column: the other figures, the accuracy by level and subject, and what failed."""
    rest = [(name, value) for name, value in s["figures"].items() if name not in ("lenient", "strict")]
    rest += [(f"{name} {group}", value) for name in GROUPS for group, value in s.get(name, {}).items()]
    text = "".join(f"\n  {stats.shorten(name):35}{stats.percent(value):>18}" for name, value in rest)
    return text + "".join(f"\n  {n} x {cause}" for cause, n in Counter(s["failures"]).most_common(5))


# ---- saved runs ------------------------------------------------------------------------------------------

class Saved:
    """A run read back: name, settings, rows and seconds by data set. workflow: which one of agents.py's."""

    def __init__(self, path: Path, rows: list[dict], seconds: dict[str, float], workflow: str = ""):
        about = read_json(path / "settings.json")
        self.path, self.settings = path, {"prompt": "solver/1"} | DECODING | about["settings"]
        self.problems = about["data"], {row["id"] for row in rows}
        self.name = f"{path.name or path}{'/' * bool(workflow)}{workflow}"
        self.rows, self.seconds = by(rows, "data") or {",".join(self.settings["data"]): rows}, seconds

    def score(self, data: str) -> dict:
        return {**score(self.rows[data]), "seconds": self.seconds.get(data)}


def saved(folder: str) -> list[Saved]:
    """The runs in a folder of eval.py (one) or of agents.py (one a workflow)."""
    path = Path(folder)
    for log, summary in (("answers.jsonl", "summary.json"), ("episodes.jsonl", "table.json")):
        if (path / log).is_file() and (path / summary).is_file():
            rows, told = [row for _, row in read_rows(path / log)], read_json(path / summary)
            if "data" in told:
                return [Saved(path, rows, {name: s["seconds"] for name, s in told["data"].items()})]
            episodes = by(rows, "workflow")
            return [Saved(path, episodes[name], {}, name) for name in told]
    raise BadInput(f"{folder} holds no answers.jsonl with summary.json; expected a run directory of eval.py "
                   "or agents.py (if the run is not finished, repeat its command with --resume)")


def table(runs: list[Saved], markdown: bool = False) -> str:
    """Saved runs on the same problems with the same decoding, one line a run and data set.

    Intervals are 95 %. Differences are of the lenient accuracy, paired: Newcombe's method 10 for one sample a
    problem, else a bootstrap over problems; p is the exact McNemar test.
    """
    first = runs[0]
    for run in runs[1:]:
        refuse_unlike(first, run)
    how = ", ".join(f"{name} {first.settings[name]}" for name in DECODING)
    lines = []
    for data in first.rows:
        start = shares(first.rows[data])
        lines += [f"{data}: {len(start)} problems, {how}", *[""] * markdown]
        for run in runs:
            s, now = run.score(data), shares(run.rows[data])
            compared = {"over the first": "" if run is first else stats.points(*stats.difference(start, now))}
            if s["samples"] == 1:
                compared["p"] = "" if run is first else stats.p_value(stats.mcnemar(start, now))
            texts = cells(s, compared, ("truncated", "no_box"))
            if run is first:
                lines.append(stats.line("run", {heading: heading for heading in texts}, markdown))
                lines += ["|" + " --- |" * (len(texts) + 1)] * markdown
            lines.append(stats.line(run.name if markdown else f"  {run.name}", texts, markdown))
    return "\n".join(lines + [f"note: {run.name} was asked with another prompt than {first.name}"
                              for run in runs if run.settings["prompt"] != first.settings["prompt"]])


def refuse_unlike(a: Saved, b: Saved) -> None:
    """BadInput, in one sentence, if two runs can't stand in one table."""
    if a.rows.keys() != b.rows.keys():
        raise BadInput(f"{a.path} was scored on {', '.join(a.rows)} and {b.path} on {', '.join(b.rows)}; "
                       "compare runs on the same data")
    if a.problems != b.problems:
        raise BadInput(f"{a.path} and {b.path} were scored on different problems of {', '.join(a.rows)}; "
                       "give both the same --split, --limit and --draw")
    for name in DECODING:
        if a.settings[name] != b.settings[name]:
            raise BadInput(f"{a.path} was decoded with {name} {a.settings[name]} and {b.path} with "
                           f"{b.settings[name]}; compare runs with the same decoding")
    graders = [run.settings["grader"] for run in (a, b) if "grader" in run.settings]
    if len(set(graders)) > 1:
        raise BadInput(f"{a.path} was graded by version {graders[0]} of the grader and {b.path} by version "
                       f"{graders[1]}; grade both again: python eval.py --regrade RUN")


def regrade(run: Saved) -> None:
    """Grade a run's saved responses again, show every change, and write answers and summary anew. What was
    there is kept as answers.before-regrade.jsonl, or -2, -3, ... where earlier answers are kept."""
    answers, about = run.path / "answers.jsonl", read_json(run.path / "settings.json")
    if not answers.is_file():
        raise BadInput(f"{run.path} is no run of eval.py; only answers.jsonl can be graded again")
    summary, words, changed = read_json(run.path / "summary.json"), {True: "right", False: "wrong"}, 0
    for data, rows in run.rows.items():
        for row in rows:
            now = grade(row["response"], row["gold"])
            if now.correct != row["correct"]:
                changed += 1
                print(f"{data} {row['id']}: gold {row['gold']!r}, answer {now.answer!r}: "
                      f"{words[row['correct']]} ({row['reason']}) -> {words[now.correct]} ({now.reason})")
            if "first_answer" in row:
                first, same = row["first_answer"], row["first_answer"] == row["answer"]
                row["first_correct"] = now.correct if same else right_answer(first, row["gold"])
            row |= {"correct": now.correct, "answer": now.answer,
                    "boxed": extract(row["response"], strict=True) is not None}
            row["reason"] = now.reason if now.answer else row["reason"]
        before, summary["data"][data] = summary["data"][data]["accuracy"], run.score(data)
        print(f"{data}: {100 * before:.1f} % -> {100 * summary['data'][data]['accuracy']:.1f} % right")
    print(f"{changed} of {sum(map(len, run.rows.values()))} answers graded differently")
    if changed:
        kept = len(list(run.path.glob("answers.before-regrade*.jsonl")))
        shutil.copy(answers, run.path / f"answers.before-regrade{f'-{kept + 1}' if kept else ''}.jsonl")
        write_whole(answers, as_lines(row for rows in run.rows.values() for row in rows))
    write_json(run.path / "summary.json", summary)
    about["settings"]["grader"] = version()
    write_json(run.path / "settings.json", about)


if __name__ == "__main__":
    cli.run(main, args, stopped=write_report)
