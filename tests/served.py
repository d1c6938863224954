"""A small vLLM server for the tests of --rollouts: our own model and sampler behind vLLM's addresses. It
misbehaves as a test says."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from listening import Quiet, Server, listening

from slm import checkpoint, lora, losses
from slm.episode import Request, Sampling
from slm.formats import lora_files
from slm.sampling import Sampler

RESET, PAGE = "reset", b"<html><title>Welcome to nginx!</title></html>"


@dataclass
class Served:
    """quirk(path, body, count of earlier requests to this path) -> RESET, (status, JSON or bytes), or None:
    the good answer. hot: what a temperature is multiplied with. raw: log-probs at temperature 1. stale: loads
    the first adapter whatever it is asked for. shift: what is added to the log-probs of a reply."""
    model: torch.nn.Module
    tokenizer: object
    quirk: object = None
    hot: float = 1.0
    raw: bool = False
    stale: bool = False
    shift: float = 0.0
    context: int = 10_000
    loaded: dict = field(default_factory=dict)   # name on the server -> folder
    bodies: list = field(default_factory=list)   # (path, body)
    lock: object = field(default_factory=threading.Lock)
    url: str = ""

    def __post_init__(self):
        self.sampler = Sampler(self.model, self.tokenizer)

    def of(self, path: str) -> list[dict]:
        return [body for other, body in self.bodies if other == path]

    def forget(self) -> None:
        """As after a restart."""
        for name in self.loaded:
            lora.remove(self.model, name)
        self.loaded = {}

    def answer(self, path: str, body: dict):
        with self.lock:
            spoiled = self.quirk and self.quirk(path, body, len(self.of(path)))
            self.bodies.append((path, body))
            return spoiled or getattr(self, path)(body)

    def models(self, body):
        rows = [{"id": "base", "parent": None, "max_model_len": self.context}]
        return 200, {"data": rows + [{"id": name, "parent": "base"} for name in self.loaded]}

    def load_lora_adapter(self, body):
        name, folder = body["lora_name"], body["lora_path"]
        if not Path(folder, "adapter_config.json").is_file():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {folder}"}}
        self.loaded[name] = folder
        lora_files.load(self.model, folder, name)
        if self.stale and len(self.of("load_lora_adapter")) > 1:
            for p, old in zip(lora.parameters(self.model, name), self.first):
                p.data = old
        self.first = [p.data.clone() for p in lora.parameters(self.model, name)]
        return 200, b"Success"

    def unload_lora_adapter(self, body):
        if body["lora_name"] not in self.loaded:
            return 404, {"error": {"message": "cannot be found"}}
        del self.loaded[body["lora_name"]]
        lora.remove(self.model, body["lora_name"])
        return 200, b"Success"

    def completions(self, body):
        ids, name, t = body["prompt"], body["model"], body["temperature"]
        if name not in (*self.loaded, "base"):
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if len(ids) + body["max_tokens"] > self.context:
            return 400, {"error": {"message": f"max_model_len={self.context}"}}
        choice = {"prompt_token_ids": ids, "text": "", "finish_reason": "length"}
        with lora.use(self.model, None if name == "base" else name):
            if "prompt_logprobs" in body:
                rows = zip(ids[1:], self.score(ids, 1, 1.0))
                choice["prompt_logprobs"] = [None, *({str(i): {"logprob": x}} for i, x in rows)]
            sampling = Sampling(body["max_tokens"], t * self.hot, body["top_p"], body["top_k"], body["seed"],
                                tuple(body.get("stop", ())))
            (reply,), = self.sampler.generate([Request(None, sampling, ids=ids)], progress=False)
            self.sampler.close()  # no reply's rounding depends on who came before
            logprobs = self.score(ids + reply.ids, len(ids), 1.0) if self.raw else reply.logprobs
        finish = reply.finish if reply.finish == "length" else "stop"
        choice |= {"text": reply.text, "finish_reason": finish, "token_ids": reply.ids,
                   "logprobs": {"token_logprobs": [x + self.shift for x in logprobs]}}
        return 200, {"choices": [choice]}

    @torch.no_grad()
    def score(self, ids, start, t):
        mask = [0] * start + [1] * (len(ids) - start)
        return losses.score(self.model, [ids], [mask], t)[0].tolist()


class Handler(Quiet):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = self.server.served.answer(self.path.removeprefix("/v1/"), json.loads(raw or b"{}"))
        if found == RESET:
            self.close_connection = True
            return self.connection.close()
        status, said = found
        said = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@contextmanager
def serve(folder, **how):
    """A Served around the model in this folder, for the length of a with block."""
    served = Served(*checkpoint.load(folder), **how)
    server = Server(Handler)
    server.served, served.url = served, server.url
    with listening(server):
        yield served
