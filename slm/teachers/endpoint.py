"""Any OpenAI-compatible chat server (a teacher's API, vLLM, llama.cpp) behind the Sampler's protocol.

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct", workers=200)
    ticket = endpoint.submit(Request(messages=[{"role": "user", "content": "2 + 2?"}], n=4))
    while endpoint.pending:
        for ticket, sample, reply in endpoint.step(): ...

One thread and one HTTP session per worker, so `workers` requests are under way at once. A request is tried
again, with jittered exponential waits, after 408/409/425/429/5xx, a reset, a time-out, a broken body, an
answer that broke off or an empty one; all workers together honour a Retry-After header. The first failure of
each kind is told on stderr, in the server's words. What stays broken comes back as a Reply with finish
"error"; the tokens of all its tries are counted. A server that cannot answer at all (bad key, unknown model,
wrong address) raises BadInput. One that refuses a field gets its requests without it: see QUIRKS.

A request with continuations asks for one token and its likeliest rivals. A continuation's score is the
log-prob of its first token: itself, or two letters of it or more that begin no other one.

A Reply has token ids and log-probs if the server gives them: vLLM and SGLang for the fields logprobs and
return_token_ids, llama.cpp for logprobs. A request with token ids in place of messages goes to /completions.
If it has continuations too, the `logprobs` of its Reply are those of the given ids, from the second one on.

With stream=True replies come word by word, if the server can, and written(ticket) is what came so far. Then
they have no ids. Not covered: images, function calling. Imports no torch.
"""

import contextlib
import http.client
import json
import os
import random
import re
import sys
import threading
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError

from slm import BadInput
from slm.episode import Reply, Request
from slm.grading import answered
from slm.runs.files import as_lines
from slm.teachers.stream import joined

RIVALS = 20          # first tokens whose log-probs are asked for: the most that servers give
LARGEST = 8 * 2**20  # bytes of one response body; more is refused unread
AGAIN = {408, 409, 425, 429}
DEAD = {401: ", the server refused the key", 402: ", the server wants to be paid",
        403: ", the server refused the key", 404: ", the server knows no such model or address"}
UNPAID = re.compile("insufficient[_ ](quota|balance|credit)", re.I)  # comes with 429 or 500, means 402
GIVE_UP_AFTER = 5    # requests in a row that failed for good: the server counts as dead
PAID_TRIES = 3       # tries of one request that used tokens and gave no answer

# Why a text ended: our word -> servers' words. With any other word, such as error, abort or null, it broke
# off. A server that never gives a reason is believed.
ENDS = {"stop": "stop end_turn endturn eos eos_token stop_sequence stop_token complete completed",
        "length": "length max_tokens max_output_tokens model_length model_context_window_exceeded "
                  "context_length_exceeded repetition",
        "refused": "content_filter refusal safety sensitive recitation blocklist prohibited_content spii"}

# What a server says when it refuses a request -> the field to leave out, and its new name where it has one.
# The changed request is sent at once; if it is answered, all later ones are changed too.
_NOT = r"(un(support|known|recogni|expected)|n[o']t (be )?(support|permit|allow|recogni)|extra_forbidden)"
QUIRKS = {"max_completion_tokens": ("max_tokens", "max_completion_tokens"),
          **{rf"\b{field}\b.*{_NOT}|{_NOT}.*\b{field}\b": (field, None)
             for field in ("seed", "temperature", "top_p", "top_k", "stream", "stream_options", "logprobs",
                           "return_token_ids")},
          r"system role|role.{0,30}'system'|roles (must alternate|are supported)": ("system", "user")}


class _Failed(Exception):
    """A try without an answer. again: another one may get it, `after` seconds at the earliest. tokens: (in,
    out) that this one used. fatal: no request will be answered, unless one has been. quirks: see QUIRKS."""

    def __init__(self, cause: str, again: bool = True, after: float = 0.0, tokens: tuple[int, int] = (0, 0),
                 fatal: bool = False, quirks: frozenset = frozenset()):
        super().__init__(cause)
        self.again, self.after, self.tokens, self.fatal, self.quirks = again, after, tokens, fatal, quirks


class _Response(http.client.HTTPResponse):
    """Reads on behind interim answers (102, 103). Python's own class takes one for the answer, and the real
    answer for that of the next request on the connection."""

    def _read_status(self):
        version, status, reason = super()._read_status()
        while 101 < status < 200:
            http.client.parse_headers(self.fp)
            version, status, reason = super()._read_status()
        return version, status, reason


class _Adapter(HTTPAdapter):
    """requests over connections that read such responses."""

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = CONNECTIONS[pool.scheme]
        return pool


CONNECTIONS = {"http": type("Plain", (HTTPConnection,), {"response_class": _Response}),
               "https": type("Encrypted", (HTTPSConnection,), {"response_class": _Response})}


def open_session(url: str) -> requests.Session:
    """An HTTP session. A server on this machine is not looked for behind a proxy."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
    session.trust_env = urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
    return session


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
    fields: what every request carries if it says nothing else. The queue is unbounded: bound what you submit
    before you collect.
    """

    def __init__(self, base_url: str, model: str, key_env: str | None = None, *, workers: int = 32,
                 timeout: float = 600.0, tries: int = 8, backoff: float = 0.5,
                 requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0, stream: bool = False,
                 fields: dict | None = None):
        if "@" in urlsplit(base_url).netloc:
            raise BadInput("the endpoint's address holds a password; expected it in a variable that is named")
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
            raise BadInput(f"endpoint {base_url!r}: expected an address such as http://localhost:8000/v1")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.tries, self.backoff = model, timeout, tries, backoff
        self.fields = fields or {}
        self._key = os.environ.get(key_env, "").strip() if key_env else ""
        if key_env and not self._key:
            raise BadInput(f"{self.url}: the environment variable {key_env} is empty, expected its key in it")
        self.limiter = Limiter(requests_per_minute, tokens_per_minute)
        self.workers, self.stream = workers, stream
        self._streams: dict[int, bytearray] = {}  # ticket -> what has come of its reply
        self._threads: list[threading.Thread] = []
        self._jobs, self._done = SimpleQueue(), SimpleQueue()
        self._stopped = threading.Event()
        self._lock = threading.Lock()           # of answered, failed_in_row, mean_out, quirks, told
        self._quirks, self._told = frozenset(), set()
        self._dead: str | None = None
        self._answered = self._failed_in_row = self._tickets = self._outstanding = 0
        self._mean_out = 0.0                    # tokens of a reply, running mean

    # ---- the backend protocol ----------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        return self._outstanding > 0

    def submit(self, request: Request) -> int:
        """Queue `request.n` samples; returns their ticket at once."""
        ticket, self._tickets = self._tickets, self._tickets + 1
        for sample in range(request.n):
            self._jobs.put((ticket, sample, request))
            self._outstanding += 1
            if len(self._threads) < min(self.workers, self._outstanding):
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        return ticket

    def step(self) -> list[tuple[int, int, Reply]]:
        """The replies that have landed (ticket, sample, reply); waits up to 50 ms for the first.

        Raises BadInput, in one sentence, when the server cannot answer at all.
        """
        landed = []
        with contextlib.suppress(Empty):
            while self._outstanding > 0:
                ticket, sample, reply = self._done.get(timeout=0.001 if landed else 0.05)
                self._outstanding -= 1
                self._streams.pop(ticket, None)
                landed += [(ticket, sample, reply)] if reply else []
        if self._dead and not landed:  # what was answered is handed out first
            self.close()
            raise BadInput(self._dead)
        return landed

    def written(self, ticket: int) -> str:
        """What a stream has brought of a request's reply so far."""
        return "".join(c["message"]["content"] for c in joined(self._streams.get(ticket, b""))["choices"])

    def stop(self) -> None:
        """Send nothing more. Requests that wait are dropped, those on the wire still come back."""
        self._stopped.set()

    def close(self) -> None:
        """Drop what is queued. Requests on the wire end by themselves; their replies are not collected."""
        self.stop()
        self._outstanding = 0
        for _ in self._threads:  # wake those that wait for a job
            self._jobs.put(None)

    # ---- a worker ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        with open_session(self.url) as session:
            while job := self._jobs.get():
                ticket, sample, request = job
                reply = self._answer(session, self.body(request, sample), ticket)
                if reply and request.sampling.stop_at_box and request.ids is None:
                    reply = cut_after_box(reply)
                if reply and request.sampling.keep_stop and reply.text.endswith(request.sampling.stop):
                    reply = replace(reply, finish="stop_string")  # servers call it a stop
                if reply and request.continuations and request.ids is None:
                    reply = self._scored(reply, request.continuations)
                if reply or not self._dead:
                    self._done.put((ticket, sample, reply))

    def _answer(self, session: requests.Session, body: dict, ticket: int) -> Reply | None:
        """Try until there is a reply, which counts the tokens of all tries; None when stopped or dead."""
        estimate = len(body.get("prompt", ())) + sum(len(m["content"]) for m in body.get("messages", ())) / 4
        estimate += self._mean_out or body["max_tokens"] / 2
        quirks, tries, wait, spent, reply = self._quirks, 0, 0.0, [], None
        while not (reply or self._stopped.wait(wait)):
            if self._stopped.wait(max(0.0, self.limiter.book(estimate) - time.monotonic())) or self._dead:
                return None
            used = 0
            try:
                reply = self._try(session, suited(body, quirks), ticket)
                reply = self._succeeded(reply, body["max_tokens"], quirks)
                used = reply.tokens_in + reply.tokens_out
            except _Failed as e:
                used, wait, error = sum(e.tokens), 0.0, self._short(str(e))
                if e.quirks - quirks:
                    quirks |= e.quirks
                    continue
                session.close()  # what still stands on the connection is nobody's answer
                tries += 1
                spent += [e.tokens] if used else []
                if not e.again or tries == self.tries or len(spent) == PAID_TRIES or (
                        e.fatal and tries == 3 and not self._answered):
                    reply = self._failed(f"{error}, {tries} times" if e.again else error, e)
                else:
                    wait = min(60.0, self.backoff * 2**(tries - 1)) * random.uniform(0.5, 1.0)
                    self.limiter.pause(e.after)
                    self._tell(error, e.after)
            except Exception as e:  # of a library, or our own: it costs this request, not the worker
                reply = self._failed(type(e).__name__, _Failed(""))
            finally:
                self.limiter.correct(used - estimate)
        for paid in spent if reply else ():
            reply = replace(reply, tokens_in=reply.tokens_in + paid[0], tokens_out=reply.tokens_out + paid[1])
        return reply

    def _scored(self, reply: Reply, continuations: tuple[str, ...]) -> Reply | None:
        """The reply with the scores of the continuations. One that begins with none of the likeliest tokens
        gets the score of the last of these: it has no more. A server without log-probs counts as dead."""
        known = reply.scores
        if not known and (not reply.error or "logprobs" in reply.error):
            with self._lock:
                self._dead = (f"{self.url}, model {self.model!r}: no log-probs in its answers "
                              f"{reply.error or ''}; expected a server with top_logprobs, such as vLLM")
            return None
        if reply.error:
            return reply
        scores: dict[str, float] = {}
        for token in sorted(known, key=known.get):  # the likeliest one counts
            word = token.strip()
            begun = [words for words in continuations if words.startswith(word)]
            if word in continuations:
                scores[word] = known[token]
            elif len(begun) == 1 and len(word) > 1:  # "I" is a word of its own
                scores[begun[0]] = known[token]
        if not scores:
            lacks = f"none of {', '.join(continuations)} is among the {RIVALS} likeliest first tokens"
            return replace(reply, text="", finish="error", error=lacks, scores={})
        scores = {words: scores.get(words, min(known.values())) for words in continuations}
        return replace(reply, text="", finish="score", scores=scores)

    def _tell(self, error: str, pause: float = 0.0) -> None:
        """Print a note: of each kind of failure the first, of long pauses each."""
        kind = (time.monotonic() + pause) // 60 if pause >= 60 else error[:8]
        with self._lock:
            told = kind in self._told
            self._told.add(kind)
        if not told:
            more = f"; all requests wait {pause / 60:.0f} minutes, as it asks" if pause >= 60 else ""
            tqdm.write(f"note: {self.url}: {error}{more}", file=sys.stderr)

    def _succeeded(self, reply: Reply, most: int, quirks: frozenset) -> Reply:
        if reply.finish == "stop" and reply.tokens_out == most:
            reply = replace(reply, finish="length")  # some servers call each end a stop
        reply = replace(reply, tokens_out=reply.tokens_out or len(reply.text + (reply.thinking or "")) // 4)
        for field, name in quirks - self._quirks:
            self._tell(f"{field} is refused; requests go {f'with {name} instead' if name else 'without'}")
        with self._lock:
            self._quirks |= quirks
            self._answered += 1
            self._failed_in_row = 0
            self._mean_out += (reply.tokens_out - self._mean_out) / min(100, self._answered)
        return reply

    def _failed(self, error: str, failure: _Failed) -> Reply | None:
        """The reply of a request that failed for good. Five in a row mean a dead server, and then there is no
        reply; refusals say so only before the first success, later ones are about their own prompt."""
        with self._lock:
            self._failed_in_row += failure.again or not self._answered
            fatal = failure.fatal and not self._answered
            if not self._dead and (fatal or self._failed_in_row >= GIVE_UP_AFTER):
                series = "" if fatal else f"{self._failed_in_row} requests failed in a row, the last with: "
                self._dead = f"{self.url}, model {self.model!r}: {series}{error}"
        return None if self._dead else Reply("", finish="error", error=error)

    def _try(self, session: requests.Session, body: dict, ticket: int) -> Reply:
        """One HTTP exchange, read to its end within the time-out and the size limit."""
        deadline, raw = time.monotonic() + self.timeout, bytearray()
        url = self.url.replace("/chat/completions", "/completions") if "prompt" in body else self.url
        self._streams[ticket] = raw
        try:
            with session.post(url, json=body, auth=self._sign, stream=True, allow_redirects=False,
                              timeout=(min(30.0, self.timeout), self.timeout)) as response:
                while block := response.raw.read1(65536, decode_content=True):
                    raw += block
                    if len(raw) > LARGEST:
                        raise _Failed(f"a response over {LARGEST >> 20} MB", again=False)
                    if time.monotonic() > deadline:
                        raise _Failed("timeout")
        except (requests.Timeout, ReadTimeoutError):
            raise _Failed("timeout") from None
        except (requests.ConnectionError, HTTPError) as e:  # the second: a body ends early or is badly packed
            reset = isinstance(e, HTTPError) or re.search("reset|aborted|Disconnected|timed out", str(e))
            raise _Failed("connection reset" if reset else "no connection", fatal=not reset) from None
        if response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raw = json.dumps(joined(raw)).encode()
        return self._judge(response.status_code, response.headers, bytes(raw))

    def _judge(self, status: int, headers, raw: bytes) -> Reply:
        """The Reply in a response, or _Failed with what the server said. Behind a good answer, a status that
        speaks of the server, and not of the prompt, may pass too."""
        data, text = None, raw.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(as_lines([json.loads(raw)]))  # half a surrogate becomes a question mark
        meant, said = error_in(data) if data is not None else (0, text)
        status = meant if meant and status == 200 else status
        if status == 200 and data is not None:
            return read(data)
        if status == 200 and text.lstrip().startswith("<"):
            raise _Failed(f"a web page (is the address right?): {said}", fatal=True)
        if status == 200:
            raise _Failed(f"no JSON: {said}")
        quirks = frozenset(change for pattern, change in QUIRKS.items() if status in (400, 422, 500)
                           and re.search(pattern, text[:4000], re.I | re.S))
        status = 402 if status not in (400, 422) and UNPAID.search(text[:4000]) else status
        if status in (401, 403):
            said = "(its words are left out: they may quote the key)"
        elif 300 <= status < 400:
            said = f"it redirects to {headers.get('Location')}, use that address"
        fatal = status in DEAD or 300 <= status < 400
        again = status in AGAIN or status >= 500 or (fatal and self._answered > 0 and status != 403)
        raise _Failed(f"HTTP {status}{DEAD.get(status, '')} {said}", again,
                      _retry_after(headers.get("Retry-After")), fatal=fatal, quirks=quirks)

    def _short(self, text: str) -> str:
        """A server's words on one line, without our key and without tags."""
        for key in {self._key, quote(self._key, safe=""), json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(key, "***")
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^<>]*>", " ", text[:20_000])
        return " ".join(text.split())[:200]

    def _sign(self, prepared):
        # As `auth` rather than as a header, so that a .netrc entry cannot replace it.
        if self._key:
            prepared.headers["Authorization"] = f"Bearer {self._key}"
        return prepared

    def body(self, request: Request, sample: int = 0) -> dict:
        """The JSON to post. Fields that are not at their neutral value only: servers refuse unknown ones."""
        s = request.sampling
        messages = [{"role": m["role"], "content": m["content"]} for m in request.messages or ()]
        prompt = {"messages": messages} if request.ids is None else {"prompt": request.ids}
        body = {**self.fields, "model": request.adapter or self.model, **prompt, "max_tokens": s.max_tokens,
                "temperature": s.temperature, "seed": s.seed + sample}
        others = {"top_p": (s.top_p, 1.0), "top_k": (s.top_k, 0), "stop": (list(s.stop), [])}
        body |= {name: value for name, (value, neutral) in others.items() if value != neutral}
        body |= {"include_stop_str_in_output": True} if s.keep_stop else {}  # vLLM's name
        if self.stream and not request.continuations:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if request.continuations:
            asked = {"prompt_logprobs": 0} if request.ids else {"logprobs": True, "top_logprobs": RIVALS}
            body |= {"max_tokens": 1, "temperature": 1.0, **asked}
        if messages and messages[-1]["role"] == "assistant":  # go on with it (vLLM's names)
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body


def suited(body: dict, quirks: frozenset) -> dict:
    """The body as a server with these quirks wants it. Without a system role, its words open the question."""
    body = dict(body)
    for field, name in quirks:
        value = body.pop(field, None)
        body |= {name: value} if name and value is not None else {}
    system, *rest = body.get("messages") or [{"role": ""}]
    if ("system", "user") in quirks and system["role"] == "system" and rest:
        content = f"{system['content']}\n\n{rest[0]['content']}"
        body["messages"] = [rest[0] | {"content": content}, *rest[1:]]
    return body


def read(data) -> Reply:
    """The Reply in the JSON of a response; _Failed where there is none, or where it broke off. Thinking may
    come in a field of its own; if nothing else came, the server's parser took the answer for thinking."""
    tokens = (0, 0)
    try:
        tokens = _tokens(data.get("usage"))
        choice = data["choices"][0]
        message = {"content": choice["text"]} if "text" in choice else choice["message"]
        reason, told = choice.get("finish_reason", "stop"), told_tokens(data)
        text, thinking = _written(message.get("content"))
        thinking += "".join(_written(message.get("reasoning_content") or message.get("reasoning")))
        word = "refused" if message.get("refusal") else str(reason).lower()
    except IndexError:
        raise _Failed("empty choices", tokens=tokens) from None
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise _Failed("broken body", tokens=tokens) from None
    finish = next((ours for ours, words in ENDS.items() if word in (ours, *words.split())), None)
    if finish == "stop" and not text.strip():
        text, thinking = thinking, ""
    if finish is None:
        raise _Failed(f"the answer broke off, finish_reason {reason} {error_in(choice)[1]}", tokens=tokens)
    if finish == "stop" and not text.strip() and not told:
        raise _Failed("an empty answer", tokens=tokens)
    return Reply(text, finish=finish, thinking=thinking or None, tokens_in=tokens[0], tokens_out=tokens[1],
                 scores=first_tokens(choice), **told)


def told_tokens(data) -> dict:
    """prompt_ids, ids and logprobs of a Reply if the JSON of a response has both of these; or, where the
    log-probs of a prompt were asked for, the prompt_ids and theirs. Else nothing."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
        choice = data["choices"][0]
        prompt = list(choice.get("prompt_token_ids") or data.get("prompt_token_ids") or [])
        if given := choice.get("prompt_logprobs"):
            pairs = zip(prompt[1:], given[1:], strict=True)
            return {"prompt_ids": prompt, "logprobs": [float(row[str(i)]["logprob"]) for i, row in pairs]}
        rows = choice["logprobs"].get("content") or []
        ids = choice.get("token_ids") or [row["id"] for row in rows]
        logprobs = choice["logprobs"].get("token_logprobs") or [row["logprob"] for row in rows]
        if 0 < len(ids) == len(logprobs):
            return {"prompt_ids": prompt, "ids": list(map(int, ids)), "logprobs": list(map(float, logprobs))}
    return {}


def first_tokens(choice: dict) -> dict[str, float]:
    """The likeliest first tokens and their log-probs, if a server gives them."""
    with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):
        rivals = choice["logprobs"]["content"][0]["top_logprobs"]
        return {str(rival["token"]): float(rival["logprob"]) for rival in rivals}
    return {}


def _written(content) -> tuple[str, str]:
    """(text, thinking) of a content: a text, nothing, or a list of parts, which may hold parts themselves."""
    text = thinking = ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            text += "".join(_written(part.get("text")))
            thinking += "".join(_written(part.get("thinking") or part.get("reasoning")))
        else:
            text += part or ""
    return text, thinking


def _tokens(usage) -> tuple[int, int]:
    """(in, out) of a usage report; 0 for a count that cannot be one: none, below 0 or over ten million."""
    usage = usage if isinstance(usage, dict) else {}
    counts = map(usage.get, ("prompt_tokens", "completion_tokens", "total_tokens"))
    tokens_in, tokens_out, total = (int(n) if isinstance(n, int | float) and 0 <= n <= 10**7 else 0
                                    for n in counts)
    return tokens_in, max(tokens_out, total - tokens_in)  # xAI counts hidden thinking in the total only


def error_in(data) -> tuple[int, str]:
    """(status, words) of the error in a body's JSON, wherever a kind of server puts it; (0, "") without one.
    Behind OpenRouter's words stand those of the provider; MiniMax has base_resp, Google a list."""
    data = data[0] if isinstance(data, list) and data else data
    if not isinstance(data, dict) or data.get("choices"):
        return 0, ""
    error = next(filter(None, map(data.get, ("error", "message", "detail", "base_resp"))), "")
    if not isinstance(error, dict):
        return 500 if error else 0, str(error)
    words, code = error.get("message") or error.get("status_msg") or error, str(error.get("code"))
    return int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500, f"{words} {error.get('metadata', '')}"


def cut_after_box(reply: Reply) -> Reply:
    """The reply up to the end of the first line with an answer in a box, where a Sampler stops writing. If
    words are cut off, it has no ids any more: which of them these were can't be known without a tokenizer."""
    end = answered(reply.text)
    if not end:
        return reply
    told = {"ids": [], "logprobs": []} if reply.text[end:].strip() else {}
    return replace(reply, text=reply.text[:end], finish="box", **told)


def _retry_after(value: str | None) -> float:
    """Seconds to wait from a Retry-After header, a number or an HTTP date; at most a day."""
    for read_as in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError):
            return min(86400.0, max(0.0, read_as(value)))
    return 0.0
