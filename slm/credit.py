"""Whose credit is it? From the rewards of a batch to the advantage of every sampled token.

    --credit   what has a reward   what it is compared with
    episode    an episode          the problem's other episodes: GRPO (arXiv 2402.03300, section 4.1.2)
    role       a turn              its role's turns on the problem: Dr. MAS (arXiv 2602.08847, eq. 5)
    turn       a turn              those of them with the same prompt: AT-GRPO (arXiv 2510.11062)
    step       a step of a turn    its role's steps on the problem: process supervision (2402.03300, 4.1.3)

A token has the advantage of its episode or turn. With `step` it has the sum over its own step and the later
ones of its turn; as in the paper, the sum grows with their number.

Departs: AT-GRPO samples several candidates for a turn and goes on with the best. Here every episode goes on,
and turns are compared if their prompts are equal, token for token: first turns are, and verdicts on the same
answer. A turn whose prompt is like no other is compared with nothing.
"""

from itertools import accumulate, chain

import torch

from slm import losses
from slm.episode import Episode, Job, TokenRecord, run_episodes, seed_of
from slm.runs import ranks
from slm.search import Node, cut, judge, token_counts


def give_credit(episodes: list[Episode], algorithm, moving: dict[str, float], args) -> tuple[list, int]:
    """(token records of each episode with their advantages and weights, none without a reward; the divisor of
    the loss). What counts are the episodes of all ranks that have a reward.

    `moving` holds the sum of the mean rewards of earlier steps and their number, both fading by `decay` a
    step; this step's is added. The first step can take only its own mean from the rewards."""
    records = [[] if e.reward is None else e.records(args.roles) for e in episodes]
    claims = [claims_of(e, own, args.credit) for e, own in zip(episodes, records) if e.reward is not None]
    claims = ranks.gather(list(chain.from_iterable(claims)))
    if not claims:
        return records, 1
    owners, keys, rewards, tokens = zip(*claims)
    counts, paid = [len(own) for own in rewards], list(chain.from_iterable(rewards))
    if algorithm.decay:
        now = sum(paid) / len(paid)
        before = moving["sum"] / moving["steps"] if moving["steps"] else now
        moving["sum"] = algorithm.decay * moving["sum"] + now
        moving["steps"] = algorithm.decay * moving["steps"] + 1
        paid = [reward - before for reward in paid]
    numbers = {key: 0 if algorithm.whole_batch else n for n, key in enumerate(dict.fromkeys(keys))}
    groups = torch.tensor([numbers[key] for key in keys]).repeat_interleave(torch.tensor(counts))
    found = losses.advantages(torch.tensor(paid), groups, algorithm.advantage).split(counts)
    weights, divisor = losses.token_weights(torch.tensor(tokens), algorithm.normalise, args.max_tokens)
    credit = dict(zip(owners, zip(found, weights.tolist())))
    for episode, own in zip(episodes, records):
        for record in own:
            spread(record, episode, credit)
    return records, max(1, divisor)


def claims_of(episode: Episode, records: list[TokenRecord], credit: str) -> list[tuple]:
    """What has a reward in an episode: (its owner, the key of what it is compared with, its rewards, its
    trained tokens). An owner is an episode (group, sample) or a turn of it (group, sample, place)."""
    owner = episode.group, episode.sample
    if credit == "episode":
        return [(owner, episode.group, [episode.reward], sum(sum(record.mask) for record in records))]
    claims = []
    for place in chain.from_iterable(record.turns for record in records):
        turn = episode.turns[place]
        prompt = seed_of(*turn.reply.prompt_ids) if credit == "turn" else 0
        key = episode.group, turn.role, prompt
        claims.append(((*owner, place), key, turn.rewards, len(turn.reply.ids)))
    return claims


def spread(record: TokenRecord, episode: Episode, credit: dict[tuple, tuple]) -> None:
    """Fill in what each token of a record has. credit: owner -> (its advantages, a token's weight)."""
    owner = episode.group, episode.sample
    for place in record.turns:
        turn = episode.turns[place]
        advantages, weight = credit.get((*owner, place)) or credit[owner]
        later = advantages.flip(0).cumsum(0).flip(0).tolist()  # the sum over each step and those after it
        for advantage, tokens in zip(later, turn.steps or [len(turn.reply.ids)]):
            record.advantage += [advantage] * tokens
        record.weight += [weight] * len(turn.reply.ids)


def mark_steps(episodes: list[Episode], problems: list, tokenizer, verifier, args) -> None:
    """Cut every trained turn into steps. verifier: a Sampler that gives each step its P(right), or None."""
    jobs, marked = [], []
    for episode in episodes:
        problem = problems[episode.group]
        for turn in (t for t in episode.turns if t.reply.ids and t.role in (args.roles or [t.role])):
            turn.steps = token_counts(turn.reply, args.step_rule, tokenizer)
            nodes = [Node(text=text) for text in accumulate(cut(turn.reply.text, args.step_rule))]
            jobs.append(Job(problem.id, problem.question, lambda q, own=nodes: judge(q, own)))
            marked.append((turn, nodes))
    run_episodes(jobs if verifier else [], verifier)
    for turn, nodes in marked:
        turn.judged = [node.score for node in nodes]
