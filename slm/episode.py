"""The records that travel from the sampler to the grader to the loss, and the runner of many workflows.

A workflow is a generator that gets a question and nothing else:

    def solver(question):
        reply = yield Ask("solver", [user(SOLVER(question=question))])
        return reply

It yields an Ask (answered with a Reply), a Run (answered with the sandbox's Outcome), a list of those (worked
on at the same time, answered with a list) or a Draft (an answer held so far, only recorded). It returns the
answer it stands by: a string, the Reply whose text holds it, or None. An Ask that can't be answered raises
AskFailed at its yield; a workflow that doesn't catch it ends there, and its first Draft stands. In a list it
gives a Reply whose `error` is set and whose text is empty.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from tqdm import tqdm

from slm import BadInput
from slm.grading import extract, grade
from slm.sandbox import Outcome


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn. temperature 0 is greedy; top_p 1 and top_k 0 mean the full distribution."""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_at_box: bool = False  # stop after the first complete \boxed{...}


@dataclass
class Request:
    """One prompt for a Sampler or an Endpoint: messages, or ready token ids (Sampler only)."""
    messages: list[dict] | None = None
    sampling: Sampling = Sampling()
    adapter: str | None = None  # LoRA adapter (Sampler) or model name (Endpoint); None: the default
    n: int = 1                  # samples of this prompt; sample i uses seed + i
    ids: list[int] | None = None


@dataclass
class Reply:
    """One sampled answer. prompt_ids + ids is exactly what the model saw and wrote; logprobs[i] is the
    log-probability of ids[i] under the distribution it was drawn from. An Endpoint leaves the ids empty and
    reports its own counts of tokens; without a report they are the lengths of the ids."""
    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "stop"  # stop | length | box | stop_string | error
    prompt_ids: list[int] = field(default_factory=list)
    error: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    thinking: str | None = None  # a server's separate reasoning_content

    def __post_init__(self):
        self.tokens_in = self.tokens_in or len(self.prompt_ids)
        self.tokens_out = self.tokens_out or len(self.ids)

    def message(self, more: str = "") -> dict:
        """This reply as the next message of its conversation. It carries the reply, so that the tokenizer
        appends to the ids that were sampled instead of tokenizing the text again. `more` follows in the same
        turn, such as the output of its code; the next reply then continues the turn."""
        return {"role": "assistant", "content": self.text + more, "reply": self}


# ---- what a workflow yields ------------------------------------------------------------------------------

@dataclass
class Ask:
    """A question to the model in some role. `sampling` names what differs from the run's own Sampling, such
    as {"temperature": 0.7}; max_tokens never exceeds the run's."""
    role: str
    messages: list[dict]
    sampling: dict = field(default_factory=dict)


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


# ---- what is kept ----------------------------------------------------------------------------------------

@dataclass
class Turn:
    """One Ask and its Reply. `messages` are the prompt, as role and content."""
    role: str
    messages: list[dict]
    reply: Reply


@dataclass
class CodeRun:
    """One Run and its Outcome; `turn` is the place in Episode.turns of the reply before it (-1: none)."""
    turn: int
    code: str | list[str]
    outcome: Outcome


@dataclass
class TokenRecord:
    """A token sequence to train on: mask[i] is 1 where ids[i] was sampled by a trained role, 0 for prompts,
    tool output and other roles; logprobs[i] is its log-probability when sampled, 0.0 where mask is 0. The
    trainer fills in the advantage of its episode and the weight of each of its tokens in the loss."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantage: float = 0.0
    weight: float = 0.0

    def append(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        self.ids += ids
        self.mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


@dataclass
class Episode:
    """One run of one workflow on one problem. `answer` is what it stands by, `response` the text that is
    graded, `error` why there is no answer; `failures` names all that failed on the way, recovered or not.
    `group` numbers the problem and `sample` its repetitions (GRPO compares within a group). The trainer fills
    in `reward`, what the episode earned (None: its sampling failed), and the `reason` for it."""
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
    reward: float | None = None
    reason: str = ""

    @property
    def first_answer(self) -> str | None:
        return self.drafts[0] if self.drafts else self.answer

    @property
    def tokens_out(self) -> int:
        return sum(turn.reply.tokens_out for turn in self.turns)

    def records(self, roles: Iterable[str] | None = None) -> list[TokenRecord]:
        """The episode as token sequences; `roles` are the trained ones (None: all). A turn whose prompt
        starts with all an earlier record holds continues that record; any other prompt opens a new one.
        Records without a trained token are left out.

        >>> turns = [Turn("solver", [], Reply("", prompt_ids=[1, 2], ids=[3], logprobs=[-.5])),
        ...          Turn("solver", [], Reply("", prompt_ids=[1, 2, 3, 9], ids=[4], logprobs=[-.1]))]
        >>> record, = Episode("p", turns=turns).records()
        >>> record.ids, record.mask, record.logprobs
        ([1, 2, 3, 9, 4], [0, 0, 1, 0, 1], [0.0, 0.0, -0.5, 0.0, -0.1])
        """
        records: list[TokenRecord] = []
        for turn in self.turns:
            prompt = turn.reply.prompt_ids
            continued = [r for r in records if prompt[:len(r.ids)] == r.ids]
            if not continued:
                continued = [TokenRecord()]
                records += continued
            record = max(continued, key=lambda r: len(r.ids))
            record.append(prompt[len(record.ids):])
            trained = roles is None or turn.role in roles
            record.append(turn.reply.ids, turn.reply.logprobs if trained else None)
        return [r for r in records if any(r.mask)]

    def to_json(self) -> dict:
        return {**asdict(self), "first_answer": self.first_answer}

    @classmethod
    def from_json(cls, row: dict) -> "Episode":
        """An episode that to_json wrote; what was added to the row is left out."""
        fields = {name: row[name] for name in cls.__dataclass_fields__}
        fields["turns"] = [Turn(**turn | {"reply": Reply(**turn["reply"])}) for turn in row["turns"]]
        fields["runs"] = [CodeRun(**run | {"outcome": Outcome(**run["outcome"])}) for run in row["runs"]]
        return cls(**fields)


def answer_record(problem, episode: Episode) -> dict:
    """An episode graded, as one line of answers.jsonl. The ids are those of the turn that gave the response,
    or of the solver's last turn where the answer comes from several."""
    result = grade(episode.response, problem.gold)
    first = result.correct
    if episode.drafts:
        first = bool(episode.drafts[0]) and grade(f"\\boxed{{{episode.drafts[0]}}}", problem.gold).correct
    said = ([t.reply for t in episode.turns if t.reply.text == episode.response]
            or [t.reply for t in episode.turns if t.role == "solver"] or [t.reply for t in episode.turns])
    return {
        "id": problem.id, "question": problem.question, "gold": problem.gold, "response": episode.response,
        "answer": episode.answer, "correct": result.correct, "reason": episode.error or result.reason,
        "first_answer": episode.first_answer, "first_correct": first, "workflow": episode.workflow,
        "sample": episode.sample, "failures": episode.failures, "asks": len(episode.turns),
        "tokens": episode.tokens_out, "prompt_ids": said[-1].prompt_ids if said else [],
        "ids": said[-1].ids if said else [], "finish": said[-1].finish if said else "error"}


# ---- running ---------------------------------------------------------------------------------------------

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

    backend: Sampler or Endpoint. sandbox: needed where a workflow yields a Run. adapters: role -> adapter
    name, "*" for the other roles. fixed: temperature, top_p and top_k are the run's, whatever an Ask wants
    (training samples come from one distribution). memo: greedy replies, shared by calls given the same dict.
    on_done: called with each episode as it ends. bar: label of a progress bar.

    A reply's seed comes from (seed, problem, sample, step of the workflow, place in its list): what else is
    in the batch does not change what is drawn. A failure ends its own episode at most, and is recorded there;
    an exception that is a workflow's own bug passes through.
    """
    runner = _Runner(backend, sandbox, sampling, seed, adapters or {}, fixed, {} if memo is None else memo)
    lives = [_Live(job) for job in jobs]
    with tqdm(total=len(jobs), desc=bar, disable=bar is None, unit="ep", smoothing=0.1) as progress:
        shown = start = time.monotonic()
        for episode in runner.rounds(lives):
            now = time.monotonic()
            if episode is not None:
                if on_done:
                    on_done(episode)
                progress.update()
            elif now > shown + 2:
                rate, shown = runner.tokens / (now - start), now
                progress.set_postfix_str(f"{rate:,.0f} tok/s, {runner.unanswered} without answer")
    return [live.episode for live in lives]


def seed_of(*parts: int | str) -> int:
    """A 31-bit seed, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()) >> 1


class _Live:
    """A workflow under way: its generator, its episode, and what it waits for."""

    def __init__(self, job: Job):
        self.job, self.generator = job, job.workflow(job.question)
        self.episode = Episode(job.problem_id, job.workflow.__name__, job.group, job.sample)
        self.step = 0           # yields so far
        self.items: list = []   # the Asks and Runs of its last yield
        self.got: dict = {}     # place in items -> Reply or Outcome
        self.listed = False     # whether that yield was a list


class _Runner:
    def __init__(self, backend, sandbox, sampling, seed, adapters, fixed, memo):
        self.backend, self.sandbox, self.sampling, self.seed = backend, sandbox, sampling, seed
        self.adapters, self.fixed, self.memo = adapters, fixed, memo
        self.ready: deque[_Live] = deque()   # have all they waited for
        self.asked: dict[int, tuple] = {}    # backend ticket -> (key in memo or None, [(live, place)])
        self.running: dict[int, tuple] = {}  # sandbox ticket -> (live, place in its items)
        self.tokens = self.unanswered = 0

    def rounds(self, lives: list[_Live]) -> Iterator[Episode | None]:
        """Resume what can go on, then collect replies and outcomes, until all is done. Yields each episode
        that ended, and None after each round."""
        self.ready.extend(lives)
        while self.ready or self.asked or self.running:
            while self.ready:
                live = self.ready.popleft()
                if self.resume(live):
                    yield live.episode
            for ticket, _, reply in self.backend.step() if self.asked else ():
                self.replied(*self.asked.pop(ticket), reply)
            wait = 0.0 if self.asked or self.ready else 0.05
            for ticket, outcome in self.sandbox.poll(wait) if self.running else ():
                self.deliver(*self.running.pop(ticket), outcome)
            yield None

    def resume(self, live: _Live) -> bool:
        """Give a workflow what it waited for and start what it wants next. True when it has ended."""
        results = [self.record(live.episode, item, live.got[i]) for i, item in enumerate(live.items)]
        answer = results if live.listed else results[0] if results else None
        try:
            if isinstance(answer, Reply) and answer.error:
                wanted = live.generator.throw(AskFailed(answer.error))
            else:
                wanted = live.generator.send(answer)
            while isinstance(wanted, Draft):
                live.episode.drafts.append(wanted.answer)
                wanted = next(live.generator)
        except StopIteration as stop:
            return self.end(live.episode, stop.value)
        except AskFailed:  # the workflow did not catch it: what it held first stands
            return self.end(live.episode, next(filter(None, live.episode.drafts), None))
        live.listed, live.got = isinstance(wanted, list), {}
        live.items = wanted if live.listed else [wanted]
        for place, item in enumerate(live.items):
            self.begin(live, place, item)
        if not live.items:
            self.ready.append(live)
        live.step += 1
        return False

    def begin(self, live: _Live, place: int, item: Ask | Run) -> None:
        """Start an Ask or a Run. A greedy Ask that is word for word another one's shares its reply."""
        if isinstance(item, Run):
            self.running[self.sandbox.submit(item.code, item.timeout)] = (live, place)
            return
        request, key, who = self.request(live, place, item), None, [(live, place)]
        if not request.sampling.temperature and not any("reply" in m for m in item.messages):
            text = tuple((m["role"], m["content"]) for m in item.messages)
            key = (request.adapter, replace(request.sampling, seed=0), text)
            there = self.memo.setdefault(key, who)  # a Reply, or those who wait for it
            if isinstance(there, Reply):
                return self.deliver(live, place, there)
            if there is not who:
                return there.append((live, place))
        try:
            self.asked[self.backend.submit(request)] = (key, who)
        except BadInput as e:  # a prompt longer than the context, for one
            self.replied(key, who, Reply("", finish="error", error=str(e)))

    def request(self, live: _Live, place: int, ask: Ask) -> Request:
        want = {k: v for k, v in ask.sampling.items()
                if not (self.fixed and k in ("temperature", "top_p", "top_k"))}
        want["max_tokens"] = min(self.sampling.max_tokens, want.get("max_tokens", self.sampling.max_tokens))
        seed = seed_of(self.seed, live.job.problem_id, live.job.sample, live.step, place)
        adapter = self.adapters.get(ask.role, self.adapters.get("*"))
        return Request(ask.messages, replace(self.sampling, **want, seed=seed), adapter)

    def replied(self, key: tuple | None, who: list, reply: Reply) -> None:
        if key is not None:
            self.memo[key] = reply
            if reply.error:
                del self.memo[key]
        self.tokens += reply.tokens_out
        for live, place in who:
            self.deliver(live, place, reply)

    def deliver(self, live: _Live, place: int, result) -> None:
        live.got[place] = result
        if len(live.got) == len(live.items):
            self.ready.append(live)

    def record(self, episode: Episode, item: Ask | Run, result):
        """Write down what came of an Ask or a Run, and return it."""
        if isinstance(item, Run):
            episode.runs.append(CodeRun(len(episode.turns) - 1, item.code, result))
            episode.failures += ["sandbox timeout"] if result.timed_out else []
        else:
            messages = [{"role": m["role"], "content": m["content"]} for m in item.messages]
            episode.turns.append(Turn(item.role, messages, result))
            episode.failures += [result.error] if result.error else []
        return result

    def end(self, episode: Episode, result: Reply | str | None) -> bool:
        """Fill in what the workflow stands by, or why it stands by nothing."""
        if isinstance(result, Reply):
            episode.response, episode.answer = result.text, extract(result.text)
        elif result is not None:
            episode.response, episode.answer = f"\\boxed{{{result}}}", result
        if episode.answer is None:
            cut = bool(episode.turns) and episode.turns[-1].reply.finish == "length"
            episode.error = [*episode.failures, "no answer before the token limit" if cut else "no answer"][0]
            self.unanswered += 1
        return True
