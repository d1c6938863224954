"""Exercise 2: a workflow of your own.

Is it solved?  python -m exercises 2
Then run:      python agents.py --workflow exercises/e02_workflow.py:third_if_needed --limit 50
"""


def third_if_needed(question: str):
    """Ask the solver twice. Ask it a third time only if the two answers differ or are both missing."""
    raise NotImplementedError
    yield  # a function with a yield is a generator, as a workflow must be
