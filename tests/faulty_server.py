"""A small OpenAI-compatible server that is late, busy, broken or malformed, as its Faults say.

    with serve(answer, faults) as server:
        Endpoint(server.url, "careless")

answer(body, rng) gives the text. The same requests get the same answers and the same faults in every run:
each is drawn from a hash of the request and of how often it has come.
"""

import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from slm.tiny import teacher

LINGER = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often (0 to 1)."""
    reply: dict[str, float] = field(default_factory=dict)  # teacher.FAULTS' names, and huge (over 1 MB)
    tries: dict[str, float] = field(default_factory=dict)  # busy (429), broken (500), reset, torn JSON, empty
    latency: float = 0.0      # seconds, the mean of an exponential distribution ...
    slowest: float = 5.0      # ... cut here
    retry_after: float = 1.0  # seconds that a busy server asks for


def draw(rates: dict[str, float], rng: random.Random) -> str | None:
    """One of the names, each with its rate, or None with what is left of 1."""
    return rng.choices([*rates, None], [*rates.values(), 1 - sum(rates.values())])[0]


def solution(steps: str, answer: str) -> str:
    return f"{steps}\nTherefore, the answer is \\boxed{{{answer}}}."


class Handler(BaseHTTPRequestHandler):
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
            return self.send(b'{"error": {"message": "slow down"}}', 429, retry_after=faults.retry_after)
        if fault == "broken":
            return self.send(b"<html>Internal Server Error</html>", 500)
        reply = self.reply(json.loads(raw), random.Random(key), len(raw) // 4, fault == "empty")
        if fault is None:
            with server.lock:
                server.answered[key] += 1
        self.send(reply[:len(reply) // 2] if fault == "torn" else reply, reset=fault == "reset")

    def reply(self, body: dict, rng: random.Random, tokens_in: int, empty: bool) -> bytes:
        text, fault = self.server.answer(body, rng), draw(self.server.faults.reply, rng)
        if fault == "huge":
            text = text.replace("</think>", "Überlegen … 考える 🤔 " * 30000 + "</think>")
        spoiled = teacher.spoil(text, fault)
        choice = {"index": 0, "message": {"role": "assistant", "content": spoiled.text},
                  "finish_reason": spoiled.finish.replace("refused", "content_filter")}
        usage = {"prompt_tokens": tokens_in, "completion_tokens": len(spoiled.text) // 4}
        return json.dumps({"object": "chat.completion", "model": body["model"], "usage": usage,
                           "choices": [] if empty else [choice]}).encode()

    def send(self, body: bytes, status: int = 200, retry_after: float | None = None, reset: bool = False):
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

    def __init__(self, answer: Callable[[dict, random.Random], str], faults: Faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults = answer, faults
        self.seen, self.answered, self.lock = Counter(), Counter(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass  # a client that went away


@contextmanager
def serve(answer: Callable[[dict, random.Random], str] = teacher.answer, faults: Faults = Faults()):
    """A Server in a thread of this process, for the length of a with block."""
    server = Server(answer, faults)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
