"""The built-in world and model: its promises, checked against Python's own arithmetic."""

import contextlib
import io
import itertools
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from slm.tiny import world
from slm.tiny.rebuild import corpus

TINY = Path(world.__file__).parent
SPLITS = {split: world.problems(split) for split in ("train", "test", "unseen")}
SIDE = r"[\d(](?:[\d.%()+*/-]| (?!=)|of)*"  # of an equation
ALL = [story for stories in SPLITS.values() for story in stories]


def value(expression: str) -> Fraction:
    """The value of a sum as the solutions write it, by Python itself."""
    expression = re.sub(r"(\d+)% of (\d+)", r"\1 * \2 / 100", expression)
    expression = re.sub(r"\d+\.\d+|\d+", lambda m: f"Fraction('{m[0]}')", expression)
    return eval(expression, {"Fraction": Fraction})


def test_there_are_60_training_templates_and_10_unseen_ones_of_1_to_5_steps():
    seen, unseen = world.templates(), world.templates(unseen=True)
    assert len(seen) >= 60 and len(unseen) >= 10
    assert {len(t.steps) for t in seen} == {1, 2, 3, 4, 5}
    assert not {t.question for t in seen} & {t.question for t in unseen}


def test_splits_share_no_problem_and_are_the_same_every_time():
    questions = [{s.question for s in stories} for stories in SPLITS.values()]
    assert [len(q) for q in questions] == [4000, 500, 500]
    assert not questions[0] & questions[1] and not questions[0] & questions[2]
    assert world.problems("test", 20) == SPLITS["test"][:20]
    assert SPLITS["train"][0].question == world.problems("train", 1)[0].question


@pytest.mark.parametrize("style", ["short", "detailed"])
def test_every_equation_of_every_solution_holds(style):
    for story in ALL:
        for line in world.solve(story, style).splitlines():
            sides = re.findall(rf"{SIDE}(?: = {SIDE})+", line)
            assert len(sides) == 1, line
            values = {value(side.rstrip(" .of")) for side in sides[0].split(" = ")}
            assert len(values) == 1, line


def test_the_program_of_every_story_prints_its_answer():
    for story in ALL[::5]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(world.program(story), {})
        assert abs(Fraction(out.getvalue().strip()) - Fraction(story.answer)) < Fraction(1, 10**9), story


def test_answers_are_positive_numbers_that_the_question_does_not_need_rounding_for():
    assert all(Fraction(s.answer) > 0 and len(s.answer) <= 6 for s in ALL)


def test_a_corrupted_solution_ends_in_another_answer():
    rng = random.Random(0)
    assert all(world.corrupt(story, rng).answer != story.answer for story in ALL[::7])


def test_no_document_of_the_corpus_holds_a_test_problem_or_an_unseen_template():
    held_out = {s.question for s in SPLITS["test"]} | {s.question for s in SPLITS["unseen"]}
    unseen = re.compile("spends half of it|shares the change|fills .* bottles|more girls come|A path takes")
    for text in itertools.islice(corpus.documents(1), 3000):
        assert not any(line.strip("# ").removeprefix("Question: ") in held_out for line in text.splitlines())
        assert not unseen.search(text)


def test_the_corpus_is_the_same_for_the_same_seed():
    first = [list(itertools.islice(corpus.documents(3), 20)) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0] != list(itertools.islice(corpus.documents(4), 20))


def test_the_checks_say_correct_for_right_solutions_only():
    rng = random.Random(1)
    verdicts = []
    for story in SPLITS["train"][:200]:
        text = corpus.check(story, rng)
        shown = text.split("Proposed solution: ")[1].split("\n")[0]
        right = bool(re.search(rf"(?<![\d./]){re.escape(story.answer)}(?![\d/]|\.\d)", shown.split("=")[-1]))
        verdicts.append("INCORRECT" not in text.split("assistant")[1])
        assert verdicts[-1] <= right, text
    assert 60 < sum(verdicts) < 140


def test_the_checkpoint_is_small_and_a_digit_is_one_token():
    from tokenizers import Tokenizer
    assert (TINY / "model.safetensors").stat().st_size < 8_000_000
    bpe = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert [bpe.id_to_token(i) for i in bpe.encode("1207").ids] == ["1", "2", "0", "7"]
    assert len(bpe.encode("<|endoftext|><|im_start|><|im_end|>").ids) == 3
    text = "Ünïcode 數學 \\frac{1}{2} is kept\n\tbyte for byte"
    assert bpe.decode(bpe.encode(text).ids) == text
