"""Who is asked what: the teachers of a cascade file, one attempt, and what is due next.

Round 1 teachers get every problem; round 2 teachers those that no teacher of round 1 solved. A teacher tries
a problem until its first right answer or its last attempt. If several teachers of a round are right, all of
their solutions are kept.
"""

import hashlib
import itertools
import random
import time
import tomllib
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from slm import BadInput
from slm.episode import Reply, Request, Sampling
from slm.problems import Problem
from slm.prompts import EFFORTS, SOLVER, TEACHER
from slm.runs.files import Journal
from slm.teachers.records import assess, cost

FIRST = {"attempts": 3, "temperatures": (0.7, 0.5, 0.9), "efforts": {"medium": 1}}  # the report's
LATER = {"attempts": 5, "temperatures": (0.7, 0.5, 0.9, 0.3, 1.0), "efforts": {"high": 1}}
KEPT_TEXT = 20_000  # characters of a rejected answer


@dataclass(frozen=True)
class Teacher:
    """One [[teacher]] of a cascade file. efforts: name -> ratio, one is drawn for each problem; with {} no
    thinking in tags is asked for. Prices: dollars per million tokens. workers: requests at once. timeout:
    seconds of one try."""
    name: str
    model: str
    base_url: str
    round: int = 1
    key_env: str = ""
    attempts: int = 0            # these three of a cascade file are FIRST's or LATER's when not given
    temperatures: tuple = ()     # attempt after attempt, in a cycle
    efforts: dict | None = None
    max_tokens: int = 4096
    workers: int = 32
    timeout: float = 600.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0

    @property
    def identity(self) -> dict:
        """What shapes the records; a run goes on only with the same."""
        names = ("name", "model", "round", "attempts", "efforts", "max_tokens")
        return {k: getattr(self, k) for k in names} | {"temperatures": list(self.temperatures)}


def read_cascade(path: Path) -> list[Teacher]:
    """The teachers of a TOML file. BadInput names the file, the teacher and the key that is wrong."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadInput(f"--cascade {path}: cannot be read: {e.strerror}; recipes/ has examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not valid TOML: {e}") from None
    rows = found.get("teacher")
    if set(found) != {"teacher"} or not isinstance(rows, list) or not rows:
        raise BadInput(f"{path}: found {list(found)}, expected [[teacher]] tables and nothing else")
    teachers = [_teacher(row, f"{path}, teacher {n}") for n, row in enumerate(rows, 1)]
    if len({t.name for t in teachers}) < len(teachers):
        raise BadInput(f"{path}: two teachers have the same name")
    return sorted(teachers, key=lambda t: t.round)


def _teacher(row: dict, where: str) -> Teacher:
    kinds = {f.name: f.type for f in fields(Teacher)}
    for key, value in row.items():
        if "key" in key and key != "key_env":
            raise BadInput(f"{where}: {key} found; keys stay out of files, key_env names the variable")
        if key not in kinds:
            raise BadInput(f"{where}: unknown key {key!r}; expected {', '.join(kinds)}")
        wants = {str: str, int: int, float: (int, float), tuple: list}.get(kinds[key], dict)
        bad = not isinstance(value, wants) or isinstance(value, bool)
        if bad or (isinstance(value, int | float) and value < 0):
            kind = getattr(kinds[key], "__name__", "table").replace("tuple", "list")
            raise BadInput(f"{where}: {key} = {value!r}; expected a {kind}")
    if missing := [key for key in ("base_url", "model", "name") if not row.get(key)]:
        raise BadInput(f"{where}: no {', '.join(missing)}")
    if 0 in map(row.get, ("workers", "max_tokens", "timeout")):
        raise BadInput(f"{where}: workers, max_tokens and timeout must be above 0")
    defaults = LATER if row.get("round", 1) > 1 else FIRST
    row = defaults | {key: value for key, value in row.items() if value or key == "efforts"}
    bad = [e for e, ratio in row["efforts"].items() if e not in EFFORTS or not isinstance(ratio, int | float)]
    if bad or (row["efforts"] and not sum(row["efforts"].values()) > 0):
        raise BadInput(f"{where}: efforts = {row['efforts']}; expected ratios of {', '.join(EFFORTS)}")
    if not all(isinstance(t, int | float) and 0 <= t <= 2 for t in row["temperatures"]):
        raise BadInput(f"{where}: temperatures = {list(row['temperatures'])}; expected numbers from 0 to 2")
    return Teacher(**row | {"temperatures": tuple(row["temperatures"])})


class Attempt:
    """One attempt. All about it follows from the seed, the problem, the teacher and its number, from 0 on."""

    def __init__(self, problem: Problem, teacher: Teacher, number: int, seed: int):
        self.problem, self.teacher, self.number = problem, teacher, number
        self.temperature = teacher.temperatures[number % len(teacher.temperatures)]
        text = f"{seed} {problem.id} {teacher.name} {number}"
        self.seed = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
        self.effort = None
        if teacher.efforts:
            rng = random.Random(f"{seed} {problem.id} {teacher.round}")
            self.effort, = rng.choices(list(teacher.efforts), teacher.efforts.values())
        self.prompt = TEACHER if self.effort else SOLVER
        tokens_in = len(problem.question) / 3 + 200  # roughly: three characters a token
        self.most_dollars = (tokens_in * teacher.price_in + teacher.max_tokens * teacher.price_out) / 1e6

    def request(self) -> Request:
        if self.effort is None:
            messages = [{"role": "user", "content": self.prompt(question=self.problem.question)}]
        else:
            tokens, words = EFFORTS[self.effort]
            messages = [{"role": "system", "content": self.prompt(effort=words, tokens=str(tokens))},
                        {"role": "user", "content": self.problem.question}]
        return Request(messages, Sampling(self.teacher.max_tokens, self.temperature, seed=self.seed,
                                          stop_at_box=not self.effort))

    def record(self, reply: Reply, seconds: float) -> dict:
        """The row of this attempt; its `cause` is None when it is kept."""
        p, t = self.problem, self.teacher
        found = assess(reply, p.gold, t.max_tokens, needs_think=self.effort is not None)
        if found["cause"]:  # the page needs the count, a reader the beginning
            found = found | {"response": found["response"][:KEPT_TEXT], "thinking": "", "solution": ""}
        return {"id": p.id, "question": p.question, "gold": p.gold, "source": p.source, **found,
                "teacher": t.name, "model": t.model, "effort": self.effort, "round": t.round,
                "attempt": self.number + 1, "temperature": self.temperature, "seed": self.seed,
                "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out, "finish": reply.finish,
                "seconds": round(seconds, 2), "prompt": self.prompt.id}


class Progress:
    """What has been tried and what is due: a function of the attempts seen, so a resumed run and an
    uninterrupted one ask the same. The teachers come in the order of their rounds."""

    def __init__(self, teachers: list[Teacher]):
        self.rounds = [list(group) for _, group in itertools.groupby(teachers, lambda t: t.round)]
        self.tried = defaultdict(dict)  # (problem id, teacher name) -> number of the attempt, from 0 -> cause

    def note(self, row: dict) -> None:
        self.tried[row["id"], row["teacher"]][row["attempt"] - 1] = row["cause"]

    def missing(self, id: str, name: str) -> int:
        """The first attempt that is missing: one that ended in an HTTP error leaves a gap in the files."""
        return next(k for k in itertools.count() if k not in self.tried[id, name])

    def due(self, id: str, later: bool = False) -> list[Teacher]:
        """The teachers to ask now: the first round that is not over, unless an earlier one solved it. later:
        those to ask at the next start, which makes up for attempts that ended in an HTTP error."""
        for teachers in self.rounds:
            causes = {t.name: list(self.tried[id, t.name].values()) for t in teachers}
            right = [t for t in teachers if None in causes[t.name]]
            todo = [t for t in teachers if t not in right
                    and len(causes[t.name]) - later * causes[t.name].count("HTTP error") < t.attempts]
            if todo or right:
                return todo
        return []


class Asking:
    """The loop that keeps every teacher busy until no attempt is due, or until `why` says what ended it.

    Then it waits for what is on the wire: that is paid for. An attempt is in a journal as soon as it lands.
    """
    def __init__(self, teachers: list, kept: Journal, rejected: Journal, budget: float | None, seed: int):
        self.teachers, self.progress = teachers, Progress(teachers)
        self.prices = {t.name: (t.price_in, t.price_out) for t in teachers}
        self.kept, self.rejected, self.budget, self.seed = kept, rejected, budget, seed
        self.queues = {t.name: deque() for t in teachers}  # problems
        self.wire = {t.name: {} for t in teachers}         # ticket -> (attempt, when it was sent)
        self.spent, self.counts = 0.0, Counter(kept=0)     # dollars; attempts by cause
        self.why: str | None = None
        self.trouble = ""                                  # the last HTTP error, in words
        self.dead: BadInput | None = None                  # what a dead teacher's backend said

    def stop(self, why: str) -> None:
        """Send nothing more."""
        self.why = self.why or why

    def attempts(self):
        return itertools.chain(self.kept, self.rejected)

    def recall(self, questions: dict[str, str]) -> None:
        """Count the attempts on disk. Those that failed over HTTP are due again."""
        for row in self.attempts():
            if questions.get(row["id"], row["question"]) != row["question"]:
                raise BadInput(f"problem {row['id']!r} has another text in the records; choose another --out")
            self._count(row)
            if row["cause"] != "HTTP error":
                self.progress.note(row)

    def run(self, problems: list, backends: dict) -> None:
        for problem in problems:
            for teacher in self.progress.due(problem.id):
                self.queues[teacher.name].append(problem)
        over = sum(not self.progress.due(problem.id) for problem in problems)
        with tqdm(total=len(problems), initial=over, unit="problem", mininterval=1) as bar:
            while True:
                for teacher in self.teachers:
                    self._send(teacher, backends[teacher.name])
                if not any(self.wire.values()):
                    return
                for teacher in self.teachers:
                    if self.wire[teacher.name]:
                        self._collect(teacher, backends[teacher.name], bar)

    def _send(self, teacher, backend) -> None:
        queue, wire = self.queues[teacher.name], self.wire[teacher.name]
        while queue and len(wire) < teacher.workers and not self.why:
            number = self.progress.missing(queue[0].id, teacher.name)
            attempt = Attempt(queue[0], teacher, number, self.seed)
            if self.budget is not None and self._at_most() + attempt.most_dollars > self.budget:
                if not any(self.wire.values()):  # else wait: what is on the wire may turn out cheaper
                    self.why = f"the budget of ${self.budget:g} allows no further attempt"
                return
            queue.popleft()
            wire[backend.submit(attempt.request())] = attempt, time.monotonic()

    def _at_most(self) -> float:
        """Dollars spent when all that is on the wire costs as much as it can."""
        return self.spent + sum(attempt.most_dollars for wire in self.wire.values()
                                for attempt, _ in wire.values())

    def _collect(self, teacher, backend, bar) -> None:
        try:
            landed = backend.step()
        except BadInput as e:  # a dead teacher; the others finish what they have on the wire
            self.dead, self.why = e, "a teacher cannot answer"
            self.wire[teacher.name].clear()
            return
        for ticket, _, reply in landed:
            attempt, sent = self.wire[teacher.name].pop(ticket)
            row = attempt.record(reply, time.monotonic() - sent)
            (self.rejected if row["cause"] else self.kept).append(row)
            self._count(row)
            self.progress.note(row)
            self.trouble = row["reason"] if row["cause"] == "HTTP error" else self.trouble
            due = self.progress.due(row["id"])
            for t in due:  # the other teachers of this round have the problem already
                if t == teacher or t.round > teacher.round:
                    self.queues[t.name].appendleft(attempt.problem)
            bar.set_postfix({**self.counts, "$": round(self.spent, 4)}, refresh=False)
            bar.update(not due)
        if not backend.pending:  # it was stopped and has dropped the rest
            self.wire[teacher.name].clear()

    def _count(self, row: dict) -> None:
        self.spent += cost(row, self.prices)
        self.counts[row["cause"] or "kept"] += 1
