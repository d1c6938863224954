"""Exercise 7: is the second model better?

Is it solved?  python -m exercises 7
"""


def interval(a: list[float], b: list[float], rounds: int, seed: int) -> tuple[float, float]:
    """a[i] and b[i]: the shares of right samples of two models on problem i. Returns the 95 % interval of the
    mean of b minus that of a: a bootstrap over problems with `rounds` rounds, random from the seed."""
    raise NotImplementedError
