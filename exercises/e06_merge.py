"""Exercise 6: merge a LoRA adapter.

Is it solved?  python -m exercises 6
"""


def merge(weight, A, B, alpha: float):
    """weight (out, in) in any dtype, A (r, in) and B (out, r) in float32 -> a new weight of the same dtype
    that does what the old one and the adapter do together."""
    raise NotImplementedError
