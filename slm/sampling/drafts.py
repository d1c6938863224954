"""Guesses of what a row will write next, looked up in what was written before.

A decoding step reads all the weights, however few tokens it computes. So one step can compute a row's last
token and a *draft* of the tokens that may follow. The sampler draws a token at each of these places as always
(same logits, same random number), and keeps what it drew up to the first token that differs from the draft.
Replies are the same as without drafts: a draft only saves steps. This is speculative decoding (Leviathan et
al. 2023, arXiv:2211.17192). Random numbers belong to places in the reply, so nothing needs correction.

The guess is the token that came last time after the same few tokens, in any prompt or reply (prompt lookup,
Saxena 2023): small models repeat the question, themselves and each other. Drafts counts how often guesses
come true, apart for each length of context and for how many times in a row the guess was right. A draft ends
when the chance of its next token is no longer worth the computation.

Not covered: drafts by a second model or by extra heads.
"""

CONTEXTS = 4, 3, 2, 1  # tokens of context, longest first
ROWS = 8               # with more rows, a step computes enough without drafts
FIXED = 60             # tokens that cost as much as the part of a step that does not grow with them
SURE = 3               # times right in a row; more count as this many
LONGEST = 8            # tokens of a draft
ENTRIES = 1 << 20      # contexts remembered; then it starts anew


class Drafts:
    def __init__(self):
        self.followers: dict[tuple, tuple] = {}  # context -> (the token after it, times right in a row)
        self.came_true = {(n, sure): [1, 2] for n in CONTEXTS for sure in range(SURE + 1)}  # [true, all]
        self.expected = self.counted = 1.0  # tokens of drafts: how many should have come true, how many did

    def learn(self, tokens: list[int], start: int) -> None:
        """tokens[start:] are new: remember what came after what, and count which guesses were right."""
        if len(self.followers) > ENTRIES:
            self.followers.clear()
        for i in range(max(start, 1), len(tokens)):
            known = False
            for n in CONTEXTS:
                if n > i:
                    continue
                context = tuple(tokens[i - n:i])
                guess, sure = self.followers.get(context, (None, 0))
                if guess is not None and not known:  # the one that a draft would have used
                    count, known = self.came_true[n, sure], True
                    count[0] += guess == tokens[i]
                    count[1] += 1
                self.followers[context] = tokens[i], min(sure + 1, SURE) if guess == tokens[i] else 0

    def guess(self, tokens: list[int], rows: int, most: int) -> list[int]:
        """At most `most` tokens that may follow. A token that comes true saves a row's share of a step,
        (FIXED + rows) / rows, and each costs 1: it must come true with a chance of rows / (FIXED + rows)."""
        if rows > ROWS:
            return []
        context, draft, chance = tuple(tokens[-CONTEXTS[0]:]), [], self.counted / self.expected
        while len(draft) < min(most, LONGEST):
            n = next((n for n in CONTEXTS if context[-n:] in self.followers), None)
            if n is None:
                break
            guess, sure = self.followers[context[-n:]]
            true, guesses = self.came_true[n, sure]
            chance *= true / guesses
            if chance * (FIXED + rows) < rows:
                break
            self.expected += chance
            draft.append(guess)
            context = (*context[1 - CONTEXTS[0]:], guess)
        return draft

    def kept(self, drafts: list[list[int]], drawn: list[int]) -> list[slice]:
        """drawn: the tokens after each row's last one and after each token of its draft, row after row.
        Returns where those of each row that count are: while they agree with the draft, and the first that
        does not, which was drawn after nothing but what is kept."""
        out, start = [], 0
        for draft in drafts:
            new = drawn[start:start + len(draft) + 1]
            agree = next((i for i, token in enumerate(draft) if token != new[i]), len(draft))
            self.counted += agree
            out.append(slice(start, start + agree + 1))
            start += len(draft) + 1
        return out
