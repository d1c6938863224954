"""Does search pay as a source of training data? rStar-Math's self-evolution, two rounds on the tiny world.

    python bench/self_evolution.py --policy DIR --verifier DIR     all that is missing, then the table
    ... --seeds 1 --limit 20 --test 20 --results runs/small        small, to see it work
    python bench/self_evolution.py --table                         only the table, from results/self_evolution

A round (Guan et al. 2025, arXiv 2501.04519, section 3.4): the policy looks for solutions of training problems
by MCTS with a verifier of steps; of those with the right answer the two with the best scores are kept; the
base model is trained on them, and is the next policy. The control, `sampling`, writes plain solutions with as
many tokens as the search took, and keeps the first two right ones. Each policy answers the test problems
greedily, in a single pass and, the first --test of them, in the search.

Departs: one verifier serves both rounds. Here it is trained on exact labels of the tiny world, since labels
by completions teach a verifier nothing there (bench/verifiers.py).

A policy leaves one small file, results/self_evolution/ARM-ROUND-SEED.json (ARM `start`: before the rounds); a
policy that has its file is not made again. Intervals: 95 %, by a bootstrap over problems, with all seeds of
a problem.
"""

import argparse
import itertools
import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.shared import ROOT, at, bits, by_seed, made_by, over, rows, script, shares
from slm import prompts
from slm.backends import own_model
from slm.episode import Job, Sampling, run_episodes, user
from slm.grading import grade
from slm.problems import load
from slm.runs import stats
from slm.runs.files import as_lines
from slm.sandbox import Sandbox
from slm.search.searches import chains, tree
from slm.search.steps import Node

RUNS, RESULTS = ROOT / "runs/self_evolution", ROOT / "results/self_evolution"
ARMS, ROUNDS, BUDGET, WIDTH, KEPT = ("search", "sampling"), 2, 4, 4, 2
PLACES = {"solver": "single pass", f"mcts@{BUDGET}": f"mcts@{BUDGET}"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", help="an adapter of tiny: the policy of the first round")
    p.add_argument("--verifier", help="an adapter of tiny: the verifier of steps, of all rounds")
    p.add_argument("--limit", type=int, default=200, help="training problems of a round (default 200)")
    p.add_argument("--test", type=int, default=200, help="test problems in the search (default 200)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--results", type=Path, default=RESULTS, help="(default results/self_evolution)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        if not (args.policy and args.verifier):
            p.error("--policy and --verifier: expected an adapter for each, or --table")
        for seed in range(args.seeds):
            evolve(args, seed)
    print("\n".join(table(args.results)))


# ---- runs ------------------------------------------------------------------------------------------------

def evolve(args, seed: int) -> None:
    """Both arms of one seed, round by round: the control has to know what the search of its round took."""
    runs = RUNS if args.results == RESULTS else args.results
    score(args, runs / f"start-0-{seed}", "start-0", seed, args.policy, {}, [])
    policy, tokens = dict.fromkeys(ARMS, args.policy), 0
    for number in range(1, ROUNDS + 1):
        for arm in ARMS:
            name = f"{arm}-{number}"
            out, file = runs / f"{name}-{seed}", args.results / f"{name}-{seed}.json"
            if not (file.exists() and (out / "sft/adapter").is_dir()):
                shutil.rmtree(out, ignore_errors=True)
                made = collect(args, arm, policy[arm], tokens, 1000 * number + seed)
                out.mkdir(parents=True)
                data = out / "traces.jsonl"
                data.write_bytes(as_lines(made.pop("traces")))
                train = ["train_sft.py", "--lora", "--data", data, "--validate", 0, "--seed", seed,
                         "--out", out / "sft"]
                script(runs, *train)
                score(args, out, name, seed, out / "sft/adapter", made, [train])
            policy[arm] = out / "sft/adapter"
            if arm == "search":
                tokens = json.loads(file.read_text())["tokens"]


def collect(args, arm: str, policy, tokens: int, seed: int) -> dict:
    """Right solutions of the training problems: {"traces": rows to train on, "tokens", "solved"}. `tokens` is
    how many the control may take."""
    problems, found, asked = load("tiny", "train", args.limit), {}, 0
    adapters = [("solver", str(policy)), ("verifier", args.verifier)]
    with closing(own_model("tiny", "auto", "auto", adapters)) as backend, closing(Sandbox()) as sandbox:
        def run(workflow, sample: int) -> int:
            jobs = [Job(p.id, p.question, workflow, sample=sample) for p in problems]
            done = run_episodes(jobs, backend, sandbox, seed=seed, bar=arm,
                                sampling=Sampling(200, temperature=1.0, step_rule="line"),
                                adapters={name: name for name, _ in adapters})
            return sum(episode.tokens_spent for episode in done)

        if arm == "search":
            asked = run(searching(found), 0)
        else:
            for sample in itertools.count():  # passes over the problems; at the end a few tokens more
                asked += run(sampling(found), sample)
                if asked >= tokens:
                    break
    traces = [row for p in problems for row in kept(p, found.get(p.question, []))]
    return {"traces": traces, "kept": len(traces), "tokens": asked,
            "solved": len({row["id"] for row in traces})}


def searching(found: dict[str, list[Node]]):
    """rStar-Math's search, which leaves all its solutions in `found`, the best first."""
    def mcts(question: str):
        root = yield from tree(question, BUDGET, WIDTH)
        found[question] = sorted((node for node in root.below() if node.answer), key=lambda n: -n.score)
    return mcts


def sampling(found: dict[str, list[Node]]):
    """One solution, added to `found`."""
    def chain(question: str):
        found.setdefault(question, []).extend((yield from chains(question, [Node()])))
    return chain


def kept(problem, solutions: list[Node]) -> list[dict]:
    """The first KEPT different solutions with the right answer, as records to train on."""
    texts = dict.fromkeys(node.text for node in solutions if grade(node.text, problem.gold).correct)
    return [{"id": problem.id, "messages": [user(prompts.SOLVER(question=problem.question)),
                                            {"role": "assistant", "content": text}]}
            for text in list(texts)[:KEPT]]


def score(args, out: Path, name: str, seed: int, policy, made: dict, commands: list) -> None:
    """Let a policy answer the test problems, and leave its file."""
    file = args.results / f"{name}-{seed}.json"
    if file.exists():
        return
    right = {}
    for workflow, place in PLACES.items():
        scored = out / place.replace(" ", "-")
        shutil.rmtree(scored, ignore_errors=True)
        test = ["eval.py", "--data", "tiny", "--workflow", workflow, "--adapter", policy, "--seed", seed,
                "--out", scored]
        if workflow != "solver":
            test += ["--adapter", f"verifier={args.verifier}", "--limit", args.test]
        script(out.parent, *test)
        commands, right[place] = [*commands, test], bits(rows(scored / "answers.jsonl"))
    args.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**made_by(commands), **made, "right": right}, indent=0) + "\n")
    told = {place: f"{100 * found.count('1') / len(found):.1f} %" for place, found in right.items()}
    print(f"{name}, seed {seed}: {made} {told}", flush=True)


# ---- the table -------------------------------------------------------------------------------------------

def table(results: Path) -> list[str]:
    """A line for each policy: its data, then its accuracy in each place, over the start and over sampling."""
    heads = [f"{place} % | over start | over sampling" for place in PLACES.values()]
    lines = [f"| policy | seeds | problems solved | kept | thousand tokens | {' | '.join(heads)} |",
             f"|{' --- |' * (5 + 3 * len(heads))}"]
    names = "start-0", *(f"{arm}-{number}" for number in range(1, ROUNDS + 1) for arm in ARMS)
    known = {name: found for name in names if (found := by_seed(results, name))}
    for name, found in known.items():
        cells = [name, len(found)] + [
            f"{sum(r[key] for r in found) / len(found) / scale:.0f}" if key in found[0] else ""
            for key, scale in (("solved", 1), ("kept", 1), ("tokens", 1000))]
        for place in PLACES.values():
            here = at(found, place)
            cells.append(stats.percent(stats.estimate(shares(here))))
            cells += [over(at(known.get(other, []), place), here) if other != name else ""
                      for other in ("start-0", name.replace("search", "sampling"))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
