"""A small OpenAI-compatible server that is late, busy, broken or malformed, as its Faults say, or that has
one of the QUIRKS of real servers.

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

from listening import Quiet, Server, listening

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


def refuses(field: str, status: int, said) -> Callable:
    """A server that takes no request with this field."""
    return lambda number, body, reply: (status, said) if field in body else None


def first(times: int, status: int, said, **headers) -> Callable:
    """A server that fails so many times, then answers."""
    return lambda number, body, reply: (status, said, headers) if number < times else None


def ends(reason, times: int = 10**9, **choice) -> Callable:
    """A server whose texts end half way, so many times, for this reason."""
    def quirk(number, body, reply):
        if number < times:
            said, = reply["choices"]
            said |= {"finish_reason": reason, **choice}
            text = said["message"]["content"]
            said["message"]["content"] = text[:len(text) // 2]
        return 200, reply
    return quirk


def says(times: int = 10**9, usage: dict | None = None, **message) -> Callable:
    """A server with something else in its message, or in its usage."""
    def quirk(number, body, reply):
        if number < times:
            text = reply["choices"][0]["message"]["content"]
            for name, value in message.items():
                reply["choices"][0]["message"][name] = value(text) if callable(value) else value
            reply["usage"] |= usage or {}
        return 200, reply
    return quirk


def takes_no_system_role(said) -> Callable:
    return lambda number, body, reply: (400, said) if body["messages"][0]["role"] == "system" else None


def takes_only_temperature_1(number, body, reply):
    if body.get("temperature", 1) != 1:
        said = ("Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) "
                "value is supported.")
        return 400, {"error": {"message": said, "param": "temperature"}}


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "one"},
         {"type": "text", "text": " two"}]
HTML = b"<!DOCTYPE html><html><head><style>a {b}</style><title>Welcome to nginx!</title></head></html>"

# name -> quirk(number of the request, its body, the reply that a good server sends) -> (status, JSON or bytes
# and, perhaps, headers), or None: the good reply
QUIRKS = {
    # what a server refuses
    "no seed": refuses("seed", 400, {"error": {"message": "Unsupported parameter: 'seed'"}}),
    "no seed, as Mistral says it": refuses("seed", 422, {"object": "error", "message": {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}}),
    "no seed, as Google says it": refuses("seed", 400, [{"error": {
        "code": 400, "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}}]),
    "no seed, as LiteLLM says it": refuses("seed", 500, {"error": {
        "message": "ollama does not support parameters: {'seed': 1}, for model=llama3", "code": 500}}),
    "max_completion_tokens": refuses("max_tokens", 400, {"error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                   "'max_completion_tokens' instead.", "code": "unsupported_parameter"}}),
    "temperature 1": takes_only_temperature_1,
    "no system role": takes_no_system_role(  # of Gemma's template behind vLLM
        {"object": "error", "message": "System role not supported", "type": "BadRequestError", "code": 400}),
    "no system role, as OpenAI says it": takes_no_system_role({"error": {
        "message": "Unsupported value: 'messages[0].role' does not support 'system' with this model."}}),
    # what may pass
    "error in 200": first(2, 200, {"error": {"message": "upstream is gone", "code": 502}}),
    "error and no choices": first(2, 200, {"error": "model is unloaded", "choices": []}),
    "loading": first(2, 503, {"error": {"code": 503, "message": "Loading model"}}),
    "busy provider": first(2, 429, {"error": {"message": "Provider returned error", "code": 429, "metadata": {
        "raw": "z-ai/glm is temporarily rate-limited upstream"}}}),
    "MiniMax is busy": first(2, 200, {"choices": None, "base_resp": {"status_code": 1002,
                                                                     "status_msg": "rate limit"}}),
    "detail": first(2, 500, {"detail": "the engine is down"}),
    "page of a proxy": first(2, 502, b"<html><body><h1>502 Bad Gateway</h1></body></html>"),
    "an hour": first(1, 429, {"error": {"message": "quota of this hour"}}, **{"Retry-After": 3600}),
    # what passes never
    "web page": first(10**9, 200, HTML),
    "no money": first(10**9, 429, {"error": {"message": "You exceeded your current quota, please check",
                                             "code": "insufficient_quota"}}),
    # how texts end
    "breaks off twice": ends("error", 2, error={"code": 502, "message": "provider died"}),
    **{f"ends with {reason}": ends(reason) for reason in (
        "error", "abort", None, "", "network_error", "insufficient_system_resource", "tool_calls",
        "length", "model_length", "max_tokens", "model_context_window_exceeded", "sensitive")},
    # what is in a message
    "parts": says(content=PARTS),
    "strings": says(content=lambda text: [text[:3], text[3:]]),
    "reasoning only": says(content=None, reasoning_content=lambda text: text),
    "reasoning only, cut": ends("length", message={"content": "", "reasoning": "half"}),
    "empty twice": says(2, content=""),
    "always empty": says(content=""),
    # what is in the usage
    "negative usage": says(usage={"prompt_tokens": -7, "completion_tokens": -12, "total_tokens": -19}),
    "absurd usage": says(usage={"prompt_tokens": 1e308, "completion_tokens": 10**40, "total_tokens": "7"}),
    "ends at the limit": says(usage={"completion_tokens": 50}),
}


class Handler(Quiet):
    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = hashlib.sha1(raw).hexdigest()
        server = self.server
        with server.lock:
            seen = server.seen[key] = server.seen[key] + 1
            number = len(server.bodies)
            server.bodies.append(json.loads(raw))
        trouble, faults = random.Random(f"{key} {seen}"), server.faults
        if faults.latency:
            time.sleep(min(faults.slowest, trouble.expovariate(1 / faults.latency)))
        fault = draw(faults.tries, trouble)
        if fault == "busy":
            return self.send(b'{"error": {"message": "slow down"}}', 429, retry_after=faults.retry_after)
        if fault == "broken":
            return self.send(b"<html>Internal Server Error</html>", 500)
        reply = self.reply(json.loads(raw), random.Random(key), len(raw) // 4, fault == "empty")
        quirk = server.quirk and server.quirk(number, json.loads(raw), json.loads(reply))
        if quirk:
            status, said, *headers = quirk
            reply = said if isinstance(said, bytes) else json.dumps(said).encode()
            if status != 200:
                retry_after = headers[0].get("Retry-After") if headers else None
                return self.send(reply, status, retry_after)
        if fault is None:
            with server.lock:
                server.answered[key] += 1
        if json.loads(raw).get("stream") and server.streams:
            return self.send_events(json.loads(reply), **server.streams)
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

    def send_events(self, reply: dict, wait: threading.Event, cut: int = 0):
        """The reply as server-sent events of three characters. The second half waits for an event; `cut`: how
        many streams break off before it."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        text = reply["choices"][0]["message"]["content"]
        said = [{"delta": {"role": "assistant", "content": ""}},
                *({"delta": {"content": text[i:i + 3]}} for i in range(0, len(text), 3)),
                {"delta": {}, "finish_reason": "stop"}]
        self.wfile.write(b": a comment\r\n\r\n")
        for n, choice in enumerate(said):
            if n == len(said) // 2:
                self.wfile.flush()
                if len(self.server.bodies) <= cut:
                    return
                wait.wait(60)
            self.wfile.write(f"data: {json.dumps({'choices': [choice], 'usage': None})}\r\n\r\n".encode())
        usage = {"choices": [], "usage": reply["usage"]}
        self.wfile.write(f"data: {json.dumps(usage)}\r\n\r\ndata: [DONE]\r\n\r\n".encode())
        self.wfile.flush()

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


class Faulty(Server):
    """`seen` and `answered` count the requests by the hash of their body; `bodies` are all that came."""

    def __init__(self, answer: Callable[[dict, random.Random], str], faults: Faults, quirk: Callable | None,
                 streams: dict | None):
        super().__init__(Handler)
        self.answer, self.faults, self.quirk, self.bodies, self.streams = answer, faults, quirk, [], streams
        self.seen, self.answered, self.lock = Counter(), Counter(), threading.Lock()


@contextmanager
def serve(answer: Callable[[dict, random.Random], str] = teacher.answer, faults: Faults = Faults(),
          quirk: str | Callable | None = None, streams: dict | None = None):
    """A Faulty in a thread of this process, for the length of a with block. quirk: one of QUIRKS, by name, or
    one of your own. streams: send_events' options, of a server that can stream."""
    quirk = QUIRKS[quirk] if isinstance(quirk, str) else quirk
    with listening(Faulty(answer, faults, quirk, streams)) as server:
        yield server
