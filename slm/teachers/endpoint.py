"""Any OpenAI-compatible chat server (a teacher's API, vLLM, llama.cpp) behind the Sampler's protocol.

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct", workers=200)
    ticket = endpoint.submit(Request(messages=[{"role": "user", "content": "2 + 2?"}], n=4))
    while endpoint.pending:
        for ticket, sample, reply in endpoint.step(): ...

One thread and one HTTP session per worker, so `workers` requests are under way at once. A request is tried
again, with jittered exponential waits, after 408/409/425/429/5xx, a reset, a time-out, a broken body or an
empty answer; all workers together honour a Retry-After header. What stays broken comes back as a Reply with
finish "error". A server that cannot answer at all (bad key, unknown model, wrong address) raises BadInput.

Not covered: streaming, images, function calling, log-probs. Imports no torch.
"""

import contextlib
import http.client
import json
import os
import random
import threading
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, ReadTimeoutError

from slm import BadInput
from slm.episode import Reply, Request
from slm.grading import answered
from slm.runs.files import as_lines

LARGEST = 8 * 2**20  # bytes of one response body; more is refused unread
AGAIN = {408, 409, 425, 429}
DEAD = {401: "refused the key", 402: "wants to be paid", 403: "refused the key",
        404: "knows no such model or address"}
GIVE_UP_AFTER = 5    # requests in a row that failed for good: the server counts as dead


class _Again(Exception):
    """This try failed in a way that another may not. `after`: seconds the server asked us to wait."""

    def __init__(self, cause: str, after: float = 0.0):
        super().__init__(cause)
        self.after = after


class _Refused(Exception):
    """The server will refuse this request however often it is sent."""


class _Response(http.client.HTTPResponse):
    """Reads on behind interim answers (102, 103). Python's own class takes one for the answer, and the real
    answer for that of the next request on the connection."""

    def _read_status(self):
        version, status, reason = super()._read_status()
        while 101 < status < 200:
            http.client.parse_headers(self.fp)
            version, status, reason = super()._read_status()
        return version, status, reason


class _Plain(HTTPConnection):
    response_class = _Response


class _Encrypted(HTTPSConnection):
    response_class = _Response


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _EncryptedPool(HTTPSConnectionPool):
    ConnectionCls = _Encrypted


class _Adapter(HTTPAdapter):
    """requests over these connections."""

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _EncryptedPool}

    def proxy_manager_for(self, *args, **kwargs):
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
        return manager


class Limiter:
    """Requests and tokens a minute, shared by all workers: each start books the next free moment.

    Starts are spread evenly, without bursts. `book` takes an estimate of the tokens, `correct` the rest.
    """

    def __init__(self, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0):
        self.per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.next_request = self.next_token = 0.0
        self.lock = threading.Lock()

    def book(self, tokens: float) -> float:
        """The time (of time.monotonic) at which a request of about `tokens` may start."""
        with self.lock:
            start = max(time.monotonic(), self.next_request, self.next_token)
            self.next_request = start + self.per_request
            self.next_token = start + self.per_token * tokens
            return start

    def correct(self, tokens: float) -> None:
        """The booked request used `tokens` more (or, below 0, fewer) than estimated."""
        with self.lock:
            self.next_token += self.per_token * tokens

    def pause(self, seconds: float) -> None:
        with self.lock:
            self.next_request = max(self.next_request, time.monotonic() + seconds)


class Endpoint:
    """A chat server as a backend: submit, step, pending, close.

    base_url: up to and without /chat/completions, e.g. https://api.x.ai/v1. key_env: the environment variable
    that holds the key (the key itself is kept out of every message). timeout: seconds for one whole try.
    The queue is unbounded: bound what you submit before you collect.
    """

    def __init__(self, base_url: str, model: str, key_env: str | None = None, *, workers: int = 32,
                 timeout: float = 600.0, tries: int = 8, backoff: float = 0.5,
                 requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0):
        if "@" in urlsplit(base_url).netloc:
            raise BadInput("the endpoint's address holds a password; expected it in a variable that is named")
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
            raise BadInput(f"endpoint {base_url!r}: expected an address such as http://localhost:8000/v1")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.tries, self.backoff = model, timeout, tries, backoff
        self._key = os.environ.get(key_env, "").strip() if key_env else ""
        if key_env and not self._key:
            raise BadInput(f"{self.url}: the environment variable {key_env} is empty, expected its key in it")
        self.limiter = Limiter(requests_per_minute, tokens_per_minute)
        self.workers = workers
        self._threads: list[threading.Thread] = []
        self._jobs, self._done = SimpleQueue(), SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()           # of answered, failed_in_row, mean_out
        self._dead: str | None = None
        self._answered = self._failed_in_row = self._tickets = self._outstanding = 0
        self._mean_out = 0.0                    # tokens of a reply, running mean

    # ---- the backend protocol ----------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return self._outstanding > 0

    def submit(self, request: Request) -> int:
        """Queue `request.n` samples; returns their ticket at once."""
        if request.messages is None:
            raise ValueError("an Endpoint needs messages, not token ids")
        ticket, self._tickets = self._tickets, self._tickets + 1
        for sample in range(request.n):
            self._jobs.put((ticket, sample, request))
            self._outstanding += 1
            if len(self._threads) < min(self.workers, self._outstanding):
                thread = threading.Thread(target=self._work, daemon=True)
                self._threads.append(thread)
                thread.start()
        return ticket

    def step(self) -> list[tuple[int, int, Reply]]:
        """The replies that have landed (ticket, sample, reply); waits up to 50 ms for the first.

        Raises BadInput, in one sentence, when the server cannot answer at all.
        """
        landed = []
        with contextlib.suppress(Empty):
            while self._outstanding > 0:
                landed.append(self._done.get(timeout=0.001 if landed else 0.05))
                self._outstanding -= 1
        if self._dead and not landed:  # what was answered is handed out first
            self.close()
            raise BadInput(self._dead)
        return landed

    def close(self) -> None:
        """Drop what is queued. Requests on the wire end by themselves; their replies are not collected."""
        self._closed.set()
        self._outstanding = 0
        for _ in self._threads:  # wake those that wait for a job
            self._jobs.put(None)

    # ---- a worker ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, _Adapter())
            session.trust_env = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")
            while (job := self._jobs.get()) and not self._closed.is_set():
                ticket, sample, request = job
                reply = self._answer(session, self.body(request, sample))
                if reply and request.sampling.stop_at_box:
                    reply = cut_after_box(reply)
                if reply:
                    self._done.put((ticket, sample, reply))

    def _answer(self, session: requests.Session, body: dict) -> Reply | None:
        """Try until there is a reply; None when the endpoint is closed or dead."""
        estimate = sum(len(m["content"]) for m in body["messages"]) / 4
        estimate += self._mean_out or body["max_tokens"] / 2
        wait = 0.0
        for attempt in range(self.tries):
            if self._closed.wait(wait):
                return None
            if self._closed.wait(max(0.0, self.limiter.book(estimate) - time.monotonic())) or self._dead:
                return None
            used = 0
            try:
                reply = self._try(session, body)
                used = reply.tokens_in + reply.tokens_out
                return self._succeeded(reply)
            except _Refused as e:
                return self._failed(str(e), refused=True)
            except _Again as e:
                session.close()  # what still stands on the connection is nobody's answer
                self.limiter.pause(e.after)
                error, wait = str(e), min(60.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                if error == "no connection" and attempt == 2 and not self._answered:
                    break  # nobody has ever answered there
            except Exception as e:  # of a library, or our own: it costs this request, not the worker
                return self._failed(type(e).__name__)
            finally:
                self.limiter.correct(used - estimate)
        return self._failed(f"{error}, {attempt + 1} times")

    def _succeeded(self, reply: Reply) -> Reply:
        with self._lock:
            self._answered += 1
            self._failed_in_row = 0
            self._mean_out += (reply.tokens_out - self._mean_out) / min(100, self._answered)
        return reply

    def _failed(self, error: str, refused: bool = False) -> Reply | None:
        """The reply of a request that failed for good. Five in a row mean a dead server, and then there is no
        reply; refusals say so only before the first success, later ones are about their own prompt."""
        with self._lock:
            self._failed_in_row += not (refused and self._answered)
            alone = error.startswith("no connection") and not self._answered
            if not self._dead and (alone or self._failed_in_row >= GIVE_UP_AFTER):
                self._dead = (f"{self.url}, model {self.model!r}: {self._failed_in_row} requests failed in a "
                              f"row, the last with: {error}")
        return None if self._dead else Reply("", finish="error", error=error)

    def _try(self, session: requests.Session, body: dict) -> Reply:
        """One HTTP exchange, read to its end within the time-out and the size limit."""
        deadline = time.monotonic() + self.timeout
        try:
            with session.post(self.url, json=body, auth=self._sign, stream=True, allow_redirects=False,
                              timeout=(min(30.0, self.timeout), self.timeout)) as response:
                raw = bytearray()
                while block := response.raw.read1(65536, decode_content=True):
                    raw += block
                    if len(raw) > LARGEST:
                        raise _Refused(f"a response over {LARGEST >> 20} MB")
                    if time.monotonic() > deadline:
                        raise _Again("timeout")
        except (requests.Timeout, ReadTimeoutError):
            raise _Again("timeout") from None
        except HTTPError:  # urllib3's word for a body that ends early or cannot be unpacked
            raise _Again("connection reset") from None
        except requests.ConnectionError as e:
            reset = any(word in str(e) for word in ("reset", "aborted", "Disconnected", "timed out"))
            raise _Again("connection reset" if reset else "no connection") from None
        if response.status_code != 200:
            self._complain(response, raw)
        return read(raw)

    def _complain(self, response: requests.Response, raw: bytes) -> None:
        """Raise for a status that is not 200; note a server that will never answer."""
        status, said = response.status_code, self._said(raw)
        dead = None
        if status in AGAIN or status >= 500:
            raise _Again(f"HTTP {status}", _retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            said = "(its words are left out: they may quote the key)"
        if status in DEAD and not (status == 403 and self._answered):  # some answer 403 to a single prompt
            dead = f"the server {DEAD[status]} (HTTP {status}) {said}"
        elif 300 <= status < 400:
            dead = f"the server redirects to {response.headers.get('Location')}, use that address"
        if dead:
            self._dead = self._dead or f"{self.url}, model {self.model!r}: {dead}".strip()
        raise _Refused(f"HTTP {status} {said}".strip())

    def _said(self, raw: bytes) -> str:
        """The server's own words on an error, short, without our key."""
        text = raw[:2000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = json.loads(raw)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:200]

    def _sign(self, prepared):
        # As `auth` rather than as a header, so that a .netrc entry cannot replace it.
        if self._key:
            prepared.headers["Authorization"] = f"Bearer {self._key}"
        return prepared

    def body(self, request: Request, sample: int = 0) -> dict:
        """The JSON to post. Fields that are not at their neutral value only: servers refuse unknown ones."""
        s = request.sampling
        messages = [{"role": m["role"], "content": m["content"]} for m in request.messages]
        body = {"model": request.adapter or self.model, "messages": messages, "max_tokens": s.max_tokens,
                "temperature": s.temperature, "seed": s.seed + sample}
        others = {"top_p": (s.top_p, 1.0), "top_k": (s.top_k, 0), "stop": (list(s.stop), [])}
        body |= {name: value for name, (value, neutral) in others.items() if value != neutral}
        if messages and messages[-1]["role"] == "assistant":  # go on with it (vLLM's names)
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body


def read(raw: bytes) -> Reply:
    """The Reply in a response body; reasoning may come in its own field. Raises _Again without one."""
    try:
        data = json.loads(as_lines([json.loads(raw)]))  # half a surrogate becomes a question mark
        choice = data["choices"][0]
        message, usage = choice["message"], data.get("usage")
        text = message.get("content") or ""
        thinking = message.get("reasoning_content") or message.get("reasoning") or None
        written = len(text + (thinking or ""))  # TypeError for what is no text
    except IndexError:
        raise _Again("empty choices") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _Again("broken body") from None
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        finish = "refused"
    usage = usage if isinstance(usage, dict) else {}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    tokens_in, tokens_out, total = (n if isinstance(n, int) else 0 for n in map(usage.get, names))
    tokens_out = max(tokens_out, total - tokens_in)  # xAI counts hidden thinking in the total only
    return Reply(text, finish=finish, thinking=thinking, tokens_in=tokens_in,
                 tokens_out=tokens_out or written // 4)


def cut_after_box(reply: Reply) -> Reply:
    """The reply up to the end of the first line with an answer in a box, where a Sampler stops writing."""
    end = answered(reply.text)
    return replace(reply, text=reply.text[:end], finish="box") if end else reply


def _retry_after(value: str | None) -> float:
    """Seconds to wait from a Retry-After header, a number or an HTTP date; at most a day."""
    for read_as in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError):
            return min(86400.0, max(0.0, read_as(value)))
    return 0.0
