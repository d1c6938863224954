"""slm/chat.py: a conversation at a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_server import serve
from scripted import Backend

from slm import BadInput, chat
from slm.episode import Reply, Request, Sampling, user

ROOT = Path(__file__).parents[1]


class Terminal:
    """A process whose input and output are a terminal."""

    def __init__(self, *words):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slm.chat", *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
            env={**os.environ, "TERM": "dumb"})
        os.close(theirs)

    def until(self, end: str) -> str:
        seen = ""
        while not seen.endswith(end):
            assert select.select([self.ours], [], [], 60)[0], f"{end!r} does not come after {seen!r}"
            seen += os.read(self.ours, 4096).decode()
        return seen.replace("\r\n", "\n")

    def type(self, line: str, end: str = "> ") -> str:
        os.write(self.ours, line.encode() + b"\n")
        return self.until(end).partition("\n")[2]


@pytest.fixture
def terminal():
    started = []
    yield lambda *words: started.append(Terminal(*words)) or started[-1]
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.ours)


def test_a_conversation_at_a_terminal_is_shown_saved_and_forgotten(terminal, tmp_path):
    talk = terminal("--temperature", "0")
    assert "/temperature" in talk.until("> ")
    first = talk.type("Tom has 3 apples. He gets 4 more apples. How many apples does Tom have now?")
    assert first.strip().removesuffix("\n>")
    talk.type("Why?")
    assert "1 conversation added" in talk.type(f"/save {tmp_path / 'said.jsonl'}")
    assert "forgotten" in talk.type("/reset")
    assert "error: /save: nothing was said" in talk.type(f"/save {tmp_path / 'said.jsonl'}")
    assert "error: /temperature: 'hot' is not a number" in talk.type("/temperature hot")
    os.write(talk.ours, b"\x04")  # Ctrl-D
    assert talk.process.wait(60) == 0
    said = json.loads((tmp_path / "said.jsonl").read_text().splitlines()[0])["messages"]
    assert [m["role"] for m in said] == ["user", "assistant"] * 2 and said[1]["content"] in first


def test_a_server_s_reply_appears_while_it_is_written(terminal):
    go_on = threading.Event()
    with serve(lambda body, rng: "It is six, and then seven.", streams={"wait": go_on}) as server:
        talk = terminal("--endpoint", server.url, "--model", "m")
        talk.until("> ")
        assert talk.type("What is it?", end="six, a") == "It is six, a"
        go_on.set()
        assert talk.until("> ") == "nd then seven.\n> "
        assert server.bodies[0]["stream"] is True
        talk.type("And then?")
        assert [m["content"] for m in server.bodies[1]["messages"]] == [
            "What is it?", "It is six, and then seven.", "And then?"]


def test_a_workflow_s_code_and_what_it_printed_appear_at_a_terminal(terminal):
    with serve(lambda body, rng: "So:\n```python\nprint(6 * 7)\n```\n") as server:  # and it can't stream
        talk = terminal("--endpoint", server.url, "--model", "m", "--workflow", "python_tools")
        talk.until("> ")
        said = talk.type("What is 6 * 7?")
    assert said == "So:\n```python\nprint(6 * 7)\n```\n\n    [the code printed: 42]\n==== answer: 42\n> "


# ---- the parts, on scripted replies ------------------------------------------------------------------------

class Growing:
    """A backend that writes two characters a step of each reply, the first one slowest."""

    def __init__(self, *texts):
        self.texts, self.at, self.asked = texts, [], []

    def submit(self, request):
        self.asked.append(request)
        self.at.append(0)
        return len(self.at) - 1

    @property
    def pending(self):
        return any(at < len(self.texts[n]) for n, at in enumerate(self.at))

    def written(self, ticket):
        return self.texts[ticket][:self.at[ticket]]

    def step(self):
        before = list(self.at)
        self.at = [min(len(self.texts[n]), at + 2 * (n + 1)) for n, at in enumerate(self.at)]
        return [(n, 0, Reply(self.texts[n])) for n, at in enumerate(self.at)
                if before[n] < at == len(self.texts[n])]

    def close(self):
        self.at = [len(text) for text in self.texts]


def talk_with(backend, monkeypatch, **more):
    monkeypatch.setattr(chat, "open_backend", lambda args, stream: (backend, {}))
    usual = {"workflow": None, "temperature": 0.5, "max_tokens": 9, "endpoint": None}
    return chat.Talk(SimpleNamespace(**usual | more))


def test_replies_appear_one_after_the_other_whatever_lands_first(capsys):
    screen = chat.Screen(Growing("one is slow", "two", "three"))
    for _ in range(3):
        screen.submit(Request([user("?")]))
    seen = []
    while screen.pending:
        screen.step()
        seen.append(capsys.readouterr().out)
    assert "".join(seen) == "one is slow\ntwo\nthree\n"
    assert seen[:2] == ["on", "e "]


def test_a_reply_that_a_server_began_anew_is_shown_whole_and_one_that_is_cut_is_not_shown_again(capsys):
    backend = Growing("I think")
    screen = chat.Screen(backend)
    for final, end in (("It is 4.", "\nIt is 4.\n"), ("I", "\n"), ("", "\n(no server)\n")):
        screen.submit(Request([user("?")]))
        backend.at, backend.texts = [0] * len(backend.at), ["I think"] * len(backend.at)
        screen.step()
        ticket = len(backend.at) - 1
        backend.step = lambda t=ticket, f=final: [(t, 0, Reply(f, error=None if f else "no server"))]
        seen = capsys.readouterr().out
        screen.step()
        assert seen and capsys.readouterr().out == end
        del backend.step


def test_a_line_that_a_stop_string_may_cut_waits_until_it_is_whole(capsys):
    backend = Growing("print(4)\n```output")
    screen = chat.Screen(backend)
    screen.submit(Request([user("?")], Sampling(stop=("```output",))))
    seen = ""
    while backend.at[0] < len(backend.texts[0]) - 2:
        screen.step()
        seen += capsys.readouterr().out
    assert seen == "print(4)\n"


def test_a_turn_sees_what_was_said_before_it(monkeypatch):
    backend = Growing("first", "second", "third")
    talk = talk_with(backend, monkeypatch)
    talk.say("a")
    talk.say("b")
    assert [m["content"] for m in backend.asked[1].messages] == ["a", "first", "b"]
    assert backend.asked[1].messages[1]["reply"].text == "first"  # so that its ids are kept
    talk.command("/reset")
    talk.say("c")
    assert [m["content"] for m in backend.asked[2].messages] == ["c"]
    assert len({request.sampling.seed for request in backend.asked}) == 3


def test_a_stopped_or_failed_turn_leaves_no_trace(monkeypatch, capsys):
    backend = Growing("first", "second")
    talk = talk_with(backend, monkeypatch)
    talk.say("a")
    monkeypatch.setattr(backend, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        talk.say("b")
    talk.stop()
    assert [m["content"] for m in talk.messages] == ["a", "first"]
    failing = Growing("x")
    monkeypatch.setattr(failing, "step", lambda: failing.close() or [(0, 0, Reply("", error="no server"))])
    talk = talk_with(failing, monkeypatch)
    talk.say("a")
    assert talk.messages == [] and "(no server)" in capsys.readouterr().out


def test_a_workflow_shows_its_code_s_output_and_its_answer(monkeypatch, capsys):
    backend = Backend(lambda prompt, seed, sampling: "```python\nprint(6 * 7)\n```")
    talk = talk_with(backend, monkeypatch, workflow="python_tools")
    talk.say("What is 6 * 7?")
    said = capsys.readouterr().out
    assert "print(6 * 7)" in said and "[the code printed: 42]" in said and said.endswith("==== answer: 42\n")


def test_the_temperature_is_the_next_reply_s(monkeypatch):
    talk = talk_with(Growing("first"), monkeypatch)
    talk.command("/temperature 0")
    talk.say("a")
    assert talk.screen.backend.asked[0].sampling.temperature == 0
    with pytest.raises(BadInput, match="/temperature: '-1' is not a number"):
        talk.command("/temperature -1")


def test_after_a_stop_a_server_is_asked_anew_and_an_old_reply_is_nobody_s(monkeypatch):
    talk = talk_with(Growing("late"), monkeypatch, endpoint="http://localhost")
    old = talk.screen
    monkeypatch.setattr(chat, "open_backend", lambda args, stream: (Growing("new"), {}))
    talk.stop()
    assert talk.screen is not old
    talk.say("a")
    monkeypatch.setattr(talk.screen.backend, "texts", ("new", "mine"))
    monkeypatch.setattr(talk.screen.backend, "step", lambda: talk.screen.backend.close() or [
        (0, 0, Reply("an old one")), (1, 0, Reply("mine"))])
    talk.say("b")
    assert [m["content"] for m in talk.messages] == ["a", "new", "b", "mine"]


def test_a_workflow_s_questions_are_saved_one_by_one_and_without_empty_ones(monkeypatch, tmp_path):
    texts = iter(["\\boxed{1}", "", "\\boxed{3}"])
    talk = talk_with(Backend(lambda *_: next(texts)), monkeypatch, workflow="solver", temperature=None)
    assert talk.sampling.temperature == 0
    for question in ("one?", "two?", "three?"):
        talk.say(question)
    talk.command(f"/save {tmp_path / 'said.jsonl'}")
    rows = [json.loads(line)["messages"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [[m["content"] for m in row] for row in rows] == [["one?", "\\boxed{1}"], ["three?", "\\boxed{3}"]]


def test_a_stop_while_code_runs_leaves_no_outcome_for_the_next_turn(monkeypatch, capsys):
    code = iter(["while True: pass", "print(7)"])
    backend = Backend(lambda *_: f"```python\n{next(code)}\n```")
    backend.close = lambda: None
    talk = talk_with(backend, monkeypatch, workflow="python_tools")
    poll = talk.tools.poll
    monkeypatch.setattr(talk.tools, "poll", lambda wait: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        talk.say("a")
    monkeypatch.setattr(talk.tools, "poll", poll)
    talk.stop()
    talk.say("b")
    assert "==== answer: 7" in capsys.readouterr().out
