"""Stage 1: a cascade of teachers writes worked solutions; the verified ones become training records.

    python make_data.py                                       the stand-in teacher on the tiny world, seconds
    python make_data.py --data gsm8k,math --cascade recipes/report.toml --budget 50
    python make_data.py --data gsm8k --cascade recipes/local.toml   a vLLM or llama.cpp server of yours
    python make_data.py --data gsm8k --teacher self --model Qwen/Qwen2.5-Math-1.5B-Instruct
    python make_data.py verifier --model runs/sft-tiny-lora/adapter check-this-solution records
    python make_data.py steps --model runs/sft-tiny-lora/adapter    is-this-step-right records

Teachers of round 1 answer every problem, those of round 2 what round 1 left unsolved, each until its first
right answer or its last attempt. A TOML file names them (recipes/ has three). Problems that overlap a test
set are never asked.

Every attempt is on disk as it lands. Stopped or killed, the same command goes on where it was. What had
landed is not asked or paid for again (what was on the wire at a kill is); attempts that ended in an HTTP
error are made up for at the next start.
"""

from slm.runs import cli

PAPER = {"max_tokens": 2048, "step_rule": "paragraph"}
TINY = {"max_tokens": 256, "step_rule": "line"}

def options():
    p = cli.parser(__doc__)
    both = cli.defaults(PAPER, TINY)
    p.add_argument("what", nargs="?", choices=("solutions", "verifier", "steps"), default="solutions")
    g = p.add_argument_group("problems")
    g.add_argument("--data", nargs="+", action=cli.Names, default=["tiny"], metavar="A,B",
                   help="tiny, gsm8k, math, ... or JSON lines files (default tiny; the report: gsm8k,math)")
    g.add_argument("--limit", type=cli.positive, help="problems of each (tiny: default 400)")
    cli.prompt_option(g)
    g = p.add_argument_group("teachers")
    g.add_argument("--cascade", metavar="TOML", help="who is asked (default recipes/tiny.toml, a stand-in)")
    g.add_argument("--teacher", choices=("self",), help="ask --model, on this machine")
    g.add_argument("--budget", type=cli.number(0), metavar="DOLLARS",
                   help="stop before more than this is spent")
    g = p.add_argument_group("our own model (--teacher self, verifier, steps)")
    g.add_argument("--model", default="tiny", help="tiny, a directory or a hub id (default tiny)")
    g.add_argument("--samples", type=cli.positive, default=4,
                   help="self: attempts at a problem; else solutions of each (default 4)")
    g.add_argument("--completions", type=cli.positive, default=8,
                   help="steps: how often a solution is written on from each of its steps (default 8)")
    g.add_argument("--bisect", action="store_true",
                   help="steps: look only for the first wrong step of each wrong solution, by halving")
    cli.step_option(g, both)
    g.add_argument("--max-tokens", type=cli.positive, help=f"of an answer ({both('max_tokens')})")
    cli.run_options(p, "runs/data-<names>, runs/verifier-<names> or runs/steps-<names>", resume=False)
    return p


if __name__ == "__main__":
    args = options().parse_args()  # before the heavy imports, so that --help answers at once

import contextlib
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path

from slm import BadInput, prompts, workflows
from slm.backends import own_model
from slm.episode import Job, Sampling, run_episodes, seed_of, user
from slm.grading import grade
from slm.problems import fingerprint, load, load_all, origin
from slm.report import write as write_report
from slm.runs import forecast
from slm.runs.files import as_lines, write_json, write_whole
from slm.runs.rundir import RunDir
from slm.sampling import Sampler
from slm.sandbox import Sandbox
from slm.search import labels
from slm.teachers import Endpoint, cascade, records
from slm.tiny import StandIn

TESTS = ("gsm8k", "math500", "aime24", "amc23")  # no record may overlap these
HERE = Path(__file__).parent
PART = 128  # problems of each set that --dry-run takes


# ---- a run -----------------------------------------------------------------------------------------------

def main(args) -> None:
    cli.resolve(args, PAPER, TINY)
    if args.what != "solutions" and (args.cascade or args.teacher or args.budget is not None):
        raise BadInput(f"{args.what}: --model writes; --cascade, --teacher and --budget are for solutions")
    make = {"solutions": make_solutions, "verifier": make_verifier, "steps": make_steps}[args.what]
    if args.dry_run:
        rehearse(make, args)
    else:
        make(args)


def rehearse(make, args) -> None:
    """Make a part of the data in a folder that does not stay, and say what all would take. Servers are asked
    nothing."""
    _, asked, *_ = choose(args)
    if args.what == "solutions" and args.teacher != "self":
        teachers = who(args)
        most = sum(t.attempts * cascade.Attempt(p, t, 0, 0).most_dollars for t in teachers for p in asked)
        print(f"dry run: at most {sum(t.attempts for t in teachers) * len(asked):,} attempts at "
              f"{cli.count(len(asked), 'problem')}, ${most:,.2f}; no teacher was asked")
        return
    with tempfile.TemporaryDirectory() as folder:
        small, start = type(args)(**vars(args) | {"out": folder, "limit": PART}), time.monotonic()
        sampler, part = make(small)
    took = forecast.scaled(sampler.busy, time.monotonic() - start, len(asked) / part)
    forecast.say(sampler.model, cli.count(len(asked), "problem"), *took)


def make_solutions(args):
    """Ask the teachers, and file every attempt as a record or as rejected. Returns what the first one is
    asked by, and how many problems were asked."""
    teachers = who(args)
    if prompts.option() and all(t.efforts for t in teachers):
        raise BadInput("--prompt: teachers that think aloud have their own; expected one with efforts = {}")
    problems, asked, dropped, compared = choose(args)
    identity = {"data": args.data, "seed": args.seed, "prompt": args.prompt,
                "teachers": [t.identity for t in teachers]}
    with contextlib.ExitStack() as stack:
        run = open_run(args, "data", identity, problems, stack)
        journals = run.journal("records"), run.journal("rejected")
        asking = cascade.Asking(teachers, *journals, args.budget, args.seed)
        asking.recall({p.id: p.question for p in problems})
        backends = start(teachers, args, stack)

        def stop() -> None:
            asking.stop("stopped")
            for backend in backends.values():
                if isinstance(backend, Endpoint):
                    backend.stop()
            print(f"\nstopping; at most {sum(map(len, asking.wire.values()))} requests are on the wire "
                  "(Ctrl-C again to leave them)")

        with cli.Interrupt(stop):
            asking.run(asked, backends)
        for journal in journals:
            journal.sort(by_problem(problems, "round", "teacher", "attempt"))
        still_open = {p.id for p in asked if asking.progress.due(p.id, later=True)}
        summary = records.summarize(problems, dropped, still_open, asking.attempts(), asking.prices)
        report(run.path, summary | {"compared with": compared})
    print(f"records: {run.path}/records.jsonl")
    left = summary["source"]["all"].get("open", 0)
    if asking.why or left:
        why = asking.why or f"attempts ended in HTTP errors, the last: {asking.trouble}"
        print(f"ended early: {why}; open: {cli.count(left, 'problem')}; the same command goes on")
    if asking.counts["kept"] and not asking.why:
        made = shlex.quote(f"{run.path}/records.jsonl")
        print(f"next: python train_sft.py --model {args.model} --data {made}{prompts.option()}")
    if asking.dead:
        raise asking.dead
    if asking.why == "stopped":
        sys.exit(130)
    return backends[teachers[0].name], len(asked)


def who(args) -> list:
    """The teachers: our own model, a cascade file, or the stand-in."""
    if args.teacher == "self":
        if args.cascade:
            raise BadInput("--teacher self and --cascade: expected one of them")
        return [cascade.Teacher("self", args.model, "self", attempts=args.samples, max_tokens=args.max_tokens,
                                workers=128, temperatures=(0.7, 0.5, 0.9))]
    if not args.cascade and any(not name.startswith("tiny") for name in args.data):
        raise BadInput(f"--data {','.join(args.data)}: the stand-in teacher knows only the tiny world; "
                       "expected --cascade (such as recipes/report.toml) or --teacher self")
    return cascade.read_cascade(Path(args.cascade or HERE / "recipes" / "tiny.toml"))


def start(teachers: list, args, stack) -> dict:
    """A backend for each teacher, closed with the stack."""
    backends = {}
    for t in teachers:
        if t.base_url == "self":
            backend = own_model(args.model, args.device, args.dtype)
        elif t.base_url == "stand-in":
            backend = StandIn(t.model)
        else:
            backend = Endpoint(t.base_url, t.model, t.key_env, workers=t.workers, timeout=t.timeout,
                               requests_per_minute=t.requests_per_minute,
                               tokens_per_minute=t.tokens_per_minute)
        backends[t.name] = stack.enter_context(contextlib.closing(backend))
        print(f"round {t.round}: {t.name} = {t.model} at {t.base_url}, {t.attempts} attempts, "
              f"{t.workers} at once")
    return backends


def choose(args) -> tuple[list, list, dict[str, dict], list[str]]:
    """(problems, those to ask about, those dropped: id -> overlap with a test set, the names of these sets).
    The tiny world's splits share their wording, so there only whole questions count."""
    tiny = all(name.startswith("tiny") for name in args.data)
    problems = load_all(args.data, "train", args.limit or (400 if args.data == ["tiny"] else None))
    tests = {}
    for name in ("tiny", "tiny-unseen") if tiny else TESTS:
        try:
            tests[name] = [p.question for p in load(name, "test")]
        except BadInput as e:
            print(f"warning: overlap with {name} is NOT checked: {e}")
    find = records.Leaks(tests, None if tiny else 13).find
    dropped = {p.id: leak for p in problems if (leak := find(p.question))}
    print(f"{cli.count(len(problems), 'problem')}; dropped for an overlap with {', '.join(tests)}: "
          f"{len(dropped):,}")
    return problems, [p for p in problems if p.id not in dropped], dropped, list(tests)


def open_run(args, kind: str, identity: dict, problems: list, stack) -> RunDir:
    """The run directory, new or of the same identity, and ours until the stack unwinds."""
    names = (origin(Path(data))[0] for data in args.data)
    args.out = args.out or f"runs/{kind}-{'-'.join(names)}"
    out = Path(args.out)
    run = RunDir(out, identity, fingerprint(problems), goes_on=True)
    stack.enter_context(run.lock)
    if run.resumed:
        print(f"going on in {out}")
    cli.show(vars(args) | {"out": out})
    return run


def by_problem(problems: list, *names: str):
    """A sort key for rows: the order of the problems, then these fields. So arrival does not show."""
    place = {p.id: n for n, p in enumerate(problems)}
    return lambda row: (place.get(row["id"], len(place)), row["id"], *(row[name] for name in names))


def report(out: Path, summary: dict) -> None:
    """summary.json, report.html and the main figures on screen."""
    write_json(out / "summary.json", summary)
    for title in ("source", "round", "teacher", "effort"):
        print_table(summary[title], title)
    causes = ", ".join(f"{n:,} {cause}" for cause, n in summary["causes"].items())
    print(f"rejected attempts: {causes or 'none'}\n{summary['headline']}; page: {write_report(out)}")


def print_table(rows: dict[str, dict], title: str) -> None:
    """A line for each row, a column for every key of any of them."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [[title, *columns]]
    for name, row in rows.items():
        values = [row.get(column, 0) for column in columns]
        lines.append([name, *(f"{x:,.4g}" if isinstance(x, float) else f"{x:,}" for x in values)])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    for first, *rest in lines:
        print(first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:])), sep="  ")


# ---- what our own model writes ---------------------------------------------------------------------------

def policy(args, stack):
    """(sampler, run(jobs, bar, ...)): our own model works on jobs, closed with the stack. It samples at
    temperature 1, in steps as slm/search says."""
    backend = stack.enter_context(contextlib.closing(own_model(args.model, args.device, args.dtype)))
    sandbox = stack.enter_context(contextlib.closing(Sandbox()))
    sampling = Sampling(args.max_tokens, temperature=1.0, step_rule=args.step_rule)

    def run(jobs: list[Job], bar: str, on_done=None) -> None:
        for at in range(0, len(jobs), 1024):
            run_episodes(jobs[at:at + 1024], backend, sandbox, sampling=sampling, seed=args.seed, bar=bar,
                         on_done=on_done)
    return backend, run


def identity(args, *more: str) -> dict:
    """What shapes such a run; it goes on only with the same."""
    names = ("data", "seed", "prompt", "model", "samples", "max_tokens", *more)
    return {name: getattr(args, name) for name in names}


# ---- records for a verifier of solutions -----------------------------------------------------------------

def with_python(question: str):
    """A sampled solution in code, with what the code printed."""
    reply = yield from workflows.ask("solver", prompts.PYTHON(question=question), **workflows.CODING)
    return workflows.printed((yield from workflows.execute(reply))) or reply


def make_verifier(args) -> tuple[Sampler, int]:
    """Sample --samples solutions of each problem, every second one in Python, grade them, and write records
    in which right and wrong are balanced; a tenth of the problems is held out. Returns as make_solutions."""
    problems, asked, *_ = choose(args)
    known = {p.id: p for p in asked}
    with contextlib.ExitStack() as stack:
        run = open_run(args, "verifier", identity(args), problems, stack)
        journal = run.journal("samples")
        done = {(row["id"], row["sample"]) for row in journal}
        jobs = [Job(p.id, p.question, with_python if k % 2 else workflows.solver, sample=k)
                for p in known.values() for k in range(args.samples) if (p.id, k) not in done]
        sampler, write = policy(args, stack)
        write(jobs, "solutions", lambda e: journal.append(sample_row(known[e.problem_id], e, args.model)))
        journal.sort(by_problem(problems, "sample"))
        balance(run.path, journal, known, args)
        print(f"page: {write_report(run.path)}")
    return sampler, len(asked)


def sample_row(problem, episode, model: str) -> dict:
    """One graded solution; `right` is None where there is no whole solution to check."""
    graded = grade(episode.response, problem.gold, strict=True)
    reply = episode.turns[-1].reply if episode.turns else None
    run = episode.runs[-1].outcome.stdout.strip()[:1000] if episode.runs else None
    solution = reply.text.split("</think>")[-1].strip() if reply else ""
    whole = bool(solution) and reply.finish not in ("length", "error") and graded.answer is not None
    return {"id": problem.id, "question": problem.question, "gold": problem.gold, "source": problem.source,
            "sample": episode.sample, "solution": solution, "run": run, "answer": graded.answer,
            "right": graded.correct if whole else None, "reason": graded.reason, "model": model}


def balance(out: Path, samples, known: dict, args) -> None:
    """train.jsonl and test.jsonl, each with as many right as wrong solutions and without common problems."""
    sides = {"train": {True: {}, False: {}}, "test": {True: {}, False: {}}}
    for row in samples:
        if row["right"] is not None and row["id"] in known:
            side = "test" if seed_of("held out", row["id"]) % 10 == 0 else "train"
            sides[side][row["right"]].setdefault((row["id"], row["solution"]), row)
    rng = random.Random(args.seed)
    for side, classes in sides.items():
        count = min(map(len, classes.values()))
        rows = [verifier_record(row) for found in classes.values()
                for row in rng.sample(list(found.values()), count)]
        rng.shuffle(rows)
        write_whole(out / f"{side}.jsonl", as_lines(rows))
        print(f"{out}/{side}.jsonl: {count:,} of {len(classes[True]):,} right and "
              f"{len(classes[False]):,} wrong solutions")
    print(f"next: python train_sft.py --model {args.model} --data {shlex.quote(f'{out}/train.jsonl')}")


def verifier_record(row: dict) -> dict:
    """A check-this-solution conversation, in the words that the workflows' checker uses."""
    shown = row["solution"] + (prompts.OUTPUT(output=row["run"]) if row["run"] is not None else "")
    verdict = "CORRECT" if row["right"] else "INCORRECT"
    messages = [user(prompts.CHECKER(question=row["question"], solution=shown)),
                {"role": "assistant", "content": verdict}]
    return row | {"label": verdict, "messages": messages, "prompt": prompts.CHECKER.id}


# ---- records for a verifier of steps ---------------------------------------------------------------------

def make_steps(args) -> tuple[Sampler, int]:
    """Sample --samples solutions of each problem and label their steps by what becomes of them: from each
    one --completions are written to the end (Math-Shepherd, arXiv 2312.08935). With --bisect only the first
    wrong step of a wrong solution is looked for (OmegaPRM, arXiv 2406.06592). Returns as make_solutions."""
    problems, asked, *_ = choose(args)
    with contextlib.ExitStack() as stack:
        run = open_run(args, "steps", identity(args, "completions", "bisect", "step_rule"), problems, stack)
        journal, (sampler, write) = run.journal("completions"), policy(args, stack)
        while jobs := [
                Job(f"{p.id}/{row['sample']}", p.question, labels.rest_of(journal, row, step, args),
                    sample=step)
                for p, row in labels.so_far(journal, asked, args.samples)
                for step in labels.due(len(row["steps"]), row["right"], row["found"], args.bisect)]:
            write(jobs, "completions")
        journal.sort(by_problem(problems, "sample", "step"))
        write_steps(run.path, labels.so_far(journal, asked, args.samples), args)
        print(f"page: {write_report(run.path)}")
    return sampler, len(asked)


def write_steps(out: Path, solutions: list[tuple], args) -> None:
    """hard.jsonl and soft.jsonl: is this step right?"""
    for kind, rows in labels.step_records(solutions, args).items():
        write_whole(out / f"{kind}.jsonl", as_lines(rows))
        print(f"{out}/{kind}.jsonl: {cli.count(len(rows), 'record')}")
    print(f"next: python train_sft.py --model {args.model} --data {shlex.quote(f'{out}/soft.jsonl')}, or "
          "hard.jsonl")


if __name__ == "__main__":
    cli.run(main, args, stopped=write_report)
