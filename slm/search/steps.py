r"""The step generator: one more step of a partial solution, its code run, and what a verifier says of it.

Where a step ends is one rule a model (--step-rule, said at the start): with a paragraph (a blank line), a
line or a sentence. Code in a fence is never cut. It runs in the sandbox as soon as its fence closes, and its
output belongs to the step.

    root = Node()                                        # nothing is written yet
    children = yield from grow(question, [root] * 4)     # four candidates for the first step, in one batch
    yield from judge(question, children)                 # the verifier's P(right) of each step

A partial solution is an assistant's turn that is not over. A step goes on behind the ids of those before it,
so a path of steps is one token record, and nothing is tokenized again. The verifier writes no text: its score
comes from the log-probs of CORRECT and INCORRECT. It may be the same model, trained for it or not, or another
adapter (--adapter verifier=DIR). These generators are parts of workflows: searches.py puts them together.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from slm import prompts
from slm.episode import STEPS, Ask, Reply, Run, user
from slm.grading import answered, blocks_of, extract, printed
from slm.sandbox import Outcome

DEPTH = 16      # steps of a solution (rStar-Math); a longer one is given up
PIECES = 6      # Asks that one step may take: for code, and for lines without a word
WORDS = ("CORRECT", "INCORRECT")  # as for whole solutions
STEP = {"temperature": 0.8, "max_tokens": 256, "one_step": True, "stop": ("\n```\n",)}  # or its code ends
CODE = {"one_step": False, "keep_stop": True, "stop": ("```",)}                         # in an open fence


# ---- what is read in a solution --------------------------------------------------------------------------

def stated(text: str) -> str | None:
    """The answer in a text. If the text has code, only a box counts: numbers of code are no answers."""
    return extract(text, strict="```" in text or "~~~" in text)


def shown(outcome: Outcome) -> str:
    """What a model gets to see of a run, at most 1,000 characters."""
    text = outcome.stdout.strip()
    if outcome.error or outcome.timed_out:
        text = f"{text}\n{outcome.error or 'stopped: time limit'}".strip()
    return text[-1000:] or "(nothing)"


def has_words(text: str) -> bool:
    """Whether there is more than signs and the tags of thinking: else it is no step of its own."""
    return bool(re.sub(r"</?think>|[\W_]", "", text))


def cut(text: str, rule: str) -> list[str]:
    r"""The steps of a whole solution, where the generator would have ended them; joined they are the text.

    >>> cut("<think>\nSo:\n```python\nprint(4)\n```\n\n```output\n4\n```\nIt is 4.", "line")
    ['<think>\nSo:\n', '```python\nprint(4)\n```\n\n```output\n4\n```\n', 'It is 4.']
    """
    steps, start = [], 0
    for end in re.finditer("|".join(f"(?<={re.escape(stop)})" for stop in STEP["stop"] + STEPS[rule]), text):
        step, more = text[start:end.end()], text[end.end():end.end() + 12].lstrip()
        if step.count("```") % 2 == 0 and has_words(step) and not more.startswith("```output"):
            steps.append(step)
            start = end.end()
    if steps and not has_words(text[start:]):
        return [*steps[:-1], steps[-1] + text[start:]]
    return [*steps, text[start:]]


def step_check(question: str, text: str) -> list[dict]:
    """The conversation that asks a verifier whether the last step of a partial solution is right."""
    return [user(prompts.STEP_CHECK(question=question, solution=text.strip()))]


def token_counts(reply: Reply, rule: str, tokenizer) -> list[int]:
    """The tokens of each step of a reply. One that lies in two steps belongs to the first, and one that the
    text does not show, such as a stop token, to the last."""
    ends = [bisect_left(range(len(reply.ids)), end, key=lambda n: len(tokenizer.decode(reply.ids[:n])))
            for end in accumulate(map(len, cut(reply.text, rule)[:-1]))]
    return [end - start for start, end in pairwise([0, *ends, len(reply.ids)])]


# ---- a partial solution ----------------------------------------------------------------------------------

@dataclass(eq=False)
class Node:
    """A partial solution. `text` is all that was written from its first step on, with the output of its code;
    `reply` wrote the end of it. An answer makes it a solution. closed: nothing more can come out of it."""
    parent: "Node | None" = None
    text: str = ""
    reply: Reply | None = None
    outcome: Outcome | None = None  # of all its code so far
    blocks: int = 0                 # of code that have run
    errors: int = 0                 # steps in a row whose code failed
    depth: int = 0
    score: float = 0.5              # the verifier's P(right) for its last step
    answer: str | None = None
    closed: bool = False
    children: list["Node"] = field(default_factory=list)
    visits: int = 0                 # of a search that comes back to its nodes ...
    total: float = 0.0              # ... and the sum of what they were worth

    def child(self) -> "Node":
        return Node(self, self.text, self.reply, self.outcome, self.blocks, depth=self.depth + 1)

    def up(self) -> Iterator["Node"]:
        """This node and those above it, up to the root."""
        node = self
        while node:
            yield node
            node = node.parent

    def path(self) -> list["Node"]:
        """From the first step to this one."""
        return list(self.up())[-2::-1]

    def scores(self) -> list[float]:
        return [node.score for node in self.path()]

    def below(self) -> list["Node"]:
        """This node and all that grew from it."""
        return [self, *(node for child in self.children for node in child.below())]

    def visit(self, value: float) -> None:
        self.visits += 1
        self.total += value

    def adopt(self, children: list["Node"]) -> None:
        """Take these as the node's children. A node whose children are all closed is closed itself."""
        self.children = children
        for node in self.up():
            node.closed = all(child.closed for child in node.children)

    @property
    def finish(self) -> str:
        return self.reply.finish

    @property
    def in_code(self) -> bool:
        """Whether a fence is open."""
        return self.text.count("```") % 2 == 1

    def messages(self, question: str, prompt=prompts.SOLVER) -> list[dict]:
        """The conversation in which this solution is written: its turn goes on with the ids of `reply`."""
        turn = [{"role": "assistant", "content": self.text, "reply": self.reply}] if self.reply else []
        return [user(prompt(question=question)), *turn]

    def show(self, outcome: Outcome) -> None:
        """Write down what the code printed since its last run."""
        before = self.outcome.stdout if self.outcome else ""
        new = Outcome(outcome.stdout.removeprefix(before), outcome.error, timed_out=outcome.timed_out)
        block = prompts.OUTPUT(output=shown(new))
        self.text += block.lstrip("\n") if self.text.endswith("\n") else block
        self.outcome, self.blocks = outcome, len(blocks_of(self))
        failed = new.error or new.timed_out
        self.errors = 1 + (self.parent.errors if self.parent else 0) if failed else 0

    def conclude(self) -> None:
        """Decide whether this is a solution, or given up: cut off, too long, without an answer at its end, or
        with code that failed in two steps running."""
        if self.finish in ("stop", "box") or answered(self.text):
            self.answer = stated(self.text) or printed(self.outcome)
        cut = self.reply.error or self.finish in ("length", "stop", "box") or self.in_code
        self.closed = bool(self.answer or cut or self.errors > 1 or self.depth == DEPTH)


def write(nodes: list[Node], question: str, how: dict = STEP, prompt=prompts.SOLVER):
    """Write each of the nodes on to the end of its step, all at the same time. Code runs when its fence
    closes, and its output follows it."""
    writing = nodes
    for _ in range(PIECES):
        replies = yield [Ask("solver", node.messages(question, prompt), how | CODE if node.in_code else how)
                         for node in writing]
        starts = [len(node.text) for node in writing]
        for node, reply in zip(writing, replies):
            node.text, node.reply = node.text + reply.text, reply
        running = [node for node in writing if node.finish != "length" and not node.reply.error
                   and not (node.in_code and node.finish == "stop_string")
                   and len(blocks_of(node)) > node.blocks]
        if running:
            outcomes = yield [Run(blocks_of(node)) for node in running]
            for node, outcome in zip(running, outcomes):
                node.show(outcome)
        writing = [node for node, start in zip(writing, starts) if node.finish == "stop_string"
                   and (node.in_code or not has_words(node.text[start:]))]
        if not writing:
            return


def grow(question: str, nodes: list[Node]):
    """One more step after each of the nodes -> the new nodes, in this order. The same node several times
    gives several candidates for its next step."""
    children = [node.child() for node in nodes]
    yield from write(children, question)
    for child in children:
        child.conclude()
    return children


def judge(question: str, nodes: list[Node]):
    """Give each node the verifier's P(right) for its last step; 0 if it was given up."""
    asked = [node for node in nodes if node.answer or not node.closed]
    replies = yield [Ask("verifier", step_check(question, node.text), continuations=WORDS) for node in asked]
    for node in nodes:
        node.score = 0.0
    for node, reply in zip(asked, replies):
        right, wrong = (reply.scores.get(word, 0.0) for word in WORDS)  # a failed Ask says neither: 0.5
        node.score = 1 / (1 + math.exp(min(wrong - right, 700)))  # above that it overflows
