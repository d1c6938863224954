"""The graded record, and the loop that asks, grades and writes. (test_eval.py and test_agents.py stop whole
runs and resume them.)"""

from dataclasses import replace

from scripted import Backend, problem

from slm import answers, checkpoint
from slm.answers import answer_record, run_graded
from slm.episode import Ask, Draft, Reply, Sampling, jobs_for, run_episodes, user
from slm.sampling import Sampler
from slm.workflows import solver

PROBLEMS = [problem(f"p{i}", f"{i}", str(2 * i)) for i in range(5)]
FAILED = Reply("", finish="error", error="HTTP 503")


def by_seed(text, seed, sampling):
    return "\\boxed{7}"


def double(text, seed, sampling):
    return f"\\boxed{{{2 * int(text.split()[0])}}}"


def test_the_graded_record_says_what_was_first_and_what_is_final():
    def better(question):
        reply = yield Ask("solver", [user(question)])
        yield Draft("3")
        yield Draft("4")
        return "4" if reply.text else None
    p = problem("p", "2 + 2?", "4")
    episode, = run_episodes(jobs_for([p], better), Backend(by_seed))
    record = answer_record(p, episode)
    assert (record["first_answer"], record["first_correct"]) == ("3", False)
    assert (record["answer"], record["correct"]) == ("4", True)
    assert record["ids"] == episode.turns[0].reply.ids and record["finish"] == "stop" and record["asks"] == 1


def test_a_reply_that_failed_is_the_reason_and_breaks_the_record():
    episode, = run_episodes(jobs_for(PROBLEMS[:1], solver), Backend(lambda *_: FAILED))
    record = answer_record(PROBLEMS[0], episode)
    assert (record["reason"], record["broken"], record["finish"]) == ("HTTP 503", "HTTP 503", "error")
    assert record["correct"] is False and record["answer"] is None


def graded(reply, have=(), samples=2):
    """(records, what was written, what was asked) of all five problems."""
    written, backend = [], Backend(reply, "shuffled")
    rows = run_graded(PROBLEMS, solver, backend, None, have=list(have), write=written.append, samples=samples,
                      sampling=Sampling(temperature=1.0))
    return rows, written, backend.requests


def test_every_answer_is_written_as_it_lands_and_returned_in_order():
    rows, written, _ = graded(double)
    assert [(row["id"], row["sample"]) for row in rows] == [(f"p{i}", k) for i in range(5) for k in (0, 1)]
    assert all(row["correct"] for row in rows) and written != rows
    assert sorted(map(str, written)) == sorted(map(str, rows))


def test_what_there_is_is_not_asked_again():
    whole, *_ = graded(double)
    rows, written, requests = graded(double, [row for row in whole if row["id"] not in ("p1", "p3")])
    assert {row["id"] for row in written} == {"p1", "p3"} and len(requests) == 4
    assert rows == whole


def test_the_first_problems_tell_every_token_of_a_model_on_this_machine():
    model, tokenizer = checkpoint.load("tiny")
    problems_ = [replace(PROBLEMS[0], id=f"p{i}") for i in range(answers.TOKENS_OF + 1)]
    rows = run_graded(problems_, solver, Sampler(model, tokenizer), None, have=[],
                      write=lambda row: None, sampling=Sampling(4))
    assert [("records" in row) for row in rows] == [True] * answers.TOKENS_OF + [False]
    record, = rows[0]["records"]
    assert sum(record["mask"]) == len(record["logp"]) == len(rows[0]["ids"]) == 4
    assert "".join(record["text"][-4:]) == tokenizer.decode(rows[0]["ids"], skip_special=False)
