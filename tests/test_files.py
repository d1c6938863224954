"""Files are named line by line when they are bad, and are whole or absent when the disk is full."""

import errno
import json
from pathlib import Path

import pytest

from slm import BadInput
from slm.runs import files


@pytest.mark.parametrize("content, named", [
    (b'{"a": 1}\n\n{"a": ', "line 3: not valid JSON"), (b'{"a": 1}\n[1]', "line 2: '.1.' found"),
    (b'{"a": 1}\n\xff', "line 2: not UTF-8"), (b"[" * 99999, "line 1: not valid JSON"),
    (b'[{"a": 1}, 2]', "line 2: '2' found"), (b'{"a": 1} x', "line 1: not valid JSON")])
def test_a_bad_row_is_named_with_its_line(tmp_path, content, named):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=rf"x\.jsonl {named}"):
        files.read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ['\ufeff{"a": 1}\r\n\n{"a": "\u2028"}\n', '[{"a": 1},\n {"a": "\u2028"}]'])
def test_rows_are_read_from_lines_and_from_a_list(tmp_path, text):
    (tmp_path / "x").write_text(text, encoding="utf-8", newline="")
    assert [row for _, row in files.read_rows(tmp_path / "x")] == [{"a": 1}, {"a": "\u2028"}]
    assert files.read_rows(Path("/dev/null")) == []


def test_half_a_surrogate_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"q": "a\ud800b \ud83e\udd8a"}')
    assert files.read_rows(tmp_path / "a.jsonl") == [(1, {"q": "a?b \U0001f98a"})]


def test_a_torn_line_of_a_log_is_left_out(tmp_path):
    (tmp_path / "x").write_bytes(files.as_lines([{"a": "\ud800"}, {"a": 2}]) + b'{"a": 3')
    assert list(files.readable_rows(tmp_path / "x")) == [{"a": "?"}, {"a": 2}]
    assert list(files.readable_rows(tmp_path / "none")) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    files.write_json(tmp_path / "x.json", {"old": True})
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "x.json", {"new": True})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_journal_keeps_what_is_good_and_goes_on_after_it(tmp_path):
    (tmp_path / "x").write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n')
    journal = files.Journal(tmp_path / "x")
    assert journal.keep(lambda row: row["step"] != 2) == [{"step": 1}, {"step": 3}] == list(journal)
    journal.append({"step": 4}, {"step": 5})
    journal.keep(lambda row: row["step"] <= 4)
    journal.append({"step": 6})
    assert [row["step"] for row in files.Journal(journal.path)] == [1, 3, 4, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
