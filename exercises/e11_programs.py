"""Exercise 11: grade answers that are programs.

Is it solved?  python -m exercises 11
"""


def share_right(code: str, calls: list[tuple[str, object]], sandbox) -> float:
    """code: a program that a model wrote. calls: expressions and their right values, such as
    [("double(4)", 8), ("double(-1)", -2)]. sandbox: a slm.sandbox.Sandbox. Returns the share of calls with
    the right value."""
    raise NotImplementedError
