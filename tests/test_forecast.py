"""What --dry-run promises, beside what then happens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agents
import eval as evaluation
import make_data
from slm.episode import Request, Sampling
from slm.runs import cli, forecast
from slm.sampling import Sampler

ROOT = Path(__file__).parents[1]

PROMISE = re.compile(r"dry run: (.*), ([\d,]+) tokens; by what was measured they take (\d:\d\d:\d\d) "
                     r"\(h:mm:ss\), peak memory \d\.\d\d GB")


@pytest.fixture(autouse=True)
def small_batch(monkeypatch):
    """A sampler of 16 rows, so that a part of the problems fills it."""
    init = Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, model, tokenizer, max_batch=None, **more: init(
        self, model, tokenizer, max_batch or 16, **more))


def go(script, *words):
    args = script.options().parse_args([str(word) for word in words])
    script.main(cli.resolve(args, script.PAPER, script.TINY))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_work_that_is_added_finds_the_batch_full():
    """A part took 12 s of the clock, 10 of them sampling 100 tokens, of these 80 in 4 s with the batch full.
    Three times as much: 200 more tokens at 20 a second are 10 s of sampling, 12 of the clock."""
    busy = {"seconds": 10.0, "tokens": 100, "full seconds": 4.0, "full tokens": 80}
    assert forecast.scaled(busy, 12.0, 3) == pytest.approx((300, 24.0))
    never = {"seconds": 10.0, "tokens": 100, "full seconds": 0.0, "full tokens": 0}
    assert forecast.scaled(never, 12.0, 3) == pytest.approx((300, 36.0))


def test_a_sampler_keeps_account_of_its_tokens_and_of_those_drawn_with_the_batch_full(tiny):
    sampler = Sampler(*tiny, max_batch=4)
    lengths = [3, 3, 9, 20, 20]  # 5 rows for 4 places: the fifth starts when the first two are over
    asked = [Request(ids=[5, 6, 7 + i], sampling=Sampling(n, temperature=1.0, seed=i))
             for i, n in enumerate(lengths)]
    replies = sampler.generate(asked, progress=False)
    written = sum(len(reply.ids) for reply, in replies)
    assert sampler.busy["tokens"] == written
    assert 0 < sampler.busy["full tokens"] < written
    assert 0 < sampler.busy["full seconds"] < sampler.busy["seconds"]


def test_a_dry_run_of_an_evaluation_tells_its_tokens_and_leaves_nothing(tmp_path, capsys):
    words = ["--data", "tiny", "--limit", 64, "--max-tokens", 6, "--device", "cpu", "--out", tmp_path / "run"]
    go(evaluation, *words, "--dry-run")
    work, tokens, _ = PROMISE.search(capsys.readouterr().out).groups()
    assert work == "64 problems x 1 sample by solver" and not (tmp_path / "run").exists()
    go(evaluation, *words)
    real = sum(row["tokens"] for row in lines(tmp_path / "run/answers.jsonl"))
    assert int(tokens.replace(",", "")) == pytest.approx(real, rel=0.15)


def test_a_dry_run_of_workflows_tells_their_tokens_and_leaves_nothing(tmp_path, capsys):
    words = ["--limit", 32, "--workflow", "majority_vote", "--max-tokens", 6, "--device", "cpu",
             "--out", tmp_path / "run"]
    go(agents, *words, "--dry-run")
    work, tokens, _ = PROMISE.search(capsys.readouterr().out).groups()
    assert work == "32 problems x 1 sample by solver, majority_vote" and not (tmp_path / "run").exists()
    go(agents, *words)
    rows = lines(tmp_path / "run/episodes.jsonl")
    first = {row["id"]: row["turns"][0]["reply"]["ids"] for row in rows if row["workflow"] == "solver"}
    shared = sum(map(len, first.values()))  # the vote's first draft is the solver's answer: asked once
    real = sum(row["tokens"] for row in rows)
    assert int(tokens.replace(",", "")) == pytest.approx(real, abs=shared + 0.15 * real)


@pytest.mark.parametrize("what", ["solutions", "verifier"])
def test_a_dry_run_of_our_own_model_as_teacher_tells_its_tokens_and_leaves_nothing(what, tmp_path, capsys,
                                                                                   monkeypatch):
    monkeypatch.setattr(make_data, "PART", 16)
    monkeypatch.setattr(make_data.tempfile, "tempdir", str(tmp_path))
    made, own = [], make_data.own_model
    monkeypatch.setattr(make_data, "own_model", lambda *a: made.append(own(*a)) or made[-1])
    words = [what, *["--teacher", "self"][:2 * (what == "solutions")], "--limit", 48, "--max-tokens", 6,
             "--samples", 2, "--device", "cpu"]
    go(make_data, *words, "--dry-run", "--out", tmp_path / "run")
    work, tokens, _ = PROMISE.search(capsys.readouterr().out).groups()
    assert work == "48 problems" and not list(tmp_path.iterdir())
    go(make_data, *words, "--out", tmp_path / "run")
    assert int(tokens.replace(",", "")) == pytest.approx(made[-1].busy["tokens"], rel=0.2)


def test_a_dry_run_asks_no_server_and_no_teacher(tmp_path, capsys):
    go(evaluation, "--endpoint", "http://127.0.0.1:9", "--model", "m", "--limit", 5, "--dry-run",
       "--out", tmp_path / "run")
    assert "5 problems x 1 sample by solver; only the server could say" in capsys.readouterr().out
    cascade = tmp_path / "paid.toml"
    cascade.write_text('[[teacher]]\nname = "a"\nmodel = "m"\nbase_url = "http://127.0.0.1:9"\nround = 1\n'
                       'attempts = 3\nmax_tokens = 1000\nprice_in = 1.0\nprice_out = 2.0\n')
    go(make_data, "--limit", 5, "--cascade", cascade, "--dry-run", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "at most 15 attempts at 5 problems, $0.03; no teacher was asked" in said  # 15 x 1000 x 2 / 1e6
    assert not (tmp_path / "run").exists()


GROWS = """
import torch
from slm import checkpoint
from slm.runs.device import peak_memory
model, _ = checkpoint.load("tiny")
more = peak_memory(model) + 0.3
held = torch.ones(int(more * 1e9 / 4))
del held
print(more, peak_memory(model))
"""


def test_peak_memory_counts_what_is_held_for_a_moment():
    said = subprocess.run([sys.executable, "-c", GROWS], cwd=ROOT, capture_output=True, text=True, check=True)
    held, peak = map(float, said.stdout.split())  # GB
    assert held <= peak < held + 0.8  # the interpreter and PyTorch are the rest
