r"""What an episode earns: the weighted sum of named parts, each a short function.

    --reward correct               the default: 1 for a right box, -1 for a wrong one, --no-box without a box
    --reward correct:1,format:0.2  parts with their weights; a part with the weight 0 is only logged
    --reward random                the placebo: what a run learns from it, it did not learn from the answers
    --reward my.py:tidy            a function of your own: def tidy(episode, problem) -> float
    --reward own                   each turn by what it says: an answer, or a verdict on one
    --reward correct,steps:0.5     with --credit step: each step, and the last one also for the answer

Most parts pay an episode, and so all its turns. `own`, `team` and `bonus` pay each turn; the episode has
their mean. With --credit step, `steps`, `judge` (P(right) by the verifier that --judge names) and `random`
pay each step; other parts pay a turn's last step.

A reward is paid after its episode: no workflow can meet the gold answer. If an episode failed and the policy
can't have caused it (a server, a machine), it has no reward and counts in no mean. What the policy can cause
(code that runs too long, a reply without an end, a conversation that fills the context) counts like anything
else; else the policy would learn to cause it. Parts can be gamed: `steps` pays for 1 + 1 = 2, too.
"""

import itertools
import math
import operator
import re
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

from slm import BadInput
from slm.episode import Episode, Turn, seed_of
from slm.grading import boxes, equal, equations, extract, grade, printed, verdict
from slm.prompts import CHECKER, CRITIC, SOLVER, VERIFIER
from slm.runs import files
from slm.sandbox import Outcome
from slm.search import cut
from slm.teachers import records
from slm.workflows import confirmed

TRUNCATED = {"keep": "is graded", "zero": "earns 0, more than a wrong one", "soft": "is graded, less length"}


@dataclass(frozen=True)
class Rules:
    """What a run pays for. weights: part -> weight; seed and step draw the coin; the rest as the options."""
    weights: dict[str, float]
    no_box: float = -1.0
    truncated: str = "keep"
    max_tokens: int = 2048
    seed: int = 0
    step: int = 0
    step_rule: str = "line"


def rules_of(args, step: int = 0) -> Rules:
    """The rules of a command line at a step. BadInput for a word that is no part."""
    weights: dict[str, float] = {}
    for word in args.reward:
        match = re.fullmatch(r"(\w+|.+\.py:\w+)(?::(-?\d*\.?\d+))?", word)
        name = match[1] if match else ""
        if name in weights or not (name in PARTS or ".py:" in name):
            raise BadInput(f"--reward {word}: expected PART or PART:WEIGHT, each part once, of "
                           f"{', '.join(PARTS)} or FILE.py:FUNCTION")
        weights[name] = float(match[2] or 1)
    if args.truncated == "soft":
        weights.setdefault("length", 1.0)
    return Rules(weights, args.no_box, args.truncated, args.max_tokens, args.seed, step, args.step_rule)


def reward_of(episode: Episode, problem, rules: Rules) -> tuple[float | None, str]:
    """(reward, reason). It also notes the episode's `solved` and `parts`, its turns' `worth` and `rewards`.
    The reward is None if the episode failed and the policy can't have caused it."""
    if episode.broken or not episode.turns:
        return None, f"failed: {episode.broken or episode.error}"
    graded = grade(episode.response, problem.gold, strict=True)
    episode.solved, episode.reason = graded.correct, "no box" if graded.answer is None else graded.reason
    for place, turn in enumerate(episode.turns):
        turn.worth = worth(episode, place, problem, rules)
    found = {name: PARTS[name](episode, problem, rules) if name in PARTS
             else yours(name, episode, problem) for name in rules.weights}
    episode.parts = {name: fmean(x) if isinstance(x, list) else x for name, x in found.items()}
    if rules.truncated == "zero" and episode.turns[-1].reply.finish == "length":
        pay(episode, {}, problem, rules)
        return 0.0, "truncated"
    pay(episode, found, problem, rules)
    return sum(weight * episode.parts[name] for name, weight in rules.weights.items()), episode.reason


def pay(episode: Episode, found: dict[str, float | list[float]], problem, rules: Rules) -> None:
    """Fill in the rewards of the turns. found: what each part gives for the episode, or for each turn."""
    for place, turn in enumerate(episode.turns):
        nothing = [0.0] * (len(turn.steps) - 1)  # for the steps before the last one
        turn.rewards = [*nothing, 0.0]
        for name, value in found.items():
            earned = [*nothing, value[place] if isinstance(value, list) else value]
            if turn.steps and name in OF_STEPS:
                earned = OF_STEPS[name](episode, place, problem, rules)
            weight = rules.weights[name]
            turn.rewards = [paid + weight * x for paid, x in zip(turn.rewards, earned, strict=True)]


# ---- the parts: (episode, problem, rules) -> float, or a list with one for each turn ---------------------

def correct(episode, problem, rules) -> float:
    """1 for a right box, -1 for a wrong one, --no-box for none."""
    return 1.0 if episode.solved else rules.no_box if episode.reason == "no box" else -1.0


def box(episode, problem, rules) -> float:
    """1 for exactly one box outside of code."""
    return float(len(boxes(re.sub(r"```.*?(```|\Z)", "", episode.response, flags=re.S))) == 1)


def form(episode, problem, rules) -> float:
    """1 if the last reply looks like a teacher's record: <think> once, steps after it, one box at the end."""
    reply = turns(episode)[-1].reply
    return float(records.assess(reply, problem.gold, rules.max_tokens)["cause"] in (None, "wrong"))


def steps(episode, problem, rules) -> float:
    """Of the different steps `a op b = c` that were written in numbers, the share that is exactly true."""
    found = equations(written(episode))
    return sum(equal(*sides) for sides in found) / max(1, len(found))


def code(episode, problem, rules) -> float:
    """The share of the programs that ran to their end; 0 without a program."""
    ended = [not (outcome.error or outcome.timed_out) for outcome in outcomes(episode)]
    return sum(ended) / max(1, len(ended))


def agrees(episode, problem, rules) -> float:
    """1 if the last program printed the answer that was written in a box, or else the episode's answer."""
    answer = extract(written(episode), strict=True) or episode.answer
    output = printed(([None] + outcomes(episode))[-1])
    return float(None not in (answer, output) and equal(answer, output))


def length(episode, problem, rules) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) for the longest reply: 0 up to 4/5 of
    --max-tokens, then in a line down to -1. (The paper: 16,384 of 20,480 tokens.)"""
    buffer = rules.max_tokens / 5
    over = max(turn.reply.tokens_out for turn in episode.turns) - (rules.max_tokens - buffer)
    return max(-1.0, min(0.0, -over / buffer))


def coin(episode, problem, rules, *place: int) -> float:
    """0 or 1, whatever was written; the same after a resume and on any number of ranks."""
    return float(seed_of(rules.seed, "coin", rules.step, problem.id, episode.sample, *place) % 2)


def team(episode, problem, rules, gamma: float = 0.3) -> list[float]:
    """MAPoRL's reward (arXiv 2502.18439): (s + sum of gamma^k s_k) / (1 + sum of gamma^k), with s the turn's
    own worth and s_k the mean worth of the turns k rounds later."""
    grouped = itertools.groupby(episode.turns, key=attrgetter("round"))
    rounds = {n: fmean(map(attrgetter("worth"), some)) for n, some in grouped}
    found = []
    for turn in episode.turns:
        worths = [turn.worth, *(rounds[n] for n in rounds if n > turn.round)]
        weights = [gamma ** k for k in range(len(worths))]
        found.append(sum(map(operator.mul, weights, worths)) / sum(weights))
    return found


def bonus(episode, problem, rules) -> list[float]:
    """MAPoRL's incentives, +-1 each: the weight is every alpha. Correction: +1 if the role was wrong in its
    last turn and is right now, -1 the other way round. Influence: +1 if most other roles were wrong before
    the turn and are right after it, -1 the other way round. These signs are what the paper wants; in the
    authors' code those of the influence are the opposite."""
    found = []
    for turn in episode.turns:  # role -> whether it was right, in its turn just before or just after this one
        before = {other.role: other.worth > 0 for other in episode.turns if other.round < turn.round}
        after = {other.role: other.worth > 0 for other in episode.turns[::-1] if other.round > turn.round}
        now, then = turn.worth > 0, before.pop(turn.role, turn.worth > 0)
        others = before.keys() & after.keys()
        most = [2 * sum(map(right.get, others)) > len(others) for right in (before, after)]
        found.append(float(now - then + most[1] - most[0]))
    return found


PARTS = {"correct": correct, "box": box, "format": form, "steps": steps, "code": code, "agrees": agrees,
         "length": length, "random": coin, "team": team, "bonus": bonus,
         "own": lambda episode, problem, rules: [turn.worth for turn in episode.turns],
         "judge": lambda episode, problem, rules: [fmean(turn.judged or [0.0]) for turn in episode.turns]}


def worth(episode: Episode, place: int, problem, rules: Rules) -> float:
    """What a turn says, judged alone: 1 for the right answer, -1 for a wrong one, --no-box for none. If it
    was asked for a verdict: 1 if it says what is true, else -1. A summary has what its episode has."""
    turn = episode.turns[place]
    asked = turn.messages[-1]["content"] if turn.messages else ""
    given = VERIFIER.fields(asked) | CHECKER.fields(asked) | CRITIC.fields(asked)
    outcome = ([None] + [run.outcome for run in episode.runs if run.turn == place])[-1]
    if "answer" in given:
        return 1.0 if confirmed(outcome, given["answer"]) == equal(given["answer"], problem.gold) else -1.0
    if "solution" in given:
        return 1.0 if verdict(turn.reply.text) == grade(given["solution"], problem.gold).correct else -1.0
    if turn.role == "summarizer" or turn.reply.finish == "score":
        return correct(episode, problem, rules)
    answer = printed(outcome)
    graded = grade(f"\\boxed{{{answer}}}" if answer else turn.reply.text, problem.gold, strict=True)
    return 1.0 if graded.correct else rules.no_box if graded.answer is None else -1.0


def turns(episode: Episode) -> list[Turn]:
    """Those of the role that spoke first: a checker's words say nothing about the solver's answer."""
    return [turn for turn in episode.turns if turn.role == episode.turns[0].role]


def written(episode: Episode) -> str:
    return "\n".join(turn.reply.text for turn in turns(episode))


def outcomes(episode: Episode) -> list[Outcome]:
    """What became of that role's programs."""
    return [run.outcome for run in episode.runs if episode.turns[run.turn].role == episode.turns[0].role]


# ---- parts that pay each step of a turn: (episode, place of the turn, problem, rules) -> list ------------

def true_steps(episode, place, problem, rules) -> list[float]:
    """0 for a step with a false equation, else 1."""
    texts = cut(episode.turns[place].reply.text, rules.step_rule)
    return [float(all(itertools.starmap(equal, equations(text)))) for text in texts]


def coins(episode, place, problem, rules) -> list[float]:
    return [coin(episode, problem, rules, place, n) for n in range(len(episode.turns[place].steps))]


OF_STEPS = {"steps": true_steps, "random": coins,
            "judge": lambda episode, place, problem, rules: episode.turns[place].judged}


# ---- a function of yours ---------------------------------------------------------------------------------

def yours(word: str, episode: Episode, problem) -> float:
    """What FILE.py:FUNCTION gives. Whatever goes wrong in it ends the run with its file and line."""
    with files.yours(word, "(episode, problem) that returns a number") as function:
        earned = float(function(episode, problem))
        if not math.isfinite(earned):
            raise ValueError(f"it returned {earned}")
    return earned


# ---- texts for the check before the first step -----------------------------------------------------------

def samples(question: str, right: str, wrong: str) -> dict[str, str]:
    """One text that solves the problem and twelve that don't, though most of them hold its answer."""
    box, other = rf"\boxed{{{right}}}", rf"\boxed{{{wrong}}}"
    work = "<think>\nFirst, 2 + 3 = 5.\n</think>\nThe steps are 2 + 3 = 5 and 5 * 4 = 20.\nThe answer is "
    return {"right": work + box, "true steps to nowhere": work + other, "silence": "",
            "empty thinking": f"<think>\n</think>\n{other}", "two boxes": f"{box} {other}",
            "an open box": box[:-1], "an empty box": rf"\boxed{{}} {right}",
            "a box of candidates": rf"\boxed{{0, 1, 2, {right}, {wrong}}}",
            "the answer in prose": f"The answer is {right}.", "repetition": f"The answer is {right}. " * 40,
            "a box in code": f"```python\nanswer = {right}\nprint(f'\\\\boxed{{{{answer}}}}')\n```",
            "an echo of the prompt": f"{SOLVER(question=question)}\n{right}",
            "a run-on": f"{other}<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n{box}"}
