"""The run directory, resuming, the schedule, devices: each by the promise it keeps."""

import contextlib
import json
import math
import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slm import BadInput, training
from slm.runs import ranks, rundir
from slm.runs.device import pick_device


def test_a_run_directory_describes_the_run(tmp_path):
    rundir.RunDir(tmp_path / "a", {"lr": 0.1}, "hash")
    found = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert found["settings"] == {"lr": 0.1} and found["data"] == "hash"
    assert found["versions"]["torch"] == torch.__version__


def test_a_folder_with_a_run_is_refused(tmp_path):
    rundir.RunDir(tmp_path, {}).log("metrics", {"step": 1})
    with pytest.raises(BadInput, match="--resume"):
        rundir.RunDir(tmp_path, {})


@pytest.mark.parametrize("settings, data, named", [({"lr": 2, "out": "b"}, "x", "lr=1, now it is 2"),
                                                   ({"lr": 1, "out": "b"}, "y", "data changed")])
def test_resuming_with_other_settings_or_data_is_refused(tmp_path, settings, data, named):
    rundir.RunDir(tmp_path, {"lr": 1, "out": "a"}, "x")
    rundir.RunDir(tmp_path, {"lr": 1, "out": "b", "resume": True}, "x", resume=True)
    with pytest.raises(BadInput, match=named):
        rundir.RunDir(tmp_path, settings, data, resume=True)


def test_a_run_is_called_by_the_run_that_made_its_model():
    names = map(rundir.name_of, ("tiny", "Qwen/Qwen2.5-Math-1.5B", "runs/grpo-tiny/adapter", "runs/b/best/"))
    assert list(names) == ["tiny", "Qwen2.5-Math-1.5B", "grpo-tiny", "b"]


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    first = rundir.RunDir(tmp_path, {})
    for resume in (False, True):
        with pytest.raises(BadInput, match="in use by another process"):
            rundir.RunDir(tmp_path, {}, resume=resume)
    del first
    rundir.RunDir(tmp_path, {}, resume=True)


def test_a_collected_run_goes_on_by_itself_with_more_data_but_not_with_other_settings(tmp_path):
    first = rundir.RunDir(tmp_path, {"seed": 0}, "10 problems", goes_on=True)
    first.log("records", {"id": 1})
    first.lock.close()
    again = rundir.RunDir(tmp_path, {"seed": 0}, "20 problems", goes_on=True)
    assert again.resumed and not first.resumed and list(again.journal("records")) == [{"id": 1}]
    with pytest.raises(BadInput, match="seed=0, now it is 1"):
        rundir.RunDir(tmp_path, {"seed": 1}, "10 problems", goes_on=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no run"):
        rundir.RunDir(tmp_path / "none", {}, resume=True)


def test_logs_are_cut_back_to_the_checkpoint_and_torn_lines_vanish(tmp_path):
    folder = rundir.RunDir(tmp_path, {})
    for step in (1, 2, 3):
        folder.log("metrics", {"step": step})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    folder.save({"step": 2})
    assert folder.load()["step"] == 2
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_only_the_newest_checkpoint_stays_and_a_half_written_one_is_ignored(tmp_path):
    folder = rundir.RunDir(tmp_path, {})
    for step in (5, 10):
        folder.save({"step": step})
    (tmp_path / "checkpoints" / "step-000015.tmp").mkdir()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000015.tmp"]
    assert folder.load()["step"] == 10


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = rundir.RunDir(tmp_path, {})
    folder.save({"step": 1})
    (tmp_path / "checkpoints" / "step-000001" / "rank0.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(BadInput, match=r"rank0\.pt"):
        folder.load()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_checkpoint_on_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, size):
    folder = rundir.RunDir(tmp_path, {})
    (tmp_path / "checkpoints" / "step-000001.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001.tmp" / "rank0.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="no room for a checkpoint"):
        folder.save({"step": 1, "x": torch.zeros(size)})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_parameters_and_moments_come_back_to_the_bit(tmp_path):
    def steps(model, optimizer, numbers):
        for n in numbers:
            torch.manual_seed(n)
            (model(torch.randn(4, 3)) ** 2).mean().backward()
            training.update(optimizer, 0.01 * training.cosine(n, 6, 0.2), clip=1.0)

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters()), dict(model.named_parameters())

    whole, optimizer, _ = fresh()
    steps(whole, optimizer, range(6))
    for k in range(1, 6):
        model, optimizer, named = fresh()
        steps(model, optimizer, range(k))
        rundir.RunDir(tmp_path / str(k), {}).save(training.training_state(k, named, optimizer, {}))
        model, optimizer, named = fresh()
        state = rundir.RunDir(tmp_path / str(k), {}, resume=True).load()
        assert training.restore(state, named, optimizer, {}) == k
        steps(model, optimizer, range(k, 6))
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))


def test_a_sharded_state_is_plain_tensors_and_comes_back():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        def sharded():
            model = torch.nn.Linear(3, 2)
            fully_shard(model)
            return model, torch.optim.AdamW(model.parameters()), dict(model.named_parameters())

        model, optimizer, named = sharded()
        model(torch.randn(4, 3)).sum().backward()
        training.update(optimizer, 0.1, clip=1.0)
        state = training.training_state(1, named, optimizer, {})
        tensors = [*state["parameters"].values(), *(t for m in state["moments"] for t in m.values())]
        assert not any(isinstance(t, DTensor) for t in tensors)
        other, optimizer, others = sharded()
        assert training.restore(state, others, optimizer, {}) == 1
        assert all(torch.equal(named[n].full_tensor(), others[n].full_tensor()) for n in named)
        assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in other.parameters())
    finally:
        dist.destroy_process_group()


def test_the_schedule_warms_up_in_optimizer_steps_and_ends_near_zero():
    factors = [training.cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1 and max(factors) == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90))) and factors[99] < 0.001
    assert training.cosine(0, 1, 0.03) > 0


def test_the_first_interrupt_lets_the_step_finish_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), training.Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step, said", [(0, "the first one, 12 s so far"), (2, "about 38 s more if it")])
def test_a_stop_in_a_long_step_says_how_long_it_may_take(tmp_path, monkeypatch, capsys, sign, step, said):
    now = [100.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    p = torch.nn.Parameter(torch.zeros(2))
    args = SimpleNamespace(resume=False, seed=0, lr=0.1, warmup=0.0, save_every=9)
    with pytest.raises(KeyboardInterrupt):
        for n, _, _ in training.steps(5, rundir.RunDir(tmp_path, {}), {"p": p}, torch.optim.AdamW([p]), args):
            now[0] += 12
            if n == step:
                os.kill(os.getpid(), sign)
            now[0] += 38
    assert f"finishing this step ({said}" in capsys.readouterr().err and n == step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-00000{step + 1}"]


@pytest.mark.parametrize("value, alone", [(None, True), ("", True), ("1", True), ("2", False), ("x", False)])
def test_a_world_size_that_torchrun_did_not_set_is_no_wait_and_no_traceback(monkeypatch, value, alone):
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert runpy.run_path(ranks.__file__)["STARTED"] == 1
    refused = pytest.raises(BadInput, match=f"^WORLD_SIZE='{value}', but torchrun did not start")
    with contextlib.nullcontext() if alone else refused:
        ranks.start_ranks(torch.device("cpu"))
    assert (ranks.rank(), ranks.world()) == (0, 1)


def test_torchrun_is_known_by_what_it_sets(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert runpy.run_path(ranks.__file__)["STARTED"] == 3


def test_a_missing_device_is_named_and_cpu_has_a_reason():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match=r"--device cuda.*only cpu"):
            pick_device("cuda")
    device, dtype, reason = pick_device("cpu", "auto", "tiny")
    assert (device.type, dtype) == ("cpu", torch.float32) and "small" in reason
    assert pick_device("cpu", "bfloat16", "tiny")[1] == torch.bfloat16


def test_default_folders_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rundir.new_path(None, "sft-x") == "runs/sft-x"
    (tmp_path / "runs" / "sft-x").mkdir(parents=True)
    assert rundir.new_path(None, "sft-x") == "runs/sft-x-2"
    (tmp_path / "runs" / "sft-x-2").mkdir()
    assert rundir.new_path(None, "sft-x") == "runs/sft-x-3"
    assert rundir.new_path("elsewhere", "sft-x") == "elsewhere"
