"""Prompts: an id each, fields filled in as they are, and the report's standard prompt."""

from slm import prompts
from slm.prompts import Prompt

ALL = {name: value for name, value in vars(prompts).items() if isinstance(value, Prompt)}


def test_every_prompt_has_its_own_id_and_text():
    assert len({p.id for p in ALL.values()}) == len(ALL) == len({p.text for p in ALL.values()})


def test_the_solver_prompt_is_the_question_a_newline_and_one_sentence():
    text = prompts.SOLVER(question="Why 6?")
    first, second = text.split("\n")
    assert first == "Why 6?" and "step by step" in second and second.endswith("\\boxed{}.")
    assert second.count(".") == 1


def test_a_question_with_dollars_backslashes_and_braces_arrives_unchanged():
    question = r"What is $5 off $\frac{1}{2}$ of {x}? $$ $question ${answer}"
    assert prompts.SOLVER(question=question).startswith(question + "\n")
    assert question in prompts.CHECKER(question=question, solution="$solution")


def test_a_code_prompt_asks_for_a_fence_that_the_reader_of_code_finds():
    assert "```python" in prompts.PYTHON(question="q")
    assert "```python" in prompts.VERIFIER(question="q", answer="1")


def test_no_prompt_leaves_a_field_open():
    names = "question answer other solution feedback history output critique".split()
    for name in """SOLVER CAREFUL VERY_CAREFUL PYTHON HINT OUTPUT EXPLAIN CHECKER CRITIC STEP_CHECK VERIFIER
                   FEEDBACK NO_ANSWER UNCLEAR DISAGREE RETRY RETRY_PYTHON AGAIN TRANSCRIPT SUMMARY
                   ADVICE""".split():
        assert "$" not in ALL[name](**dict.fromkeys(names, "x"))


def test_a_prompt_of_yours_has_an_id_of_its_own_and_keeps_dollars_and_braces():
    try:
        prompts.use("Costs $5 {x}? {question}s, {question}")
        assert prompts.SOLVER(question="$a {question}") == "Costs $5 {x}? $a {question}s, $a {question}"
        one, more = prompts.SOLVER.id, prompts.option()
        prompts.use("{question}")
        assert prompts.SOLVER.id not in (one, "solver/1") and more == " --prompt FILE"
    finally:
        prompts.use("solver/1")
    assert prompts.SOLVER.text.startswith("$question\nPlease") and not prompts.option()
