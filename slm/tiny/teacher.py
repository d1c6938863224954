"""A stand-in teacher: it solves the tiny world's problems by procedure, in this process, and is often wrong.

Like a real teacher it sends malformed replies, too. Mistakes and faults are drawn from a hash of the request,
so the same request gets the same reply in every run."""

import hashlib
import json
import random
import re
from dataclasses import replace
from functools import lru_cache

from slm.episode import Reply, Request
from slm.tiny import world

MISTAKES = {"careless": 0.35, "careful": 0.1}  # how often a solution of this model holds one
FAULTS = {"no_think": 0.03, "no_box": 0.03, "cut": 0.03, "refusal": 0.01, None: 0.9}


class StandIn:
    """The model of this name as a backend. It works while a request is submitted."""

    def __init__(self, model: str):
        self.model, self.tickets = model, 0
        self.pending: list[tuple[int, int, Reply]] = []  # (ticket, sample, reply)

    def submit(self, request: Request) -> int:
        s, self.tickets = request.sampling, self.tickets + 1
        for sample in range(request.n):
            body = {"model": self.model, "messages": request.messages, "max_tokens": s.max_tokens,
                    "temperature": s.temperature, "seed": s.seed + sample}
            posted = json.dumps(body)
            rng = random.Random(hashlib.sha1(posted.encode()).hexdigest())
            reply = spoil(answer(body, rng), rng.choices(list(FAULTS), FAULTS.values())[0])
            counted = replace(reply, tokens_in=len(posted) // 4, tokens_out=len(reply.text) // 4)
            self.pending.append((self.tickets, sample, counted))
        return self.tickets

    def step(self) -> list[tuple[int, int, Reply]]:
        landed, self.pending = self.pending, []
        return landed

    def close(self) -> None:
        self.pending = []


@lru_cache
def _stories(n: int) -> dict[str, world.Story]:
    splits = world.problems("train", n), world.problems("test"), world.problems("unseen")
    return {story.question: story for split in splits for story in split}


def answer(body: dict, rng: random.Random) -> str:
    """The answer to the question in the last message, thought about as long as the first message asks."""
    question = body["messages"][-1]["content"].split("\n")[0]
    story = _stories(4000).get(question) or _stories(40000).get(question)
    if story is None:
        return "I don't know this problem."
    if rng.random() < MISTAKES.get(body["model"], 0.2):
        story = world.corrupt(story, rng)
    asked = re.search(r"about (\d+) tokens", body["messages"][0]["content"])
    tokens = int(asked[1]) if asked else 700
    thought = world.plan(story) if tokens < 700 else world.solve(story, ("short", "detailed")[tokens > 700])
    return (f"<think>\n{thought}\n</think>\n{world.restate(story)}\n"
            f"Therefore, the answer is \\boxed{{{story.answer}}}.")


def spoil(text: str, fault: str | None) -> Reply:
    """A reply with this text, and with one of FAULTS."""
    return {"no_think": Reply(text.split("</think>")[-1].strip()),
            "no_box": Reply(re.sub(r"\\boxed\{(.*)\}", r"\1", text)),
            "cut": Reply(text[:max(20, len(text) // 2)], finish="length"),
            "refusal": Reply("I'm sorry, I can't help with that.", finish="refused")}.get(fault, Reply(text))
