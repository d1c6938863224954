"""Problem sets: golds as published, every bad row named, downloads that resume and are checked."""

import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from slm import BadInput, problems
from slm.formats.sources import Source
from slm.grading import grade

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="no data folder")


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


# Reading

@real
@pytest.mark.parametrize("name, split, count, first", [
    ("gsm8k", "train", 7473, "72"), ("gsm8k", "test", 1319, "18"), ("math", "train", 11998, "0"),
    ("math500", "test", 500, r"\left( 3, \frac{\pi}{2} \right)"), ("aime24", "test", 30, "204"),
    ("amc23", "test", 40, "27"), ("svamp", "test", 1000, "145"), ("multiarith", "test", 600, "39"),
    ("mawps", "test", 2065, "43")])
def test_every_named_set_has_its_published_size_and_first_gold(name, split, count, first, monkeypatch):
    monkeypatch.setenv("SLM_DATA", str(DATA))
    found = problems.load(name, split)
    assert len(found) == len({p.id for p in found}) == count and found[0].gold == first
    assert all(p.question.strip() and p.gold and p.source == name for p in found)
    assert problems.load(name, split, limit=7) == found[:7]


@real
def test_the_two_empty_golds_of_math_are_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setenv("SLM_DATA", str(DATA))
    problems.load("math")
    lines = (DATA / "math" / "train.jsonl").read_text().splitlines()
    first, second = (n for n, line in enumerate(lines, 1) if json.loads(line)["unique_id"].endswith(
        ("number_theory/7115.json", "number_theory/7117.json")))
    said = capsys.readouterr().err
    assert "left out 2 of 12000 rows" in said and f": line {first}, line {second}\n" in said


@real
def test_a_path_and_a_name_give_the_same_problems(monkeypatch):
    monkeypatch.setenv("SLM_DATA", str(DATA))
    by_name, by_path = problems.load("gsm8k", "test"), problems.load(str(DATA / "gsm8k" / "test.jsonl"))
    assert by_name == by_path and problems.fingerprint(by_name) == problems.fingerprint(by_path)
    assert problems.fingerprint(by_name[:10]) != problems.fingerprint(by_name)


@pytest.mark.parametrize("row, gold", [
    ({"question": "q", "answer": "so 70,000 <<x=1>>\n#### -70,000"}, "-70000"),
    ({"problem": "q", "answer": 27.0}, "27"), ({"problem": "q", "answer": 0.5}, "0.5"),
    ({"question": "q", "gold": r"\frac{1}{2}"}, r"\frac{1}{2}"), ({"question": "q", "answer": 0}, "0"),
    ({"input": "q", "target": 39}, "39"), ({"question": "q", "answer": "025"}, "025")])
def test_golds_are_read_in_every_field_and_form(tmp_path, row, gold):
    assert problems.load(write(tmp_path / "mine.jsonl", row))[0].gold == gold


@pytest.mark.parametrize("gold, right, wrong", [
    (r'["\\frac{1}{2}"]', r"\frac{1}{2}", r"\frac{1}{3}"),  # as OlympiadBench and Skywork write it
    (r'["\frac{1}{2}"]', "0.5", "5"), (r"['$\\frac{1}{2}$']", "1/2", "2"), (["$7$"], "7", "8"),
    ([27.0], "27", "2"), ('["2", "-1"]', "-1, 2", "2"),  # several: all of them, in any order
    (["$2$", "$-1$"], "2, -1", "-1"), ('["1,5"]', "5, 1", "5"),
    ('["1/2", "0.5"]', "0.5", "1/2, 3"), (["3", 3], "3", "3, 4"),  # one answer, written twice
    ("[1, 2]", "[1, 2]", "[1, 3]"), ("[-1,1]", "[-1, 1]", "(-1, 1)"),  # intervals
    ('["a" "b"]', '["a" "b"]', "a")])
def test_a_list_of_golds_is_read_so_that_every_right_answer_is_right(tmp_path, gold, right, wrong):
    (problem,) = problems.load(write(tmp_path / "mine.jsonl", {"question": "q", "final_answer": gold}))
    assert grade(f"So \\boxed{{{right}}}.", problem.gold).correct
    assert not grade(f"So \\boxed{{{wrong}}}.", problem.gold).correct


@pytest.mark.parametrize("empty", [{"answer": []}, {"question": " "}, {"question": None}, {"answer": ""}])
def test_an_empty_field_among_others_is_left_out_counted_and_named(tmp_path, capsys, empty):
    rows = [{"question": f"q{i}", "answer": i} | (empty if i in (3, 9) else {}) for i in range(20)]
    found = problems.load(write(tmp_path / "mine.jsonl", *rows))
    assert [p.id for p in found] == [f"mine-{i}" for i in range(20) if i not in (3, 9)]
    assert "left out 2 of 20 rows" in (said := capsys.readouterr().err) and "line 4, line 10" in said


@pytest.mark.parametrize("row, gold", [
    ({"problem": "p", "solution": r"First \boxed{1}, so it is \boxed{9}."}, "9"),
    ({"problem": "p", "answer": None, "solution": r"It is \boxed{9}."}, "9"),
    ({"query": "p", "response": "Work.\nThe answer is: 9"}, "9"), ({"prompt": "p", "completion": "9"}, "9"),
    ({"question": "p", "response": "Work.\n#### 9\n"}, "9"),
    ({"question": "p", "response": r"\boxed{8}", "gold": 9, "answer": "8"}, "9")])  # a record of ours
def test_a_worked_solution_gives_the_gold_where_no_field_does(tmp_path, row, gold):
    (problem,) = problems.load(write(tmp_path / "mine.jsonl", row))
    assert (problem.question, problem.gold) == ("p", gold)


def test_texts_that_nothing_reads_are_named(tmp_path, capsys):
    row = {"Situation": "Tom has 3 hens.", "Setting": "On a farm.", "Question": "How many?", "Answer": 3}
    (problem,) = problems.load(write(tmp_path / "mine.jsonl", row))
    assert problem.question == "Tom has 3 hens. How many?"
    assert "not read: setting" in capsys.readouterr().err


def test_aime_answers_are_compared_as_integers(tmp_path):
    path = write(tmp_path / "aime24" / "test.jsonl", {"id": 60, "problem": "q", "answer": "025"})
    assert problems.load(path)[0] == problems.Problem("aime24-test-60", "q", "25", "aime24")


def test_gsm8k_rationale_is_kept_as_solution_and_svamp_joins_body_and_question(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "q", "answer": "1+1=2\n#### 2"},
                 {"Body": "Two hens.", "Question": "How many?", "Answer": 2.0})
    first, second = problems.load(path)
    assert (first.solution, second.question, second.gold) == ("1+1=2", "Two hens. How many?", "2")


def test_ids_that_repeat_are_replaced_by_row_numbers(tmp_path):
    path = write(tmp_path / "mine.jsonl", *({"id": 3, "question": f"q{i}", "answer": i} for i in range(3)))
    assert [p.id for p in problems.load(path)] == ["mine-0", "mine-1", "mine-2"]


def test_unicode_line_separators_inside_a_question_do_not_split_the_row(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text('﻿{"question": "a\u2028b\x85c", "answer": 1}\r\n\n{"question": "d", "answer": 2}\n',
                    encoding="utf-8", newline="")
    assert [p.question for p in problems.load(str(path))] == ["a\u2028b\x85c", "d"]


def test_one_json_list_is_read_like_json_lines(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}], indent=1))
    assert [p.gold for p in problems.load(str(path))] == ["1", "2"]


# Bad input: one sentence that names file, line, what was found, what was expected

GOOD = {"question": "q", "answer": 1}


@pytest.mark.parametrize("rows, said", [
    ([GOOD, '{"question": "q", "ans', GOOD], "line 2: not valid JSON"),
    ([GOOD, "", '"text"'], "line 3: 'text' found where a JSON object was expected"),
    ([GOOD, {"question": "q"}], "line 2: no gold answer; expected one named answer or gold, found question"),
    ([{"answer": 1}], "line 1: no question; expected a text named question or problem, found answer"),
    ([{"question": "  ", "answer": 1}], "line 1: the gold answer is empty, or no single question"),
    ([{"question": "q", "answer": "  "}], "line 1: the gold answer is empty"),
    ([{"question": "q", "answer": None}], "line 1: the gold answer is empty"),
    ([GOOD, '{"question": "q", "answer": NaN}'], "line 2: the gold answer is 'nan'; expected a"),
    ([{"question": "q", "answer": [1, [True]]}], "line 1: the gold answer is 'True'; expected a"),
    ([{"question": "q", "answer": {"b": 1}}], "line 1: the gold answer is \"{'b': 1}\"; expected a"),
    ([{"context": "c", "answer": 1}], "line 1: no question; expected"),
    ([{"question": "q", "answer": ["", " "]}], "line 1: the gold answer is empty"),
    ([{"problem": "p", "solution": "So $n$ is even."}], "line 1: the gold answer is empty"),
    ([], "no problems in it"), (["", "  "], "no problems in it"), (["["], "not valid JSON"),
    (["[" * 100_000], "not valid JSON"), ([GOOD, '{"a":' * 50_000], "line 2: not valid JSON")])
def test_a_bad_row_is_one_sentence_with_file_and_line(tmp_path, rows, said):
    path = write(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(BadInput) as e:
        problems.load(path)
    assert "mine.jsonl" in str(e.value) and said in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def test_bytes_that_are_not_text_are_named_with_their_line(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"question": "q", "answer": 1}\n\xff\xfe\n')
    with pytest.raises(BadInput, match=r"b\.jsonl line 2: not UTF-8"):
        problems.load(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("name, split, limit, said", [
    ("gsm9k", "test", None, "'gsm9k' is neither a data set's name nor a file; expected one of tiny"),
    ("no/such.jsonl", "test", None, "neither"), (".", "test", None, "is a folder"),
    ("math500", "train", None, "math500 has no 'train' split here, only test"),
    ("math", "test", None, "its test set is math500"), ("gsm8k", "test", 0, "limit 0")])
def test_wrong_names_splits_and_limits_say_what_there_is(name, split, limit, said):
    with pytest.raises(BadInput) as e:
        problems.load(name, split, limit)
    assert said in str(e.value)


# The built-in world

def test_tiny_has_three_splits_that_share_no_question():
    pytest.importorskip("slm.tiny.world")
    splits = [problems.load("tiny"), problems.load("tiny", "test"), problems.load("tiny-unseen")]
    questions = [{p.question for p in split} for split in splits]
    assert all(split for split in splits) and not (questions[0] & questions[1]) and not (
        questions[2] & (questions[0] | questions[1]))
    assert {p.source for p in splits[2]} == {"tiny-unseen"} and splits[2] == problems.load("tiny", "unseen")
    assert problems.load("tiny", "test", 70) == splits[1][:70]
    assert len(problems.load("tiny", "test", 600)) == 600
    with pytest.raises(BadInput, match="tiny has no 'dev' split"):
        problems.load("tiny", "dev")


# Downloads, against a server of our own

class Server(BaseHTTPRequestHandler):
    body, ranges, cut, status, asked = b"", True, [], 200, []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked[6:-1]) if asked and self.ranges else 0
        if self.status != 200:
            return self.send_error(self.status)
        if start >= len(self.body):
            return self.send_error(416)
        body = self.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:self.cut.pop(0)] if self.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    class Mine(Server):
        body = b"".join(json.dumps({"question": f"q{i}", "answer": i}).encode() + b"\n" for i in range(5000))
        asked, cut = [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    Thread(target=httpd.serve_forever, daemon=True).start()
    source = Source("set/test.jsonl", f"http://127.0.0.1:{httpd.server_port}/test.jsonl", 5000,
                    hashlib.sha256(Mine.body).hexdigest())
    monkeypatch.setitem(problems.SOURCES, "set", {"test": source})
    monkeypatch.setenv("SLM_DATA", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    yield Mine
    httpd.shutdown()
    httpd.server_close()


def test_a_missing_set_is_downloaded_once_and_cached(server, tmp_path):
    assert len(problems.load("set", "test")) == 5000
    assert (tmp_path / "cache" / "data" / "set" / "test.jsonl").read_bytes() == server.body
    problems.load("set", "test")
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_stopped(server, ranges):
    server.ranges, server.cut = ranges, [70_000, 1000]
    assert len(problems.load("set", "test")) == 5000
    assert len(server.asked) == 3 and server.asked[1] == "bytes=65536-"


def test_a_download_killed_midway_leaves_no_file_and_resumes_in_the_next_run(server, tmp_path):
    server.cut = [100_000, 0, 0]
    with pytest.raises(BadInput, match="cannot be reached"):
        problems.load("set", "test")
    folder = tmp_path / "cache" / "data" / "set"
    assert [p.name for p in folder.iterdir()] == ["test.jsonl.part"]
    assert len(problems.load("set", "test")) == 5000 and server.asked[-1] == "bytes=65536-"
    assert [p.name for p in folder.iterdir()] == ["test.jsonl"]


def test_a_wrong_file_is_refused_and_not_kept(server, tmp_path):
    server.body = server.body[:-20] + b"\n"
    with pytest.raises(BadInput, match="not the expected file: sha256"):
        problems.load("set", "test")
    assert not any((tmp_path / "cache").rglob("*.*"))


def test_without_a_checksum_the_rows_are_counted(server, monkeypatch):
    source = problems.SOURCES["set"]["test"]
    for rows, body, said in ((9, server.body, "5000 rows, expected 9"), (9, b"<html>", "not valid JSON")):
        server.body = body
        monkeypatch.setitem(problems.SOURCES, "set", {"test": Source(source.file, source.url, rows)})
        with pytest.raises(BadInput, match=said):
            problems.load("set", "test")


def test_offline_the_message_says_which_file_to_put_where(server, monkeypatch):
    nobody = Source("set/test.jsonl", "http://127.0.0.1:9/x", 1)
    monkeypatch.setitem(problems.SOURCES, "set", {"test": nobody})
    with pytest.raises(BadInput) as e:
        problems.load("set", "test")
    assert "save http://127.0.0.1:9/x as data/set/test.jsonl, or set SLM_DATA" in str(e.value)


def test_the_hubs_mirror_and_its_offline_mode_hold_for_data_too(server, monkeypatch):
    given = problems.SOURCES["set"]["test"]
    mirror, path = given.url.rsplit("/", 1)
    source = Source(given.file, f"https://huggingface.co/{path}", given.rows, given.sha256)
    monkeypatch.setitem(problems.SOURCES, "set", {"test": source})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids"):
        problems.load("set", "test")
    assert not server.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", mirror + "/")
    assert len(problems.load("set", "test")) == 5000 and len(server.asked) == 1


def test_a_server_error_is_named(server):
    server.status = 404
    with pytest.raises(BadInput, match="answered 404; without a network, save"):
        problems.load("set", "test")


def test_a_user_without_a_home_reads_local_files_and_is_told_what_to_set(server, tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SLM_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as for an unknown user
    with pytest.raises(BadInput, match=r"^set/test\.jsonl: this user has no home directory for it; set SLM_"):
        problems.load("set", "test")
    assert not server.asked and os.listdir(tmp_path) == []
    path = tmp_path / "here" / "set" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(server.body)
    monkeypatch.setenv("SLM_DATA", str(tmp_path / "here"))
    assert len(problems.load("set", "test")) == 5000


def test_local_folders_come_before_the_network(server, tmp_path, monkeypatch):
    write(tmp_path / "data" / "set" / "test.jsonl", GOOD)
    assert len(problems.load("set", "test")) == 1 and not server.asked
    write(tmp_path / "given" / "set" / "test.jsonl", GOOD, GOOD)
    monkeypatch.setenv("SLM_DATA", str(tmp_path / "given"))
    assert len(problems.load("set", "test")) == 2


def test_a_list_of_golds_as_gsm8k_writes_them_is_read(tmp_path):
    row = {"question": "a", "answer": ["so\n#### 4", "#### 1,200"]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    assert [p.gold for p in problems.load(str(tmp_path / "mine.jsonl"))] == ["4, 1200"]
