"""What any script leaves behind becomes one page that needs nothing else and shows model text as text. What a
browser makes of it is tested in test_report_browser.py."""

import argparse
import base64
import doctest
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest

from slm import BadInput, report
from slm.report import figures, page, told
from slm.runs import cli, files, rundir

ROOT = Path(__file__).parents[1]
METRICS = [{"step": i, "reward": i / 50 - 1, "solved": i / 100, "kl": 0.001 * i, "entropy": 2 - i / 50,
            "mean_tokens": 80 + i, "truncated": 0.1, "loss": 0.01, "lr": 1e-4} for i in range(1, 51)]
ATTACKS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>",
    "</SCRIPT ><img src=x onerror=alert()>",
    "<!--<script>", "--><script>alert(1)</script>", "<img src=http://evil/x.png>", "<svg onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>", "<a href='javascript:alert(1)'>x</a>",
    "<style>@import 'http://evil'</style>", "</title><script>alert(1)</script>", "{{DATA}} {{SCRIPT}}",
    "\\href{javascript:alert(1)}{x}", "$\\includegraphics{http://evil/x}$", "\\(\\class{x}{\\style{a}{b}}\\)",
    "$\\html{<script>alert(1)</script>}$", "\u202e\u0000\ud800", "&lt;script&gt;&amp;",
    "]]><script>alert(1)</script>", "<math><mtext></mtext><script>alert(1)</script></math>",
    "\\boxed{<img src=x onerror=alert(1)>}",
    "<meta http-equiv=refresh content='0;url=http://evil'>", "<base href=http://evil/>"]


def run(path, settings=None, **logs):
    """A run directory: a list becomes a log, anything else a JSON file."""
    path.mkdir(parents=True)
    files.write_json(path / "settings.json", {"command": "eval.py --model <b>", "versions": {"torch": "2"},
                                              "settings": settings or {"model": "tiny"}})
    for name, content in logs.items():
        if isinstance(content, list):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def answer(id, correct=True, **more):
    return {"id": id, "question": f"What is {id}?", "gold": "7", "response": f"It is \\boxed{{{id}}}.",
            "answer": id, "correct": correct, "reason": "", "sample": 0, "tokens": 10, "finish": "stop",
            "data": "tiny", **more}


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def unpacked(text):
    return json.loads(zlib.decompress(base64.b64decode(text)))


def data(path):
    """(the main block, all details) of a written page."""
    text = path.read_text()
    main = unpacked(re.search(r'id="main">(.*?)</script>', text)[1])
    chunks = [re.search(f'id="chunk-{n}">(.*?)</script>', text) for n in range(main["chunks"])]
    if main["beside"]:
        chunks = [re.search(r'"(.*)"', (path.parent / main["beside"] / f"{n}.js").read_text())
                  for n in range(main["chunks"])]
    return main, [detail for chunk in chunks for detail in unpacked(chunk[1])]


def test_no_text_of_a_model_becomes_markup_and_the_page_runs_its_own_two_scripts_only(tmp_path):
    rows = [answer(text, question=text, gold=text, response=text, reason=text, level=text, workflow=text,
                   turns=[{"role": text, "messages": [{"role": "user", "content": text}],
                           "reply": {"text": text, "finish": text}}]) for text in ATTACKS]
    path = run(tmp_path / "<script>alert(1)<", settings={"model": ATTACKS[1], "data": ATTACKS}, answers=rows,
               summary={text: text for text in ATTACKS}, metrics=[{"step": 1, ATTACKS[1]: 1, "reward": 1}])
    text = report.write(path).read_text()
    tags = Tags(text)
    plain = Tags(report.write(run(tmp_path / "plain", answers=[answer("a")])).read_text())
    assert [tag for tag, _ in tags.seen] == [tag for tag, _ in plain.seen]
    assert not [attrs for _, attrs in tags.seen if {"src", "href", "onload", "onerror"} & attrs.keys()]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = re.search(r"script-src ([^\"]*)", text)[1].split()
    assert allowed == [f"'sha256-{digest}'" for digest in digests] and len(allowed) == 2
    policy = next(attrs["content"] for tag, attrs in tags.seen if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy and "img-src" not in policy
    _, details = data(path / "report.html")
    assert [d["turns"][0]["text"] for d in details] == [text.replace("\ud800", "?") for text in ATTACKS]


def test_model_text_reaches_the_document_as_text_only():
    script = (ROOT / "slm" / "report" / "page.js").read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|"
                          r"fetch\(|XMLHttpRequest|import\(|DOMParser", script)


def test_an_episode_comes_with_what_was_asked_said_and_run(tmp_path):
    row = answer("a", False, first_correct=True, first_answer="7", failures=["sandbox timeout"], turns=[
        {"role": "solver", "messages": [{"role": "user", "content": "Solve it"}],
         "reply": {"text": "print(1)", "finish": "stop", "ids": [1] * 99, "logprobs": [0.5] * 99}},
        {"role": "checker", "messages": [{"role": "user", "content": "Solve it"},
                                         {"role": "assistant", "content": "print(1)"},
                                         {"role": "user", "content": "Check it"}],
         "reply": {"text": "Wrong", "finish": "length"}}],
        runs=[{"turn": 0, "code": ["a = 1", "a"], "outcome": {"stdout": "1", "error": "E", "seconds": 0.1}}])
    main, [detail] = data(report.write(run(tmp_path / "r", episodes=[row])))
    first, second = detail["turns"]
    assert first["asked"] == ["Solve it"] and second["asked"] == ["Check it"] and second["finish"] == "length"
    assert first["runs"] == [{"turn": 0, "code": "a = 1\n\na", "out": "1", "error": "E", "seconds": 0.1}]
    assert "ids" not in json.dumps(detail) and detail["failures"] == ["sandbox timeout"]
    flags = {name for name, bit in main["flags"].items() if main["columns"]["flags"][0] & bit}
    assert flags == {"truncated", "tool error", "degraded"}


def test_grpo_tells_groups_tokens_and_what_was_discarded(tmp_path):
    tokens = {"text": ["2", "4"], "mask": [0, 1], "logp": [-0.5], "old": [-0.4], "teacher": []}
    row = {"step": 1, "problem": "p", "question": "Q", "gold": "4", "correct": True, "reward": 1.0,
           "tokens": 1, "advantage": 0.5, "reason": "right", "parts": {"correct": 1}, "answer": "4",
           "turns": [{"role": "solver", "reply": {"text": "4", "finish": "stop"}}], "records": [tokens]}
    settings = {"model": "tiny", "algorithm": "grpo", "batch": 8, "samples": 2, "data": ["tiny"]}
    path = run(tmp_path / "r", settings, metrics=METRICS, episodes=[row | {"sample": k} for k in (0, 1)],
               discarded=[row | {"problem": "q", "advantage": None, "sample": 0}])
    main, details = data(report.write(path))
    assert main["columns"]["problem"] == [0, 0, 1] and main["columns"]["advantage"] == [0.5, 0.5, None]
    assert main["columns"]["flags"] == [0, 0, told.FLAGS["discarded"]] and details[0]["records"] == [tokens]
    assert "50 steps of 8 problems of tiny, 2 samples each. Solved from 3.0 % to 48.0 %" in main["sentence"]
    assert main["metrics"][""][0][4] == pytest.approx(METRICS[4])
    names = list(main["headlines"])
    assert names.index("reward") < names.index("kl") < names.index("loss")


def test_an_evaluation_is_broken_down_with_intervals(tmp_path):
    rows = [answer(str(n), n < 8, level=1 + n % 2, subject="Algebra", tokens=20 * n) for n in range(10)]
    main, _ = data(report.write(run(tmp_path / "r", answers=rows)))
    titles = [table["title"] for table in main["tables"]]
    assert titles == ["Right answers", "By length of the answer", "By level"]  # one subject is no breakdown
    (whole,) = main["tables"][0]["rows"]
    assert whole[:3] == ["tiny", 10, {"share": 0.8, "low": 0.4902, "high": 0.9433}]  # Wilson, 8 of 10
    assert [row[:2] for row in main["tables"][2]["rows"]] == [["1", 5], ["2", 5]]
    assert main["tables"][1]["rows"][0][:2] == ["0 to 0 tokens", 1]
    assert main["sentence"] == "tiny: 80.0 % (95 % interval 49.0-94.3) of 10 problems of tiny right."


def test_workflows_are_compared_with_the_first_on_the_same_problems(tmp_path):
    rows = [answer(str(n), right, workflow=name, first_correct=n < 4) for name, share in
            (("solver", 4), ("vote", 9)) for n in range(10) for right in [n < share]]
    main, _ = data(report.write(run(tmp_path / "r", episodes=rows)))
    table = main["tables"][0]
    assert table["columns"][-3:] == ["improved", "over the first", "p"]
    assert table["rows"][0][-2:] == [None, None] and table["rows"][1][-3] == "5 (50.0 %)"
    assert table["rows"][1][-2]["difference"] == 0.5 and table["rows"][1][-1] == "0.062"  # 2 * 0.5 ** 5


def test_attempts_of_a_verifier_are_right_or_not_none_is_kept(tmp_path):
    rows = [{"id": "p0", "sample": k, "right": k < 3, "reason": "different value"} for k in range(4)]
    main, _ = data(report.write(run(tmp_path / "r", samples=rows)))
    assert main["tables"][0]["title"] == "Right, or why not"
    assert main["tables"][0]["rows"] == [["right", {"bar": 3}], ["different value", {"bar": 1}]]


def test_attempts_of_teachers_are_counted_by_cause_and_length(tmp_path):
    kept = [{"id": f"p{n}", "response": "x", "cause": None, "tokens_out": 100} for n in range(3)]
    lost = [{"id": "p0", "response": "y", "cause": "no box", "reason": "", "tokens_out": 9, "teacher": "t"}]
    path = run(tmp_path / "r", {"teachers": [], "data": ["gsm8k"]}, records=kept, rejected=lost)
    main, _ = data(report.write(path))
    assert main["tables"][0]["rows"] == [["kept", {"bar": 3}], ["no box", {"bar": 1}]]
    assert main["tables"][1]["rows"] == [["64 to 127 tokens", {"bar": 3}]]
    assert main["sentence"].startswith("4 attempts at 3 problems of gsm8k: 3 are right")


@pytest.mark.parametrize("logs", [
    {"metrics": [{"step": 1, "loss": 2.0, "grad_norm": 1, "lr": 1e-3}]},
    {"metrics": [{"step": 1, "loss": float("nan")}, {"loss": float("inf")}, {"loss": None}]},
    {"metrics": [{"step": 1, "skipped": 1}, {"step": 2, "reward": 1.0}]},
    {"answers": [{"id": "a", "correct": True}], "summary": {"data": {"tiny": {"interval": [0.1, 0.2]}}}},
    {"records": [{"id": "a", "solution": "x"}], "rejected": [{"id": "b", "cause": "wrong"}], "table": {}},
    {"samples": [{"id": "a", "right": None, "run": "1"}]}, {"metrics": [], "answers": []}, {}])
@pytest.mark.parametrize("settings", [
    {"model": "tiny"}, {"algorithm": "grpo", "model": "tiny", "batch": 1, "samples": 2, "data": ["a"]},
    {"validate": 1, "model": "tiny", "rank": 1, "data": ["a"]}, {"teachers": [], "data": ["a"]}],
    ids=["other", "grpo", "sft", "data"])
def test_runs_of_every_script_and_unfinished_ones_get_a_page(tmp_path, logs, settings):
    main, _ = data(report.write(run(tmp_path / "r", settings, **logs)))
    assert main["name"] == "r" and main["sentence"].endswith(".") and main["about"]["settings"] == settings


def test_a_torn_line_waits_until_it_is_whole_and_a_log_that_was_cut_is_read_again(tmp_path):
    path = run(tmp_path / "r", answers=[answer(str(n)) for n in range(600)])
    log, logs = path / "answers.jsonl", told.Told({"": path})
    with log.open("a") as f:
        f.write('{"id": "torn')
        f.flush()
        assert len(logs.read().columns["right"]) == 600
        f.write('", "correct": true}\n')
        f.flush()
    assert len(logs.read().columns["right"]) == 601 and len(logs.chunks()) == 3
    assert logs.chunks() == told.Told({"": path}).read().chunks()
    files.Journal(log).keep(lambda row: row["id"] < "2")  # another file of this name
    assert logs.read().columns == told.Told({"": path}).read().columns and len(logs.problems) < 600


def test_a_page_that_would_grow_too_large_keeps_its_details_beside_it(tmp_path, monkeypatch):
    path = run(tmp_path / "r", answers=[answer(str(n)) for n in range(600)])
    one, whole = data(report.write(path))
    monkeypatch.setattr(page, "LIMIT", 1000)
    two, apart = data(report.write(path))
    assert one["beside"] is None and two["beside"] == "report-data" and whole == apart
    assert len(list((path / "report-data").iterdir())) == 3
    monkeypatch.undo()
    report.write(path)
    assert not (path / "report-data").exists()


def test_1319_problems_of_8_samples_fit_into_one_page(tmp_path):
    rng, words = random.Random(0), (ROOT / "LOG.md").read_text().split()
    rows = [answer(f"p{n}", k < 3, sample=k, response=" ".join(rng.choices(words, k=200)))
            for n in range(1319) for k in range(8)]
    path = report.write(run(tmp_path / "r", answers=rows))
    assert path.stat().st_size < 15e6 and data(path)[0]["beside"] is None


def test_a_run_under_way_writes_its_page_seldom_and_survives_a_page_that_fails(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = rundir.RunDir(tmp_path / "r", {})
    shown = folder.path / "report.html"

    def log(at):
        now[0] = at
        folder.log("answers", answer(str(at)))
        return len(data(shown)[1]) if shown.exists() else 0

    assert [log(at) for at in (1, 29, 31, 32, 60, 62)] == [0, 0, 3, 3, 3, 6]
    slow = page.write
    monkeypatch.setattr(page, "write", lambda *args: now.__setitem__(0, now[0] + 10))
    log(100)  # takes 10 seconds, which are SHARE of 2,000
    monkeypatch.setattr(page, "write", slow)
    assert log(2000) == 6 and log(2111) == 9
    monkeypatch.setattr(page, "write", lambda *args: 1 / 0)
    log(3000)
    assert "warning" in capsys.readouterr().err


def test_ctrl_c_leaves_a_page_where_a_run_stands(tmp_path):
    folder = rundir.RunDir(tmp_path / "r", {})
    folder.log("answers", answer("a"))
    for out in (folder.path, tmp_path / "none", None):
        stop = mock.Mock(side_effect=KeyboardInterrupt)
        with pytest.raises(SystemExit, match="130"):
            cli.run(stop, argparse.Namespace(out=out), stopped=report.write)
    assert len(data(folder.path / "report.html")[1]) == 1 and not (tmp_path / "none").exists()


def test_runs_are_compared_on_one_page_and_seeds_of_a_run_share_a_line(tmp_path):
    a = run(tmp_path / "a", {"model": "x", "seed": 0}, answers=[answer(str(n), n < 2) for n in range(4)])
    b = run(tmp_path / "b", {"model": "y", "seed": 0}, answers=[answer(str(n), n < 3) for n in range(4)])
    main, details = data(report.compare([a, b], tmp_path / "new" / "both.html"))
    assert main["who"] == ["a", "b"] and len(main["problems"]) == 4 and len(details) == 8
    assert [row[0] for row in main["tables"][0]["rows"]] == ["a", "b"]
    assert main["tables"][0]["rows"][1][-2]["difference"] == 0.25
    seeds = [run(tmp_path / "s" / str(k), {"lr": 1, "seed": k}, metrics=[{"step": 1, "loss": k}])
             for k in range(3)]
    other = run(tmp_path / "t", {"lr": 2, "seed": 0}, metrics=[{"step": 1, "loss": 9}])
    main, _ = data(report.compare([*seeds, other], tmp_path / "curves.html"))
    assert list(main["metrics"]) == ["0 and 2 more like it", "t"]
    assert len(main["metrics"]["0 and 2 more like it"]) == 3
    c = run(tmp_path / "c", answers=[answer("0", question="Another?"), answer("1", data="", workflow="vote")])
    main, _ = data(report.compare([a, c], tmp_path / "c.html"))  # the same id, but another question
    assert len(main["problems"]) == 5 and main["columns"]["problem"] == [0, 1, 2, 3, 4, 1]
    assert main["who"] == ["a", "c", "c: vote"]
    with pytest.raises(BadInput, match="named twice"):
        report.compare([a, a], tmp_path / "x.html")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="expected a run directory"):
        report.write(tmp_path)


def test_docstring_examples():
    for module in (figures, page, told):
        assert doctest.testmod(module).failed == 0


def test_the_page_is_built_again_from_the_command_line(tmp_path):
    path = run(tmp_path / "r", answers=[answer("a")])
    other = run(tmp_path / "other", answers=[answer("a")])
    both = tmp_path / "both.html"
    for words, code in (([path], 0), (["compare", path, other, "--out", both], 0),
                        (["compare", path, other], 2), ([tmp_path / "none"], 2)):
        done = subprocess.run([sys.executable, "-m", "slm.report", *map(str, words)], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert ("error:" in done.stderr) == (code == 2)
    assert (path / "report.html").is_file() and both.is_file()
