"""examples/: each file does what its first line says."""

from pathlib import Path

import pytest
from scripted import Backend, problem

from slm import BadInput, problems, prompts, workflows
from slm.episode import Reply, jobs_for, run_episodes
from slm.rewards import Rules, reward_of
from slm.runs import cli

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKFLOW = f"{EXAMPLES / 'workflow.py'}:second_thought"


@pytest.mark.parametrize("name, asks", [(WORKFLOW, 2), (f"{WORKFLOW}@3", 4)])
def test_the_workflow_runs_by_the_name_of_its_file(name, asks):
    backend = Backend(lambda prompt, seed, sampling: f"\\boxed{{{3 if 'Check' in prompt else 4}}}")
    fn = workflows.workflow(name)
    episode, = run_episodes(jobs_for([problem("p", "Q?", "3")], fn), backend)
    assert (episode.first_answer, episode.answer, len(episode.turns)) == ("4", "3", asks)
    assert episode.workflow == fn.__name__ == "second_thought" + "@3" * (asks == 4)


@pytest.mark.parametrize("name, said", [
    (f"{EXAMPLES / 'workflow.py'}:other", "KeyError"), ("nowhere.py:f", "FileNotFoundError"),
    ("nowhere.py", "no such workflow"), (f"{EXAMPLES / 'reward.py'}:brief", "no function with a yield"),
    (f"{EXAMPLES / 'workflow.py'}:second_thought@0", "budget is '0'")])
def test_a_workflow_file_that_is_wrong_is_named(name, said):
    with pytest.raises(BadInput, match=said):
        workflows.workflow(name)


@pytest.mark.parametrize("body, said", [
    ("reply = yield Ask('solver', [user(question)])\n    int('x' + reply.text)", r":4: ValueError: inv"),
    ("yield 5", r":3: TypeError: 5; expected Ask"),
    ("yield [Ask('solver', [user(question)]), 'x']", r":3: TypeError: x; expected Ask"),
    ("yield Ask('solver', question)", r":3: TypeError: .*messages.*\[user\("),
    ("raise SystemExit(0)\n    yield", r":3: SystemExit")])
def test_an_error_in_ones_own_workflow_is_one_sentence_with_its_line(tmp_path, body, said):
    (tmp_path / "mine.py").write_text("from slm.episode import Ask, user\n"
                                      f"def mine(question):\n    {body}\n")
    fn = workflows.workflow(f"{tmp_path}/mine.py:mine")
    with pytest.raises(BadInput, match=r"mine\.py" + said):
        run_episodes(jobs_for([problem("p", "Q?", "3")], fn), Backend(lambda *_: "no number"))


def test_a_failed_ask_is_no_error_of_ones_own_workflow(tmp_path):
    (tmp_path / "mine.py").write_text("from slm.episode import Ask, user\n"
                                      "def mine(question):\n    yield Ask('solver', [user(question)])\n")
    fn = workflows.workflow(f"{tmp_path}/mine.py:mine")
    backend = Backend(lambda *_: Reply("", finish="error", error="the server is gone"))
    episode, = run_episodes(jobs_for([problem("p", "Q?", "3")], fn), backend)
    assert episode.error == "the server is gone"


def test_the_reward_is_paid():
    episode, = run_episodes(jobs_for([problem("p", "Q?", "4")], workflows.solver),
                            Backend(lambda *_: "\\boxed{4}" + "x" * 91))
    file = EXAMPLES / "reward.py"
    rules = Rules({"correct": 1.0, f"{file}:brief": 0.5})
    assert episode.tokens_out == 100
    assert reward_of(episode, problem("p", "Q?", "4"), rules)[0] == pytest.approx(1 + 0.5 * 0.5)


def test_the_problems_of_four_shapes_are_read():
    found = problems.load(str(EXAMPLES / "problems.jsonl"))
    assert [p.gold for p in found] == ["42", "15", "16", "32"]
    assert found[3].question == "What is 2 to the power of 5?"


def test_the_prompt_is_what_the_solver_is_asked():
    try:
        prompts.use(cli.prompt_file(str(EXAMPLES / "prompt.txt")))
        backend = Backend(lambda *_: "\\boxed{4}")
        run_episodes(jobs_for([problem("p", "How much is $4?", "4")], workflows.solver), backend)
    finally:
        prompts.use("solver/1")
    assert backend.requests[0].messages[0]["content"] == (
        "How much is $4?\nLet us think step by step and output the final answer within \\boxed{}.")
