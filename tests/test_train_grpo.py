"""GRPO by its promises, on a random model of two layers and with an easy reward."""

import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from slm import BadInput, checkpoint, lora, losses, report
from slm.attention import Packed
from slm.episode import Episode, Reply, TokenRecord, Turn
from slm.formats import lora_files
from slm.grading import grade
from slm.problems import Problem
from slm.report.figures import HEADLINES
from slm.rewards import Rules, reward_of
from slm.runs import cli, files, rundir, steps
from slm.sampling import Sampler
from slm.workflows import WORKFLOWS
from train_grpo import ALGORITHMS

TWELVE = Problem("p", "7 + 5?", "12", "test")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take a second each."""
    monkeypatch.setattr(train_grpo, "write_report", lambda out: out / "report.html")


def odd(episode, problem, rules):
    """An easy reward: most of the sampled ids are odd."""
    ids = [i for turn in episode.turns for i in turn.reply.ids]
    return (1.0 if sum(i % 2 for i in ids) > len(ids) / 2 else -1.0), "easy"


def train(small, out, *options, steps=4):
    words = ["--model", small, "--data", "tiny", "--limit", "40", "--out", str(out), "--batch", "3",
             "--samples", "6", "--steps", str(steps), "--max-tokens", "9", "--lr", "0.02", "--device", "cpu",
             "--evaluate", "0", *options]
    train_grpo.main(train_grpo.options().parse_args(words))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_the_ratio_starts_at_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    monkeypatch.setattr(train_grpo, "write_report", report.write)
    rows = train(small, tmp_path / "run", "--kl", "0.01", "--lr", "0.005", steps=20)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.4, (first, last)
    assert all(r["dlogp_max"] < 1e-4 for r in rows)  # the sampler's log-probs are the trainer's
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 0.01
    told = set(HEADLINES) | {"step", "failed", "seconds", "dlogp_max", "learned_tokens"}
    assert set().union(*rows) <= told  # every other number has a curve
    assert (tmp_path / "run" / "report.html").is_file()
    model, _ = checkpoint.load(tmp_path / "run" / "adapter")
    assert lora.active(model) == "default"


def test_a_real_model_gets_adapters_on_all_linear_layers_and_tiny_keeps_its_own():
    """Rank 1 to 32 and alpha 32 are what "LoRA without regret" advises for reinforcement learning."""
    for model, targets in (("Qwen/Qwen2.5-Math-1.5B", "all"), ("tiny", "qkvo")):
        args = train_grpo.options().parse_args(["--model", model])
        cli.resolve(args, train_grpo.PAPER, train_grpo.TINY)
        assert args.targets == targets and args.alpha == 32 and 1 <= args.rank <= 32
    assert set(cli.TARGETS["all"]) == set(lora.ALL)


def test_episodes_hold_those_of_all_ranks_in_the_order_of_the_problems(small, tmp_path, monkeypatch):
    """Here the other rank is one that sampled the same, but as the problems before."""
    def gather(rows):
        others = [(group - 1, sample, row | {"problem": "other"}) for group, sample, row in rows
                  if isinstance(row, dict)] if len(rows[0]) == 3 else []
        return rows + others

    monkeypatch.setattr(train_grpo.ranks, "gather", lambda rows: gather(rows) if isinstance(rows[0], tuple)
                        else rows)
    train(small, tmp_path / "run", "--samples", "2", steps=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert [row["problem"] == "other" for row in rows] == [
        True, True, False, True, False, True, False, True, False, True, False, False]
    assert [row["sample"] for row in rows[2:10]] == [0, 0, 1, 1] * 2


def untimed(rows, *more):
    timed = ("seconds", "tokens_per_s", "generate_share", "score_share", "learn_share", "evaluate_share",
             "memory", *more)
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize("options", [
    "--evaluate 3 --algorithm reinforce --samples 2 --resample 2 --updates 2 --kl 0.1",
    "--algorithm distill --importance-cap 2 --dppo-mask 0.2"])
def test_a_run_stopped_and_resumed_ends_on_the_same_bits(small, tmp_path, monkeypatch, options):
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    whole = train(small, tmp_path / "whole", *options.split())
    log = rundir.RunDir.log

    def dies(self, name, *rows):
        if rows[0]["step"] == 4:
            raise KeyboardInterrupt
        log(self, name, *rows)

    monkeypatch.setattr(rundir.RunDir, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path / "cut", "--save-every", "2", *options.split())
    monkeypatch.setattr(rundir.RunDir, "log", log)
    cut = train(small, tmp_path / "cut", "--save-every", "2", "--resume", *options.split())
    assert untimed(whole) == untimed(cut)
    a, b = (torch.load(tmp_path / n / "checkpoints" / "step-000004" / "rank0.pt") for n in ("whole", "cut"))
    assert all(torch.equal(a["parameters"][k], b["parameters"][k]) for k in a["parameters"])


def test_an_sft_adapter_is_merged_and_the_reference_is_the_merged_model(small, tmp_path, capsys):
    model, _ = checkpoint.load(small)
    lora.add(model, 4, 8, ["q_proj", "v_proj"])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.normal_(std=0.3)
    lora_files.save(model, tmp_path / "sft", base=small)
    ids, masks = [[5, 6, 7, 8, 9]], [[0, 1, 1, 1, 1]]
    expected = losses.score(model, ids, masks)[0]
    args = SimpleNamespace(model=small, adapter=str(tmp_path / "sft"), resume=False, recompute=False, rank=4,
                           rollouts=None, alpha=8, targets="qv", adapters="shared", roles=None)
    policy, _, base, _ = train_grpo.prepare(tmp_path / "run", Path, torch.device("cpu"), torch.float32, args)
    assert "merged" in capsys.readouterr().out
    with lora.off(policy):
        assert torch.allclose(losses.score(policy, ids, masks)[0], expected, atol=1e-5)
    assert torch.allclose(losses.score(policy, ids, masks)[0], expected, atol=1e-5)
    assert base == str(tmp_path / "run" / "base")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_can_be_trained(small, tmp_path, monkeypatch, name):
    rewards = itertools.cycle((1.0, -1.0))
    monkeypatch.setattr(train_grpo, "reward_of", lambda *_: (next(rewards), "turns"))
    row, = train(small, tmp_path / "run", "--workflow", name, "--batch", "1", "--samples", "2", steps=1)
    assert row["learned_tokens"] > 0 and row["dlogp_max"] < 1e-4 and row["grad_norm"] > 0


def test_an_adapter_of_another_model_is_refused_before_a_run_directory_is_made(small, tmp_path):
    model, _ = checkpoint.load(small)
    lora.add(model, 4, 8)
    with torch.no_grad():
        model.model.norm.weight += 1
    lora_files.save(model, tmp_path / "sft", base=small)
    with pytest.raises(BadInput, match="other weights"):
        train(small, tmp_path / "run", "--adapter", str(tmp_path / "sft"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kl", ["0", "0.05"])
@pytest.mark.parametrize("rewards, learns", [((-1.0, -1.0), False), ((1.0, -1.0), True)])
def test_a_run_that_learned_nothing_says_so(small, tmp_path, monkeypatch, capsys, rewards, learns, kl):
    turn = itertools.cycle(rewards)
    monkeypatch.setattr(train_grpo, "reward_of", lambda *_: (next(turn), "turns"))
    rows = train(small, tmp_path / "run", "--batch", "1", "--samples", "2", "--kl", kl, steps=1)
    assert rows[0]["kl"] == 0
    assert ("nothing was learned" not in capsys.readouterr().out) == learns


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_rank_without_records_adds_nothing_to_the_gradient(random_model, how):
    model = random_model()
    if how == "lora":
        lora.add(model, 4, 8)
    (stand_in,), = train_grpo.training.micro_batches(model, [], 100)
    logp, _ = losses.score(model, [stand_in.ids], [stand_in.mask])
    losses.sft_loss(logp)[0].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(logp) == 0 and all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.slow
@pytest.mark.parametrize("batch, options", [  # with 1, the second rank has no problem
    ("1", "--kl 0.05"), ("3", "--kl 0.05"), ("3", "--algorithm reinforce --resample 1 --kl 0.05"),
    ("1", "--algorithm distill --importance-cap 2 --dppo-mask 0.2"),
    ("1", "--workflow solver_checker_stateless --roles solver,checker --adapters role --credit role "
          "--reward own,random --max-tokens 16")])
def test_two_ranks_take_the_same_steps_as_one_process(tmp_path, batch, options):
    root = Path(train_grpo.__file__).parent
    words = [str(root / "train_grpo.py"), "--limit", "6", "--batch", batch, "--samples", "8", "--steps", "3",
             "--max-tokens", "60", "--updates", "2", "--micro-tokens", "700", "--device", "cpu",
             "--reward", "correct,random:0", *options.split()]
    for ranks in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
        subprocess.run([*launch, *words, "--out", str(tmp_path / ranks)], check=True, cwd=root)
    told = []
    for ranks in ("1", "2"):
        rows = map(json.loads, (tmp_path / ranks / "episodes.jsonl").read_text().splitlines())
        told.append([(row["step"], row["problem"], row["sample"], row["reward"]) for row in rows])
    assert told[0] == told[1] and len(told[0]) == 3 * int(batch) * 8
    logs = [(tmp_path / ranks / "metrics.jsonl").read_text().splitlines() for ranks in ("1", "2")]
    for lines in zip(*logs):
        one, two = map(json.loads, lines)
        for name in ("reward", "reward/random", "mean_tokens", "loss", "kl", "grad_norm", "learned_tokens",
                     "replaced"):
            near = 1e-5 if one["step"] < 2 else 1e-3  # later Adam turns rounding into steps
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), rel=near, abs=1e-6), name
    files = [sorted((tmp_path / ranks / "adapter").rglob("*.safetensors")) for ranks in ("1", "2")]
    for one, two in zip(*files, strict=True):
        checkpoint.load(two.parent)  # it knows its base
        a, b = load_file(one), load_file(two)
        # Adam turns the rounding of a gradient near 0 into a step, so single numbers may differ
        assert all((a[k] - b[k]).norm() < 1e-3 * a[k].norm() for k in a)


# ---- what a person sees ----------------------------------------------------------------------------------

def test_what_is_measured_on_the_way_changes_no_bit_of_the_training(small, tmp_path, monkeypatch):
    """The KL to the reference, and the evaluation: before the first step, ten times, after the last one."""
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    looked = train(small, tmp_path / "looked", "--evaluate", "5", steps=3)
    assert [row["step"] for row in looked if "evaluated" in row] == [0, 1, 2, 3]
    monkeypatch.setattr(train_grpo, "drift", lambda *_: {})
    alone = train(small, tmp_path / "alone", steps=3)
    extra = ("kl", "evaluated", "evaluated_low", "evaluated_high")
    assert untimed(looked[1:], *extra) == untimed(alone) and not set(extra) & set().union(*alone)
    a, b = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for name in ("looked", "alone"))
    assert a == b


def test_the_evaluation_is_the_share_of_greedy_answers_with_its_interval(tiny):
    """Every other problem has the model's own answer as its gold, so that some are right on any weights."""
    model, tokenizer = tiny
    held_out, right = train_grpo.problems.load("tiny", "test", 6), 0
    for i, p in enumerate(held_out):
        ids = tokenizer.chat([train_grpo.user(train_grpo.SOLVER(question=p.question))])
        start = len(ids)
        while len(ids) < start + 99 and ids[-1] not in tokenizer.stop_ids:
            with torch.no_grad():
                row = torch.tensor(ids)
                hidden = model(row, torch.arange(len(ids)), Packed([len(ids)], row.device))
                ids.append(int((hidden[-1] @ model.model.embed_tokens.weight[:model.config.ids].T).argmax()))
        said = grade(tokenizer.decode(ids[start:]), p.gold)
        held_out[i] = replace(p, gold=(said.answer or "none") if i % 2 else "123456")
        right += i % 2 and said.answer is not None
    args = SimpleNamespace(max_tokens=99, seed=0, step_rule="line")
    found = train_grpo.evaluate(held_out, WORKFLOWS["solver"], model, Sampler(model, tokenizer), None, args)
    p, z = right / 6, 1.959964
    half = z / (1 + z * z / 6) * (p * (1 - p) / 6 + z * z / 4 / 36) ** 0.5  # Wilson's
    middle = (p + z * z / 12) / (1 + z * z / 6)
    assert 0 < right < 6 and found == pytest.approx(
        {"evaluated": p, "evaluated_low": middle - half, "evaluated_high": middle + half}, abs=1e-6)


def test_what_is_evaluated_is_not_trained(tmp_path, monkeypatch):
    """A set's test split; of a file, a tenth is held out at most. With 0 no problem is read or held out."""
    pool = train_grpo.problems.load("tiny", "train", 50)
    ids = {p.id for p in pool}
    for data, wanted, trained, held in ((["tiny"], 7, 50, 7), (["tiny"], 0, 50, 0), (["x.jsonl"], 64, 45, 5),
                                        (["tiny", "x.jsonl"], 3, 47, 3), (["x.jsonl"], 0, 50, 0)):
        args = SimpleNamespace(data=data, evaluate=wanted, seed=0)
        left, held_out = train_grpo.split(pool, args)
        assert (len(left), len(held_out)) == (trained, held)
        assert {p.id for p in left}.isdisjoint(p.id for p in held_out)
        assert ids.isdisjoint(p.id for p in held_out) == (data == ["tiny"] or not held)
        assert train_grpo.split(pool, args) == (left, held_out)


def test_kl_is_measured_on_the_first_sample_of_eight_problems(random_model):
    """Against the log-probs of the whole vocabulary, at the temperature of the run."""
    model, _ = adapted(random_model)
    episodes, records, expected = [], [], []
    for group in range(9):
        for sample in range(2):
            ids = torch.randint(0, 97, (6,), generator=torch.Generator().manual_seed(group)).tolist()
            ids = ids if sample == 0 else [1, 2, 3, 4, 5, 6]
            episodes.append(Episode(str(group), group=group, sample=sample))
            records.append([TokenRecord(ids, [0, 0, 0, 1, 0, 1])])
            told = []
            for off in (False, True):
                with torch.no_grad(), lora.off(model) if off else contextlib.nullcontext():
                    row = torch.tensor(ids)
                    hidden = model(row, torch.arange(6), Packed([6], row.device))
                    logits = hidden @ model.model.embed_tokens.weight.T / 0.8
                    told.append(logits.log_softmax(-1)[[2, 4], row[[3, 5]]])
            d = told[1] - told[0]
            expected += (d.exp() - 1 - d).tolist() if sample == 0 and group < 8 else []
    found = train_grpo.drift(model, episodes, records, settings())
    assert found["kl"] == pytest.approx(sum(expected) / 16, rel=1e-4) and len(expected) == 16
    assert train_grpo.drift(model, [], [], settings()) == {}


def test_episodes_hold_question_and_gold_and_metrics_are_made_of_them(small, tmp_path):
    row, = train(small, tmp_path / "run", "--reward", "correct:2,random", steps=1)
    told = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    known = {p.id: (p.question, p.gold) for p in train_grpo.problems.load("tiny", "train", 40)}
    assert all(known[e["problem"]] == (e["question"], e["gold"]) for e in told) and len(told) == 18
    assert row["reward"] == pytest.approx(2 * row["reward/correct"] + row["reward/random"])
    assert row["mean_tokens"] == sum(e["tokens"] for e in told) / 18 and row["memory"] > 0.1
    assert [len(e["records"]) for e in told] == [1] * 12 + [0] * 6  # each token, of the first two problems
    for e in told[:12]:
        record, = e["records"]
        assert len(record["text"]) == len(record["mask"]) and len(record["logp"]) == sum(record["mask"])
        assert e["question"] in "".join(record["text"]) and e["turns"][0]["reply"]["text"][:9] in "".join(
            text for text, mask in zip(record["text"], record["mask"]) if mask)
        assert record["old"] == pytest.approx(record["logp"] if e["advantage"] else [], abs=1e-3)


def test_a_step_in_numbers():
    """Four episodes with a reward and one without: a right box, a right number without box, two wrong."""
    texts = ["\\boxed{12}", "The answer is 12.", "\\boxed{1}", "no idea", ""]
    episodes = [episode(text, ids=[3] * (i + 2), error="lost" if i == 4 else None)
                for i, text in enumerate(texts)]
    records, _ = credit(episodes, "grpo")
    for e, group in zip(episodes, (0, 0, 0, 1, 1)):
        e.group, e.problem_id = group, "pq"[group]
    _, tokenizer = checkpoint.load("tiny")
    problems = {"p": TWELVE, "q": Problem("q", "1 + 1?", "2", "test")}
    rows = steps.lines(3, episodes, records, problems, tokenizer)
    assert [row["correct"] for row in rows] == [True, False, False, False, False]
    assert [row["lenient"] for row in rows] == [True, True, False, False, False]
    assert [row["gold"] for row in rows] == ["12", "12", "12", "2", "2"]
    found = steps.summary(rows)
    assert found == pytest.approx({
        "reward": -0.5, "solved": 0.25, "lenient": 0.5, "no_answer": 0.4, "truncated": 0.0,
        "mean_tokens": 4.0, "tokens_right": 2.0, "tokens_wrong": 4.0, "zero_spread": 0.5,
        "with_advantage": 0.8, "failed": 1, "reward/correct": -0.5})
    assert {"tokens_right", "tokens_wrong"}.isdisjoint(steps.summary(rows[4:]))


def test_a_dry_run_says_what_the_run_would_do_and_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    model, _ = checkpoint.load(small)
    lora.add(model, 4, 8)
    lora_files.save(model, tmp_path / "sft", base=small)
    made = []
    monkeypatch.setattr(train_grpo.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    save = rundir.RunDir.save
    monkeypatch.setattr(rundir.RunDir, "save", lambda self, state: made.append(state["step"]) or
                        save(self, state))
    words = ["--model", small, "--adapter", str(tmp_path / "sft"), "--data", "tiny", "--limit", "40",
             "--batch", "3", "--samples", "6", "--steps", "7", "--max-tokens", "9", "--device", "cpu",
             "--dry-run", "--out", str(tmp_path / "run")]
    train_grpo.main(train_grpo.options().parse_args(words))
    said = capsys.readouterr().out
    promise = (r"dry run: 7 steps, (1,\d\d\d) tokens while replies have \d tokens, as now; .* 0:00:\d\d .* "
               r"memory \d\.\d\d GB")
    tokens = int(re.search(promise, said)[1].replace(",", ""))
    assert "merged" in said and made == [2]
    left = {path.name for path in (tmp_path / "temporary").iterdir()}
    assert not (tmp_path / "run").exists() and not {x for x in left if not x.startswith("torchinductor")}
    words.remove("--dry-run")
    train_grpo.main(train_grpo.options().parse_args(words))
    rows = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * 3 * 6 and tokens == pytest.approx(sum(row["tokens"] for row in rows), rel=0.15)


def test_the_forecast_counts_steps_and_evaluations(random_model, capsys):
    """20 steps of 8 s for 30 tokens, less what the half batches at the ends of two epochs save: 19 whole
    steps. 11 evaluations of 2 s. The first step was slower, and its replies shorter."""
    rows = [{"step": 0, "evaluated": 0.5},
            {"step": 1, "seconds": 40.0, "evaluate_share": 0.5, "mean_tokens": 3.0, "replaced": 0},
            {"step": 2, "seconds": 10.0, "evaluate_share": 0.2, "mean_tokens": 5.0, "replaced": 0}]
    plan = ([[0, 1]] * 9 + [[0]]) * 2
    train_grpo.forecast(random_model(), rows, plan, SimpleNamespace(samples=3))
    said = capsys.readouterr().out
    assert "20 steps, 456 tokens while replies have 4 tokens, as now" in said  # 38 problems x 3 x 4
    assert "they take 0:02:24 " in said                                        # 456 x 8 / 30 + 22 = 143.6


def test_the_forecast_counts_problems_that_make_way(random_model, capsys):
    """Of 4 problems 2 were replaced, so 6 are sampled for every 4 of the plan; 12 s for 4 x 3 x 5 tokens."""
    rows = [{"step": step, "seconds": 12.0, "evaluate_share": 0.0, "mean_tokens": 5.0, "replaced": replaced}
            for step, replaced in ((1, 0), (2, 2))]
    train_grpo.forecast(random_model(), rows, [[0, 1]] * 10, SimpleNamespace(samples=3))
    said = capsys.readouterr().out
    assert "10 steps, 450 tokens while replies have 5 tokens, as now" in said and "take 0:01:30 " in said


@pytest.mark.parametrize("words, resample, truncated", [
    ("--algorithm dapo", 3, "soft"), ("--algorithm dapo --resample 0 --truncated zero", 0, "zero"),
    ("", 0, "keep")])
def test_dapo_brings_its_resampling_and_its_overlong_reward(small, tmp_path, words, resample, truncated):
    """Yu et al. 2025, arXiv 2503.14476, eq. 11 and 13."""
    train(small, tmp_path / "run", *words.split(), "--samples", "2", "--batch", "1", steps=1)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert (settings["resample"], settings["truncated"]) == (resample, truncated)
    row = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert ("reward/length" in row) == (truncated == "soft")
    gone = list(files.readable_rows(tmp_path / "run" / "discarded.jsonl"))  # those of replaced problems
    assert len(gone) == 2 * row["replaced"] and all(e["correct"] == gone[0]["correct"] for e in gone[:2])


# ---- rewards and credit ----------------------------------------------------------------------------------

def episode(response="", error=None, ids=(3, 4)):
    reply = Reply(response, list(ids), [-1.0] * len(ids), prompt_ids=[1, 2], error=error)
    return Episode("p", turns=[Turn("solver", [], reply)], response=response)


def credit(episodes, algorithm, moving=None):
    """Rewards, then advantages: the records of each episode, and the divisor."""
    for i, e in enumerate(episodes):
        e.sample = i
        e.reward, e.reason = reward_of(e, TWELVE, Rules({"correct": 1.0}))
    args = SimpleNamespace(roles=None, max_tokens=10, credit="episode")
    moving = {"sum": 0.0, "steps": 0.0} if moving is None else moving
    return train_grpo.give_credit(episodes, ALGORITHMS[algorithm], moving, args)


def test_a_failed_episode_has_no_reward_and_moves_nobody():
    episodes = [episode("\\boxed{12}"), episode("\\boxed{1}"), episode(error="lost")]
    records, divisor = credit(episodes, "dapo")
    assert divisor == 4 and not records[2]
    assert [own[0].advantage[0] for own in records[:2]] == pytest.approx([0.7071, -0.7071], abs=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_failed_episode_does_not_shrink_the_step(algorithm):
    """With and without a failed one, the others have the same advantages and weights over the divisor."""
    good = [episode("\\boxed{12}"), episode("\\boxed{1}"), episode("\\boxed{2}", ids=(5, 6, 7))]
    share = []
    for episodes in (good, [episode(error="lost"), *good, episode(error="lost")]):
        records, divisor = credit(episodes, algorithm)
        share.append([(own[0].advantage[0], own[0].weight[0] / divisor) for own in records if own])
    assert share[0] == share[1]


def test_a_batch_of_failed_episodes_has_nothing_to_learn():
    assert credit([episode(error="lost"), episode(error="lost")], "grpo") == ([[], []], 1)


def test_the_token_that_ends_an_answer_is_trained_and_tool_output_is_not():
    solve = episode("a", ids=(3, 4, 2))
    later = Reply("b", [5, 2], [-0.5, -0.2], prompt_ids=[1, 2, 3, 4, 2, 77, 78])
    solve.turns.append(Turn("solver", [], later))
    ((record,),), _ = credit([solve], "grpo")
    assert record.ids == [1, 2, 3, 4, 2, 77, 78, 5, 2]
    assert record.mask == [0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert [p for p, m in zip(record.logprobs, record.mask) if m] == [-1.0, -1.0, -1.0, -0.5, -0.2]


def test_a_failed_episode_leaves_the_mean_of_its_group():
    """Of [1, 1, 0, 0] the second has failed: [.667, -.333, -.333], not [.5, -.5, -.5]."""
    episodes = [episode("\\boxed{12}"), episode(error="lost"), episode("\\boxed{1}"), episode("\\boxed{2}")]
    records, _ = credit(episodes, "dr_grpo")
    found = [own[0].advantage[0] / 2 for own in records if own]
    assert found == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_an_episode_without_a_trained_token_counts_in_the_means():
    records, divisor = credit([episode("\\boxed{12}"), episode("\\boxed{1}", ids=())], "grpo")
    assert not records[1] and divisor == 2
    assert records[0][0].advantage[0] == pytest.approx(0.7071, abs=1e-3)


def test_the_moving_baseline_is_the_faded_mean_of_earlier_steps():
    moving, right, wrong = {"sum": 0.0, "steps": 0.0}, "\\boxed{12}", "\\boxed{1}"
    steps = [[right, wrong, wrong, wrong], [right, right], [wrong, wrong]]  # means -0.5, 1, -1
    expected = [[1.5, -0.5, -0.5, -0.5], [1.5, 1.5], [-1 - 0.55 / 1.9] * 2]  # (0.9 x -0.5 + 1) / (0.9 + 1)
    for texts, values in zip(steps, expected):
        records, _ = credit([episode(text) for text in texts], "reinforce", moving)
        assert [own[0].advantage[0] for own in records] == pytest.approx(values)


def test_the_reports_formula_has_no_baseline_and_its_code_whitens_the_whole_batch():
    episodes = [episode("\\boxed{12}"), episode("\\boxed{12}"), episode("\\boxed{1}"), episode("\\boxed{2}")]
    for i, e in enumerate(episodes):
        e.group = i // 2
    records, divisor = credit(episodes, "report")
    assert [own[0].advantage[0] for own in records] == [1, 1, -1, -1]
    assert [own[0].weight[0] / divisor for own in records] == pytest.approx([1 / 40] * 4)  # of 10 tokens
    records, divisor = credit(episodes, "report_code")
    found = [own[0].advantage[0] for own in records]
    assert found == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)
    assert [own[0].weight[0] / divisor for own in records] == pytest.approx([1 / 8] * 4)  # of two tokens


# ---- dynamic sampling ------------------------------------------------------------------------------------

def rolled(small, rewards, resample, batch=2, pool=9):
    """roll_out with rewards by problem -> (problems of the episodes kept, of those replaced)."""
    policy, tokenizer = checkpoint.load(small)
    some = train_grpo.problems.load("tiny", "train", pool)
    args = SimpleNamespace(samples=2, step_rule="line", temperature=1.0, max_tokens=2, model=small, seed=0,
                           no_box=-1.0, resample=resample, reward=["correct"], truncated="keep",
                           credit="episode")
    spare = train_grpo.spare_problems(some, list(range(batch)), 0, args)
    turn = itertools.count()

    def by_problem(e, problem, rules):
        kind = rewards.get(some.index(problem), "mixed")
        e.solved = kind == "right" or (kind == "mixed" and e.sample == 0)
        return {"right": 1.0, "wrong": -1.0, "lost": None, "mixed": (-1.0) ** next(turn)}[kind], kind

    before, train_grpo.reward_of = train_grpo.reward_of, by_problem
    try:
        kept, replaced = train_grpo.roll_out(some[:batch], spare, 0, policy, WORKFLOWS["solver"],
                                             train_grpo.Sampler(policy, tokenizer), None,
                                             {"generate": 0.0, "score": 0.0}, args)
    finally:
        train_grpo.reward_of = before
    place = {p.id: i for i, p in enumerate(some)}
    assert [(e.group, e.sample) for e in kept] == [(g, s) for g in range(batch) for s in range(2)]
    return [place[e.problem_id] for e in kept[::2]], [place[e.problem_id] for e in replaced[::2]]


def test_problems_without_a_spread_make_way_for_others(small):
    kept, replaced = rolled(small, {0: "right"}, 3)
    assert replaced == [0] and kept[1] == 1 and kept[0] not in (0, 1)
    assert rolled(small, {0: "right"}, 3) == (kept, replaced)  # seed and step decide
    assert rolled(small, {0: "right"}, 0) == ([0, 1], [])
    assert rolled(small, {0: "lost", 1: "wrong"}, 1)[1] == [0, 1]


def test_a_problem_makes_way_at_most_so_many_times(small):
    for resample, pool, count in ((1, 9, 2), (3, 9, 6), (9, 9, 7), (3, 2, 0)):  # 7: then no problem is left
        kept, replaced = rolled(small, dict.fromkeys(range(9), "wrong"), resample, pool=pool)
        assert len(replaced) == count and len({*kept, *replaced}) == count + 2


# ---- the teacher -----------------------------------------------------------------------------------------

def test_a_teacher_gives_each_token_its_own_log_prob(small, tmp_path):
    """Another model: it sees what was sampled. The policy itself: it sees the right solution, too."""
    policy, tokenizer = checkpoint.load(small)
    problem = train_grpo.problems.load("tiny", "train", 1)[0]
    prompt = tokenizer.chat([train_grpo.user(train_grpo.SOLVER(question=problem.question))])
    reply = Reply("x", [30, 31, 2], [-1.0, -2.0, -3.0], prompt_ids=prompt)
    turns = [Turn("solver", [], reply)]
    e = Episode("p", turns=turns, reward=-1.0)
    args = SimpleNamespace(temperature=0.9, micro_tokens=10)
    shown = tokenizer.chat([train_grpo.user(train_grpo.SHOWN(question=problem.question,
                                                             solution=problem.solution))])
    other, _ = checkpoint.load(small)
    for teacher, seen in ((policy, shown), (other, prompt)):
        records = [e.records()]
        train_grpo.ask_teacher(teacher, policy, tokenizer, [problem], [e], records, args)
        ids = [*seen, 30, 31, 2]
        expected, _ = losses.score(policy, [ids], [[0] * len(seen) + [1] * 3], 0.9)
        record, = records[0]
        assert record.teacher == pytest.approx(expected.tolist(), abs=1e-5)
        gaps = (expected + torch.tensor([1.0, 2.0, 3.0])).tolist()
        assert record.advantage == pytest.approx(gaps, abs=1e-5)
    assert problem.solution in tokenizer.decode(shown)


def test_distillation_brings_the_policy_to_its_teacher(small, tmp_path):
    """The teacher is the model with other weights; the loss is an estimate of KL(policy || teacher)."""
    model, tokenizer = checkpoint.load(small)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.3 * torch.randn(32, 64))
    checkpoint.save(model, tokenizer, tmp_path / "teacher")
    rows = train(small, tmp_path / "run", "--algorithm", "distill", "--teacher", str(tmp_path / "teacher"),
                 "--lr", "0.02", steps=8)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and rows[0]["loss"] > 0.05


@pytest.mark.parametrize("words, said", [
    ("--algorithm ppo", "ppo.*grpo, dr_grpo"), ("--algorithm grpo --samples 1", "samples 1.*2 or more"),
    ("--algorithm pass_at_k --samples 4", "samples 4.*5 or more"),
    ("--algorithm reinforce --samples 1 --resample 2", "--resample.*2 or more"),
    ("--algorithm max_rl --reward correct,format:0.2", "correct,format: max_rl knows only right .* wrong"),
    ("--algorithm pass_at_k --samples 8 --truncated soft", "correct,length: pass_at_k"),
    ("--teacher tiny", "only distill"), ("--algorithm distill --workflow python_tools", "solver"),
    ("--algorithm distill --teacher none/such", "none/such")])
def test_objectives_that_cannot_be_are_refused(words, said):
    args = train_grpo.options().parse_args(words.split())
    train_grpo.cli.resolve(args, train_grpo.PAPER, train_grpo.TINY)
    with pytest.raises(BadInput, match=said):
        train_grpo.checked(args)


@pytest.mark.parametrize("reward", ["correct", "correct,format:0,steps:0", "random"])
def test_objectives_of_right_and_wrong_take_one_part(reward):
    args = train_grpo.options().parse_args(["--algorithm", "max_rl", "--reward", *reward.split()])
    train_grpo.cli.resolve(args, train_grpo.PAPER, train_grpo.TINY)
    assert train_grpo.checked(args)[0].two_valued


def test_a_teacher_with_other_tokens_is_refused(small):
    tokenizer = SimpleNamespace(backend=SimpleNamespace(get_vocab=lambda: {"a": 0}))
    args = SimpleNamespace(teacher=small, model="tiny")
    with pytest.raises(BadInput, match="its tokens"):
        train_grpo.teacher_for(None, tokenizer, torch.device("cpu"), torch.float32, args)


# ---- learning --------------------------------------------------------------------------------------------

def adapted(random_model):
    """A model with an adapter that is not zero, and its trained tensors by name."""
    model = random_model()
    lora.add(model, 4, 8, ["q_proj", "v_proj"])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.normal_(std=0.2)
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def settings(**changed):
    usual = {"temperature": 0.8, "kl": 0.0, "kl_kind": "k3", "micro_tokens": 1000, "clip": 1e9, "updates": 1,
             "importance_cap": 0.0, "dppo_mask": 0.0}
    return SimpleNamespace(**usual | changed)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_step_is_the_same_for_every_cut_into_micro_batches(random_model, algorithm):
    """Clips, weights and mask are active: the log-probs of sampler and first update are random. The second
    update starts where the first one ended."""
    model, trained = adapted(random_model)
    before = {n: p.detach().clone() for n, p in trained.items()}
    lengths, found = [4, 9, 6, 12, 5], []
    for micro in (1, 14, 1000):
        g = torch.Generator().manual_seed(0)
        records = []
        for n, advantage in zip(lengths, (1.0, -1.0, 0.5, 0.0, -0.7)):
            ids, mask = torch.randint(0, 97, (n,), generator=g).tolist(), [0, 0] + [1] * (n - 2)
            old, sampled, teacher = (-4.5 + 0.5 * torch.randn(3, n - 2, generator=g)).tolist()
            teacher = teacher if ALGORITHMS[algorithm].taught else []
            sampled, advantages, weights = [0.0, 0.0, *sampled], [advantage] * (n - 2), [0.5] * (n - 2)
            records.append(TokenRecord(ids, mask, sampled, advantages, weights, teacher, old))
        args = settings(kl=0.1, micro_tokens=micro, updates=2, importance_cap=2.0, dppo_mask=0.005)
        row = train_grpo.update_policy(model, [records], 30, torch.optim.SGD(trained.values()), 0.1,
                                       ALGORITHMS[algorithm], args)
        found.append((row, {n: p.detach() - before[n] for n, p in trained.items()}))
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(before[n])
    for row, moved in found[1:]:
        assert row == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        for n, change in moved.items():
            assert torch.allclose(change, found[0][1][n], atol=1e-6) and change.abs().max() > 1e-4
    assert 0 < row["cut"] < 1 and (row["clipped"] > 0) == (algorithm in CLIPS)


CLIPS = ("grpo", "dr_grpo", "dapo", "gspo", "gmpo", "max_rl", "pass_at_k")


def test_old_log_probs_are_the_trainers_own_at_the_start_of_the_step(random_model):
    """So the first of several updates has ratio 1, wherever the sampler was; the others do not."""
    model, trained = adapted(random_model)
    records = [TokenRecord([5, 6, 7, 8], [0, 0, 1, 1], [0.0, 0.0, -3.0, -3.0], [1.0] * 2, [0.5] * 2)]
    expected, _ = losses.score(model, [records[0].ids], [records[0].mask], 0.8)
    step = partial(train_grpo.update_policy, model, [records], 1, torch.optim.SGD(trained.values()), 0.001,
                   ALGORITHMS["grpo"], settings())
    row = step()
    assert row["loss"] == -1 and records[0].old == expected.tolist()  # two tokens of weight 0.5 and ratio 1
    assert row["dlogp"] == pytest.approx((expected + 3).abs().mean().item())
    assert row["importance"] == pytest.approx((expected + 3).exp().mean().item())
    row = step()
    assert row["loss"] < -1.001 and records[0].old == expected.tolist()
    records[0].logprobs = [0.0, 0.0, -100.0, -100.0]  # 90 nats and more below the trainer's
    assert math.isfinite(step()["importance_max"])


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "gspo", "gmpo", "cispo", "report", "rloo"])
def test_a_sampler_at_a_wrong_temperature_is_corrected(random_model, algorithm):
    """All replies of one token, each as often as a sampler at temperature 1.6 gives it, against the exact
    gradient of the expected reward at 0.8. Without the weights the gradient is another one."""
    model, trained = adapted(random_model)
    masks, prompts = [[0, 0, 1]] * 97, [[5, 6, token] for token in range(97)]
    reward = torch.linspace(-1, 1, 97)
    logp, _ = losses.score(model, prompts, masks, 0.8)
    expected = torch.autograd.grad(-(logp.exp() * reward).sum(), list(trained.values()))
    expected = torch.cat([x.flatten() for x in expected])
    with torch.no_grad():
        sampled, _ = losses.score(model, prompts, masks, 1.6)
    error = {}
    for cap in (0.0, 50.0):
        records = [TokenRecord(x, m, [0.0, 0.0, p], [r], [w]) for x, m, p, r, w in zip(
            prompts, masks, sampled.tolist(), reward.tolist(), sampled.exp().tolist())]
        args = settings(importance_cap=cap)
        total, *_ = train_grpo.micro_batch_loss(model, records, ALGORITHMS[algorithm], args)
        found = torch.cat([x.flatten() for x in torch.autograd.grad(total, list(trained.values()))])
        error[cap] = ((found - expected).norm() / expected.norm()).item()
    assert error[50.0] < 1e-4 < 0.1 < error[0.0], error


@pytest.mark.parametrize("dtype, cap", [("bfloat16", 2.0), ("float32", 0.0)])
def test_the_correction_is_on_where_numbers_are_rounded(small, tmp_path, dtype, cap):
    row, = train(small, tmp_path / "run", "--algorithm", "report", "--dtype", dtype, steps=1)
    chosen = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert chosen["importance_cap"] == cap and chosen["dppo_mask"] == cap / 10
    assert {"importance", "importance_max", "cut", "dlogp", "dlogp_max"} <= row.keys()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_an_easy_reward(small, tmp_path, monkeypatch, algorithm):
    """Two updates a batch, so that ratios leave 1. (The teacher of distill knows nothing of the reward.)"""
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    words = ["--algorithm", algorithm, "--updates", "2", "--lr", "0.01"]
    rows = train(small, tmp_path / "run", *words, steps=12)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3 or algorithm == "distill", (first, last)
    assert all(r["replaced"] == 0 for r in rows) or algorithm == "dapo"
