"""JSON on disk: every bad line is named, a file appears whole or not at all, a folder has one writer. Imports
nothing heavy."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from slm import BadInput


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file; `default` if there is no such file and a default is given."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as e:
        raise BadInput(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every row of a JSON lines file, or of one JSON list of objects."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[:e.start].count(b"\n") + 1
        raise BadInput(f"{path} line {line}: not UTF-8 text") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read: {e.strerror}") from None
    texts = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip().startswith("["):
        texts = [(1, text)]
    rows = []
    for line, content in texts:
        try:
            value = json.loads(content)
            if "\\u" in content:  # half a surrogate becomes a question mark
                value = json.loads(as_lines([value]))
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{path} line {line}: not valid JSON ({e}): {content[:60]!r}") from None
        rows += enumerate(value, 1) if isinstance(value, list) and len(texts) == 1 else [(line, value)]
    for line, row in rows:
        if not isinstance(row, dict):
            raise BadInput(f"{path} line {line}: {str(row)[:60]!r} found where a JSON object was expected")
    return rows


def readable_rows(path: Path) -> Iterator[dict]:
    """The rows of a log, less a line that a stop has torn; none where there is no file."""
    if path.is_file():
        with path.open("rb") as f:
            for line in f:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row


def keep_rows(path: Path, good: Callable[[dict], bool]) -> list[dict]:
    """The readable rows of a log that are good. What was torn and the others are taken out of the file."""
    rows = [row for row in readable_rows(path) if good(row)]
    write_whole(path, as_lines(rows))
    return rows


def as_lines(rows: Iterable[dict]) -> bytes:
    """JSON lines. Half a surrogate, as in a server's text, becomes a question mark."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step."""
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Write a value for people to read, in one step."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))


def lock(folder: Path):
    """Claim a folder for this process; the claim ends with the process. Keep the returned file open."""
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(f"{folder}: in use by another process; wait or choose another --out") from None
    return file


def fingerprint(value) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
