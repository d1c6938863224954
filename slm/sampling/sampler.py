"""Sample replies from the model that is being trained: continuous batching over one cache.

A language model writes one token at a time, and every token needs all the weights once. On their way from
memory they can serve many sequences, so sequences are decoded together, as the rows of one batch. But replies
have ragged lengths: a fixed batch runs until its longest reply is done, and its finished rows idle.
*Continuous* batching decides anew at every step who is in the batch:

    step():  waiting requests take the free rows and are prefilled: all their prompt tokens in one packed pass
             every row decodes a token, or a few
             rows that met a stop id, a stop string, a complete box or their limit leave

A new token needs the keys and values of those before it, in every layer. The KV cache keeps them, one slot a
row (slots.py). A row that left stays in its slot until somebody wants the room. A prompt that starts like a
kept or running row (the next turn of a conversation, another sample of the same prompt, a common system
prompt) copies that part and does not compute it again.

If the rows outgrow the cache, the newest goes back to the waiting line with what it has written and is
prefilled again later: slower, never stuck. Random numbers are a hash of (seed + sample, prompt, place in the
reply), so a reply does not depend on what else is in the batch. In bfloat16 that holds up to rounding, since
products of other shapes round differently (train_grpo.py logs it as dlogp).

A request with continuations draws nothing. Each continuation is a row that is prefilled behind the prompt,
which is computed once; its log-prob is read, and the row leaves.

The weights are the trainer's own tensors. fast.py runs the network over them in an order that suits
sampling. A few rows on a CPU decode several tokens a step if drafts of them come true (drafts.py). A GPU
decodes several rounds between two looks of the host at the result, and replays each from a recording
(graphs.py).

Not covered: beam search, a second model that drafts, more than one device (use an Endpoint and vLLM).
"""

import math
import time
import warnings
import zlib
from array import array
from collections import Counter, deque

import torch
from tqdm import tqdm

from slm import BadInput, lora
from slm.attention import flash_runs
from slm.episode import Reply, Request
from slm.model import Qwen2
from slm.runs.device import release
from slm.sampling.cache import Decode, KVCache, Prefill
from slm.sampling.drafts import Drafts
from slm.sampling.draw import Controls
from slm.sampling.endings import Endings
from slm.sampling.fast import Fast, Plain, one_thread
from slm.sampling.flash import FlashDecode, FlashPrefill
from slm.sampling.graphs import Recordings
from slm.sampling.slots import SHARED_TOKENS, Row, Slots, filled_up

PREFILL_TOKENS = 512, 16384  # in one packed pass, on a CPU (its own caches hold no more) and on a GPU
BURST = 8              # decode rounds between two looks at what was drawn, on a GPU
SCORED = 256           # given tokens that have logits at once
SPAN = 128             # without flash attention, recorded rounds attend over a multiple of this


class Sampler:
    """submit() requests, step() until nothing is pending; or generate() for a list of them.
    max_batch: rows decoded together. cache_tokens: room of the KV cache, rows times the longest one's length;
    by default what 2 GiB hold, or half of a GPU's free memory."""

    def __init__(self, model, tokenizer, max_batch: int | None = None, cache_tokens: int | None = None):
        weight = next(model.parameters())
        self.model, self.device = model, weight.device
        self.tokenizer, self.endings = tokenizer, Endings(tokenizer)
        cuda, small = self.device.type == "cuda", model.config.hidden <= 256
        self.small = small and not cuda
        sharded = hasattr(model, "unshard")  # FSDP gathers weights into places and streams of its own
        self.network = Fast(model) if isinstance(model, Qwen2) and not sharded else Plain(model)
        self.cache = KVCache(model.config, self.device, weight.dtype)
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if cuda else 2 << 30
        self.recorded = Recordings() if cuda and not sharded else None
        self.slots = Slots(self.cache, max_batch or (256 if cuda or small else 64),
                           cache_tokens or max(2048, free // self.cache.token_bytes),
                           model.config.positions, bool(self.recorded))
        flash = flash_runs(self.device, weight.dtype, model.config.head_size)
        self.prefill_by, self.decode_by = (FlashPrefill, FlashDecode) if flash else (Prefill, Decode)
        self.waiting: deque[Row] = deque()
        self.finished: list[Row] = []
        self.prefill_tokens = PREFILL_TOKENS[cuda]
        self.burst = BURST if cuda else 1
        self.drafts = None if cuda else Drafts()
        self.steps = self.tickets = self.tokens = 0
        self.busy = Counter()  # seconds and tokens of all steps, and of those with the batch (nearly) full
        self.scores: dict[int, dict[str, float | None]] = {}  # ticket -> continuation -> log-prob, once known

    # ---- the protocol --------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return bool(self.waiting or self.slots.running or self.finished)

    def submit(self, request: Request) -> int:
        """Queue a request; its n replies come out of step() under the ticket returned. BadInput names what
        can't be sampled. If the context or the cache ends first, a reply ends with "length". With
        continuations there is one Reply, with their scores; each is tokenized by itself."""
        tokens = self.tokenizer.chat(request.messages) if request.ids is None else request.ids
        given = {words: self.tokenizer.following(words) for words in request.continuations}
        room = min(self.model.config.positions, self.slots.max_tokens) - len(tokens)
        self._validate(request, tokens, room, given)
        if not self.pending:
            self._look_at_weights()
        adapter, s = request.adapter or lora.active(self.model), request.sampling
        if given:
            self.scores[self.tickets] = dict.fromkeys(given)
        self.waiting.extend(Row(self.tickets, 0, tokens + ids[:-1], len(tokens), len(ids), s, adapter, 0,
                                words=words, given=ids) for words, ids in given.items())
        salt = zlib.crc32(array("q", tokens).tobytes())
        thinking = self.endings.thinking(tokens, s)
        self.waiting.extend(
            Row(self.tickets, i, list(tokens), len(tokens), min(s.max_tokens, room), s, adapter,
                ((s.seed + i) << 32 ^ salt) % 2 ** 63, thinking) for i in range(0 if given else request.n))
        self.tickets += 1
        return self.tickets - 1

    def _validate(self, request: Request, tokens: list[int], room: int, given: dict[str, list[int]]) -> None:
        """BadInput if a request can't be sampled. room: tokens that its replies may have. given: the ids of
        its continuations."""
        s, vocab, names = request.sampling, self.model.config.vocab, lora.names(self.model)
        holder = "model" if self.model.config.positions <= self.slots.max_tokens else "KV cache"
        for wrong, what, expected in (
                (not tokens, "an empty prompt", "a token at least"),
                (not all(given.values()), "an empty continuation", "a token at least"),
                (room < max(map(len, given.values()), default=1), f"a prompt of {len(tokens)} tokens",
                 f"fewer than {room + len(tokens)}, what the {holder} holds with the reply"),
                (tokens and not 0 <= min(tokens) <= max(tokens) < vocab, "a token outside the vocabulary",
                 f"ids from 0 to {vocab - 1}"),
                (s.max_tokens < 1, f"max_tokens {s.max_tokens}", "1 or more"),
                (not 0 <= s.temperature < math.inf, f"temperature {s.temperature}", "0 or more"),
                (not 0 < s.top_p <= 1, f"top_p {s.top_p}", "more than 0 and at most 1"),
                (s.top_k < 0, f"top_k {s.top_k}", "0 (off) or more"),
                ("" in s.stop, "an empty stop string", "a character at least"),
                (request.n < 1, f"{request.n} samples", "1 or more"),
                (request.adapter not in (None, *names), f"adapter {request.adapter!r}", f"one of {names}")):
            if wrong:
                raise BadInput(f"request {self.tickets} has {what}; expected {expected}")

    def step(self) -> list[tuple[int, int, Reply]]:
        """Let waiting requests in, decode a round (on a GPU a burst), return what ended: (ticket, sample,
        reply)."""
        began, tokens, rows = time.perf_counter(), self.tokens, 0
        try:
            with torch.inference_mode():
                self._admit()
                rows = self.slots.running
                if rows:
                    with one_thread(self.small):
                        self._decode()
        except RuntimeError as e:
            self._halve_after_oom(e)
        self.steps += 1
        full = 4 * rows >= 3 * self.slots.max_rows or self.waiting
        for kind in ("full ", "") if full else ("",):
            self.busy[kind + "seconds"] += time.perf_counter() - began
            self.busy[kind + "tokens"] += self.tokens - tokens
        done, self.finished = self.finished, []
        return self._ready(done)

    def written(self, ticket: int) -> str:
        """What a running request's first reply has so far, for a person to see it grow."""
        row = next((row for row in self.slots.live if row.ticket == ticket), None)
        return self.tokenizer.decode(row.tokens[row.prompt:]) if row else ""

    def close(self) -> None:
        """Forget every request and give the cache's memory back."""
        self.waiting.clear()
        self.slots.running, self.finished = 0, []
        self.forget()

    def forget(self) -> None:
        """Drop all that is cached; what is running is prefilled again."""
        for row in reversed(self.slots.live):
            if row.finish:
                self.finished.append(row)
            else:
                self._requeue(row)
        self.slots.clear()
        release()
        self.drafts = self.drafts and Drafts()
        if self.recorded:  # their memory too
            self.recorded.forget_if_moved(None)

    def generate(self, requests: list[Request], progress: bool = True) -> list[list[Reply]]:
        """All replies, in the order of the requests, n to each. After Ctrl-C: those that are finished."""
        assert not self.pending, "generate() on a sampler with pending requests would lose their replies"
        try:
            place = {self.submit(request): i for i, request in enumerate(requests)}
        except BadInput:
            self.waiting.clear()
            raise
        replies: list[dict] = [{} for _ in requests]  # sample -> Reply
        start, tokens = time.monotonic(), self.tokens
        bar = tqdm(total=sum(r.n for r in requests), disable=not progress, unit="reply", smoothing=0.1)
        try:
            while self.pending:
                for ticket, sample, reply in self.step():
                    replies[place[ticket]][sample] = reply
                    bar.update()
                rate = (self.tokens - tokens) / (time.monotonic() - start)
                bar.set_postfix_str(f"{rate:,.0f} tok/s, {self.slots.running} running, "
                                    f"{len(self.waiting)} waiting", refresh=False)
        except KeyboardInterrupt:
            for ticket, sample, reply in self._ready(self.finished):
                replies[place[ticket]][sample] = reply
                bar.update()
            self.close()
            print(f"\nstopped: {bar.n} of {bar.total} replies are finished")
        finally:
            bar.close()
        return [list(dict(sorted(group.items())).values()) for group in replies]

    # ---- waiting requests come in --------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests the free rows, as far as the cache has room, and prefill them."""
        while True:
            pack: list[Row] = []
            twins: list[tuple[Row, Row]] = []  # (row, one of the pack with the same prompt, to be copied)
            room = self.prefill_tokens
            while self.waiting and self.slots.running < self.slots.max_rows and room > 0:
                row = self.waiting[0]
                same = pack and [(x.tokens, x.adapter, x.fresh) for x in (pack[-1], row)]
                twin = pack[-1] if same and same[0] == same[1] else None
                source, shared = None, 0
                if twin is None:
                    source, shared = self.slots.kept_like(row)
                    if self.slots.shared(row, pack)[1] >= shared + SHARED_TOKENS:
                        break  # once the pack is computed there is more to copy
                if not self.slots.seat(row, source, shared, self.waiting):
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

    def _prefill(self, pack: list[Row], twins: list[tuple[Row, Row]]) -> None:
        """Compute the prompts of the pack, copy them to its twins, and draw the first new token of each, or
        score its continuation."""
        last, todo, place = {}, pack, self.slots.rows.index
        while todo:
            segments, room = [], self.prefill_tokens
            for row in todo:
                count = min(len(row.tokens) - row.cached, room)
                if count:
                    segments.append((row, row.cached, count))
                room -= count
            attend = self.prefill_by(self.cache, [(place(row), at, n) for row, at, n in segments])
            ids = [t for row, start, n in segments for t in row.tokens[start:start + n]]
            chosen = self.network.choose([(row.adapter, n) for row, _, n in segments])
            hidden = self.network.hidden(torch.tensor(ids, device=self.device), attend.positions, attend,
                                         chosen)
            end = 0
            for row, _, n in segments:
                row.cached, end = row.cached + n, end + n
                last[row] = torch.cat([last.get(row, hidden[:0]), hidden[end - n:end]])[-row.fresh:]
            todo = [row for row in todo if row.cached < len(row.tokens)]
        for row in pack:
            copies = [place(twin) for twin, original in twins if original is row]
            self.cache.copy(place(row), copies, len(row.tokens))
        rows, originals = pack + [twin for twin, _ in twins], pack + [original for _, original in twins]
        states = {row: last[original] for row, original in zip(rows, originals)}  # (fresh, D) of each
        for row in pack if self.drafts else []:
            self.drafts.learn(row.tokens, 0)
        self._score([row for row in rows if row.given], states)
        rows = [row for row in rows if not row.given]
        if rows:
            hidden = torch.cat([states[row] for row in rows])
            controls = Controls([state for row in rows for state in row.states()], self.device)
            chosen = self.network.choose([(row.adapter, 1) for row in rows])
            ids, logprobs = controls.draw(self.network.logits(hidden, chosen))
            self._accept(rows, ids[:, None].tolist(), logprobs[:, None].tolist())
        self._leave()

    def _score(self, rows: list[Row], states: dict[Row, torch.Tensor]) -> None:
        """Note the log-prob of each row's continuation. These rows are done."""
        if not rows:
            return
        hidden = torch.cat([states[row] for row in rows])
        spans = [(row.adapter, 1) for row in rows for _ in row.given]
        targets = torch.tensor([token for row in rows for token in row.given], device=self.device)
        logprobs: list[float] = []
        for start in range(0, len(spans), SCORED):
            part = slice(start, start + SCORED)
            logits = self.network.logits(hidden[part], self.network.choose(spans[part])).float()
            logprobs += logits.log_softmax(-1).gather(1, targets[part, None]).squeeze(1).tolist()
        for row in rows:
            row.logprobs, logprobs = logprobs[:row.fresh], logprobs[row.fresh:]
            row.finish, row.filled = "score", True
            self._refuse_nan(row, row.logprobs)
            self.scores[row.ticket][row.words] = sum(row.logprobs)

    # ---- running rows go on --------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One more token for every running row, or several: on a GPU, since asking for each would idle it; on
        a CPU if drafts come true."""
        rows, longest = self._rows_that_fit()
        drafts = []
        for row in rows if self.drafts else []:
            room = min(row.limit - len(row.logprobs) - 1, self.cache.length - len(row.tokens))
            drafts.append(self.drafts.guess(row.tokens, len(rows), room))
        if any(drafts):
            self._verify_drafts(rows, drafts)
        else:
            self._rounds(rows, longest)
        self._leave()

    def _rows_that_fit(self) -> tuple[list[Row], int]:
        """The running rows, less those that the cache has no room for, and the longest's length after a
        burst."""
        while True:
            rows = self.slots.live
            longest = max(min(len(row.tokens) + self.burst - 1, row.prompt + row.limit) for row in rows)
            if self.slots.fit(len(rows), longest, self.waiting):
                return rows, longest
            self._requeue(self.slots.drop_last())

    def _verify_drafts(self, rows: list[Row], drafts: list[list[int]]) -> None:
        """Draw after every row's last token and after each token of its draft, and keep what counts."""
        states = [state for row, draft in zip(rows, drafts) for state in row.states(draft)]
        controls, self.slots.controls = Controls(states, self.device), None
        counts = [1 + len(draft) for draft in drafts]
        longest = max(len(row.tokens) + len(draft) for row, draft in zip(rows, drafts))
        chosen = self.network.choose([(row.adapter, n) for row, n in zip(rows, counts)])
        ids, logprobs = (x.tolist() for x in self._round(controls, counts, longest, chosen))
        kept = self.drafts.kept(drafts, ids)
        self._accept(rows, [ids[span] for span in kept], [logprobs[span] for span in kept])

    def _rounds(self, rows: list[Row], longest: int) -> None:
        """One token for each row; a burst of them on a GPU. What is drawn past a reply's end is dropped."""
        adapters, cache = {row.adapter for row in rows}, self.cache
        cut = any(row.sampling.temperature and (row.sampling.top_k or row.sampling.top_p < 1) for row in rows)
        recorded = self.recorded and not cut and len(adapters) == 1
        if recorded:
            self.recorded.forget_if_moved((cache.kv.data_ptr(), cache.kv.shape, self.network.moves))
        if self.slots.controls is None:
            size = min(filled_up(len(rows), cache.slots), cache.slots) if recorded else 0
            self.slots.controls = Controls([state for row in rows for state in row.states()], self.device,
                                           size, cache.length if cache.spare else 0)
        chosen = self.network.choose([(row.adapter, 1) for row in rows])
        drawn = []
        for _ in range(min(self.burst, max(row.limit - len(row.logprobs) for row in rows))):
            if recorded:
                drawn.append(self._recorded_round(adapters, longest, chosen))
            else:
                controls = self.slots.controls
                drawn.append(self._round(controls, [1] * len(controls.last), longest, chosen))
        self._accept(rows, *(torch.stack(x, 1).tolist() for x in zip(*drawn)))

    def _round(self, c: Controls, counts: list[int], longest: int, chosen):
        """Compute the controls' tokens, counts[i] of row i, and draw the ones after them: ids (T,), log-probs
        (T,). No host involved."""
        attend = self.decode_by(self.cache, c.position, counts, longest)
        return c.draw(self.network.logits(self.network.hidden(c.last, c.position, attend, chosen), chosen))

    def _recorded_round(self, adapters: set[str | None], longest: int, chosen):
        """The same, recorded once for a number of rows and a span, in one launch."""
        c, span = self.slots.controls, self.cache.length
        if self.decode_by is not FlashDecode:
            span = min(-(-longest // SPAN) * SPAN, span)
        key, counts = (len(c.last), span, c.sampled, c.greedy_rows, *adapters), [1] * len(c.last)
        self.slots.controls, *drawn = self.recorded.replay(
            key, lambda: self._round(c, counts, span, chosen), c)
        return drawn

    # ---- what was drawn ------------------------------------------------------------------------------------

    def _accept(self, rows: list[Row], ids: list[list[int]], logprobs: list[list[float]]) -> None:
        """Append to each row the tokens and log-probs that were drawn for it, as far as it goes on."""
        for row, new, probs in zip(rows, ids, logprobs):
            start, row.filled = len(row.tokens), True
            count, row.finish = self.endings.find(row, new)
            self._refuse_nan(row, probs[:count])
            row.tokens += new[:count]
            row.logprobs += probs[:count]
            self.tokens += count
            if self.drafts:
                self.drafts.learn(row.tokens, start)

    def _refuse_nan(self, row: Row, probs: list[float]) -> None:
        if math.isnan(sum(probs)):
            place = (0 if row.given else len(row.logprobs)) + list(map(math.isnan, probs)).index(True)
            raise FloatingPointError(
                f"request {row.ticket}, sample {row.sample}: the logits are NaN at token {place} of its "
                f"reply (step {self.steps} of the sampler)")

    def _leave(self) -> None:
        self.finished += self.slots.leave(self.steps)

    def _requeue(self, row: Row) -> None:
        """Send a row back to the head of the waiting line."""
        row.filled, row.cached = False, 0
        self.waiting.appendleft(row)

    def _ready(self, rows: list[Row]) -> list[tuple[int, int, Reply]]:
        """The replies of rows that left: one each, but one for all the scores of a request, at its end."""
        ready = [(row.ticket, row.sample, self._reply(row)) for row in rows if not row.given]
        for row in rows:
            if row.given and None not in self.scores.get(row.ticket, {0: None}).values():
                prompt, scores = row.tokens[:row.prompt], self.scores.pop(row.ticket)
                ready.append((row.ticket, 0, Reply("", finish="score", prompt_ids=prompt, scores=scores)))
        return ready

    def _reply(self, row: Row) -> Reply:
        ids = row.tokens[row.prompt:]
        text = self.endings.text(ids, row.finish, row.sampling)
        return Reply(text, ids, row.logprobs, row.finish, row.tokens[:row.prompt], None, row.prompt, len(ids))

    def _halve_after_oom(self, error: Exception) -> None:
        """After running out of memory: halve batch and cache, and put what was running back in line."""
        known = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known or self.slots.max_rows == 1:
            raise error
        self.slots.max_rows = max(1, (self.slots.running or self.slots.max_rows) // 2)
        self.prefill_tokens = max(256, self.prefill_tokens // 2)
        held = self.cache.slots * self.cache.length or self.slots.max_tokens
        self.forget()
        self.slots.max_tokens = max(held // 2, *(row.prompt + row.limit for row in self.waiting))
        torch.cuda.empty_cache()
        warnings.warn(f"out of memory: sampling goes on with at most {self.slots.max_rows} rows and "
                      f"{self.slots.max_tokens:,} cached tokens", stacklevel=3)

    def _look_at_weights(self) -> None:
        """Drop what was cached with other weights."""
        if self.network.refresh():
            self.slots.forget_kept()
            self.drafts = self.drafts and Drafts()
