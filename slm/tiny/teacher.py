"""A stand-in teacher: a small OpenAI-compatible server that solves the tiny world's problems by procedure.

    with serve(tiny_answer, DEMO) as server:
        Endpoint(server.url, "careless")

It is sometimes wrong, late or malformed, as DEMO or another Faults says, so that a pipeline can be tried over
real HTTP without a network. The same requests get the same answers and the same faults in every run: each is
drawn from a hash of the request and of how often it has come. `python -m slm.tiny.teacher --port 8080` serves
it to other programs.
"""

import argparse
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = {"careless": 0.35, "careful": 0.1}  # how often a solution of this model holds a mistake
LOCK = threading.Lock()
LINGER = struct.pack("ii", 1, 0)             # SO_LINGER: close with a reset


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often (0 to 1)."""
    reply: dict[str, float] = field(default_factory=dict)  # no_think, no_box, cut, refusal, huge (over 1 MB)
    tries: dict[str, float] = field(default_factory=dict)  # busy (429), broken (500), reset, torn JSON, empty
    latency: float = 0.0      # seconds, the mean of an exponential distribution ...
    slowest: float = 5.0      # ... cut here
    retry_after: float = 1.0  # seconds that a busy server asks for


DEMO = Faults({"no_think": 0.03, "no_box": 0.03, "cut": 0.03, "refusal": 0.01},
              {"busy": 0.01, "broken": 0.02, "reset": 0.02, "torn": 0.01, "empty": 0.01},
              latency=0.05, slowest=0.5, retry_after=0.2)


def draw(rates: dict[str, float], rng: random.Random) -> str | None:
    """One of the names, each with its rate, or None with what is left of 1."""
    x = rng.random()
    for name, rate in rates.items():
        x -= rate
        if x < 0:
            return name
    return None


# ---- what it says ----------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def _stories(n: int) -> dict:
    from slm.tiny import world
    splits = [world.problems("train", n), world.problems("test"), world.problems("unseen")]
    return {story.question: story for stories in splits for story in stories}


def _story(question: str):
    with LOCK:  # hundreds of threads may want the first one at once
        return _stories(4000).get(question) or _stories(40000).get(question)


def tiny_answer(body: dict, rng: random.Random) -> str:
    """The answer to a question of the tiny world, thought about as long as the system message asks."""
    from slm.tiny import world
    question = body["messages"][-1]["content"].split("\n")[0]
    story = _story(question)
    if story is None:
        return "I don't know this problem."
    if rng.random() < MODELS.get(body["model"], 0.2):
        story = world.corrupt(story, rng)
    asked = re.search(r"about (\d+) tokens", body["messages"][0]["content"])
    tokens = int(asked[1]) if asked else 700
    thought = world.solve(story, "detailed" if tokens > 700 else "short")
    if tokens < 700:
        thought = world.plan(story)
    return f"<think>\n{thought}\n</think>\n{solution(world.restate(story), story.answer)}"


def solution(steps: str, answer: str) -> str:
    return f"{steps}\nTherefore, the answer is \\boxed{{{answer}}}."


def spoil(text: str, fault: str | None) -> tuple[str, str]:
    """(text, finish reason) with a fault of Faults.reply."""
    match fault:
        case "no_think":
            return text.split("</think>")[-1].strip(), "stop"
        case "no_box":
            return re.sub(r"\\boxed\{(.*)\}", r"\1", text), "stop"
        case "cut":
            return text[:max(20, len(text) // 2)], "length"
        case "refusal":
            return "I'm sorry, I can't help with that.", "content_filter"
        case "huge":
            return text.replace("</think>", "Überlegen … 考える 🤔 " * 30000 + "</think>"), "stop"
    return text, "stop"


# ---- how it says it --------------------------------------------------------------------------------------

class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1                  # one packet a reply

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = hashlib.sha1(raw).hexdigest()
        server = self.server
        with server.lock:
            seen = server.seen[key] = server.seen[key] + 1
        trouble, faults = random.Random(f"{key} {seen}"), server.faults
        if faults.latency:
            time.sleep(min(faults.slowest, trouble.expovariate(1 / faults.latency)))
        fault = draw(faults.tries, trouble)
        if fault == "busy":
            return self._send(b'{"error": {"message": "slow down"}}', 429, retry_after=faults.retry_after)
        if fault == "broken":
            return self._send(b"<html>Internal Server Error</html>", 500)
        reply = self._reply(json.loads(raw), random.Random(key), len(raw) // 4, fault == "empty")
        if fault is None:
            with server.lock:
                server.answered[key] += 1
        self._send(reply[:len(reply) // 2] if fault == "torn" else reply, reset=fault == "reset")

    def _reply(self, body: dict, rng: random.Random, tokens_in: int, empty: bool) -> bytes:
        text, finish = spoil(self.server.answer(body, rng), draw(self.server.faults.reply, rng))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": tokens_in, "completion_tokens": len(text) // 4}
        return json.dumps({"object": "chat.completion", "model": body["model"], "usage": usage,
                           "choices": [] if empty else [choice]}).encode()

    def _send(self, body: bytes, status: int = 200, retry_after: float | None = None, reset: bool = False):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if reset else body)
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            self.close_connection = True
            self.connection.close()

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """A thread for each connection. `seen` and `answered` count the requests by the hash of their body."""
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, answer: Callable[[dict, random.Random], str], faults: Faults, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.faults = answer, faults
        self.seen, self.answered, self.lock = Counter(), Counter(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass  # a client that went away


@contextmanager
def serve(answer: Callable[[dict, random.Random], str] = tiny_answer, faults: Faults = DEMO, port: int = 0):
    """A Server in a thread of this process, for the length of a with block."""
    server = Server(answer, faults, port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the stand-in teacher until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8080)
    with serve(port=parser.parse_args().port) as server:
        print(f"{server.url}, models {' and '.join(MODELS)}")
        threading.Event().wait()
