"""Exercise 12: a cache of keys and values.

Is it solved?  python -m exercises 12
"""


def greedy(model, prompt: list[int], stop_ids, max_tokens: int) -> list[int]:
    """The most likely token after the prompt, then the one after that, and so on -> their ids. The last is a
    stop id, unless there are max_tokens. The model sees the prompt once, and then one token at a time."""
    raise NotImplementedError
