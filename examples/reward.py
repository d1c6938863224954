"""A reward of your own: python train_grpo.py --reward correct,examples/reward.py:brief:0.2

An episode has turns; each turn has the role, the prompt and the reply.
"""


def brief(episode, problem) -> float:
    """1 for a reply of no tokens, 0 for one of 200 or more."""
    return max(0.0, 1 - episode.tokens_out / 200)
