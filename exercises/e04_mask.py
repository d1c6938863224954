"""Exercise 4: the mask of supervised fine-tuning.

Is it solved?  python -m exercises 4
"""


def encode(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation that ends with a message of the assistant -> (ids, mask), both of the same length. The
    mask is 1 on all that the assistant writes, with the token that ends its turn, and 0 elsewhere."""
    raise NotImplementedError
