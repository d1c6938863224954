"""JSON on disk: errors name the bad line, a file appears whole or not at all, a journal survives a kill.
Imports nothing heavy."""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import runpy
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from slm import BadInput

CONFIG, ADAPTER, BASE = "config.json", "adapter_config.json", "base.json"  # a model; an adapter, its base


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


def base_of(adapter: Path) -> str | None:
    """The name or folder of the model that an adapter's folder belongs to. A path in BASE leads there from
    the adapter, so that it holds where a run was copied to; else the name in ADAPTER counts."""
    name = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    near = read_json(adapter / BASE, {}).get("path")
    return str((adapter / near).resolve()) if near and os.path.isdir(adapter / str(near)) else name


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
    if path.is_file():  # a device may have no end
        with path.open("rb") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    if isinstance(row := json.loads(line), dict):
                        yield row


class Journal:
    """A JSON lines file that survives a kill (by SIGKILL; a power cut may take the last seconds).

    Each append is one write, so a killed process leaves at most one torn line, the last. The next start
    repairs it: a row that only lacks its line break is finished, half a row is cut off. after: is called
    after each append.
    """

    def __init__(self, path: Path, after: Callable[[], None] = lambda: None):
        self.path, self.after, self.file = path, after, path.open("ab", buffering=0)
        with path.open("rb") as f:
            last = b"".join(deque(f, maxlen=1)) if path.is_file() else b""
        if last and not last.endswith(b"\n"):
            try:
                json.loads(last)
                self.file.write(b"\n")
            except ValueError:
                self.file.truncate(path.stat().st_size - len(last))

    def append(self, *rows: dict) -> None:
        lines = as_lines(rows)
        while lines:  # a signal or a nearly full disk can cut a write short
            lines = lines[self.file.write(lines):]
        self.after()

    def __iter__(self) -> Iterator[dict]:
        """The rows. BadInput names a line that is not JSON."""
        with self.path.open("rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise BadInput(f"{self.path} line {n}: not JSON; delete the line to go on") from None

    def keep(self, good: Callable[[dict], bool]) -> list[dict]:
        """The rows that are good. All others leave the file, and so do lines that are not JSON."""
        rows = [row for row in readable_rows(self.path) if good(row)]
        self._replace(rows)
        return rows

    def sort(self, key: Callable[[dict], tuple]) -> None:
        """Put the rows into the order of key(row)."""
        self._replace(sorted(self, key=key))

    def _replace(self, rows: list[dict]) -> None:
        write_whole(self.path, as_lines(rows))
        self.file.close()
        self.file = self.path.open("ab", buffering=0)


def as_lines(rows: Iterable[dict]) -> bytes:
    """JSON lines. Half a surrogate, as in a server's text, becomes a question mark."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step: a kill leaves the old file or the new one."""
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(content)
        with part.open("rb") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Write a value for people to read, in one step."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))


def fingerprint(value) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


load = functools.cache(runpy.run_path)  # a user's file runs once


@contextlib.contextmanager
def yours(word: str, expected: str, *others: type[Exception]) -> Iterator[Callable]:
    """The function that FILE.py:NAME names, for a with block. Whatever goes wrong in it, or on the way to it,
    is BadInput with the line of the file; not so the `others`, which pass through."""
    file, _, name = word.rpartition(":")
    try:
        yield load(file)[name]
    except others:
        raise
    except (Exception, SystemExit) as e:
        lines = [f":{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        raise BadInput(f"{file}{''.join(lines[-1:])}: {type(e).__name__}: {e}; expected a function "
                       f"{name}{expected}") from None


def your_generator(word: str, *rest) -> Callable[..., Generator]:
    """The generator function that FILE.py:NAME names; its errors are BadInput, too. rest: as in yours()."""
    with yours(word, *rest) as found:
        if not inspect.isgeneratorfunction(found):
            raise TypeError("this is no function with a yield")

    @functools.wraps(found)
    def guarded(*given):
        with yours(word, *rest):
            return (yield from found(*given))
    return guarded
