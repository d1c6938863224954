"""A run directory of any script becomes one page that needs nothing else and shows model text as text."""

import doctest
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slm import BadInput, report
from slm.report import page

ROOT = Path(__file__).parents[1]


def run(path, **files):
    path.mkdir(parents=True)
    settings = {"command": "eval.py --model <b>", "settings": {"model": "tiny"}, "versions": {"torch": "2"}}
    (path / "settings.json").write_text(json.dumps(settings))
    for name, content in files.items():
        if isinstance(content, list):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


METRICS = [{"step": i, "reward": i / 50 - 1, "solved": i / 100, "kl": 0.001 * i, "entropy": 2 - i / 50,
            "mean_tokens": 80 + i, "truncated": 0.1, "loss": 0.01, "lr": 1e-4} for i in range(1, 51)]
HOSTILE = "<script>alert(1)</script>&amp;</pre><img src=http://x>\x00\ud7ff\u202e"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_model_text_is_escaped(tmp_path):
    row = {"id": HOSTILE, "response": HOSTILE, "answer": HOSTILE, "gold": "\ud800", "correct": False,
           "turns": [{"role": "solver", "reply": {"text": HOSTILE}}], "ids": list(range(99)),
           HOSTILE: HOSTILE}
    path = run(tmp_path / "r", metrics=METRICS, answers=[row], summary={HOSTILE: {HOSTILE: HOSTILE}})
    text = report.write(path).read_text()
    tags = Tags()
    tags.feed(text)
    assert {tag for tag, _ in tags.seen} <= set(
        "meta title style h1 h2 img table tr td th pre details summary b".split())
    assert [a["src"][:22] for tag, a in tags.seen if tag == "img"] == ["data:image/png;base64,"]
    assert "(99 numbers)" in text and "&lt;script&gt;alert(1)" in text


def test_grpo_runs_headline_reward_before_loss_and_get_a_plot(tmp_path):
    episodes = [{"step": i, "problem_id": f"p{i}", "reward": 1.0, "correct": True} for i in range(400)]
    path = run(tmp_path / "r", metrics=METRICS, episodes=episodes)
    text = report.write(path).read_text()
    assert (path / "metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert text.index("<th>reward</th>") < text.index("KL to the reference") < text.index("<th>loss</th>")
    row = re.search(r"<th>reward</th><td>(.*?)</td><td>(.*?)</td>", text)
    assert float(row[1]) == pytest.approx(-0.94) and float(row[2]) == pytest.approx(-0.04)
    assert re.findall(r"p\d+", re.sub("<[^>]*>", "", text))[0] == "p0" and "p350" in text


def test_each_part_of_a_reward_has_a_curve_after_the_reward_and_an_evaluation_its_interval(tmp_path):
    own = "reward/a $b$ <i>.py:f_1"  # of a file: not a formula, and not markup
    rows = [{"step": 0, "evaluated": 0.25, "evaluated_low": 0.1, "evaluated_high": 0.5}]
    rows += [{"step": i, "reward": i / 9, "reward/correct": i / 10, own: 1 - i / 9, "kl": i} for i in (1, 2)]
    rows += [{"step": 3, "reward": 1, "evaluated": 0.5, "evaluated_low": 0.3, "evaluated_high": 0.7}]
    text = report.write(run(tmp_path / "r", metrics=rows)).read_text()
    titles = re.findall(r"<tr><th>(.*?)</th>", text)
    titles = [title for title in titles if title in ("reward", "KL to the reference (nats)") or ": " in title]
    assert titles[:4] == ["reward", "reward: correct", "reward: a $b$ &lt;i&gt;.py:f_1",
                          "KL to the reference (nats)"]
    bare = [{k: v for k, v in row.items() if not k.endswith(("low", "high"))} for row in rows]
    assert page.curves(rows) != page.curves(bare)


@pytest.mark.parametrize("files", [
    {"metrics": [{"step": 1, "loss": 2.0, "grad_norm": 1, "lr": 1e-3}]},
    {"metrics": [{"step": 1, "loss": float("nan")}, {"loss": float("inf")}, {"loss": None}]},
    {"metrics": [{"step": 1, "skipped": 1}, {"step": 2, "reward": 1.0}]},
    {"answers": [{"id": "a", "correct": True}], "summary": {"data": {"tiny": {"interval": [0.1, 0.2]}}}},
    {"records": [{"id": "a", "solution": "x"}], "rejected": [{"id": "b", "cause": "wrong"}], "table": {}},
    {"metrics": [], "answers": []}, {}])
def test_runs_of_every_script_and_unfinished_ones_get_a_page(tmp_path, files):
    text = report.write(run(tmp_path / "r", **files)).read_text()
    assert "<h1>r</h1>" in text and "eval.py --model &lt;b&gt;" in text and "tiny" in text


def test_torn_lines_are_left_out_and_samples_are_spread_over_the_file(tmp_path):
    path = run(tmp_path / "r", answers=[{"id": f"q{i:03}", "correct": i % 2 == 0} for i in range(80)])
    with (path / "answers.jsonl").open("a") as f:
        f.write('{"id": "torn')
    text = report.write(path).read_text()
    assert re.findall(r"q\d\d\d(?=:)", text) == [f"q{i * 81 // 8:03}" for i in range(8)]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="expected a run directory"):
        report.write(tmp_path)


def test_docstring_examples():
    assert doctest.testmod(report.page).failed == 0


def test_the_page_is_built_again_from_the_command_line(tmp_path):
    path = run(tmp_path / "r", answers=[{"id": "a", "correct": True}])
    for words, code in (([path], 0), ([tmp_path / "none"], 2), ([], 2)):
        done = subprocess.run([sys.executable, "-m", "slm.report", *map(str, words)], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert ("error:" in done.stderr) == (code == 2)
    assert (path / "report.html").is_file()
