"""Exercise 1: a reward of your own.

Is it solved?  python -m exercises 1
Then train:    python train_grpo.py --reward exercises/e01_reward.py:reward
"""


def reward(episode, problem) -> float:
    """What an episode earns. A right answer in a box earns more than anything else, and a short right one
    earns more than a long right one. Whatever is not right earns the same, however long it is."""
    raise NotImplementedError
