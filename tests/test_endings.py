"""Where a reply ends, with a tokenizer whose tokens are short strings."""

from types import SimpleNamespace

import pytest

from slm.episode import Reply, Sampling
from slm.sampling.endings import Endings
from slm.teachers.endpoint import cut_after_box


class Pieces:
    """A stand-in tokenizer: the id of a token is its place in the list of pieces. It counts decoded texts."""

    def __init__(self):
        self.pieces, self.stop_ids, self.decoded = ["<end>"], {0}, 0

    def encode(self, *pieces: str) -> list[int]:
        self.pieces += [p for p in pieces if p not in self.pieces]
        return [self.pieces.index(p) for p in pieces]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        self.decoded += len(ids) > 1
        return "".join(self.pieces[i] for i in ids if i or not skip_special)


def written(*pieces: str, burst: int = 1, limit: int = 99, **sampling) -> tuple[str, str | None, Pieces]:
    """(text, finish, tokenizer) of a reply whose tokens come `burst` at a time."""
    tokenizer = Pieces()
    ids, endings = tokenizer.encode(*pieces), Endings(tokenizer)
    row = SimpleNamespace(sampling=Sampling(**sampling), tokens=[7, 7], prompt=2, limit=limit, logprobs=[],
                          thinking=False)
    finish = None
    while ids and not finish:
        count, finish = endings.find(row, ids[:burst])
        row.tokens += ids[:count]
        row.logprobs += [0.0] * count
        del ids[:count]
    return endings.text(row.tokens[2:], finish, row.sampling), finish, tokenizer


BOXES = [  # pieces, where a reply ends at an endpoint
    (["so \\boxed", "{", "\\frac{", "1}", "{2", "}}$. ", "More", ".\n", "!"],
     "so \\boxed{\\frac{1}{2}}$. More."),
    (["in \\boxed", "{}", "\n it is ", "\\boxed{", "7", "}.", "\n\nMore"],
     "in \\boxed{}\n it is \\boxed{7}."),
    (["\\boxed{", " ", "}", "\n"], None),
    (["\\boxed{", "a\\}", "b", "}", "\n", "c"], "\\boxed{a\\}b}"),
    (["\\boxed{\\left\\{", " x ", "\\right.", "}", ".", "\n", "c"], "\\boxed{\\left\\{ x \\right.}."),
    (["\\boxed", " ", "{x", "}", "\n"], "\\boxed {x}"),
    (["<think>", "\\boxed{1}\n", "</think>", "\\boxed{2}", "\n", "c"],
     "<think>\\boxed{1}\n</think>\\boxed{2}"),
    (["<think>", "\\boxed{1}", "\n", "!"], None),
    (["\\boxed{1} or ", "\\boxed{2}", "\n", "!"], "\\boxed{1} or \\boxed{2}"),
    (["\\boxed{1} or ", "\\boxed{2}"], None)]


@pytest.mark.parametrize("burst", [1, 3, 99])
@pytest.mark.parametrize("pieces, reply", BOXES)
def test_a_reply_ends_with_the_line_of_its_answer_here_as_at_an_endpoint(pieces, reply, burst):
    text, finish, _ = written(*pieces, burst=burst, stop_at_box=True)
    answer = cut_after_box(Reply("".join(pieces), finish="stop"))
    assert (answer.text, answer.finish, finish) == (
        (reply, "box", "box") if reply else ("".join(pieces), "stop", None))
    rest = text.removeprefix(answer.text)  # the sampler keeps its last token whole
    assert "".join(pieces).startswith(text) and rest.startswith("\n" if reply else "")
    assert written(*pieces, burst=burst)[:2] == ("".join(pieces), None)


def test_stop_ids_stop_strings_and_limits():
    assert written("a", "b", "<end>", "c")[:2] == ("ab", "stop")
    assert written("a", "b#", "#c", "d", stop=["##"])[:2] == ("ab", "stop_string")
    assert written("a", "b", "c", "d", limit=3, burst=2)[:2] == ("abc", "length")
    assert written("a", "\\boxed{1}\n", "<end>", limit=2, stop_at_box=True)[:2] == ("a\\boxed{1}\n", "box")


def test_a_reply_is_decoded_only_after_tokens_that_may_end_it():
    *_, tokenizer = written(*(98 * ["word} "]), "\n", stop_at_box=True)
    assert tokenizer.decoded == 2  # once after the line, once for the reply
