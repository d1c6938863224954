"""Guesses of the next tokens, on sequences worked out by hand. That they change no reply: test_sampler.py."""

import random

import pytest

from slm.sampling import drafts as draft
from slm.sampling.drafts import CONTEXTS, ENTRIES, FIXED, LONGEST, ROWS, SURE, Drafts


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Whatever can be guessed is worth it."""
    monkeypatch.setattr(draft, "FIXED", 1e9)


def learned(*texts):
    drafts = Drafts()
    for text in texts:
        drafts.learn(list(text), 0)
    return drafts


def test_a_guess_is_what_came_last_time_after_the_longest_context():
    drafts = learned("the cat sat on the mat")
    assert "".join(drafts.guess(list("a cat s"), 1, 9)) == "at on th"  # as long as drafts are
    assert "".join(drafts.guess(list("xx th"), 1, 4)) == "e ma"         # the last time, not the first
    assert drafts.guess(list("xyz"), 1, 9) == [] and Drafts().guess([1, 2], 1, 9) == []


def test_a_loop_is_guessed_round_and_round_but_never_more_than_asked():
    drafts = learned("abcabcabc")
    assert "".join(drafts.guess(list("abc"), 1, 100)) == "abcabcabc"[:LONGEST]
    assert "".join(drafts.guess(list("abc"), 1, 2)) == "ab"
    assert drafts.guess(list("abc"), 1, 0) == drafts.guess(list("abc"), 1, -1) == []


def test_what_comes_true_is_counted_for_the_guess_that_a_draft_would_have_used():
    drafts = learned([1, 2, 1, 2, 1, 3])
    # after 1 came 2 (new), after 2 came 1 (new), after 1 came 2 again (right: once in a row) ...
    true, guesses = (sum(x[i] - y for x in drafts.came_true.values()) for i, y in ((0, 1), (1, 2)))
    assert (true, guesses) == (2, 3)  # 2 after 1, 1 after (1, 2), then 3 where 2 was expected
    assert drafts.followers[(1,)] == (3, 0) and drafts.followers[(1, 2)][0] == 1
    assert set(drafts.came_true) == {(n, sure) for n in CONTEXTS for sure in range(SURE + 1)}


def test_a_draft_ends_where_its_chance_no_longer_pays(monkeypatch):
    """With `rows` rows a token must come true with a chance of rows / (FIXED + rows)."""
    monkeypatch.setattr(draft, "FIXED", 10)
    monkeypatch.setattr(draft, "ROWS", 99)
    drafts, lengths = learned("abcabcabc"), []
    for key in drafts.came_true:
        drafts.came_true[key] = [80, 100]
    for rows in (1, 5, 10, 30, 90):
        drafts.expected = drafts.counted = 1.0
        lengths.append(len(drafts.guess(list("abc"), rows, 99)))
    worth = [rows / (10 + rows) for rows in (1, 5, 10, 30, 90)]
    assert lengths == [sum(0.8 ** n >= w for n in range(1, LONGEST + 1)) for w in worth] == [8, 4, 3, 1, 0]


def test_a_large_batch_has_no_drafts():
    assert learned("abcabcabc").guess(list("abc"), ROWS, 9) and FIXED > ROWS
    assert learned("abcabcabc").guess(list("abc"), ROWS + 1, 9) == []


def test_drafts_that_rarely_count_become_rare(monkeypatch):
    """Noise after frequent contexts: the guesses look likely but never count in drafts."""
    monkeypatch.setattr(draft, "FIXED", 20)
    drafts = learned("abababababab")
    sizes = [len(drafts.guess(list("ab"), 8, 8)) for _ in range(200)]  # and `counted` never grows
    assert sizes[0] > 0 and sum(sizes[100:]) == 0


def test_draws_count_up_to_the_first_that_differs_from_the_draft():
    drafts = Drafts()
    drawn = [7, 1, 2, 9, 4, 5, 6]
    kept = drafts.kept([[], [1, 2, 3], [8]], drawn)
    assert [drawn[span] for span in kept] == [[7], [1, 2, 9], [5]]
    assert drafts.counted == 1.0 + 2
    assert drafts.kept([[4]], [4, 5]) == [slice(0, 2)]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("slm.sampling.drafts.ENTRIES", 1000)
    rng, drafts = random.Random(0), Drafts()
    for _ in range(50):
        drafts.learn([rng.randrange(10 ** 6) for _ in range(100)], 0)
    assert len(drafts.followers) <= 1000 + 4 * 100 and ENTRIES > 1000
