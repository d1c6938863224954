"""GRPO by its promises, on a random model of two layers and with an easy reward."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import write_small

import train_grpo
from slm import checkpoint, lora, lora_files, losses
from slm.episode import Episode, Reply, TokenRecord, Turn
from slm.problems import Problem
from slm.rewards import Rules, reward_of
from slm.runs import cli, rundir
from slm.workflows import WORKFLOWS
from train_grpo import ALGORITHMS

TWELVE = Problem("p", "7 + 5?", "12", "test")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "model")


def odd(episode, problem, rules):
    """An easy reward: most of the sampled ids are odd."""
    ids = [i for turn in episode.turns for i in turn.reply.ids]
    return (1.0 if sum(i % 2 for i in ids) > len(ids) / 2 else -1.0), "easy"


def train(small, out, *options, steps=4):
    words = ["--model", small, "--data", "tiny", "--limit", "40", "--out", str(out), "--batch", "3",
             "--samples", "6", "--steps", str(steps), "--max-tokens", "9", "--lr", "0.02", "--device", "cpu",
             *options]
    train_grpo.main(train_grpo.options().parse_args(words))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_the_ratio_starts_at_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    rows = train(small, tmp_path / "run", "--kl", "0.01", "--lr", "0.005", steps=20)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.4, (first, last)
    assert all(r["dlogp_max"] < 1e-4 for r in rows)  # the sampler's log-probs are the trainer's
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 0.01
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


def test_a_run_stopped_and_resumed_ends_on_the_same_bits(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    whole = train(small, tmp_path / "whole")
    log = rundir.RunDir.log

    def dies(self, name, *rows):
        if rows[0]["step"] == 4:
            raise KeyboardInterrupt
        log(self, name, *rows)

    monkeypatch.setattr(rundir.RunDir, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path / "cut", "--save-every", "2")
    monkeypatch.setattr(rundir.RunDir, "log", log)
    cut = train(small, tmp_path / "cut", "--save-every", "2", "--resume")
    timed = ("seconds", "tokens_per_s", "generate_share", "score_share", "learn_share")
    clean = [[{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in (whole, cut)]
    assert clean[0] == clean[1]
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
                           alpha=8, targets="qv")
    policy, _, base = train_grpo.prepare(tmp_path / "run", torch.device("cpu"), torch.float32, args)
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


@pytest.mark.parametrize("rewards, learns", [((-1.0, -1.0), False), ((1.0, -1.0), True)])
def test_a_run_that_learned_nothing_says_so(small, tmp_path, monkeypatch, capsys, rewards, learns):
    turn = itertools.cycle(rewards)
    monkeypatch.setattr(train_grpo, "reward_of", lambda *_: (next(turn), "turns"))
    rows = train(small, tmp_path / "run", "--batch", "1", "--samples", "2", "--kl", "0", steps=1)
    assert "kl" not in rows[0]  # not measured, so not 0.0
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
@pytest.mark.parametrize("batch", ["1", "3"])  # with 1, the second rank has no problem
def test_two_ranks_take_the_same_steps_as_one_process(tmp_path, batch):
    root = Path(train_grpo.__file__).parent
    words = [str(root / "train_grpo.py"), "--limit", "6", "--batch", batch, "--samples", "8", "--steps", "3",
             "--max-tokens", "60", "--kl", "0.05", "--updates", "2", "--micro-tokens", "700",
             "--device", "cpu", "--reward", "correct,random:0"]
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
        for name in ("reward", "reward/random", "mean_tokens", "loss", "kl", "grad_norm", "learned_tokens"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-6), name
    checkpoint.load(tmp_path / "2" / "adapter")  # it knows its base
    a, b = (load_file(tmp_path / ranks / "adapter" / "adapter_model.safetensors") for ranks in ("1", "2"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


# ---- rewards and credit ----------------------------------------------------------------------------------

def episode(response="", error=None, ids=(3, 4)):
    reply = Reply(response, list(ids), [-1.0] * len(ids), prompt_ids=[1, 2], error=error)
    return Episode("p", turns=[Turn("solver", [], reply)], response=response)


def credit(episodes, algorithm):
    """Rewards, then advantages: the records of each episode, and the divisor."""
    for i, e in enumerate(episodes):
        e.sample = i
        e.reward, e.reason = reward_of(e, TWELVE, Rules({"correct": 1.0}))
    records = [[] if e.reward is None else e.records() for e in episodes]
    return records, train_grpo.give_credit(episodes, records, ALGORITHMS[algorithm], 10)


def test_a_failed_episode_has_no_reward_and_moves_nobody():
    episodes = [episode("\\boxed{12}"), episode("\\boxed{1}"), episode(error="lost")]
    records, divisor = credit(episodes, "dapo")
    assert divisor == 4 and not records[2]
    assert [own[0].advantage for own in records[:2]] == pytest.approx([0.7071, -0.7071], abs=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_failed_episode_does_not_shrink_the_step(algorithm):
    """With and without a failed one, the others have the same advantages and weights over the divisor."""
    good = [episode("\\boxed{12}"), episode("\\boxed{1}"), episode("\\boxed{2}", ids=(5, 6, 7))]
    share = []
    for episodes in (good, [episode(error="lost"), *good, episode(error="lost")]):
        records, divisor = credit(episodes, algorithm)
        share.append([(own[0].advantage, own[0].weight / divisor) for own in records if own])
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


# ---- learning --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_step_is_the_same_for_every_cut_into_micro_batches(random_model, algorithm):
    model = random_model()
    lora.add(model, 4, 8, ["q_proj", "v_proj"])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.normal_(std=0.2)
    lengths, found = [4, 9, 6, 12, 5], []
    for micro in (1, 14, 1000):
        torch.manual_seed(0)
        ids = [torch.randint(0, 97, (n,)).tolist() for n in lengths]
        old = [[0.0, 0.0, *torch.randn(n - 2).tolist()] for n in lengths]
        records = [TokenRecord(x, [0, 0] + [1] * (len(x) - 2), logprobs, a, 0.5)
                   for x, logprobs, a in zip(ids, old, (1.0, -1.0, 0.5, 0.0, -0.7))]
        args = SimpleNamespace(temperature=0.8, kl=0.1, kl_kind="k3", micro_tokens=micro, clip=1e9, updates=1)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        row = train_grpo.update_policy(model, [records], 7, torch.optim.SGD(trained.values()), 1.0,
                                       ALGORITHMS[algorithm], args)
        found.append((row, {n: p.detach() - before[n] for n, p in trained.items()}))
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(before[n])
    for row, moved in found[1:]:
        assert row["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-4)
        for n, change in moved.items():
            assert torch.allclose(change, found[0][1][n], atol=1e-5)
