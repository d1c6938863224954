"""What the benchmarks that keep results have in common: files in, numbers short, curves smooth."""

import json
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


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


def save(figure, path: Path) -> None:
    """As SVG, without the date: a figure that did not change leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
