"""Who is asked what: the teachers of a cascade file, one attempt, and what is due next.

Round 1 teachers get every problem; round 2 teachers those that no teacher of round 1 solved. A teacher tries
a problem until its first right answer or its last attempt. If several teachers of a round are right, all of
their solutions are kept.
"""

import hashlib
import itertools
import random
import tomllib
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from slm import BadInput
from slm.episode import Reply, Request, Sampling
from slm.problems import Problem
from slm.prompts import EFFORTS, SOLVER, TEACHER, Prompt
from slm.teachers.records import judge

TEMPERATURES = {1: (0.7, 0.5, 0.9), 2: (0.7, 0.5, 0.9, 0.3, 1.0)}  # the report's, by round
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
    attempts: int = 0            # 0: 3 in round 1, 5 in round 2
    temperatures: tuple = ()     # empty: TEMPERATURES; attempt after attempt, in a cycle
    efforts: dict | None = None  # not given: medium in round 1, high in round 2
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
    missing = {"name", "model", "base_url"} - row.keys()
    if missing:
        raise BadInput(f"{where}: no {', '.join(sorted(missing))}")
    late = row.get("round", 1) > 1
    row = row | {"attempts": row.get("attempts") or (5 if late else 3),
                 "efforts": row.get("efforts", {"high" if late else "medium": 1}),
                 "temperatures": tuple(row.get("temperatures") or TEMPERATURES[2 if late else 1])}
    bad = [e for e, ratio in row["efforts"].items() if e not in EFFORTS or not isinstance(ratio, int | float)]
    if bad or (row["efforts"] and not sum(row["efforts"].values()) > 0):
        raise BadInput(f"{where}: efforts = {row['efforts']}; expected ratios of {', '.join(EFFORTS)}")
    if not all(isinstance(t, int | float) and 0 <= t <= 2 for t in row["temperatures"]):
        raise BadInput(f"{where}: temperatures = {list(row['temperatures'])}; expected numbers from 0 to 2")
    if row.get("workers") == 0 or row.get("max_tokens") == 0 or row.get("timeout") == 0:
        raise BadInput(f"{where}: workers, max_tokens and timeout must be above 0")
    return Teacher(**row)


@dataclass(frozen=True)
class Job:
    """One attempt: everything about it follows from the seed, the problem, the teacher and its number."""
    problem: Problem
    teacher: Teacher
    attempt: int
    seed: int

    @property
    def temperature(self) -> float:
        return self.teacher.temperatures[self.attempt % len(self.teacher.temperatures)]

    @property
    def sample_seed(self) -> int:
        text = f"{self.seed} {self.problem.id} {self.teacher.name} {self.attempt}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)

    @property
    def effort(self) -> str | None:
        if not self.teacher.efforts:
            return None
        names, ratios = zip(*self.teacher.efforts.items())
        return random.Random(f"{self.seed} {self.problem.id} {self.teacher.round}").choices(names, ratios)[0]

    @property
    def most_dollars(self) -> float:
        """What this attempt can cost, roughly: three characters a token in, every allowed token out."""
        t = self.teacher
        return ((len(self.problem.question) / 3 + 200) * t.price_in + t.max_tokens * t.price_out) / 1e6

    @property
    def prompt(self) -> Prompt:
        return TEACHER if self.effort else SOLVER

    def request(self) -> Request:
        if self.effort is None:
            messages = [{"role": "user", "content": self.prompt(question=self.problem.question)}]
        else:
            tokens, words = EFFORTS[self.effort]
            messages = [{"role": "system", "content": self.prompt(effort=words, tokens=str(tokens))},
                        {"role": "user", "content": self.problem.question}]
        return Request(messages, Sampling(self.teacher.max_tokens, self.temperature, seed=self.sample_seed,
                                          stop_at_box=not self.effort))

    def record(self, reply: Reply, seconds: float) -> dict:
        """The row of this attempt; its `cause` is None when it is kept."""
        p, t = self.problem, self.teacher
        found = judge(reply, p.gold, t.max_tokens, needs_think=self.effort is not None)
        if found["cause"]:  # the page needs the count, a reader the beginning
            found = found | {"response": found["response"][:KEPT_TEXT], "thinking": "", "solution": ""}
        return {"id": p.id, "question": p.question, "gold": p.gold, "source": p.source, **found,
                "teacher": t.name, "model": t.model, "effort": self.effort, "round": t.round,
                "attempt": self.attempt + 1, "temperature": self.temperature, "seed": self.sample_seed,
                "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out, "finish": reply.finish,
                "seconds": round(seconds, 2), "prompt": self.prompt.id}


class Progress:
    """What has been tried and what is due: a function of the attempts seen, so a resumed run and an
    uninterrupted one ask the same."""

    def __init__(self, teachers: list[Teacher]):
        self.rounds = [[t for t in teachers if t.round == r] for r in sorted({t.round for t in teachers})]
        self.tried = defaultdict(set)  # (problem id, teacher name) -> numbers of the attempts, from 0
        self.right = set()             # (problem id, teacher name)

    def note(self, row: dict) -> None:
        self.tried[row["id"], row["teacher"]].add(row["attempt"] - 1)
        if row["cause"] is None:
            self.right.add((row["id"], row["teacher"]))

    def missing(self, id: str, name: str) -> int:
        """The first attempt that is missing: one that ended in an HTTP error leaves a gap in the files."""
        return next(k for k in itertools.count() if k not in self.tried[id, name])

    def due(self, id: str) -> list[Teacher]:
        """The teachers to ask now: the first round that is not over, unless an earlier one solved it."""
        for teachers in self.rounds:
            right = {t.name for t in teachers if (id, t.name) in self.right}
            todo = [t for t in teachers if t.name not in right and len(self.tried[id, t.name]) < t.attempts]
            if todo or right:
                return todo
        return []
