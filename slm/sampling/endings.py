"""Where a reply ends: at a stop id, a stop string, the end of the line with its answer, or its limit.

Stop strings and boxes are looked for in the text, since many token sequences spell the same. To decode the
reply after every token would take time that grows with its square, so that is done only after tokens that
hold the last character of what is looked for.
"""

from slm.grading import answered


class Endings:
    """The ends of replies, for one tokenizer (its stop_ids and decode)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pieces: dict[int, set[str]] = {}  # characters of single tokens

    def thinking(self, prompt: list[int], sampling) -> bool:
        """Whether a reply that ends at a box begins inside <think>."""
        return sampling.stop_at_box and self.tokenizer.decode(prompt[-8:], False).rstrip().endswith("<think>")

    def find(self, row, new: list[int]) -> tuple[int, str | None]:
        """How many of the new tokens of a sampler's row still belong to its reply, and why that ends with the
        last of them, if it does: "stop", "stop_string", "box", "length"."""
        sampling, stops, room = row.sampling, self.tokenizer.stop_ids, row.limit - len(row.logprobs)
        if sampling.stop or sampling.stop_at_box or not stops.isdisjoint(new):
            for count, token in enumerate(new[:room], 1):
                if token in stops:
                    return count, "stop"
                if self.may_end(token, sampling):
                    text = self.tokenizer.decode(row.tokens[row.prompt:] + new[:count])
                    if any(stop in text for stop in sampling.stop):
                        return count, "stop_string"
                    if sampling.stop_at_box and answered(text, row.thinking):
                        return count, "box"
        return min(room, len(new)), "length" if len(new) >= room else None

    def may_end(self, token: int, sampling) -> bool:
        """Whether the token holds the last character of a stop string, or ends a line. A part of a character
        is shown as U+FFFD and may be any."""
        if token not in self.pieces:
            self.pieces[token] = set(self.tokenizer.decode([token], skip_special=False))
        there = self.pieces[token]
        return (sampling.stop_at_box and "\n" in there) or any(
            stop[-1] in there or "\ufffd" in there for stop in sampling.stop)

    def text(self, ids: list[int], finish: str, sampling) -> str:
        """A reply's text. As servers do, it ends before a stop string, though all ids that were sampled are
        kept. After a box it goes on to the end of its last token: text and ids agree. So they do with
        keep_stop, special tokens included, as the turn is not over."""
        kept = finish == "stop_string" and sampling.keep_stop
        text = self.tokenizer.decode(ids, skip_special=not kept)
        if finish != "stop_string" or kept:
            return text
        return text[:min(i for i in map(text.find, sampling.stop) if i >= 0)]
