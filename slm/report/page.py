"""report.html: curves over the steps (metrics.jsonl), summaries (*.json), a few rows to read of each log, and
the settings (settings.json). Imports no torch."""

import base64
import contextlib
import html
import io
import json
import math
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from slm import BadInput
from slm.runs.files import read_json, readable_rows, write_whole

# Metric -> title, in the order of the page. The loss comes late because it says little in GRPO.
HEADLINES = {
    "reward": "reward", "evaluated": "held-out problems right (share)", "solved": "solved (share)",
    "lenient": "solved, box or not (share)", "kl": "KL to the reference (nats)", "entropy": "entropy (nats)",
    "mean_tokens": "tokens a reply", "tokens_right": "tokens of right ones",
    "tokens_wrong": "tokens of wrong ones", "truncated": "truncated (share)",
    "no_answer": "no answer (share)", "zero_spread": "groups without a signal (share)",
    "with_advantage": "with an advantage (share)", "replaced": "groups replaced", "loss": "loss",
    "held_out_loss": "loss on held-out rows", "held_out_right": "held-out rows right (share)",
    "grad_norm": "gradient norm", "clipped": "clipped tokens (share)",
    "dlogp": "gap of log-probs to the sampler", "importance": "importance weight, mean",
    "importance_max": "importance weight, largest", "cut": "weights cut (share)", "lr": "learning rate",
    "tokens_per_s": "tokens a second", "generate_share": "time to sample (share)",
    "score_share": "time to reward (share)", "learn_share": "time to learn (share)",
    "evaluate_share": "time to evaluate (share)", "memory": "peak memory (GB)"}
LOGS = ("answers", "episodes", "records", "rejected")
SHOWN = 8  # rows of a log
STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: .5em 0}
td, th {border: 1px solid #ddd; padding: .15em .6em; text-align: left; vertical-align: top}
pre {white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5em; margin: .2em 0}
img {max-width: 100%} details {margin: .3em 0} summary {cursor: pointer}
.right {color: #187a2f} .wrong {color: #b3261e}
"""


def write(run_dir: str | Path) -> Path:
    """Write report.html, and metrics.png if there are metrics. Returns the page's path."""
    path = Path(run_dir)
    if not (path / "settings.json").is_file():
        raise BadInput(f"{path}: no settings.json there; expected a run directory")
    about = read_json(path / "settings.json")
    name = html.escape(path.resolve().name)
    parts = [f"<h1>{name}</h1>", show({"command": about.get("command", ""), "started": about.get("started")})]
    if rows := list(readable_rows(path / "metrics.jsonl")):
        write_whole(path / "metrics.png", picture := curves(rows))
        data = base64.b64encode(picture).decode()
        parts += [f'<img alt="curves over the steps" src="data:image/png;base64,{data}">', ends(rows)]
    for file in sorted(path.glob("*.json")):
        if file.name != "settings.json":
            with contextlib.suppress(ValueError):
                parts += [f"<h2>{html.escape(file.stem)}</h2>", show(json.loads(file.read_bytes()))]
    for log in LOGS:
        if rows := spread(path / f"{log}.jsonl"):
            parts += [f"<h2>{log}: {len(rows)} to read</h2>", *map(to_read, rows)]
    parts += ["<h2>Settings</h2>", show(about.get("settings", about)), show(about.get("versions", {}))]
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    write_whole(path / "report.html", "\n".join([head, *parts, ""]).encode(errors="replace"))
    return path / "report.html"


# ---- curves ----------------------------------------------------------------------------------------------

def curves(rows: list[dict]) -> bytes:
    """One panel a metric that changes, against the step, as a PNG. If none changes: all that there are."""
    words = titles(rows)
    found = {name: series(rows, name) for name in words}
    names = [name for name, points in found.items() if len(set(dict(points).values())) > 1]
    names = names or [name for name, points in found.items() if points]
    lines = -(-len(names) // 3)
    figure = Figure(figsize=(12, 2.6 * lines or 1), layout="constrained")
    for i, name in enumerate(names, 1):
        x, y = zip(*found[name])
        axes = figure.add_subplot(lines, 3, i)
        axes.plot(x, y, color="#9db8d9", linewidth=1, marker="o" if len(x) == 1 else None)
        axes.plot(x, smooth(y, max(1, len(y) // 15)), color="#1f4e8c", linewidth=2)
        low, high = (dict(series(rows, f"{name}_{end}")) for end in ("low", "high"))
        if low.keys() & high.keys() >= set(x):  # a 95 % interval
            axes.fill_between(x, list(map(low.get, x)), list(map(high.get, x)), color="#dfe8f3")
        axes.set_title(words[name], fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def titles(rows: list[dict]) -> dict[str, str]:
    """HEADLINES, and after the reward its parts if there are several."""
    parts = {name: f"reward: {name.removeprefix('reward/')}" for row in rows for name in row
             if name.startswith("reward/")}
    return {"reward": HEADLINES["reward"], **(parts if len(parts) > 1 else {}), **HEADLINES}


def series(rows: list[dict], name: str) -> list[tuple]:
    """(step, value) of each row in which this metric is a finite number."""
    points = [(row.get("step", n), row.get(name)) for n, row in enumerate(rows, 1)]
    return [(step, y) for step, y in points if type(y) in (int, float) and math.isfinite(y)]


def smooth(y: tuple[float, ...], width: int) -> list[float]:
    """Running mean over the last `width` values (fewer at the start).

    >>> smooth((1, 2, 3, 5), 2)
    [1.0, 1.5, 2.5, 4.0]
    """
    return [fmean(y[max(0, i + 1 - width):i + 1]) for i in range(len(y))]


def ends(rows: list[dict]) -> str:
    """The mean of each metric over the first and the last tenth of its values."""
    table = {}
    for name, title in titles(rows).items():
        values = [value for _, value in series(rows, name)]
        width = max(1, len(values) // 10)
        if values:
            table[title] = {"first tenth": fmean(values[:width]), "last tenth": fmean(values[-width:])}
    return show(table)


# ---- tables and texts ------------------------------------------------------------------------------------

def show(value) -> str:
    """Any JSON value as HTML, with all text escaped. Long lists of numbers are only counted."""
    if isinstance(value, dict):
        if value and all(isinstance(v, dict) for v in value.values()):
            return matrix(value)
        cells = (f"<tr><th>{html.escape(str(k))}</th><td>{show(v)}</td></tr>" for k, v in value.items())
        return f"<table>{''.join(cells)}</table>"
    if isinstance(value, list):
        many = len(value) > 6 and all(isinstance(v, (int, float)) for v in value)
        return f"({len(value)} numbers)" if many else ", ".join(map(show, value))
    if isinstance(value, str):
        return f"<pre>{html.escape(value)}</pre>" if len(value) > 60 or "\n" in value else html.escape(value)
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def matrix(rows: dict[str, dict]) -> str:
    """A dict of dicts as a table with one row each."""
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in ["", *columns])
    body = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{show(row[c]) if c in row else ''}</td>" for c in columns)
        body += f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def to_read(row: dict) -> str:
    """One row to read: a title that says whether it was right, and everything in it when opened."""
    keys = [key for key in ("step", "reward", "answer", "gold", "cause") if row.get(key) not in (None, "")]
    facts = ", ".join(f"{key} {row[key]}" for key in keys)
    title = html.escape(f"{row.get('id') or row.get('problem_id') or row.get('problem', '')}: {facts}"[:200])
    if row.get("correct") is not None:
        word = "right" if row["correct"] else "wrong"
        title = f'<b class="{word}">{word}</b> {title}'
    return f"<details><summary>{title}</summary>{show(row)}</details>"


def spread(path: Path) -> list[dict]:
    """Up to SHOWN rows, evenly spread over a file that may be larger than memory."""
    total = sum(1 for _ in readable_rows(path))
    wanted = {i * total // SHOWN for i in range(SHOWN)}
    return [row for n, row in enumerate(readable_rows(path)) if n in wanted]
