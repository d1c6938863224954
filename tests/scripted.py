"""Stand-ins for sampler and sandbox that answer from a script, for the tests of workflows and runner."""

import contextlib
import io
import random
import zlib

from slm import BadInput
from slm.episode import Reply, Request
from slm.problems import Problem
from slm.sandbox import Outcome


class Backend:
    """reply(last message, seed, sampling) -> text. `order` is how finished replies come back: first in first
    out, the other way round, or shuffled, `batch` at a time. Token ids are code points."""

    def __init__(self, reply, order="fifo", batch=3, context=10_000):
        self.reply, self.order, self.batch, self.context = reply, order, batch, context
        self.queue, self.requests, self.random = [], [], random.Random(zlib.crc32(order.encode()))

    @property
    def pending(self):
        return bool(self.queue)

    def prompt_ids(self, messages):
        ids = []
        for m in messages:
            if "reply" in m:
                more = m["content"].removeprefix(m["reply"].text)
                ids = m["reply"].prompt_ids + m["reply"].ids + [ord(c) for c in more]
            else:
                ids = ids + [1] + [ord(c) for c in m["content"]] + [2]
        return ids

    def submit(self, request: Request) -> int:
        if len(self.prompt_ids(request.messages)) > self.context:
            raise BadInput("a prompt longer than the context")
        self.requests.append(request)
        ticket = len(self.requests)
        self.queue += [(ticket, i, request) for i in range(request.n)]
        return ticket

    def written(self, ticket):
        return ""

    def step(self):
        if self.order == "lifo":
            self.queue.reverse()
        elif self.order == "shuffled":
            self.random.shuffle(self.queue)
        now, self.queue = self.queue[:self.batch], self.queue[self.batch:]
        return [(ticket, i, self.answer(request, i)) for ticket, i, request in now]

    def answer(self, request, i):
        if request.continuations:  # scored by a hash of the prompt
            luck = random.Random(zlib.crc32(request.messages[-1]["content"].encode()))
            return Reply("", finish="score", prompt_ids=self.prompt_ids(request.messages),
                         scores={words: -luck.random() for words in request.continuations})
        text = self.reply(request.messages[-1]["content"], request.sampling.seed + i, request.sampling)
        if isinstance(text, Reply):
            return text
        ids = [ord(c) for c in text]
        return Reply(text, ids, [-0.5] * len(ids), prompt_ids=self.prompt_ids(request.messages))


class Sandbox:
    """Runs the (trusted) code of a script in place; outcomes come back in the wrong order, one poll late."""

    def __init__(self):
        self.done, self.codes, self.late = [], [], True

    def submit(self, code, timeout=5.0):
        self.codes.append(code)
        out, error, timed_out = io.StringIO(), None, "while True" in str(code)
        if not timed_out:
            with contextlib.redirect_stdout(out):
                try:
                    exec("\n".join([code] if isinstance(code, str) else code), {})
                except Exception as e:
                    error = f"{type(e).__name__}: {e}"
        self.done.insert(0, (len(self.codes), Outcome(out.getvalue(), error, error or "", timed_out, 0.01)))
        return len(self.codes)

    def poll(self, wait=0.0):
        self.late = not self.late
        if self.late:
            return []
        done, self.done = self.done, []
        return done


def problem(id, question, gold="0"):
    return Problem(id, question, gold, source="")
