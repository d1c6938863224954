r"""Stage 4, agents: every workflow as a short generator, and a comparison of them on the same problems.

    python agents.py                                   the built-in model: four workflows beside a single pass
    python agents.py --workflow python_tools --show 3  read what was asked, answered and run
    python agents.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --data gsm8k --limit 500
    python agents.py --endpoint http://localhost:8000/v1 --model NAME --data math500

A workflow gets the question and nothing else (slm/episode.py has the protocol). The names are those of the
SLM-Math report's agents; a docstring says what its agent did, and after "Departs" what is different here. All
start from a greedy first answer, and those that begin with the standard prompt share the very same call.
"""

import argparse

from slm.runs import cli
from slm.workflows import WORKFLOWS, workflow

PAPER = {"max_tokens": 2048, "limit": 500, "workflow": "all"}
TINY = {"max_tokens": 320, "limit": 200,
        "workflow": "majority_vote,python_tools,solver_checker_stateless,solver_checker_with_tools"}


def options() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.answer_options(p, both := cli.defaults(PAPER, TINY))
    g = p.add_argument_group("how")
    g.add_argument("--workflow", help=f"all, or names with commas between them: {', '.join(WORKFLOWS)} "
                   f"({both('workflow')}); solver is always run, to compare with")
    g.add_argument("--max-tokens", type=cli.positive, help=f"new tokens of a reply ({both('max_tokens')})")
    g.add_argument("--show", type=cli.positive, default=0, metavar="N", help="print N transcripts of each")
    cli.run_options(p, "runs/agents-<model>")
    return p


if __name__ == "__main__":
    args = cli.resolve(options().parse_args(), PAPER, TINY)  # before the heavy imports

import contextlib
import re
import time
from collections import Counter
from pathlib import Path

from slm import report
from slm.backends import open_backend
from slm.episode import Episode, Sampling, answer_record, jobs_for, run_episodes
from slm.problems import fingerprint, load_all, refuse_long
from slm.runs import stats
from slm.runs.files import Journal, write_json
from slm.runs.rundir import RunDir, new_path
from slm.sandbox import Sandbox


def main(args: argparse.Namespace) -> None:
    names, problems = chosen(args.workflow), load_all(args.data, args.split, args.limit)

    args.out = str(new_path(args.out, f"agents-{Path(args.model).name}", args.resume))
    cli.show(vars(args))
    backend, adapters = open_backend(args)
    refuse_long(problems, backend)
    run = RunDir(args.out, vars(args), fingerprint(problems), args.resume)
    done = finished(run.path / "episodes.jsonl") if args.resume else []

    def keep(episode):
        record = answer_record(problems[episode.group], episode)
        run.log("episodes", {**episode.to_json(), "correct": record["correct"]})

    memo, results = {}, {}
    with contextlib.closing(backend), contextlib.closing(Sandbox()) as sandbox:
        for name in names:
            start = time.monotonic()
            episodes = {e.group: e for e in done if e.workflow == name}
            jobs = [job for job in jobs_for(problems, WORKFLOWS[name]) if job.group not in episodes]
            sampling = Sampling(args.max_tokens, stop_at_box=True)
            new = run_episodes(jobs, backend, sandbox, sampling=sampling, seed=args.seed, adapters=adapters,
                               memo=memo, on_done=keep, bar=name)
            episodes |= {e.group: e for e in new}
            records = [answer_record(p, episodes[i]) for i, p in enumerate(problems)]
            results[name] = {**summary(records, results.get("solver", {}).get("right")),
                             "seconds": time.monotonic() - start}
            for i in range(min(args.show, len(problems))):
                print(transcript(episodes[i], problems[i].question, records[i]))
    write_json(run.path / "table.json", results)
    print(table(results, len(problems)))
    print(f"every prompt, reply and code run: {run.path / 'episodes.jsonl'}; some to read: "
          f"{report.write(run.path)}")


def finished(log: Path) -> list[Episode]:
    """The episodes of a stopped run. What was torn or failed is taken out of the file, to be run again."""
    rows = Journal(log).keep(lambda row: not any(turn["error"] for turn in row["turns"]))
    return [Episode.from_json(row) for row in rows]


def chosen(workflows: str) -> list[str]:
    """The workflows to run: the solver first, since the others are compared with it."""
    names = list(WORKFLOWS) if workflows == "all" else [name.strip() for name in workflows.split(",")]
    return list(dict.fromkeys(["solver", *(workflow(name).__name__ for name in names)]))


def summary(records: list[dict], alone: list[bool] | None) -> dict:
    """The figures of one workflow; `alone` is what the single pass got right on the same problems."""
    n = len(records)
    right, first = [r["correct"] for r in records], [r["first_correct"] for r in records]
    return {
        "right": right, "accuracy": sum(right) / n, "interval": stats.wilson(sum(right), n),
        "first_accuracy": sum(first) / n,
        "improved": sum(r and not f for r, f in zip(right, first)),
        "degraded": sum(f and not r for r, f in zip(right, first)),
        "over_solver": stats.paired(alone or right, right),
        "asks": sum(r["asks"] for r in records) / n, "tokens": sum(r["tokens"] for r in records) / n,
        "failures": dict(Counter(re.sub(r"\d+", "#", cause) for r in records for cause in r["failures"])),
        "no_answer": sum(r["answer"] is None for r in records)}


def table(results: dict[str, dict], n: int) -> str:
    """One line a workflow, and a line for what failed."""
    head = (f"{'workflow':26}{'correct %':>10}{'95 %':>14}{'over solver, 95 %':>24}{'first %':>9}{'impr.':>6}"
            f"{'degr.':>6}{'asks':>6}{'tokens':>8}{'s':>7}")
    lines = [f"\n{n} problems; a greedy call that several workflows share is made and timed once", head]
    for name, r in results.items():
        (low, high), (diff, below, above) = r["interval"], r["over_solver"]
        gain = "" if name == "solver" else f"{100 * diff:+.1f} [{100 * below:+.1f}, {100 * above:+.1f}]"
        span = f"{100 * low:.1f}-{100 * high:.1f}"
        lines.append(f"{name:26}{100 * r['accuracy']:>10.1f}{span:>14}{gain:>24}"
                     f"{100 * r['first_accuracy']:>9.1f}{r['improved']:>6}{r['degraded']:>6}{r['asks']:>6.1f}"
                     f"{r['tokens']:>8.0f}{r['seconds']:>7.1f}")
    for name, r in results.items():
        failures = r["failures"] | ({"without an answer": r["no_answer"]} if r["no_answer"] else {})
        if failures:
            lines.append(f"  {name}: " + ", ".join(f"{count} {cause}" for cause, count in failures.items()))
    return "\n".join(lines)


def transcript(episode: Episode, question: str, record: dict) -> str:
    """An episode to read: each prompt's last message, each reply, each code run in its place."""
    lines = ["=" * 100, f"{episode.workflow}: {question}"]
    for i, turn in enumerate(episode.turns):
        prompt = turn.messages[-1]["content"].replace(question, "(question)")
        lines += [f"---- to the {turn.role}: {prompt.strip()}", f"---- the {turn.role}: {turn.text.strip()}"]
        for run in episode.runs:
            if run.turn == i:
                result = run.stdout.strip() + (f"\n{run.error.strip()}" if run.error else "")
                lines.append(f"---- the sandbox ({run.seconds:.2f} s): {result.strip()}")
    mark = "right" if record["correct"] else f"wrong, it is {record['gold']}"
    held = ", ".join(map(str, episode.drafts))
    lines.append(f"==== answer {episode.answer} ({mark})" + (f", after {held}" if held else "")
                 + (f"; failed on the way: {', '.join(episode.failures)}" if episode.failures else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, args)
