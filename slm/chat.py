"""Talk to a model, an adapter, a server or a workflow.

    python -m slm.chat                                     the built-in model
    python -m slm.chat --model runs/grpo-tiny/adapter
    python -m slm.chat --model NAME --endpoint http://localhost:8000/v1
    python -m slm.chat --workflow solver_verifier          each line is a question of its own

A conversation goes on in its cache: a turn computes what is new. A workflow shows each reply, and what its
code printed. Replies appear as they are written (a server's, too, if it can stream).

    /temperature 0.7   for the next replies
    /reset             forget what was said
    /save FILE         add the conversation to a file that train_sft.py reads
    /quit              or Ctrl-D; Ctrl-C stops a reply
"""

import argparse
import contextlib
from dataclasses import replace

from slm.runs import cli

COMMANDS = __doc__.partition("can stream).\n\n")[2]


def options() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.backend_options(p)
    g = p.add_argument_group("how")
    g.add_argument("--workflow", help="of agents.py, or FILE.py:NAME; without it, a plain conversation")
    g.add_argument("--temperature", type=cli.number(0),
                   help="0 is greedy (default 0.7; with --workflow 0: it asks for more itself)")
    g.add_argument("--max-tokens", type=cli.positive, default=1024, help="of a reply (default 1024)")
    cli.device_options(g)
    return p


if __name__ == "__main__":
    args = options().parse_args()  # before the heavy imports, so that --help answers at once

from slm import BadInput
from slm.backends import open_backend
from slm.episode import Job, Reply, Request, Sampling, run_episodes, user
from slm.runs.files import as_lines
from slm.sandbox import Sandbox
from slm.search import shown
from slm.workflows import workflow

with contextlib.suppress(ImportError):  # not everywhere: the line can be edited, and has a history
    import readline  # noqa: F401

class Screen:
    """A backend whose replies are printed: the oldest one as it grows, the others in turn."""

    def __init__(self, backend):
        self.backend = backend
        self.open: dict[int, str] = {}      # ticket -> what is on the screen of it, the oldest first
        self.landed: dict[int, Reply] = {}
        self.by_line: set[int] = set()      # tickets whose text a stop string may still cut

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def submit(self, request: Request) -> int:
        ticket = self.backend.submit(request)
        if not request.continuations:
            self.open[ticket] = ""
        if request.sampling.stop:
            self.by_line.add(ticket)
        return ticket

    def step(self) -> list[tuple[int, int, Reply]]:
        replies = self.backend.step()
        self.landed |= {ticket: reply for ticket, _, reply in replies if ticket in self.open}
        while self.open:
            ticket = next(iter(self.open))
            reply = self.landed.pop(ticket, None)
            text = reply.text or f"({reply.error or 'nothing'})" if reply else self.written(ticket)
            seen = self.open[ticket]
            if reply and not text.startswith(seen) and not seen.startswith(text):  # a server was asked again
                self.open[ticket] = ""
                print()
            self.show(ticket, text)
            if not reply:
                break
            del self.open[ticket]
            print(flush=True)
        return replies

    def written(self, ticket: int) -> str:
        """What is there of a reply, less a character that is not whole."""
        text = self.backend.written(ticket)
        return text[:text.rfind("\n") + 1] if ticket in self.by_line else text.rstrip("\ufffd")

    def show(self, ticket: int, text: str) -> None:
        before = self.open[ticket]
        if len(text) > len(before) and text.startswith(before):
            print(text[len(before):], end="", flush=True)
            self.open[ticket] = text

    def close(self) -> None:
        self.open, self.landed = {}, {}
        self.backend.close()


class Tools(Sandbox):
    """A sandbox that prints what its programs printed."""

    def poll(self, wait: float = 0.0):
        outcomes = super().poll(wait)
        for _, outcome in outcomes:
            print(f"    [the code printed: {shown(outcome)}]", flush=True)
        return outcomes


class Talk:
    """What was said so far, and how the next reply is drawn."""

    def __init__(self, args):
        self.workflow = args.workflow and workflow(args.workflow)
        backend, self.adapters = open_backend(args, stream=True)
        self.screen = Screen(backend)
        self.tools = Tools() if args.workflow else None
        greedy = 0.0 if args.workflow else 0.7
        self.sampling = Sampling(args.max_tokens, greedy if args.temperature is None else args.temperature,
                                 stop_at_box=bool(args.workflow))
        self.args, self.messages, self.turns = args, [], 0

    def say(self, line: str) -> None:
        """One turn. A reply that was stopped or failed leaves no trace."""
        self.turns += 1
        if self.workflow:
            job = Job("chat", line, self.workflow, sample=self.turns)
            episode, = run_episodes([job], self.screen, self.tools, sampling=self.sampling,
                                    adapters=self.adapters)
            print(f"==== answer: {episode.answer or 'none'}")
            self.messages += [user(line), {"role": "assistant", "content": episode.response}]
            return
        asked = [*self.messages, user(line)]
        sampling = replace(self.sampling, seed=self.turns)
        asked_for = self.screen.submit(Request(asked, sampling, self.adapters.get("*")))
        while self.screen.pending:
            for ticket, _, reply in self.screen.step():
                if ticket == asked_for and not reply.error:
                    self.messages = [*asked, reply.message()]
                if reply.finish == "length":
                    print(f"[stopped at {reply.tokens_out:,} tokens]")

    def stop(self) -> None:
        """Drop what is under way. An Endpoint that was closed stays closed, so there is a new one."""
        self.screen.close()
        if self.tools:
            self.tools.close()
        if self.args.endpoint:
            self.screen = Screen(open_backend(self.args, stream=True)[0])

    def rows(self) -> list[dict]:
        """What was said, as records: a conversation is one, a workflow's questions are one each."""
        said = [{"role": m["role"], "content": m["content"]} for m in self.messages]
        talks = [said[i:i + 2] for i in range(0, len(said), 2)] if self.workflow else [said]
        return [{"messages": talk} for talk in talks if talk and talk[-1]["content"].strip()]

    def command(self, line: str) -> None:
        """/reset, /save FILE, /temperature X. BadInput for anything else."""
        name, _, value = line.partition(" ")
        if name == "/reset":
            self.messages = []
            print("forgotten")
        elif name == "/save" and value:
            rows = self.rows()
            if not rows:
                raise BadInput("/save: nothing was said")
            with open(value, "ab") as f:
                f.write(as_lines(rows))
            print(f"{cli.count(len(rows), 'conversation')} added to {value}")
        elif name == "/temperature":
            try:
                self.sampling = replace(self.sampling, temperature=cli.number(0)(value))
            except argparse.ArgumentTypeError as e:
                raise BadInput(f"/temperature: {e}") from None
            print(f"temperature {self.sampling.temperature:g}")
        else:
            print(COMMANDS, end="")


def main(args: argparse.Namespace) -> None:
    talk = Talk(args)
    print(COMMANDS, end="")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                talk.command(line)
            elif line:
                talk.say(line)
        except KeyboardInterrupt:
            talk.stop()
            print("\n[stopped: this turn is forgotten]")
        except (BadInput, OSError) as e:
            talk.stop()
            print(f"error: {e}")
    print()


if __name__ == "__main__":
    cli.run(main, args)
