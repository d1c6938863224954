"""Do verifiers of steps find the first error? Trained on hard, soft and exact labels of the tiny world.

    python bench/verifiers.py                all that is missing, then the table
    python bench/verifiers.py --seeds 1 --limit 100 --completions 2 --out runs/small    small, to see it work
    python bench/verifiers.py --table        only the table, from results/verifiers

The policy (by default an SFT adapter, which is trained first) writes solutions, and make_data.py steps labels
them. One problem in five is held out. On the others one verifier is trained for each kind of label and seed,
an adapter of all linear layers, and scores every step of the held-out solutions as a search would ask it to.
A run that has its file results/verifiers/KIND-SEED.json is not made again, and a stopped one goes on where it
was.

A solution's first error is the first step whose score is below a threshold. F1 is ProcessBench's (Zheng et
al. 2024, arXiv 2412.06559): the harmonic mean of two accuracies, the share of the solutions with an error
whose first one is found, and the share of those without in which none is found. What is an error the exact
labels say. `tuned`: the threshold with the best F1 on one half of the held-out problems is used on the other.
Two rows are no training: `untrained` is the base model, `completions` the labels themselves: the share of
right completions from the step. Intervals: 95 %, by a bootstrap over problems, with all their solutions and
all seeds; differences with the same draws.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.shared import ROOT, by_seed, made_by, rows, script
from slm.backends import own_model
from slm.episode import Job, run_episodes, seed_of
from slm.grading import equal, equations
from slm.problems import load
from slm.runs import stats
from slm.runs.files import as_lines
from slm.search import WORDS, Node, judge

KINDS = ("hard", "soft", "exact")
RIGHT, WRONG = WORDS
RESULTS = ROOT / "results/verifiers"
THRESHOLDS = np.linspace(0.01, 0.99, 99)
ROUNDS = 10_000


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", type=Path, help="an adapter of tiny (default: trained by SFT in --out)")
    p.add_argument("--limit", type=int, default=900, help="problems (default 900)")
    p.add_argument("--completions", type=int, default=8, help="from each step (default 8)")
    p.add_argument("--seeds", type=int, default=3, help="verifiers of each kind (default 3)")
    p.add_argument("--out", type=Path, default=ROOT / "runs/verifiers", help="runs (default runs/verifiers)")
    p.add_argument("--results", type=Path, default=RESULTS, help="(default results/verifiers)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        measure(args)
    print("\n".join(table(read(args.results))))


# ---- runs ------------------------------------------------------------------------------------------------

def measure(args) -> None:
    policy = args.policy or args.out / "sft/adapter"
    if not policy.is_dir():
        script(args.out, "make_data.py", "--out", args.out / "data")
        script(args.out, "train_sft.py", "--validate", 0, "--data", args.out / "data/records.jsonl",
               "--out", args.out / "sft", *goes_on(args.out / "sft"))
    made = args.out / "steps"
    label = ("make_data.py", "steps", "--model", policy, "--limit", args.limit, "--completions",
             args.completions, "--out", made)
    if not (made / "soft.jsonl").exists():
        script(args.out, *label)
    solutions = solutions_of(args)
    held_out = [s for s in solutions if is_held_out(s["id"])]
    save(args, "completions", 0, [label], [s | {"scores": s["share"]} for s in held_out])
    if not (args.results / "untrained-0.json").exists():
        save(args, "untrained", 0, [], scored(held_out, "tiny"))
    for seed in range(args.seeds):
        for kind in KINDS:
            if not (args.results / f"{kind}-{seed}.json").exists():
                run, data = args.out / f"{kind}-{seed}", args.out / f"train-{kind}.jsonl"
                data.write_bytes(as_lines(records(made, kind, solutions)))
                train = ("train_sft.py", "--lora", "--targets", "all", "--lr", 3e-3, "--data", data,
                         "--validate", 0, "--seed", seed, "--out", run)
                if not (run / "adapter").is_dir():
                    script(args.out, *train, *goes_on(run))
                save(args, kind, seed, [label, train], scored(held_out, str(run / "adapter")))


def goes_on(run: Path) -> list[str]:
    return ["--resume"] if (run / "settings.json").exists() else []


def is_held_out(id: str) -> bool:
    return seed_of("verifiers", id) % 5 == 0


def solutions_of(args) -> list[dict]:
    """The labelled solutions: {"id", "sample", "question", "steps", "error" (the first wrong step from 1 on,
    or 0), "share" (of right completions, by step)}."""
    shares, made = defaultdict(dict), args.out / "steps"
    for row in rows(made / "soft.jsonl"):
        said, share = row["messages"][-1], shares[row["id"], row["sample"]]
        right = said["weight"] if said["content"] == RIGHT else 0.0
        share[row["step"]] = max(right, share.get(row["step"], 0.0))
    problems = {p.id: p for p in load("tiny", "train", args.limit)}
    found = []
    for row in rows(made / "completions.jsonl"):
        key = row["id"], row["sample"]
        if row["step"] == 0 and key in shares:
            share, p = [share for _, share in sorted(shares[key].items())], problems[row["id"]]
            error = first_error(row["steps"], p.question, p.solution, right=share[-1] > 0)
            found.append({"id": p.id, "sample": row["sample"], "question": p.question, "steps": row["steps"],
                          "error": error, "share": share})
    return found


def records(made: Path, kind: str, solutions: list[dict]) -> list[dict]:
    """What a verifier is trained on: of problems that are not held out. Exact labels end with the first
    error."""
    file = "hard" if kind == "exact" else kind
    kept = [row for row in rows(made / f"{file}.jsonl") if not is_held_out(row["id"])]
    if kind != "exact":
        return kept
    errors, exact = {(s["id"], s["sample"]): s["error"] for s in solutions}, []
    for row in kept:
        error = errors[row["id"], row["sample"]]
        word = WRONG if row["step"] == error else RIGHT
        if not error or row["step"] <= error:
            exact.append(row | {"messages": [row["messages"][0], row["messages"][1] | {"content": word}]})
    return exact


def first_error(steps: list[str], question: str, worked: str, right: bool) -> int:
    """The first wrong step of a solution, counted from 1, or 0; exact where every right way has the results
    of the worked solution, as in the tiny world. A step is wrong if one of its equations is, or has another
    result; without an equation, if it has a number that is neither given nor a result. If the answer is wrong
    (not `right`) and no such step is found, it is the last one. Wrong words and names don't count.

    >>> first_error(["3 + 4 = 7\\n", "7 * 2 = 15"], "3 and 4, twice?", "3 + 4 = 7, 7 * 2 = 14", False)
    2
    """
    results = {result for _, result in equations(worked)}
    given, *numbers = (set(re.findall(r"\d+(?:\.\d+)?", text)) for text in (question, *steps))
    for n, step in enumerate(steps, 1):
        found = equations(step)
        good = [equal(a, b) and any(equal(b, result) for result in results) for a, b in found]
        if not all(good) or not (found or numbers[n - 1] <= given | results):
            return n
    return 0 if right else len(steps)


def scored(solutions: list[dict], verifier: str) -> list[dict]:
    """Each solution with the P(right) of its steps, as slm/search gets it."""
    jobs, written = [], []
    for s in solutions:
        written.append([Node(text="".join(s["steps"][:n])) for n in range(1, len(s["steps"]) + 1)])
        jobs.append(Job(f"{s['id']}/{s['sample']}", s["question"], verify(written[-1])))
    with closing(own_model(verifier, "auto", "float32")) as backend:
        run_episodes(jobs, backend, bar="judged")
    return [s | {"scores": [node.score for node in nodes]} for s, nodes in zip(solutions, written)]


def verify(nodes: list[Node]):
    def judged(question: str):
        yield from judge(question, nodes)
    return judged


def save(args, kind: str, seed: int, commands: list[tuple], solutions: list[dict]) -> None:
    result = {**made_by(commands),
              "solutions": [{"id": s["id"], "sample": s["sample"], "error": s["error"],
                             "scores": [round(x, 4) for x in s["scores"]]} for s in solutions]}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{kind}-{seed}.json").write_text(json.dumps(result) + "\n")
    print(f"{kind}, seed {seed}: {len(solutions)} solutions", flush=True)


# ---- the table -------------------------------------------------------------------------------------------

def read(results: Path) -> dict[str, list[list[dict]]]:
    """Kind -> the scored solutions of each seed."""
    return {kind: [r["solutions"] for r in found] for kind in ("untrained", "completions", *KINDS)
            if (found := by_seed(results, kind))}


def first_below(scores: list[float], threshold: float) -> int:
    """The first step, from 1 on, with a score below the threshold, or 0.

    >>> first_below([0.9, 0.4, 0.6, 0.1], 0.5), first_below([0.9], 0.5)
    (2, 0)
    """
    return next((n for n, score in enumerate(scores, 1) if score < threshold), 0)


def counts(solutions: list[dict], threshold: float) -> np.ndarray:
    """(with an error, of these the first one found, without, of these none found)."""
    c = np.zeros(4)
    for s in solutions:
        kind = 2 * (s["error"] == 0)
        c[kind] += 1
        c[kind + 1] += first_below(s["scores"], threshold) == s["error"]
    return c


def f1(c: np.ndarray) -> np.ndarray:
    """Of counts (..., 4): the harmonic mean of both accuracies.

    >>> round(float(f1(np.array([4, 1, 2, 2]))), 3)  # 2 * 1/4 * 1 / (1/4 + 1)
    0.4
    """
    erroneous = c[..., 1] / np.maximum(c[..., 0], 1)
    correct = c[..., 3] / np.maximum(c[..., 2], 1)
    return 2 * erroneous * correct / np.maximum(erroneous + correct, 1e-9)


def half(id: str) -> int:
    return seed_of("half", id) % 2


def tuned(solutions: list[dict]) -> list[float]:
    """The threshold for each half of the problems: the best one on the other half."""
    halves = [[s for s in solutions if half(s["id"]) == h] for h in (1, 0)]
    return [max(THRESHOLDS, key=lambda t: f1(counts(other, t))) for other in halves]


def by_problem(seeds: list[list[dict]], tune: bool) -> np.ndarray:
    """Counts of each problem (P, 4), summed over the seeds, in the order of the ids."""
    total = defaultdict(lambda: np.zeros(4))
    for solutions in seeds:
        thresholds = tuned(solutions) if tune else (0.5, 0.5)
        for s in solutions:
            total[s["id"]] += counts([s], thresholds[half(s["id"])])
    return np.array([c for _, c in sorted(total.items())])


def draws(c: np.ndarray) -> np.ndarray:
    """F1 of ROUNDS samples of as many problems, drawn with replacement, each time the same ones."""
    times = np.random.default_rng(0).multinomial(len(c), np.full(len(c), 1 / len(c)), size=ROUNDS)
    return f1(times @ c)


def table(found: dict[str, list[list[dict]]]) -> list[str]:
    lines = ["| labels | seeds | with an error % | without % | F1 at 0.5 | F1 tuned | tuned, over hard |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    base = by_problem(found["hard"], tune=True) if "hard" in found else None
    for kind, seeds in found.items():
        plain, best = (by_problem(seeds, tune) for tune in (False, True))
        all_in = best.sum(0)
        cells = [kind, len(seeds), *(f"{100 * all_in[i + 1] / max(1, all_in[i]):.1f}" for i in (0, 2))]
        cells += [stats.percent((f1(c.sum(0)), *np.quantile(draws(c), (0.025, 0.975))))
                  for c in (plain, best)]
        over = ""
        if base is not None and kind != "hard":
            gains = np.quantile(draws(best) - draws(base), (0.025, 0.975))
            over = stats.points(f1(all_in) - f1(base.sum(0)), *gains)
        lines.append(f"| {' | '.join(map(str, [*cells, over]))} |")
    solutions = next(iter(found.values()), [[]])[0]
    wrong = sum(s["error"] > 0 for s in solutions)
    lines.append(f"\n{len(solutions)} solutions of {len({s['id'] for s in solutions})} held-out problems, "
                 f"{wrong} with an error; accuracies at the tuned threshold.")
    return lines


if __name__ == "__main__":
    main()
