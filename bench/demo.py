"""Do the numbers of `make demo` lie where they should?

    python bench/demo.py runs/demo                      says so, by results/demo/bands.json
    python bench/demo.py --make RUNS RUNS RUNS          writes these bands from demos of several seeds

A band goes from the lowest seed to the highest, and further by the 95 % interval (Wilson) that chance alone
gives each of the two: one demo in many lies outside. There is one for each stage and set of problems (share
right, greedy), and one for each step of GRPO (share solved while sampling, mean of four steps). The samples
of one problem are alike, so in a step only the problems count for the interval.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.shared import ROOT, rows, smooth
from slm.runs.stats import wilson

BANDS = ROOT / "results/demo/bands.json"
WIDTH = 4  # steps


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="the folder of a demo")
    p.add_argument("--make", action="store_true", help="write the bands from these demos")
    p.add_argument("--bands", type=Path, default=BANDS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.make:
        args.bands.parent.mkdir(parents=True, exist_ok=True)
        args.bands.write_text(json.dumps(bands([figures(runs) for runs in args.runs]), indent=1) + "\n")
        print(f"wrote {args.bands}")
    for runs in args.runs:
        if args.bands.exists():
            print(verdict(figures(runs), json.loads(args.bands.read_text())))


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
