"""What the logs of a run tell: episodes, answers, records or attempts, all in one shape.

A page shows thousands of them, so each has two parts: an entry in `columns`, which lists, filters and sorts
need at once, and a detail (the conversation), packed with its neighbours until somebody looks.
"""

import base64
import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

LOGS = ("episodes", "discarded", "answers", "records", "rejected", "samples")
CHUNK = 256  # details packed together
COLUMNS = ("problem", "step", "who", "sample", "right", "reward", "advantage", "tokens", "reason", "answer",
           "flags")
FLAGS = {"truncated": 1, "no box": 2, "tool error": 4, "improved": 8, "degraded": 16, "discarded": 32,
         "no signal": 64, "right unboxed": 128}


class Told:
    """The logs of some runs (a run's name -> its folder), read as they grow."""

    def __init__(self, folders: dict[str, Path]):
        self.folders = folders
        self.ends: dict[Path, tuple] = {}      # log -> (bytes read, inode)
        self.columns = {name: [] for name in COLUMNS}
        self.problems: dict[tuple, dict] = {}  # (id, question) -> what is known; their order is the column's
        self.who: dict[str, int] = {}          # words -> the numbers that stand for them in the columns
        self.reasons: dict[str, int] = {}
        self.packed: list[str] = []            # full chunks of details
        self.details: list[dict] = []          # the last chunk, not full yet

    def read(self) -> "Told":
        """Take the lines that were added. If a log was cut or replaced, read all of them again."""
        logs = [(label, log, folder / f"{log}.jsonl") for label, folder in self.folders.items()
                for log in LOGS]
        logs = [(*names, path, path.stat()) for *names, path in logs if path.is_file()]
        now = {path: (stat.st_size, stat.st_ino) for *_, path, stat in logs}
        if any(path not in now or now[path][0] < end or now[path][1] != inode
               for path, (end, inode) in self.ends.items()):
            self.__init__(self.folders)
        for label, log, path, stat in logs:
            with path.open("rb") as f:
                f.seek(self.ends.get(path, (0, 0))[0])
                for row in whole_lines(f):
                    self.add(label, log, row)
                self.ends[path] = f.tell(), stat.st_ino
        return self

    def add(self, label: str, log: str, row: dict) -> None:
        id = str(row.get("id") or row.get("problem_id") or row.get("problem", ""))
        key = id, str(row.get("question", ""))
        self.problems.setdefault(key, {"place": len(self.problems), "id": id, "question": key[1]}).update(
            {name: str(row[name]) for name in ("gold", "data", "level", "subject") if row.get(name)})
        entry = entry_of(log, row)
        who = str(row.get("teacher") or row.get("workflow") or "")
        who = label if label and who in ("", "solver") else f"{label}: {who}" if label else who
        entry |= {"problem": self.problems[key]["place"], "who": self.who.setdefault(who, len(self.who)),
                  "reason": self.reasons.setdefault(entry["reason"], len(self.reasons))}
        for name, column in self.columns.items():
            column.append(entry[name])
        self.details.append(detail_of(row))
        if len(self.details) == CHUNK:
            self.packed.append(pack(self.details))
            self.details = []

    def chunks(self) -> list[str]:
        return [*self.packed, pack(self.details)] if self.details else self.packed


def whole_lines(f) -> Iterator[dict]:
    """The rows from here on; the file is left before a line that is not finished."""
    while line := f.readline():
        if not line.endswith(b"\n"):
            f.seek(-len(line), 1)
            return
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row


def pack(value) -> str:
    """JSON, compressed, in base64: what page.js unpacks. No text in it can end the page's script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return base64.b64encode(zlib.compress(text)).decode()


def short(x):
    """A number with four digits that count."""
    return float(f"{x:.4g}") if isinstance(x, float) else x


# ---- one line of a log -----------------------------------------------------------------------------------

def entry_of(log: str, row: dict) -> dict:
    """A row's columns that it knows by itself; the reason is still a word."""
    right = row.get("correct", row.get("right"))
    if log in ("records", "rejected"):
        right = row.get("cause") is None
    answer = row.get("answer", row.get("predicted"))
    return {"step": row.get("step"), "sample": row.get("sample", row.get("attempt", 0)),
            "right": None if right is None else int(right), "reward": short(row.get("reward")),
            "advantage": short(row.get("advantage")), "tokens": row.get("tokens", row.get("tokens_out")),
            "reason": str(row.get("cause") or row.get("reason") or ""),
            "answer": None if answer is None else str(answer)[:200],
            "flags": sum(FLAGS[name] for name in flags_of(log, row, bool(right)))}


def flags_of(log: str, row: dict, right: bool) -> Iterator[str]:
    whys = {row.get("reason"), row.get("cause")}
    finishes = {row.get("finish"), *(turn["reply"].get("finish") for turn in row.get("turns", ()))}
    if "length" in finishes or "truncated" in whys:
        yield "truncated"
    if "no box" in whys or (log == "answers" and row.get("answer") is None):
        yield "no box"
    if any(run["outcome"].get("error") for run in row.get("runs", ())):
        yield "tool error"
    if row.get("first_correct", right) != right:
        yield "improved" if right else "degraded"
    if log == "discarded":
        yield "discarded"
    elif "advantage" in row and not row["advantage"]:
        yield "no signal"
    if row.get("lenient") and not right:
        yield "right unboxed"


def detail_of(row: dict) -> dict:
    """What a person reads of a row: each reply, the prompt as far as it was new, and the code that ran."""
    detail = {name: row[name] for name in ("parts", "first_answer", "failures", "records") if row.get(name)}
    runs, seen, turns = list(map(run_of, row.get("runs", ()))), set(), []
    for n, turn in enumerate(row.get("turns", ())):
        said = [m["content"] for m in turn.get("messages", ()) if m["role"] != "assistant"]
        told = {name: turn["reply"].get(name) for name in ("text", "thinking", "finish", "error")}
        turns.append({"role": turn["role"], "asked": [text for text in said if text not in seen], **told,
                      "runs": [run for run in runs if run["turn"] == n]})
        seen.update(said)
    alone = {"role": "", "asked": [], "text": str(row.get("response") or row.get("solution") or ""),
             "finish": row.get("finish"), "runs": [{"out": row["run"]}] if row.get("run") else []}
    return detail | {"turns": turns or [alone]}


def run_of(run: dict) -> dict:
    code, outcome = run["code"], run["outcome"]
    return {"turn": run["turn"], "code": code if isinstance(code, str) else "\n\n".join(code),
            "out": outcome["stdout"], "error": outcome["error"], "seconds": short(outcome["seconds"])}
