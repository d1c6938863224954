"""The promises of slm/rollouts, against a small server with our own model behind vLLM's addresses."""

import json
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from served import PAGE, RESET, serve
from test_train_grpo import odd, train, untimed

import train_grpo
from slm import BadInput, checkpoint, lora, losses, rewards
from slm.episode import Request, Sampling, jobs_for, run_episodes, user
from slm.formats import lora_files
from slm.problems import load
from slm.prompts import SOLVER
from slm.rollouts import Rollouts, remote
from slm.sampling import Sampler
from slm.teachers import Endpoint
from slm.workflows import solver


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pictures, an easy reward, and waits of milliseconds."""
    monkeypatch.setattr(train_grpo, "write_report", lambda out: out / "report.html")
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    monkeypatch.setattr(remote, "Endpoint", partial(Endpoint, backoff=0.001))
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "PATIENCE", (0.2, 20.0))


def policy(folder="tiny", *names):
    """A model with adapters that are not at their start, and its tokenizer."""
    model, tokenizer = checkpoint.load(folder)
    for seed, name in enumerate(names or ("default",)):
        lora.add(model, 4, 8, name=name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in lora.parameters(model, name):
                p.normal_(std=0.01)
    return model, tokenizer


def collect(backend, requests):
    tickets, found = [backend.submit(request) for request in requests], {}
    while backend.pending:
        found |= {(ticket, sample): reply for ticket, sample, reply in backend.step()}
    return [found[key] for key in sorted(found, key=lambda key: (tickets.index(key[0]), key[1]))]


@contextmanager
def opened(model, tokenizer, folder, **how):
    with serve("tiny", **how) as served:
        rollouts = Rollouts(model, tokenizer, served.url, folder)
        yield served, rollouts
        rollouts.close()
        assert not served.loaded and not any(folder.iterdir())


def alike(a, b):
    """Two replies, up to the rounding of log-probs."""
    for name in ("text", "ids", "finish", "prompt_ids", "error", "tokens_in", "tokens_out"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert a.scores == pytest.approx(b.scores, abs=1e-4)


# ---- the protocol ----------------------------------------------------------------------------------------

def test_replies_of_a_server_are_those_of_our_own_sampler(tmp_path):
    """Greedy and drawn, with every end of a reply, in a conversation, with scores."""
    model, tokenizer = policy()
    question = [user(SOLVER(question=load("tiny", "test", 1)[0].question))]
    prompt, text = tokenizer.chat(question), tokenizer.encode("The answer is \\boxed{11}.\nIt is 11.")
    ids, mask = prompt + text + [tokenizer.end_of_turn], [0] * len(prompt) + [1] * (len(text) + 1)
    optimizer = torch.optim.Adam(lora.parameters(model), lr=0.01)
    for _ in range(15):  # until it boxes its answer and goes on
        logp, _ = losses.score(model, [ids], [mask])
        (-logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    requests = [Request(question, Sampling(40, stop_at_box=True)), Request(question, Sampling(40)),
                Request(question, Sampling(5)), Request(question, Sampling(40, 0.7, seed=3), n=3),
                Request(question, Sampling(40, stop=("\n",), keep_stop=True)),
                Request(question, Sampling(40, stop=(".",))),
                Request(question, continuations=("Yes", "No, it is not"))]
    with opened(model, tokenizer, tmp_path) as (served, rollouts):
        rollouts.refresh(0.7)
        ours, theirs = collect(Sampler(model, tokenizer), requests), collect(rollouts, requests)
        assert len(ours) == len(theirs) == 9 and {"box", "stop", "length", "stop_string", "score"} == {
            reply.finish for reply in ours}
        for a, b in zip(ours, theirs):
            alike(a, b)
        talk = Request([*question, theirs[1].message(), user("And twice that?")], Sampling(9))
        alike(*collect(Sampler(model, tokenizer), [talk]), *collect(rollouts, [talk]))
        before = theirs[1].prompt_ids + theirs[1].ids
        assert served.of("completions")[-1]["prompt"][:len(before)] == before
        told = load("tiny", "test", 2)
        a, b = (run_episodes(jobs_for(told, solver), backend, sampling=Sampling(40, stop_at_box=True))
                for backend in (Sampler(model, tokenizer), rollouts))
        assert [(e.answer, *(r.ids for r in e.records())) for e in a] == [
            (e.answer, *(r.ids for r in e.records())) for e in b]


def test_a_request_leaves_nothing_to_the_defaults_of_the_server(tmp_path):
    """vLLM takes what is left out from the model's generation_config.json: a repetition penalty, for one."""
    model, tokenizer = policy()
    with opened(model, tokenizer, tmp_path) as (served, rollouts):
        rollouts.refresh(1.0)
        collect(rollouts, [Request([user("2 + 2?")], Sampling(3, 0.7, seed=5))])
    body = served.of("completions")[-1]
    assert body | {"prompt": 0, "model": 0} == {
        "prompt": 0, "model": 0, "max_tokens": 3, "temperature": 0.7, "seed": 5, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "return_token_ids": True,
        "stop_token_ids": sorted(tokenizer.stop_ids)}


def test_each_role_is_served_by_its_own_adapter_and_the_others_by_the_base(tmp_path):
    model, tokenizer = policy("tiny", "solver", "checker")
    requests = [Request([user("2 + 2?")], Sampling(12), name) for name in ("solver", "checker", None)]
    with opened(model, tokenizer, tmp_path) as (served, rollouts), lora.off(model):
        rollouts.refresh(1.0)
        ours, theirs = collect(Sampler(model, tokenizer), requests), collect(rollouts, requests)
    for a, b in zip(ours, theirs):
        alike(a, b)
    assert len({tuple(reply.logprobs) for reply in theirs}) == 3
    names = sorted(body["model"] for body in served.of("completions")[-3:])
    assert names[0] == "base" and "-checker-" in names[1] and "-solver-" in names[2]


def test_a_prompt_longer_than_the_server_holds_is_refused_as_the_sampler_does(tmp_path):
    model, tokenizer = policy()
    with opened(model, tokenizer, tmp_path, context=90) as (_, rollouts):
        rollouts.refresh(1.0)
        with pytest.raises(BadInput, match=r"a prompt of \d+ tokens; expected fewer than 90"):
            rollouts.submit(Request([user("2 + 2? " * 60)]))
        reply, = collect(rollouts, [Request([user("2 + 2?")], Sampling(500, 1.0))])
    assert len(reply.prompt_ids + reply.ids) <= 90 and not reply.error


# ---- a run -----------------------------------------------------------------------------------------------

def metrics(rows, *without):
    return [{k: v for k, v in row.items() if k not in ("canary", "dlogp", "dlogp_max", "importance",
                                                       "importance_max", *without)} for row in untimed(rows)]


def close(a, b):
    for one, two in zip(a, b, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_a_run_on_a_server_takes_the_same_steps_and_leaves_the_server_as_it_was(small, tmp_path):
    whole = train(small, tmp_path / "own", "--evaluate", "3", "--kl", "0.1", steps=2)
    with serve(small) as served:
        words = "--rollouts", served.url, "--evaluate", "3", "--kl", "0.1"
        rows = train(small, tmp_path / "run", *words, steps=2)
    close(metrics(whole), metrics(rows))
    assert all(row["canary"] < 1e-5 and row["dlogp_max"] < 1e-4 for row in rows if row["step"])
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert settings["importance_cap"] == 2 and settings["rollouts"] == served.url
    assert not served.loaded and not any((tmp_path / "run" / "rollouts").iterdir())
    loads = [body["lora_name"] for body in served.of("load_lora_adapter")]
    assert len(loads) == len(set(loads)) == 2 + 3  # before each sampling and each evaluation
    assert [body["lora_name"] for body in served.of("unload_lora_adapter")] == loads
    a, b = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("own", "run"))
    assert all((a[k] - b[k]).norm() < 1e-3 * a[k].norm() for k in a)


def test_the_gradient_is_weighted_by_the_servers_log_probs(small, tmp_path):
    with serve(small, shift=-0.1) as served:
        rows = train(small, tmp_path / "run", "--rollouts", served.url, steps=1)
        plain = train(small, tmp_path / "off", "--rollouts", served.url, "--importance-cap", "0", steps=1)
    assert rows[0]["dlogp"] == pytest.approx(0.1, abs=1e-4)
    assert rows[0]["importance"] == pytest.approx(1.10517, abs=1e-3)
    assert rows[0]["grad_norm"] == pytest.approx(1.10517 * plain[0]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_on_a_server_take_the_same_steps_as_one(small, tmp_path):
    words = ["--data", "tiny", "--limit", "12", "--batch", "3", "--samples", "4", "--steps", "2", "--device",
             "cpu", "--max-tokens", "9", "--evaluate", "2", "--model", small, "--reward", "correct:0,random"]
    script = Path(train_grpo.__file__)
    with serve(small) as served:
        for ranks in ("1", "2"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, str(script)]
            subprocess.run([*launch, *words, "--rollouts", served.url, "--out", str(tmp_path / ranks)],
                           check=True, cwd=script.parent, capture_output=True)
    one, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
                for n in ("1", "2"))
    assert any(row.get("grad_norm") for row in one)
    close(metrics(one), metrics(two))
    assert len(served.of("load_lora_adapter")) == 2 * (2 + 3) and not served.loaded


# ---- what the canaries stop ------------------------------------------------------------------------------

@pytest.mark.parametrize("how, words", [
    ({"stale": True}, "like those of an earlier adapter"),
    ({"raw": True}, "like those of temperature 1 (vLLM needs --logprobs-mode processed_logprobs)"),
    ({"hot": 1 / 0.7}, "like those of temperature 1"), ({"hot": 3.0}, "its log-probs are "),
    ({"shift": 0.3}, "another base model or adapter")])
def test_a_server_with_another_distribution_stops_the_run(small, tmp_path, how, words):
    with serve(small, **how) as served:
        with pytest.raises(BadInput, match=f"^{served.url}: its log-probs are .* nats a token from .*") as e:
            train(small, tmp_path / "run", "--rollouts", served.url, "--temperature", "0.7", "--lr", "0.1")
    assert words in str(e.value) and not served.loaded


def test_a_server_with_another_base_model_stops_the_run(small, tmp_path, monkeypatch):
    with serve(small) as served:
        with torch.no_grad():
            served.model.model.layers[0].mlp.down_proj.weight *= 8
        monkeypatch.setattr("slm.formats.lora_files.weights_fingerprint", lambda model: "any")
        with pytest.raises(BadInput, match="like those of another base model or adapter"):
            train(small, tmp_path / "run", "--rollouts", served.url)


@pytest.mark.parametrize("quirk", [
    lambda path, body, count: body.pop("prompt_logprobs", None) and None,
    lambda path, body, count: (200, {"choices": [{"text": "hi"}]}) if path == "completions" else None,
], ids=["no log-probs of prompts", "no ids"])
def test_a_server_without_token_ids_is_no_server_for_rollouts(small, tmp_path, quirk):
    with serve(small, quirk=quirk) as served, pytest.raises(BadInput, match="no ids and log-probs"):
        train(small, tmp_path / "run", "--rollouts", served.url)


# ---- what goes wrong with servers ------------------------------------------------------------------------

NOT_FOUND = 404, {"error": {"message": "Loading lora failed: No adapter found"}}


@pytest.mark.parametrize("quirk", [
    lambda path, body, count: NOT_FOUND if path == "load_lora_adapter" and count in (0, 1, 3, 4) else None,
    lambda path, body, count: NOT_FOUND if path == "completions" and count in (0, 1, 2, 9) else None,
    lambda path, body, count: RESET if path == "completions" and count % 5 == 3 else None,
    lambda path, body, count: (500, PAGE) if count % 7 == 2 else None,
], ids=["404 at loading", "404 after loading", "dropped requests", "broken now and then"])
def test_what_passes_is_tried_again_and_changes_nothing(small, tmp_path, quirk):
    with serve(small) as served:
        whole = train(small, tmp_path / "whole", "--rollouts", served.url, steps=2)
        served.bodies, served.quirk = [], quirk
        close(metrics(whole), metrics(train(small, tmp_path / "run", "--rollouts", served.url, steps=2)))


def test_a_request_that_never_gets_through_costs_its_own_episode(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "reward_of", rewards.reward_of)
    def quirk(path, body, count):
        return RESET if path == "completions" and body["seed"] % 4 == 1 and body["temperature"] else None
    with serve(small, quirk=quirk) as served:
        rows = train(small, tmp_path / "run", "--rollouts", served.url, steps=2)
    assert 0 < sum(row["failed"] for row in rows) < 36
    told = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in told if not row["tokens"]} == {None}


class Killed:
    """Away for a number of requests from the middle of step 2 on, and then without its adapters."""

    def __init__(self, served, away):
        self.served, self.left, self.begun = served, away, False

    def __call__(self, path, body, count):
        self.begun = self.begun or len(self.served.of("completions")) > 30
        if self.begun and self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.served.forget()
            return RESET


def test_a_server_killed_and_started_again_in_the_middle_changes_nothing(small, tmp_path, capsys):
    with serve(small) as served:
        whole = train(small, tmp_path / "whole", "--rollouts", served.url, steps=2)
        served.bodies = []
        served.quirk = Killed(served, 25)
        close(metrics(whole), metrics(train(small, tmp_path / "run", "--rollouts", served.url, steps=2)))
        assert served.quirk.left == 0
    assert "connection reset" in capsys.readouterr().err


def test_a_server_that_stays_away_ends_a_run_that_another_can_resume(small, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", (0.2, 0.2))
    with serve(small) as served:
        whole = train(small, tmp_path / "whole", "--rollouts", served.url, steps=2)
    with serve(small) as served:
        served.quirk = Killed(served, 10**9)
        with pytest.raises(BadInput, match=r"still no answer \(.*\); when it is well, --resume"):
            train(small, tmp_path / "run", "--rollouts", served.url, "--save-every", "1", steps=2)
    with serve(small) as served:
        words = "--rollouts", served.url, "--save-every", "1", "--resume"
        rows = train(small, tmp_path / "run", *words, steps=2)
    close(metrics(whole), metrics(rows))


@pytest.mark.parametrize("quirk, words", [
    (lambda path, *_: (200, PAGE), "expected a vLLM server, such as http://localhost:8000/v1"),
    (lambda path, *_: (404, {"detail": "Not Found"}), "HTTP 404 .*expected a vLLM server"),
    (lambda path, *_: (404, {"detail": "Not Found"}) if "load" in path else None,
     "can't load .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    (lambda path, *_: NOT_FOUND if "load" in path else None, r"can't load .*rollouts/slm-.*\(HTTP 404"),
    (lambda path, *_: (500, {"error": {"message": "LoRA rank 16 is greater than max_lora_rank 8"}})
     if "load" in path else None, "greater than max_lora_rank"),
    (lambda path, *_: RESET, "no answer"),
], ids=["web page", "wrong address", "no runtime loading", "folder not seen", "rank", "nobody there"])
def test_a_server_that_can_not_do_it_ends_the_run_in_one_sentence(small, tmp_path, quirk, words):
    with serve(small, quirk=quirk) as served:
        with pytest.raises(BadInput, match=words) as e:
            train(small, tmp_path / "run", "--rollouts", served.url)
    assert str(e.value).startswith(served.url) and "\n" not in str(e.value)


def test_an_adapter_that_would_be_merged_is_refused_before_the_run_begins(small, tmp_path):
    model, _ = policy(small)
    lora_files.save(model, tmp_path / "sft", base=small)
    for words in (("--adapter", str(tmp_path / "sft")), ("--model", str(tmp_path / "sft"))):
        with pytest.raises(BadInput, match=r"^--rollouts: the server can't know .*/sft merged .* serve DIR"):
            train(small, tmp_path / "run", "--rollouts", "http://localhost:1/v1", *words)
    assert not (tmp_path / "run").exists()


def test_a_sample_or_a_score_that_fails_takes_no_other_with_it(tmp_path):
    model, tokenizer = policy()
    short, longer = [user("2 + 2?")], [user("3 + 3 + 3?")]
    wanted = [Request(short, Sampling(4, 1.0, seed=10), n=3), Request(short, continuations=("Yes", "No")),
              Request(longer, continuations=("Yes", "No"))]
    refused = tokenizer.chat(longer) + tokenizer.encode("No")

    def quirk(path, body, count):
        if body.get("seed") == 11:
            return RESET
        if body.get("seed") == 12 or body.get("prompt") == refused:  # without log-probs it is no reply
            return 200, {"choices": [{"text": "hi", "finish_reason": "stop"}]}

    with opened(model, tokenizer, tmp_path) as (served, rollouts):
        rollouts.refresh(1.0)
        served.quirk = quirk
        one, two, three, *scored = collect(rollouts, wanted)
    assert [bool(reply.error) for reply in (one, two, three)] == [False, True, True] and len(one.ids) == 4
    assert [bool(reply.error) for reply in scored] == [False, True]
    assert scored[0].scores.keys() == {"Yes", "No"}


def test_a_server_that_is_well_but_answers_nothing_ends_the_run(small, tmp_path):
    def quirk(path, body, count):
        return (500, PAGE) if path == "completions" and body["seed"] else None  # canaries have seed 0
    with serve(small, quirk=quirk) as served:
        with pytest.raises(BadInput, match=r"HTTP 500 .*; it came back 3 times and answered nothing"):
            train(small, tmp_path / "run", "--rollouts", served.url)
