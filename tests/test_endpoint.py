"""The promises of slm/teachers/endpoint.py, against small servers over real HTTP."""

import gzip
import json
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_server import QUIRKS, Faults, first, refuses, serve
from listening import Quiet, Server, listening

from slm import BadInput
from slm.backends import open_backend
from slm.episode import Request, Sampling, jobs_for, run_episodes
from slm.problems import load
from slm.teachers import endpoint
from slm.teachers.endpoint import Endpoint, Limiter, read
from slm.teachers.stream import joined
from slm.tiny.teacher import FAULTS, StandIn
from slm.workflows import solver

KEY = "sk-very-secret-0123456789"


def chat(text="hi", finish="stop", **message):
    return 200, {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


@contextmanager
def scripted(answer):
    """A server; answer(number of the request, body, headers) gives (status, JSON or bytes, headers?)."""
    seen, lock = [], threading.Lock()

    class Handler(Quiet):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append((time.monotonic(), body, dict(self.headers), self.path))
            status, reply, *headers = answer(number, body, self.headers)
            for interim in headers[0].pop("interim", ()) if headers else ():
                self.send_response_only(interim)
                self.send_header("Link", "</style.css>")
                self.end_headers()
            reply = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(reply), **(headers[0] if headers else {})}.items():
                if value is not None:
                    self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(reply)

    with listening(Server(Handler)) as server:
        yield server.url, seen


def ask(text="2 + 2?", n=1, **sampling):
    return Request([{"role": "user", "content": text}], Sampling(max_tokens=50, **sampling), n=n)


def collect(endpoint, *requests):
    """ticket -> replies in the order of their samples."""
    for request in requests:
        endpoint.submit(request)
    got = {}
    while endpoint.pending:
        for ticket, sample, reply in endpoint.step():
            assert (ticket, sample) not in got
            got[ticket, sample] = reply
    endpoint.close()
    return [got[key] for key in sorted(got)]


def quick(url, **options):
    return Endpoint(url, "m", **{"backoff": 0.01, **options})


def test_every_sample_comes_back_once_under_its_own_ticket_and_seed():
    with scripted(lambda n, body, _: chat(f"{body['messages'][0]['content']} {body['seed']}")) as (url, _):
        replies = collect(quick(url, workers=20), *(ask(str(i), n=3, seed=10) for i in range(40)))
    assert [r.text for r in replies] == [f"{i} {10 + k}" for i in range(40) for k in range(3)]
    assert {(r.tokens_in, r.tokens_out, r.finish, r.error) for r in replies} == {(7, 5, "stop", None)}


def test_the_body_is_the_chat_protocol_and_neutral_fields_stay_out():
    with scripted(lambda *_: chat()) as (url, seen):
        collect(quick(url + "/"), ask(temperature=0.7, seed=3), ask(top_p=0.9, top_k=5, stop=("\n\n",)))
    plain, full = sorted((body for _, body, *_ in seen), key=len)
    assert plain == {"model": "m", "messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 50,
                     "temperature": 0.7, "seed": 3}
    assert (full["top_p"], full["top_k"], full["stop"]) == (0.9, 5, ["\n\n"])
    assert seen[0][3] == "/v1/chat/completions"


def test_hundreds_are_under_way_at_once():
    at_once = threading.Barrier(200)

    def wait(*_):
        at_once.wait(60)  # passes only when 200 requests are here together
        return chat()

    with scripted(wait) as (url, _):
        assert len(collect(quick(url, workers=200), ask(n=400))) == 400


@pytest.mark.parametrize("trouble", [
    (429, {"error": "busy"}), (500, b"<html>oops</html>"), (503, b""), (408, b""), (200, b'{"choices":'),
    (200, {"choices": []}), (200, {"unexpected": 1}), (200, b"\xff\xfe\x00"),
    (200, {"choices": [{"message": None}]}), (200, b"cut short", {"Content-Length": 4000})])
def test_what_may_pass_is_tried_again(trouble):
    with scripted(lambda n, *_: trouble if n < 2 else chat("fine")) as (url, seen):
        reply, = collect(quick(url, timeout=2 if len(trouble) == 3 else 60), ask())
    assert reply.text == "fine" and len(seen) == 3


def test_waits_grow():
    with scripted(lambda n, *_: (500, b"") if n < 5 else chat()) as (url, seen):
        collect(quick(url, backoff=0.05), ask())
    times = [t for t, *_ in seen]
    waits = [b - a for a, b in pairwise(times)]
    assert all(0.5 * 0.05 * 2**k <= wait for k, wait in enumerate(waits)) and len(waits) == 5


@pytest.mark.parametrize("header", [lambda: "1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_honoured_by_all_workers(header):
    with scripted(lambda n, *_: (429, b"", {"Retry-After": header()}) if n == 0 else chat()) as (url, seen):
        endpoint = quick(url, workers=4)
        endpoint.submit(ask())
        while not seen or endpoint.limiter.next_request <= seen[0][0]:
            time.sleep(0.01)
        assert len(collect(endpoint, *(ask() for _ in range(8)))) == 9
    assert min(t for t, *_ in seen[1:]) - seen[0][0] >= 0.9


@pytest.mark.parametrize("header, seconds", [
    ("3", 3), ("-1", 0), ("soon", 0), (None, 0), ("inf", 86400), ("nan", 0), ("1e999", 86400)])
def test_a_strange_retry_after_does_not_hang_or_break_a_worker(header, seconds):
    assert endpoint._retry_after(header) == seconds


def test_requests_a_minute_are_kept():
    with scripted(lambda *_: chat()) as (url, seen):
        collect(quick(url, workers=30, requests_per_minute=1200), ask(n=30))
    times = sorted(t for t, *_ in seen)
    assert times[-1] - times[0] >= 29 * 0.05 * 0.95


def test_tokens_a_minute_are_kept_and_estimates_corrected():
    limiter = Limiter(tokens_per_minute=6000)  # 100 a second
    start = limiter.book(1000)
    limiter.correct(-900)                      # it used 100 only
    assert limiter.book(50) - start == pytest.approx(1.0)
    assert limiter.book(0) - start == pytest.approx(1.5)


def test_one_bad_reply_is_an_error_reply_with_its_cause():
    answer = lambda n, body, _: (400, {"error": {"message": "too long"}}) if "bad" in str(body) else chat()
    with scripted(answer) as (url, seen):
        good, bad, *rest = collect(quick(url, workers=1), ask("a"), ask("bad"), *(ask("b") for _ in range(8)))
    assert bad.finish == "error" and bad.error == "HTTP 400 too long" and bad.text == ""
    assert good.error is None and len(rest) == 8 and len(seen) == 10  # a refusal is not tried again


def test_a_mistake_of_ours_costs_one_request_and_no_worker(monkeypatch):
    monkeypatch.setattr(endpoint, "read", lambda data: 1 / 0 if "bad" in str(data) else read(data))
    with scripted(lambda n, body, _: chat(body["messages"][0]["content"])) as (url, _):
        replies = collect(quick(url, workers=1), ask("good"), ask("bad"), ask("good"))
    assert [r.error for r in replies] == [None, "ZeroDivisionError", None]


def test_a_long_series_of_refusals_after_success_is_not_a_dead_server():
    answer = lambda n, body, _: (400, b"no") if n else chat()
    with scripted(answer) as (url, _):
        replies = collect(quick(url, workers=1), *(ask() for _ in range(12)))
    assert [r.error is None for r in replies] == [True] + [False] * 11


@pytest.mark.parametrize("status, words", [(401, "refused the key"), (403, "refused the key"), (402, "paid"),
                                           (404, "no such model"), (307, "redirects")])
def test_a_dead_server_is_one_sentence_at_once(status, words, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    said = {"error": {"message": f"Incorrect API key provided: {KEY}."}}
    with scripted(lambda *_: (status, said, {"Location": "https://elsewhere/v1"})) as (url, seen):
        endpoint = quick(url, key_env="TEST_KEY", workers=4)
        with pytest.raises(BadInput, match=words) as caught:
            collect(endpoint, *(ask() for _ in range(500)))
    assert len(seen) <= 8 and KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert not endpoint.pending


def test_an_unknown_model_answered_with_400_ends_after_a_few():
    with scripted(lambda *_: (400, {"error": {"message": "model m does not exist"}})) as (url, seen):
        with pytest.raises(BadInput, match="does not exist"):
            collect(quick(url, workers=4), *(ask() for _ in range(500)))
    assert len(seen) < 20


def test_nobody_at_the_address():
    with pytest.raises(BadInput, match="no connection"):
        collect(quick("http://127.0.0.1:9/v1"), ask())


def test_the_key_travels_in_the_header_only(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    answer = lambda n, body, _: (400, {"error": {"message": f"key {KEY} cannot do this"}}) if n else chat()
    with scripted(answer) as (url, seen):
        endpoint = quick(url, key_env="TEST_KEY", workers=1)
        replies = collect(endpoint, ask(), ask())
    assert seen[0][2]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(replies) + str([body for _, body, *_ in seen])
    assert replies[1].error == "HTTP 400 key *** cannot do this"


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(BadInput, match="TEST_KEY"):
        Endpoint("http://localhost:1/v1", "m", "TEST_KEY")


def test_a_strange_address_is_refused_and_a_password_in_it_not_repeated():
    with pytest.raises(BadInput, match="localhost:8000/v1"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(BadInput) as caught:
        Endpoint(f"https://me:{KEY}@host/v1", "m")
    assert KEY not in str(caught.value)


def test_reasoning_in_its_own_field_and_other_shapes():
    body = lambda *args, **message: chat(*args, **message)[1]
    assert read(body("4", reasoning_content="two and two")).thinking == "two and two"
    assert read(body(None, "length", reasoning="hm")).text == "" and read(body("4")).thinking is None
    assert read(body("I won't", "content_filter")).finish == read(body("", refusal="no")).finish == "refused"
    assert read(body("cut", "length")).finish == "length"


def test_tokens_of_hidden_thinking_are_counted_as_they_are_billed():
    """xAI leaves them out of completion_tokens, OpenAI does not; both have them in total_tokens."""
    tokens = lambda **usage: read(chat()[1] | {"usage": usage}).tokens_out
    assert tokens(prompt_tokens=10, completion_tokens=2, total_tokens=329) == 319
    assert tokens(prompt_tokens=10, completion_tokens=319, total_tokens=329) == 319
    assert tokens(prompt_tokens=10, completion_tokens=5) == 5


@pytest.mark.parametrize("usage", [None, [1], "7", {}, {"prompt_tokens": "7", "completion_tokens": None}])
def test_a_paid_answer_with_strange_usage_is_an_answer(usage):
    with scripted(lambda *_: (200, chat("four" * 4)[1] | {"usage": usage})) as (url, _):
        reply, = collect(quick(url), ask())
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("four" * 4, 0, 4)


def test_a_server_that_dribbles_is_cut_off_in_time():
    class Slow(Quiet):
        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            while True:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

    start = time.monotonic()
    with listening(Server(Slow)) as server:
        reply, = collect(quick(server.url, timeout=0.4, tries=2), ask())
    assert reply.error == "timeout, 2 times" and time.monotonic() - start < 60  # its body takes forever


def test_replies_of_a_megabyte_and_none_of_eight():
    sizes = {"small": 2**20, "large": 9 * 2**20}
    with scripted(lambda n, body, _: chat("é" * (sizes[body["messages"][0]["content"]] // 6))) as (url, _):
        small, large, _ = collect(quick(url, workers=1), ask("small"), ask("large"), ask("small"))
    assert len(small.text) == 2**20 // 6 and large.error == "a response over 8 MB"


def test_workers_survive_a_server_that_does_everything_wrong():
    faults = Faults({}, {"busy": 0.05, "broken": 0.1, "reset": 0.1, "torn": 0.05, "empty": 0.05},
                    latency=0.01, retry_after=0.02)
    with serve(lambda body, rng: "größe 考える 🤔 " + body["messages"][0]["content"], faults) as server:
        replies = collect(quick(server.url, workers=50), *(ask(str(i)) for i in range(500)))
    assert [r.text for r in replies] == [f"größe 考える 🤔 {i}" for i in range(500)]


@pytest.mark.parametrize("text, cut, finish", [
    ("So \\boxed{\\frac{1}{2}} and \\boxed{3}.\nMore", "So \\boxed{\\frac{1}{2}} and \\boxed{3}.", "box"),
    ("So \\boxed{\\frac{1}{2}", None, "stop"), ("{no} box", None, "stop")])
def test_a_reply_ends_with_the_line_of_its_box_if_that_is_asked(text, cut, finish):
    with scripted(lambda *_: chat(text)) as (url, _):
        short, whole = collect(quick(url, workers=1), ask(stop_at_box=True), ask())
    assert (short.text, short.finish) == (cut or text, finish)
    assert (whole.text, whole.finish) == (text, "stop")


@pytest.mark.parametrize("interim", [[102], [103, 103], [100, 102, 103]])
def test_interim_answers_shift_no_reply_to_another_question(interim):
    def answer(number, body, headers):
        status, reply = chat("to " + body["messages"][0]["content"])
        return status, reply, {"interim": list(interim) if number % 3 else []}

    with scripted(answer) as (url, seen):
        replies = collect(quick(url, workers=2), *(ask(str(i)) for i in range(30)))
    assert [group[0].text if isinstance(group, list) else group.text for group in replies] == [
        f"to {i}" for i in range(30)]
    assert len(seen) == 30


# ---- the quirks of servers -------------------------------------------------------------------------------

def one_two(body, rng):
    return "one two"


def ask_quirky(quirk, count=1, **options):
    """(replies, bodies): what a server with this quirk answered to one request after another, and got."""
    with serve(one_two, quirk=quirk) as server:
        requests = [Request([{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{i}?"}],
                            Sampling(50, 0.7, seed=i)) for i in range(count)]
        return collect(quick(server.url, workers=1, **options), *requests), server.bodies


@pytest.mark.parametrize("quirk, field, name", [
    ("no seed", "seed", None), ("no seed, as Mistral says it", "seed", None),
    ("no seed, as Google says it", "seed", None), ("no seed, as LiteLLM says it", "seed", None),
    ("max_completion_tokens", "max_tokens", "max_completion_tokens"), ("temperature 1", "temperature", None)])
def test_a_server_that_refuses_a_field_gets_its_requests_without_it(quirk, field, name, capsys):
    replies, bodies = ask_quirky(quirk, 5)
    assert [r.text for r in replies] == ["one two"] * 5
    assert [field in body for body in bodies] == [True] + [False] * 5  # asked once, then known
    assert [set(body) for body in bodies[1:]] == [set(bodies[0]) - {field} | {name} - {None}] * 5
    assert not name or [body[name] for body in bodies[1:]] == [50] * 5
    assert capsys.readouterr().err.count(f"{field} is refused; requests go with") == 1


@pytest.mark.parametrize("quirk", ["no system role", "no system role, as OpenAI says it"])
def test_a_server_without_a_system_role_gets_its_words_with_the_question(quirk):
    replies, bodies = ask_quirky(quirk, 3)
    assert [r.text for r in replies] == ["one two"] * 3 and len(bodies) == 4
    assert [body["messages"] for body in bodies[1:]] == [
        [{"role": "user", "content": f"Be kind.\n\n{i}?"}] for i in range(3)]


def test_a_refusal_that_only_quotes_the_prompt_changes_no_other_request():
    """The words look like a refusal of the temperature, but the request without it fares no better."""
    def quirk(number, body, reply):
        if "0?" in str(body["messages"]):
            return 400, {"error": {"message": "unsupported topic: The temperature is unknown"}}
    replies, bodies = ask_quirky(quirk, 3)
    assert [r.finish for r in replies] == ["error", "stop", "stop"]
    assert ["temperature" in body for body in bodies] == [True, False, True, True]


def test_a_passing_failure_that_sounds_like_a_refusal_is_no_quirk():
    replies, bodies = ask_quirky(first(2, 500, {"error": "unexpected system error, the seed is unknown"}), 2)
    assert [r.text for r in replies] == ["one two"] * 2 and len(bodies) == 4
    assert [body["messages"][0]["role"] for body in bodies] == ["system"] * 4


@pytest.mark.parametrize("quirk, words", [
    ("error in 200", "HTTP 502 upstream is gone"), ("error and no choices", "HTTP 500 model is unloaded"),
    ("loading", "HTTP 503 Loading model"), ("busy provider", "z-ai/glm is temporarily rate-limited upstream"),
    ("MiniMax is busy", "HTTP 500 rate limit"), ("detail", "HTTP 500 the engine is down"),
    ("page of a proxy", "HTTP 502 502 Bad Gateway")])
def test_what_may_pass_is_tried_again_and_told_in_the_servers_words(quirk, words, capsys):
    replies, bodies = ask_quirky(quirk, 2)
    assert [r.text for r in replies] == ["one two"] * 2 and len(bodies) == 4
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and words in said
    (failed,), _ = ask_quirky(quirk, tries=2)
    assert words in failed.error and failed.error.endswith(", 2 times") and failed.finish == "error"


def test_a_web_page_is_no_server():
    with pytest.raises(BadInput, match=r"web page \(is the address right\?\): Welcome to nginx!, 3 times"):
        ask_quirky("web page", 20)


def test_no_money_is_not_waited_for():
    """OpenAI sends 429 with this code, which no waiting mends."""
    with pytest.raises(BadInput, match="wants to be paid You exceeded your current quota"):
        ask_quirky("no money", 20)


@pytest.mark.parametrize("reason", ["error", "abort", None, "", "network_error", "tool_calls",
                                    "insufficient_system_resource"])
def test_a_text_that_broke_off_is_never_kept_and_its_tokens_are_counted(reason):
    (reply,), bodies = ask_quirky(f"ends with {reason}")
    assert (reply.text, reply.finish) == ("", "error") and f"broke off, finish_reason {reason}" in reply.error
    assert len(bodies) == 3 and reply.tokens_out == 3 * 1 and reply.tokens_in > 3 * 20  # three tries are paid


def test_a_text_that_broke_off_is_asked_for_again(capsys):
    (reply,), bodies = ask_quirky("breaks off twice")
    assert (reply.text, reply.finish, reply.tokens_out) == ("one two", "stop", 3) and len(bodies) == 3
    assert "finish_reason error provider died" in capsys.readouterr().err


@pytest.mark.parametrize("reason, finish", [("length", "length"), ("model_length", "length"),
                                            ("max_tokens", "length"), ("sensitive", "refused"),
                                            ("model_context_window_exceeded", "length")])
def test_other_words_for_a_limit_and_for_a_refusal(reason, finish):
    (reply,), bodies = ask_quirky(f"ends with {reason}")
    assert (reply.text, reply.finish, reply.error, len(bodies)) == ("one", finish, None, 1)


def test_a_server_that_never_gives_a_reason_is_believed():
    assert read({"choices": [{"message": {"content": "4"}}]}).finish == "stop"


@pytest.mark.parametrize("quirk, text, thinking, finish", [
    ("parts", "one two", "hm", "stop"), ("strings", "one two", None, "stop"),
    ("reasoning only", "one two", None, "stop"), ("reasoning only, cut", "", "half", "length")])
def test_content_in_parts_and_in_the_wrong_field_is_read(quirk, text, thinking, finish):
    (reply,), bodies = ask_quirky(quirk)
    assert (reply.text, reply.thinking, reply.finish, len(bodies)) == (text, thinking, finish, 1)


def test_an_empty_answer_gets_another_try():
    (reply,), bodies = ask_quirky("empty twice")
    assert (reply.text, len(bodies)) == ("one two", 3)
    (reply,), bodies = ask_quirky("always empty")
    assert (reply.error, len(bodies)) == ("an empty answer, 3 times", 3)


@pytest.mark.parametrize("quirk", ["negative usage", "absurd usage"])
def test_a_count_that_cannot_be_one_is_replaced_by_an_estimate(quirk):
    (reply,), _ = ask_quirky(quirk)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("one two", 0, 1)


def test_a_text_as_long_as_allowed_was_cut_whatever_the_server_says():
    (reply,), _ = ask_quirky("ends at the limit")
    assert (reply.finish, reply.tokens_out) == ("length", 50)


def test_a_long_pause_is_told_and_stop_ends_it(capsys):
    with serve(one_two, quirk="an hour") as server:
        endpoint = quick(server.url, workers=4)
        for _ in range(20):
            endpoint.submit(ask())
        landed, said = [], ""
        while "wait 60 minutes" not in said:  # the others of the first four may be answered meanwhile
            landed += endpoint.step()
            said += capsys.readouterr().err
        assert endpoint.pending
        endpoint.stop()
        while endpoint.pending:
            landed += endpoint.step()
    assert len(landed) < 20 and said.count("note: ") == 1 and "HTTP 429 quota of this hour" in said
    endpoint.close()


@pytest.mark.parametrize("status", [404, 301, 401, 402])
def test_one_bad_status_after_good_answers_is_tried_again_but_not_for_ever(status):
    away = lambda n, *_: (status, {"error": "gone"}) if n == 30 else chat()
    with scripted(away) as (url, seen):
        assert len(collect(quick(url, workers=1), ask(n=40))) == 40 and len(seen) == 41
    gone = lambda n, *_: (status, {"error": "gone"}) if n >= 30 else chat()
    with scripted(gone) as (url, seen):
        with pytest.raises(BadInput, match=f"5 requests failed in a row, the last with: HTTP {status}"):
            collect(quick(url, workers=1, tries=2), ask(n=40))
    assert len(seen) == 30 + 5 * 2


@pytest.mark.parametrize("place", ["in the words", "at a cut", "behind blanks", "in JSON", "in the address"])
def test_no_part_of_the_key_is_told(place, monkeypatch, capsys):
    """Words are cut: a key that lies across must not leave its first half."""
    monkeypatch.setenv("TEST_KEY", "sk/secret+0123456789")
    said = {"in the words": b"the key is sk/secret+0123456789", "in the address": b"",
            "at a cut": b"x " * 90 + b"sk/secret+0123456789 " * 1000,
            "behind blanks": b" " * 1988 + b"sk/secret+0123456789" + b" " * 17_992 + b"sk/secret+0123456789",
            "in JSON": b'{"detail": ["sk\\/secret+0123456789"]}'}[place]
    header = {"Location": "https://elsewhere/v1?key=sk%2Fsecret%2B0123456789&again=sk/secret+0123456789"}
    status = 301 if place == "in the address" else 400
    with scripted(lambda *_: (status, said, header)) as (url, _):
        with pytest.raises(BadInput) as caught:
            collect(quick(url, workers=1, key_env="TEST_KEY"), *(ask() for _ in range(10)))
    told = str(caught.value) + capsys.readouterr().err
    assert "***" in told and "secret" not in told and "sk" not in told


def test_every_quirk_of_the_server_is_met_by_a_test():
    text = Path(__file__).read_text() + Path(__file__).with_name("test_make_data.py").read_text()
    for name in QUIRKS:
        assert f'"{name}"' in text or name.startswith("ends with "), f"no test has the quirk {name}"


def test_packed_and_chunked_bodies_are_read():
    packed = gzip.compress(json.dumps(chat("größe " * 5000)[1]).encode())
    chunks = [packed[i:i + 7] for i in range(0, len(packed), 7)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    headers = {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip", "Content-Length": None}
    with scripted(lambda *_: (200, body, headers)) as (url, seen):
        first, second = collect(quick(url, workers=1), ask(n=2))
    assert first.text == second.text == "größe " * 5000 and len(seen) == 2


def test_close_drops_the_queue_and_ends_the_threads():
    closed = threading.Event()
    with scripted(lambda *_: (closed.wait(60), chat())[1]) as (url, seen):
        endpoint = quick(url, workers=2)
        for _ in range(50):
            endpoint.submit(ask())
        while len(seen) < 2:
            time.sleep(0.01)
        endpoint.close()
        closed.set()
        for thread in endpoint._threads:
            thread.join(60)
    assert not endpoint.pending and len(seen) == 2 and not any(t.is_alive() for t in endpoint._threads)


def test_the_stand_in_teacher_replies_as_a_server_with_its_answers_and_faults_would():
    system = {"role": "system", "content": "Think in about 500 tokens."}
    requests = [Request([system, {"role": "user", "content": p.question}], Sampling(500, 0.7, seed=i), n=2)
                for i, p in enumerate(load("tiny", "train", 100))]
    stand_in = collect(StandIn("careless"), *requests)
    with serve(faults=Faults({name: rate for name, rate in FAULTS.items() if name})) as server:
        assert stand_in == collect(Endpoint(server.url, "careless", workers=4), *requests)
    assert stand_in == collect(StandIn("careless"), *requests)
    assert {reply.finish for reply in stand_in} == {"stop", "length", "refused"}


def test_a_workflow_runs_against_a_server_unchanged():
    problems = load("tiny", "test", 5)
    with serve() as server:
        episodes = run_episodes(jobs_for(problems, solver), Endpoint(server.url, "perfect"))
    assert all("\\boxed" in e.response for e in episodes)


# ---- token ids and log-probs -----------------------------------------------------------------------------

TOLD = [("hi", 5, -0.5), ("!", 6, -0.25), ("<end>", 2, -0.125)]  # token, id, log-prob
CONTENT = [{"token": token, "logprob": logprob, "bytes": list(token.encode())} for token, _, logprob in TOLD]
IDS = [i for _, i, _ in TOLD]


@pytest.mark.parametrize("choice, top, prompt", [
    ({"logprobs": {"content": CONTENT}, "token_ids": IDS}, {"prompt_token_ids": [1, 7]}, [1, 7]),  # vLLM
    ({"logprobs": {"content": CONTENT}, "token_ids": IDS, "prompt_token_ids": [1, 7]}, {}, [1, 7]),  # SGLang
    ({"logprobs": {"content": [c | {"id": i} for c, i in zip(CONTENT, IDS)]}}, {}, []),  # llama.cpp
], ids=["vllm", "sglang", "llama.cpp"])
def test_a_reply_has_the_ids_and_log_probs_that_the_server_gives(choice, top, prompt):
    answer = lambda *_: (200, {**top, "choices": [{"message": {"content": "hi!"}, **choice}]})
    with scripted(answer) as (url, seen):
        fields = {"logprobs": True, "return_token_ids": True}
        reply, = collect(quick(url, fields=fields), ask(temperature=0.7))
    assert (reply.text, reply.ids, reply.logprobs) == ("hi!", IDS, [-0.5, -0.25, -0.125])
    assert reply.prompt_ids == prompt
    assert fields.items() <= seen[0][1].items() and reply.tokens_out == 3


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": {"content": CONTENT}},
                                    {"logprobs": {"content": CONTENT[:1]}, "token_ids": IDS},
                                    {"logprobs": {"content": "x"}, "token_ids": IDS}])
def test_without_both_a_reply_has_neither(choice):
    answer = lambda *_: (200, {"choices": [{"message": {"content": "hi!"}, **choice}]})
    with scripted(answer) as (url, _):
        reply, = collect(quick(url), ask())
    assert (reply.text, reply.ids, reply.logprobs, reply.prompt_ids) == ("hi!", [], [], [])


def test_a_server_that_knows_no_token_ids_is_asked_without_them():
    def answer(number, body, headers):
        if "return_token_ids" in body:
            return 400, {"error": {"message": "Unrecognized request argument supplied: return_token_ids"}}
        return chat()
    with scripted(answer) as (url, seen):
        replies = collect(quick(url, workers=1, fields={"return_token_ids": True}), ask(n=3))
    assert [r.text for r in replies] == ["hi"] * 3 and len(seen) == 4


def test_token_ids_go_out_as_they_are_and_a_reply_of_the_stop_token_alone_is_one():
    choice = {"text": "", "finish_reason": "stop", "token_ids": [2], "prompt_token_ids": [5, 6],
              "logprobs": {"token_logprobs": [-0.5]}}
    with scripted(lambda *_: (200, {"choices": [choice]})) as (url, seen):
        reply, = collect(quick(url), Request(None, Sampling(9, 0.7, seed=4), "the-adapter", ids=[5, 6]))
    _, body, _, path = seen[0]
    assert path == "/v1/completions" and body == {"model": "the-adapter", "prompt": [5, 6], "max_tokens": 9,
                                                  "temperature": 0.7, "seed": 4}
    assert (reply.ids, reply.logprobs, reply.prompt_ids, reply.finish) == ([2], [-0.5], [5, 6], "stop")


def test_given_ids_are_scored_from_the_second_on():
    choice = {"text": "x", "finish_reason": "length", "prompt_token_ids": [5, 6, 7], "prompt_logprobs": [
        None, {"6": {"logprob": -0.5, "rank": 2}, "9": {"logprob": -0.25}}, {"7": {"logprob": -1.5}}]}
    with scripted(lambda *_: (200, {"choices": [choice]})) as (url, seen):
        reply, = collect(quick(url), Request(ids=[5, 6, 7], continuations=("any",)))
    assert reply.logprobs == [-0.5, -1.5] and reply.ids == []
    assert seen[0][1]["prompt_logprobs"] == 0 and seen[0][1]["max_tokens"] == 1


@pytest.mark.parametrize("text, kept", [("so \\boxed{4}.\n", True), ("so \\boxed{4}.\nAnd on", False)])
def test_a_reply_that_is_cut_after_its_box_has_no_ids_that_its_text_lacks(text, kept):
    answer = lambda *_: (200, {"choices": [{"message": {"content": text}, "token_ids": IDS,
                                            "logprobs": {"content": CONTENT}}]})
    with scripted(answer) as (url, _):
        reply, = collect(quick(url), ask(stop_at_box=True))
    assert (reply.finish, reply.text.strip(), reply.ids) == ("box", "so \\boxed{4}.", IDS if kept else [])


def test_evaluations_ask_a_server_for_token_ids():
    options = SimpleNamespace(endpoint="http://localhost:1/v1", model="m", key_env=None)
    endpoint, _ = open_backend(options)
    assert endpoint.body(ask()).items() >= {"logprobs": True, "return_token_ids": True}.items()
# ---- word by word ------------------------------------------------------------------------------------------

def streaming(**more):
    go_on = threading.Event()
    return {"wait": go_on, **more}, go_on


def test_a_stream_is_told_as_it_comes_and_counts_like_any_reply():
    streams, go_on = streaming()
    with serve(lambda *_: "größer − \u2028 als 5", streams=streams) as server:
        there = quick(server.url, stream=True)
        ticket, parts = there.submit(ask()), []
        while there.pending:
            landed = there.step()
            parts.append(there.written(ticket))
            if len(parts[-1]) > 6:
                go_on.set()
    (_, _, reply), = landed
    assert (reply.text, reply.finish, reply.tokens_out) == ("größer − \u2028 als 5", "stop", 4)
    assert 6 < max(map(len, parts)) < len(reply.text) and all(reply.text.startswith(part) for part in parts)
    assert there.written(ticket) == ""  # nothing is kept of it


@pytest.mark.parametrize("quirk", [None, refuses("stream", 400, {"error": {
    "message": "Unsupported parameter: 'stream' is not supported"}})])
def test_of_a_server_that_cannot_stream_the_reply_is_taken_whole(quirk):
    with serve(lambda *_: "whole", quirk=quirk) as server:
        reply, = collect(quick(server.url, stream=True), ask())
    assert reply.text == "whole"


def test_a_stream_that_breaks_off_is_asked_for_again_and_an_error_in_it_is_said(capsys):
    streams, go_on = streaming(cut=1)
    go_on.set()
    with serve(lambda *_: "the whole answer", streams=streams) as server:
        reply, = collect(quick(server.url, stream=True), ask())
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert reply.text == "the whole answer" and "broke off" in capsys.readouterr().err
    error = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: {"error": {"message": "gone"}}\n\n'
    assert endpoint.error_in(joined(error)) == (500, "gone ")


@pytest.mark.parametrize("event", [b"5", b"null", b"[1]", b"[" * 9999, b'{"choices": [null]}',
                                   b'{"choices": 7}', b'{"choices": [{"delta": [1]}]}',
                                   b'{"choices": [{"delta": {"content": [1]}}]}'])
def test_a_strange_event_is_left_out(event):
    said = b'data: {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}\n\n'
    assert read(joined(b"data: " + event + b"\n\n" + said + b'data: {"cho')).text == "yes"
