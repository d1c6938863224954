"""The runner: order does not matter, failures are data, tokens stay as sampled, gold is out of reach."""

import gc
import inspect
import json
import sys
import types

import pytest
from scripted import Backend, Sandbox, problem

from slm.episode import (
    Ask,
    AskFailed,
    Episode,
    Reply,
    Run,
    Sampling,
    Turn,
    jobs_for,
    run_episodes,
    user,
)
from slm.workflows import WORKFLOWS, solver, solver_checker_chat, solver_checker_stateless

PROBLEMS = [problem(f"p{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(9)]
WARM = Sampling(max_tokens=100, temperature=1.0)


def by_seed(text, seed, sampling):
    return f"\\boxed{{{seed if sampling.temperature else 7}}}"


def stepwise(question):
    """Three asks whose answers depend on the seeds, a list in the middle, code at the end."""
    first = yield Ask("solver", [user(question)])
    pair = yield [Ask("solver", [user(first.text)]), Run("print(1)"), Ask("checker", [user(first.text)])]
    outcome = yield Run("print(6 * 7)")
    return f"{pair[0].text}{pair[2].text}{outcome.stdout}"


@pytest.mark.parametrize("workflow", [solver, stepwise, solver_checker_stateless])
def test_results_do_not_depend_on_the_order_of_replies(workflow):
    runs = [run_episodes(jobs_for(PROBLEMS, workflow, samples=3), Backend(by_seed, order, batch), Sandbox(),
                         sampling=WARM, seed=5)
            for order, batch in (("fifo", 100), ("lifo", 1), ("shuffled", 4))]
    assert runs[0] == runs[1] == runs[2]
    job = jobs_for(PROBLEMS, workflow, samples=3)[7]
    alone = run_episodes([job], Backend(by_seed), Sandbox(), sampling=WARM, seed=5)
    assert alone[0] == runs[0][7]


def test_another_seed_problem_or_sample_draws_something_else():
    def answers(seed):
        jobs = jobs_for(PROBLEMS, solver, samples=4)
        return [e.answer for e in run_episodes(jobs, Backend(by_seed), sampling=WARM, seed=seed)]
    assert len(set(answers(1) + answers(2))) == 2 * 4 * len(PROBLEMS)


def test_episodes_come_back_in_the_order_of_the_jobs_with_groups_of_k():
    episodes = run_episodes(jobs_for(PROBLEMS, solver, samples=4), Backend(by_seed, "lifo"), sampling=WARM)
    assert [(e.problem_id, e.group, e.sample) for e in episodes] == [
        (f"p{i}", i, k) for i in range(9) for k in range(4)]


def test_equal_greedy_asks_are_made_once_and_shared_between_calls():
    backend, memo = Backend(by_seed), {}
    jobs = jobs_for([problem("a", "q"), problem("b", "q"), problem("c", "r")], solver)
    assert [e.answer for e in run_episodes(jobs, backend, memo=memo)] == ["7"] * 3
    assert len(backend.requests) == 2
    run_episodes(jobs, backend, memo=memo)
    assert len(backend.requests) == 2


def goes_on(question):
    """Two sampled replies, each of which goes on in the same turn."""
    first = yield [Ask("solver", [user(question)])] * 2
    more = yield [Ask("solver", [user(question), reply.message(" and")]) for reply in first]
    return "".join(reply.text for reply in more)


def test_sampled_asks_are_shared_by_workflows_that_would_draw_the_same():
    def and_back(question):
        text = yield from goes_on(question)
        yield Ask("checker", [user(text)])
        return text

    backend, memo = Backend(by_seed), {}
    how = {"sampling": WARM, "seed": 5}
    first, = run_episodes(jobs_for(PROBLEMS[:1], goes_on), backend, memo=memo, **how)
    assert len(backend.requests) == 4
    second, = run_episodes(jobs_for(PROBLEMS[:1], and_back), backend, memo=memo, **how)
    assert len(backend.requests) == 5  # only the checker's
    alone, = run_episodes(jobs_for(PROBLEMS[:1], and_back), Backend(by_seed), **how)
    assert second == alone and second.answer == first.answer and len(second.turns) == 5
    run_episodes(jobs_for(PROBLEMS[:1], goes_on), backend, memo=memo, sampling=WARM, seed=6)
    assert len(backend.requests) == 9
    run_episodes(jobs_for(PROBLEMS[:1], goes_on, samples=2), backend, memo=memo, **how)
    assert len(backend.requests) == 13  # another sample draws something else


def test_replies_of_other_tokens_are_gone_on_with_apart():
    spelled = [Reply("ab", ids=[97, 98]), Reply("ab", ids=[300])]

    def both(question):
        replies = yield [Ask("solver", [user(question), reply.message()]) for reply in spelled]
        return replies[0].text

    backend = Backend(by_seed)
    run_episodes(jobs_for(PROBLEMS[:1], both), backend)
    assert len(backend.requests) == 2


def test_fixed_sampling_overrides_what_a_workflow_asks_for():
    def cold(question):
        own = {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "max_tokens": 20}
        yield Ask("solver", [user(question)], own)
    backend = Backend(by_seed)
    run_episodes(jobs_for(PROBLEMS[:1], cold), backend, sampling=WARM, fixed=True)
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 1.0, 0, 20)


def test_an_ask_cannot_exceed_the_token_limit_of_the_run():
    def greedy_for_tokens(question):
        yield Ask("solver", [user(question)], {"max_tokens": 5000})
    backend = Backend(by_seed)
    run_episodes(jobs_for(PROBLEMS[:1], greedy_for_tokens), backend, sampling=WARM)
    assert backend.requests[0].sampling.max_tokens == 100


def test_roles_map_to_adapters():
    backend = Backend(lambda text, *_: "CORRECT" if "Proposed" in text else "\\boxed{1}")
    jobs = jobs_for(PROBLEMS[:1], solver_checker_stateless)
    run_episodes(jobs, backend, adapters={"checker": "judge", "*": "policy"})
    assert [r.adapter for r in backend.requests] == ["policy", "judge"]


# ---- failures are data -----------------------------------------------------------------------------------

def test_no_answer_is_recorded_with_its_cause():
    cut = Reply("and then", finish="length")
    texts = {"a": "I don't know.", "b": cut, "c": Reply("", finish="error", error="HTTP 503, 5 times")}
    problems = [problem(k, f"{k}?") for k in texts]
    episodes = run_episodes(jobs_for(problems, solver), Backend(lambda text, *_: texts[text[0]]))
    assert [e.error for e in episodes] == [
        "no answer", "no answer before the token limit", "HTTP 503, 5 times"]
    assert [e.answer for e in episodes] == [None] * 3
    assert episodes[2].failures == [episodes[2].turns[0].reply.error] == ["HTTP 503, 5 times"]
    assert "HTTP 503" in episodes[2].broken


def test_a_prompt_too_long_ends_its_own_episode_only():
    problems = [problem("short", "1?"), problem("long", "2?" * 500)]
    short, long = run_episodes(jobs_for(problems, solver), Backend(by_seed, context=300))
    assert short.answer == "7" and "longer than the context" in long.error


def test_a_failure_in_a_later_round_leaves_the_first_answer_standing_and_is_recorded():
    def reply(text, *_):
        return "INCORRECT" if "Proposed" in text else "so it is \\boxed{12}. " + 150 * "."
    jobs = jobs_for([problem("p", "6 + 6?")], solver_checker_chat)
    episode, = run_episodes(jobs, Backend(reply, context=420))
    assert episode.answer == "12" and episode.error is None
    assert episode.failures == ["a prompt longer than the context"]


def test_a_workflow_may_catch_a_failed_ask():
    def careful(question):
        try:
            yield Ask("solver", [user(question)])
        except AskFailed as failure:
            return f"caught {failure}"
    episode, = run_episodes(jobs_for(PROBLEMS[:1], careful), Backend(by_seed, context=3))
    assert episode.answer == "caught a prompt longer than the context"


def test_a_failed_ask_in_a_list_is_an_empty_reply():
    def listed(question):
        replies = yield [Ask("solver", [user("x")]), Ask("solver", [user("x" * 99)])]
        return f"{replies[0].text}|{replies[1].text}|{replies[1].error}"
    episode, = run_episodes(jobs_for(PROBLEMS[:1], listed), Backend(by_seed, context=50))
    assert episode.answer == "\\boxed{7}||a prompt longer than the context"


def test_a_sandbox_timeout_is_named():
    def stuck(question):
        outcome = yield Run("while True: pass")
        return outcome.stdout or None
    episode, = run_episodes(jobs_for(PROBLEMS[:1], stuck), Backend(by_seed), Sandbox())
    assert episode.error == "sandbox timeout" and episode.runs[0].outcome.timed_out


def test_a_bug_in_a_workflow_is_a_traceback():
    def buggy(question):
        yield Ask("solver", [user(question)])
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        run_episodes(jobs_for(PROBLEMS[:1], buggy), Backend(by_seed))


# ---- tokens in, tokens out -------------------------------------------------------------------------------

def turn(prompt, ids, role="solver"):
    return Turn(role, [], Reply("", ids, [-0.1 * i for i in ids], prompt_ids=prompt))


def test_an_appending_conversation_is_one_record_with_tool_tokens_masked():
    e = Episode("p", turns=[turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 90, 91], [5]), turn([7], [8])])
    one, two = e.records()
    assert one.ids == [1, 2, 3, 4, 90, 91, 5] and one.mask == [0, 0, 1, 1, 0, 0, 1]
    assert one.logprobs == [0, 0, -0.1 * 3, -0.1 * 4, 0, 0, -0.5]
    assert (two.ids, two.mask) == ([7, 8], [0, 1])


def test_a_checker_in_between_does_not_break_the_solvers_record():
    e = Episode("p", turns=[turn([1], [2]), turn([9, 1, 2], [8], "checker"), turn([1, 2, 6], [3])])
    assert [(r.ids, r.mask) for r in e.records(["solver"])] == [([1, 2, 6, 3], [0, 1, 0, 1])]
    assert [(r.ids, r.mask) for r in e.records(["checker"])] == [([9, 1, 2, 8], [0, 0, 0, 1])]
    assert len(e.records()) == 2


def test_a_branch_of_a_conversation_trains_no_token_twice():
    e = Episode("p", turns=[turn([1], [2]), turn([1, 2, 5], [3]), turn([1, 2, 6], [4])])
    assert [(r.ids, r.mask) for r in e.records()] == [
        ([1, 2, 5, 3], [0, 1, 0, 1]), ([1, 2, 6, 4], [0, 0, 0, 1])]


def test_a_chat_workflow_gives_one_record_made_of_the_sampled_ids():
    tries = iter(["it is \\boxed{1}", "no, \\boxed{2}", "\\boxed{4}"])
    def reply(text, *_):
        if "Proposed" not in text:
            return next(tries)
        return "CORRECT" if "{4}" in text else "INCORRECT"
    episode, = run_episodes(jobs_for([problem("p", "2 + 2?", "4")], solver_checker_chat), Backend(reply))
    record, = episode.records(["solver"])
    sampled = "".join(chr(i) for i, m in zip(record.ids, record.mask) if m)
    assert sampled == "it is \\boxed{1}no, \\boxed{2}\\boxed{4}"
    assert record.ids[:len(episode.turns[0].reply.prompt_ids)] == episode.turns[0].reply.prompt_ids
    assert (episode.first_answer, episode.answer) == ("1", "4")


def test_episodes_survive_json_exactly():
    for workflow in WORKFLOWS.values():
        for episode in run_episodes(jobs_for(PROBLEMS[:2], workflow), Backend(by_seed), Sandbox()):
            row = json.loads(json.dumps(episode.to_json()))
            assert Episode.from_json(row) == episode and row["first_answer"] == episode.first_answer


# ---- the gold answer is out of reach ---------------------------------------------------------------------

class Gold(str):
    """A gold answer that can be recognised wherever it hides."""


GOLD = Gold("4242")  # the test's own code refers to it as a global, which `reaches` does not follow


def reaches(start, what) -> bool:
    """Whether `what` can be reached from `start` along references, not through modules and classes."""
    seen, stack = set(), [start]
    while stack:
        thing = stack.pop()
        if thing is what:
            return True
        if id(thing) in seen or isinstance(thing, (types.ModuleType, type)) or thing is sys.modules:
            continue
        seen.add(id(thing))
        if isinstance(thing, types.FunctionType):
            stack += [thing.__defaults__, thing.__closure__, thing.__kwdefaults__]
        elif not isinstance(thing, dict) or "__builtins__" not in thing:
            stack += gc.get_referents(thing)
    return False


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_workflow_can_reach_the_gold_answer(name):
    seen = []

    def spying(question):
        generator = WORKFLOWS[name](question)
        wanted = next(generator)
        while True:
            seen.append(reaches(generator, GOLD))
            frame = sys._getframe(1)  # who resumes us: the runner, whose locals must not hold it either
            while frame is not None and frame.f_globals["__name__"] == "slm.episode":
                seen.append(reaches(dict(frame.f_locals), GOLD))
                frame = frame.f_back
            try:
                wanted = generator.send((yield wanted))
            except StopIteration as stop:
                return stop.value

    p = problem("p", "6 * 7?", GOLD)
    jobs = jobs_for([p], spying)
    assert reaches([p], GOLD) and not reaches(jobs, GOLD)
    code = "```python\nprint({})\n```\n\\boxed{{{}}}"
    run_episodes(jobs, Backend(lambda text, seed, _: code.format(seed, seed + 1)), Sandbox())
    assert seen and not any(seen)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_takes_a_question_and_nothing_that_could_carry_an_answer(name):
    question, *rest = inspect.signature(WORKFLOWS[name]).parameters.values()
    assert question.name == "question"
    assert all(isinstance(p.default, int) for p in rest)
    assert not WORKFLOWS[name].__closure__


# ---- with the true sampler, tokenizer and sandbox ----------------------------------------------------------

def test_ids_of_a_conversation_on_the_built_in_model_are_what_was_sampled(tiny):
    from slm.losses import token_logprobs
    from slm.sampling import Sampler

    def chat(question):
        messages = [user(question)]
        for _ in range(3):
            reply = yield Ask("solver", messages)
            messages = [*messages, reply.message(), user("Go on.")]

    import torch

    from slm.attention import Packed
    model, tokenizer = tiny
    sampler = Sampler(model, tokenizer)
    for episode in run_episodes(jobs_for(PROBLEMS[:2], chat, samples=2), sampler,
                                sampling=Sampling(max_tokens=24, temperature=1.0), fixed=True):
        record, = episode.records()
        assert sum(record.mask) == sum(len(t.reply.ids) for t in episode.turns)
        assert record.ids == episode.turns[-1].reply.prompt_ids + episode.turns[-1].reply.ids
        with torch.no_grad():
            attend = Packed([len(record.ids)])
            hidden = model(torch.tensor(record.ids), attend.positions, attend)
            again, _ = token_logprobs(model, hidden[:-1], torch.tensor(record.ids[1:]))
        trained = torch.tensor(record.mask[1:], dtype=torch.bool)
        assert torch.allclose(again[trained], torch.tensor(record.logprobs[1:])[trained], atol=1e-4)


def test_code_output_continues_the_sampled_turn_in_ids(tiny):
    _, tokenizer = tiny
    messages = [user("6 * 7?")]
    text = "```python\nprint(6 * 7)\n```\n"
    ids = tokenizer.encode(text + "```output")
    reply = Reply(text, ids, [-0.1] * len(ids), "stop_string", tokenizer.chat(messages))
    after = tokenizer.chat([*messages, reply.message("```output\n42\n```\n")])
    assert after[:len(reply.prompt_ids + ids)] == reply.prompt_ids + ids
    assert tokenizer.decode(after).endswith("```output\n42\n```\n")


def test_workflows_on_the_built_in_model_do_not_depend_on_the_batch(tiny):
    from slm.sampling import Sampler
    from slm.sandbox import Sandbox as TrueSandbox
    names, runs = ("majority_vote", "python_tools", "solver_checker_chat"), []
    jobs = [job for name in names for job in jobs_for(PROBLEMS[:2], WORKFLOWS[name])]
    with TrueSandbox(1) as sandbox:
        for rows in (64, 3):
            episodes = run_episodes(jobs, Sampler(*tiny, max_batch=rows), sandbox, sampling=Sampling(16))
            runs.append([(e.answer, e.response, [t.reply.ids for t in e.turns]) for e in episodes])
    assert runs[0] == runs[1]
