"""The built-in world and model: its promises, checked against Python's own arithmetic."""

import contextlib
import io
import itertools
import random
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from slm import BadInput
from slm.tiny import world
from slm.tiny.rebuild import corpus, pretrain

TINY = Path(world.__file__).parent
SPLITS = {split: world.problems(split) for split in ("train", "test", "unseen")}
SIDE = r"[\d(](?:[\d.%()+*/-]| (?!=)|of)*"  # of an equation
ALL = [story for stories in SPLITS.values() for story in stories]


def value(expression: str) -> Fraction:
    """The value of a sum as the solutions write it, by Python itself."""
    expression = re.sub(r"(\d+)% of (\d+)", r"\1 * \2 / 100", expression)
    expression = re.sub(r"\d+\.\d+|\d+", lambda m: f"Fraction('{m[0]}')", expression)
    return eval(expression, {"Fraction": Fraction})


def pairs(story: world.Story) -> set[tuple[str, str]]:
    return set(itertools.pairwise(story.kind[1:]))


def test_there_are_hundreds_of_kinds_of_1_to_4_relations_whose_types_fit():
    table = world.relations()
    assert len({s.kind for s in SPLITS["train"]}) > 500 and len({s.kind for s in SPLITS["unseen"]}) > 200
    assert {len(s.kind) - 1 for s in SPLITS["train"]} == {1, 2, 3, 4}
    for story in ALL:
        assert not table[story.kind[0]].source
        assert all(table[a].target == table[b].source for a, b in itertools.pairwise(story.kind))


def test_every_unseen_story_is_a_new_composition_of_relations_that_training_knows():
    rng = random.Random(0)
    known = [*SPLITS["train"], *(world.training_story(rng) for _ in range(2000))]
    relations = {name for story in known for name in story.kind[1:]}
    in_a_row = set().union(*map(pairs, known))
    for story in SPLITS["unseen"]:
        assert set(story.kind[1:]) <= relations
        assert pairs(story) - in_a_row, story.kind
    assert set().union(*map(pairs, SPLITS["test"])) <= in_a_row


def test_a_story_by_hand():
    rng = random.Random(4)
    while (story := world.tell(rng)).kind != ("things", "give-part", "sell"):
        pass
    x, n, price = story.given.values()
    kept = x - x // n
    assert [step.value for step in story.steps] == [x // n, kept, kept * price]
    told = (rf"(\w+) (has|gets|finds) {x} (\w+)\. S?[hH]e gives {world.PARTS[n]} of them to \w+\. "
            rf"S?[hH]e sells all of them for \${price} each\. How many dollars does \1 have [\w ]+\?")
    hero, _, things = re.fullmatch(told, story.question).groups()
    assert world.solve(story).splitlines()[1] == f"{hero} keeps {x} - {x // n} = {kept} {things}."
    assert world.plan(story) == "First divide, then subtract, then multiply."


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


def test_answers_are_whole_numbers_from_2_to_999_and_so_is_every_result_on_the_way():
    assert all(1 < step.value < 1000 for story in ALL for step in story.steps)
    assert all(s.answer == str(s.steps[-1].value) for s in ALL)


def test_a_corrupted_solution_ends_in_another_answer():
    rng = random.Random(0)
    assert all(world.corrupt(story, rng).answer != story.answer for story in ALL[::7])


def test_no_document_of_the_corpus_holds_a_test_problem_or_an_unseen_composition(monkeypatch):
    told = []
    tell = world.training_story
    monkeypatch.setattr(world, "training_story", lambda rng: told.append(tell(rng)) or told[-1])
    texts = list(itertools.islice(corpus.documents(1), 2000))
    held_out = {s.question for s in SPLITS["test"]} | {s.question for s in SPLITS["unseen"]}
    lines = "\n".join(texts).splitlines()
    assert not held_out & {line.strip("# ").removeprefix("Question: ") for line in lines}
    assert len(told) == 2000 and {world.split_of(s) for s in told} == {"train"}


def test_the_corpus_is_the_same_for_the_same_seed():
    first = [list(itertools.islice(corpus.documents(3), 20)) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0] != list(itertools.islice(corpus.documents(4), 20))


def test_a_pretraining_that_was_stopped_resumes_to_the_same_weights(tmp_path, monkeypatch, random_model):
    monkeypatch.setattr(pretrain, "TOKENS", 64)

    def run(name, resume=False, seed=1):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(TINY / "tokenizer.json", tmp_path / name)
        args = SimpleNamespace(out=tmp_path / name, steps=53, seed=seed, resume=resume)
        pretrain.train(random_model(vocab=1280, positions=1024), args)
        return (tmp_path / name / "model.safetensors").read_bytes()

    def stop(seed, kinds):
        if seed == "1 51":  # the last save was after step 50
            raise KeyboardInterrupt
        return corpus.documents(seed, kinds)

    whole = run("whole")
    with monkeypatch.context() as stopped:
        stopped.setattr(pretrain, "documents", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    with pytest.raises(BadInput, match="began with --seed 1; expected the same"):
        run("stopped", resume=True, seed=2)
    assert run("stopped", resume=True) == whole
    with pytest.raises(BadInput, match=r"state\.pt: no such file"):
        run("new", resume=True)


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
