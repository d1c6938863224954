"""Problems to solve: benchmark sets by name, the built-in `tiny` world, or any JSON lines file.

    load("gsm8k", "test")        from a local folder when one has it, else downloaded once and cached
    load("my/problems.jsonl")    rows with question and answer, or of another shape that rows.py knows

Folders are searched in this order: $SLM_DATA, ./data, ../shared/data, then the cache ($SLM_CACHE, by default
~/.cache/slm). Each holds <set>/<split>.jsonl. Not covered: multiple choice, pictures.
Imports no torch.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm import BadInput
from slm.episode import user
from slm.formats import golds
from slm.formats.rows import read as read_row
from slm.formats.sources import SOURCES, find
from slm.prompts import SOLVER
from slm.runs import files
from slm.tiny import world


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; '' for what the set does not have. `data` is the name or path that
    it was loaded by."""
    id: str
    question: str
    gold: str
    source: str
    solution: str = ""
    level: str = ""
    subject: str = ""
    data: str = field(default="", compare=False)


NAMES = ("tiny", "tiny-unseen", *SOURCES)


def load(name: str, split: str = "train", limit: int | None = None, draw: int | None = None) -> list[Problem]:
    """The first `limit` problems of a named set's split, or of a JSON lines file (which has no other split).
    With `draw`, a seed, they are `limit` problems at random, in the order of the set.

    Raises BadInput, naming file and line, for an unknown name or split, a set that is neither local nor
    reachable, a broken row, a missing field, an empty set.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit {limit}: expected 1 or more problems")
    if name in ("tiny", "tiny-unseen"):
        problems = _tiny("unseen" if name == "tiny-unseen" else split, limit if draw is None else None)
    elif name in SOURCES:
        if split not in SOURCES[name]:
            raise BadInput(f"{name} has no {split!r} split here, only {' and '.join(SOURCES[name])}" + (
                "; its test set is math500" if name == "math" else ""))
        problems = read(find(SOURCES[name][split]), name, split)
    else:
        path = Path(name)
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "is neither a data set's name nor a file"
            raise BadInput(f"data {name!r} {what}; expected one of {', '.join(NAMES)}, or a JSON lines file")
        problems = read(path, *origin(path))
    if draw is not None and limit and limit < len(problems):
        chosen = random.Random(draw).sample(range(len(problems)), limit)
        problems = [problems[i] for i in sorted(chosen)]
    return [replace(p, data=name) for p in problems[:limit]]


def load_all(names: list[str], split: str, *which) -> list[Problem]:
    """The problems of several sets; which: as in load(). BadInput where an id comes twice."""
    problems = [p for name in names for p in load(name, split, *which)]
    (id, times), = Counter(p.id for p in problems).most_common(1)
    if times > 1:
        raise BadInput(f"--data {','.join(names)}: problem {id!r} comes twice; expected different ids")
    return problems


def read(path: Path, source: str, split: str = "") -> list[Problem]:
    """The problems of one file. Rows keep their own id where all of them have a different one. A row whose
    question or gold answer is empty, or with several questions, is left out, counted and named."""
    rows = files.read_rows(path)
    own = [golds.own_id(row) for _, row in rows]
    unique = None not in own and len(set(own)) == len(own)
    prefix = f"{source}-{split}" if split else source
    problems, without, unread = [], [], {}
    for n, (line, row) in enumerate(rows):
        id = own[n] if unique and not own[n].isdigit() else f"{prefix}-{own[n] if unique else n}"
        found = read_row(row)
        unread |= dict.fromkeys(found.unread)
        gold, solution = golds.gold_and_solution(found, row, source, f"{path} line {line}")
        if gold and found.question:
            problems.append(Problem(id, found.question.strip(), gold, source, solution,
                                    str(row.get("level", "")), str(row.get("subject", ""))))
        else:
            without.append(f"line {line}")
    if without and not problems:
        raise BadInput(f"{path} {without[0]}: the gold answer is empty, or no single question; so in all")
    if without:
        print(f"{path.name}: left out {len(without)} of {len(rows)} rows, without a gold answer or with "
              f"several or no questions: {', '.join(without[:5] + ['...'] * (len(without) > 5))}",
              file=sys.stderr)
    if unread and source not in SOURCES:
        print(f"{path.name}: these fields are not read: {', '.join(unread)}", file=sys.stderr)
    if not problems:
        raise BadInput(f"{path}: no problems in it; expected one JSON object a line")
    return problems


def fingerprint(problems: list[Problem]) -> str:
    """A short hash of ids, questions and golds in order: runs with equal ones had the same problems."""
    return files.fingerprint([(p.id, p.question, p.gold) for p in problems])


def refuse_long(problems: list[Problem], backend) -> None:
    """BadInput for a problem whose standard prompt fills the context of a Sampler's model. (An Endpoint's
    server knows its own.)"""
    if not hasattr(backend, "tokenizer"):
        return
    context = backend.model.config.positions
    for p in problems:
        if len(p.question.encode()) > context // 2:  # a token has at least one byte: the others fit
            tokens = len(backend.tokenizer.chat([user(SOLVER(question=p.question))]))
            if tokens >= context:
                raise BadInput(f"problem {p.id}: its prompt has {tokens:,} tokens and the model's context "
                               f"{context:,}; leave it out, or take another model")


def _tiny(split: str, limit: int | None) -> list[Problem]:
    if split not in ("train", "test", "unseen"):
        raise BadInput(f"tiny has no {split!r} split, only train, test and unseen")
    source = "tiny-unseen" if split == "unseen" else "tiny"
    return [Problem(story.id, story.question, story.answer, source, world.solve(story, "detailed"))
            for story in world.problems(split, limit)]


def origin(path: Path) -> tuple[str, str]:
    """(source, split) of a file: gsm8k/test.jsonl is what `gsm8k` names, so its problems get the same ids."""
    if path.stem in ("train", "test") and path.resolve().parent.name:
        return path.resolve().parent.name, path.stem
    return path.stem, ""
