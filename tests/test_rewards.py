"""What an episode earns, part by part, by values worked out by hand."""

import hashlib
import itertools
import json
import random
import re
import statistics
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from scripted import Backend
from small import write_small

import train_grpo
from slm import BadInput, losses, problems, rewards
from slm.episode import CodeRun, Episode, Reply, Turn, jobs_for, run_episodes
from slm.grading import equal, equations, grade
from slm.problems import Problem
from slm.rewards import Rules, reward_of, rules_of
from slm.sandbox import Outcome
from slm.workflows import code_feedback, python_tools, solver_checker_chat

TWELVE = Problem("p", "7 + 5?", "12", "test")
GOOD = "<think>\n7 + 5 = 12.\n</think>\nAdding the two gives 7 + 5 = 12.\nSo the answer is \\boxed{12}."


def episode(text="", finish="stop", tokens=5, error=None, runs=(), sample=0):
    reply = Reply(text, [3] * tokens, [-1.0] * tokens, finish=finish, error=error)
    return Episode("p", turns=[Turn("solver", [], reply)], response=text, sample=sample,
                   runs=[CodeRun(0, "", outcome) for outcome in runs])


def part(name, given, **rules):
    return reward_of(given, TWELVE, Rules({name: 1.0}, **rules))[0]


# ---- the default -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("no_box", [-1.0, -0.5, -0.1, 0.0, 0.3])
def test_the_default_reward_is_the_one_from_before_there_were_parts(no_box):
    rules = rules_of(train_grpo.options().parse_args(["--no-box", str(no_box), "--max-tokens", "9"]))
    texts = ["So \\boxed{12}.", "So \\boxed{13}.", "It is 12.", "", GOOD, "\\boxed{}", "\\boxed{24/2}",
             "\\boxed{1} \\boxed{12}", "\\boxed{1}, no, wait, that was a slip of mine: \\boxed{12}",
             "\\boxed{12", "\\boxed{12}<|im_start|>user"]
    for text, finish in itertools.product(texts, ("stop", "length")):
        result = grade(text, "12", strict=True)
        expected = ((no_box, "no box") if result.answer is None else
                    (1.0 if result.correct else -1.0, result.reason))
        given = episode(text, finish)
        assert reward_of(given, TWELVE, rules) == expected
        assert given.parts == {"correct": expected[0]} and given.solved == result.correct


def test_an_episode_that_solved_nothing_is_not_solved_whatever_it_earned():
    given = episode("It is 12.")
    assert reward_of(given, TWELVE, Rules({"correct": 1.0}, no_box=1.0))[0] == 1.0 and not given.solved


def test_parts_are_weighed_and_kept_apart():
    given = episode(GOOD)
    reward, _ = reward_of(given, TWELVE, Rules({"correct": 2.0, "format": 0.25, "length": 0.0}, max_tokens=5))
    assert reward == 2.25 and given.parts == {"correct": 1.0, "format": 1.0, "length": -1.0}
    given = episode("\\boxed{13}")
    assert reward_of(given, TWELVE, Rules({"correct": 2.0, "format": 0.25, "box": 0.5}))[0] == -1.5


# ---- the parts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, earned", [
    ("\\boxed{13}", 1), ("12", 0), ("\\boxed{}", 0), ("\\boxed{12} or \\boxed{13}", 0),
    ("```python\nprint('\\boxed{12}')\n```", 0), ("```python\nprint('\\boxed{12}')\n```\n\\boxed{1}", 1)])
def test_box_wants_one_box_outside_of_code(text, earned):
    assert part("box", episode(text)) == earned


@pytest.mark.parametrize("text, earned", [
    (GOOD, 1), (GOOD.replace("{12}", "{13}"), 1),
    (GOOD.replace("7 + 5 = 12.\n</think>", "\n</think>"), 0), (GOOD.replace("<think>", "", 1), 1),
    (GOOD.partition("</think>")[2], 0), (GOOD + "\n<think>more</think>", 0),
    ("<think>\n7 + 5 = 12.\n</think>\n\\boxed{12}", 0), (GOOD + " \\boxed{12}", 0), (GOOD + " " + GOOD, 0),
    (GOOD + "<|im_end|>\n<|im_start|>user\nMore?", 0), (GOOD.replace("\\boxed{12}", "12"), 0)])
def test_format_wants_thinking_once_steps_and_one_box_at_the_end(text, earned):
    assert part("format", episode(text)) == earned


def test_format_is_not_kept_by_a_reply_without_an_end():
    assert part("format", episode(GOOD, finish="length")) == 0


@pytest.mark.parametrize("text, earned", [
    ("2 + 3 = 5", 1), ("2 + 3 = 6", 0), ("2 + 3 = 5 and 5 * 4 = 21", 1 / 2), ("no step", 0), ("x = 5", 0),
    ("22 + 15 = 30 + 7 = 37 nuts", 1), ("22 + 15 = 30 + 6 = 36", 1 / 2), ("0.1 + 0.2 = 0.3", 1),
    ("1/3 + 1/3 = 0.67", 0), ("10 / 4 = 2.5", 1), (r"$\frac{1}{2} + \frac{1}{3} = \frac{5}{6}$", 1),
    ("$5 + $6 = $11", 1), ("1,000 + 2,500 = 3,500", 1), (r"\(3 \times 4 = 12\)", 1), ("3 x 4 = 12", 1),
    ("48/2 = <<48/2=24>>24", 1), ("2 + 3 = 5\n2 + 3 = 5\n2 + 3 = 5\n1 + 1 = 3", 1 / 2), ("2^3 = 8", 1),
    ("1. 3 + 4 = 7\n- 2 * 3 = 6\n* 9 - 4 = 5", 1), ("2(3 + 4) = 14", 1), ("So: -3 + 5 = 2", 1)])
def test_steps_is_the_share_of_true_equations(text, earned):
    assert part("steps", episode(text)) == pytest.approx(earned)


@pytest.mark.parametrize("text", [
    "2x + 3 = 7", "x + 3 * 2 = 7", "x - 3 + 5 = 4", "3 + 4 = 7x", "3 + 4 = x", "2 + 3 = ?", "50 * 20% = 10",
    r"\sqrt{16} + 3 = 7", r"3 \cdot 4 = 12\pi", "f(3) + 4 = 7", "5! + 2 = 122", "5 = 5", "a + b = c",
    "3 + 4 =", "= 7", "3 apples + 4 pears = 7 fruits", "if a == 3 + 4 == 7:", "(-5) = 5"])
def test_what_is_no_step_in_numbers_is_not_judged(text):
    assert equations(text) == []


def test_random_steps_are_judged_as_fractions_judge_them():
    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choice([str(draw.randint(0, 999)), f"{draw.uniform(0, 20):.2f}"]) for _ in "ab")
        sign = draw.choice("+-*/")
        if Fraction(b) or sign != "/":
            value = eval(f"Fraction({a!r}) {sign} Fraction({b!r})", {"Fraction": Fraction})
            shown = value + draw.choice([0, 0, 1, Fraction(1, 100)])
            text = f"{shown.numerator}/{shown.denominator}" if shown >= 0 else str(float(round(shown, 4)))
            true = Fraction(text) == value
            assert part("steps", episode(f"So {a} {sign} {b} = {text}, as said.")) == true


def test_every_step_of_the_worked_solutions_is_true():
    found = [step for p in problems.load("tiny", "train", 250) for step in equations(p.solution)]
    assert len(found) > 1000 and all(equal(a, b) for a, b in found)


def test_steps_of_long_and_hostile_texts_are_found_at_once():
    for text in ("1 + 1 = 2\n" * 5000, "\n" * 50_000, "(" * 20_000 + "1 + 1 = 2", "9^" * 5000 + "9 = 9",
                 "1 + " * 10_000 + "1 = 2", "$" * 50_000, "\\frac{" * 9000):
        assert len(equations(text)) <= 1
    assert len(equations("\n".join(f"{n} + 1 = {n + 1}" for n in range(50_000)))) == 256  # the first ones


RAN, FAILED, STUCK = Outcome("12\n"), Outcome(error="NameError: x"), Outcome("12", timed_out=True)


@pytest.mark.parametrize("runs, text, code, agrees", [
    ([RAN], "\\boxed{12}", 1, 1), ([RAN], "\\boxed{13}", 1, 0), ([FAILED], "\\boxed{12}", 0, 0),
    ([STUCK], "\\boxed{12}", 0, 0), ([], "\\boxed{12}", 0, 0), ([FAILED, RAN], "\\boxed{12.0}", 1 / 2, 1),
    ([RAN, FAILED], "\\boxed{12}", 1 / 2, 0), ([RAN], "no box", 1, 0)])
def test_code_that_ran_and_agrees_with_the_answer(runs, text, code, agrees):
    assert part("code", episode(text, runs=runs)) == code
    assert part("agrees", episode(text, runs=runs)) == agrees


def test_what_a_checker_said_and_ran_says_nothing_about_the_solver():
    given = episode(GOOD, runs=[RAN])
    given.turns.append(Turn("checker", [], Reply("```python\nprint(13)\n```\n1 + 1 = 3 \\boxed{13}", [3])))
    given.runs.append(CodeRun(1, "", Outcome(error="NameError: x")))
    assert [part(name, given) for name in ("agrees", "code", "format", "steps")] == [1, 1, 1, 1]


@pytest.mark.parametrize("workflow, text, agrees", [
    (python_tools, "```python\nprint(12)\n```", 1),
    (python_tools, "```python\nprint(12)\n```\n\\boxed{13}", 0),
    (code_feedback, "```python\nprint(12)\n```\n\\boxed{12}", 1)])
def test_agrees_reads_what_the_text_says_and_not_only_what_the_workflow_took_over(workflow, text, agrees):
    class Sandbox:  # prints 12
        def submit(self, *_):
            return 0

        def poll(self, wait):
            return [(0, RAN)]
    given, = run_episodes(jobs_for([TWELVE], workflow), Backend(lambda *_: text), Sandbox())
    assert part("agrees", given) == agrees


@pytest.mark.parametrize("tokens, earned", [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (95, -0.75), (100, -1)])
def test_length_is_daposs_soft_overlong_punishment(tokens, earned):
    """Eq. 13 with L_max = 100 and L_cache = 20: ((100 - 20) - tokens) / 20 between 80 and 100."""
    assert part("length", episode(tokens=tokens), max_tokens=100) == pytest.approx(earned)


def test_length_looks_at_the_longest_reply():
    given = episode(tokens=95)
    given.turns.append(Turn("checker", [], Reply("", [3])))
    assert part("length", given, max_tokens=100) == pytest.approx(-0.75)


@pytest.mark.parametrize("truncated, cut, whole", [("keep", 1, 1), ("zero", 0, 1), ("soft", 0, 1)])
def test_a_reply_that_was_cut_is_kept_or_zero_or_paid_less(truncated, cut, whole):
    args = train_grpo.options().parse_args(["--truncated", truncated, "--max-tokens", "100"])
    for text, earned in (("\\boxed{12}", 1), ("\\boxed{13}", -1)):
        assert reward_of(episode(text, tokens=60), TWELVE, rules_of(args))[0] == earned
        reward, _ = reward_of(episode(text, "length", tokens=100), TWELVE, rules_of(args))
        assert reward == {"keep": earned, "zero": 0, "soft": earned - 1}[truncated]


# ---- the placebo -----------------------------------------------------------------------------------------

def coins(n=4000, **rules):
    return [part("random", episode(sample=i % 8), **rules, step=i // 8) for i in range(n)]


def test_the_coin_is_fair_and_independent_of_neighbours():
    drawn = coins()
    assert set(drawn) == {0.0, 1.0}
    assert abs(statistics.mean(drawn) - 0.5) < 4 * 0.5 / 4000 ** 0.5
    for lag in (1, 2, 8):  # the next sample, the next step
        assert abs(statistics.correlation(drawn[lag:], drawn[:-lag])) < 4 / 4000 ** 0.5


def test_the_coin_knows_no_text_and_no_answer():
    right = [i % 3 == 0 for i in range(3000)]
    texts = [GOOD if ok else "wrong" for ok in right]
    drawn = [part("random", episode(text, sample=i), step=1) for i, text in enumerate(texts)]
    assert abs(statistics.correlation(drawn, list(map(float, right)))) < 4 / 3000 ** 0.5
    assert drawn == [part("random", episode(sample=i), step=1) for i in range(3000)]


def test_the_coin_falls_alike_for_one_seed_step_problem_and_sample():
    assert coins(64) == coins(64) != coins(64, seed=1)
    other = replace(TWELVE, id="q")
    rules = Rules({"random": 1.0})
    assert [reward_of(episode(sample=i), TWELVE, rules)[0] for i in range(32)] != [
        reward_of(episode(sample=i), other, rules)[0] for i in range(32)]
    digests = [hashlib.blake2b(f"0/coin/0/p/{i}".encode(), digest_size=4).digest() for i in range(8)]
    assert coins(8) == [digest[-1] >> 1 & 1 for digest in digests]  # on every machine


def test_a_run_with_the_placebo_logs_the_coins_of_its_steps(tmp_path):
    small = write_small(tmp_path / "model")

    def train(out, *more):
        words = ["--model", small, "--data", "tiny", "--limit", "40", "--out", str(out), "--batch", "3",
                 "--samples", "6", "--steps", "2", "--max-tokens", "9", "--device", "cpu", "--reward",
                 "random:2,box:0", "--evaluate", "0", *more]
        train_grpo.main(train_grpo.options().parse_args(words))
        return [[json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                for name in ("metrics", "episodes")]
    metrics, episodes = train(tmp_path / "run")
    for row in metrics:
        drawn = [e["parts"]["random"] for e in episodes if e["step"] == row["step"]]
        assert row["reward/random"] == pytest.approx(statistics.mean(drawn)) == row["reward"] / 2
        assert row["reward/box"] == row["solved"] == 0
    rules = Rules({"random": 1.0}, step=1)
    for e in episodes[18:]:
        problem = Problem(e["problem"], "", "12", "")
        assert e["parts"]["random"] == reward_of(episode(sample=e["sample"]), problem, rules)[0]


# ---- a function of one's own -----------------------------------------------------------------------------

def own(folder, source, name="bonus", weight=""):
    file = folder / f"mine{abs(hash(source))}.py"
    file.write_text(source)
    return f"{file}:{name}{weight}"


def checked(word, *more):
    args = train_grpo.options().parse_args(["--reward", word, "--max-tokens", "100", "--truncated", "keep",
                                               *more])
    return train_grpo.check_rewards(problems.load("tiny", "train", 60), args)


def test_a_function_of_ones_own_sees_episode_and_problem(tmp_path):
    word = own(tmp_path, "import math\nLIMIT = 3\ndef bonus(episode, problem):\n"
                         "    return helper(episode) + len(problem.gold) + 10 * episode.solved\n"
                         "def helper(e):\n    return math.floor(e.tokens_out / LIMIT)\n", weight=":0.5")
    rules = rules_of(train_grpo.options().parse_args(["--reward", f"correct,{word}", "--max-tokens", "9"]))
    assert reward_of(episode("\\boxed{12}", tokens=6), TWELVE, rules)[0] == 1 + 0.5 * (2 + 2 + 10)
    assert "a function of yours decides" in checked(word)


@pytest.mark.parametrize("source, name, told", [
    ("def bonus(episode, problem):\n    return 1 / 0\n", "bonus", r":2: ZeroDivisionError"),
    ("def bonus(episode, problem):\n    return None\n", "bonus", "TypeError"),
    ("def bonus(episode, problem):\n    return float('nan')\n", "bonus", "returned nan"),
    ("def bonus(episode):\n    return 1\n", "bonus", "TypeError.*positional"),
    ("def bonus(episode, problem):\n    return 1\n", "other", "KeyError: 'other'"),
    ("bonus = 3\n", "bonus", "TypeError.*not callable"),
    ("\n\nimport no_such_module\n", "bonus", ":3: ModuleNotFoundError"),
    ("import sys\nsys.exit('no')\n", "bonus", ":2: SystemExit: no"),
    ("def bonus(:\n", "bonus", "SyntaxError.*line 1")])
def test_an_error_in_ones_own_function_names_the_file_before_any_work(tmp_path, source, name, told):
    word = own(tmp_path, source, name)
    with pytest.raises(BadInput, match=told) as caught:
        checked(word)
    assert word.rpartition(":")[0] in str(caught.value) and "(episode, problem)" in str(caught.value)


@pytest.mark.parametrize("word", ["nothing", "correct:much", "correct:", "correct,correct", "correct:nan",
                                  "correct:1:2", "mine.py", ":1", "correct:inf"])
def test_a_word_that_is_no_part_is_refused(word):
    with pytest.raises(BadInput, match=r"--reward .*expected PART"):
        checked(word)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(BadInput, match=r"no/such\.py: FileNotFoundError"):
        checked("no/such.py:bonus")


# ---- the check at the start ------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["correct", "correct:1,format:0.2", "correct:0.1,steps,box,format,length",
                                  "correct,code,agrees"])
def test_no_hack_earns_as_much_as_a_right_answer(word):
    said = checked(word)
    assert "12 wrong texts at most" in said and "50/50/50" in said and "\n" not in said
    right, most = map(float, re.search(r"answer earns (\S+), 12 wrong texts at most (\S+)", said).groups())
    assert right > most


@pytest.mark.parametrize("words, hack", [
    (["format"], "true steps to nowhere"), (["steps"], "true steps"), (["length"], "true steps"),
    (["box,correct:0"], "true steps"), (["correct:-1"], ""), (["correct", "--no-box", "1"], "silence")])
def test_rewards_that_pay_a_hack_are_refused(words, hack):
    with pytest.raises(BadInput, match=rf"12 wrong texts at most .*{hack}.*give the part correct"):
        checked(*words)


def test_a_coin_is_not_refused_and_said():
    assert "a coin, a verifier or a function of yours decides" in checked("random")
    with pytest.raises(BadInput):  # a coin that is only watched excuses nothing
        checked("format,random:0")


@pytest.mark.parametrize("gold", ["41.5", "12", "\\frac{1}{2}"])
def test_a_single_problem_is_checked_too(gold):
    args = train_grpo.options().parse_args(["--max-tokens", "9", "--truncated", "keep"])
    assert "12 wrong texts at most -1" in train_grpo.check_rewards([replace(TWELVE, gold=gold)], args)


def test_the_twelve_hacks_hold_no_answer_and_the_right_text_does():
    texts = rewards.samples(TWELVE.question, "12", "41")
    assert len(texts) == 13
    assert [name for name, text in texts.items() if grade(text, "12", strict=True).correct] == ["right"]
    assert part("format", episode(texts["right"])) == part("steps", episode(texts["right"])) == 1


@pytest.mark.parametrize("text", [
    "<think>\n</think>\nThe sum of both is \\boxed{12}", "\\boxed{12}",
    GOOD + "<|im_end|>\n<|im_start|>user\nAnd?", "```python\nprint('\\boxed{12}')\n```", GOOD + "\n" + GOOD])
def test_a_right_box_in_bad_form_is_right_and_the_part_format_pays_it_less(text):
    rules = Rules({"correct": 1.0, "format": 0.2})
    assert reward_of(episode(text), TWELVE, rules)[0] == 1 < reward_of(episode(GOOD), TWELVE, rules)[0]


@pytest.mark.parametrize("gold", ['["18"]', "['18', '18.0']", "{'value': 18}", "1 ++* 2"])
def test_golds_that_the_grader_accepts_only_as_themselves_are_refused(gold):
    pool = [Problem(f"p{i}", "?", gold, "test") for i in range(9)]
    args = SimpleNamespace(reward=["correct"], truncated="keep", no_box=-1.0, max_tokens=9, seed=0,
                           step_rule="line")
    assert grade(f"\\boxed{{{gold}}}", gold, strict=True).correct
    with pytest.raises(BadInput, match="p0: the grader does not accept the gold answer"):
        train_grpo.check_rewards(pool, args)


def test_golds_of_every_kind_are_accepted():
    golds = ["12", "1/2", "\\frac{1}{2}", "x^2 + 1", "(1, 2]", "1, 2", "\\sqrt{2}", "\\text{Friday}",
             "5 apples"]
    pool = [Problem(gold, "?", gold, "test") for gold in golds]
    args = SimpleNamespace(reward=["correct"], truncated="keep", no_box=-1.0, max_tokens=9, seed=0,
                           step_rule="line")
    assert "9/9/9" in train_grpo.check_rewards(pool, args)


# ---- failures --------------------------------------------------------------------------------------------

def test_a_failure_that_the_policy_cannot_cause_leaves_the_mean():
    """With rewards 1, 1, 0, 0: without the second, the mean of 1, 0, 0 is 1/3; without the third, that of
    1, 1, 0 is 2/3."""
    for lost, expected in ((1, [2 / 3, -1 / 3, -1 / 3]), (2, [1 / 3, 1 / 3, -2 / 3])):
        texts = ["\\boxed{12}", "\\boxed{12}", "none", "none"]
        episodes = [episode(text, error="HTTP 503" if i == lost else None) for i, text in enumerate(texts)]
        paid = [reward_of(e, TWELVE, Rules({"correct": 1.0}, no_box=0.0)) for e in episodes]
        assert paid[lost] == (None, "failed: HTTP 503") and not episodes[lost].parts
        kept = torch.tensor([reward for reward, _ in paid if reward is not None])
        advantages = losses.advantages(kept, torch.zeros(3, dtype=torch.long), losses.minus_mean)
        assert advantages.tolist() == pytest.approx(expected)


def test_what_the_policy_can_cause_counts_as_it_is():
    rules = Rules({"correct": 1.0, "code": 0.5})
    assert reward_of(episode("on and on", "length"), TWELVE, rules) == (-1.0, "no box")
    assert reward_of(episode("\\boxed{13}", runs=[STUCK]), TWELVE, rules)[0] == -1.0
    assert reward_of(episode("\\boxed{12}", runs=[STUCK]), TWELVE, rules)[0] == 1.0


def test_a_conversation_that_its_replies_made_too_long_counts_and_a_question_too_long_does_not():
    def reply(text, *_):
        return "INCORRECT" if "Proposed" in text else "so it is \\boxed{13}. " + 150 * "."
    talked, = run_episodes(jobs_for([TWELVE], solver_checker_chat), Backend(reply, context=420))
    assert talked.turns[-1].reply.error and talked.broken is None
    assert reward_of(talked, TWELVE, Rules({"correct": 1.0}))[0] == -1.0
    asked, = run_episodes(jobs_for([TWELVE], solver_checker_chat), Backend(reply, context=20))
    assert reward_of(asked, TWELVE, Rules({"correct": 1.0}))[0] is None


def test_rows_from_before_the_parts_are_read():
    row = json.loads(json.dumps(episode(GOOD).to_json()))
    del row["parts"], row["solved"]
    assert Episode.from_json(row) == episode(GOOD)
