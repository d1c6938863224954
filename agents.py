"""Every workflow as a short generator (see slm/episode.py for the protocol)."""

from slm.episode import Ask, user
from slm.prompts import SOLVER


def solver(question: str):
    """One pass with the standard prompt."""
    return (yield Ask("solver", [user(SOLVER(question=question))]))


WORKFLOWS = {"solver": solver}
