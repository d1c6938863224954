"""Packs what a run tells into one HTML file: page.html, page.css, page.js, and the data beside them.

The data is JSON, compressed, in script elements that no browser runs. The page allows itself no network and
no other script (a Content-Security-Policy with the hashes of its own two). If the details exceed LIMIT bytes
they lie in a folder beside the page, as classic scripts: a page on disk may load these, and no other files.
"""

import base64
import hashlib
import html
import math
import re
import shutil
import sys
import time
from pathlib import Path

from slm import BadInput
from slm.report import figures
from slm.report.told import CHUNK, FLAGS, Told, pack, short
from slm.runs.files import read_json, readable_rows, write_whole

HERE = Path(__file__).parent
LIMIT = 14_000_000  # bytes
SECONDS = 30        # between two pages of a run under way, at least
SHARE = 0.005       # of a run's time that its pages may take
SAME = {"seed", "out", "resume", "save_every"}  # settings in which the seeds of one run may differ


class Live:
    """The page of a run that goes on. `refresh` is cheap to call: it writes every SECONDS at most, and more
    seldom where that would take more than SHARE of the time."""

    def __init__(self, folder: Path):
        self.folder, self.told, self.due = folder, Told({"": folder}), time.monotonic() + SECONDS

    def refresh(self) -> None:
        start = time.monotonic()
        if start >= self.due:
            try:
                write(self.folder, self.told)
            except Exception as e:  # the run matters more than its picture
                print(f"\nwarning: {self.folder}: report.html could not be written: {e!r}", file=sys.stderr)
            self.due = time.monotonic() + max(SECONDS, (time.monotonic() - start) / SHARE)


def write(run_dir: str | Path, told: Told | None = None) -> Path:
    """Write report.html of a run -> its path. told: the logs as far as they were read for an earlier page."""
    folder = Path(run_dir)
    about, settings, rows = about_run(folder)
    kind, told = figures.kind_of(folder, settings), (told or Told({"": folder})).read()
    tables = figures.tables(told, kind)
    others = {file.stem: read_json(file, {}) for file in sorted(folder.glob("*.json"))
              if file.name not in ("settings.json", "tokens.json")}
    return save(folder / "report.html", told, {
        "kind": kind, "name": folder.resolve().name, "tables": tables, "metrics": {"": [rows]},
        "sentence": figures.sentence(told, kind, settings, rows, tables), "command": about.get("command"),
        "finished": kind == "run" or any(folder.glob(figures.DONE[kind])), "started": about.get("started"),
        "tokens": read_json(folder / "tokens.json", {}),
        "about": {"settings": settings, "versions": about.get("versions"), **others}})


def compare(runs: list[str | Path], out: str | Path) -> Path:
    """Write one page about several runs. Those that differ in nothing but the seed share their curves."""
    full = [Path(run).resolve().parts for run in runs]
    if len(set(full)) < len(full):
        raise BadInput("compare: the same run is named twice; expected different runs")
    length = 1  # parts of a path that tell the runs apart
    while len({parts[-length:] for parts in full}) < len(full):
        length += 1
    folders = {"/".join(parts[-length:]): Path(*parts) for parts in full}
    settings, names, lines = {}, {}, {}
    for name, folder in folders.items():
        _, settings[name], rows = about_run(folder)
        alike = repr(sorted((key, str(value)) for key, value in settings[name].items() if key not in SAME))
        lines.setdefault(names.setdefault(alike, name), []).append(rows)
    told = Told(folders).read()
    tables = figures.tables(told, "compare")
    said = figures.sentence(told, "compare", {}, [], tables) if tables else (
        f"The curves of {len(folders)} runs.")
    lines = {f"{name} and {len(seeds) - 1} more like it" if seeds[1:] else name: seeds
             for name, seeds in lines.items()}
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    return save(Path(out), told, {
        "kind": "compare", "name": " / ".join(folders), "tables": tables, "metrics": lines, "sentence": said,
        "finished": True, "tokens": {}, "about": settings})


def about_run(folder: Path) -> tuple[dict, dict, list[dict]]:
    """(settings.json, the settings in it, the finite numbers of metrics.jsonl)."""
    if not (folder / "settings.json").is_file():
        raise BadInput(f"{folder}: no settings.json there; expected a run directory")
    about, rows = read_json(folder / "settings.json"), []
    for n, row in enumerate(readable_rows(folder / "metrics.jsonl"), 1):
        rows.append({"step": n} | {name: short(x) for name, x in row.items()
                                   if type(x) in (int, float) and math.isfinite(x)})
    return about, about.get("settings", about), rows


def save(out: Path, told: Told, main: dict) -> Path:
    """Write the page, and the folder beside it or not. A folder that an earlier page had goes away."""
    chunks, beside = told.chunks(), out.with_name(f"{out.stem}-data")
    apart = sum(map(len, chunks)) > LIMIT
    problems = [[p["id"], p["question"], *map(p.get, ("gold", "level", "subject"))]
                for p in told.problems.values()]
    main |= {"written": time.strftime("%Y-%m-%d %H:%M:%S"), "columns": told.columns, "problems": problems,
             "who": list(told.who), "reasons": list(told.reasons), "flags": FLAGS, "chunk": CHUNK,
             "headlines": figures.HEADLINES, "chunks": len(chunks), "beside": beside.name if apart else None}
    blocks = {"main": pack(main)} | ({} if apart else {f"chunk-{n}": text for n, text in enumerate(chunks)})
    shutil.rmtree(beside, ignore_errors=True)
    for n, text in enumerate(chunks if apart else ()):
        beside.mkdir(exist_ok=True)
        (beside / f"{n}.js").write_text(f'receive({n},"{text}")\n')
    scripts = [(HERE / name).read_text() for name in ("vendor/temml-0.13.5.min.js", "page.js")]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    parts = {
        "POLICY": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
                  "script-src " + " ".join(f"'sha256-{one}'" for one in digests) + " 'self' file:" * apart,
        "TITLE": html.escape(main["name"]), "SENTENCE": html.escape(main["sentence"]),
        "STYLE": (HERE / "page.css").read_text(), "TEMML": scripts[0], "SCRIPT": scripts[1],
        "DATA": "\n".join(f'<script type="application/octet-stream" id="{name}">{text}</script>'
                          for name, text in blocks.items())}
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (HERE / "page.html").read_text())
    write_whole(out, page.encode(errors="replace"))
    return out
