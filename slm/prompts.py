"""Every prompt string of the project, each with an id that is stored with the results it produced.

A prompt is a text with $fields: SOLVER(question=q) fills them in. The sentences are short because the
built-in model has 1,024 tokens for everything. When a text changes, its id changes.
"""

import re
from dataclasses import dataclass
from string import Template

from slm.runs.files import fingerprint


@dataclass
class Prompt:
    """A text with $fields and an id. Calling it with the fields gives the message. The values are inserted as
    they are; a missing field raises KeyError."""
    id: str
    text: str

    def __call__(self, **fields: str) -> str:
        return Template(self.text).substitute(fields)

    def fields(self, message: str) -> dict[str, str]:
        """The fields of a message that this prompt made; of any other message none."""
        pattern = re.sub(r"\\\$(\w+)", r"(?P<\1>.*?)", re.escape(self.text))
        found = re.fullmatch(pattern, message, re.S)
        return found.groupdict() if found else {}


def use(prompt: str) -> None:
    """Ask the solver as this text says from here on, with the question for each {question}. STANDARD's id
    stands for the standard prompt. All other prompts stay as they are."""
    SOLVER.id, SOLVER.text = STANDARD
    if prompt != SOLVER.id:
        SOLVER.id = f"yours/{fingerprint(prompt)[:8]}"
        SOLVER.text = prompt.replace("$", "$$").replace("{question}", "${question}")


def option() -> str:
    """What the next command needs to ask in the same way."""
    return "" if SOLVER.id == STANDARD[0] else " --prompt FILE"


# ---- the solver ------------------------------------------------------------------------------------------
BOX = "Please reason step by step, and put your final answer within \\boxed{}."

STANDARD = "solver/1", f"$question\n{BOX}"  # the report's
SOLVER = Prompt(*STANDARD)                  # the standard prompt; use() puts another in its place
CAREFUL = Prompt("careful/1", f"$question\nWork carefully. {BOX}")
VERY_CAREFUL = Prompt("very-careful/1", f"$question\nWork very carefully and check each step. {BOX}")
SHOWN = Prompt("shown/1", f"$question\nA right solution: $solution\nSolve it in your own words. {BOX}")

# ---- tools -----------------------------------------------------------------------------------------------
CODE = "Please solve it with Python code in a ```python block that prints the answer."

PYTHON = Prompt("python/1", f"$question\n{CODE}")
HINT = Prompt("hint/1", f"$question\nYou may use Python code for the calculations. {BOX}")
OUTPUT = Prompt("output/1", "\n```output\n$output\n```\n")  # what a block printed, after it in the same turn
EXPLAIN = Prompt("explain/1", "The code printed:\n$output\nPlease put your final answer within \\boxed{}.")

# ---- checks and second attempts --------------------------------------------------------------------------
CHECKER = Prompt("checker/1", "$question\nProposed solution: $solution\n"
                              "Is this solution right? Answer CORRECT or INCORRECT.")
CRITIC = Prompt("critic/1", "$question\nProposed solution: $solution\n"
                            "Is this solution right? Say in one sentence what is wrong, if anything is, "
                            "then end with VERDICT: CORRECT or VERDICT: INCORRECT.")
STEP_CHECK = Prompt("step-check/2", "$question\nSolution so far: $solution\n"
                                    "Is the last step right? Answer CORRECT or INCORRECT.")
VERIFIER = Prompt("verifier/1", "$question\nProposed answer: $answer\n"
                                "Please compute the answer with Python code in a ```python block, then print "
                                "VERIFIED if the proposed answer is right and FAILED if it is not.")
FEEDBACK = Prompt("feedback/1", "An earlier solution found $answer, but a check says it is wrong.")
NO_ANSWER = Prompt("no-answer/1", "An earlier solution gave no final answer.")
UNCLEAR = Prompt("unclear/1", "An earlier solution found $answer, but its reasoning is not clear.")
DISAGREE = Prompt("disagree/1", "An earlier solution found $answer, but a second one found $other.")
RETRY = Prompt("retry/1", f"$question\n$feedback\n{BOX}")          # in a fresh conversation
RETRY_PYTHON = Prompt("retry-python/1", f"$question\n$feedback\n{CODE}")
AGAIN = Prompt("again/1", f"$feedback Solve it again. {BOX}")      # as the next turn of a conversation

TRANSCRIPT = Prompt("transcript/1", "Problem: $question\n$history\n"
                                    f"[SOLVER]: Solve it again, minding what the checker said. {BOX}")

# ---- summaries -------------------------------------------------------------------------------------------
SUMMARY = Prompt("summary/1", "Problem: $question\nSolution: $solution\n"
                              "Summarize this solution in two sentences and end with its final answer.")
ADVICE = Prompt("advice/1", "A check of a solution says: $critique\n"
                            "In one sentence, name the main issue and how to fix it.")

# ---- teachers of make_data.py ----------------------------------------------------------------------------
TEACHER = Prompt("teacher/1", "You are an expert at solving mathematics problems. $effort\n"
                              "1. Reason between <think> and </think>, in about $tokens tokens.\n"
                              "2. After </think>, write the solution in clear steps.\n"
                              "3. End with the line: Therefore, the answer is \\boxed{...}.")
EFFORTS = {  # name: tokens of thinking asked for, and what for
    "low": (300, "Think briefly: only the essential steps."),
    "medium": (700, "Think in small steps with every intermediate calculation, without digressing."),
    "high": (1400, "Think thoroughly: state assumptions, justify each step, watch for pitfalls, verify "
                   "the result."),
    "very_high": (2500, "Think rigorously: justify everything, consider other ways to solve it, check "
                        "the result in several independent ways."),
}
