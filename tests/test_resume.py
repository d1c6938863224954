"""Exact resume: from whatever a kill leaves behind, a run goes on to the bits of an unbroken one.

The fast tests copy the run's folder before each change of a file in it and after each line of its log. A copy
is what a kill at that moment would have left. The slow ones kill real processes at random moments.
"""

import argparse
import concurrent.futures
import contextlib
import filecmp
import importlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small import write_small

import train_grpo
import train_sft
from slm import BadInput, checkpoint, lora, training
from slm.formats import lora_files
from slm.runs import rundir

ROOT = Path(__file__).parents[1]
TIMED = {"seconds", "tokens_per_s", "generate_share", "score_share", "learn_share", "evaluate_share",
         "memory"}
SFT = ["--batch", "2", "--epochs", "1", "--limit", "8", "--lora", "--dropout", "0.1", "--lr", "0.01"]
GRPO = ["--limit", "9", "--batch", "3", "--samples", "4", "--steps", "3", "--max-tokens", "9", "--lr", "0.02",
        "--kl", "0.01", "--updates", "2"]
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
moment = {}  # "now": what to call before a change of a file


def listen(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+x")
    if (writes or event in CHANGES) and "now" in moment:
        moment["now"](str(args[0]))


sys.addaudithook(listen)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model, with an SFT adapter for it in <folder>-sft."""
    model = write_small(tmp_path_factory.mktemp("small") / "model")
    network, _ = checkpoint.load(model)
    torch.manual_seed(1)
    lora.add(network, 4, 8, dropout=0.1)
    with torch.no_grad():
        for p in lora.parameters(network):
            p.normal_(std=0.05)
    lora_files.save(network, f"{model}-sft", base=model)
    return model


@pytest.fixture
def run(small, monkeypatch):
    """run(script, out, words...) runs a trainer here, with an easy reward and without a report."""
    for script in (train_sft, train_grpo):
        monkeypatch.setattr(script, "write_report", lambda out: out / "report.html")
    monkeypatch.setattr(train_grpo, "reward_of", odd)
    monkeypatch.setattr(train_grpo, "check_rewards", lambda *_: "")

    def start(script, out, *words):
        script.main(script.options().parse_args([*words, "--out", str(out)]))
    return start


def odd(episode, problem, rules):
    ids = [i for turn in episode.turns for i in turn.reply.ids]
    return (1.0 if sum(i % 2 for i in ids) > len(ids) / 2 else -1.0), "easy"


def start_words(script, small):
    words = [*(SFT if script is train_sft else GRPO), "--model", small, "--data", "tiny", "--device", "cpu"]
    return [*words, "--save-every", "2"] + (["--adapter", f"{small}-sft"] if script is train_grpo else [])


def result(out: Path) -> dict:
    """All that has to be equal: the logs without times, and the bytes of every tensor."""
    found = {}
    for log in out.glob("*.jsonl"):
        rows = map(json.loads, log.read_text().splitlines())
        found[log.name] = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    for file in (*out.glob("adapter/*.safetensors"), *out.glob("base/*.safetensors")):
        found[str(file.relative_to(out))] = file.read_bytes()
    assert found["metrics.jsonl"] and any(name.startswith("adapter/") for name in found)
    return found


def moments(run, script, small, out: Path, copies: Path) -> list[Path]:
    """Run the script in `out`; copy the folder at each moment at which it differs from the last copy."""
    kept = []

    def keep(path=str(out)):
        if path.startswith(str(out)) and (out / "settings.json").is_file():
            now = moment.pop("now", None)
            shutil.copytree(out, copies / str(len(kept)))
            if kept and same_files(kept[-1], copies / str(len(kept))):
                shutil.rmtree(copies / str(len(kept)))
            else:
                kept.append(copies / str(len(kept)))
            moment.update({"now": now} if now else {})

    log = rundir.RunDir.log

    def log_and_keep(self, name, *rows):
        log(self, name, *rows)
        keep()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir.RunDir, "log", log_and_keep)
        moment["now"] = keep
        try:
            run(script, out, *start_words(script, small))
        finally:
            moment.clear()
    return kept


def same_files(a: Path, b: Path) -> bool:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    if names != sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()):
        return False
    return not any(filecmp.cmpfiles(a, b, names, shallow=False)[1:])


@pytest.mark.parametrize("script", [train_sft, train_grpo], ids=["sft", "grpo"])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_kill_leaves_at_any_moment_goes_on_to_the_same_bits(run, small, tmp_path, script, every):
    out = tmp_path / "whole"
    kept = moments(run, script, small, out, tmp_path)
    whole = result(out)
    assert len(kept) >= 15 and not list((kept[0]).glob("checkpoints/step*"))
    for cut in kept[::every]:
        tear(cut)
        run(script, cut, "--resume")
        assert result(cut) == whole, cut
        assert not list(cut.rglob("*.part")) + list(cut.rglob("*.old"))


def tear(out: Path) -> None:
    """What a kill inside a write adds: half a line, half a checkpoint, half an adapter."""
    for log in out.glob("*.jsonl"):
        with log.open("a") as f:
            f.write('{"step": 1, "lo')
    for half in ("checkpoints/step-000009.tmp/rank0.pt", ".adapter.part/adapter_model.safetensors"):
        (out / half).parent.mkdir(parents=True, exist_ok=True)
        (out / half).write_bytes(b"PK\x03\x04")


# ---- every objective, and what a step hands to the next ----------------------------------------------------

@pytest.mark.parametrize("algorithm", train_grpo.ALGORITHMS)
def test_every_objective_goes_on_to_the_same_bits(run, small, tmp_path, algorithm):
    words = ["--model", small, *GRPO, "--data", "tiny", "--device", "cpu", "--algorithm", algorithm,
             "--batch", "1", "--samples", "5", "--steps", "2", "--max-tokens", "5", "--updates", "1"]
    run(train_grpo, tmp_path / "whole", *words)
    with stopped_at(2):
        run(train_grpo, tmp_path / "cut", *words, "--save-every", "1")
    run(train_grpo, tmp_path / "cut", "--resume")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@contextlib.contextmanager
def stopped_at(step):
    log = rundir.RunDir.log

    def stops(self, name, *rows):
        if rows[0]["step"] == step:
            raise KeyboardInterrupt
        log(self, name, *rows)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rundir.RunDir, "log", stops)
        yield


def test_what_a_step_hands_to_the_next_comes_back(tmp_path):
    """An average of what came before, one number and one tensor: 5 steps at once, or 3 and then 2."""
    def go(out, last, resume=False):
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer, extra = torch.optim.AdamW([p]), {"mean": 0.0, "all": torch.zeros(2)}
        folder = rundir.RunDir(out, {}, resume=resume)
        args = training_args(resume=resume, save_every=1)
        for step, lr, _ in training.steps(5, folder, {"p": p}, optimizer, args, extra):
            if step == last:
                break
            extra["mean"] = 0.9 * extra["mean"] + 0.1 * step
            extra["all"] += step
            (p.sum() - extra["mean"]).square().backward()
            training.update(optimizer, lr, 1.0)
        folder.lock.close()
        return p.tolist(), extra["mean"], extra["all"].tolist()

    whole = go(tmp_path / "whole", 5)
    go(tmp_path / "cut", 3)
    assert go(tmp_path / "cut", 5, resume=True) == whole and whole[1] > 0


def training_args(**given):
    return argparse.Namespace(**{"lr": 0.1, "warmup": 0.0, "seed": 0} | given)


def test_a_checkpoint_by_the_clock_changes_nothing(run, small, tmp_path, monkeypatch):
    words = [*SFT, "--model", small, "--data", "tiny", "--device", "cpu", "--save-every", "100"]
    run(train_sft, tmp_path / "whole", *words)
    saved, save = [], rundir.RunDir.save
    monkeypatch.setattr(rundir.RunDir, "save", lambda self, state: (saved.append(state["step"]),
                                                                   save(self, state)))
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)
    run(train_sft, tmp_path / "often", *words)
    assert saved == [1, 2, 3, 4] and training.SAVE_SECONDS == -1
    assert result(tmp_path / "often") == result(tmp_path / "whole")


# ---- --resume reads the settings of the run ----------------------------------------------------------------

def test_resume_and_out_are_enough_and_an_option_given_again_must_agree(run, small, tmp_path):
    words = start_words(train_sft, small)
    run(train_sft, tmp_path / "whole", *words)
    with stopped_at(4):
        run(train_sft, tmp_path / "cut", *words)
    for name, value in (("lr", "0.02"), ("epochs", "3"), ("dropout", "0"), ("targets", "qv"), ("seed", "1")):
        with pytest.raises(BadInput, match=f"was run with {name}=.*, now it is {value}"):
            run(train_sft, tmp_path / "cut", "--resume", f"--{name}", value)
    with pytest.raises(BadInput, match="was run with lora=True, now it is False"):
        run(train_sft, tmp_path / "cut", "--resume", "--full")
    run(train_sft, tmp_path / "cut", "--resume", "--lr", "0.01", "--data", "tiny", "--save-every", "1")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "eval", "agents"])
def test_resume_alone_says_what_to_type(capsys, script):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).options().parse_args(["--resume", "--seed", "1"])
    assert "error: --resume needs the folder of the run: --resume --out FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).options().parse_args(["--resume", "--out", "runs/x", "--dry-run"])
    assert "error: --dry-run and --resume: expected one of them" in capsys.readouterr().err


def test_a_run_of_another_script_is_called_one(run, small, tmp_path):
    run(train_sft, tmp_path / "run", *start_words(train_sft, small))
    with pytest.raises(BadInput, match="is a run of another script, or of another version of this one: "):
        run(train_grpo, tmp_path / "run", "--resume")


def test_another_number_of_processes_is_refused_by_name(run, small, tmp_path, monkeypatch):
    run(train_sft, tmp_path / "run", *start_words(train_sft, small))
    monkeypatch.setattr(training.ranks, "world", lambda: 2)
    with pytest.raises(BadInput, match="was run with ranks=1, now it is 2"):
        run(train_sft, tmp_path / "run", "--resume")


@pytest.mark.parametrize("script", ["eval", "agents"])
def test_the_other_scripts_read_their_settings_too(tmp_path, script):
    options = importlib.import_module(script).options
    (tmp_path / "settings.json").write_text(json.dumps(
        {"settings": {"adapter": ["a", "solver=b"], "limit": 7, "data": ["x"], "weights": "abc"}}))
    out = ["--resume", "--out", str(tmp_path)]
    args = options().parse_args(out)
    assert (args.adapter, args.limit, args.data) == (["a", "solver=b"], 7, ["x"]) and "weights" not in args
    args = options().parse_args([*out, "--adapter", "a", "--adapter", "solver=b", "--limit", "8"])
    assert (args.adapter, args.limit) == (["a", "solver=b"], 8)
    assert options().parse_args(out[1:]).adapter == []


def test_settings_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{half")
    with pytest.raises(SystemExit, match="2"):
        train_sft.options().parse_args(["--resume", "--out", str(tmp_path)])
    assert "settings.json: not readable as JSON" in capsys.readouterr().err


# ---- real kills --------------------------------------------------------------------------------------------

KILLED = {"train_sft": ["--batch", "2", "--limit", "8", "--epochs", "1", "--dropout", "0.1"],
          "train_grpo": ["--limit", "6", "--batch", "2", "--samples", "4", "--steps", "3", "--kl", "0.05",
                         "--max-tokens", "24", "--updates", "2"]}
NURSERY = """if True:  # forks a trainer for each line that it reads: nothing is imported again
    import json, os, signal, sys
    import train_grpo, train_sft
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    train_sft.write_report = train_grpo.write_report = str  # a picture is slow, and comes last
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            continue
        job = json.loads(line)
        os.environ.update(job["env"])
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        script = {"train_sft": train_sft, "train_grpo": train_grpo}[job["script"]]
        script.cli.run(script.main, script.options().parse_args(job["words"]))
        print("the end", flush=True)
        os._exit(0)
"""


@pytest.fixture
def nursery(request):
    """start(job for each rank) -> their process ids."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(request.param)}
    with subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=env, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        def start(jobs):
            with lock:
                for job in jobs:
                    process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                return [int(process.stdout.readline()) for _ in jobs]

        lock = threading.Lock()
        yield start
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("nursery, kills", [(1, 20), (2, 6)], indirect=["nursery"])
@pytest.mark.parametrize("script", KILLED)
def test_killed_at_random_and_resumed_it_has_the_same_bits(request, tmp_path, nursery, kills, script):
    """Half of the runs are killed a second time. A run that has no settings.json yet starts anew."""
    ranks = request.node.callspec.params["nursery"]
    network, _ = checkpoint.load("tiny")
    lora.add(network, 4, 8)
    with torch.no_grad():
        for p in lora.parameters(network):
            p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    lora_files.save(network, tmp_path / "sft", base="tiny")
    words = [*KILLED[script], "--data", "tiny", "--save-every", "2", "--device", "cpu"]
    words += ["--adapter", str(tmp_path / "sft")] if script == "train_grpo" else []

    def start(out):
        more = ["--resume"] if (out / "settings.json").is_file() else words
        port = str(free_port())
        return nursery([{"script": script, "words": [*more, "--out", str(out)], "log": f"{out}-{rank}.log",
                         "env": {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                                 "MASTER_PORT": port} if ranks > 1 else {}} for rank in range(ranks)])

    def finish(out):
        changes = follow(out, start(out))
        said = [Path(f"{out}-{rank}.log").read_text() for rank in range(ranks)]
        assert all(text.endswith("the end\n") for text in said), said
        return result(out), changes

    def cut(k):
        """-> (does the run end on the same bits, the states in which kills left it)"""
        out, rng, left = tmp_path / str(k), random.Random(k), []
        for _ in range(1 + k % 2):
            pids = start(out)
            follow(out, pids, rng.randrange(changes))
            time.sleep(rng.random() * 0.1)
            running = any(map(alive, pids))
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            follow(out, pids)
            left += [state(out)] if running else []
        return finish(out)[0] == whole, left

    whole, changes = finish(tmp_path / "whole")
    same, left = 0, []
    with concurrent.futures.ThreadPoolExecutor(4) as several:
        for k, (equal, states) in enumerate(several.map(cut, range(kills)), 1):
            same, left = same + equal, left + states
            print(f"{script}, {ranks} ranks: {same} of {k} have the same bits; {len(left)} kills left "
                  f"{len(set(left))} states", flush=True)
    assert same == kills and len(left) >= kills // 2 and len(set(left)) >= kills // 4


def follow(out: Path, pids: list[int], changes: float = math.inf) -> int:
    """Until all processes have ended or the folder has changed so often -> how often it has. So the moments
    do not depend on how busy the machine is."""
    seen, count = state(out), 0
    while any(map(alive, pids)) and count < changes:
        time.sleep(0.01)
        now = state(out)
        seen, count = now, count + (now != seen)
    return count


def state(out: Path) -> frozenset:
    """The folder's files and their sizes."""
    found = set()
    for folder, _, files in os.walk(out):
        for path in (Path(folder, name) for name in files):
            with contextlib.suppress(OSError):  # it was removed in between
                found.add((str(path.relative_to(out)), path.stat().st_size))
    return frozenset(found)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
