"""Labels of steps for a verifier to learn: what becomes of a solution that goes on from each of its steps
(Math-Shepherd, arXiv 2312.08935; OmegaPRM, arXiv 2406.06592). make_data.py steps makes the records.
"""

from operator import itemgetter

from slm import prompts
from slm.episode import Reply, Run
from slm.grading import blocks_of, equal
from slm.search.searches import chains
from slm.search.steps import WORDS, Node, step_check


def due(count: int, right: bool, found: dict[int, int] | None, bisect: bool) -> list[int]:
    """From which steps of a solution, 1 to `count`, completions are to be written next; 0: the solution
    itself. found: step -> how many were right. The label of the last step is whether the answer is `right`.
    bisect: only the first wrong step of a wrong solution is looked for, by halving.

    >>> due(4, False, {2: 5}, bisect=False), due(4, False, {2: 5}, bisect=True), due(4, True, {}, bisect=True)
    ([1, 3], [3], [])
    """
    if found is None:
        return [0]
    if not bisect:
        return [step for step in range(1, count) if step not in found]
    low, high = 0, count
    while not right and high - low > 1:
        middle = (low + high) // 2
        if middle not in found:
            return [middle]
        low, high = (middle, high) if found[middle] else (low, middle)
    return []


def rest_of(journal, row: dict, step: int, args):
    """A workflow that writes a solution on from the end of a step (0: one from the start) and files the
    answers. A new solution is filed with the ids of the prompt and of all `steps`, and how many of them there
    are at the end of each."""
    def completion(question: str):
        text = "".join(row["steps"][:step])
        reply = Reply(text, row["ids"][:row["ends"][step - 1]]) if step else None
        blocks = blocks_of(reply) if reply else []
        outcome = (yield Run(blocks)) if blocks else None
        node = Node(text=text, reply=reply, outcome=outcome, blocks=len(blocks), depth=step)
        found = yield from chains(question, [node] * (args.completions if step else 1))
        filed = {"id": row["id"], "sample": row["sample"], "step": step, "answers": [n.answer for n in found]}
        if not step:
            path = found[0].path() if found else []
            ids = [node.reply.prompt_ids + node.reply.ids for node in path]
            filed |= {"steps": [node.text[len(node.parent.text):] for node in path],
                      "ends": list(map(len, ids)), "ids": ids[-1] if ids else []}
        journal.append(filed)
        return [None, *filed["answers"]][-1]
    return completion


def so_far(journal, asked: list, samples: int) -> list[tuple]:
    """(problem, row) of every solution that is wanted. found: step -> how many of the completions are right,
    or None if there is no solution yet. A solution without an answer has no steps."""
    known = {p.id: p for p in asked}
    rows = {(p.id, k): {"id": p.id, "sample": k, "steps": [], "right": False, "found": None}
            for p in asked for k in range(samples)}
    for row in sorted(journal, key=itemgetter("step")):
        key = row["id"], row["sample"]
        if key in rows:
            right = sum(equal(answer, known[row["id"]].gold) for answer in row["answers"])
            if row["step"]:
                rows[key]["found"][row["step"]] = right
            else:
                rows[key] = row | {"right": bool(right), "found": {}}
    return [(known[id], row) for (id, _), row in rows.items()]


def labels_of(row: dict, args) -> dict[str, dict[int, float]]:
    """{"hard", "soft": {step: its chance to be right}}: whether any of the completions is right, and which
    share of them. With --bisect the hard labels end with the first wrong step; all before it are right."""
    soft = {step: right / args.completions for step, right in row["found"].items()}
    soft[len(row["steps"])] = float(row["right"])
    hard = {step: float(share > 0) for step, share in soft.items()}
    if args.bisect:
        last = min((step for step, share in soft.items() if not share), default=len(row["steps"]))
        hard = {step: hard.get(step, 1.0) for step in range(1, last + 1)}
    return {"hard": hard, "soft": soft}


def step_records(solutions: list[tuple], args) -> dict[str, list[dict]]:
    """{"hard", "soft": records for train_sft.py}. The share of right completions is the weight of
    CORRECT, and the rest that of INCORRECT: the two losses add up to the cross-entropy with a soft label."""
    found = {"hard": [], "soft": []}
    for problem, row in solutions:
        for kind, shares in labels_of(row, args).items() if row["steps"] else ():
            for step, share in sorted(shares.items()):
                asked = step_check(problem.question, "".join(row["steps"][:step]))
                said = [{"role": "assistant", "content": word, "weight": weight}
                        for word, weight in zip(WORDS, (share, 1 - share)) if weight]
                found[kind] += [{"id": problem.id, "sample": row["sample"], "step": step,
                                 "prompt": prompts.STEP_CHECK.id, "messages": [*asked, m]} for m in said]
    return found
