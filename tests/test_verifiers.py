"""The measurement of verifiers, by hand-worked numbers and a second way of counting."""

import doctest
import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from bench import verifiers
from slm.search import cut
from slm.tiny import world


def solution(id, error, *scores, sample=0):
    return {"id": id, "sample": sample, "error": error, "scores": list(scores)}


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(verifiers).failed == 0


def test_f1_is_processbenchs_by_hand():
    """Of 3 with an error the first is found in 1 (one is named too early, one is not); of 2 without, 1."""
    found = [solution("a", 2, 0.9, 0.3, 0.8), solution("b", 2, 0.4, 0.2), solution("c", 1, 0.6, 0.7),
             solution("d", 0, 0.9, 0.5), solution("e", 0, 0.9, 0.49)]
    c = verifiers.counts(found, 0.5)
    assert list(c) == [3, 1, 2, 1]
    assert verifiers.f1(c) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert verifiers.f1(np.array([3, 0, 2, 0])) == 0


def test_problems_are_drawn_with_all_their_solutions_and_all_their_seeds():
    rng = random.Random(0)
    ids = [f"p{i}" for i in range(12)]
    seeds = [[solution(id, rng.choice((0, 1, 2)), rng.random(), rng.random(), sample=k)
              for id in ids for k in range(2)] for _ in range(2)]
    c = verifiers.by_problem(seeds, tune=False)
    assert c.shape == (12, 4)
    for row, id in zip(c, sorted(ids)):
        own = [s for s in itertools.chain(*seeds) if s["id"] == id]
        assert row[0] + row[2] == len(own) == 4 and list(row) == list(verifiers.counts(own, 0.5))
    drawn = verifiers.draws(c)
    assert len(drawn) == verifiers.ROUNDS and (verifiers.draws(c) == drawn).all()
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert low < verifiers.f1(c.sum(0)) < high
    alone = np.random.default_rng(1).choice(12, size=(2000, 12))  # another way to draw
    assert np.mean(drawn) == pytest.approx(np.mean([verifiers.f1(c[i].sum(0)) for i in alone]), abs=0.02)


def test_a_threshold_is_tuned_on_the_other_half_only():
    """On one half errors score below 0.3, on the other below 0.8: each gets the other's threshold."""
    ids = [f"p{i}" for i in range(40)]
    level = {0: (0.2, 0.4), 1: (0.7, 0.9)}  # half -> scores of a wrong and of a right step
    found = [solution(id, error, level[verifiers.half(id)][error == 0]) for id in ids for error in (0, 1)]
    first, second = verifiers.tuned(found)
    assert 0.7 < first <= 0.9 and 0.2 < second <= 0.4
    c = verifiers.by_problem([found], tune=True).sum(0)
    assert c[1] == sum(verifiers.half(id) == 0 for id in ids)  # all of theirs are called wrong
    assert c[3] == sum(verifiers.half(id) == 1 for id in ids)


def test_the_table_compares_on_the_same_draws():
    ids = [f"p{i}" for i in range(30)]
    perfect = [solution(id, error, 1 - (error == 1), 0.9) for id in ids for error in (0, 1)]
    blind = [s | {"scores": [0.9, 0.9]} for s in perfect]
    lines = verifiers.table({"hard": [perfect, perfect], "soft": [perfect], "exact": [blind]})
    hard, soft, exact = (line.split(" | ") for line in lines[2:5])
    assert hard[1] == "2" and hard[2:5] == ["100.0", "100.0", "100.0 (100.0-100.0)"] and hard[6] == " |"
    assert soft[6] == "+0.0 [+0.0, +0.0] |" and exact[6].startswith("-100.0")
    assert "60 solutions of 30 held-out problems, 30 with an error" in lines[-1]


def slips():
    """Solutions of the tiny world with one mistake: (story, lines, number of the wrong line)."""
    rng = random.Random(0)
    for story in world.problems("train", 150):
        wrong = world.corrupt(story, rng)
        pairs = list(zip(wrong.steps, story.steps))
        at = next(i for i, (a, b) in enumerate(pairs) if a.value != b.value)
        given = set(re.findall(r"\d+", story.question))
        by_chance = {str(a.value) for a, _ in pairs[at:]} & ({str(s.value) for s in story.steps} | given)
        if not by_chance and all("/" not in str(s.value) for s in (*wrong.steps, *story.steps)):
            yield story, wrong, at + 1


@pytest.mark.parametrize("style", ["short", "detailed", "restated"])
def test_a_planted_first_error_is_found(style):
    seen = Counter()
    for story, wrong, at in slips():
        worked = world.solve(story, "detailed")
        for told, error in ((story, 0), (wrong, at)):
            text = ("\n".join(s.sentence.replace("{=}", str(s.value)) for s in told.steps)
                    if style == "restated" else world.solve(told, style))
            steps = cut(f"{text}\nThe answer is \\boxed{{{told.answer}}}.", "line")
            assert len(steps) == len(story.steps) + 1
            assert verifiers.first_error(steps, story.question, worked, told is story) == error
            seen[error] += 1
    assert seen[0] > 50 and seen[1] > 20 and seen[2] > 20


def test_exact_labels_end_with_the_first_error(tmp_path):
    asked = {"role": "user", "content": "Is it?"}
    made = [{"id": id, "sample": 0, "step": step,
             "messages": [asked, {"role": "assistant", "content": "CORRECT", "weight": 1.0}]}
            for id in ("tiny-train-1", "tiny-train-2", "tiny-train-6") for step in (1, 2, 3)]
    (tmp_path / "hard.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))
    kept = {row["id"] for row in made if not verifiers.is_held_out(row["id"])}
    solutions = [solution(id, error) for id, error in zip(sorted({row["id"] for row in made}), (2, 0, 1))]
    found = verifiers.records(tmp_path, "exact", solutions)
    said = {(row["id"], row["step"]): row["messages"][1]["content"] for row in found}
    whole = {("tiny-train-1", 1): "CORRECT", ("tiny-train-1", 2): "INCORRECT",
             ("tiny-train-6", 1): "INCORRECT",
             **{("tiny-train-2", step): "CORRECT" for step in (1, 2, 3)}}
    assert said == {key: word for key, word in whole.items() if key[0] in kept} and len(said) > 2
    assert len(verifiers.records(tmp_path, "hard", solutions)) == 3 * len(kept)
