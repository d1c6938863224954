"""Training records: which answers become records, which problems leak a test set, and the summary of it all.

Files of a make_data.py run: records.jsonl (kept), rejected.jsonl (every other attempt, with its cause),
settings.json, summary.json and report.html. Imports no torch.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from slm.grading import boxes, grade

CAUSES = ("HTTP error", "refused", "truncated", "too long", "no think", "no steps", "no box", "several boxes",
          "text after the box", "wrong")
LONG = 20    # characters per allowed token: a longer text is not what was asked for
BINS = (0, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens


# ---- what is kept ----------------------------------------------------------------------------------------

def whole_text(text: str, thinking: str | None) -> str:
    """One text with the thinking in tags. Some servers send the thinking in a field of its own; some models
    write only its end, since their template opens it in the prompt."""
    if "<think>" in text:
        return text
    if thinking:
        return f"<think>\n{thinking.strip()}\n</think>\n{text}"
    return f"<think>\n{text}" if text.count("</think>") == 1 else text


def assess(reply, gold: str, max_tokens: int, needs_think: bool = True) -> dict:
    """What a Reply is worth: a record's fields, with `cause` None when it is kept, else one of CAUSES.

    Kept: not truncated, thinking once (required of teachers, allowed to our own model), steps after it, one
    box, in the last line, with the right answer.
    """
    text = whole_text(reply.text, reply.thinking)
    thinking, _, solution = text.rpartition("</think>")
    found = {"response": text, "thinking": thinking.replace("<think>", "", 1).strip(),
             "solution": solution.strip(), "predicted": None, "reason": reply.error or ""}
    cause = _form(reply, text, solution, max_tokens, needs_think)
    if cause is None:
        graded = grade(solution, gold, strict=True)
        found |= {"predicted": graded.answer, "reason": graded.reason}
        cause = None if graded.correct else "wrong"
    return found | {"cause": cause}


def _form(reply, text: str, solution: str, max_tokens: int, needs_think: bool) -> str | None:
    if reply.finish == "error":
        return "HTTP error"
    if reply.finish == "refused" or re.match(r"(i'm |i am )?sorry\b|i (can't|cannot|won't) ", text.lower()):
        return "refused"
    if reply.finish == "length":
        return "truncated"
    if len(text) > LONG * max_tokens:
        return "too long"
    tags = (text.count("<think>"), text.count("</think>"))
    once = tags == (1, 1) and re.match(r"\s*<think>\s*[^\s<].*</think>", text, re.S)
    if (needs_think or any(tags)) and not once:
        return "no think"
    found = boxes(solution)
    if len(found) != 1:
        return "several boxes" if found else "no box"
    box, = found
    if len(re.sub(r"(?i)therefore|the (final )?answer is|\W", "", solution[:box.start])) < 8:
        return "no steps"
    more_lines = solution[box.stop:].partition("\n")[2]  # LaTeX that closes a formula may follow
    return "text after the box" if re.search(r"\w", re.sub(r"\\\w+(\{\w+\*?\})?", "", more_lines)) else None


# ---- leaks of test sets ----------------------------------------------------------------------------------

class Leaks:
    """Questions that hold a test question, or share n words in a row with one (GPT-3, appendix C: n = 13).

    Case and punctuation don't count. sets: name -> questions. n = None: only whole questions are compared.
    """

    def __init__(self, sets: dict[str, Iterable[str]], n: int | None = 13):
        self.n, self.whole, self.parts = n, {}, {}
        for name, questions in sets.items():
            for question in questions:
                words = _words(question)
                self.whole[" ".join(words)] = name
                for gram in self._grams(words):
                    self.parts[hash(gram)] = name

    def find(self, question: str) -> dict | None:
        """{"set", "kind", "text"} of the first overlap, or None."""
        words = _words(question)
        if name := self.whole.get(" ".join(words)):
            return {"set": name, "kind": "exact", "text": question}
        for gram in self._grams(words):
            if name := self.parts.get(hash(gram)):
                return {"set": name, "kind": f"{self.n} words", "text": gram}
        return None

    def _grams(self, words: list[str]) -> Iterator[str]:
        for i in range(len(words) - self.n + 1 if self.n else 0):
            yield " ".join(words[i:i + self.n])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


# ---- the summary -----------------------------------------------------------------------------------------

def summarize(problems: list, dropped: dict[str, dict], still_open: set[str], attempts: Iterable[dict],
              prices: dict[str, tuple[float, float]]) -> dict:
    """Counts over all attempts, in one pass with nothing kept in memory.

    problems: all that were loaded; dropped: problem id -> leak; still_open: ids that have attempts left;
    prices: teacher -> dollars per million tokens (in, out).
    """
    asked = {p.id for p in problems} - dropped.keys()
    solved: dict[str, int] = {}  # problem id -> round
    groups = {key: defaultdict(Counter) for key in ("round", "teacher", "effort")}
    causes, lengths, total = Counter(), Counter(), Counter()
    for row in attempts:
        if row["id"] not in asked:
            continue
        kept = row["cause"] is None
        causes[row["cause"]] += 1
        for counts in (total, *(group[str(row[key])] for key, group in groups.items())):
            counts.update(attempts=1, records=int(kept), dollars=cost(row, prices),
                          tokens_in=row["tokens_in"], tokens_out=row["tokens_out"])
        if kept:
            solved[row["id"]] = min(row["round"], solved.get(row["id"], row["round"]))
            lengths[max(b for b in BINS if b <= max(0, row["tokens_out"]))] += 1
    sources = {}
    for p in problems:
        counts = sources.setdefault(p.source, Counter(problems=0, overlapping=0, asked=0))
        counts.update(problems=1, overlapping=p.id in dropped, asked=p.id in asked)
        if p.id in solved:
            counts.update(["solved", f"in round {solved[p.id]}"])
        elif p.id in asked:
            counts["open" if p.id in still_open else "unsolved"] += 1
    every = sources["all"] = sum(sources.values(), Counter())
    headline = (f"{every['problems']:,} problems -> {every['solved']:,} solved, "
                f"{_percent(every)} % unsolved, ${total['dollars']:.4f}")
    return {"headline": headline,
            "source": {name: dict(c) | {"unsolved %": _percent(c)} for name, c in sources.items()},
            **{key: dict(sorted(group.items())) for key, group in groups.items()},
            "total": total, "causes": {c: causes[c] for c in CAUSES if causes[c]}, "overlaps": dropped,
            "tokens_out_of_records": {f"{b}+": lengths[b] for b in BINS if lengths[b]}}


def cost(row: dict, prices: dict[str, tuple[float, float]]) -> float:
    """Dollars of one attempt."""
    price_in, price_out = prices.get(row["teacher"], (0.0, 0.0))
    return (max(0, row["tokens_in"]) * price_in + max(0, row["tokens_out"]) * price_out) / 1e6


def _percent(counts: Counter) -> float:
    return round(100 * counts["unsolved"] / max(1, counts["asked"]), 2)
