"""Each workflow behaves as its description says, on scripted replies; the comparison and the command line."""

import doctest
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import Backend, Sandbox, problem

import agents
import slm.episode
import slm.grading.replies
import slm.workflows
from slm import BadInput
from slm.answers import answer_record
from slm.episode import Episode, Reply, Sampling, Turn, jobs_for, run_episodes
from slm.grading import blocks_of, printed, verdict
from slm.runs import cli
from slm.search import SEARCHES
from slm.workflows import WORKFLOWS, settle, shown, stated, tally

ROOT = Path(__file__).parent.parent
CODE = "```python\nprint({})\n```"


def play(name, script, question="Q?", gold="4"):
    """Run one workflow; script(role, nth ask of that role, prompt) -> text. Returns (episode, requests)."""
    asked = {}

    def reply(prompt, seed, sampling):
        role = ("checker" if "Is this solution right" in prompt else "verifier" if "Proposed answer" in prompt
                else "summarizer" if prompt.startswith(("Problem: Q?\nSolution", "A check")) else "solver")
        asked[role] = asked.get(role, -1) + 1
        return script(role, asked[role], prompt)

    backend = Backend(reply)
    episode, = run_episodes(jobs_for([problem("p", question, gold)], WORKFLOWS[name]), backend, Sandbox())
    return episode, backend.requests


def answers(*texts, checker="INCORRECT"):
    """A script whose solver gives these boxed answers in turn and whose checker always says the same."""
    def script(role, n, prompt):
        return f"so \\boxed{{{texts[n]}}}" if role == "solver" else checker
    return script


# ---- majority vote ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, wins", [
    (("1", "2", "2", "2", "1"), "2"),          # more than half
    (("1", "2", "2", "3", "4"), "1"),          # two of five are no majority: the first run stands
    (("1", "2", "0.5", "1/2", "\\frac{1}{2}"), "0.5"),  # equivalent answers count together
    (("1", "", "", "2", "2"), "2"),            # of those that answered
    (("", "3", "2", "2", "3"), "3"),           # the first has none: the most frequent, the earlier in a tie
])
def test_majority_vote(given, wins):
    def script(role, n, prompt):
        return f"\\boxed{{{given[n]}}}" if given[n] else "?"
    episode, requests = play("majority_vote", script)
    assert episode.answer == wins and len(episode.turns) == 5
    assert [r.sampling.temperature for r in requests] == [0.0, 0.7, 0.7, 0.7, 0.7]
    assert len({r.sampling.seed for r in requests[1:]}) == 4
    assert episode.first_answer == (given[0] or None)


# ---- code ------------------------------------------------------------------------------------------------

def test_python_tools_answers_with_what_the_code_printed():
    episode, _ = play("python_tools", lambda *_: CODE.format("6 * 7") + "\nso \\boxed{41}")
    assert (episode.answer, episode.runs[0].outcome.stdout) == ("42", "42\n")


@pytest.mark.parametrize("code", [
    "", CODE.format("1 / 0"), CODE.format("'done'"), "```python\nwhile True: pass\n```"])
def test_python_tools_falls_back_on_the_box(code):
    assert play("python_tools", lambda *_: code + "\\boxed{41}")[0].answer == "41"


def test_python_tools_stops_the_model_before_it_invents_the_output():
    _, requests = play("python_tools", lambda *_: CODE.format(1))
    assert requests[0].sampling.stop == ("```output",) and not requests[0].sampling.stop_at_box


def test_blocks_share_their_variables_and_functions_see_them():
    first = "```python\nx = 3\ndef f(n): return x if n == 0 else f(n - 1)\n```"
    assert play("python_tools", lambda *_: f"{first} then {CODE.format('f(2) * 4')}")[0].answer == "12"


def test_with_tools_accepts_when_an_independent_second_solution_agrees():
    episode, requests = play("solver_checker_with_tools", lambda role, n, _: CODE.format([8, "16 / 2"][n]))
    assert episode.answer == "8" and len(requests) == 2
    assert [r.sampling.temperature for r in requests] == [0.0, 0.7]
    assert requests[0].messages == requests[1].messages  # the checker sees no answer


def test_with_tools_retries_on_disagreement_and_keeps_the_first_answer_when_none_is_reached():
    episode, requests = play("solver_checker_with_tools", lambda role, n, _: CODE.format(n))
    assert (episode.answer, len(episode.turns)) == ("0", 10)
    assert "found 0, but a second one found 1" in requests[2].messages[0]["content"]


def test_with_tools_takes_no_answer_of_the_checker_as_no_agreement():
    script = ["\\boxed{5}", "no idea", CODE.format(6), CODE.format(6)]
    assert play("solver_checker_with_tools", lambda role, n, _: script[n])[0].answer == "6"


# ---- solver and checker ----------------------------------------------------------------------------------

def test_stateless_ends_at_the_first_accepted_answer():
    def script(role, n, prompt):
        return ["\\boxed{3}", "\\boxed{4}"][n] if role == "solver" else ["INCORRECT", "CORRECT"][n]
    episode, requests = play("solver_checker_stateless", script)
    assert (episode.first_answer, episode.answer, episode.drafts) == ("3", "4", ["3", "4"])
    assert [len(r.messages) for r in requests] == [1] * 4
    assert [r.sampling.temperature for r in requests] == [0, 0, 0.7, 0]
    assert "found 3, but a check says it is wrong" in requests[2].messages[0]["content"]
    assert "Q?" in requests[1].messages[0]["content"] and "\\boxed{3}" in requests[1].messages[0]["content"]


def test_stateless_without_acceptance_settles():
    assert play("solver_checker_stateless", answers("1", "2", "3", "4", "5"))[0].answer == "1"
    assert play("solver_checker_stateless", answers("1", "2", "2", "2", "5"))[0].answer == "2"
    assert play("solver_checker_stateless", answers("1", "2", "2", "2", "1"))[0].answer == "1"


def test_stateless_does_not_ask_the_checker_about_no_answer():
    def script(role, n, prompt):
        return ["I cannot say.", "\\boxed{4}"][n] if role == "solver" else "CORRECT"
    episode, requests = play("solver_checker_stateless", script)
    assert episode.answer == "4" and len(requests) == 3
    assert "no final answer" in requests[1].messages[0]["content"]


def test_chat_appends_to_one_conversation_and_ends_with_the_last_answer():
    episode, requests = play("solver_checker_chat", answers("1", "2", "3", "4", "5"))
    solver = [r for r in requests if len(r.messages) > 1 or "Proposed" not in r.messages[0]["content"]]
    assert [len(r.messages) for r in solver] == [1, 3, 5, 7, 9]
    assert episode.answer == "5" and len(episode.records(["solver"])) == 1


def test_trivial_chat_keeps_question_and_history_in_every_prompt():
    script = answers("1", "2", "3", "4", "5", checker="It is off. VERDICT: INCORRECT")
    episode, requests = play("trivial_chat", script)
    assert "[SOLVER]: so \\boxed{1}\n[CHECKER]: It is off." in requests[2].messages[0]["content"]
    assert all("Q?" in r.messages[0]["content"] for r in requests) and episode.answer == "1"


def test_summarizer_gives_the_solver_a_digest_of_the_critique():
    def script(role, n, prompt):
        if role == "summarizer":
            return "The second sum is off, add again."
        return answers("1", "2", "3", "4", "5", checker="7 + 8 is 15. VERDICT: INCORRECT")(role, n, prompt)
    episode, requests = play("solver_checker_summarizer", script)
    assert "solution says: 7 + 8 is 15." in requests[2].messages[0]["content"]
    assert "The second sum is off, add again." in requests[3].messages[0]["content"]
    assert {t.role for t in episode.turns} == {"solver", "checker", "summarizer"}


def test_summarizer_chat_ends_on_agreement_with_a_fresh_solution():
    given = ["1", "2", "4", "4"]
    episode, requests = play("summarizer_chat", lambda role, n, _: f"\\boxed{{{given[n]}}}")
    assert episode.answer == "4" and [len(r.messages) for r in requests] == [1, 1, 3, 1]
    assert "found 1, but a second one found 2" in requests[2].messages[-1]["content"]


def test_plan_and_reflection_takes_the_answer_given_twice():
    assert play("plan_and_reflection", answers("1", "1"))[0].answer == "1"
    assert play("plan_and_reflection", answers("1", "2", "2"))[0].answer == "2"
    assert play("plan_and_reflection", answers("1", "2", "3"))[0].answer == "1"


def test_base_votes_when_nothing_was_accepted():
    assert play("base", answers("1", "2", "3", "2", "4"))[0].answer == "2"
    _, requests = play("base", answers("1", "2", "3", "2", "4", checker="Hm."))
    assert "not clear" in requests[2].messages[0]["content"]


def test_solver_verifier_accepts_what_code_and_box_agree_on():
    episode, requests = play("solver_verifier", lambda *_: CODE.format("2 * 4") + "\\boxed{8}")
    assert episode.answer == "8" and len(requests) == 1


@pytest.mark.parametrize("words, answer", [(["VERIFIED"], "8"), (["FAILED", "VERIFIED"], "9")])
def test_solver_verifier_tests_the_output_then_the_box(words, answer):
    def script(role, n, prompt):
        return CODE.format(8) + "\\boxed{9}" if role == "solver" else CODE.format(repr(words[n]))
    episode, _ = play("solver_verifier", script)
    assert episode.answer == answer and len(episode.turns) == 1 + len(words)


def test_solver_verifier_says_what_failed():
    def script(role, n, prompt):
        return [CODE.format("1 / 0"), CODE.format(4) + "\\boxed{4}"][n]
    episode, requests = play("solver_verifier", script)
    assert "ZeroDivisionError" in requests[1].messages[0]["content"] and episode.answer == "4"


def test_code_feedback_shows_the_output_in_the_next_turn():
    def script(role, n, prompt):
        return [CODE.format(4) + CODE.format("1 / 0") + "\\boxed{3}", "Then \\boxed{4}"][n]
    episode, requests = play("code_feedback", script)
    assert (episode.first_answer, episode.answer) == ("3", "4")
    assert "4\nZeroDivisionError" in requests[1].messages[-1]["content"] and len(requests[1].messages) == 3
    record, = episode.records()
    assert 0 in record.mask[record.mask.index(1):]  # the output in between is not trained on
    assert play("code_feedback", lambda *_: "no code, \\boxed{3}")[0].answer == "3"


def test_code_feedback_continues_the_turn_of_a_model_that_stopped_for_the_output():
    def reply(prompt, seed, sampling):
        if not prompt.endswith("```output\n4\n```\n"):
            ids = [ord(c) for c in CODE.format(4) + "\n```output"]
            return Reply(CODE.format(4) + "\n", ids, [-0.5] * len(ids), "stop_string", [7])
        return "So \\boxed{4}"
    backend = Backend(reply)
    episode, = run_episodes(jobs_for([problem("p", "Q?")], WORKFLOWS["code_feedback"]), backend, Sandbox())
    assert episode.answer == "4"
    assert [m["role"] for m in backend.requests[1].messages] == ["user", "assistant"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_survives_babble_and_failed_calls(name):
    babble = ("", "I", "```python\n", "\\boxed{", "CORRECT INCORRECT", CODE.format("1 / 0"), "\\boxed{}" * 50)
    for text in babble:
        episode, _ = play(name, lambda *_, text=text: text)
        assert episode.answer is not None or episode.error
    jobs = jobs_for([problem("p", "long" * 99)], WORKFLOWS[name])
    episode, = run_episodes(jobs, Backend(lambda *_: "", context=9), Sandbox())
    assert "context" in episode.error


@pytest.mark.parametrize("name", [n for n in WORKFLOWS if WORKFLOWS[n] not in SEARCHES and n not in (
    "python_tools", "solver_checker_with_tools", "solver_verifier", "code_feedback")])
def test_workflows_without_tools_share_the_greedy_first_call(name):
    p, memo, calls = problem("p", "Q?", "4"), {}, []
    for workflow in ("solver", name):
        backend = Backend(lambda prompt, seed, sampling: f"\\boxed{{{seed if sampling.temperature else 4}}}")
        episode, = run_episodes(jobs_for([p], WORKFLOWS[workflow]), backend, Sandbox(), memo=memo)
        calls.append(backend.requests)
    assert len(calls[0]) == 1 and episode.first_answer == "4"
    assert not any(r.messages == calls[0][0].messages and r.sampling.temperature == 0 for r in calls[1])


# ---- the helpers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("stdout, answer", [
    ("3\n18.0\n", "18.0"), ("The answer is 12 eggs\n", "12"), ("x = 5", "5"), ("total: 1,250\n\n", "1,250"),
    ("0.30000000000000004", "0.3"), ("2.6666666666666665", "2.666666667"), ("sqrt(2)/2", "sqrt(2)/2"),
    ("(3, 4)", "(3, 4)"), ("7\ndone", "7"), ("7/3", "7/3"), ("$18", "18"), ("done", None), ("", None),
    ("-4", "-4"), ("[1, 2]", "[1, 2]"), ("x**2 + 1", "x**2 + 1"), ("It is 3 + 4 eggs", "4"),
    ("12:30", "12:30")])
def test_the_answer_that_code_printed(stdout, answer):
    assert printed(SimpleNamespace(stdout=stdout, error=None, timed_out=False)) == answer


def test_failed_code_has_no_answer_and_its_output_is_cut():
    assert printed(None) is None
    assert printed(SimpleNamespace(stdout="5", error="NameError: x", timed_out=False)) is None
    assert printed(SimpleNamespace(stdout="5", error=None, timed_out=True)) is None
    assert len(shown(SimpleNamespace(stdout="5" * 9999, error=None, timed_out=False))) == 1000
    assert "NameError" in shown(SimpleNamespace(stdout="5" * 9999, error="NameError", timed_out=False))


@pytest.mark.parametrize("text, blocks", [
    ("no code", []), ("```\nx = 1\n```", ["x = 1\n"]), ("```python\nx = 1", ["x = 1"]),
    ("```\nout\n```\n```py\nx\n```", ["x\n"]), ("```python\n\n```", []), ("```output\n5\n```", []),
    ("```python\na\n```\n```output\n1\n```\n```python\nb\n```", ["a\n", "b\n"])])
def test_code_is_found_in_fences(text, blocks):
    assert blocks_of(Reply(text)) == blocks


FENCES = [  # what CommonMark calls a fence
    "``` python\nx\n```", '```python title="a"\nx\n```', "```Python3 {1,2}\nx\n```",
    "```{.python}\nx\n```", "~~~python\nx\n```\n~~~", '````python\ns = """\n```\n"""\n````',
    "```\nx\n`````\ny", "```json\n{}\n```\n```\nx\n```", "   ```python\n   x\n     y\n   ```",
    "1. Do\n\n   ```python\n   if x:\n       y\n   ```\n2. More", "- ```py\n  x\n  ```",
    "10) a\n    ````python\n    x\n    `````", "* a\n  * b\n    ```python\n    x\n\n    y\n    ```",
    "> ```python\n> if x:\n>     y\n> ```\nz", "Use ```x``` here\n```\ny\n```", "```print(1)```",
    '```python\ns = "```"\n```', "```python", "~~~\n~~~",
    '```python\ndef f():\n    """\n    ```\n    """\n    return 1\n```',
    '```python\nprint("""```python\nx = 1\n```""")\n```']


@pytest.mark.parametrize("text", FENCES)
def test_fences_are_those_of_commonmark(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    tokens = [token for token in markdown.parse(text) if token.type == "fence" and token.content]
    fences = [(token.info, token.content) for token in tokens]
    python = [code for info, code in fences if re.match(r"\W*py", info, re.I)]
    assert blocks_of(Reply(text)) == (python or [code for info, code in fences if not info])


@pytest.mark.parametrize("text, blocks", [  # any indentation, words around
    ("1. So:\n     ```python\n     if x:\n         y\n     ```", ["if x:\n    y\n"]),
    ("```python\n    if x:\n        y\n    z\n```", ["if x:\n    y\nz\n"]),
    ("1. ```python\nif x:\n  y\n```", ["if x:\n  y\n"]),
    ("  ```python\nif x:\n  y\n  ```", ["if x:\n  y\n"]),
    ("\t```python\n\tif x:\n\t\ty\n\t```", ["if x:\n\ty\n"]), ("```python\r\nx\r\n```\r\n", ["x\r\n"]),
    ("So: ```python\nx\n```", ["x\n"]), ("The `f` in ```\nx\n```", ["x\n"]), ("```python\nx```\ny", ["x"]),
    ("```python\nx\n``` is it.\n```\ny\n```", ["x\n"]),
    ("```python\nx\n```output\n5\n```\n```python\ny\n```", ["x\n", "y\n"]),
    ("```python\nx\n``````python\ny\n```", ["x\n", "y\n"]),
    ("```python\nx\n``` then ```python\ny\n``` it is.", ["x\n", "y\n"]),
    ("```python\nx\n```python\ny\n", ["x\n", "y\n"]),
    ('```python\ns = """```\na\n```"""\n```', ['s = """```\na\n```"""\n'])])
def test_fences_that_models_write_are_understood(text, blocks):
    assert blocks_of(Reply(text)) == blocks


def test_fences_of_any_text_are_found_in_linear_time():
    for piece in "`", "```\n", "~~~ a\n", "> ", "1. ", "a`", "``a":
        start = time.process_time()
        blocks_of(Reply(piece * 40_000)), blocks_of(Reply("```python\n" + piece * 40_000))
        assert time.process_time() - start < 5  # a square would be minutes


def test_numbers_of_code_are_no_answers_whatever_its_fence():
    assert stated("It is 5:\n~~~python\nprint(7)\n~~~") is None


def test_code_cut_by_the_token_limit_is_not_run():
    assert blocks_of(Reply("```python\nx = 1\n```\n```python\nprint(x * 10", finish="length")) == ["x = 1\n"]


@pytest.mark.parametrize("text, said", [
    ("CORRECT", True), ("INCORRECT", False), ("incorrect.", False), ("The solution is correct.", True),
    ("", None), ("It is not correct", False), ("VERDICT: CORRECT", True), ("maybe", None),
    ("At first CORRECT, then INCORRECT", False), ("INCORRECT. Let's correct it: 9 is correct", False),
    ("2 + 2 = 4.\nCORRECT", True), ("Correct answer: 5. This is INCORRECT", False), ("**CORRECT**", True),
    ("That is wrong. VERDICT: CORRECT", True), ("Verdict: **Incorrect**, it is CORRECT to add", False),
    ("Yes", True), ("**No**, it is 5.", False), ("yes, it looks right", True), ("No, it looks right", False),
    ("No errors: this is right", True), ("Yes. VERDICT: INCORRECT", False), ("Not sure", None),
    ("Nobody knows", None), ("It is right.", True), ("\n# VERDICT\n\nCORRECT", True),
    ("Yesterday it was CORRECT, today INCORRECT", False), ("不正确", None), ("`INCORRECT`", False)])
def test_verdicts(text, said):
    assert verdict(text) is said


def test_votes_and_settling():
    assert tally(["1/2", "3", "0.5", None, "3", "3"]) == [("3", 3), ("1/2", 2)]
    assert settle([None, "2", "5"]) == "5" and settle([None, None]) is None and settle(["1"]) == "1"


def test_the_examples_in_the_docstrings():
    for module in (agents, slm.episode, slm.workflows, slm.grading.replies):
        assert not doctest.testmod(module).failed


# ---- the command line ------------------------------------------------------------------------------------

def test_the_table_counts_improved_degraded_and_failures():
    problems = [problem(f"p{i}", f"Q{i}?", "4") for i in range(4)]
    script = {"Q0?": "4", "Q1?": "5", "Q2?": "4", "Q3?": "?"}

    def reply(prompt, seed, sampling):
        given = script[prompt[:3]]
        return "I cannot say." if given == "?" else f"\\boxed{{{4 if sampling.temperature else given}}}"

    backend = Backend(reply)
    results, memo = {}, {}
    for name in ("solver", "majority_vote"):
        jobs = jobs_for(problems, WORKFLOWS[name])
        episodes = run_episodes(jobs, backend, memo=memo, sampling=Sampling(50))
        records = [answer_record(p, e) for p, e in zip(problems, episodes)]
        alone = results.get("solver", {}).get("right")
        results[name] = {**agents.summary(records, alone), "seconds": 1.0}
    vote = results["majority_vote"]
    assert vote["right"] == [True, True, True, False] and (vote["improved"], vote["degraded"]) == (1, 0)
    assert vote["over_solver"][0] == pytest.approx(0.25)
    text = agents.table(results, 4)
    assert re.search(r"majority_vote +75\.0 .*\+25\.0 \[.*50\.0 +1 +0 +5\.0", text)
    assert "1 without an answer" in text
    assert "Q0?" in agents.transcript(agents.whole_record(problems[0], episodes[0]))


@pytest.mark.parametrize("name, asks", [("majority_vote@3", 3), ("solver_checker_stateless@2", 4)])
def test_a_name_with_a_budget_is_the_workflow_with_that_second_argument(name, asks):
    script = answers("1", "2", "3")
    backend = Backend(lambda prompt, seed, sampling: "INCORRECT" if "Is this solution right" in prompt
                      else script("solver", len(backend.requests) % 3, prompt))
    episode, = run_episodes(jobs_for([problem("p", "Q?", "4")], slm.workflows.workflow(name)), backend)
    assert episode.workflow == name and len(episode.turns) == asks


@pytest.mark.parametrize("name, said", [("solver@2", "has no budget"), ("oracle@2", "no such workflow"),
                                        ("dvts@0", "budget is '0'"), ("dvts@", "budget is ''"),
                                        ("dvts@x", "budget is 'x'")])
def test_a_budget_that_a_workflow_cannot_have_is_refused(name, said):
    with pytest.raises(BadInput, match=said):
        slm.workflows.workflow(name)


def test_budgets_run_each_workflow_that_has_one_beside_the_control():
    assert list(agents.chosen("dvts,code_feedback", ["2", "8"])) == [
        "solver", "self_consistency@2", "self_consistency@8", "dvts@2", "dvts@8", "code_feedback"]
    with pytest.raises(BadInput, match="--budget -1: expected"):
        agents.chosen("dvts", ["-1"])


def test_two_workflows_of_one_name_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def solver(question):\n    return (yield [])\n")
    with pytest.raises(BadInput, match="two of them have one name"):
        agents.chosen(f"{tmp_path}/a.py:solver", [])
    with pytest.raises(BadInput, match="two of them have one name"):
        agents.chosen(f"{tmp_path}/a.py:solver,{tmp_path}/b.py:solver", [])


def test_a_budget_is_compared_with_the_smallest_vote_that_takes_as_many_tokens():
    def row(tokens, *right):
        return {"tokens": tokens, "right": list(map(bool, right))}

    text = agents.against_control({
        "solver": row(10, 0, 0, 0, 0), "self_consistency@2": row(20, 0, 0, 0, 1),
        "self_consistency@4": row(40, 0, 0, 1, 1), "dvts@1": row(20, 1, 0, 0, 1),
        "dvts@2": row(21, 1, 0, 0, 1), "dvts@8": row(99, 1, 1, 1, 1)})
    found = re.findall(r"(\S+) +(\d+) tokens +([+-][\d.]+) .* over (\S+), (\d+) tokens", text)
    assert found == [("dvts@1", "20", "+25.0", "self_consistency@2", "20"),
                     ("dvts@2", "21", "+0.0", "self_consistency@4", "40"),
                     ("dvts@8", "99", "+50.0", "self_consistency@4", "40")]


def test_what_a_verifier_reads_for_a_score_is_spent_too():
    turns = [Turn("solver", [], Reply("x", ids=[1, 2, 3], logprobs=[-1.0] * 3, prompt_ids=[9] * 50)),
             Turn("verifier", [], Reply("", prompt_ids=[9] * 7, finish="score", scores={"Yes": -1.0}))]
    assert Episode("p", "best_of_n", turns=turns).tokens_spent == 3 + 7


@pytest.mark.parametrize("arguments, message", [
    (["--workflow", "oracle"], "oracle"), (["--limit", "0"], "--limit"), (["--nonsense"], "--nonsense"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl")])
def test_bad_input_is_one_sentence_and_exit_2(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, "agents.py", "--out", str(tmp_path / "run"), *arguments], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_script_compares_workflows_and_keeps_every_episode(tmp_path):
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "agents.py", "--limit", "2", "--max-tokens", "8", "--show", "1",
                           "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["solver", *agents.TINY["workflow"].split(",")]
    assert all(re.search(rf"^{name} +[0-9.]+ ", done.stdout, re.M) for name in names)
    rows = [json.loads(line) for line in (out / "episodes.jsonl").open()]
    assert [row["workflow"] for row in rows] == [name for name in names for _ in range(2)]
    assert set(json.loads((out / "table.json").read_text())) == set(names)
    assert (out / "report.html").is_file()
    assert json.loads((out / "settings.json").read_text())["settings"]["limit"] == 2


def test_a_stopped_comparison_goes_on_without_asking_twice(tmp_path, monkeypatch, capsys):
    data = tmp_path / "doubles.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}", "answer": 2 * i}) + "\n" for i in range(5)))
    asked = []

    def reply(text, seed, sampling):
        asked.append(text)
        return f"\\boxed{{{2 * int(text.split()[0])}}}"

    def run(out, *more):
        asked.clear()
        backend = Backend(reply)
        backend.close = lambda: None
        monkeypatch.setattr(agents, "open_backend", lambda args: (backend, {}))
        words = ["--data", data, "--workflow", "majority_vote", "--out", tmp_path / out, *more]
        args = agents.options().parse_args(list(map(str, words)))
        agents.main(cli.resolve(args, agents.PAPER, agents.TINY))
        table = json.loads((tmp_path / out / "table.json").read_text())
        return {name: {**row, "seconds": 0} for name, row in table.items()}

    whole = run("whole")
    assert len(asked) == 5 + 5 * 4  # the greedy call is shared
    table = tmp_path / "whole" / "table.json"
    table.write_text(table.read_text().replace('"seconds": ', '"seconds": 1000'))
    assert run("whole", "--resume") == whole and not asked
    assert all(row["seconds"] >= 1000 for row in json.loads(table.read_text()).values())  # a finished run's
    run("cut")
    log = tmp_path / "cut" / "episodes.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:7]) + b'\n{"problem_id": "dou')
    assert run("cut", "--resume") == whole
    assert len(asked) == 3 * 5
    assert len(log.read_text().splitlines()) == 10
    with pytest.raises(BadInput, match="--resume"):
        run("cut")


def test_an_adapter_serves_its_role_and_no_other(tiny, tmp_path):
    import torch

    from slm import lora
    from slm.formats import lora_files
    model, _ = tiny
    lora.add(model, r=4)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, 0, 0.5)
    lora_files.save(model, tmp_path, base="tiny")
    texts = {}
    for given in ((), (f"checker={tmp_path}",), (str(tmp_path),)):
        backend, adapters = agents.open_backend(SimpleNamespace(
            endpoint=None, model="tiny", device="cpu", dtype="float32", adapter=given, workflow="all"))
        episode, = run_episodes(jobs_for([problem("p", "2 + 2?")], WORKFLOWS["solver"]), backend,
                                sampling=Sampling(12), adapters=adapters)
        texts[given and given[0][:7]] = episode.turns[0].reply.ids
    alone, checker, everyone = texts.values()
    assert alone == checker != everyone
