"""Searches with a verifier: workflows that grow solutions step by step. A chapter of its own, written like
the core.

    steps      one more step of a partial solution, its code run, what a verifier says of it
    searches   what is built from that: best of n, votes, beams, trees; each a workflow
    labels     which steps were right, for a verifier to learn
"""

from slm.search import labels
from slm.search.searches import SEARCHES, chains, tally
from slm.search.steps import WORDS, Node, cut, judge, shown, stated, step_check, token_counts

__all__ = ["SEARCHES", "WORDS", "Node", "chains", "cut", "judge", "labels", "shown", "stated", "step_check",
           "tally", "token_counts"]
