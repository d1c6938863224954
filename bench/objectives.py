"""Does each objective learn? Every one of train_grpo.py on the built-in model, three seeds, beside a placebo.

    python bench/objectives.py                       all that is missing, then the table and the figure
    python bench/objectives.py --only grpo random    some of them
    python bench/objectives.py --table               only the table and the figure, from results/objectives

Each run starts from the same SFT adapter, which is trained first, and takes the same number of steps with the
same settings: only the objective differs. The placebo is GRPO whose reward tosses a coin. A run leaves
one small file, results/objectives/NAME-SEED.json: its command, its commit, its metrics, and which of the 500
test problems the trained model gets right, greedily. A run that has its file is not made again.

The table: greedy accuracy over all seeds and its difference to the placebo (the placebo's is to the start),
both with a 95 % interval by a bootstrap over problems (the seeds of a problem stay together), the lowest and
highest seed, and the share solved while sampling in the last four steps. The figure: that share by step, over
four steps, the mean of the seeds with their range as a band.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.shared import ROOT, bits, by_seed, made_by, rows, save, script, shares, shortened, smooth
from slm.runs import stats

RUNS, RESULTS, FIGURE = ROOT / "runs/objectives", ROOT / "results/objectives", ROOT / "docs/objectives.svg"
SFT = RUNS / "sft/adapter"
LAST = 4  # steps whose sampling counts
ARMS = {  # name: options of train_grpo.py; "start" is the SFT adapter as it is
    "start": [],
    "random": ["--reward", "random"],
    **{name: ["--algorithm", name] for name in (
        "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "max_rl", "pass_at_k", "rloo", "reinforce",
        "report", "report_code", "distill")},
    "distill_grpo": ["--algorithm", "distill", "--teacher", str(RUNS / "grpo-0/adapter")],
    "tools_random": ["--workflow", "python_tools", "--reward", "random"],
    "tools": ["--workflow", "python_tools"],
}
CONTROL = {"tools": "tools_random", "random": "start", "start": "", "tools_random": ""}  # else "random"
KEPT = ("step", "reward", "solved", "entropy", "kl", "clipped", "importance", "cut", "mean_tokens",
        "truncated", "zero_spread", "replaced", "grad_norm", "kl")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME",
                   help=", ".join(ARMS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        start()
        missing = [(name, seed) for seed in range(args.seeds) for name in args.only
                   if not (RESULTS / f"{name}-{seed}.json").exists() and (name != "start" or seed == 0)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda arm: learn(*arm), missing))
    found = read()
    print("\n".join(table(found)))
    draw(found)
    print(f"figure: {FIGURE.relative_to(ROOT)}")


def start() -> None:
    """Make the SFT adapter that all arms start from, if it is not there."""
    if not SFT.is_dir():
        script(RUNS, "make_data.py", "--out", RUNS / "data")
        script(RUNS, "train_sft.py", "--lora", "--validate", 0, "--data", RUNS / "data/records.jsonl",
               "--out", SFT.parent)


def learn(name: str, seed: int) -> None:
    """Train an arm with a seed, score it, and leave its file."""
    out, scored = RUNS / f"{name}-{seed}", RUNS / f"{name}-{seed}-eval"
    train = ["train_grpo.py", "--adapter", SFT, "--batch", 8, "--evaluate", 0, "--seed", seed, *ARMS[name],
             "--out", out]
    adapter = SFT if name == "start" else out / "adapter"
    score = ["eval.py", "--model", adapter, "--data", "tiny", "--out", scored]
    if "--workflow" in train:
        score += ["--workflow", train[train.index("--workflow") + 1]]
    for folder in (out, scored):
        shutil.rmtree(folder, ignore_errors=True)
    done = [score] if name == "start" else [train, score]
    for words in done:
        script(RUNS, *words)
    right = bits(rows(scored / "answers.jsonl"))
    result = {
        **made_by(done), "right": right,
        "metrics": [{key: shortened(row[key]) for key in row if key in KEPT or key.startswith("reward/")}
                    for row in rows(out / "metrics.jsonl")] if name != "start" else []}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}-{seed}.json").write_text(json.dumps(result, indent=0) + "\n")
    print(f"{name}, seed {seed}: {100 * right.count('1') / len(right):.1f} %", flush=True)


def read() -> dict[str, list[dict]]:
    """Name of an arm -> its results by seed."""
    return {name: results for name in ARMS if (results := by_seed(RESULTS, name))}


def table(found: dict[str, list[dict]]) -> list[str]:
    lines = ["| objective | seeds | greedy % | lowest, highest | over the placebo | sampled % | tokens "
             "| replaced |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, results in found.items():
        now, single = shares(results), [100 * r["right"].count("1") / len(r["right"]) for r in results]
        control = found.get(CONTROL.get(name, "random"))
        over = stats.points(*stats.difference(shares(control), now)) if control else ""
        last = [row for r in results for row in r["metrics"][-LAST:]]
        replaced = [row.get("replaced", 0) for r in results for row in r["metrics"]]
        sampled = [f"{sum(row[key] for row in last) * factor / len(last):{form}}" if last else "" for
                   key, factor, form in (("solved", 100, ".1f"), ("mean_tokens", 1, ".0f"))]
        cells = [name, len(results), f"{100 * sum(now) / len(now):.1f} ({stats.span(*stats.interval(now))})",
                 f"{min(single):.1f}, {max(single):.1f}", over,
                 *sampled, f"{sum(replaced) / len(results):.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def draw(found: dict[str, list[dict]]) -> None:
    """A panel for each arm: share solved by step, mean and range of the seeds, the placebo behind it."""
    names = [name for name in found if not name.endswith("random") and name != "start"]
    columns = 5
    height = -(-len(names) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(13, 2.2 * height), sharex=True, sharey=True,
                                squeeze=False)
    for axis, name in zip(axes.flat, names):
        for arm, colour in ((CONTROL.get(name, "random"), "0.6"), (name, "tab:blue")):
            curves = [smooth([100 * row["solved"] for row in r["metrics"]], LAST) for r in found.get(arm, [])]
            columns_of = list(zip(*curves))
            steps = range(1, len(columns_of) + 1)
            axis.plot(steps, [sum(c) / len(c) for c in columns_of], color=colour, linewidth=1.3)
            axis.fill_between(steps, [min(c) for c in columns_of], [max(c) for c in columns_of], color=colour,
                              alpha=0.25, linewidth=0)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names):]:
        axis.axis("off")
    figure.supxlabel("step")
    figure.supylabel("solved while sampling, mean of four steps, %")
    figure.suptitle("Mean of the seeds, with their range; grey: the placebo, a reward at random", fontsize=10)
    figure.tight_layout()
    save(figure, FIGURE)


if __name__ == "__main__":
    main()
