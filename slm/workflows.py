r"""The workflows: each a short generator that gets the question and nothing else.

slm/episode.py has the protocol. The names are those of the SLM-Math report's agents. A docstring says what
the agent did, and after "Departs" what is different here. All start from a greedy first answer; those that
begin with the standard prompt share the very same call. The searches are in slm/search; they sample from
the start.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from slm import BadInput, prompts
from slm.episode import Ask, AskFailed, Draft, Reply, Run, user
from slm.grading import blocks_of, equal, extract, printed, verdict
from slm.runs import files
from slm.sandbox import Outcome
from slm.search import SEARCHES, shown, stated, tally

OTHER = {"temperature": 0.7, "top_p": 0.9}                # a later attempt must be able to differ
VOTE = {"temperature": 0.7, "top_p": 0.95, "top_k": 50}   # the report's decoding of runs 2 to 5
CODING = {"stop": ("```output",), "stop_at_box": False}   # the sandbox writes the output, not the model
ROLES = ("solver", "checker", "verifier", "summarizer")


# ---- what the workflows share ----------------------------------------------------------------------------

def same(a: str | None, b: str | None) -> bool:
    """Whether two answers are both there and equivalent."""
    return a is not None and b is not None and equal(a, b)


def first_of(answers: Iterable[str | None]) -> str | None:
    """The first that is an answer, or None."""
    return next(filter(None, answers), None)


def settle(answers: list[str | None]) -> str | None:
    """The end of a workflow whose checker never agreed: the first answer, unless it came up only once and
    another one three times; the latest answer if the first attempt gave none."""
    first, counts = answers[0], tally(answers)
    often = next((a for a, n in counts if n >= 3), None)
    if first is not None and (often is None or any(same(a, first) and n >= 2 for a, n in counts)):
        return first
    return often or first_of(reversed(answers))


def complaint(answer: str | None) -> str:
    return prompts.FEEDBACK(answer=answer) if answer else prompts.NO_ANSWER()


def disagreement(answer: str | None, other: str | None) -> str:
    return prompts.DISAGREE(answer=answer or "nothing", other=other or "nothing")


def ask(role: str, content: str, **sampling):
    """One Ask in a fresh conversation."""
    return (yield Ask(role, [user(content)], sampling))


def attempt(answers: list[str | None], messages: list[dict]):
    """The solver's next try: greedy the first time, then sampled, so that it can differ. Appends its answer
    and returns its reply."""
    reply = yield Ask("solver", messages, OTHER if answers else {})
    answers.append(extract(reply.text))
    yield Draft(answers[-1])
    return reply


def check(question: str, solution: str, prompt=prompts.CHECKER):
    """The checker's (verdict, words before it) on a solution, of which it sees no thinking."""
    solution = solution.split("</think>")[-1].strip()
    reply = yield from ask("checker", prompt(question=question, solution=solution), max_tokens=256)
    return verdict(reply.text), re.split(r"VERDICT", reply.text, flags=re.I)[0].strip()[:300]


def code_answer(role: str, content: str, **sampling):
    """Ask for code, run it, and answer with what it printed, else with what the text states."""
    reply = yield from ask(role, content, **CODING, **sampling)
    return printed((yield from execute(reply))) or stated(reply.text)


def execute(reply: Reply):
    """Run the code blocks of a reply with shared variables. Returns the outcome, or None without code."""
    blocks = blocks_of(reply)
    return (yield Run(blocks)) if blocks else None


# ---- the workflows ---------------------------------------------------------------------------------------

def solver(question: str):
    """A single pass with the standard prompt: what every other workflow is compared with."""
    return (yield from ask("solver", prompts.SOLVER(question=question)))


def majority_vote(question: str, runs: int = 5):
    """Solve once greedily and `runs` - 1 times sampled. An answer given by more than half of the runs that
    gave one wins; without such a majority the first run's answer stands, or the most frequent if it has none.

    Departs: answers are counted by mathematical equivalence, not as strings; no repetition penalty."""
    prompt = [user(prompts.SOLVER(question=question))]
    replies = yield [Ask("solver", prompt)] + [Ask("solver", prompt, VOTE) for _ in range(runs - 1)]
    answers = [extract(reply.text) for reply in replies]
    yield Draft(answers[0])
    counts = tally(answers)
    if counts and counts[0][1] > sum(n for _, n in counts) / 2:
        return counts[0][0]
    return answers[0] or first_of(answer for answer, _ in counts)


def python_tools(question: str):
    """Ask for Python code, run its blocks with shared variables, and answer with the last number printed. If
    the code fails or prints none, answer with the box of the text.

    Departs: the model is stopped before it invents the output; one namespace, so functions work."""
    return (yield from code_answer("solver", prompts.PYTHON(question=question)))


def solver_checker_with_tools(question: str, rounds: int = 5):
    """Solve with code. A checker solves the problem again with code, on its own. Equal answers are accepted;
    else the solver gets both and tries again. Without agreement the first answer stands.

    Departs: the checker is sampled, since a greedy one says the same in each round, and a checker without an
    answer does not count as agreement."""
    answers, prompt = [], prompts.PYTHON(question=question)
    for _ in range(rounds):
        answers.append((yield from code_answer("solver", prompt, **(OTHER if answers else {}))))
        yield Draft(answers[-1])
        other = yield from code_answer("checker", prompts.PYTHON(question=question), **OTHER)
        if same(answers[-1], other):
            return answers[-1]
        prompt = prompts.RETRY_PYTHON(question=question, feedback=disagreement(answers[-1], other))
    return first_of(answers)


def solver_checker_stateless(question: str, rounds: int = 5):
    """Solve; a checker says CORRECT or INCORRECT; if incorrect, solve again in a fresh conversation that
    names the rejected answer. Ends at the first accepted answer, or as `settle` says.

    Departs: the checker sees the whole question and solution rather than 150 characters and the answer; an
    unclear verdict rejects; retries are sampled (greedy ones repeat themselves from the third round on)."""
    answers, content = [], prompts.SOLVER(question=question)
    for _ in range(rounds):
        reply = yield from attempt(answers, [user(content)])
        if answers[-1] and (yield from check(question, reply.text))[0]:
            return answers[-1]
        content = prompts.RETRY(question=question, feedback=complaint(answers[-1]))
    return settle(answers)


def solver_checker_chat(question: str, rounds: int = 5):
    """As stateless, but the attempts are one conversation, and the feedback is its next user turn. Without
    an accepted answer, the last one given stands.

    Departs: no oracle (a later version compared with the ground truth); the question is not repeated, as
    the conversation holds it."""
    answers, messages = [], [user(prompts.SOLVER(question=question))]
    for _ in range(rounds):
        reply = yield from attempt(answers, messages)
        if answers[-1] and (yield from check(question, reply.text))[0]:
            return answers[-1]
        messages = messages + [reply.message(), user(prompts.AGAIN(feedback=complaint(answers[-1])))]
    return first_of(reversed(answers))


def trivial_chat(question: str, rounds: int = 5):
    """Solver and checker write one transcript, tagged [SOLVER] and [CHECKER], which is the next prompt. The
    checker criticises and gives a verdict. Of a long transcript the first and the last six entries stay.

    Departs: every solver prompt holds the question (only the first one did); the checker is greedy."""
    answers, history, content = [], [], prompts.SOLVER(question=question)
    for _ in range(rounds):
        reply = yield from attempt(answers, [user(content)])
        accepted, critique = yield from check(question, reply.text, prompts.CRITIC)
        if accepted and answers[-1]:
            return answers[-1]
        history += [f"[SOLVER]: {reply.text.strip()}", f"[CHECKER]: {critique}"]
        kept = history if len(history) <= 10 else history[:1] + history[-6:]
        content = prompts.TRANSCRIPT(question=question, history="\n".join(kept))
    return settle(answers)


def solver_checker_summarizer(question: str, rounds: int = 5):
    """As stateless, with a summarizer between the two. The checker sees the beginning of the solution and its
    answer, or the summarizer's short form if it has no answer. The solver sees a digest of the critique.

    Departs: the checker does see the summary, not only the answer; no test of relevance by shared words."""
    answers, content = [], prompts.SOLVER(question=question)
    for _ in range(rounds):
        reply = yield from attempt(answers, [user(content)])
        short = f"{reply.text.strip()[:300]}\nFinal answer: {answers[-1]}"
        if answers[-1] is None:
            prompt = prompts.SUMMARY(question=question, solution=reply.text)
            short = (yield from ask("summarizer", prompt, max_tokens=150)).text
        accepted, critique = yield from check(question, short, prompts.CRITIC)
        if accepted and answers[-1]:
            return answers[-1]
        digest = yield from ask("summarizer", prompts.ADVICE(critique=critique), max_tokens=100)
        advice = digest.text.split()
        useful = len(advice) > 2 and len(set(advice)) > 0.3 * len(advice)  # else it is babble
        feedback = complaint(answers[-1]) + (" " + " ".join(advice) if useful else "")
        content = prompts.RETRY(question=question, feedback=feedback)
    return settle(answers)


def summarizer_chat(question: str, rounds: int = 5):
    """One conversation of the solver. In each round a checker solves the problem in a conversation of its
    own. The next user turn names both answers. Ends when they agree; else the solver's last answer stands.

    Departs: the checker is sampled (a greedy one repeats the solver's own first pass), and a checker without
    an answer does not count as agreement."""
    answers, messages = [], [user(prompts.SOLVER(question=question))]
    for _ in range(rounds):
        reply = yield from attempt(answers, messages)
        other = extract((yield from ask("checker", prompts.SOLVER(question=question), **OTHER)).text)
        if same(answers[-1], other):
            return answers[-1]
        feedback = disagreement(answers[-1], other)
        messages = messages + [reply.message(), user(prompts.AGAIN(feedback=feedback))]
    return first_of(reversed(answers))


def plan_and_reflection(question: str):
    """Solve; solve again, asked to be careful; if the two differ a third time, very carefully. An answer
    given twice wins, else the first. (The report's agent of this name plans nothing.)"""
    answers = []
    for prompt in (prompts.SOLVER, prompts.CAREFUL, prompts.VERY_CAREFUL):
        yield from attempt(answers, [user(prompt(question=question))])
        counts = tally(answers)
        if counts and counts[0][1] >= 2:
            return counts[0][0]
    return first_of(answers)


def base(question: str, rounds: int = 5):
    """The oldest form: a checker's verdict may be unclear, and then clearer reasoning is asked for. Without
    an accepted answer, the most frequent one stands.

    Departs: a checker that says neither word is unclear (it used to mean CORRECT), and answers are compared
    by equivalence ("8" was found within "18")."""
    answers, content = [], prompts.SOLVER(question=question)
    for _ in range(rounds):
        reply = yield from attempt(answers, [user(content)])
        accepted, critique = yield from check(question, reply.text, prompts.CRITIC)
        if accepted and answers[-1]:
            return answers[-1]
        unclear = accepted is None and answers[-1]
        feedback = prompts.UNCLEAR(answer=answers[-1]) if unclear else f"{complaint(answers[-1])} {critique}"
        content = prompts.RETRY(question=question, feedback=feedback)
    return first_of(answer for answer, _ in tally(answers))


def verify(question: str, answer: str):
    """Whether code written by the verifier confirms an answer: by the word it prints, else by the number."""
    reply = yield from ask("verifier", prompts.VERIFIER(question=question, answer=answer), **CODING)
    return confirmed((yield from execute(reply)), answer)


def confirmed(outcome: Outcome | None, answer: str) -> bool | None:
    """A verifier's verdict on an answer, read from what its code printed; None if that says nothing."""
    words = re.findall(r"VERIFIED|FAILED", outcome.stdout) if outcome else []
    output = printed(outcome)
    return words[-1] == "VERIFIED" if words else same(output, answer) if output else None


def solver_verifier(question: str, rounds: int = 3):
    """Solve, with code allowed. If the code's output confirms the box, that answer is accepted. Otherwise a
    verifier writes code to test the output, then the box, and the first it confirms is accepted. Else the
    solver hears what failed and tries again. An answer given twice in a row ends the rounds; without an
    accepted answer the last one stands.

    Departs: a verifier whose code prints a number and no verdict is judged by that number."""
    answers, content = [], prompts.HINT(question=question)
    for _ in range(rounds):
        reply = yield from ask("solver", content, **CODING, **(OTHER if answers else {}))
        outcome, box = (yield from execute(reply)), stated(reply.text)
        output = printed(outcome)
        answers.append(output or box)
        yield Draft(answers[-1])
        if same(output, box) or (len(answers) > 1 and same(*answers[-2:])):
            return answers[-1]
        failed = outcome is not None and (outcome.error or outcome.timed_out)  # then its box can't be trusted
        for candidate in () if failed else filter(None, (output, box)):
            if (yield from verify(question, candidate)):
                return candidate
        feedback = f"The code failed: {shown(outcome)[-200:]}" if failed else complaint(answers[-1])
        content = prompts.RETRY(question=question, feedback=feedback)
    return first_of(reversed(answers))


def code_feedback(question: str):
    """Solve, with code allowed; run each block by itself, show the model what was printed, and take the
    answer it then gives, else the last number printed. Without code the first answer stands.

    Departs: if the model stopped to wait for the output, its turn goes on after it. Else the output is the
    next turn, as it was."""
    messages = [user(prompts.HINT(question=question))]
    reply = yield Ask("solver", messages, CODING)
    yield Draft(stated(reply.text))
    outcomes = yield [Run(block, timeout=10) for block in blocks_of(reply)]
    if not outcomes:
        return reply
    output = "\n".join(shown(outcome) for outcome in outcomes)
    if reply.finish == "stop_string":
        messages += [reply.message(prompts.OUTPUT(output=output).lstrip())]
    else:
        messages += [reply.message(), user(prompts.EXPLAIN(output=output))]
    last = yield Ask("solver", messages)
    return stated(last.text) or first_of(map(printed, reversed(outcomes)))


WORKFLOWS = {fn.__name__: fn for fn in (
    solver, majority_vote, python_tools, solver_checker_stateless, solver_checker_with_tools,
    solver_checker_chat, solver_checker_summarizer, summarizer_chat, trivial_chat, plan_and_reflection, base,
    solver_verifier, code_feedback, *SEARCHES)}


def workflow(name: str):
    """A workflow by its name, or FILE.py:NAME for one of yours; dvts@8 is dvts with a budget of 8: its second
    argument. BadInput for an unknown name or a file that can't be used."""
    plain, at, budget = name.partition("@")
    found = (files.your_generator(plain, "(question) that yields what it asks", AskFailed) if ".py:" in plain
             else WORKFLOWS.get(plain))
    if not found:
        raise BadInput(f"--workflow {name!r}: no such workflow; expected FILE.py:NAME or one of "
                       f"{', '.join(WORKFLOWS)}")
    if at and not has_budget(found):
        raise BadInput(f"--workflow {name!r}: {plain} has no budget, which is a second argument")
    if at and not (budget.isdecimal() and int(budget)):
        raise BadInput(f"--workflow {name!r}: the budget is {budget!r}; expected 1 or more")

    def limited(question: str):
        return found(question, int(budget))

    limited.__name__ = f"{found.__name__}@{budget}"
    return limited if at else found


def has_budget(found: Callable) -> bool:
    """Whether a workflow has a second argument: how many solutions, rounds, beams or rollouts it may have."""
    return len(inspect.signature(found).parameters) > 1


def refuse_roles(option: str, roles: Iterable[str], workflows: str) -> None:
    """BadInput for a role that no workflow has: it isn't ours, and stands nowhere in quotes in the files of
    yours that --workflow names. (A dot can't be in the name of an adapter's tensor.)"""
    own = [Path(file).read_text(encoding="utf-8") for file in re.findall(r"\s*([^,]+\.py):\w", workflows)]
    for role in roles:
        quoted = re.compile(rf"(['\"]){re.escape(role)}\1")
        if role not in ROLES and ("." in role or not any(map(quoted.search, own))):
            raise BadInput(f"{option}: no workflow has a role {role!r}; expected {', '.join(ROLES)}, or one "
                           "without a dot that stands in quotes in your --workflow file")
