"""The promises of make_data.py, the cascade and the records: nothing lost, nothing asked twice, only
verified records, one sentence for what is wrong."""

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from faulty_server import Faults, serve, solution
from scripted import Backend, Sandbox
from test_report import data as page_data

import make_data
from slm import BadInput
from slm.episode import Job, Reply, Sampling, run_episodes
from slm.problems import Problem
from slm.runs.files import Journal
from slm.sampling import Sampler
from slm.search import Node, judge, labels
from slm.teachers import records
from slm.teachers.cascade import Attempt, Progress, Teacher, read_cascade

ROOT = Path(__file__).parent.parent
KEY = "sk-very-secret-0123456789"
GOOD = "<think>\n2 and 2\n</think>\nAdd the two numbers: 2 + 2 = 4.\nTherefore, the answer is \\boxed{4}."


def write_problems(path, n):
    """n questions whose gold answer is their number."""
    rows = [{"id": f"p{i}", "question": f"Which number is {i}?", "answer": str(i)} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_number(wrong=0.3):
    """A teacher who thinks of the number asked for, and gets it wrong now and then; "hard" ones for ever."""
    def answer(body, rng):
        number = int(re.search(r"is (\d+)\?", body["messages"][-1]["content"])[1])
        hard = number % 10 == 7 and body["model"] != "great"
        number += rng.random() < wrong or hard or number % 25 == 17
        return f"<think>\nLook at it.\n</think>\n{solution('The number stands there, größer als 0.', number)}"
    return answer


def write_cascade(path, url, *teachers):
    rows = [{"name": "first", "round": 1, "model": "good"}, {"name": "second", "round": 2, "model": "great"}]
    lines = []
    for row in teachers or rows:
        row = {"base_url": url, "workers": 8, "price_in": 1.0, "price_out": 2.0, "max_tokens": 500} | row
        lines += ["[[teacher]]", *(f"{k} = {json.dumps(v)}" for k, v in row.items())]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """run(server url, problems=30, ...) -> (records, rejected, summary) of make_data in this process."""
    monkeypatch.setattr(make_data, "TESTS", ())
    monkeypatch.chdir(tmp_path)

    def run(url, *options, problems=30, teachers=()):
        data = write_problems(tmp_path / "numbers.jsonl", problems)
        cascade = write_cascade(tmp_path / "cascade.toml", url, *teachers)
        make_data.main(make_data.options().parse_args(
            ["--data", str(data), "--cascade", str(cascade), "--out", "out", *options]))
        return (*(rows(f"out/{name}.jsonl") for name in ("records", "rejected")),
                json.loads(Path("out/summary.json").read_text()))
    return run


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def attempts_of(*files):
    return [(row["id"], row["teacher"], row["attempt"]) for path in files for row in rows(path)]


# ---- what is kept ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, finish, cause", [
    (GOOD, "stop", None),
    (GOOD.replace("boxed{4}", "boxed{5}"), "stop", "wrong"),
    (GOOD.replace("\\boxed{4}", "4"), "stop", "no box"),
    (GOOD.replace("2 and 2", "it is \\boxed{4}").replace("is \\boxed{4}.", "is 4."), "stop", "no box"),
    (GOOD.replace("<think>", ""), "stop", None),
    (GOOD.replace("</think>", ""), "stop", "no think"),
    (GOOD + GOOD, "stop", "no think"),
    ("<think>\n</think>" + GOOD.split("</think>")[1], "stop", "no think"),
    ("Before. " + GOOD, "stop", "no think"),
    ("<think>2 and 2</think>\nTherefore, the answer is \\boxed{4}.", "stop", "no steps"),
    (GOOD.replace("boxed{4}", "boxed{4"), "stop", "no box"),
    (GOOD + " Or \\boxed{4}.", "stop", "several boxes"),
    (GOOD + "\nWait, 2 + 2 may be 5. I look at it once more, from the start.", "stop", "text after the box"),
    (GOOD.replace("\\boxed{4}.", "$\\boxed{4}$ apples in all.\n"), "stop", None),
    (GOOD, "length", "truncated"),
    (GOOD, "refused", "refused"),
    ("I'm sorry, I can't help with that.", "stop", "refused"),
    (GOOD.replace("2 and 2", "2 and 2 " * 3000), "stop", "too long"),
    ("", "error", "HTTP error")])
def test_only_whole_verified_solutions_are_kept(text, finish, cause):
    found = records.assess(Reply(text, finish=finish, error="x" if finish == "error" else None), "4", 500)
    assert found["cause"] == cause and (cause is None or cause in records.CAUSES)


def test_a_record_is_split_into_thinking_and_solution():
    found = records.assess(Reply(GOOD), "4", 500)
    assert (found["thinking"], found["predicted"], found["response"]) == ("2 and 2", "4", GOOD)
    assert found["solution"] == GOOD.split("</think>\n")[1]


def test_reasoning_in_a_field_of_its_own_is_put_into_tags():
    answer = GOOD.split("</think>\n")[1]
    found = records.assess(Reply(answer, thinking="2 and 2"), "4", 500)
    assert found["cause"] is None and found["response"] == GOOD
    assert records.whole_text(GOOD, "hidden") == GOOD


def test_our_own_model_may_think_without_tags_but_not_with_half_of_them():
    plain = GOOD.split("</think>\n")[1]
    assert records.assess(Reply(plain), "4", 500, needs_think=False)["cause"] is None
    assert records.assess(Reply(GOOD), "4", 500, needs_think=False)["cause"] is None
    assert records.assess(Reply("</think>" + plain), "4", 500, needs_think=False)["cause"] == "no think"


def test_records_hold_what_the_page_promises_and_only_right_answers(setup):
    with serve(by_number(), Faults()) as server:
        kept, rejected, _ = setup(server.url)
    wanted = set("id question gold source thinking solution response predicted reason teacher effort round "
                 "attempt temperature seed tokens_in tokens_out finish seconds prompt".split())
    assert all(wanted <= row.keys() for row in kept + rejected)
    assert all(row["predicted"] == row["gold"] for row in kept)
    assert all(row["cause"] in records.CAUSES for row in rejected)
    assert all("größer" in row["solution"] and row["prompt"] == "teacher/1" for row in kept)


def test_every_fault_is_counted_under_its_cause(setup):
    faults = Faults({"no_think": 0.1, "no_box": 0.1, "cut": 0.1, "refusal": 0.1, "huge": 0.02})
    with serve(by_number(), faults) as server:
        kept, rejected, summary = setup(server.url, problems=60)
    assert {"no think", "no box", "truncated", "refused", "too long", "wrong"} <= summary["causes"].keys()
    assert summary["causes"] == dict(Counter(row["cause"] for row in rejected))
    assert max(len(row["response"]) for row in rejected) <= 20_000
    total = sum(group["attempts"] for group in summary["teacher"].values())
    assert total == len(kept) + len(rejected) == summary["total"]["attempts"]
    dollars = sum(row["tokens_in"] * 1e-6 + row["tokens_out"] * 2e-6 for row in kept + rejected)
    assert summary["total"]["dollars"] == pytest.approx(dollars)
    assert sum(summary["tokens_out_of_records"].values()) == len(kept)


# ---- who is asked what -----------------------------------------------------------------------------------

def test_round_two_gets_only_what_round_one_left(setup):
    with serve(by_number(), Faults()) as server:
        kept, rejected, summary = setup(server.url, problems=50)
    asked = Counter((row["id"], row["teacher"]) for row in kept + rejected)
    first = {row["id"] for row in kept if row["teacher"] == "first"}
    second = {id for id, teacher in asked if teacher == "second"}
    assert second == {f"p{i}" for i in range(50)} - first and {"p7", "p17", "p27"} <= second
    assert all(asked[id, "first"] == 3 for id in second) and asked["p17", "second"] == 5
    unsolved = {f"p{i}" for i in range(50)} - {row["id"] for row in kept}
    assert {"p17", "p42"} <= unsolved and summary["source"]["all"]["unsolved"] == len(unsolved)
    assert len({row["id"] for row in kept}) == len(kept)  # no second solution after a right one
    cycle = {"first": (0.7, 0.5, 0.9), "second": (0.7, 0.5, 0.9, 0.3, 1.0)}
    assert all(row["temperature"] == cycle[row["teacher"]][row["attempt"] - 1] for row in kept + rejected)
    assert {row["effort"] for row in kept if row["round"] == 2} == {"high"}


def test_all_right_solutions_of_a_round_are_kept():
    rounds = {"a": 1, "b": 1, "c": 2}
    teachers = [Teacher(name, "m", "u", round, attempts=2) for name, round in rounds.items()]
    progress = Progress(teachers)
    names = lambda: [t.name for t in progress.due("p")]
    note = lambda teacher, cause, attempt=1: progress.note(
        {"id": "p", "teacher": teacher, "attempt": attempt, "cause": cause})
    assert names() == ["a", "b"]
    note("a", None)
    assert names() == ["b"]
    note("b", "wrong")
    note("b", "wrong", 2)
    assert names() == []       # solved in round 1: c is not asked
    other = Progress(teachers)
    for name, attempt in itertools.product("ab", (1, 2)):
        other.note({"id": "p", "teacher": name, "attempt": attempt, "cause": "wrong"})
    assert [t.name for t in other.due("p")] == ["c"]


def test_efforts_follow_their_ratio_and_are_drawn_once_a_problem():
    teacher = Teacher("a", "m", "u", attempts=3, temperatures=(0.7,), efforts={"low": 1, "very_high": 3})
    draw = lambda i, attempt, seed=0: Attempt(Problem(f"p{i}", "?", "1", "s"), teacher, attempt, seed).effort
    counts = Counter(draw(i, 0) for i in range(2000))
    assert 420 < counts["low"] < 580 and counts["very_high"] == 2000 - counts["low"]
    assert all(draw(i, 0) == draw(i, 2) for i in range(50))
    assert any(draw(i, 0) != draw(i, 0, 1) for i in range(50))
    teacher = Teacher("a", "m", "u", attempts=3, temperatures=(0.7,), efforts={"very_high": 1})
    attempt = Attempt(Problem("p", "Why?", "1", "s"), teacher, 0, 0)
    system, question = attempt.request().messages
    assert "2500 tokens" in system["content"] and "<think>" in system["content"]
    assert question["content"] == "Why?"


def test_our_own_model_as_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_data, "TESTS", ())
    backend = Backend(lambda text, seed, sampling: (
        f"It is plain to see.\n\\boxed{{{int(re.search(r'is ([0-9]+)', text)[1]) + seed % 2}}}"))
    backend.close = lambda: None
    monkeypatch.setattr(make_data, "own_model", lambda *_: backend)
    data = write_problems(tmp_path / "numbers.jsonl", 30)
    options = ["--teacher", "self", "--data", str(data), "--samples", "6"]
    make_data.main(make_data.options().parse_args(options))
    kept = rows("runs/data-numbers/records.jsonl")
    assert all(request.sampling.stop_at_box for request in backend.requests)  # base models ramble on
    assert len(kept) > 20 and {row["prompt"] for row in kept} == {"solver/1"}
    assert all(row["predicted"] == row["gold"] for row in kept)


def test_a_teacher_that_cannot_think_in_tags_is_asked_without(setup):
    plain = lambda body, rng: by_number(0)(body, rng).split("</think>")[1]
    with serve(plain, Faults()) as server:
        kept, _, _ = setup(server.url, teachers=[{"name": "a", "model": "m", "efforts": {}}])
    assert len(kept) == 27 and {row["prompt"] for row in kept} == {"solver/1"}
    assert {row["effort"] for row in kept} == {None} and {row["thinking"] for row in kept} == {""}


START = "[[teacher]]\nname = 'a'\nmodel = 'm'\nbase_url = 'u'\n"


@pytest.mark.parametrize("text, words", [
    ("x = 1", r"expected \[\[teacher\]\] tables"), ("[[teacher]", "not valid TOML"),
    ("[[teacher]]\nname = 'a'\nmodel = 'm'", "no base_url"),
    (START + "api_key = 'k'", "keys stay out of files"),
    (START + "colour = 1", "unknown key 'colour'"),
    (START + "attempts = 'x'", "attempts = 'x'; expected a int"),
    (START + "workers = 0", "above 0"),
    (START + "price_in = -1", "price_in = -1"),
    (START + "efforts = {huge = 1}", "very_high"),
    (START + "temperatures = [3]", "from 0 to 2"),
    (START * 2, "same name")])
def test_a_wrong_cascade_file_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words):
        read_cascade(path)
    with pytest.raises(BadInput, match="recipes/"):
        read_cascade(tmp_path / "none.toml")


def test_the_recipes_are_the_reports():
    grok, minimax = read_cascade(ROOT / "recipes" / "report.toml")
    assert (grok.round, grok.attempts, minimax.round, minimax.attempts) == (1, 3, 2, 5)
    assert grok.temperatures == (0.7, 0.5, 0.9) and minimax.temperatures == (0.7, 0.5, 0.9, 0.3, 1.0)
    assert read_cascade(ROOT / "recipes" / "local.toml") and read_cascade(ROOT / "recipes" / "tiny.toml")


def test_the_stand_in_is_not_asked_about_other_data():
    with pytest.raises(BadInput, match="recipes/report"):
        make_data.main(make_data.options().parse_args(["--data", "gsm8k"]))


# ---- never loses, never repeats --------------------------------------------------------------------------

def test_a_torn_last_line_is_repaired_wherever_it_is_torn(tmp_path):
    path = tmp_path / "j.jsonl"
    first, second = ({"id": i, "text": "größe\nzwei " * 5} for i in range(2))
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in (first, second)]
    for cut in range(len(lines[1]) + 1):
        path.write_bytes(lines[0] + lines[1][:cut])
        journal = Journal(path)
        whole = cut >= len(lines[1]) - 1  # only the line break is missing
        assert list(journal) == ([first, second] if whole else [first])
        journal.append(second)
        assert list(journal) == [first, second, second][:3 if whole else 2]
        assert path.read_bytes().endswith(b"\n")
    path.write_bytes(b'{"long": "' + b"x" * 200_000)
    assert list(Journal(path)) == [] and path.read_bytes() == b""


def test_half_a_surrogate_in_a_servers_words_is_written(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"reason": "HTTP 400 half \ud83d pair"})
    assert list(journal) == [{"reason": "HTTP 400 half ? pair"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(BadInput, match=r"j.jsonl line 2"):
        list(Journal(path))


def start(tmp_path, url, out, problems=150, *options, **env):
    """make_data.py in a process of its own."""
    data, cascade = write_problems(tmp_path / "n.jsonl", problems), write_cascade(tmp_path / "c.toml", url)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import make_data as m; m.TESTS = (); " \
           "from slm.runs import cli; cli.run(m.main, m.options().parse_args())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--data", data, "--cascade", cascade, "--out", out, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env, cwd=tmp_path)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def count(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def test_killed_five_times_it_ends_with_the_same_records(tmp_path):
    tries = {"busy": 0.02, "reset": 0.03, "torn": 0.02, "empty": 0.02, "broken": 0.03}
    faults = Faults({"no_box": 0.05}, tries, latency=0.05, retry_after=0.05)
    files = [tmp_path / "killed" / f"{name}.jsonl" for name in ("records", "rejected")]
    with serve(by_number(), faults) as server:
        for kill in range(5):
            process = start(tmp_path, server.url, tmp_path / "killed")
            wait_for(lambda n=20 + 35 * kill: count(*files) > n)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        with files[0].open("ab") as f:  # and torn, as by a full disk
            f.write(b'{"id": "p149", "question": "Wh')
        out, _ = start(tmp_path, server.url, tmp_path / "killed").communicate(timeout=300)
        answered = sum(server.answered.values())
        whole, _ = start(tmp_path, server.url, tmp_path / "whole").communicate(timeout=300)
    landed = attempts_of(*files)
    assert len(landed) == len(set(landed))                     # nothing that had landed was asked again
    assert answered - len(landed) <= 5 * 8                     # on the wire at a kill: 8 workers
    same = attempts_of(*(tmp_path / "whole" / f.name for f in files))
    assert sorted(same) == sorted(landed), (out, whole)
    texts = lambda name: [(r["id"], r["response"]) for r in rows(tmp_path / name / "records.jsonl")]
    assert texts("killed") == texts("whole") and len(texts("whole")) > 120  # in the same order, too


def test_the_records_are_in_the_order_of_the_problems_however_they_came(setup):
    with serve(by_number(), Faults(latency=0.03)) as server:
        kept, rejected, _ = setup(server.url, problems=60)
    place = lambda row: (int(row["id"][1:]), row["round"], row["attempt"])
    assert kept == sorted(kept, key=place) and len(kept) > 50
    assert rejected == sorted(rejected, key=place) and len(rejected) > 20


def test_sorting_a_journal_is_one_step_and_it_goes_on_afterwards(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    rows = [{"n": n, "text": "größe" * n} for n in (3, 1, 2)]
    for row in rows:
        journal.append(row)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *_: exit("killed"))
        with pytest.raises(SystemExit):
            journal.sort(lambda row: row["n"])
    assert list(journal) == rows
    journal.sort(lambda row: row["n"])
    journal.append({"n": 0})
    assert [row["n"] for row in Journal(journal.path)] == [1, 2, 3, 0]


def test_the_next_command_can_be_typed_where_a_folder_has_a_space(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_data, "TESTS", ())
    out = tmp_path / "lauf ä 1"
    make_data.main(make_data.options().parse_args(["--limit", "1", "--out", str(out)]))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-2:] == ["--data", str(out / "records.jsonl")] and Path(words[-1]).is_file()


def test_two_processes_on_one_output_are_refused(tmp_path):
    with serve(by_number(), Faults(latency=1000, slowest=1000)) as server:  # the first stays in the midst
        one = start(tmp_path, server.url, tmp_path / "out")
        wait_for(lambda: (tmp_path / "out" / "settings.json").exists())
        two = start(tmp_path, server.url, tmp_path / "out")
        said = two.communicate(timeout=300)[0]
        one.kill()
        one.communicate()
    assert two.returncode == 2 and "in use by another process" in said and "Traceback" not in said


def test_ctrl_c_waits_for_what_is_on_the_wire(tmp_path):
    files = [tmp_path / "out" / f"{name}.jsonl" for name in ("records", "rejected")]
    with serve(by_number(), Faults(latency=0.2)) as server:
        process = start(tmp_path, server.url, tmp_path / "out")
        wait_for(lambda: count(*files) > 20)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[0]
        assert sum(server.answered.values()) == count(*files) < 150
    assert process.returncode == 130 and "ended early" in said and "Traceback" not in said


def test_finished_work_is_not_asked_again_and_other_settings_are_refused(setup):
    with serve(by_number(), Faults()) as server:
        kept, _, summary = setup(server.url)
        asked = sum(server.seen.values())
        assert setup(server.url)[0] == kept and sum(server.seen.values()) == asked
        assert len(setup(server.url, problems=40)[0]) > len(kept)  # more problems are welcome
        with pytest.raises(BadInput, match="seed"):
            setup(server.url, "--seed", "1")
        text = Path("numbers.jsonl").read_text()
    assert summary["source"]["all"]["problems"] == 30 and "Which" in text


def test_an_attempt_that_failed_over_http_is_made_up_for(setup, monkeypatch):
    from slm.teachers import endpoint
    monkeypatch.setattr(endpoint.Endpoint.__init__, "__kwdefaults__",
                        endpoint.Endpoint.__init__.__kwdefaults__ | {"tries": 1})
    with serve(by_number(0), Faults({}, {"broken": 0.2})) as server:
        _, rejected, summary = setup(server.url)
    failed = [row for row in rejected if row["cause"] == "HTTP error"]
    assert failed and failed[0]["reason"] == "HTTP 500 Internal Server Error, 1 times"
    assert summary["causes"]["HTTP error"] == len(failed)
    with serve(by_number(0), Faults()) as server:
        kept, _, _ = setup(server.url)
    assert {row["id"] for row in kept} == {f"p{i}" for i in range(30)} - {"p17"}


def test_only_the_attempt_that_failed_over_http_is_made_up_for():
    teacher = Teacher("a", "m", "u", attempts=3, temperatures=(0.7,))
    progress, landed = Progress([teacher]), [{"id": "p", "teacher": "a", "attempt": k, "cause": "wrong"}
                                             for k in (2, 3)]
    for row in landed:
        progress.note(row)
    assert progress.due("p") == [teacher]
    assert progress.missing("p", "a") == 0  # and not the last one again
    progress.note(landed[0] | {"attempt": 1})
    assert progress.due("p") == []


# ---- a good client ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["steps", "verifier"])
def test_options_of_teachers_are_refused_where_the_model_writes(what):
    for words in (["--budget", "3"], ["--teacher", "self"], ["--cascade", "x.toml"]):
        with pytest.raises(BadInput, match=f"{what}: --model writes"):
            make_data.main(make_data.options().parse_args([what, *words]))


def test_a_budget_below_zero_is_refused(capsys):
    with pytest.raises(SystemExit):
        make_data.options().parse_args(["--budget", "-1"])
    assert "--budget: '-1' is not a number from 0" in capsys.readouterr().err


def test_the_budget_stops_cleanly_and_a_larger_one_goes_on(setup, capsys):
    with serve(by_number(), Faults()) as server:
        kept, _, summary = setup(server.url, "--budget", "0.02", problems=200)
        assert 0.0185 < summary["total"]["dollars"] <= 0.02 and summary["source"]["all"]["open"] > 20
        assert "the budget of $0.02" in capsys.readouterr().out
        more, _, summary = setup(server.url, "--budget", "5", problems=200)
    assert all(row in more for row in kept) and "open" not in summary["source"]["all"]
    ids = attempts_of("out/records.jsonl", "out/rejected.jsonl")
    assert len(ids) == len(set(ids))


def test_a_dead_teacher_is_one_sentence_and_keeps_what_landed(setup):
    with serve(by_number(), Faults()) as server:
        teachers = [{"name": "alive", "model": "good"},
                    {"name": "dead", "model": "x", "base_url": "http://127.0.0.1:9/v1"}]
        with pytest.raises(BadInput, match="no connection"):
            setup(server.url, teachers=teachers)
        landed = sum(server.answered.values())
    assert len(attempts_of("out/records.jsonl", "out/rejected.jsonl")) == landed


@pytest.mark.parametrize("rate, kept", [(1.0, False), (0.5, True)])
def test_problems_whose_attempts_failed_over_http_are_not_unsolved(setup, monkeypatch, capsys, rate, kept):
    from slm.teachers import endpoint
    monkeypatch.setattr(endpoint.Endpoint.__init__, "__kwdefaults__",
                        endpoint.Endpoint.__init__.__kwdefaults__ | {"tries": 1})
    monkeypatch.setattr(endpoint, "GIVE_UP_AFTER", 10**9)
    with serve(by_number(0), Faults({}, {"broken": rate})) as server:
        records_, rejected, summary = setup(server.url)
    said = capsys.readouterr().out
    failed = {row["id"] for row in rejected} - {row["id"] for row in records_}
    wrong = {id for id in failed if all(r["cause"] != "HTTP error" for r in rejected if r["id"] == id)}
    assert summary["source"]["all"]["open"] == len(failed - wrong) > 0
    assert summary["source"]["all"].get("unsolved", 0) == len(wrong)
    assert "HTTP 500 Internal Server Error" in said and "the same command goes on" in said
    assert ("next: python train_sft.py" in said) == bool(records_) == kept
    with serve(by_number(0), Faults()) as server:
        _, _, summary = setup(server.url)
    assert "open" not in summary["source"]["all"] and summary["source"]["all"]["unsolved"] == 1  # p17


def test_counts_that_cannot_be_do_not_end_a_run_or_its_next_start(setup):
    with serve(by_number(), quirk="negative usage") as server:
        kept, _, summary = setup(server.url)
        assert kept and summary["total"]["tokens_out"] > 0 and summary["total"]["tokens_in"] == 0
        written = Path("out/records.jsonl").read_text()
        Path("out/records.jsonl").write_text(written.replace('"tokens_in": 0', '"tokens_in": -7').replace(
            '"tokens_out": ', '"tokens_out": -'))  # as an older version wrote them
        setup(server.url)


def test_a_paid_answer_that_is_no_use_is_in_the_budget(setup, capsys):
    with serve(by_number(), quirk="ends with error") as server:
        with pytest.raises(BadInput, match="broke off"):
            setup(server.url, "--budget", "0.05", problems=100)
        bodies = len(server.bodies)
    landed = rows("out/rejected.jsonl")
    assert {row["cause"] for row in landed} == {"HTTP error"} and all(row["tokens_out"] > 0 for row in landed)
    assert bodies <= 3 * 100


def test_ctrl_c_ends_a_pause_that_the_server_asks_for(tmp_path):
    """A 429 with an hour of Retry-After: all workers wait, and nothing is on the wire."""
    with serve(by_number(), quirk="an hour") as server:
        process = start(tmp_path, server.url, tmp_path / "out")
        lines = iter(process.stdout.readline, "")
        assert any("all requests wait 60 minutes" in line for line in lines)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "ended early: stopped" in said and "Traceback" not in said
    assert "HTTP error" not in (tmp_path / "out" / "rejected.jsonl").read_text()  # what was dropped is due


def test_the_key_is_in_no_file_and_on_no_screen(tmp_path):
    data, cascade = write_problems(tmp_path / "n.jsonl", 20), tmp_path / "c.toml"
    with serve(by_number(), Faults()) as server:
        write_cascade(cascade, server.url, {"name": "a", "model": "good", "key_env": "TEACHER_KEY"})
        said = subprocess.run(
            [sys.executable, str(ROOT / "make_data.py"), "--data", str(data), "--cascade", str(cascade),
             "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {"TEACHER_KEY": KEY, "SLM_DATA": str(tmp_path), "SLM_CACHE": str(tmp_path),
                              "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"})
    assert said.returncode == 0, said
    everything = said.stdout + said.stderr + "".join(f.read_text() for f in (tmp_path / "out").iterdir())
    assert "records.jsonl" in everything and KEY not in everything


# ---- leaks and the summary -------------------------------------------------------------------------------

def brute_force(question, tests, n=13):
    """Whether two texts share n words in a row, or are the same, by comparing all pairs of windows."""
    words = lambda text: re.findall("[a-z0-9]+", text.lower())
    windows = lambda w: {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}
    q = words(question)
    return any(q == words(t) or windows(q) & windows(words(t)) for t in tests)


def test_overlap_is_what_comparing_all_windows_finds():
    rng = random.Random(0)
    text = lambda: " ".join(rng.choice("a b C 7".split()) for _ in range(rng.randint(8, 40)))
    tests = [text() for _ in range(8)]
    leaks = records.Leaks({"t": tests})
    found = []
    for _ in range(300):
        question = text()
        if rng.random() < 0.3:
            part = rng.choice(tests).split()
            at = rng.randint(0, max(0, len(part) - 13))
            question += ", " + " ".join(part[at:at + rng.choice((11, 12, 13, 14))]).upper() + "! " + text()
        found.append(leaks.find(question) is not None)
        assert found[-1] == brute_force(question, tests)
    assert 30 < sum(found) < 290
    assert leaks.find(tests[0].upper() + "?")["kind"] == "exact"


def test_overlapping_problems_are_named_and_never_asked(setup, monkeypatch):
    monkeypatch.setattr(make_data, "TESTS", ("set",))
    test_set = [Problem("t", "Which number is 3 ?", "3", "set")]
    monkeypatch.setattr(make_data, "load", lambda name, split: test_set)
    with serve(by_number(0), Faults()) as server:
        kept, rejected, summary = setup(server.url)
    assert "p3" not in {row["id"] for row in kept + rejected}
    assert summary["overlaps"] == {"p3": {"set": "set", "kind": "exact", "text": "Which number is 3?"}}
    assert summary["compared with"] == ["set"]
    assert summary["source"]["all"]["overlapping"] == 1 and summary["source"]["all"]["asked"] == 29
    assert "Which number is 3?" in json.dumps(page_data(Path("out/report.html")))


def test_the_reports_table_comes_out():
    """7,473 -> 7,350 of GSM8K and 12,000 -> 11,596 of MATH: 18,946 of 19,473 kept, 2.71 % unsolved."""
    sizes = {"gsm8k": 7473, "math": 12000}
    problems = [Problem(f"{s}{i}", "?", "1", s) for s, n in sizes.items() for i in range(n)]
    kept = {f"gsm8k{i}" for i in range(7350)} | {f"math{i}" for i in range(11596)}
    row = lambda p: {"id": p.id, "teacher": "t", "effort": "medium", "round": 1, "tokens_in": 100,
                     "tokens_out": 700, "cause": None if p.id in kept else "wrong"}
    summary = records.summarize(problems, {}, set(), map(row, problems), {"t": (0.2, 0.5)})
    every = summary["source"]["all"]
    assert [every[k] for k in ("problems", "solved", "unsolved", "unsolved %")] == [19473, 18946, 527, 2.71]
    assert summary["source"]["gsm8k"]["solved"] == 7350 and summary["source"]["math"]["unsolved"] == 404
    assert summary["total"]["dollars"] == pytest.approx(19473 * (100 * 0.2 + 700 * 0.5) / 1e6)
    assert summary["tokens_out_of_records"] == {"512+": 18946}
    assert summary["headline"] == "19,473 problems -> 18,946 solved, 2.71 % unsolved, $7.2050"


def test_data_takes_commas_and_spaces():
    data = lambda *words: make_data.options().parse_args(["--data", *words]).data
    assert data("gsm8k,math") == data("gsm8k", "math") == ["gsm8k", "math"]


def test_it_runs_with_no_arguments_and_names_the_next_command(tmp_path):
    said = subprocess.run([sys.executable, str(ROOT / "make_data.py"), "--limit", "40"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert said.returncode == 0, said
    assert "next: python train_sft.py --model tiny --data runs/data-tiny/records.jsonl" in said.stdout
    kept = rows(tmp_path / "runs/data-tiny/records.jsonl")
    assert len(kept) > 30 and {row["effort"] for row in kept} >= {"low", "medium", "high"}


# ---- verifier data ---------------------------------------------------------------------------------------

def test_verifier_records_are_balanced_and_their_problems_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_data, "TESTS", ())

    def solve(text, seed, sampling):
        number = int(re.search(r"is ([0-9]+)", text)[1]) + (seed % 3 > 0)
        return f"```python\nprint({number})\n```" if "Python" in text else f"I see.\n\\boxed{{{number}}}"

    backend = Backend(solve, batch=50)
    backend.close = lambda: None
    monkeypatch.setattr(make_data, "own_model", lambda *_: backend)
    data = write_problems(tmp_path / "numbers.jsonl", 60)
    args = make_data.options().parse_args(["verifier", "--data", str(data)])
    make_data.main(args)
    asked = len(backend.requests)
    sides = {name: rows(f"runs/verifier-numbers/{name}.jsonl") for name in ("train", "test")}
    for side in sides.values():
        labels = Counter(row["label"] for row in side)
        assert labels["CORRECT"] == labels["INCORRECT"] > 2
        for row in side:
            solution = row["messages"][0]["content"]
            number = re.search(r"boxed\{(\d+)\}|```output\n(\d+)\n```", solution)
            assert ((number[1] or number[2]) == row["gold"]) == (row["messages"][1]["content"] == "CORRECT")
    assert not {r["id"] for r in sides["train"]} & {r["id"] for r in sides["test"]}
    assert any(row["run"] for row in sides["train"]) and any(row["run"] is None for row in sides["train"])
    assert "right and" in capsys.readouterr().out
    make_data.main(args)
    assert len(backend.requests) == asked == 240


# ---- labels of steps -------------------------------------------------------------------------------------

class Adder(Backend):
    """Writes four lines that add 0, or in one of four cases 1, then a box with the sum: once a 1 is added no
    answer is right. Dies with the answer number `dies`."""
    answered, dies = 0, 0

    def close(self):
        self.queue = []

    def answer(self, request, i):
        self.answered += 1
        if self.answered == self.dies:
            raise KeyboardInterrupt
        question, said = request.messages[0]["content"], "".join(m["content"] for m in request.messages[1:])
        text = f"add {int(random.Random(request.sampling.seed).random() < 0.25)}\n"
        if said.count("\n") == 4:
            text = f"\\boxed{{{int(re.search(r'is ([0-9]+)', question)[1]) + said.count('1')}}}"
        return Reply(text, [ord(c) for c in text], [-0.5] * len(text), ("stop", "stop_string")["add" in text],
                     self.prompt_ids(request.messages))


@pytest.fixture
def label(tmp_path, monkeypatch):
    """label(*options, dies=0) runs make_data.py steps on 10 problems -> its backend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_data, "TESTS", ())
    data = write_problems(tmp_path / "numbers.jsonl", 10)

    def run(*options, dies=0):
        backend = Adder(None, "shuffled", batch=200)
        backend.dies = dies
        monkeypatch.setattr(make_data, "own_model", lambda *_: backend)
        words = ["steps", "--data", str(data), "--step-rule", "line", "--samples", "2", "--out", "all"]
        make_data.main(make_data.options().parse_args([*words, *options]))
        return backend
    return run


def by_step(path):
    """(problem, sample, step) -> the weight of CORRECT."""
    shares = Counter()
    for row in rows(path):
        said = row["messages"][-1]
        shares[row["id"], row["sample"], row["step"]] += said["weight"] * (said["content"] == "CORRECT")
    return dict(shares)


def solutions_of(run):
    return {(row["id"], row["sample"]): row for row in rows(f"{run}/completions.jsonl") if row["step"] == 0}


def test_a_step_is_as_right_as_the_completions_from_it(label):
    label("--completions", "16")
    solutions = solutions_of("all")
    hard, soft = by_step("all/hard.jsonl"), by_step("all/soft.jsonl")
    assert hard.keys() == soft.keys() and len(hard) % 5 == 0 and len(hard) > 70
    means = {step: [] for step in range(1, 6)}
    for (id, sample, step), share in soft.items():
        steps = solutions[id, sample]["steps"]
        assert hard[id, sample, step] == (share > 0)
        spoilt = any("1" in text for text in steps[:min(step, 4)])
        assert share == 0 if spoilt else step < 5 or share == 1
        means[step] += [] if spoilt else [share]
    for step, shares in means.items():  # the rest must be added without a 1, too
        assert sum(shares) / len(shares) == pytest.approx(0.75 ** max(0, 4 - step), abs=0.12)
    said = [row["messages"][-1] for row in rows("all/soft.jsonl")]
    weights = {(message["content"], message["weight"]) for message in said}
    assert {("INCORRECT", 1 - w) for label, w in weights if label == "CORRECT" and w < 1} == {
        (label, w) for label, w in weights if label == "INCORRECT" and w < 1} != set()


def test_halving_finds_what_labels_of_all_steps_say(label):
    label("--completions", "8")
    label("--out", "halves", "--bisect")
    everything, halves = rows("all/completions.jsonl"), rows("halves/completions.jsonl")
    assert solutions_of("all") == solutions_of("halves")
    assert all(row in everything for row in halves) and len(halves) < len(everything) / 2
    hard, found, monotone = by_step("all/hard.jsonl"), by_step("halves/hard.jsonl"), 0
    for key in solutions_of("all"):
        full = [hard[*key, step] for step in range(1, 6) if (*key, step) in hard]
        if full == sorted(full, reverse=True):  # else chance decides which step is called the first wrong one
            wrong = (full + [0]).index(0)
            assert [found[*key, step] for step in range(1, 6) if (*key, step) in found] == full[:wrong + 1]
            monotone += bool(full)
    assert monotone > 10


def test_halving_finds_every_first_error_with_few_labels():
    for count in range(1, 18):
        for wrong in range(1, count + 1):
            found = {}
            while todo := labels.due(count, False, found, bisect=True):
                step, = todo
                found[step] = 3 * (step < wrong)
            assert min([step for step, right in found.items() if not right], default=count) == wrong
            assert 2 ** (len(found) - 1) < count
        assert labels.due(count, True, {}, bisect=True) == []
        assert labels.due(count, False, {1: 0}, bisect=False) == list(range(2, count))


@pytest.mark.parametrize("options", [[], ["--bisect"]], ids=["all", "halves"])
def test_labels_of_a_run_that_was_killed_again_and_again_are_those_of_an_unbroken_one(label, options):
    options = [*options, "--completions", "3"]
    label("--out", "whole", *options)
    deaths = 0
    for dies in itertools.count(70, 30):
        try:
            label(*options, dies=dies)
            break
        except KeyboardInterrupt:
            deaths += 1
            with Path("all/completions.jsonl").open("a") as f:
                f.write('{"id": "p3", "sam')
    for name in ("completions", "hard", "soft"):
        assert Path(f"all/{name}.jsonl").read_bytes() == Path(f"whole/{name}.jsonl").read_bytes()
    assert deaths > 1
    assert not label(*options).requests


def test_a_verifier_is_trained_on_what_a_search_will_ask_it(label):
    label("--completions", "2")
    asked = {(row["id"], row["sample"], row["step"]): row["messages"] for row in rows("all/hard.jsonl")}
    row = solutions_of("all")["p0", 0]
    nodes = [Node(text="".join(row["steps"][:step])) for step in range(1, 6)]

    def verify(question):
        yield from judge(question, nodes)

    backend = Backend(None)
    run_episodes([Job("p", "Which number is 0?", verify)], backend)
    for step, request in enumerate(backend.requests, 1):
        *messages, said = asked[row["id"], row["sample"], step]
        assert request.messages == messages and said["content"] in request.continuations


def test_code_before_the_step_is_run_again_for_what_follows(tmp_path):
    first = "```python\nx = 6\nprint(x)\n```\n"
    steps = [first + "```output\n6\n```\n", "```python\nprint(x * 7)\n```\n"]
    texts = iter(["```python\nprint(x * 7)\n```\n", "So \\boxed{42}."])

    def write(last, seed, sampling):
        text = next(texts)
        return Reply(text, [ord(c) for c in text], finish="stop_string" if "```" in text else "stop")

    row = {"id": "p", "sample": 0, "steps": steps, "ends": [len(steps[0])], "ids": list(map(ord, steps[0]))}
    args, journal = make_data.options().parse_args(["steps"]), Journal(tmp_path / "completions.jsonl")
    args.completions, sandbox, backend = 1, Sandbox(), Backend(write)
    run_episodes([Job("p", "Q?", labels.rest_of(journal, row, 1, args))], backend, sandbox)
    assert [row["answers"] for row in journal] == [["42"]]
    assert backend.requests[1].messages[1]["content"] == steps[0] + steps[1] + "```output\n42\n```\n"
    assert backend.requests[0].messages[1]["content"] == steps[0] and len(sandbox.codes) == 2


def test_completions_go_on_from_the_ids_that_were_sampled_and_share_them(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    sampler, computed = Sampler(model, tokenizer), []
    hidden = sampler.network.hidden
    monkeypatch.setattr(sampler.network, "hidden",
                        lambda ids, *rest: computed.append(len(ids)) or hidden(ids, *rest))
    journal, args = Journal(tmp_path / "completions.jsonl"), make_data.options().parse_args(["steps"])
    question, text = "What is 2 + 3?", "First things first.\nWell,"
    prompt = tokenizer.chat([make_data.user(make_data.prompts.SOLVER(question=question))])
    ids = prompt + tokenizer.encode(text)
    row = {"id": "p", "sample": 0, "steps": [text, "more"], "ends": [len(ids)], "ids": [*ids, 5, 6]}
    args.completions = 6
    episode, = run_episodes([Job("p", question, labels.rest_of(journal, row, 1, args))], sampler,
                            sampling=Sampling(8, 3.0), fixed=True)
    first = [turn.reply for turn in episode.turns[:6]]
    assert all(reply.prompt_ids == ids for reply in first)
    assert len({tuple(reply.ids) for reply in first}) > 1  # drawn apart
    assert computed[0] == len(ids) and max(computed[1:]) < len(ids)  # six of them, computed once
    assert [row["step"] for row in journal] == [1]


def test_labels_by_hand():
    row = {"steps": ["3 + 4 = 7\n", "7 * 2 = 15\n", "\\boxed{15}"], "right": False, "found": {1: 2, 2: 0}}
    args = make_data.options().parse_args(["steps", "--completions", "4"])
    assert labels.labels_of(row, args) == {"hard": {1: 1, 2: 0, 3: 0}, "soft": {1: 0.5, 2: 0, 3: 0}}
    args.bisect = True
    assert labels.labels_of(row, args)["hard"] == {1: 1, 2: 0}
    row |= {"right": True, "found": {}}
    assert labels.labels_of(row, args) == {"hard": {1: 1, 2: 1, 3: 1}, "soft": {3: 1}}
