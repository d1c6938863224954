"""Who sits where: the rows of the batch and the slots of the KV cache.

Row i of the batch lives in slot i. The running rows come first, so that attention reads their slots where
they lie. Behind them are finished rows, kept because a later prompt may begin like one of them, and gaps.
"""

import bisect
from collections.abc import Collection
from dataclasses import dataclass, field

from slm.episode import Sampling
from slm.sampling.cache import KVCache
from slm.sampling.draw import Controls

SHARED_TOKENS = 16  # a shorter common prefix is computed rather than copied
ROWS = [2, 4, 8, 16, *range(32, 4097, 32)]  # recorded rounds are filled up to one of these, or to all slots


@dataclass(eq=False)
class Row:
    """One reply under way, or finished and kept for its cached prefix."""
    ticket: int
    sample: int
    tokens: list[int]    # the prompt and what is written so far
    prompt: int          # tokens of the prompt
    limit: int           # tokens that may be written
    sampling: Sampling
    adapter: str | None
    key: int             # of its random numbers
    thinking: bool = False  # whether the prompt has opened a <think>
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0      # leading tokens whose keys and values are in its slot, while it is prefilled
    finish: str | None = None
    filled: bool = False # whether all its tokens but the last have keys and values in its slot
    used: int = 0        # step at which it left
    words: str = ""      # a continuation to be scored ...
    given: list[int] = field(default_factory=list)  # ... and its ids; all but the last are in `tokens`

    @property
    def fresh(self) -> int:
        """How many of its last tokens must be computed: their hidden states tell what is drawn or given."""
        return max(1, len(self.given))

    def states(self, draft: list[int] = ()) -> list[tuple]:
        """What draw.py needs to draw after the last token and after each token of a draft: token, position,
        key, tokens drawn so far, settings."""
        return [(token, len(self.tokens) - 1 + i, self.key, len(self.logprobs) + i, self.sampling)
                for i, token in enumerate((self.tokens[-1], *draft))]


class Slots:
    """max_rows: rows decoded together. max_tokens: room of the cache, slots times length. positions: the
    model's context. recorded: a new size of the cache costs new recordings, so it grows in larger steps.
    controls: of the running rows; None after any change among them."""

    def __init__(self, cache: KVCache, max_rows: int, max_tokens: int, positions: int, recorded: bool):
        self.cache, self.max_rows, self.max_tokens = cache, max_rows, max_tokens
        self.positions, self.recorded = positions, recorded
        self.rows: list[Row | None] = []
        self.running = 0
        self.controls: Controls | None = None

    @property
    def live(self) -> list[Row]:
        """The running rows."""
        return self.rows[:self.running]

    def clear(self) -> None:
        """Forget all rows and give the cache's memory back."""
        self.rows, self.running, self.controls = [], 0, None
        self.cache.clear()

    def forget_kept(self) -> None:
        """Forget finished rows. Only while none is running."""
        self.rows = [None] * len(self.rows)

    def shared(self, row: Row, rows: list[Row]) -> tuple[Row | None, int]:
        """The one of `rows` with the longest common prefix, and its length (None, 0: not worth a copy). The
        last tokens are never part of it: what comes next is predicted from their hidden states."""
        best, longest = None, SHARED_TOKENS - 1
        for other in rows:
            most = min(len(row.tokens) - row.fresh, len(other.tokens) - 1)
            if (most > longest and other.tokens[longest] == row.tokens[longest]
                    and other.adapter == row.adapter):
                length = common(row.tokens, other.tokens, most)
                if length > longest:
                    best, longest = other, length
        return best, longest if best else 0

    def kept_like(self, row: Row) -> tuple[Row | None, int]:
        """`shared` among all rows whose keys and values are in the cache."""
        return self.shared(row, [other for other in self.rows if other and other.filled])

    def seat(self, row: Row, source: Row | None, shared: int, waiting: Collection[Row]) -> bool:
        """Put a row into the slot after the last running one, with the first `shared` tokens of `source`;
        False if the cache has no room for it. waiting: all rows in line."""
        slot = self.running
        longest = max(len(r.tokens) for r in [row, *self.live])
        slack = SHARED_TOKENS if slot else 0  # some room to write, or it would soon be sent back
        if not self.fit(slot + 1, longest + slack, waiting):
            return False
        there = self.rows[slot]
        if there is not None and there is not source:
            away = self._spare(source)
            if away != slot:
                self.cache.copy(slot, [away], len(there.tokens))
                self.rows[away] = there
        row.cached = shared if source in self.rows else 0
        if row.cached and source is not there:
            self.cache.copy(self.rows.index(source), [slot], shared)
        self.rows[slot] = row
        self.running += 1
        self.controls = None
        return True

    def _spare(self, source: Row | None) -> int:
        """A slot for a kept row that must make way: a free one, or else that of the row kept longest."""
        slots = [i for i in range(self.running, len(self.rows)) if self.rows[i] is not source or not source]
        return min(slots, key=lambda i: self.rows[i].used if self.rows[i] else -1)

    def fit(self, slots: int, length: int, waiting: Collection[Row]) -> bool:
        """Make the cache hold this many slots of this length; False if max_tokens forbids it. If there is
        room, finished rows get slots too. On a CPU the length stays close to what is needed: bfloat16
        products copy what they don't read whole."""
        cache = self.cache
        if slots <= cache.slots and length <= cache.length:
            return True
        lengths = [up(length), length]
        if length <= cache.length:
            lengths.insert(0, cache.length)
        elif self.recorded:
            lengths[:0] = [max(row.prompt + row.limit for row in [*waiting, *self.live]), up(length * 3 // 2)]
        most = min(self.positions, self.max_tokens)
        fitting = [min(n, most) for n in lengths if min(n, most) * slots <= self.max_tokens]
        if not fitting:
            return False
        wish = min(self.max_rows, self.running + len(waiting)) * 3 // 2
        if self.recorded:
            wish = filled_up(max(2, wish), wish)
        count = max(slots, min(max(cache.slots, wish), self.max_tokens // fitting[0]))
        cache.resize(count, fitting[0])
        self.controls = None
        kept = [r if r and len(r.tokens) <= fitting[0] else None for r in self.rows[:count]]
        self.rows = kept + [None] * (count - len(kept))
        return True

    def leave(self, step: int) -> list[Row]:
        """Take the finished rows out of the batch and return them; the last running rows move into their
        slots."""
        rows, running = self.live, self.running
        order = list(range(running))
        for i in reversed(range(len(rows))):
            if rows[i].finish:
                running -= 1
                order[i], order[running] = order[running], order[i]
        targets = [i for i, source in enumerate(order) if source != i]
        if targets:  # may run out of memory: nothing has changed yet
            self.cache.move([order[i] for i in targets], targets, max(len(rows[i].tokens) for i in targets))
        self.rows[:len(rows)], self.running = [rows[i] for i in order], running
        left = self.rows[running:len(rows)][::-1]
        for row in left:
            row.used, self.controls = step, None
        return left

    def drop_last(self) -> Row:
        """Take the newest running row out; it is to be prefilled again."""
        self.running -= 1
        row, self.rows[self.running], self.controls = self.rows[self.running], None, None
        return row


def up(n: int) -> int:
    """The next multiple of 64."""
    return -(-n // 64) * 64


def filled_up(count: int, otherwise: int) -> int:
    """The smallest of ROWS that is at least `count`."""
    at = bisect.bisect_left(ROWS, count)
    return ROWS[at] if at < len(ROWS) else otherwise


def common(a: list[int], b: list[int], most: int) -> int:
    """Length of the common prefix of two lists, at most `most`, by bisection on slices."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
