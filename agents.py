r"""Stage 4, agents: every workflow as a short generator, and a comparison of them on the same problems.

    python agents.py                                   the built-in model: four workflows beside a single pass
    python agents.py --workflow python_tools --show 3  read what was asked, answered and run
    python agents.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --data gsm8k --limit 500
    python agents.py --workflow dvts,best_of_n --budget 1,2,4,8,16   accuracy against tokens, beside a vote
    python agents.py --endpoint http://localhost:8000/v1 --model NAME --data math500

A workflow gets the question and nothing else (slm/episode.py has the protocol). The names are those of the
SLM-Math report's agents; a docstring says what its agent did, and after "Departs" what is different here.
They start from a greedy first answer, and those that begin with the standard prompt share the very same call.
The searches (slm/search) sample from the start and take a verifier's word: --adapter verifier=DIR.
"""

import argparse

from slm.runs import cli
from slm.workflows import WORKFLOWS, has_budget, workflow

PAPER = {"max_tokens": 2048, "limit": 500, "step_rule": "paragraph", "workflow": "all"}
TINY = {"max_tokens": 320, "limit": 200, "step_rule": "line",
        "workflow": "majority_vote,python_tools,solver_checker_stateless,solver_checker_with_tools"}
CONTROL = "self_consistency"  # what every other use of the same tokens has to beat


def options() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    cli.answer_options(p, both)
    g = p.add_argument_group("how")
    g.add_argument("--workflow", help="all (but the searches), or names with commas between them: "
                   f"{', '.join(WORKFLOWS)} ({both('workflow').replace(',', ', ')}); "
                   "solver is always run, to compare with; FILE.py:NAME is yours, dvts@8 has a budget of 8")
    g.add_argument("--budget", nargs="+", action=cli.Names, default=[], metavar="N,M",
                   help="run each workflow with these budgets (solutions, rounds, beams or rollouts), beside "
                   f"{CONTROL} with the same tokens")
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
from collections.abc import Callable
from functools import partial

from slm import BadInput
from slm.answers import answer_record, finished, run_graded
from slm.backends import asked_with, open_backend
from slm.episode import Episode, Sampling
from slm.grading import version
from slm.problems import fingerprint, load_all, refuse_long
from slm.report import write as write_report
from slm.runs import stats
from slm.runs.files import read_json, write_json
from slm.runs.forecast import rehearse
from slm.runs.rundir import RunDir, name_of, new_path
from slm.sandbox import Sandbox
from slm.search import SEARCHES


def main(args: argparse.Namespace) -> None:
    wanted = chosen(args.workflow, args.budget)
    problems = load_all(args.data, args.split, args.limit, args.draw)
    args.out = new_path(args.out, f"agents-{name_of(args.model)}")
    cli.show(vars(args))
    backend, adapters = open_backend(args)
    refuse_long(problems, backend)
    sampling = Sampling(args.max_tokens, stop_at_box=True, step_rule=args.step_rule)
    how = {"sampling": sampling, "seed": args.seed, "adapters": adapters, "memo": {}}
    if args.dry_run:
        return rehearse(problems, list(wanted.values()), backend, **how)
    run = RunDir(args.out, vars(args) | asked_with(backend) | {"grader": version()}, fingerprint(problems),
                 args.resume)
    done = finished(run.journal("episodes")) if args.resume else []
    results, earlier = {}, read_json(run.path / "table.json", {})
    with contextlib.closing(backend), contextlib.closing(Sandbox()) as sandbox:
        for name, fn in wanted.items():
            start = time.monotonic()
            rows = run_graded(problems, fn, backend, sandbox, record=whole_record,
                              have=[row for row in done if row["workflow"] == name],
                              write=partial(run.log, "episodes"), bar=name, **how)
            alone = results["solver"]["right"] if results else None
            seconds = time.monotonic() - start  # a finished run that is resumed keeps its own
            results[name] = {**summary(rows, alone), "seconds": earlier.get(name, {}).get("seconds", seconds)}
            for row in rows[:args.show]:
                print(transcript(row))
    write_json(run.path / "table.json", results)
    print(table(results, len(problems)))
    if args.budget:
        print(against_control(results))
    print(f"every prompt, reply and code run: {run.path / 'episodes.jsonl'}; some to read: "
          f"{write_report(run.path)}")


def whole_record(problem, episode: Episode) -> dict:
    """A line of episodes.jsonl: all that happened, and the grade."""
    return {**episode.to_json(), **answer_record(problem, episode)}


def chosen(workflows: str, budgets: list[str]) -> dict[str, Callable]:
    """The workflows to run, by name: the solver first, since the others are compared with it. With budgets,
    each that has one once for each of them, and the control too."""
    plain = [name for name, fn in WORKFLOWS.items() if fn not in SEARCHES]  # a search may cost as much as all
    names = plain if workflows == "all" else [name.strip() for name in workflows.split(",")]
    for budget in budgets:
        if not budget.isdecimal() or not int(budget):
            raise BadInput(f"--budget {budget}: expected whole numbers of 1 or more")
    names = ["solver", *[CONTROL] * bool(budgets), *names]
    found = [workflow(f"{name}@{budget}" if budget and has_budget(workflow(name)) else name)
             for name in names for budget in budgets or [""]]
    by_name = {fn.__name__: fn for fn in found}
    if any(by_name[fn.__name__].__code__ is not fn.__code__ for fn in found):
        raise BadInput(f"--workflow {workflows}: two of them have one name; expected different ones")
    return by_name


def summary(records: list[dict], alone: list[bool] | None) -> dict:
    """The figures of one workflow; `alone` is what the single pass got right on the same problems."""
    n = len(records)
    right, first = [r["correct"] for r in records], [r["first_correct"] for r in records]
    return {
        "right": right, "accuracy": sum(right) / n, "interval": stats.interval(right),
        "first_accuracy": sum(first) / n,
        "improved": sum(r and not f for r, f in zip(right, first)),
        "degraded": sum(f and not r for r, f in zip(right, first)),
        "over_solver": stats.difference(alone or right, right),
        "asks": sum(r["asks"] for r in records) / n, "tokens": sum(r["tokens"] for r in records) / n,
        "failures": dict(Counter(re.sub(r"\d+", "#", cause) for r in records for cause in r["failures"])),
        "no_answer": sum(r["answer"] is None for r in records)}


def table(results: dict[str, dict], n: int) -> str:
    """One line a workflow, and a line for what failed."""
    head = (f"{'workflow':26}{'correct %':>10}{'95 %':>14}{'over solver, 95 %':>24}{'first %':>9}{'impr.':>6}"
            f"{'degr.':>6}{'asks':>6}{'tokens':>8}{'s':>7}")
    lines = [f"\n{n} problems; a call that several workflows share is made and timed once", head]
    for name, r in results.items():
        gain = "" if name == "solver" else stats.points(*r["over_solver"])
        lines.append(f"{name:26}{100 * r['accuracy']:>10.1f}{stats.span(*r['interval']):>14}{gain:>24}"
                     f"{100 * r['first_accuracy']:>9.1f}{r['improved']:>6}{r['degraded']:>6}{r['asks']:>6.1f}"
                     f"{r['tokens']:>8.0f}{r['seconds']:>7.1f}")
    for name, r in results.items():
        failures = r["failures"] | ({"without an answer": r["no_answer"]} if r["no_answer"] else {})
        if failures:
            lines.append(f"  {name}: " + ", ".join(f"{count} {cause}" for cause, count in failures.items()))
    return "\n".join(lines)


def against_control(results: dict[str, dict]) -> str:
    """A line for each budget: how much more is right than by the control with as many tokens, which is the
    smallest of its budgets that takes at least these, else the largest."""
    plain = {name: name.partition("@")[0] for name in results}
    votes = sorted((r["tokens"], name) for name, r in results.items() if plain[name] == CONTROL)
    lines = [f"\nat the same tokens (written, and read by a verifier to judge), over {CONTROL}, 95 %"]
    for name, r in results.items():
        tokens, vote = next((vote for vote in votes if vote[0] >= r["tokens"]), votes[-1])
        if plain[name] not in ("solver", CONTROL):
            gain = stats.points(*stats.difference(results[vote]["right"], r["right"]))
            lines.append(f"{name:26}{r['tokens']:>8.0f} tokens{gain:>24}  over {vote}, {tokens:.0f} tokens")
    return "\n".join(lines)


def transcript(row: dict) -> str:
    """A line of episodes.jsonl to read: the last message of each prompt, each reply, each code run."""
    episode, question = Episode.from_json(row), row["question"]
    lines = ["=" * 100, f"{episode.workflow}: {question}"]
    for i, turn in enumerate(episode.turns):
        prompt = turn.messages[-1]["content"].replace(question, "(question)")
        lines.append(f"---- to the {turn.role}: {prompt.strip()}")
        lines.append(f"---- the {turn.role}: {turn.reply.text.strip() or turn.reply.scores or ''}")
        for outcome in (run.outcome for run in episode.runs if run.turn == i):
            said = f"{outcome.stdout.strip()}\n{outcome.error or ''}".strip()
            lines.append(f"---- the sandbox ({outcome.seconds:.2f} s): {said}")
    mark = "right" if row["correct"] else f"wrong, it is {row['gold']}"
    held = f", after {', '.join(map(str, episode.drafts))}" if episode.drafts else ""
    failed = f"; failed on the way: {', '.join(episode.failures)}" if episode.failures else ""
    lines.append(f"==== answer {episode.answer} ({mark}){held}{failed}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, args, stopped=write_report)
