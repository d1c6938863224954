"""What a step of a trainer tells: lines of episodes.jsonl, a row of metrics.jsonl, the progress bar."""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, compress

from slm.episode import Episode, TokenRecord
from slm.grading import grade
from slm.runs import ranks
from slm.runs.stats import span

TOKENS_OF = 2  # groups a step of which episodes.jsonl tells every token


def lines(step: int, episodes: list[Episode], records: list[list[TokenRecord]], problems: dict,
          tokenizer) -> list[dict]:
    """The lines of all ranks for episodes.jsonl, by problem. records: each episode's; problems: by id.
    `correct` is a right box, `lenient` a right answer in a box or not; `advantage` the one of its tokens that
    is furthest from 0."""
    told = []
    for e, own in zip(episodes, records):
        problem = problems[e.problem_id]
        unboxed = e.reason in ("no box", "truncated") and grade(e.response, problem.gold).correct
        turns = [{"role": t.role, "reply": {"text": t.reply.text, "finish": t.reply.finish}, "worth": t.worth,
                  "rewards": rounded(t.rewards)} for t in e.turns]
        told.append((e.group, e.sample, {
            "step": step, "problem": e.problem_id, "question": problem.question, "gold": problem.gold,
            "sample": e.sample, "correct": e.solved, "lenient": e.solved or unboxed, "reward": e.reward,
            "reason": e.reason, "parts": e.parts, "answer": e.answer, "tokens": e.tokens_out,
            "advantage": max(chain.from_iterable(r.advantage for r in own), key=abs, default=None),
            "turns": turns,
            "records": [token_by_token(r, tokenizer) for r in own if e.group < TOKENS_OF]}))
    return [row for *_, row in sorted(ranks.gather(told), key=lambda t: t[:2])]


def token_by_token(record: TokenRecord, tokenizer) -> dict:
    """The text of each token and its mask; for the tokens with mask 1 the log-probs of the sampler, and where
    they were computed those of the trainer (`old`) and of the teacher; their advantages if they differ."""
    told = {"advantage": rounded(record.advantage)} if len(set(record.advantage)) > 1 else {}
    return {**told, "text": [tokenizer.decode([token], skip_special=False) for token in record.ids],
            "mask": record.mask, "old": rounded(record.old), "teacher": rounded(record.teacher),
            "logp": rounded(compress(record.logprobs, record.mask))}


def rounded(values: Iterable[float]) -> list[float]:
    return [round(x, 4) for x in values]


def summary(rows: list[dict]) -> dict:
    """What the episodes of a step were like, from their lines. `failed` counts those without a reward."""
    paid = [row for row in rows if row["reward"] is not None]
    finishes = [turn["reply"]["finish"] for row in rows for turn in row["turns"]]
    lengths, groups, parts = {True: [], False: []}, defaultdict(set), Counter()
    earned, right = defaultdict(list), defaultdict(list)  # by role
    for turn in chain.from_iterable(row["turns"] for row in paid):
        if turn["reply"]["finish"] != "score":
            earned[turn["role"]] += turn["rewards"]
            right[turn["role"]].append((turn["worth"] or 0) > 0)
    for row in paid:
        lengths[row["correct"]].append(row["tokens"])
        groups[row["problem"]].add(row["reward"])
        parts.update(row["parts"])
    return {"reward": mean(row["reward"] for row in paid), "solved": mean(row["correct"] for row in paid),
            "lenient": mean(row["lenient"] for row in paid),
            "no_answer": mean(row["reason"] == "no box" for row in rows),
            "truncated": mean(finish == "length" for finish in finishes),
            "mean_tokens": mean(row["tokens"] for row in rows),
            **({"tokens_right": mean(lengths[True])} if lengths[True] else {}),
            **({"tokens_wrong": mean(lengths[False])} if lengths[False] else {}),
            "zero_spread": mean(len(rewards) == 1 for rewards in groups.values()),
            "with_advantage": mean(bool(row["advantage"]) for row in rows), "failed": len(rows) - len(paid),
            **{f"reward/{name}": total / len(paid) for name, total in parts.items()},
            **{f"{name}/{role}": mean(by_role[role]) for role in right if len(right) > 1
               for name, by_role in (("reward", earned), ("solved", right))}}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str):
    """Add the time that the block takes to a part of the step."""
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def shares(seconds: dict[str, float], episodes: list[Episode]) -> dict:
    """Seconds of the step, the share that each of its parts took, and tokens sampled a second of sampling."""
    whole = sum(seconds.values())
    tokens = sum(e.tokens_out for e in episodes)
    return {"seconds": round(whole, 3), "tokens_per_s": round(tokens / seconds["generate"]),
            **{f"{part}_share": round(span / whole, 3) for part, span in seconds.items()}}


def tell(bar, row: dict) -> None:
    """Show the numbers that matter on the progress bar; what was evaluated last stays there."""
    if "evaluated" in row:
        interval = span(row["evaluated_low"], row["evaluated_high"])
        bar.set_description_str(f"held-out {row['evaluated']:.0%} right ({interval})")
    bar.set_postfix_str(f"reward {row['reward']:+.2f}, solved {row['solved']:.0%}, "
                        f"{row['mean_tokens']:.0f} tokens, {row['tokens_per_s']:,} tok/s")
