"""What came of a run: tables with intervals, and one sentence. page.js draws them.

A cell of a table is text, a number, {"share": x, "low": a, "high": b}, drawn with its interval,
{"difference": x, ...}, drawn around 0, or {"bar": n}, a bar beside the others of its column.
"""

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from slm.report.told import FLAGS, Told, short
from slm.runs import stats

# Metric -> title, in the order of the page. The loss comes late because it says little in GRPO.
HEADLINES = {
    "reward": "reward", "evaluated": "held-out problems right (share)", "solved": "solved (share)",
    "lenient": "solved, box or not (share)", "held_out_loss": "loss on held-out rows",
    "held_out_right": "held-out rows right (share)", "kl": "KL to the reference (nats)",
    "entropy": "entropy (nats)", "mean_tokens": "tokens a reply", "tokens_right": "tokens of right ones",
    "tokens_wrong": "tokens of wrong ones", "truncated": "truncated (share)",
    "no_answer": "no answer (share)", "zero_spread": "groups without a signal (share)",
    "with_advantage": "with an advantage (share)", "replaced": "groups replaced", "loss": "loss",
    "grad_norm": "gradient norm", "clipped": "clipped tokens (share)",
    "dlogp": "gap of log-probs to the sampler", "canary": "the same on canaries, at a server",
    "importance": "importance weight, mean",
    "importance_max": "importance weight, largest", "cut": "weights cut (share)", "lr": "learning rate",
    "tokens_per_s": "tokens a second", "generate_share": "time to sample (share)",
    "score_share": "time to reward (share)", "learn_share": "time to learn (share)",
    "evaluate_share": "time to evaluate (share)", "memory": "peak memory (GB)"}
TITLES = {"eval": "Right answers", "agents": "Workflows", "compare": "Runs"}  # kinds of runs with accuracies
DONE = {"grpo": "adapter", "sft": "[am]*[rl]", "eval": "summary.json", "agents": "table.json",
        "data": "summary.json", "verifier": "train.jsonl"}  # what the script writes last


def kind_of(folder: Path, settings: dict) -> str:
    """Which script made a run."""
    for name, kind in (("algorithm", "grpo"), ("validate", "sft"), ("teachers", "data")):
        if name in settings:
            return kind
    for file, kind in (("samples", "verifier"), ("answers", "eval"), ("episodes", "agents")):
        if (folder / f"{file}.jsonl").is_file():
            return kind
    return "run"


# ---- tables ----------------------------------------------------------------------------------------------

def tables(told: Told, kind: str) -> list[dict]:
    """The tables of a page, in their order."""
    c, who, problems, found = told.columns, list(told.who), list(told.problems.values()), []
    data = [problems[i].get("data", "") for i in c["problem"]]
    bins = [None if tokens is None else max(0, tokens).bit_length() for tokens in c["tokens"]]
    if kind in ("data", "verifier"):
        kept = "kept" if kind == "data" else "right"
        causes = Counter(kept if right else list(told.reasons)[reason]
                         for right, reason in zip(c["right"], c["reason"]))
        lengths = Counter(low for right, low in zip(c["right"], bins) if right and low is not None)
        found = [bars(f"{kept.capitalize()}, or why not", causes.most_common()),
                 bars(f"Length of what was {kept}", [(length(low), lengths[low]) for low in sorted(lengths)])]
        return [table for table in found if table["rows"]]
    if kind not in TITLES or not problems:
        return []
    sets = list(dict.fromkeys(data))
    for one in sets if len(who) > 1 else ():
        keys = [place if own == one else None for place, own in zip(c["who"], data)]
        title = f"{TITLES[kind]}: {one}" if len(sets) > 1 else TITLES[kind]
        found.append(breakdown(told, title, keys, who.__getitem__, compare=True))
    if len(who) == 1:
        found += [breakdown(told, TITLES[kind], data, str),
                  breakdown(told, "By length of the answer", bins, length)]
    for name in ("level", "subject"):
        keys = [problems[i].get(name) for i in c["problem"]]
        found += [breakdown(told, f"By {name}", keys, str)] if len(set(keys)) > 1 else []
    return found


def breakdown(told: Told, title: str, keys: list, name: Callable, compare: bool = False) -> dict:
    """A table with a row for each of keys, which holds one for each episode (None: left out): how much is
    right, with its interval. compare: and how that differs from the first row, on the problems of both."""
    rows, c, table, first = defaultdict(list), told.columns, [], None
    for i, key in enumerate(keys):
        if key is not None and c["right"][i] is not None:
            rows[key].append(i)
    there = functools.reduce(operator.or_, c["flags"], 0)
    shown = [flag for flag in ("truncated", "no box", "improved", "degraded") if there & FLAGS[flag]]
    for key in sorted(rows):
        groups, tokens, flags = defaultdict(list), [], Counter()
        for i in rows[key]:
            groups[c["problem"][i]].append(c["right"][i])
            tokens += [c["tokens"][i] or 0]
            flags.update(flag for flag, bit in FLAGS.items() if c["flags"][i] & bit)
        shares = {problem: fmean(rights) for problem, rights in groups.items()}
        first = first or shares
        counts = [f"{flags[flag]:,} ({100 * flags[flag] / len(tokens):.1f} %)" for flag in shown]
        table.append([name(key), len(shares), share("share", *stats.estimate(list(shares.values()))),
                      round(fmean(tokens)), *counts, *(over(first, shares) if compare else ())])
    columns = ["", "problems", "right", "tokens", *shown]
    return {"title": title, "columns": columns + (["over the first", "p"] if compare else []), "rows": table}


def share(name: str, x: float, low: float, high: float) -> dict:
    return {name: short(float(x)), "low": short(low), "high": short(high)}


def over(first: dict[int, float], shares: dict[int, float]) -> list:
    """The difference to the first row, and McNemar's p where each problem has one sample."""
    common = sorted(first.keys() & shares.keys())
    if first is shares or not common:
        return [None, None]
    a, b = [first[i] for i in common], [shares[i] for i in common]
    p = stats.mcnemar(a, b) if all(x in (0, 1) for x in a + b) else None
    return [share("difference", *stats.difference(a, b)), None if p is None else stats.p_value(p)]


def bars(title: str, rows: list[tuple]) -> dict:
    return {"title": title, "columns": ["", "attempts"], "rows": [[name, {"bar": n}] for name, n in rows]}


def length(bits: int) -> str:
    """The numbers of tokens that have so many bits."""
    return f"{2 ** bits // 2:,} to {2 ** bits - 1:,} tokens"


# ---- the sentence ----------------------------------------------------------------------------------------

def sentence(told: Told, kind: str, settings: dict, rows: list[dict], found: list[dict]) -> str:
    """What was run, and what came out. rows: of metrics.jsonl; found: the tables."""
    model = "/".join(Path(str(settings.get("model", "the model"))).parts[-2:])
    data, steps = ", ".join(settings.get("data") or ["its data"]), rows[-1]["step"] if rows else 0
    count = len(told.columns["right"])
    if kind == "grpo":
        return (f"{model}, trained with {settings['algorithm']} for {steps:,} steps of {settings['batch']} "
                f"problems of {data}, {settings['samples']} samples each. "
                f"{moves(rows, 'evaluated', 'solved', 'reward')}")
    if kind == "sft":
        full = settings.get("full") or not settings.get("lora", True)  # the first in older runs
        what = "all weights" if full else f"a LoRA adapter of rank {settings['rank']}"
        metrics = [name for name in ("held_out_loss", "held_out_right") if rows and name in rows[0]]
        return (f"{model}, {what} fine-tuned on {data} for {steps:,} steps. "
                f"{moves(rows, *metrics or ['loss'])}")
    if kind in ("data", "verifier"):
        kept = [problem for problem, right in zip(told.columns["problem"], told.columns["right"]) if right]
        return (f"{count:,} attempts at {len(told.problems):,} problems of {data}: {len(kept):,} are right, "
                f"and {len(set(kept)):,} problems have a right one.")
    if not found:
        return f"{steps:,} steps, {count:,} rows to read."
    table = found[0]["rows"]
    if "p" not in found[0]["columns"]:
        parts = [f"{in_words(row)} of {row[1]:,} problems of {row[0]} right" for row in table]
        return f"{model}: {'; '.join(parts)}."
    best = max(table, key=lambda row: row[2]["share"])
    first = f" {table[0][0]} has {in_words(table[0])}." if best is not table[0] else ""
    return (f"{len(table)} {TITLES[kind].lower()}, {len(told.problems):,} problems: {best[0]} has the most "
            f"right, {in_words(best)}.{first}")


def in_words(row: list) -> str:
    return f"{100 * row[2]['share']:.1f} % (95 % interval {stats.span(row[2]['low'], row[2]['high'])})"


def moves(rows: list[dict], *names: str) -> str:
    """How metrics went from the first tenth of their values to the last."""
    said = []
    for name in names:
        if y := [row[name] for row in rows if name in row]:
            tenth, percent = max(1, len(y) // 10), HEADLINES[name].endswith("(share)")
            ends = [fmean(part) for part in (y[:tenth], y[-tenth:])]
            ends = [f"{100 * x:.1f} %" if percent else f"{x:.3g}" for x in ends]
            said.append(f"{HEADLINES[name].removesuffix(' (share)')} from {ends[0]} to {ends[1]}")
    return f"{'; '.join(said).capitalize()}." if said else "No step is done yet."
