"""Scoring, resuming, comparing and regrading, with a scripted model where figures must be known."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import scripted
from faulty_server import serve

import agents
import eval as evaluation
from slm import BadInput, checkpoint
from slm.episode import Reply, user
from slm.grading import grade, version
from slm.prompts import SOLVER
from slm.runs import cli, stats
from slm.teachers import Endpoint

ROOT = Path(__file__).parents[1]


class Backend(scripted.Backend):
    def close(self):
        pass


def options(*words):
    args = evaluation.options().parse_args([str(word) for word in words])
    return cli.resolve(args, evaluation.PAPER, evaluation.TINY)


def run(*words):
    evaluation.main(options(*words))


def rows(path):
    return [json.loads(line) for line in (Path(path) / "answers.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture
def data(tmp_path):
    """A file of ten problems whose question is a number and whose gold is its double."""
    path = tmp_path / "doubles.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}", "answer": 2 * i}) + "\n" for i in range(10)))
    return path


@pytest.fixture
def model(monkeypatch):
    """model(reply) makes reply(number in the question, seed, sampling) the model; returns the backend."""
    def use(reply):
        backend = Backend(lambda text, seed, sampling: reply(int(text.split("\n")[0]), seed, sampling))
        monkeypatch.setattr(evaluation, "open_backend", lambda *_: (backend, {}))
        return backend
    return use


def double(n, seed, sampling):
    return f"It is \\boxed{{{2 * n}}}."


def below(limit):
    """A model that is right for numbers below `limit`."""
    return lambda n, seed, sampling: f"\\boxed{{{2 * n if n < limit else -1}}}"


# Scoring

def test_tiny_is_scored_token_by_token_and_the_batch_does_not_matter(tmp_path, tiny):
    _, tokenizer = tiny
    run("--limit", 6, "--max-tokens", 24, "--out", tmp_path / "a", "--batch", 2)
    run("--limit", 6, "--max-tokens", 24, "--out", tmp_path / "b")
    a, b = ({row["id"]: row for row in rows(tmp_path / name)} for name in "ab")
    assert a == b and len(a) == 6
    for row in a.values():
        fields = "id question gold response answer correct reason prompt_ids ids finish"
        assert set(row) >= set(fields.split())
        assert row["prompt_ids"] == tokenizer.chat([user(SOLVER(question=row["question"]))])
        assert tokenizer.decode(row["ids"]) == row["response"] and len(row["ids"]) <= 24
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())["settings"]
    assert settings["prompt"] == SOLVER.id and settings["weights"] and settings["grader"]
    assert (tmp_path / "a" / "report.html").is_file()


def test_the_figures_are_those_of_the_answers(tmp_path, data, model, capsys):
    def reply(n, seed, sampling):
        if n == 7:
            return Reply("so then 2, 4, and", list(range(9)), finish="length", prompt_ids=[1])
        if n == 8:
            return Reply("", finish="error", error="HTTP 500")
        return below(6)(n, seed, sampling)
    model(reply)
    run("--data", data, "--out", tmp_path / "r", "--limit", 9)
    found = json.loads((tmp_path / "r" / "summary.json").read_text())["data"][str(data)]
    assert (found["problems"], found["right"], found["accuracy"]) == (9, 6, 6 / 9)
    assert found["interval"] == pytest.approx(stats.wilson(6, 9))
    assert found["truncated"] == 1 and found["failures"] == {"HTTP 500": 1}
    by_id = {row["id"]: row for row in rows(tmp_path / "r")}
    assert by_id["doubles-8"]["reason"] == "HTTP 500" and by_id["doubles-7"]["finish"] == "length"
    said = capsys.readouterr().out
    assert "66.7 (35.4-87.9)" in said and "1 x HTTP 500" in said


def test_several_samples_give_the_mean_and_unbiased_pass_at_k(tmp_path, data, model, capsys):
    chance = {}

    def reply(n, seed, sampling):
        assert sampling.temperature == 0.8
        chance[n] = chance.get(n, 0) + 1
        return double(n, 0, 0) if chance[n] <= n % 5 else "\\boxed{-1}"
    model(reply)
    run("--data", data, "--out", tmp_path / "r", "--samples", 4, "--temperature", 0.8)
    found = json.loads((tmp_path / "r" / "summary.json").read_text())["data"][str(data)]
    assert found["accuracy"] == pytest.approx(0.5) and found["samples"] == 4
    expected = {k: sum(stats.pass_at_k(4, n % 5, int(k)) for n in range(10)) / 10 for k in ("2", "4")}
    for k, value in expected.items():
        mean, low, high = found["figures"][f"pass@{k}"]
        assert mean == pytest.approx(value) and low < value < high
    assert found["interval"][0] < 0.5 < found["interval"][1]
    said = capsys.readouterr().out
    assert re.search(r"pass@4 +80.0 \(", said) and re.search(r"maj@4 +50.0 \(", said)  # right: 0 1 2 3 4 of 4
    assert sorted((r["id"], r["sample"]) for r in rows(tmp_path / "r"))[:5] == [
        ("doubles-0", 0), ("doubles-0", 1), ("doubles-0", 2), ("doubles-0", 3), ("doubles-1", 0)]


def test_any_workflow_can_be_scored_with_its_code_run_in_the_sandbox(tmp_path, data, model):
    model(lambda n, seed, sampling: f"```python\nprint({n} * 2)\n```\n")
    run("--data", data, "--workflow", "python_tools", "--limit", 2, "--out", tmp_path / "r")
    assert [row["correct"] for row in rows(tmp_path / "r")] == [True, True]
    assert {row["workflow"] for row in rows(tmp_path / "r")} == {"python_tools"}


def test_a_fragment_of_a_server_that_broke_off_is_not_kept_on_resume(tmp_path, data, monkeypatch):
    monkeypatch.setattr(Endpoint.__init__, "__kwdefaults__",
                        Endpoint.__init__.__kwdefaults__ | {"backoff": 0.01})
    doubled = lambda body, rng: f"\\boxed{{{2 * int(body['messages'][-1]['content'].split()[0])}}}. I see it."
    with serve(doubled, quirk="ends with error") as server:
        words = ("--endpoint", server.url, "--data", data, "--limit", 3, "--out", tmp_path / "r")
        run(*words)
        assert [(row["response"], row["correct"]) for row in rows(tmp_path / "r")] == [("", False)] * 3
        assert all("broke off, finish_reason error" in row["broken"] for row in rows(tmp_path / "r"))
        server.quirk = None
        run(*words, "--resume")
    assert [row["correct"] for row in rows(tmp_path / "r")] == [True] * 3


def test_a_served_model_is_scored_through_its_endpoint(tmp_path, data):
    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "served" and asked["temperature"] == 0
            n = int(asked["messages"][-1]["content"].split("\n")[0])
            body = json.dumps({"choices": [{"finish_reason": "stop", "message": {
                "role": "assistant", "content": f"\\boxed{{{2 * n}}}"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/v1"
    run("--endpoint", url, "--model", "served", "--data", data, "--out", tmp_path / "r")
    httpd.shutdown()
    httpd.server_close()
    assert [row["correct"] for row in rows(tmp_path / "r")] == [True] * 10


# Stopping and going on

def test_a_stopped_run_goes_on_without_asking_twice_and_a_torn_line_is_repaired(tmp_path, data, model):
    model(below(4))
    run("--data", data, "--out", tmp_path / "whole")
    run("--data", data, "--out", tmp_path / "cut")
    whole = rows(tmp_path / "whole")
    path = tmp_path / "cut" / "answers.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:7]) + b'\n{"id": "doubles-7", "quest')
    (tmp_path / "cut" / "summary.json").unlink()
    backend = model(below(4))
    run("--data", data, "--out", tmp_path / "cut", "--resume")
    assert len(backend.requests) == 3
    key = lambda row: row["id"]
    assert sorted(rows(tmp_path / "cut"), key=key) == sorted(whole, key=key)
    whole, cut = (json.loads((tmp_path / n / "summary.json").read_text())["data"] for n in ("whole", "cut"))
    assert {**whole[str(data)], "seconds": 0} == {**cut[str(data)], "seconds": 0}


def test_a_finished_run_that_is_resumed_keeps_its_seconds(tmp_path, data, model):
    model(below(4))
    run("--data", data, "--out", tmp_path / "r")
    path = tmp_path / "r" / "summary.json"
    told = json.loads(path.read_text())
    told["data"][str(data)]["seconds"] = 1234.5
    path.write_text(json.dumps(told))
    backend = model(below(4))
    run("--data", data, "--out", tmp_path / "r", "--resume")
    assert json.loads(path.read_text()) == told and not backend.requests


def test_requests_that_failed_are_asked_again(tmp_path, data, model):
    failed = Reply("", finish="error", error="HTTP 503")
    model(lambda n, seed, sampling: failed if n in (3, 8) else double(n, seed, sampling))
    run("--data", data, "--out", tmp_path / "r")
    assert sum(row["correct"] for row in rows(tmp_path / "r")) == 8
    backend = model(double)
    run("--data", data, "--out", tmp_path / "r", "--resume")
    assert len(backend.requests) == 2
    assert [row["correct"] for row in rows(tmp_path / "r")] == [True] * 10


def test_any_text_a_model_can_write_survives_saving_and_reading_back(tmp_path, data, model):
    odd = "\u2028\x85\x0b\x00 \ud800 \r\n"
    model(lambda n, seed, sampling: odd + double(n, 0, 0))
    run("--data", data, "--out", tmp_path / "r", "--limit", 2)
    run("--compare", tmp_path / "r")
    run("--regrade", tmp_path / "r")
    assert rows(tmp_path / "r")[0]["response"] == odd.replace("\ud800", "?") + "It is \\boxed{0}."


def test_a_killed_run_resumes_to_the_answers_of_an_unbroken_one(tmp_path):
    words = ["--limit", "24", "--max-tokens", "30", "--batch", "4", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "eval.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers = tmp_path / "killed" / "answers.jsonl"
    while not (answers.exists() and answers.read_bytes().count(b"\n") >= 4) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*words, "--resume")
    run(*words[:-1], tmp_path / "whole")
    key = lambda row: row["id"]
    assert sorted(rows(tmp_path / "killed"), key=key) == sorted(rows(tmp_path / "whole"), key=key)


def test_a_finished_folder_is_not_written_over_and_other_settings_are_not_mixed_in(tmp_path, data, model):
    model(double)
    run("--data", data, "--out", tmp_path / "r")
    before = (tmp_path / "r" / "answers.jsonl").read_bytes()
    with pytest.raises(BadInput, match="holds a run already"):
        run("--data", data, "--out", tmp_path / "r")
    with pytest.raises(BadInput, match="max_tokens=320, now it is 9"):
        run("--data", data, "--out", tmp_path / "r", "--resume", "--max-tokens", 9)
    data.write_text(data.read_text().replace('"answer": 4}', '"answer": 5}'))
    with pytest.raises(BadInput, match="data changed"):
        run("--data", data, "--out", tmp_path / "r", "--resume")
    assert (tmp_path / "r" / "answers.jsonl").read_bytes() == before


# Comparing

@pytest.fixture
def three(tmp_path, data, model):
    """Three runs that get the first 2, 6 and 9 of ten problems right."""
    paths = []
    for limit in (2, 6, 9):
        model(below(limit))
        paths.append(tmp_path / f"upto{limit}")
        run("--data", data, "--out", paths[-1])
    return paths


def test_runs_are_compared_in_one_table_with_paired_differences(three):
    right = [[i < limit for i in range(10)] for limit in (2, 6, 9)]
    lines = compared(*three).splitlines()
    assert len(lines) == 5 and "10 problems, samples 1, temperature 0.0" in lines[0]
    for line, k in zip(lines[2:], (2, 6, 9)):
        low, high = stats.wilson(k, 10)
        assert line.count(f"{10 * k:.1f} ({100 * low:.1f}-{100 * high:.1f})") == 2  # lenient and strict
    for line, now in zip(lines[3:], right[1:]):
        d, low, high = stats.paired(right[0], now)
        assert f"{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in line
        assert f" {stats.mcnemar(right[0], now):.3f} " in line
    assert max(map(len, lines[1:])) <= 132
    markdown = compared(*three, "--markdown").splitlines()
    assert {line.count("|") for line in markdown[2:]} == {10} and markdown[3] == "|" + " --- |" * 9
    assert [line.replace("|", "").split() for line in markdown[4:]] == [line.split() for line in lines[2:]]


def compared(*words):
    """What --compare prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run("--compare", *words)
    return said.getvalue()


def test_a_table_says_which_run_was_asked_with_another_prompt(tmp_path, data, model):
    model(double)
    run("--data", data, "--out", tmp_path / "a")
    (tmp_path / "prompt.txt").write_text("{question}\nNow?")
    run("--data", data, "--out", tmp_path / "b", "--prompt", tmp_path / "prompt.txt")
    text = compared(tmp_path / "a", tmp_path / "b")
    assert "note: b was asked with another prompt than a" in text and "note: a " not in text
    assert "note: a was asked" in compared(tmp_path / "b", tmp_path / "a")


def test_a_small_p_is_not_printed_as_zero(tmp_path, data, model):
    data.write_text("".join(json.dumps({"question": f"{i}", "answer": 2 * i}) + "\n" for i in range(30)))
    for limit in (0, 30):
        model(below(limit))
        run("--data", data, "--out", tmp_path / f"{limit}")
    assert " < 0.001 " in compared(tmp_path / "0", tmp_path / "30")


def test_an_answer_outside_a_box_is_lenient_and_one_in_a_box_strict(tmp_path, data, model):
    model(lambda n, seed, sampling: f"The answer is {2 * n}." if n < 4 else below(6)(n, seed, sampling))
    run("--data", data, "--out", tmp_path / "r")
    found, = json.loads((tmp_path / "r" / "summary.json").read_text())["data"].values()
    assert found["figures"]["lenient"] == pytest.approx([0.6, *stats.wilson(6, 10)])
    assert found["figures"]["strict"] == pytest.approx([0.2, *stats.wilson(2, 10)])
    assert (found["no_box"], found["accuracy"]) == (4, 0.6)
    for row in rows(tmp_path / "r"):
        assert grade(row["response"], row["gold"], strict=True).correct == (row["correct"] and row["boxed"])
    line = compared(tmp_path / "r").splitlines()[-1]
    assert re.search(r" 60\.0 .* 20\.0 .* 40\.0 ", line)


def test_a_run_without_token_ids_questions_and_responses_gives_the_same_table(three):
    text = compared(*three)
    for path in three:
        kept = [{key: row[key] for key in "id data gold answer correct boxed tokens finish sample".split()}
                for row in rows(path)]
        (path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert compared(*three) == text


def test_a_run_from_before_boxes_were_noted_gives_the_same_table(three):
    text = compared(*three)
    for path in three:
        kept = [{key: row[key] for key in row if key != "boxed"} for row in rows(path)]
        (path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert compared(*three) == text


def test_workflows_of_agents_are_compared_with_runs_of_eval(tmp_path, data, model, monkeypatch):
    backend = model(lambda n, seed, sampling: f"\\boxed{{{2 * n + (sampling.temperature == 0 and n > 4)}}}")
    monkeypatch.setattr(agents, "open_backend", lambda *_: (backend, {}))
    words = ["--data", data, "--workflow", "majority_vote", "--max-tokens", 320, "--out", tmp_path / "agents"]
    args = agents.options().parse_args(list(map(str, words)))
    agents.main(cli.resolve(args, agents.PAPER, agents.TINY))
    run("--data", data, "--out", tmp_path / "eval")
    lines = compared(tmp_path / "eval", tmp_path / "agents").splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        ["eval", "50.0"], ["agents/solver", "50.0"], ["agents/majority_vote", "100.0"]]
    assert "+50.0 [" in lines[-1]
    with pytest.raises(BadInput, match="no run of eval"):
        run("--regrade", tmp_path / "agents")


# Several samples

def test_the_vote_is_the_mean_over_all_orders_in_which_the_first_of_the_most_frequent_wins():
    rng = random.Random(0)
    for _ in range(40):
        answers = [rng.choice(["0.5", "1/2", "\\frac12", "3", "3.0", "7", None]) for _ in range(5)]
        samples = [{"answer": a, "correct": a in ("0.5", "1/2", "\\frac12")} for a in answers]
        value = {"0.5": 1, "1/2": 1, "\\frac12": 1, "3": 2, "3.0": 2, "7": 3}
        wins = []
        for order in itertools.permutations(answers):
            votes = Counter(value[a] for a in order if a)
            wins.append(bool(votes) and votes.most_common(1)[0][0] == 1)
        assert evaluation.majority(samples) == pytest.approx(sum(wins) / len(wins))


def test_the_figures_of_several_samples_are_those_of_all_subsets():
    rng = random.Random(1)
    table = [[rng.random() < 0.4 for _ in range(6)] for _ in range(7)]
    graded = [{"id": f"{i}", "answer": str(int(right)), "correct": right, "boxed": True}
              for i, samples in enumerate(table) for right in samples]
    rng.shuffle(graded)
    found = evaluation.figures(graded)
    for k in (2, 4, 6):
        for value, samples in zip(found[f"pass@{k}"], table):
            subsets = list(itertools.combinations(samples, k))
            assert value == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert found["lenient"] == found["strict"] == pytest.approx([sum(samples) / 6 for samples in table])
    assert list(found) == ["lenient", "strict", "pass@2", "pass@4", "pass@6", "maj@6"]


def test_runs_of_several_samples_are_compared_by_their_means(tmp_path, data, model):
    rng = random.Random(0)
    for name, chance in (("a", 0.2), ("b", 0.7)):
        model(lambda n, seed, sampling, chance=chance: below(10 * (rng.random() < chance))(n, 0, 0))
        run("--data", data, "--out", tmp_path / name, "--samples", 4, "--temperature", 1)
    lines = compared(tmp_path / "a", tmp_path / "b").splitlines()
    means = [[sum(row["correct"] for row in rows(tmp_path / name) if row["id"] == f"doubles-{i}") / 4
              for i in range(10)] for name in "ab"]
    assert "pass@4 %" in lines[1] and " p " not in lines[1]
    assert stats.points(*stats.difference(*means)) in lines[3]


# Which problems

def test_levels_and_subjects_have_their_own_accuracy(tmp_path, data, model, capsys):
    data.write_text("".join(json.dumps({
        "question": f"{i}", "answer": 2 * i, "level": 1 + i % 2, "subject": "Algebra"}) + "\n"
        for i in range(10)))
    model(below(6))
    run("--data", data, "--out", tmp_path / "r")
    found, = json.loads((tmp_path / "r" / "summary.json").read_text())["data"].values()
    assert found["level"] == {level: pytest.approx([0.6, *stats.wilson(3, 5)]) for level in "12"}
    assert found["subject"]["Algebra"] == pytest.approx([0.6, *stats.wilson(6, 10)])
    assert re.search(r"level 2 +60\.0 \(", capsys.readouterr().out)


def test_the_limit_takes_the_first_problems_or_draws_them_by_a_seed(tmp_path, data, model):
    model(double)
    taken = {}
    for name, more in (("first", []), ("a", ["--draw", 1]), ("again", ["--draw", 1]), ("b", ["--draw", 2])):
        run("--data", data, "--out", tmp_path / name, "--limit", 4, *more)
        taken[name] = {row["question"] for row in rows(tmp_path / name)}
    assert taken["first"] == set("0123") and taken["a"] == taken["again"]
    assert len({frozenset(chosen) for chosen in taken.values()}) == 3 and len(taken["b"]) == 4
    with pytest.raises(BadInput, match=r"different problems.*--draw"):
        run("--compare", tmp_path / "first", tmp_path / "a")


def test_the_order_of_the_answers_in_the_file_does_not_matter(three):
    answers = three[1] / "answers.jsonl"
    text = compared(*three)
    answers.write_text("".join(reversed(answers.read_text().splitlines(keepends=True))))
    assert compared(*three) == text


def test_unlike_runs_are_not_compared(three, tmp_path, data, model):
    def refused(path, match):
        with pytest.raises(BadInput, match=match) as e:
            run("--compare", three[0], path)
        assert "\n" not in str(e.value)
    model(double)
    run("--data", data, "--out", tmp_path / "five", "--limit", 5)
    refused(tmp_path / "five", "different problems")
    run("--data", data, "--out", tmp_path / "short", "--max-tokens", 7)
    refused(tmp_path / "short", r"max_tokens 320 and .* with 7")
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text())
    run("--data", other, "--out", tmp_path / "elsewhere")
    refused(tmp_path / "elsewhere", "compare runs on the same data")
    refused(tmp_path / "nothing", "expected a run directory of eval.py")
    settings = three[2] / "settings.json"
    settings.write_text(settings.read_text().replace(version(), "0123456789ab"))
    refused(three[2], "by version 0123456789ab; grade both again: python eval.py --regrade")
    run("--regrade", three[2])
    run("--compare", three[0], three[2])
    (three[1] / "summary.json").unlink()
    refused(three[1], "not finished")


# Regrading

def test_regrading_shows_and_repairs_what_another_grader_said(three, capsys):
    path = three[1] / "answers.jsonl"
    text = path.read_text()
    changed = [json.loads(line) for line in text.splitlines()]
    changed[0]["correct"], changed[-1]["correct"] = False, True
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    capsys.readouterr()
    run("--regrade", three[1])
    said = capsys.readouterr().out
    assert "gold '0', answer '0': wrong (" in said and "gold '18', answer '-1': right (" in said
    assert "2 of 10 answers graded differently" in said
    assert [r["correct"] for r in rows(three[1])] == [json.loads(x)["correct"] for x in text.splitlines()]
    (figures,) = json.loads((three[1] / "summary.json").read_text())["data"].values()
    assert figures["right"] == 6
    assert len((three[1] / "answers.before-regrade.jsonl").read_text().splitlines()) == 10
    run("--regrade", three[1])
    assert "0 of 10 answers graded differently" in capsys.readouterr().out


def test_a_second_regrading_keeps_what_the_first_one_kept(three):
    path, kept = three[1] / "answers.jsonl", []
    for n in range(3):
        changed = [json.loads(line) for line in path.read_text().splitlines()]
        changed[n]["correct"] = not changed[n]["correct"]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        kept.append(path.read_text())
        run("--regrade", three[1])
    names = (f"answers.before-regrade{more}.jsonl" for more in ("", "-2", "-3"))
    assert [(three[1] / name).read_text() for name in names] == kept


def test_a_base_model_is_asked_in_plain_words_and_its_run_says_so(tmp_path, tiny, capsys):
    model = tmp_path / "base"
    checkpoint.save(*tiny, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    for name, folder in (("plain", model), ("the model's own", "tiny")):
        words = ["--model", folder, "--limit", 2, "--max-tokens", 8, "--out", tmp_path / name]
        args = evaluation.options().parse_args(list(map(str, words)))
        evaluation.main(cli.resolve(args, evaluation.PAPER, evaluation.TINY))
        assert json.loads((tmp_path / name / "settings.json").read_text())["settings"]["template"] == name
    assert "has no chat template; prompts are plain" in capsys.readouterr().err


# Real weights, where there are some

@pytest.mark.slow
def test_a_real_model_gets_some_gsm8k_problems_right(tmp_path, real_model):
    data = Path(os.environ.get("SLM_DATA", ROOT.parent / "shared" / "data")) / "gsm8k" / "test.jsonl"
    if not data.is_file():
        pytest.skip("no GSM8K")
    run("--model", real_model("smollm2-135m-instruct"), "--data", data, "--limit", 10,
        "--max-tokens", 160, "--out", tmp_path / "r", "--dtype", "float32")
    assert len(rows(tmp_path / "r")) == 10
