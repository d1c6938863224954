"""A run directory as one self-contained page: report.html, and its curves as metrics.png.

Works on what any script leaves behind: settings.json, metrics.jsonl (curves over the steps), summaries
(*.json) and rows to read (answers, episodes, records, rejected: a few of each, evenly spread). Model text is
escaped, always. Not covered: comparing runs (eval.py --compare does), live updates. Imports no torch, and
matplotlib for curves only.
"""

import base64
import contextlib
import html
import io
import json
import math
from pathlib import Path

from slm import BadInput
from slm.runs.files import readable_rows, write_whole

# What to look at first, in this order; the loss comes late because in GRPO it says little.
HEADLINES = {
    "reward": "reward", "solved": "solved (share)", "kl": "KL to the reference", "entropy": "entropy (nats)",
    "mean_tokens": "tokens a reply", "truncated": "truncated (share)", "no_answer": "no answer (share)",
    "zero_spread": "groups without a signal (share)", "loss": "loss", "grad_norm": "gradient norm",
    "dlogp": "gap of log-probs to the sampler", "lr": "learning rate", "tokens_per_s": "tokens a second"}
TEXTS = ("answers", "episodes", "records", "rejected")
SHOWN = 8
STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: .5em 0}
td, th {border: 1px solid #ddd; padding: .15em .6em; text-align: left; vertical-align: top}
pre {white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5em; margin: .2em 0}
img {max-width: 100%} details {margin: .3em 0} summary {cursor: pointer}
.right {color: #187a2f} .wrong {color: #b3261e}
"""


def write(run_dir: str | Path) -> Path:
    """Write report.html, and metrics.png where there are metrics; returns the page's path."""
    path = Path(run_dir)
    if not (path / "settings.json").is_file():
        raise BadInput(f"{path}: no settings.json there; expected a run directory")
    about = json.loads((path / "settings.json").read_text())
    name = html.escape(path.resolve().name)
    parts = [f"<h1>{name}</h1>", show({"command": about.get("command", ""), "started": about.get("started")})]
    rows = list(readable_rows(path / "metrics.jsonl"))
    if rows:
        picture = curves(rows)
        write_whole(path / "metrics.png", picture)
        data = base64.b64encode(picture).decode()
        parts += [f'<img alt="curves over the steps" src="data:image/png;base64,{data}">', ends(rows)]
    for file in sorted(path.glob("*.json")):
        if file.name != "settings.json":
            with contextlib.suppress(ValueError):
                parts += [f"<h2>{html.escape(file.stem)}</h2>", show(json.loads(file.read_text()))]
    for text in TEXTS:
        if picked := spread(path / f"{text}.jsonl"):
            parts += [f"<h2>{text}: {len(picked)} to read</h2>", *map(episode, picked)]
    parts += ["<h2>Settings</h2>", show(about.get("settings", about)), show(about.get("versions", {}))]
    page, body = path / "report.html", "\n".join(parts)
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    write_whole(page, f"{head}\n{body}\n".encode(errors="replace"))
    return page


# ---- curves ----------------------------------------------------------------------------------------------

def curves(rows: list[dict]) -> bytes:
    """One panel a metric, against the step, as a PNG."""
    from matplotlib.figure import Figure
    names = [name for name in HEADLINES if len({row[name] for row in rows if number(row.get(name))}) > 1]
    names = names or [name for name in HEADLINES if any(number(row.get(name)) for row in rows)]
    figure = Figure(figsize=(12, 2.6 * ((len(names) + 2) // 3) or 1), layout="constrained")
    for i, name in enumerate(names):
        points = [(row.get("step", n), row[name]) for n, row in enumerate(rows, 1) if number(row.get(name))]
        x, y = zip(*points)
        axes = figure.add_subplot(-(-len(names) // 3), 3, i + 1)
        axes.plot(x, y, color="#9db8d9", linewidth=1, marker="o" if len(x) == 1 else None)
        axes.plot(x, smooth(y, max(1, len(y) // 15)), color="#1f4e8c", linewidth=2)
        axes.set_title(HEADLINES[name], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def smooth(y: tuple[float, ...], width: int) -> list[float]:
    """Running mean over the last `width` values (fewer at the start).

    >>> smooth((1, 2, 3, 5), 2)
    [1.0, 1.5, 2.5, 4.0]
    """
    return [sum(y[max(0, i + 1 - width):i + 1]) / min(width, i + 1) for i in range(len(y))]


def ends(rows: list[dict]) -> str:
    """The mean of each metric over the first and the last tenth of the steps."""
    width = max(1, len(rows) // 10)
    table = {}
    for name, title in HEADLINES.items():
        parts = rows[:width], rows[-width:]
        values = [[row[name] for row in part if number(row.get(name))] for part in parts]
        if all(values):
            means = [sum(v) / len(v) for v in values]
            table[title] = dict(zip((f"first {width} steps", f"last {width} steps"), means))
    return show(table)


def number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- tables and texts ------------------------------------------------------------------------------------

def show(value) -> str:
    """Any JSON value as HTML; lists of numbers are only counted when they are long."""
    if isinstance(value, dict):
        if value and all(isinstance(v, dict) for v in value.values()):
            return matrix(value)
        cells = (f"<tr><th>{html.escape(str(k))}</th><td>{show(v)}</td></tr>" for k, v in value.items())
        return f"<table>{''.join(cells)}</table>"
    if isinstance(value, list) and len(value) > 6 and all(isinstance(v, (int, float)) for v in value):
        return f"({len(value)} numbers)"
    if isinstance(value, list):
        return ", ".join(map(show, value))
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


def episode(row: dict) -> str:
    """One row to read: a title that says whether it was right, and everything in it when opened."""
    keys = ("step", "reward", "answer", "gold", "cause")
    facts = ", ".join(f"{k} {row[k]}" for k in keys if row.get(k) not in (None, ""))
    title = html.escape(f"{row.get('id') or row.get('problem_id') or row.get('problem', '')}: {facts}"[:200])
    if row.get("correct") is not None:
        word = "right" if row["correct"] else "wrong"
        title = f'<b class="{word}">{word}</b> {title}'
    return f"<details><summary>{title}</summary>{show(row)}</details>"


def spread(path: Path) -> list[dict]:
    """Up to SHOWN rows, evenly spread over the file; it may be larger than memory."""
    if not path.is_file():
        return []
    with path.open("rb") as f:
        total = sum(1 for _ in f)
    wanted = {i * total // SHOWN for i in range(SHOWN)}
    rows = []
    with path.open("rb") as f:
        for n, text in enumerate(f):
            if n in wanted:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(text))
    return [row for row in rows if isinstance(row, dict)]
