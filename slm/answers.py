"""Episodes graded: the record of an answer, and the loop that asks, grades and writes each one as it lands.

Here, and not in episode.py, the gold answers come in: no workflow and no frame of its runner holds one.
"""

from collections.abc import Callable, Generator

from slm.episode import Episode, Reply, jobs_for, run_episodes
from slm.grading import extract, grade
from slm.runs.files import Journal
from slm.runs.steps import token_by_token

TOKENS_OF = 20  # problems of a set of which every token is told, for the page
GROUPS = ("level", "subject")  # what a problem may belong to


def answer_record(problem, episode: Episode) -> dict:
    """An episode graded, as one line of answers.jsonl. `correct` counts an answer wherever it stands, `boxed`
    says whether it stands in a box. The ids are those of the reply that gave the response, or of the solver's
    last reply if several replies led to the answer."""
    result = grade(episode.response, problem.gold)
    first = right_answer(episode.drafts[0], problem.gold) if episode.drafts else result.correct
    turns = ([t for t in episode.turns if t.reply.text == episode.response]
             or [t for t in episode.turns if t.role == "solver"] or episode.turns)
    said = turns[-1].reply if turns else Reply("", finish="error")
    return {
        "id": problem.id, "data": problem.data, "question": problem.question, "gold": problem.gold,
        **{name: getattr(problem, name) for name in GROUPS if getattr(problem, name)},
        "response": episode.response, "answer": episode.answer, "correct": result.correct,
        "boxed": extract(episode.response, strict=True) is not None, "reason": episode.error or result.reason,
        "first_answer": episode.first_answer, "first_correct": first, "workflow": episode.workflow,
        "sample": episode.sample, "failures": episode.failures, "broken": episode.broken,
        "asks": len(episode.turns), "tokens": episode.tokens_spent, "prompt_ids": said.prompt_ids,
        "ids": said.ids, "finish": said.finish}


def right_answer(answer: str | None, gold: str) -> bool:
    """Whether an answer that stands alone is right."""
    return bool(answer) and grade(f"\\boxed{{{answer}}}", gold).correct


def finished(journal: Journal) -> list[dict]:
    """The records of a stopped run. An episode in which an Ask got no reply leaves the file and is asked
    again."""
    return journal.keep(lambda row: row.get("broken", "unknown") is None)


def run_graded(problems, workflow: Callable[[str], Generator], backend, sandbox, *, have: list[dict],
               write: Callable[[dict], None], record=answer_record, samples: int = 1, **how) -> list[dict]:
    """Run a workflow `samples` times on every problem, grade each episode and write it as it ends.

    have: records of an earlier, stopped run, which are not asked again. write: gets each new record. record:
    (problem, episode) -> record, with the fields of answer_record and more. how: options of run_episodes.
    Returns all records, old and new, in the order of problems and samples.
    """
    jobs = jobs_for(problems, workflow, samples)
    rows = {(row["id"], row["sample"]): row for row in have}

    def keep(episode: Episode) -> None:
        row = record(problems[episode.group], episode)
        if episode.group < TOKENS_OF and hasattr(backend, "tokenizer"):
            row["records"] = [token_by_token(r, backend.tokenizer) for r in episode.records()]
        write(row)
        rows[episode.problem_id, episode.sample] = row

    missing = [job for job in jobs if (job.problem_id, job.sample) not in rows]
    run_episodes(missing, backend, sandbox, on_done=keep, **how)
    return [rows[job.problem_id, job.sample] for job in jobs]
