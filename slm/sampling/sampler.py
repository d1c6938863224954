"""Sample replies from the model that is being trained: continuous batching over one cache.

A language model writes one token at a time, and every token needs all the weights once. On their way from
memory they can serve many sequences, so sequences are decoded together, as the rows of one batch. But
replies have ragged lengths: a fixed batch runs until its longest reply is done, its finished rows idle.
*Continuous* batching decides anew at every step who is in the batch:

    step():  waiting requests take the free rows and are prefilled: all their prompt tokens in one packed pass
             every row decodes a token, or a few
             rows that met a stop id, a stop string, a complete box or their limit leave

What a token needs from those before it, their keys and values in every layer, is kept in the KV cache, one
slot a row. Row i lives in slot i: when a row leaves, the last one moves into its place, so the batch is
always the first slots of the cache and attention reads them where they lie. The slot of a row that left is
kept until its room is wanted. A prompt that starts like a kept or running row (the next turn of a
conversation, another sample of the same prompt, a common system prompt) copies that part instead of
computing it.

When rows outgrow the cache, the newest goes back to the waiting line with what it has written and is
prefilled again later: slower, never stuck. Random numbers are a hash of (seed + sample, prompt, place in the
reply), so a reply does not depend on what else is in the batch. In bfloat16 that holds up to rounding: matrix
products of other shapes round differently (every RL run measures and shows it). The weights are the
trainer's own tensors, taken as they are at each step. A few rows on a CPU are decoded several tokens a step
where drafts of them come true (draft.py); replies stay the same. A GPU decodes several rounds between two
looks of the host at what was drawn, each recorded and replayed in one launch (gpu.py).

Not covered: beam search, a second model that drafts, more than one device (endpoint.py and vLLM do that).
"""

import math
import time
import warnings
import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from slm import BadInput, lora
from slm.attention import Decode, KVCache, Prefill
from slm.episode import Reply, Request, Sampling
from slm.model import one_thread
from slm.sampling.drafts import Drafts
from slm.sampling.draw import Controls
from slm.sampling.endings import Endings
from slm.sampling.graphs import Recordings

PREFILL_TOKENS = 512, 16384  # in one packed pass, on a CPU (its own caches hold no more) and on a GPU
SHARED_TOKENS = 16     # a shorter common prefix is computed rather than copied
BURST = 8              # decode rounds between two looks at what was drawn, on a GPU
SPAN = 128             # without flash attention, recorded rounds attend over a multiple of this
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
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0      # leading tokens whose keys and values are in its slot, while it is prefilled
    finish: str | None = None
    filled: bool = False # whether all its tokens but the last have keys and values in its slot
    used: int = 0        # step at which it left

    def states(self, draft: list[int] = ()) -> list[tuple]:
        """What draw.py needs of the last token and of those drafted behind it: token, position, key, tokens
        drawn so far, settings."""
        return [(token, len(self.tokens) - 1 + i, self.key, len(self.logprobs) + i, self.sampling)
                for i, token in enumerate((self.tokens[-1], *draft))]


class Sampler:
    """submit() requests, step() until nothing is pending; or generate() for a list of them.
    max_batch: rows decoded together. cache_tokens: room of the KV cache, rows times the longest one's length;
    by default what 2 GiB hold, or half of a GPU's free memory."""

    def __init__(self, model, tokenizer, max_batch: int | None = None, cache_tokens: int | None = None):
        self.model, self.tokenizer, self.endings = model, tokenizer, Endings(tokenizer)
        self.device = next(model.parameters()).device
        cuda, small = self.device.type == "cuda", model.config.hidden <= 256
        self.sharded = hasattr(model, "unshard")  # FSDP gathers weights into places and streams of its own
        self.small = small and not cuda
        self.max_batch = max_batch or (256 if cuda or small else 64)
        self.cache = KVCache(model.config, self.device, next(model.parameters()).dtype)
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if cuda else 2 << 30
        self.cache_tokens = cache_tokens or max(2048, free // self.cache.token_bytes)
        self.waiting: deque[Row] = deque()
        self.slots: list[Row | None] = []   # running rows first, then kept ones and gaps
        self.running = 0
        self.finished: list[Row] = []
        self.controls: Controls | None = None  # of the running rows; None after any change among them
        self.prefill_tokens = PREFILL_TOKENS[cuda]
        self.burst = BURST if cuda else 1
        self.drafts = None if cuda else Drafts()
        self.recorded = Recordings() if cuda and not self.sharded else None
        self.steps = self.tickets = self.tokens = 0
        self.parameters, self.weights = [], [] # those that the cache was computed with; see _check_weights
        self.training = False                  # whether to put the model back into training mode

    # ---- the protocol --------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return bool(self.waiting or self.running or self.finished)

    def submit(self, request: Request) -> int:
        """Queue a request; its n replies come out of step() under the ticket returned. BadInput names what
        can't be sampled. Where the context or the cache ends, a reply ends with "length"."""
        s, context = request.sampling, self.model.config.positions
        tokens = self.tokenizer.chat(request.messages) if request.ids is None else request.ids
        room = min(context, self.cache_tokens) - len(tokens)
        for wrong, what, expected in (
                (not tokens, "an empty prompt", "a token at least"),
                (room < 1, f"a prompt of {len(tokens)} tokens", f"fewer than {room + len(tokens)}, what the "
                 f"{'model' if context <= self.cache_tokens else 'KV cache'} holds with the reply"),
                (tokens and not 0 <= min(tokens) <= max(tokens) < self.model.config.vocab,
                 "a token outside the vocabulary", f"ids from 0 to {self.model.config.vocab - 1}"),
                (s.max_tokens < 1, f"max_tokens {s.max_tokens}", "1 or more"),
                (not 0 <= s.temperature < math.inf, f"temperature {s.temperature}", "0 or more"),
                (not 0 < s.top_p <= 1, f"top_p {s.top_p}", "more than 0 and at most 1"),
                (s.top_k < 0, f"top_k {s.top_k}", "0 (off) or more"),
                ("" in s.stop, "an empty stop string", "a character at least"),
                (request.n < 1, f"{request.n} samples", "1 or more"),
                (request.adapter not in (None, *lora.names(self.model)), f"adapter {request.adapter!r}",
                 f"one of {lora.names(self.model)}")):
            if wrong:
                raise BadInput(f"request {self.tickets} has {what}; expected {expected}")
        self._check_weights()
        adapter = request.adapter or self.model.lora.active
        salt = zlib.crc32(array("q", tokens).tobytes())
        self.waiting.extend(
            Row(self.tickets, i, list(tokens), len(tokens), min(s.max_tokens, room), s, adapter,
                ((s.seed + i) << 32 ^ salt) % 2 ** 63) for i in range(request.n))
        self.tickets += 1
        return self.tickets - 1

    def step(self) -> list[tuple[int, int, Reply]]:
        """Let waiting requests in, decode a round (on a GPU a burst), return what ended: (ticket, sample,
        reply)."""
        if self.model.training:  # no dropout here; training mode comes back once nothing is pending
            self.model.eval()
            self.training = True
        try:
            with torch.inference_mode():
                self._admit()
                if self.running:
                    with one_thread(self.small):
                        self._decode()
        except RuntimeError as e:
            self._shrink(e)
        self.steps += 1
        done, self.finished = self.finished, []
        if self.training and not self.pending:
            self.model.train()
            self.training = False
        return [(row.ticket, row.sample, self._reply(row)) for row in done]

    def close(self) -> None:
        """Forget every request and give the cache's memory back."""
        self.waiting.clear()
        self.running, self.finished = 0, []
        self.forget()
        self.model.train(self.model.training or self.training)
        self.training = False

    def forget(self) -> None:
        """Drop all that is cached; what is running is prefilled again."""
        for row in reversed(self.slots[:self.running]):
            if row.finish:
                self.finished.append(row)
            else:
                self._requeue(row)
        self.slots, self.running, self.drafts = [], 0, self.drafts and Drafts()
        self.cache.clear()
        if self.recorded:  # their memory too
            self.recorded.at(None)

    def generate(self, requests: list[Request], progress: bool = True) -> list[list[Reply]]:
        """All replies, in the order of the requests, n to each. After Ctrl-C: those that are finished."""
        assert not self.pending, "generate() on a sampler with pending requests would lose their replies"
        try:
            place = {self.submit(request): i for i, request in enumerate(requests)}
        except BadInput:
            self.waiting.clear()
            raise
        replies: list[dict] = [{} for _ in requests]
        start, tokens = time.monotonic(), self.tokens
        bar = tqdm(total=sum(r.n for r in requests), disable=not progress, unit="reply", smoothing=0.1)
        try:
            while self.pending:
                for ticket, sample, reply in self.step():
                    replies[place[ticket]][sample] = reply
                    bar.update()
                rate = (self.tokens - tokens) / (time.monotonic() - start)
                bar.set_postfix_str(f"{rate:,.0f} tok/s, {self.running} running, {len(self.waiting)} waiting",
                                    refresh=False)
        except KeyboardInterrupt:
            for row in self.finished:
                replies[place[row.ticket]][row.sample] = self._reply(row)
                bar.update()
            self.close()
            print(f"\nstopped: {bar.n} of {bar.total} replies are finished")
        finally:
            bar.close()
        return [[group[i] for i in sorted(group)] for group in replies]

    # ---- who is in the batch -------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests the free rows, as far as the cache has room, and prefill them."""
        while True:
            pack: list[Row] = []
            twins: list[tuple[Row, Row]] = []  # (row, one of the pack with the same prompt, to be copied)
            room = self.prefill_tokens
            while self.waiting and self.running < self.max_batch and room > 0:
                row = self.waiting[0]
                same = pack and (pack[-1].tokens, pack[-1].adapter) == (row.tokens, row.adapter)
                twin = pack[-1] if same else None
                source, shared = None, 0
                if twin is None:
                    source, shared = self._prefix(row, [r for r in self.slots if r and r.filled])
                    if self._prefix(row, pack)[1] >= shared + SHARED_TOKENS:
                        break  # once the pack is computed there is more to copy
                if not self._seat(row, source, shared):
                    break
                self.waiting.popleft()
                if twin:
                    twins.append((row, twin))
                else:
                    pack.append(row)
                    room -= len(row.tokens) - row.cached
            if not pack:
                return
            self._prefill(pack, twins)

    def _prefix(self, row: Row, rows: list[Row]) -> tuple[Row | None, int]:
        """The row that shares the longest prefix with this one, and that length (0: not worth a copy). The
        last token is never part of it: its hidden state is needed for the first new token."""
        best, longest = None, SHARED_TOKENS - 1
        for other in rows:
            most = min(len(row.tokens), len(other.tokens)) - 1
            if (most > longest and other.tokens[longest] == row.tokens[longest]
                    and other.adapter == row.adapter):
                shared = _common(row.tokens, other.tokens, most)
                if shared > longest:
                    best, longest = other, shared
        return best, longest if best else 0

    def _seat(self, row: Row, source: Row | None, shared: int) -> bool:
        """Put a row into the slot after the last running one; False when the cache has no room for it."""
        slot = self.running
        longest = max(len(r.tokens) for r in [row, *self.slots[:slot]])
        slack = SHARED_TOKENS if slot else 0  # some room to write, or it would soon be sent back
        if not self._fit(slot + 1, longest + slack):
            return False
        there = self.slots[slot]
        if there is not None and there is not source and (away := self._spare_slot(source)) != slot:
            self.cache.copy(slot, [away], len(there.tokens))
            self.slots[away] = there
        row.cached = shared if source in self.slots else 0
        if row.cached and source is not there:
            self.cache.copy(self.slots.index(source), [slot], shared)
        self.slots[slot] = row
        self.running += 1
        self.controls = None
        return True

    def _spare_slot(self, source: Row | None) -> int:
        """A slot for a kept row that must make way: a free one, or else that of the one kept longest."""
        slots = [i for i in range(self.running, len(self.slots)) if self.slots[i] is not source or not source]
        return min(slots, key=lambda i: self.slots[i].used if self.slots[i] else -1)

    def _fit(self, slots: int, length: int) -> bool:
        """Make the cache hold this many slots of this length; False when cache_tokens forbids it. Where
        there is room it gets slots for finished rows too. On a CPU its length stays close to what is needed:
        bfloat16 products copy what they don't read whole."""
        cache = self.cache
        if slots <= cache.slots and length <= cache.length:
            return True
        most, up = min(self.model.config.positions, self.cache_tokens), lambda n: -(-n // 64) * 64
        wanted = [up(length), length]
        if length <= cache.length:
            wanted.insert(0, cache.length)
        elif self.recorded:  # a new size means new recordings
            everyone = [*self.waiting, *self.slots[:self.running]]
            wanted[:0] = [max(row.prompt + row.limit for row in everyone), up(length * 3 // 2)]
        fitting = [n for n in (min(n, most) for n in wanted) if n * slots <= self.cache_tokens]
        if not fitting:
            return False
        wish = min(self.max_batch, self.running + len(self.waiting)) * 3 // 2
        if self.recorded:  # rows that fill up a batch need slots
            wish = next((n for n in ROWS if n >= max(2, wish)), wish)
        count = max(slots, min(max(cache.slots, wish), self.cache_tokens // fitting[0]))
        cache.resize(count, fitting[0])
        self.controls = None
        kept = [r if r and len(r.tokens) <= fitting[0] else None for r in self.slots[:count]]
        self.slots = kept + [None] * (count - len(kept))
        return True

    def _leave(self) -> None:
        """Take the finished rows out of the batch; the last running rows move into their slots."""
        rows, running = self.slots[:self.running], self.running
        order = list(range(running))
        for i in reversed(range(len(rows))):
            if rows[i].finish:
                running -= 1
                order[i], order[running] = order[running], order[i]
        targets = [i for i, source in enumerate(order) if source != i]
        if targets:  # may run out of memory: nothing has changed yet
            self.cache.move([order[i] for i in targets], targets, max(len(rows[i].tokens) for i in targets))
        self.slots[:len(rows)], self.running = [rows[i] for i in order], running
        for row in reversed(self.slots[running:len(rows)]):
            row.used, self.controls = self.steps, None
            self.finished.append(row)

    def _requeue(self, row: Row) -> None:
        """Send a row back to the head of the waiting line."""
        row.filled, row.cached, self.controls = False, 0, None
        self.waiting.appendleft(row)

    # ---- the two passes ------------------------------------------------------------------------------------

    def _prefill(self, pack: list[Row], twins: list[tuple[Row, Row]]) -> None:
        """Compute the prompts of the pack, copy them to its twins, and draw the first new token of each."""
        last, todo = {}, pack
        while todo:
            segments, room = [], self.prefill_tokens
            for row in todo:
                count = min(len(row.tokens) - row.cached, room)
                if count:
                    segments.append((row, row.cached, count))
                room -= count
            attend = Prefill(self.cache, [(self.slots.index(row), at, n) for row, at, n in segments])
            ids = [t for row, start, n in segments for t in row.tokens[start:start + n]]
            with lora.use(self.model, [(row.adapter, n) for row, _, n in segments]):
                hidden = self.model(torch.tensor(ids, device=self.device), attend.positions, attend)
            end = 0
            for row, _, n in segments:
                row.cached, end = row.cached + n, end + n
                last[row] = hidden[end - 1]
            todo = [row for row in todo if row.cached < len(row.tokens)]
        for row in pack:
            copies = [self.slots.index(twin) for twin, original in twins if original is row]
            self.cache.copy(self.slots.index(row), copies, len(row.tokens))
        rows = pack + [twin for twin, _ in twins]
        hidden = torch.stack([last[row] for row in [*pack, *(original for _, original in twins)]])
        controls = Controls([state for row in rows for state in row.states()], self.device)
        with lora.use(self.model, [(row.adapter, 1) for row in rows]):
            ids, logprobs = controls.draw(self.model.logits(hidden))
        for row in pack if self.drafts else []:
            self.drafts.learn(row.tokens, 0)
        self._accept(rows, ids[:, None].tolist(), logprobs[:, None].tolist())
        self._leave()

    def _decode(self) -> None:
        """One more token for every running row, or several: on a GPU, since asking for each would idle it; on
        a CPU where drafts come true."""
        rows = self.slots[:self.running]
        reach = lambda: max(min(len(row.tokens) + self.burst - 1, row.prompt + row.limit) for row in rows)
        while not self._fit(len(rows), longest := reach()):
            self._requeue(rows.pop())
            self.running -= 1
            self.slots[self.running] = None
        room = lambda row: min(row.limit - len(row.logprobs) - 1, self.cache.length - len(row.tokens))
        drafts = [self.drafts.guess(row.tokens, len(rows), room(row)) for row in rows] if self.drafts else []
        self._check(rows, drafts) if any(drafts) else self._rounds(rows, longest)
        self._leave()

    def _check(self, rows: list[Row], drafts: list[list[int]]) -> None:
        """Draw after every row's last token and after each token of its draft, and keep what counts."""
        c = Controls([s for row, draft in zip(rows, drafts) for s in row.states(draft)], self.device)
        self.controls = None
        adapters = [(row.adapter, 1 + len(draft)) for row, draft in zip(rows, drafts)]
        longest = max(len(row.tokens) + len(draft) for row, draft in zip(rows, drafts))
        with lora.use(self.model, adapters):
            ids, logprobs = (x.tolist() for x in self._round(c, adapters, longest))
        kept = self.drafts.kept(drafts, ids)
        self._accept(rows, [ids[span] for span in kept], [logprobs[span] for span in kept])

    def _rounds(self, rows: list[Row], longest: int) -> None:
        """One token for each row; a burst of them on a GPU. Those behind the end of a reply are dropped."""
        adapters = [(row.adapter, 1) for row in rows]
        cut = any(row.sampling.temperature and (row.sampling.top_k or row.sampling.top_p < 1) for row in rows)
        recorded = self.recorded and not cut and len(set(adapters)) == 1
        cache = self.cache
        if recorded:
            self.recorded.at([cache.kv.data_ptr(), cache.kv.shape,
                              *(p.data_ptr() for p in self.model.parameters())])
        if self.controls is None:
            padded = next((n for n in ROWS if len(rows) <= n <= cache.slots), cache.slots) if recorded else 0
            outside = cache.length if cache.spare else 0
            self.controls = Controls([s for row in rows for s in row.states()], self.device, padded, outside)
        count = min(self.burst, max(row.limit - len(row.logprobs) for row in rows))
        once = self._recorded_round if recorded else self._round
        with lora.use(self.model, adapters):  # what a recording reads of an adapter must be up to date
            draws = [once(self.controls, adapters, longest) for _ in range(count)]
        self._accept(rows, *(torch.stack(x, 1).tolist() for x in zip(*draws)))

    def _round(self, c: Controls, adapters: list[tuple[str | None, int]], longest: int):
        """Compute the controls' tokens, as many of each row as stand beside its adapter, and draw the ones
        after them: ids (T,), log-probs (T,). No host involved."""
        attend = Decode(self.cache, c.position, [n for _, n in adapters], longest)
        return c.draw(self.model.logits(self.model(c.last, c.position, attend)))

    def _recorded_round(self, c: Controls, adapters: list[tuple[str | None, int]], longest: int):
        """The same, recorded once for a number of rows and a span, in one launch."""
        span = self.cache.length if self.cache.flash else min(-(-longest // SPAN) * SPAN, self.cache.length)
        key, rows = (len(c.last), span, c.sampled, c.greedy_rows, adapters[0]), adapters[:1] * len(c.last)
        self.controls, *drawn = self.recorded.replay(key, lambda: self._round(c, rows, span), c)
        return drawn

    def _accept(self, rows: list[Row], ids: list[list[int]], logprobs: list[list[float]]) -> None:
        """Append to each row the tokens and log-probs that were drawn for it, as far as it goes on."""
        for row, new, probs in zip(rows, ids, logprobs):
            start, row.filled = len(row.tokens), True
            count, row.finish = self.endings.find(row, new)
            if math.isnan(sum(probs[:count])):
                place = len(row.logprobs) + list(map(math.isnan, probs)).index(True)
                raise FloatingPointError(
                    f"request {row.ticket}, sample {row.sample}: the logits are NaN at token {place} of its "
                    f"reply (step {self.steps} of the sampler)")
            row.tokens += new[:count]
            row.logprobs += probs[:count]
            self.tokens += count
            if self.drafts:
                self.drafts.learn(row.tokens, start)

    def _reply(self, row: Row) -> Reply:
        ids = row.tokens[row.prompt:]
        text = self.endings.text(ids, row.finish, row.sampling.stop)
        return Reply(text, ids, row.logprobs, row.finish, row.tokens[:row.prompt], None, row.prompt, len(ids))

    def _shrink(self, error: Exception) -> None:
        """After running out of memory: halve batch and cache, and put what was running back in line."""
        known = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known or self.max_batch == 1:
            raise error
        self.max_batch = max(1, (self.running or self.max_batch) // 2)
        self.prefill_tokens = max(256, self.prefill_tokens // 2)
        held = self.cache.slots * self.cache.length or self.cache_tokens
        self.forget()
        self.cache_tokens = max(held // 2, *(row.prompt + row.limit for row in self.waiting))
        torch.cuda.empty_cache()
        warnings.warn(f"out of memory: sampling goes on with at most {self.max_batch} rows and "
                      f"{self.cache_tokens:,} cached tokens", stacklevel=3)

    def _check_weights(self) -> None:
        """Drop what was cached with other weights (seen by identity, address and version of each)."""
        if self.pending:
            return
        if not self.sharded:
            self.model.join()
        self.parameters, before = list(self.model.parameters()), self.weights  # kept, so that ids stay theirs
        self.weights = [(id(p), p.data_ptr(), p._version) for p in self.parameters]
        if self.weights != before:
            self.slots, self.drafts = [None] * len(self.slots), self.drafts and Drafts()
            self.model.lora.last.clear()


def _common(a: list[int], b: list[int], most: int) -> int:
    """Length of the common prefix of two lists, at most `most`, by bisection on slices."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
