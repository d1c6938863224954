"""What a workflow yields, what is kept of it, and how many of them run at once.

A workflow is a generator that gets a question and nothing else:

    def solver(question):
        reply = yield Ask("solver", [user(SOLVER(question=question))])
        return reply

It yields an Ask and gets a Reply, yields a Run and gets the sandbox's Outcome, or yields a list of those and
gets a list: they are worked on at the same time. It yields a Draft, an answer it holds so far, and gets
nothing. It returns the answer it stands by: a string, the Reply whose text holds it, or None.

An Ask with `continuations` samples nothing. Its Reply has the log-prob of each of them as the next words of
the conversation: so a verifier is asked for its CORRECT and its INCORRECT. A conversation that ends with an
assistant's message goes on inside that turn: so a search writes a solution step by step (slm/search).

An Ask that can't be answered raises AskFailed at its yield. A workflow that doesn't catch it ends there, and
its first Draft stands. In a list such an Ask gives a Reply with an empty text and its `error` set.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from tqdm import tqdm

from slm import BadInput
from slm.grading import extract
from slm.sandbox import Outcome

# ---- what a workflow yields ------------------------------------------------------------------------------

@dataclass
class Ask:
    """A question to the model in some role. `sampling` names what differs from the run's own Sampling, such
    as {"temperature": 0.7}; max_tokens never exceeds the run's. {"one_step": True}: the reply also ends where
    a step does. `continuations`: texts to be scored; then nothing is sampled."""
    role: str
    messages: list[dict]
    sampling: dict = field(default_factory=dict)
    continuations: tuple[str, ...] = ()


@dataclass
class Run:
    """Code for the sandbox: one text, or blocks that share their variables. `timeout` in seconds."""
    code: str | list[str]
    timeout: float = 5.0


@dataclass
class Draft:
    """An answer the workflow holds at this point. The first one is the episode's first answer."""
    answer: str | None


class AskFailed(Exception):
    """Raised inside a workflow at the yield of an Ask that got no reply; the message is the cause."""


def user(content: str) -> dict:
    return {"role": "user", "content": content}


# ---- what a backend gets and gives -----------------------------------------------------------------------

STEPS = {"paragraph": ("\n\n",), "line": ("\n",), "sentence": (". ", ".\n", "! ", "!\n", "? ", "?\n")}


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn. temperature 0 is greedy; top_p 1 and top_k 0 mean the full distribution.
    step_rule: of STEPS, what ends a step of this model's solutions."""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_at_box: bool = False  # stop at the end of the first line with an answer in a box
    keep_stop: bool = False    # the text of a reply holds the stop string that ended it
    step_rule: str = "line"


@dataclass
class Request:
    """One prompt for a Sampler or an Endpoint: messages, or ready token ids."""
    messages: list[dict] | None = None
    sampling: Sampling = Sampling()
    adapter: str | None = None  # LoRA adapter (Sampler) or model name (Endpoint); None: the default
    n: int = 1                  # samples of this prompt; sample i uses seed + i
    ids: list[int] | None = None
    continuations: tuple[str, ...] = ()  # nothing is sampled: one Reply with the scores of these


@dataclass
class Reply:
    """One sampled answer. prompt_ids + ids is exactly what the model saw and wrote; logprobs[i] is the
    log-probability of ids[i] under the distribution it was drawn from. Some servers give no ids, and report
    their own counts of tokens; without a report they are the lengths of the ids. scores:
    continuation -> its log-prob in nats after the prompt, summed over its tokens, at temperature 1."""
    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "stop"  # stop | length | box | stop_string | score | error
    prompt_ids: list[int] = field(default_factory=list)
    error: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    thinking: str | None = None  # a server's separate reasoning_content
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.tokens_in = self.tokens_in or len(self.prompt_ids)
        self.tokens_out = self.tokens_out or len(self.ids)

    def message(self, more: str = "") -> dict:
        """This reply as the next message of its conversation. It carries the reply, so that the tokenizer
        appends to the ids that were sampled instead of tokenizing the text again. `more` follows in the same
        turn, such as the output of its code; the next reply then continues the turn."""
        return {"role": "assistant", "content": self.text + more, "reply": self}


# ---- what is kept ----------------------------------------------------------------------------------------

@dataclass
class Turn:
    """One Ask and its Reply. `messages` are the prompt, as role and content. Asks of the same `round` were in
    one list. The trainer fills in the `worth` of what was said (rewards.worth), the tokens of its `steps` if
    they are paid one by one, what a verifier thinks of them (`judged`), and `rewards`: one for each step, or
    one for the whole turn."""
    role: str
    messages: list[dict]
    reply: Reply
    round: int = 0
    worth: float | None = None
    steps: list[int] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass
class CodeRun:
    """One Run and its Outcome; `turn` is the place in Episode.turns of the reply before it (-1: none)."""
    turn: int
    code: str | list[str]
    outcome: Outcome


@dataclass
class TokenRecord:
    """A token sequence to train on. mask[i] is 1 if its role sampled ids[i], and 0 for prompts, tool output
    and other roles. logprobs[i] is the log-probability of ids[i] when it was sampled, else 0.0. `turns` are
    the places of its turns in the episode. The trainer fills in, for each trained token, the advantage, the
    weight in the loss, the log-prob of the `teacher`, if there is one, and its `old` own before it learns."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    teacher: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)
    role: str = ""
    turns: list[int] = field(default_factory=list)

    def append(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        self.ids += ids
        self.mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


@dataclass
class Episode:
    """One run of one workflow on one problem. `answer` is what it stands by, `response` the text that is
    graded, `error` why there is no answer. `failures` names all that failed on the way, recovered or not.
    `group` numbers the problem and `sample` its repetitions (GRPO compares within a group). The trainer fills
    in `parts` (what rewards.py measured), `reward` (their weighted sum; None: its sampling failed), the
    `reason` for it, and `solved` (a right box)."""
    problem_id: str
    workflow: str = ""
    group: int = 0
    sample: int = 0
    turns: list[Turn] = field(default_factory=list)
    runs: list[CodeRun] = field(default_factory=list)
    drafts: list[str | None] = field(default_factory=list)
    answer: str | None = None
    response: str = ""
    error: str | None = None
    failures: list[str] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    reward: float | None = None
    reason: str = ""
    solved: bool = False

    @property
    def first_answer(self) -> str | None:
        return self.drafts[0] if self.drafts else self.answer

    @property
    def broken(self) -> str | None:
        """Why an Ask got no reply, if one got none. A conversation that grew longer than the context is not
        meant: this ends like a reply that was cut."""
        return next((turn.reply.error for turn in self.turns
                     if turn.reply.error and turn.reply.finish != "length"), None)

    @property
    def tokens_out(self) -> int:
        return sum(turn.reply.tokens_out for turn in self.turns)

    @property
    def tokens_spent(self) -> int:
        """Tokens written, and those that a verifier read for a score: they cost it a forward pass each."""
        return self.tokens_out + sum(turn.reply.tokens_in for turn in self.turns if turn.reply.scores)

    def records(self, roles: Iterable[str] | None = None) -> list[TokenRecord]:
        """The turns of these roles (None: of all) as token sequences, each of one role. If a turn's prompt
        starts with all that an earlier record of its role holds, the turn continues that record; else it
        opens a new one.

        >>> turns = [Turn("solver", [], Reply("", prompt_ids=[1, 2], ids=[3], logprobs=[-.5])),
        ...          Turn("solver", [], Reply("", prompt_ids=[1, 2, 3, 9], ids=[4], logprobs=[-.1]))]
        >>> record, = Episode("p", turns=turns).records()
        >>> record.ids, record.mask, record.logprobs
        ([1, 2, 3, 9, 4], [0, 0, 1, 0, 1], [0.0, 0.0, -0.5, 0.0, -0.1])
        """
        records: list[TokenRecord] = []
        for place, turn in enumerate(self.turns):
            if not turn.reply.ids or (roles is not None and turn.role not in roles):
                continue  # without ids: scores, or a failure
            prompt = turn.reply.prompt_ids
            continued = [r for r in records if r.role == turn.role and prompt[:len(r.ids)] == r.ids]
            if not continued:
                continued = [TokenRecord(role=turn.role)]
                records += continued
            record = max(continued, key=lambda r: len(r.ids))
            record.append(prompt[len(record.ids):])
            record.append(turn.reply.ids, turn.reply.logprobs)
            record.turns.append(place)
        return records

    def to_json(self) -> dict:
        return {**asdict(self), "first_answer": self.first_answer}

    @classmethod
    def from_json(cls, row: dict) -> "Episode":
        """An episode that to_json wrote, perhaps before a field was new; what was added to the row is left
        out."""
        fields = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        fields["turns"] = [Turn(**turn | {"reply": Reply(**turn["reply"])}) for turn in row["turns"]]
        fields["runs"] = [CodeRun(**run | {"outcome": Outcome(**run["outcome"])}) for run in row["runs"]]
        return cls(**fields)


# ---- how many run at once --------------------------------------------------------------------------------

@dataclass
class Job:
    """One episode to run. It holds the question and no gold answer, so that no workflow can meet one."""
    problem_id: str
    question: str
    workflow: Callable[[str], Generator]
    group: int = 0
    sample: int = 0


def jobs_for(problems, workflow: Callable[[str], Generator], samples: int = 1) -> list[Job]:
    """`samples` jobs for each problem; the problem's place in the list is its group."""
    return [Job(p.id, p.question, workflow, group, sample)
            for group, p in enumerate(problems) for sample in range(samples)]


def run_episodes(jobs: list[Job], backend, sandbox=None, *, sampling: Sampling = Sampling(), seed: int = 0,
                 adapters: dict[str, str | None] | None = None, fixed: bool = False, memo: dict | None = None,
                 on_done: Callable[[Episode], None] | None = None, bar: str | None = None) -> list[Episode]:
    """Run all jobs at once over one batched backend; the episodes come back in the order of the jobs.

    backend: Sampler or Endpoint. sandbox: needed if a workflow yields a Run. adapters: role -> adapter name,
    "*" for the other roles. fixed: temperature, top_p and top_k are the run's, whatever an Ask wants (the
    samples of a training step come from one distribution). memo: replies, shared by equal Asks of calls that
    get the same dict. on_done: called with each episode as it ends. bar: label of a progress bar.

    A reply's seed comes from (seed, problem, sample, step of the workflow, place in its list): what else is
    in the batch does not change what is drawn. A failure ends its own episode at most, and is recorded there;
    an exception that is a workflow's own bug passes through.
    """
    runner = _Runner(backend, sandbox, sampling, seed, adapters or {}, fixed, {} if memo is None else memo)
    episodes = [Episode(job.problem_id, job.workflow.__name__, job.group, job.sample) for job in jobs]
    for job, episode in zip(jobs, episodes):
        runner.ready.append(_Live(episode, _drive(job.workflow(job.question), episode)))
    start, unanswered = time.monotonic(), 0
    with tqdm(total=len(jobs), desc=bar, disable=bar is None, unit="ep", smoothing=0.1, mininterval=1,
              miniters=0) as progress:
        while runner.ready or runner.tickets or runner.running:
            for episode in runner.round():
                unanswered += episode.answer is None
                if on_done:
                    on_done(episode)
                progress.update()
            rate = runner.tokens / (time.monotonic() - start)
            progress.set_postfix_str(f"{rate:,.0f} tok/s, {unanswered} without answer", refresh=False)
            progress.update(0)
    return episodes


def seed_of(*parts: int | str) -> int:
    """A 31-bit seed, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()) >> 1


class _Runner:
    """Keeps workflows alive, gives all their Asks to one backend and all their Runs to one sandbox."""

    def __init__(self, backend, sandbox, sampling, seed, adapters, fixed, memo):
        self.backend, self.sandbox, self.sampling, self.seed = backend, sandbox, sampling, seed
        self.adapters, self.fixed, self.memo = adapters, fixed, memo
        self.ready: deque[_Live] = deque()    # have all that they waited for
        self.tickets: dict[int, tuple] = {}   # backend ticket -> what was asked
        self.waiting: dict[tuple, list] = {}  # what was asked -> [(live, place in its list)]
        self.running: dict[int, tuple] = {}   # sandbox ticket -> (live, place in its list)
        self.tokens = 0

    def round(self) -> Iterator[Episode]:
        """Resume what can go on, then collect replies and outcomes. Yields each episode that ends."""
        while self.ready:
            live = self.ready.popleft()
            try:
                items = live.driver.send(live.results)
            except StopIteration:
                yield live.episode
            else:
                self.begin(live, items)
        for ticket, _, reply in self.backend.step() if self.tickets else ():
            self.replied(self.tickets.pop(ticket), reply)
        wait = 0.0 if self.tickets or self.ready else 0.05
        for ticket, outcome in self.sandbox.poll(wait) if self.running else ():
            self.deliver(*self.running.pop(ticket), outcome)

    def begin(self, live: "_Live", items: list[Ask | Run]) -> None:
        """Start all that a workflow wants next."""
        live.results = [None] * len(items)
        for place, item in enumerate(items):
            if isinstance(item, Run):
                self.running[self.sandbox.submit(item.code, item.timeout)] = live, place
            else:
                self.ask(live, place, item)
        if not items:
            self.ready.append(live)
        live.steps += 1

    def ask(self, live: "_Live", place: int, ask: Ask) -> None:
        """Submit an Ask. Equal Asks share one reply: greedy ones, and sampled ones with the same seed."""
        want = {k: v for k, v in ask.sampling.items()
                if not (self.fixed and k in ("temperature", "top_p", "top_k"))}
        want["max_tokens"] = min(self.sampling.max_tokens, want.get("max_tokens", self.sampling.max_tokens))
        if want.pop("one_step", False):
            want |= {"stop": STEPS[self.sampling.step_rule] + want.get("stop", ()), "keep_stop": True}
        sampling = Sampling() if ask.continuations else replace(self.sampling, **want, seed=0)
        if sampling.temperature:
            seed = seed_of(self.seed, live.episode.problem_id, live.episode.sample, live.steps, place)
            sampling = replace(sampling, seed=seed)
        adapter = self.adapters.get(ask.role, self.adapters.get("*"))
        said = tuple((m["role"], m["content"], *getattr(m.get("reply"), "ids", ())) for m in ask.messages)
        asked = adapter, sampling, ask.continuations, said
        if asked in self.memo:
            self.deliver(live, place, self.memo[asked])
        elif asked in self.waiting:
            self.waiting[asked].append((live, place))
        else:
            self.waiting[asked] = [(live, place)]
            try:
                request = Request(ask.messages, sampling, adapter, continuations=ask.continuations)
                self.tickets[self.backend.submit(request)] = asked
            except BadInput as e:  # a prompt longer than the context, for one: too much said before it
                finish = "length" if live.episode.turns else "error"
                self.replied(asked, Reply("", finish=finish, error=str(e)))

    def replied(self, asked: tuple, reply: Reply) -> None:
        if not reply.error:
            self.memo[asked] = reply
        self.tokens += reply.tokens_out
        for live, place in self.waiting.pop(asked):
            self.deliver(live, place, reply)

    def deliver(self, live: "_Live", place: int, result: Reply | Outcome) -> None:
        live.results[place] = result
        if None not in live.results:
            self.ready.append(live)


@dataclass
class _Live:
    """A workflow under way."""
    episode: Episode
    driver: Generator            # yields lists of Asks and Runs
    steps: int = 0               # lists so far
    results: list | None = None  # of the last list, each in its place; None: still awaited


def _drive(workflow: Generator, episode: Episode) -> Generator:
    """Drive one workflow from its first yield to its answer and write down all that happens. Yields a list of
    Asks and Runs and is sent the list of their results, until the workflow ends."""
    answer, rounds = None, 0
    try:
        while True:
            if isinstance(answer, Reply) and answer.error:
                wanted = workflow.throw(AskFailed(answer.error))
            else:
                wanted = workflow.send(answer)
            if isinstance(wanted, Draft):
                episode.drafts.append(wanted.answer)
                answer = None
                continue
            items = wanted if isinstance(wanted, list) else [wanted]
            for item in items:
                if not isinstance(item, Run | Ask) or isinstance(getattr(item, "messages", []), str):
                    workflow.throw(TypeError(f"{str(item)[:60]}; expected Ask(role, [user(text)]) or Run"))
            results = yield items
            for item, result in zip(items, results):
                _record(episode, item, result, rounds)
            rounds += 1
            answer = results if isinstance(wanted, list) else results[0]
    except StopIteration as stop:
        _conclude(episode, stop.value)
    except AskFailed:  # the workflow did not catch it: what it held first stands
        _conclude(episode, next(filter(None, episode.drafts), None))


def _record(episode: Episode, item: Ask | Run, result: Reply | Outcome, number: int) -> None:
    if isinstance(item, Run):
        episode.runs.append(CodeRun(len(episode.turns) - 1, item.code, result))
        episode.failures += ["sandbox timeout"] if result.timed_out else []
    else:
        messages = [{"role": m["role"], "content": m["content"]} for m in item.messages]
        episode.turns.append(Turn(item.role, messages, result, number))
        episode.failures += [result.error] if result.error else []


def _conclude(episode: Episode, result: Reply | str | None) -> None:
    """Fill in the answer that the workflow stands by, or why it stands by none."""
    if isinstance(result, Reply):
        episode.response, episode.answer = result.text, extract(result.text)
    elif result is not None:
        episode.response, episode.answer = f"\\boxed{{{result}}}", result
    if episode.answer is None:
        cut = bool(episode.turns) and episode.turns[-1].reply.finish == "length"
        episode.error = [*episode.failures, "no answer before the token limit" if cut else "no answer"][0]
