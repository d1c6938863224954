"""Exercise 8: from GRPO to Dr. GRPO.

Is it solved?  python -m exercises 8
"""


def grpo(rewards, lengths):
    """Rewards (K,) and lengths in tokens (K,) of the samples of one problem -> (K,): the factor of the
    gradient of log p of each token of a sample, in GRPO's objective at ratio 1."""
    raise NotImplementedError


def dr_grpo(rewards, lengths, max_tokens: int):
    """The same for Dr. GRPO. max_tokens: the longest that a sample may be."""
    raise NotImplementedError
