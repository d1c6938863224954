"""What the benchmarks that keep results have in common: scripts run, files in, numbers short."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from operator import itemgetter
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from slm.runs import stats


def rows(path: Path) -> list[dict]:
    """The objects of a JSON lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def shortened(x):
    return float(f"{x:.4g}") if isinstance(x, float) else x


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and the width - 1 before it: a step has few episodes."""
    windows = [values[max(0, i - width):i] for i in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return (names or [platform.processor()])[0]


def script(log: Path, *words) -> None:
    """Run a script of the house with one thread; its output goes to log.txt in that folder."""
    log.mkdir(parents=True, exist_ok=True)
    with (log / "log.txt").open("a") as out:
        subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=out, stderr=out,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def made_by(commands: list) -> dict:
    """Where a result comes from: the commands (each a list of words), commit, date and device."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    typed = [" ".join(["python", *map(str, words)]).replace(f"{ROOT}/", "") for words in commands]
    return {"commands": typed, "commit": commit, "date": str(date.today()),
            "device": f"one thread, {processor()}"}


def bits(answers: list[dict]) -> str:
    """Whether each problem's one answer is right, as 0 or 1, in the order of the ids."""
    return "".join(str(int(row["correct"])) for row in sorted(answers, key=itemgetter("id")))


def by_seed(results: Path, name: str) -> list[dict]:
    """What is kept of an arm, by seed."""
    return [json.loads(file.read_text()) for file in sorted(results.glob(f"{name}-[0-9].json"))]


def shares(results: list[dict]) -> list[float]:
    """Each problem's share right over the seeds."""
    return [sum(map(int, column)) / len(column) for column in zip(*(r["right"] for r in results))]


def at(results: list[dict], place: str) -> list[dict]:
    """Of results whose problems were answered in several places those in one."""
    return [{"right": r["right"][place]} for r in results]


def over(control: list[dict], results: list[dict]) -> str:
    """By how many points the results are right more often, on the seeds that both have."""
    both = list(zip(control, results))
    return stats.points(*stats.difference(*map(shares, zip(*both)))) if both else ""


def save(figure, path: Path) -> None:
    """As SVG, without the date and random ids: a figure that did not change leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
