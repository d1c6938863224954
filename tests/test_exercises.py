"""exercises/: a check accepts the solution, and neither the file as it comes nor a typical wrong one."""

import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import solutions
import torch

from exercises.__main__ import main
from exercises.checks import EXERCISES, FOLDER, NotYet, judge
from slm import prompts
from slm.episode import Ask, user
from slm.grading import equal, extract, grade
from slm.runs import files

ROOT = Path(__file__).parents[1]
NUMBERS = range(1, len(EXERCISES) + 1)
# What stands in a file that nobody has worked on, where it is not NotImplementedError.
UNTOUCHED = {3: "ids[:, None]", 10: 'FIRST = ""'}


def check(number: int, **changed) -> None:
    EXERCISES[number - 1].check(SimpleNamespace(**vars(solutions) | changed))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_accepted(number):
    check(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_file_as_it_comes_is_not_solved(number):
    exercise = EXERCISES[number - 1]
    if UNTOUCHED.get(number, "raise NotImplementedError") not in (FOLDER / exercise.file).read_text():
        pytest.skip("somebody has worked on it")
    state, said = judge(exercise)
    assert state == ("not yet" if number == 3 else "open") and said


# ---- typical wrong solutions ------------------------------------------------------------------------------

def lenient_reward(episode, problem):
    return 1 / (1 + episode.tokens_out) if grade(episode.response, problem.gold).correct else -1.0


def third_always(question):
    prompt = [user(prompts.SOLVER(question=question))]
    replies = yield [Ask("solver", prompt), *[Ask("solver", prompt, {"temperature": 0.7})] * 2]
    return extract(replies[0].text)


def asks(again: dict, alike=equal):
    """Two Asks, the second with the sampling `again`, and a third if these are not alike; the last stands."""
    def workflow(question):
        prompt = [user(prompts.SOLVER(question=question))]
        replies = [(yield Ask("solver", prompt)), (yield Ask("solver", prompt, again))]
        if not alike(*(extract(reply.text) or "" for reply in replies)):
            replies.append((yield Ask("solver", prompt, {"temperature": 0.7})))
        return extract(replies[-1].text)
    return workflow


def mean_over_all(logits, ids, mask):
    return solutions.mean_loss(logits, ids, mask) * sum(mask) / len(mask)


def mask_of_the_next(logits, ids, mask):
    logp = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return -(logp * mask[:-1]).sum() / mask[:-1].sum()


def without_the_end(tokenizer, messages):
    ids, mask = solutions.encode(tokenizer, messages)
    return ids, [trained * (id != tokenizer.end_of_turn) for id, trained in zip(ids, mask)]


def shifted_by_one(tokenizer, messages):
    ids, mask = solutions.encode(tokenizer, messages)
    return ids, [*mask[1:], 0]


def last_turn_only(tokenizer, messages):
    prompt = tokenizer.chat(messages[:-1])
    reply = [*tokenizer.encode(messages[-1]["content"]), tokenizer.end_of_turn]
    return prompt + reply, [0] * len(prompt) + [1] * len(reply)


def kept_if(right, key=lambda reply: reply.text):
    def kept(gold, replies, at_most):
        found = {}
        for reply in sorted(replies, key=lambda reply: reply.tokens_out):
            if right(reply, gold):
                found.setdefault(key(reply), reply)
        return list(found.values())[:at_most]
    return kept


def boxed(reply, gold):
    return grade(reply.text, gold, strict=True).correct


def without_r(weight, A, B, alpha):
    return weight + (alpha * B @ A).to(weight.dtype)


def in_place(weight, A, B, alpha):
    weight += alpha / len(A) * B @ A
    return weight


def in_bfloat16(weight, A, B, alpha):
    return weight + alpha / len(A) * B.to(weight.dtype) @ A.to(weight.dtype)


def unpaired(a, b, rounds, seed):
    toss = random.Random(seed)
    means = sorted(sum(toss.choices(b, k=len(b))) / len(b) - sum(toss.choices(a, k=len(a))) / len(a)
                   for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]


def ninety_percent(a, b, rounds, seed):
    gains, toss = [y - x for x, y in zip(a, b)], random.Random(seed)
    means = sorted(sum(toss.choices(gains, k=len(gains))) / len(gains) for _ in range(rounds))
    return means[int(0.05 * rounds)], means[int(0.95 * rounds)]


def with_k(rewards, lengths):
    spread = rewards.std(correction=0)
    return (rewards - rewards.mean()) / (spread + 1e-8) / lengths / len(rewards)


def by_token(rewards, lengths):
    return solutions.grpo(rewards, lengths) * lengths * len(rewards) / lengths.sum()


def by_the_longest(rewards, lengths, max_tokens):
    return solutions.dr_grpo(rewards, lengths, int(lengths.max()))


def the_other_way(logp, ref):
    return solutions.k3(ref, logp)


def over_the_reference(estimator, policy, ref):
    return (ref.exp() * estimator(policy, ref)).sum()


def through_the_draw(estimator, logits, ref):
    logp = logits.log_softmax(-1)
    return torch.autograd.grad((logp.exp() * estimator(logp, ref)).sum(), logits)[0]


def asserted_inside(code, calls, sandbox):
    tests = "\n".join(f"assert {call} == {value!r}" for call, value in calls)
    return float(not sandbox.run([code, tests]).error)


def all_in_one_run(code, calls, sandbox):
    outcome = sandbox.run([code, *(f"print(repr({call}))" for call, _ in calls)])
    lines = outcome.stdout.splitlines()
    return sum(line == repr(value) for line, (_, value) in zip(lines, calls)) / len(calls)


@torch.no_grad()
def without_a_cache(model, prompt, stop_ids, max_tokens):
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), solutions.Cache())
        ids.append(int(model.logits(hidden[-1:]).argmax()))
    return ids[len(prompt):]


@torch.no_grad()
def one_place_early(model, prompt, stop_ids, max_tokens):
    attend, ids, new, place = solutions.Cache(), [], prompt, 0
    while len(ids) < max_tokens and not (ids and ids[-1] in stop_ids):
        hidden = model(torch.tensor(new), torch.arange(place, place + len(new)), attend)
        place = len(prompt) + len(ids) - 1
        new = [int(model.logits(hidden[-1:]).argmax())]
        ids += new
    return ids


MODEL = "tests/test_model.py::test"
WRONG = [  # exercise, what is wrong in it, a part of what the check says
    (1, {"reward": lambda episode, problem: -episode.tokens_out}, "a wrong answer of 3 tokens earns"),
    (1, {"reward": files.load(str(ROOT / "examples/reward.py"))["brief"]}, "of 5,000 tokens 0"),
    (1, {"reward": lenient_reward}, "a right answer without a box of 3 tokens earns"),
    (1, {"reward": lambda episode, problem: float(episode.solved)}, "a right answer of 20 tokens earns 1"),
    (2, {"third_if_needed": third_always}, "3 Asks, expected 2"),
    (2, {"third_if_needed": asks({})}, "two greedy Asks are one"),
    (2, {"third_if_needed": asks({"temperature": 1.0}, str.__eq__)}, "1/2, 0.5: 3 Asks"),
    (2, {"third_if_needed": asks({"temperature": 1.0})}, "4, 5, 6: it stands by 6, expected 4"),
    (3, {"mean_loss": mean_over_all}, "losses.score says"),
    (3, {"mean_loss": mask_of_the_next}, "losses.score says"),
    (4, {"encode": without_the_end}, "trained are"),
    (4, {"encode": shifted_by_one}, "trained are"),
    (4, {"encode": last_turn_only}, "trained are"),
    (4, {"encode": lambda tokenizer, talk: solutions.encode(tokenizer, talk[:2])}, "the ids say"),
    (5, {"kept": kept_if(lambda reply, gold: grade(reply.text, gold).correct)}, "without a box was kept"),
    (5, {"kept": kept_if(boxed)}, "cut at its limit was kept"),
    (5, {"kept": kept_if(lambda reply, gold: reply.finish == "stop" and boxed(reply, gold))}, "same words"),
    (6, {"merge": without_r}, "outputs differ"),
    (6, {"merge": in_place}, "the old weight has changed"),
    (6, {"merge": in_bfloat16}, "are not the sum rounded once"),
    (7, {"interval": unpaired}, "compared with itself"),
    (7, {"interval": ninety_percent}, "expected about"),
    (7, {"interval": lambda a, b, rounds, seed: solutions.interval(b, a, rounds, seed)}, "expected about"),
    (8, {"grpo": with_k}, "grpo of the rewards"),
    (8, {"grpo": by_token}, "grpo of the rewards"),
    (8, {"dr_grpo": by_the_longest}, "dr_grpo of the rewards"),
    (9, {"k3": the_other_way}, "the mean of k3"),
    (9, {"k3": lambda logp, ref: logp - ref}, "k3 is negative"),
    (9, {"expected": over_the_reference}, "the mean of k1"),
    (9, {"pull": through_the_draw}, "k1 as a loss pulls nowhere"),
    (10, {"ONLY_THE_FIRST": "tests/test_model.py"}, "expected something like"),
    (10, {"ONLY_THE_FIRST": f"{MODEL}_nothing"}, "there is no test"),
    (10, {"ONLY_THE_FIRST": f"{MODEL}_config_round_trip"}, "with the first break this test passes"),
    (10, {"ONLY_THE_SECOND": solutions.ONLY_THE_FIRST}, "with the first break this test fails"),
    (11, {"share_right": asserted_inside}, "were in the sandbox"),
    (11, {"share_right": all_in_one_run}, "fails for 3"),
    (12, {"greedy": without_a_cache}, "after the prompt the model saw"),
    (12, {"greedy": one_place_early}, "the sampler writes"),
    (12, {"greedy": lambda *given: solutions.greedy(*given)[:-1]}, "the sampler writes"),
]


@pytest.mark.parametrize("number, changed, said", WRONG, ids=[f"{n}-{k}" for k, (n, *_) in enumerate(WRONG)])
def test_a_wrong_solution_is_told_what_is_wrong(number, changed, said):
    with pytest.raises(NotYet, match=re.escape(said)):
        check(number, **changed)


def test_every_exercise_has_a_wrong_solution():
    assert {number for number, *_ in WRONG} == set(NUMBERS)


# ---- what a person types and reads ------------------------------------------------------------------------

def test_a_line_says_what_each_file_lacks(tmp_path, capsys):
    shutil.copy(FOLDER / "e05_records.py", tmp_path)
    for name, source in {"e01_reward.py": "def reward(episode, problem):\n    return 1 + None\n",
                         "e02_workflow.py": "def third_if_needed(\n",
                         "e04_mask.py": "def mask():\n    pass\n",
                         "e06_merge.py": "def merge(*_):\n    pass\n",
                         "e09_kl.py": "def k3(logp, ref):\n    return (ref - logp).exp() - 1 - (ref - logp)\n"
                                      "def expected(*_):\n    raise NotImplementedError\npull = expected\n",
                         "e08_dr_grpo.py": (ROOT / "tests" / "solutions.py").read_text()}.items():
        (tmp_path / name).write_text(source)
    assert main(["1", "2", "4", "5", "6", "8", "9"], tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" 1  not yet  exercises/e01_reward.py: line 2: TypeError: unsupported")
    assert lines[1].startswith(" 2  not yet  exercises/e02_workflow.py: line 1: SyntaxError: '('")
    assert lines[2] == " 4  not yet  exercises/e04_mask.py: encode is not there any more"
    assert lines[3] == " 5  open     exercises/e05_records.py: kept: nothing is written yet"
    assert lines[4].startswith(" 6  not yet  exercises/e06_merge.py: what it returns does not fit: Att")
    assert lines[5] == " 8  solved   exercises/e08_dr_grpo.py"
    assert lines[6] == " 9  open     exercises/e09_kl.py: expected: nothing is written yet"
    assert lines[7] == "1 of 7 solved; docs/exercises.md says what to do"
    assert main(["8"], tmp_path) == 0
    assert main(["13"], tmp_path) == 2 and "expected numbers from 1 to 12" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_called_that(tmp_path, capsys):
    assert main(["1"], tmp_path) == 1
    assert "e01_reward.py: the file can't be read: FileNotFoundError" in capsys.readouterr().out


def test_ctrl_c_in_a_loop_of_ones_own_names_the_file(tmp_path, capsys):
    (tmp_path / "e01_reward.py").write_text("def reward(episode, problem):\n    raise KeyboardInterrupt\n")
    assert main(["1"], tmp_path) == 130
    assert capsys.readouterr().err == "\nstopped in exercises/e01_reward.py\n"


def test_the_page_has_a_part_for_each():
    page = (ROOT / "docs/exercises.md").read_text()
    parts = re.split(r"^## (?=\d)", page, flags=re.M)[1:]
    assert len(parts) == len(EXERCISES) == 12
    for number, (part, exercise) in enumerate(zip(parts, EXERCISES), 1):
        assert part.startswith(f"{number}. ") and f"`python -m exercises {number}`" in part
        assert f"`exercises/{exercise.file}`" in part
        assert f"python -m exercises {number}\n" in (FOLDER / exercise.file).read_text()
    for path in re.findall(r"`([\w/]+/[\w.]+\.(?:py|md))`", page):
        assert (ROOT / path).exists(), path
