"""Score any model, adapter, endpoint or workflow; compare saved runs; grade saved answers again.

    python eval.py                                        the built-in model on its 500 test problems, greedy
    python eval.py --data tiny,tiny-unseen --adapter runs/sft-tiny-lora/adapter
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data gsm8k,math500
    python eval.py --workflow majority_vote               any workflow of agents.py
    python eval.py --endpoint http://localhost:8000/v1 --model NAME --data math500
    python eval.py --compare runs/a runs/b                one table, differences paired problem by problem
    python eval.py --regrade runs/a                       today's grader on the answers of runs/a

Greedy decoding and the standard prompt by default, so that the rows of a table are alike. Each answer is
written as it lands (answers.jsonl: question, gold, response, answer, correct and why, token ids, finish),
so a stopped run goes on with --resume. In float32 an answer does not depend on the batch; in bfloat16 it may.
"""

import argparse

from slm.runs import cli

PAPER = {"max_tokens": 2048, "limit": 500, "step_rule": "paragraph"}
TINY = {"max_tokens": 320, "step_rule": "line"}
NOT_SETTINGS = ("compare", "regrade", "resume")
DECODING = ("samples", "temperature", "max_tokens")


def options() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    cli.answer_options(p, both)
    g = p.add_argument_group("how")
    g.add_argument("--workflow", default="solver", metavar="NAME",
                   help="of agents.py (default solver: a single pass)")
    g.add_argument("--samples", type=cli.positive, default=1, metavar="K",
                   help="answers a problem (default 1)")
    g.add_argument("--temperature", type=cli.number(0), default=0.0, help="0 is greedy (default)")
    g.add_argument("--max-tokens", type=cli.positive, help=f"new tokens of a reply ({both('max_tokens')})")
    g.add_argument("--batch", type=cli.positive, help="replies decoded at once (default 64, on a GPU 256)")
    cli.run_options(p, "runs/eval-<model>")
    g = p.add_argument_group("saved runs, instead of scoring")
    g = g.add_mutually_exclusive_group()
    g.add_argument("--compare", nargs="+", metavar="RUN", help="a table of runs on the same problems")
    g.add_argument("--regrade", metavar="RUN", help="grade saved answers again; prints and saves changes")
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
from pathlib import Path

from slm import BadInput, checkpoint, problems, prompts, workflows
from slm.answers import answer_record, finished, run_graded
from slm.backends import asked_with, open_backend
from slm.episode import Sampling
from slm.grading import grade, version
from slm.report import write as write_report
from slm.runs import stats
from slm.runs.files import as_lines, read_json, read_rows, write_json, write_whole
from slm.runs.rundir import RunDir, name_of, new_path
from slm.sandbox import Sandbox


def main(args: argparse.Namespace) -> None:
    if args.compare:
        print(table([Saved(path) for path in args.compare]))
    elif args.regrade:
        regrade(Saved(args.regrade))
    else:
        evaluate(args)


# ---- scoring ---------------------------------------------------------------------------------------------

def evaluate(args: argparse.Namespace) -> None:
    workflow = workflows.workflow(args.workflow)
    if args.samples > 1 and args.temperature == 0:
        raise BadInput(f"--samples {args.samples} at temperature 0 draws the same answer each time; "
                       "add --temperature 0.7, for one")
    sets = {name: problems.load(name, args.split, args.limit) for name in args.data}
    everything = [p for items in sets.values() for p in items]
    args.out = str(new_path(args.out, f"eval-{label(args)}", args.resume))
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    cli.show(settings)
    backend, adapters = open_backend(args, args.batch)
    problems.refuse_long(everything, backend)
    run = RunDir(args.out, settings | identity(args) | asked_with(backend),
                 problems.fingerprint(everything), args.resume)
    done = finished(run.journal("answers")) if args.resume else []
    sampling = Sampling(args.max_tokens, args.temperature, stop_at_box=True, step_rule=args.step_rule)
    results = {}
    print(HEAD)
    with contextlib.closing(backend), contextlib.closing(Sandbox()) as sandbox:
        for name, items in sets.items():
            start = time.monotonic()
            rows = run_graded(items, workflow, backend, sandbox, samples=args.samples,
                              have=[row for row in done if row["data"] == name],
                              write=partial(run.log, "answers"), record=partial(record, name),
                              sampling=sampling, seed=args.seed, adapters=adapters, bar=shorten(name))
            results[name] = {**score(rows, len(items)), "seconds": round(time.monotonic() - start, 1)}
            print(line(name, results[name]))
    write_json(run.path / "summary.json", {"model": args.model, "workflow": args.workflow, "data": results})
    print(f"answers, settings and a page to read: {write_report(run.path)}\n"
          f"compare with another run: python eval.py --compare {shlex.quote(args.out)} OTHER")


def record(data: str, problem, episode) -> dict:
    """A line of answers.jsonl."""
    return {**answer_record(problem, episode), "data": data}


def identity(args: argparse.Namespace) -> dict:
    """What identifies a run beside its options: the prompt, and hashes of the grader and of the weights."""
    found = {"prompt": prompts.SOLVER.id, "grader": version()}
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
    return name if args.workflow == "solver" else f"{name}-{args.workflow}"


# ---- figures ---------------------------------------------------------------------------------------------

HEAD = (f"{'data':28}{'problems':>9}{'correct %':>11}{'95 %':>13}{'truncated':>11}{'no answer':>11}"
        f"{'seconds':>9}")


def score(rows: list[dict], problems: int) -> dict:
    """The figures of one data set. With several samples a problem, accuracy is the mean over problems of the
    share right (pass@1); its interval draws problems again, not samples."""
    shares, samples = share_right(rows), len(rows) // problems
    right = sum(row["correct"] for row in rows)
    pass_at = {}
    for k in (2 ** i for i in range(1, min(samples, 1024).bit_length())):
        pass_at[k] = sum(stats.pass_at_k(samples, round(share * samples), k) for share in shares) / problems
    return {
        "problems": problems, "samples": samples, "right": right, "accuracy": right / len(rows),
        "interval": stats.interval(shares), "pass_at": pass_at,
        "truncated": sum(row["finish"] == "length" for row in rows),
        "no_answer": sum(row["answer"] is None for row in rows),
        "failures": dict(Counter(cause for row in rows for cause in row["failures"])),
        "tokens": sum(row["tokens"] for row in rows)}


def share_right(rows: list[dict]) -> list[float]:
    """Each problem's share of right samples, in the order of the problems' ids."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row["correct"])
    return [sum(groups[id]) / len(groups[id]) for id in sorted(groups)]


def line(name: str, s: dict) -> str:
    text = (f"{shorten(name):28}{s['problems']:>9}{100 * s['accuracy']:>11.1f}"
            f"{stats.span(*s['interval']):>13}{s['truncated']:>11}{s['no_answer']:>11}{s['seconds']:>9.1f}")
    for k, value in s["pass_at"].items():
        text += f"\n{'':28}{f'pass@{k}':>9}{100 * value:>11.1f}"
    for cause, count in Counter(s["failures"]).most_common(5):
        text += f"\n  {count} x {cause}"
    return text


def shorten(name: str) -> str:
    return name if len(name) < 28 else "..." + name[-24:]


# ---- saved runs ------------------------------------------------------------------------------------------

class Saved:
    """An evaluation read back: name, settings, rows by data set."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.name = self.path.name or str(self.path)
        for file in ("answers.jsonl", "summary.json"):
            if not (self.path / file).is_file():
                raise BadInput(f"{path} holds no {file}; expected a run directory of eval.py (if the run is "
                               "not finished, repeat its command with --resume)")
        self.settings = read_json(self.path / "settings.json")["settings"]
        self.rows = defaultdict(list)
        for line, row in read_rows(self.path / "answers.jsonl"):
            if "data" not in row:
                raise BadInput(f"{path}/answers.jsonl line {line}: not an answer of eval.py")
            self.rows[row["data"]].append(row)

    def problems(self, data: str) -> dict:
        return {row["id"]: (row["question"], row["gold"]) for row in self.rows[data]}


def table(runs: list[Saved]) -> str:
    """Saved runs on the same problems with the same decoding, one line a run and data set.

    Differences are paired: Newcombe's method 10 for one sample a problem, else a bootstrap over problems; p
    is the exact McNemar test against the row above.
    """
    first = runs[0]
    for run in runs[1:]:
        refuse_unlike(first, run)
    how = ", ".join(f"{name} {first.settings[name]}" for name in DECODING)
    lines = [f"{'':30}{'correct %':>10}{'95 %':>13}{'over the first, 95 %':>25}"
             f"{'over the row above, 95 %':>27}{'p':>8}"]
    for data in first.rows:
        lines.append(f"{data}: {len(first.problems(data))} problems, {how}")
        shares = [share_right(run.rows[data]) for run in runs]
        for i, (run, now) in enumerate(zip(runs, shares)):
            text = (f"  {shorten(run.name):28}{100 * sum(now) / len(now):>10.1f}"
                    f"{stats.span(*stats.interval(now)):>13}")
            if i:
                for other, width in ((shares[0], 25), (shares[i - 1], 27)):
                    text += f"{stats.points(*stats.difference(other, now)):>{width}}"
                text += f"{stats.mcnemar(shares[i - 1], now):>8.3f}" if first.settings["samples"] == 1 else ""
            lines.append(text)
    return "\n".join(lines)


def refuse_unlike(a: Saved, b: Saved) -> None:
    """BadInput, in one sentence, if two runs can't stand in one table."""
    if set(a.rows) != set(b.rows):
        raise BadInput(f"{a.path} was scored on {', '.join(a.rows)} and {b.path} on {', '.join(b.rows)}; "
                       "compare runs on the same data")
    for data in a.rows:
        if a.problems(data) != b.problems(data):
            raise BadInput(f"{a.path} and {b.path} were scored on different problems of {data}; "
                           "give both the same --split and --limit")
    for name in DECODING:
        if a.settings[name] != b.settings[name]:
            raise BadInput(f"{a.path} was decoded with {name} {a.settings[name]} and {b.path} with "
                           f"{b.settings[name]}; compare runs with the same decoding")


def regrade(run: Saved) -> None:
    """Grade a run's saved responses again, show every change, and write answers and summary anew. What was
    there is kept as answers.before-regrade.jsonl, or -2, -3, ... where earlier answers are kept."""
    summary = read_json(run.path / "summary.json")
    right_or_wrong, changed = {True: "right", False: "wrong"}, 0
    for data, rows in run.rows.items():
        for row in rows:
            now = grade(row["response"], row["gold"])
            if now.correct != row["correct"]:
                changed += 1
                print(f"{data} {row['id']}: gold {row['gold']!r}, answer {now.answer!r}: "
                      f"{right_or_wrong[row['correct']]} ({row['reason']}) -> "
                      f"{right_or_wrong[now.correct]} ({now.reason})")
            row |= {"correct": now.correct, "answer": now.answer}
            row["reason"] = now.reason if now.answer else row["reason"]
        before, seconds = summary["data"][data]["accuracy"], summary["data"][data]["seconds"]
        summary["data"][data] = {**score(rows, len(run.problems(data))), "seconds": seconds}
        print(f"{data}: {100 * before:.1f} % -> {100 * summary['data'][data]['accuracy']:.1f} % right")
    print(f"{changed} of {sum(map(len, run.rows.values()))} answers graded differently")
    if changed:
        answers = run.path / "answers.jsonl"
        kept = len(list(run.path.glob("answers.before-regrade*.jsonl")))
        shutil.copy(answers, run.path / f"answers.before-regrade{f'-{kept + 1}' if kept else ''}.jsonl")
        write_whole(answers, as_lines(row for rows in run.rows.values() for row in rows))
        write_json(run.path / "summary.json", summary)


if __name__ == "__main__":
    cli.run(main, args)
