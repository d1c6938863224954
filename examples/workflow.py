"""A workflow of your own: python agents.py --workflow examples/workflow.py:second_thought --limit 50

A role is any word in quotes; --adapter ROLE=DIR gives it an adapter of its own. To train it:
    python train_grpo.py --workflow examples/workflow.py:second_thought
"""

from slm import prompts
from slm.episode import Ask, Draft, user
from slm.grading import extract


def second_thought(question: str, rounds: int = 1):
    """Solve, then look again `rounds` times: three times with examples/workflow.py:second_thought@3."""
    messages = [user(prompts.SOLVER(question=question))]
    reply = yield Ask("solver", messages)
    yield Draft(extract(reply.text))  # what it said first: agents.py counts what got better or worse
    for _ in range(rounds):
        messages += [reply.message(), user("Check each step. Then give the final answer within \\boxed{}.")]
        reply = yield Ask("solver", messages)
    return reply
