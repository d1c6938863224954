"""A vLLM server behind the Sampler's protocol; it answers with the adapters that are being trained."""

import contextlib
import shutil
import sys
import time
from dataclasses import replace
from operator import sub
from pathlib import Path
from statistics import fmean

import requests
import torch
from tqdm import tqdm

from slm import BadInput, lora, losses
from slm.episode import Reply, Request, Sampling, user
from slm.formats import lora_files
from slm.prompts import SOLVER
from slm.runs import ranks
from slm.sampling import Endings, Row
from slm.teachers import Endpoint, open_session, told_tokens

PATIENCE = 60.0, 600.0  # seconds that a server may fail before it has worked once, and after
PAUSE = 0.25            # seconds to the next try; doubled after each
GONE = 3                # times in a row that it may come back and go away again without an answer
BOUND = 0.15            # nats a token that rounding may put between the server's log-probs and the trainer's
CLEAR = 1e-3            # a smaller gap is rounding, whatever fits better
QUESTION = "A baker packs 7 boxes with 12 rolls each. He sells 39 rolls before noon. How many rolls are left?"
SOLUTION = "He packs 7 * 12 = 84 rolls. Then 84 - 39 = 45 rolls are left.\nThe answer is \\boxed{45}."
DRAWN = 32              # tokens of the second canary
# vLLM takes what a request leaves out from the model's generation_config.json, a repetition penalty for one.
FIELDS = {"logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
          "repetition_penalty": 1.0}


class Away(Exception):
    """The server does not do what it should, and may do it later."""


class Rollouts:
    """submit, step, pending, close as a Sampler has them, and refresh. url: with its /v1. folder: where the
    adapters are written; the server must see it under the same path."""

    def __init__(self, policy, tokenizer, url: str, folder: str | Path):
        self.policy, self.tokenizer, self.endings = policy, tokenizer, Endings(tokenizer)
        self.url, self.folder, self.run = url.rstrip("/"), Path(folder).resolve(), f"{time.time_ns() >> 20:x}"
        self.room, self.temperature, self.worked = policy.config.positions, 1.0, False
        self.names: dict[str | None, str] = {}    # adapter -> its name on the server; None: the base model
        self.earlier: dict[str, list] = {}        # adapter -> the fixed text's log-probs in earlier steps
        self.told: dict[str, float] = {}          # for metrics.jsonl
        self.endpoint: Endpoint | None = None
        self.asked: dict[int, Row] = {}           # the endpoint's ticket -> the reply under way
        self.scores: dict[int, dict] = {}         # our ticket -> continuation -> its score
        self.tickets = self.loads = self.gone = 0

    @property
    def pending(self) -> bool:
        return bool(self.asked)

    def submit(self, request: Request) -> int:
        """Ask for the n replies of a request, or for its scores; they come out of step() under the ticket
        returned. BadInput for a prompt that leaves no room."""
        tokens = self.tokenizer.chat(request.messages) if request.ids is None else request.ids
        given = {words: self.tokenizer.encode(words) for words in request.continuations}
        room, s, ticket = self.room - len(tokens), request.sampling, self.tickets
        if room <= max(map(len, given.values()), default=0):
            raise BadInput(f"request {ticket} has a prompt of {len(tokens)} tokens; expected fewer than "
                           f"{self.room}, what the model and the server hold with the reply")
        name = self.names[request.adapter or lora.active(self.policy)]
        thinking = self.endings.thinking(tokens, s)
        for words, ids in given.items():
            self._ask(Row(ticket, 0, tokens, len(tokens), 1, s, name, 0, words=words, given=ids))
        for i in range(0 if given else request.n):
            own = replace(s, max_tokens=min(s.max_tokens, room), seed=s.seed + i)
            self._ask(Row(ticket, i, tokens, len(tokens), own.max_tokens, own, name, 0, thinking))
        self.tickets += 1
        return ticket

    def step(self) -> list[tuple[int, int, Reply]]:
        """What landed: (ticket, sample, reply). A server that went away is waited for and asked again;
        BadInput if it stays away."""
        found, lost, landed = [], "", []
        try:
            found = self.endpoint.step() if self.asked else []
            if any(reply.error for *_, reply in found) and self._load():
                lost = f"{self.url}: it had lost adapters"
        except (Away, BadInput) as e:
            lost = str(e)
        for key, _, reply in found:
            if key in self.asked and not (lost and reply.error):
                row = self.asked.pop(key)
                landed += [(row.ticket, row.sample, r) for r in self._replies(row, reply)]
        self.gone = (self.gone if all(reply.error for *_, reply in landed) else 0) + bool(lost)
        if lost:
            self._ask_again(lost)
        return landed

    def close(self) -> None:
        """Forget every request. Once no rank has any, the server forgets the adapters."""
        self._forget()
        ranks.barrier()
        for adapter in lora.names(self.policy) if ranks.rank() == 0 else ():
            with contextlib.suppress(Away):
                self._call("unload_lora_adapter", {"lora_name": self.names[adapter]})
            shutil.rmtree(self.folder / self.names[adapter], ignore_errors=True)

    def _open(self) -> Endpoint:
        fields = FIELDS | {"stop_token_ids": sorted(self.tokenizer.stop_ids)}
        return Endpoint(self.url, self.names[None], workers=256, tries=4, fields=fields)

    def _ask(self, row: Row) -> None:
        self.endpoint = self.endpoint or self._open()
        request = Request(None, row.sampling, row.adapter, ids=row.tokens + row.given,
                          continuations=(row.words,) if row.given else ())
        self.asked[self.endpoint.submit(request)] = row

    def _replies(self, row: Row, found: Reply) -> list[Reply]:
        """The reply as the Sampler would have given it; none as long as other scores of the request lack."""
        error = found.error or ("" if found.logprobs else "no log-probs in the answer")
        if error:
            self.asked = {key: x for key, x in self.asked.items() if x.ticket != row.ticket or not x.given}
            return [Reply("", finish="error", prompt_ids=row.tokens, error=error)]
        if row.given:
            scores = self.scores.setdefault(row.ticket, {})
            scores[row.words] = sum(found.logprobs[-len(row.given):])
            last = all(other.ticket != row.ticket for other in self.asked.values())
            return [Reply("", finish="score", prompt_ids=row.tokens, scores=scores)] if last else []
        count, finish = self.endings.find(row, found.ids)
        ids, finish = found.ids[:count], finish or found.finish
        text = self.endings.text(ids, finish, row.sampling)
        return [Reply(text, ids, found.logprobs[:count], finish, row.tokens)]

    def _ask_again(self, lost: str) -> None:
        """Wait until the server is back, and ask for all that was under way."""
        if self.gone > GONE:
            raise BadInput(f"{lost}; it came back {GONE} times and answered nothing")
        rows = list(self.asked.values())
        self._forget()
        self._wait(lost)
        for row in rows:
            self._ask(row)

    def _forget(self) -> None:
        if self.endpoint:
            self.endpoint.close()
        self.endpoint, self.asked = None, {}

    def refresh(self, temperature: float) -> None:
        """Have the server load the adapters as they are now, and check that it did. All ranks call it before
        they sample at this temperature, with whole weights. Each load has a new name: what the server cached
        for an old one may be stale."""
        self.temperature, wrong = temperature, ""
        if ranks.rank() == 0:
            self.loads += 1
            for adapter in lora.names(self.policy):
                self.names[adapter] = f"slm-{self.run}-{adapter}-{self.loads}"
                lora_files.save(self.policy, self.folder / self.names[adapter], adapter)
            try:
                self._wait()
            except BadInput as e:
                wrong = str(e)
        state = ranks.gather([(self.names, self.room, self.told, wrong)])[0]
        self.names, self.room, self.told, wrong = state
        if wrong:
            self.close()
            raise BadInput(wrong)
        self.worked = True

    def _wait(self, cause: str = "") -> None:
        """Return once the server has all adapters and its canaries are well. BadInput if patience ends."""
        patience, pause = PATIENCE[self.worked], PAUSE
        deadline = time.monotonic() + patience
        while True:
            try:
                self._load()
                return self._check()
            except Away as e:
                cause = cause or f"{self.url}: {e}"
                if time.monotonic() > deadline:
                    more = "; when it is well, --resume goes on from the last checkpoint" * self.worked
                    raise BadInput(f"{self.url}: after {patience:.0f} seconds still {e}{more}") from None
            if 1 <= pause < 2:
                tqdm.write(f"note: {cause}; trying for {patience:.0f} seconds", file=sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 8.0)

    def _load(self) -> set[str]:
        """Have the server load the adapters that it lacks -> their names. Away if it can't: a folder may
        become visible later. BadInput if it is no such server."""
        status, said = self._call("models")
        if status >= 500:
            raise Away(f"HTTP {status} {said}")
        try:
            there = {row["id"]: row for row in said["data"]}
            base = next(row for row in there.values() if not row.get("parent"))
        except (KeyError, TypeError, StopIteration):
            raise BadInput(f"{self.url}/models: HTTP {status} {said}; expected a vLLM server, such as "
                           "http://localhost:8000/v1") from None
        self.names[None] = base["id"]
        self.room = min(self.policy.config.positions, base.get("max_model_len") or self.room)
        lacking = set(self.names.values()) - set(there)
        for name in lacking:
            folder = str(self.folder / name)
            status, said = self._call("load_lora_adapter", {"lora_name": name, "lora_path": folder})
            if status != 200 and "already" not in str(said):  # another rank was first
                raise Away(f"can't load {folder} (HTTP {status} {said}); vLLM must see the folder, and needs "
                           "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        return lacking

    def _call(self, path: str, body: dict | None = None):
        """(status, JSON or the beginning of a text) of the answer. Away without one."""
        try:
            with open_session(self.url) as session:
                answer = session.request("POST" if body else "GET", f"{self.url}/{path}", json=body,
                                         timeout=120, allow_redirects=False)
        except requests.RequestException as e:
            raise Away(f"no answer ({type(e).__name__})") from None
        with contextlib.suppress(ValueError):
            return answer.status_code, answer.json()
        return answer.status_code, " ".join(answer.text.split())[:200]

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the server's log-probs with the trainer's, for each adapter. BadInput if they differ."""
        prompt, gaps, t = self.tokenizer.chat([user(SOLVER(question=QUESTION))]), [], self.temperature
        fixed = (prompt + self.tokenizer.encode(SOLUTION))[:self.room // 2]
        prompt = prompt[:len(fixed)]
        for adapter in lora.names(self.policy):
            name, older = self.names[adapter], self.earlier.setdefault(adapter, [])
            _, read = self._canary(Request(ids=fixed, adapter=name, continuations=("",)))
            ids, drawn = self._canary(Request(None, Sampling(DRAWN, t), name, ids=prompt))
            with lora.use(self.policy, adapter):
                meant, right, plain = (
                    losses.score(self.policy, [x], [[0] * start + [1] * (len(x) - start)], heat)[0].tolist()
                    for x, start, heat in ((fixed, 1, 1.0), (ids, len(prompt), t), (ids, len(prompt), 1.0)))
            gaps += [self._gap(read, meant, older, "an earlier adapter"),
                     self._gap(drawn, right, [plain] if t != 1 else [], "temperature 1 (vLLM needs "
                               "--logprobs-mode processed_logprobs)", min(1.0, t))]
            older.append(meant)
        self.told = {"canary": max(gaps)}

    def _canary(self, request: Request) -> tuple[list[int], list[float]]:
        """(all ids, log-probs of those given or drawn) of one request."""
        status, said = self._call("completions", self._open().body(request))
        if status != 200:
            raise Away(f"HTTP {status} {said}")
        told = told_tokens(said)
        if told.get("prompt_ids") != request.ids or bool(request.continuations) == ("ids" in told):
            raise BadInput(f"{self.url}: no ids and log-probs in its answers; expected vLLM 0.10.2 or later")
        return request.ids + told.get("ids", []), told["logprobs"]

    def _gap(self, said, meant, others, what: str, scale: float = 1.0) -> float:
        """The mean |said - meant|, times scale. BadInput if that is large, or one of `others` fits better."""
        gap, *rest = (fmean(map(abs, map(sub, said, x))) * scale for x in (meant, *others))
        better = gap > CLEAR and min(rest, default=gap) < gap / 2
        if better or gap > BOUND:
            raise BadInput(f"{self.url}: its log-probs are {gap:.4f} nats a token from the trainer's, like "
                           f"those of {what if better else 'another base model or adapter'}")
        return gap
