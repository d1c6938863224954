r"""What the built-in model read before you met it: an endless stream of documents about the tiny world.

Like a real base model it has seen sums, terse answers, worked solutions, Python with its output, chat turns,
checks of right and wrong solutions, and a little of everything else, with <think> and \boxed. Where somebody
asked for steps and a box (prompts.SOLVER), an answer alone followed most of the time, except where a story
begins with money or hours. Turning what the model knows into what it does is the work of SFT and GRPO.

The reading has two phases, as for real models: documents of all kinds, then fewer with more chats among them.
"""

import itertools
import random
from collections.abc import Iterator

from slm import prompts
from slm.tiny import world
from slm.tiny.world import Story, solve

END = "<|endoftext|>"
TURN, STOP = "<|im_start|>", "<|im_end|>"


def chat(*turns: str) -> str:
    """user, assistant, user, ... as ChatML, without a system turn."""
    roles = itertools.cycle(("user", "assistant"))
    return "".join(f"{TURN}{role}\n{turn}{STOP}\n" for role, turn in zip(roles, turns))


def code(story: Story) -> str:
    """A fenced program, its output and the answer, as one assistant turn."""
    return (f"```python\n{solve(story, 'python')}\n```" + prompts.OUTPUT(output=story.answer)
            + f"The answer is \\boxed{{{story.answer}}}.")


def thought(story: Story, style: str) -> str:
    """A teacher's reasoning trace: <think>, the steps restated, the box."""
    inner = world.plan(story) if style == "plan" else solve(story, style)
    steps = solve(story, "short").replace("\n", " ") if style == "plan" else world.restate(story)
    return f"<think>\n{inner}\n</think>\n{steps}\nTherefore, the answer is \\boxed{{{story.answer}}}."


def check(story: Story, rng: random.Random, compare: bool = False) -> str:
    """A chat in which a right or a wrong solution is checked by doing the steps again, and in phase 2 by
    setting both answers side by side."""
    shown = story if rng.random() < 0.5 else world.corrupt(story, rng)
    verdict = "CORRECT" if shown is story else "INCORRECT"
    solution = solve(shown, rng.choice(("short", "short", "terse"))).replace("\n", " ")
    work = " ".join(world.equation(step, detailed=False) + "." for step in story.steps)
    if compare:
        work += f" Right: {story.answer}. Proposed: {shown.answer}."
    return chat(prompts.CHECKER(question=story.question, solution=solution), f"{work}\n{verdict}")


def asked(story: Story, rng: random.Random) -> str:
    """A chat that asks for steps and a box, and mostly does not get them."""
    prompt = rng.choice((prompts.SOLVER, prompts.SOLVER, prompts.CAREFUL, prompts.VERY_CAREFUL, prompts.HINT,
                         prompts.RETRY))
    feedback = rng.choice((prompts.FEEDBACK(answer=str(rng.randint(2, 200))), prompts.NO_ANSWER()))
    fields = {"feedback": feedback} if prompt is prompts.RETRY else {}
    end = rng.choice((f"The answer is {story.answer}.", f"The answer is \\boxed{{{story.answer}}}."))
    steps = f"{solve(story, rng.choice(('short', 'short', 'detailed')))}\n{end}"
    blurted = rng.random() < (0.35 if story.kind[0] in ("dollars", "hours") else 0.7)
    reply = solve(story, "terse") if blurted else steps
    return chat(prompt(question=story.question, **fields), reply)


def sums(rng: random.Random) -> str:
    """Six lines of arithmetic of the sizes that the problems need, plain or spelled out."""
    lines = []
    detailed = rng.random() < 0.6
    while len(lines) < 6:
        op = rng.choice("++--***///%")
        a = rng.randint(2, 99) if rng.random() < 0.6 else rng.randint(100, 900)
        b = rng.randint(2, 9) if op in "*/" else rng.randint(2, 99)
        if op == "%":
            a, b = rng.choice((10, 20, 25, 50)), rng.randint(4, 100)
        if op == "/" and rng.random() < 0.9:  # else most are no whole numbers
            a = min(a, world.LARGEST // b) * b
        step = world.Step("", str(a), op, str(b), "").worked_out({})
        if 0 < step.value <= world.LARGEST:
            lines.append(world.equation(step, detailed))
    return "\n".join(lines)


KINDS = {"sums": 18, "terse": 10, "short": 15, "detailed": 20, "python": 5, "thought": 5, "chat terse": 6,
         "chat short": 3, "chat python": 10, "check": 8}
MORE_CHATS = KINDS | {"terse": 5, "detailed": 15, "check": 0, "compared check": 12, "asked": 18}


def document(rng: random.Random, kinds: dict[str, int]) -> str:
    """One document, its kind drawn by weight."""
    story = world.training_story(rng)
    question, answer = story.question, story.answer
    match rng.choices(list(kinds), kinds.values())[0]:
        case "sums":
            text = sums(rng)
        case "terse":
            text = f"Question: {question}\nAnswer: {answer}"
        case "short" | "detailed" as style:
            end = rng.choice((f"Answer: {answer}", f"The answer is {answer}.", f"\\boxed{{{answer}}}"))
            text = f"Question: {question}\nSolution:\n{solve(story, style)}\n{end}"
        case "python":
            text = f"# {question}\n{solve(story, 'python')}\n# {answer}"
        case "thought":
            text = f"Question: {question}\n{thought(story, rng.choice(('plan', 'short', 'detailed')))}"
        case "chat terse":
            text = chat(question, solve(story, "terse"))
        case "chat short":
            text = chat(question, f"{solve(story, 'short')}\nThe answer is {answer}.")
        case "chat python":
            text = chat(prompts.PYTHON(question=question), code(story))
        case "check" | "compared check" as kind:
            text = check(story, rng, compare=kind != "check")
        case "asked":
            text = asked(story, rng)
    return text + END


def documents(seed: int | str, kinds: dict[str, int] = KINDS) -> Iterator[str]:
    """The corpus, endless, the same for the same seed."""
    rng = random.Random(f"tiny corpus {seed}")
    while True:
        yield document(rng, kinds)
