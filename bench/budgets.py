"""Does search pay? Accuracy of every search against the tokens it spends, beside a vote, on the tiny world.

    python bench/budgets.py --policy DIR --verifier DIR     all of it, then the tables and the figure
    ... --budget 1,2 --limit 20 --results runs/small        small, to see it work
    python bench/budgets.py --table                         from the committed results/budgets, in a second

One run of agents.py. Its table.json is kept: which problems each search with each budget got right, and how
many tokens it wrote and its verifier read. The control is a vote of as many plain solutions
(self_consistency). The figure has a second panel for the searches of recipes/half_billion.sh on a real model,
where they have run. Intervals are 95 %; differences are paired.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
import agents
from bench.shared import ROOT, made_by, save, script
from slm.runs.files import read_json

RUNS, RESULTS, FIGURE = ROOT / "runs/budgets", ROOT / "results/budgets", ROOT / "docs/budgets.svg"
REAL = ROOT / "results/half_billion/searches"
SEARCHES = ("best_of_n,best_of_n_min,best_of_n_product,weighted_vote,beam_search,dvts,rebase,mcts,"
            "gumbel_mcts,interactive_python")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", help="an adapter of tiny that solves")
    p.add_argument("--verifier", help="an adapter of tiny that judges steps")
    p.add_argument("--budget", default="1,2,4,8,16,32", help="(default %(default)s)")
    p.add_argument("--limit", type=int, default=200, help="problems (default %(default)s)")
    p.add_argument("--results", type=Path, default=RESULTS, help="(default results/budgets)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        if not (args.policy and args.verifier):
            p.error("--policy and --verifier: expected an adapter for each, or --table")
        make(args)
    print("\n".join(tables(args.results)))
    if args.results == RESULTS:
        panels = {"tiny": RESULTS, "Qwen2.5-Coder-0.5B-Instruct, GSM8K": REAL}
        draw({name: read_json(path / "table.json", {}) for name, path in panels.items()}, FIGURE)


def make(args) -> None:
    """The run, which goes on where it was stopped, and its small file."""
    run = RUNS if args.results == RESULTS else args.results / "run"
    words = ["agents.py", "--adapter", f"solver={args.policy}", "--adapter", f"verifier={args.verifier}",
             "--workflow", SEARCHES, "--budget", args.budget, "--limit", args.limit, "--out", run]
    script(run.parent / "budgets-log", *words, *["--resume"] * run.exists())
    args.results.mkdir(parents=True, exist_ok=True)
    found = json.loads((run / "table.json").read_text())
    (args.results / "table.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    (args.results / "made_by.json").write_text(json.dumps(made_by([words]), indent=1) + "\n")


def tables(results: Path) -> list[str]:
    """What agents.py printed: each search with each budget, then all over the vote at the same tokens."""
    found = read_json(results / "table.json", {})
    return [*agents.table(found, len(found["solver"]["right"])).strip().splitlines(),
            *agents.against_control(found).splitlines()] if found else []


def curves(found: dict[str, dict]) -> dict[str, list[tuple[float, float, tuple[float, float]]]]:
    """Search -> (tokens, accuracy, interval) of each budget, by tokens: of those with more than one."""
    curves = {}
    for name, r in found.items():
        curves.setdefault(name.partition("@")[0], []).append((r["tokens"], r["accuracy"], r["interval"]))
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def draw(panels: dict[str, dict[str, dict]], to: Path) -> None:
    """Accuracy against tokens, a panel for each table that is there; the vote in black with its interval."""
    panels = {name: found for name, found in panels.items() if found}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False)
    for axis, (title, found) in zip(axes.flat, panels.items()):
        for i, (name, points) in enumerate(curves(found).items()):
            tokens, accuracy, intervals = zip(*points)
            control = name == agents.CONTROL
            axis.plot(tokens, [100 * a for a in accuracy], marker="o", markersize=3, label=name,
                      color="black" if control else f"C{i % 10}", linewidth=2 if control else 1)
            if control:
                low, high = zip(*intervals)
                axis.fill_between(tokens, [100 * a for a in low], [100 * a for a in high], color="0.85")
        axis.set(xscale="log", xlabel="tokens a problem", ylabel="right, %", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    save(figure, to)
    plt.close(figure)


if __name__ == "__main__":
    main()
