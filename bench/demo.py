"""Do the numbers of `make demo` lie where they should?

    python bench/demo.py runs/demo                      says so, by results/demo/bands.json
    python bench/demo.py --make RUNS RUNS RUNS          keeps these demos, of several seeds, in results/demo
    python bench/demo.py --table                        prints the tables of RESULTS.md from results/demo

A kept demo is one small file: which problems each stage and each workflow gets right, in the order of their
ids, and its figures. bands.json has a band for each stage and set of problems (share right, greedy), and one
for each step of GRPO (share solved while sampling, mean of four steps). A band goes from the lowest seed to
the highest, and further by the 95 % interval (Wilson) that chance alone gives each of the two: one demo in
many lies outside. The samples of a problem are alike, so in a step only the problems count for the interval.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluation
from bench.shared import ROOT, bits, processor, rows, smooth
from slm.runs import stats
from slm.runs.stats import wilson

RESULTS = ROOT / "results/demo"
WIDTH = 4  # steps
STAGES = {"eval-base": "base", "eval-sft-full": "SFT full", "eval-sft-lora": "SFT LoRA", "eval-grpo": "GRPO"}
OVER = [("eval-sft-lora", "eval-base"), ("eval-grpo", "eval-sft-lora"), ("eval-grpo", "eval-base")]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="the folder of a demo")
    p.add_argument("--make", action="store_true", help="keep these demos and write the bands")
    p.add_argument("--table", action="store_true", help="print the tables of the kept demos")
    p.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.make:
        args.results.mkdir(parents=True, exist_ok=True)
        for runs in args.runs:
            demo = kept(runs)
            (args.results / f"seed-{demo['seed']}.json").write_text(json.dumps(demo, indent=0) + "\n")
        made = bands([demo["figures"] for demo in read(args.results)])
        (args.results / "bands.json").write_text(json.dumps(made, indent=1) + "\n")
        print(f"wrote {args.results}")
    if args.table:
        print("\n".join(table(read(args.results))))
    for runs in args.runs:
        if (args.results / "bands.json").exists():
            print(verdict(figures(runs), json.loads((args.results / "bands.json").read_text())))


def read(results: Path) -> list[dict]:
    """The kept demos, by seed."""
    return [json.loads(file.read_text()) for file in sorted(results.glob("seed-*.json"))]


def kept(runs: Path) -> dict:
    """What results/demo holds of a demo."""
    right = {f"{stage} on {data}": bits(some) for stage in STAGES
             for data, some in evaluation.saved(runs / stage)[0].rows.items()}
    for run in evaluation.saved(runs / "agents"):
        (data, some), = run.rows.items()
        right[f"{run.name.rpartition('/')[2]} on {data}"] = bits(some)
    about = json.loads((runs / "grpo/settings.json").read_text())
    return {"seed": about["settings"]["seed"], "commit": about["versions"]["commit"],
            "device": processor(), "right": right, "figures": figures(runs)}


def table(demos: list[dict]) -> list[str]:
    """Accuracy of each stage and paired differences, a line for each set of problems and seed; then what each
    workflow of the base model gains over its single pass."""
    over = [f"{STAGES[a]} over {STAGES[b]}" for a, b in OVER]
    lines = heading(["command", "problems", *(f"{name} %" for name in STAGES.values()), *over])
    for data in ("tiny", "tiny-unseen"):
        for demo in demos:
            percents = [stats.percent(stats.estimate(right(demo, f"{stage} on {data}"))) for stage in STAGES]
            gains = [gain(demo, f"{b} on {data}", f"{a} on {data}") for a, b in OVER]
            lines.append(line([f"`SEED={demo['seed']} bash recipes/demo.sh`", data, *percents, *gains]))
    lines += ["", *heading(["workflow", *(f"seed {demo['seed']}" for demo in demos)])]
    names = [name for name in (demos[0]["right"] if demos else ()) if not name.startswith("eval-")]
    for name in names[1:]:
        lines.append(line([name.removesuffix(" on tiny"), *(gain(demo, names[0], name) for demo in demos)]))
    return lines


def heading(cells: list[str]) -> list[str]:
    return [line(cells), "|" + " --- |" * len(cells)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def right(demo: dict, name: str) -> list[int]:
    return list(map(int, demo["right"][name]))


def gain(demo: dict, a: str, b: str) -> str:
    return stats.points(*stats.difference(right(demo, a), right(demo, b)))


def figures(runs: Path) -> dict[str, tuple[float, int]]:
    """Name of a figure -> (share, number of problems behind it)."""
    found = {}
    for file in sorted(runs.glob("eval-*/summary.json")):
        for data, s in json.loads(file.read_text())["data"].items():
            found[f"{file.parent.name} on {data}"] = s["accuracy"], s["problems"]
    steps = [row for row in rows(runs / "grpo/metrics.jsonl") if "solved" in row]
    if steps:
        batch = json.loads((runs / "grpo/settings.json").read_text())["settings"]["batch"]
        for i, share in enumerate(smooth([row["solved"] for row in steps], WIDTH)):
            found[f"GRPO step {steps[i]['step']}"] = share, batch * min(i + 1, WIDTH)
    return found


def bands(seeds: list[dict[str, tuple[float, int]]]) -> dict[str, list[float]]:
    """Name -> [low, mean of the seeds, high]. A figure that not all seeds have gets no band."""
    made = {}
    for name in seeds[0]:
        if all(name in seed for seed in seeds):
            shares, n = [seed[name][0] for seed in seeds], seeds[0][name][1]
            low, high = wilson(min(shares) * n, n)[0], wilson(max(shares) * n, n)[1]
            made[name] = [round(x, 4) for x in (low, sum(shares) / len(shares), high)]
    return made


def verdict(found: dict[str, tuple[float, int]], expected: dict[str, list[float]]) -> str:
    """One line if all is inside; else a line more for each figure that is not, or is not there."""
    outside = [f"  {name}: {100 * found[name][0]:.1f} %, expected {100 * low:.1f} to {100 * high:.1f}"
               if name in found else f"  {name}: not there"
               for name, (low, _, high) in expected.items()
               if name not in found or not low <= found[name][0] <= high]
    inside = f"{len(expected) - len(outside)} of {len(expected)}"
    return "\n".join([f"{inside} figures lie inside the bands of other seeds"
                      + ("; outside are" if outside else ""), *outside])


if __name__ == "__main__":
    main()
