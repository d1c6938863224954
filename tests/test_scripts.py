"""What a person meets at the door of every script: help at once, and bad input in one sentence."""

import errno
import io
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from slm import checkpoint, lora
from slm.formats import lora_files
from slm.runs import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = ("make_data.py", "train_sft.py", "train_grpo.py", "agents.py", "eval.py")
WITH_MODEL = {  # a command of each script that would load --model and start
    "make_data.py": ["--teacher", "self", "--samples", "1", "--max-tokens", "8"],
    "train_sft.py": ["--batch", "2", "--epochs", "1"],
    "train_grpo.py": ["--steps", "1", "--batch", "1", "--samples", "2", "--max-tokens", "8"],
    "agents.py": ["--workflow", "solver", "--max-tokens", "8"],
    "eval.py": ["--max-tokens", "8"]}


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(script, words...) runs it in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLM_DATA", str(tmp_path / "data"))
    for name in ("gsm8k", "math500", "aime24", "amc23"):  # make_data.py compares with all test sets
        (tmp_path / "data" / name).mkdir(parents=True)
        rows(tmp_path / "data" / name / "test.jsonl", {"question": "an unlike question", "answer": 1})
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT))

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()
    return run


def refused(result, *said):
    """One sentence on stderr, exit code 2."""
    code, _, err = result
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err[-3000:]
    assert not err.split(errors[0])[1].strip(), f"more after the sentence: {err[-2000:]}"
    for words in said:
        assert re.search(words, errors[0]), f"{words!r} is not in: {errors[0]}"


def rows(path, *items):
    path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
    return path


GOOD = {"question": "Tom has 3 cards and buys 4. How many has he?", "answer": "7",
        "response": "3 + 4 = \\boxed{7}"}


# Help and options

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_in_under_two_seconds_in_groups(script):
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # time on a busy machine says little
    before = used()
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert used() - before < 2
    groups = re.findall(r"^([a-z][^\n]*):$", done.stdout, re.M)
    assert done.returncode == 0 and len(groups) >= 3
    for option in ("--model", "--data", "--limit", "--out", "--seed", "--device", "--dtype"):
        assert f"  {option} " in done.stdout, f"{option} is missing"
    assert max(map(len, done.stdout.splitlines())) <= 112 and "tiny" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_and_abbreviated_options_and_bad_values_are_refused(call, script):
    for words in ("--no-such-option", "--mod tiny", "--limit 0", "--limit -3", "--limit many", "--device gpu",
                  "stray words"):
        refused(call(script, *words.split()), "|".join(map(re.escape, words.split())))


@pytest.mark.parametrize("script, cases", [
    ("train_sft.py", "--lr nan|--lr -1|--alpha nan|--warmup 2|--clip 0|--weight-decay -1|--dropout 2"
     "|--lr 1e300|--seed -1|--seed 99999999999999999999"),
    ("train_grpo.py", "--lr inf|--kl -1|--temperature nan|--no-box nan|--steps -1|--roles nobody"),
    ("agents.py", "--split foo"),
    ("eval.py", "--seed 99999999999999999999|--temperature -1|--temperature nan|--split foo")])
def test_numbers_and_names_that_make_no_sense_are_refused(call, tmp_path, script, cases):
    data = rows(tmp_path / "good.jsonl", GOOD)
    for case in cases.split("|"):
        name, value = case.split()
        refused(call(script, *WITH_MODEL[script], "--data", data, name, value), f"{name}.*{value}")


@pytest.mark.parametrize("more, said", [([], "lora=True"), (["--full"], "lora=False")])
def test_the_settings_say_whether_lora_is_trained(call, tmp_path, more, said):
    code, out, err = call("train_sft.py", *WITH_MODEL["train_sft.py"], "--data", "tiny", "--limit", 4, *more)
    assert code == 0 and said in out.split("device:")[0] and "full=" not in out, err


@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py", "agents.py", "eval.py"])
def test_several_data_sets_are_named_with_commas_or_spaces(call, tmp_path, script):
    a, b = (rows(tmp_path / f"{name}.jsonl", GOOD, GOOD) for name in "ab")
    for words in ([f"{a},{b}"], [a, b]):
        code, out, err = call(script, *WITH_MODEL[script], "--data", *words, "--limit", 1)
        assert code == 0 and re.search(rf"data={a},{b}", out), err
    refused(call(script, "--data", ","), "--data")


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_is_one_sentence_that_names_resume_only_where_a_run_stands(script, tmp_path, capsys):
    args = runpy.run_path(str(ROOT / script))["options"]().parse_args(["--out", str(tmp_path)])
    for begun in (False, True):
        if begun:
            (tmp_path / "settings.json").write_text("{}")
        with pytest.raises(SystemExit, match="130"):
            cli.run(mock.Mock(side_effect=KeyboardInterrupt), args)
        resumes = f"--resume --out {tmp_path} goes on" in capsys.readouterr().err
        assert resumes == (begun and hasattr(args, "resume"))


# Roles of one's own

def test_a_workflow_of_yours_has_roles_of_its_own_and_a_misspelt_one_is_refused(call, tmp_path):
    (tmp_path / "team.py").write_text("""
from slm.episode import Ask, user

def team(question):
    plan = yield Ask("planner", [user(question)])
    return (yield Ask('doer', [user(f"{question} {plan.text}")]))
""")
    data = rows(tmp_path / "good.jsonl", GOOD, {**GOOD, "question": "And 5 and 6?"})
    words = [*WITH_MODEL["train_grpo.py"], "--data", data, "--workflow", "team.py:team", "--adapters", "role",
             "--out", "run"]
    for roles in ("planer", "solver,plan", "pl.nner"):
        refused(call("train_grpo.py", *words, "--roles", roles), "no workflow has a role")
    code, _, err = call("train_grpo.py", *words, "--roles", "planner,doer")
    assert code == 0, err
    asked = ["--data", data, "--max-tokens", "8", "--adapter", f"planner={tmp_path / 'run/adapter/planner'}"]
    assert call("eval.py", *asked, "--workflow", "team.py:team")[0] == 0
    assert call("agents.py", *asked, "--workflow", "solver, team.py:team")[0] == 0
    refused(call("eval.py", *asked, "--workflow", "solver"), "no workflow has a role 'planner'; expected")
    refused(call("eval.py", *asked, "--workflow", "nowhere.py:team"), "nowhere.py: FileNotFoundError")


# A prompt of one's own

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_s_file_is_asked_kept_in_the_settings_and_held_to_by_resume(call, tmp_path, script):
    (tmp_path / "prompt.txt").write_bytes("\ufeffSo now.\r\n{question} Box it.\r\n".encode())
    data = rows(tmp_path / "good.jsonl", GOOD, {**GOOD, "question": "And 5 and 6?"})
    words = [*WITH_MODEL[script], "--data", data, "--out", "run", "--limit", 2]
    code, out, err = call(script, *words, "--prompt", tmp_path / "prompt.txt")
    assert code == 0, err
    settings = json.loads(Path("run/settings.json").read_text())["settings"]
    assert settings["prompt"] == "So now.\n{question} Box it."
    tokenizer = checkpoint.load("tiny")[1]
    logs = "".join(path.read_text() for path in Path("run").glob("*.jsonl"))
    ids = [json.loads(line)["prompt_ids"] for line in logs.splitlines() if script == "eval.py"]
    told = out + logs.replace("\\n", "\n") + "".join(map(tokenizer.decode, ids))
    assert "So now.\nTom has 3 cards and buys 4. How many has he? Box it." in told or '"yours/' in told
    assert "Please reason step by step" not in told
    if "next: python" in out and script != "make_data.py":
        assert re.search("next: .* --prompt FILE", out)
    (tmp_path / "prompt.txt").write_text("Another: {question}")
    more = [] if script == "make_data.py" else ["--resume"]
    refused(call(script, *words, *more, "--prompt", tmp_path / "prompt.txt"),
            "prompt=So now. {question} Box it., now it is Another: {question}")
    if more:
        assert call(script, "--resume", "--out", "run")[0] == 0


def test_a_prompt_s_file_that_cannot_be_one_is_named(call, tmp_path):
    (tmp_path / "prompt.txt").write_text("Solve it.")
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe{question}")
    for name, said in (("prompt.txt", "prompt.txt: no {question} in it"), ("prompt.bin", "prompt.bin: not"),
                       ("none.txt", "none.txt: not readable")):
        refused(call("eval.py", "--prompt", tmp_path / name), said)
    (tmp_path / "prompt.txt").write_text("{question}")
    refused(call("make_data.py", "--prompt", tmp_path / "prompt.txt"), "--prompt: teachers .* have their own")


# Models

@pytest.fixture
def broken(tmp_path):
    """broken(kind) -> a model directory with something wrong."""
    def build(kind):
        path = tmp_path / kind
        path.mkdir()
        if kind == "empty":
            return path
        for file in checkpoint.TINY.glob("*.json"):
            shutil.copy(file, path)
        shutil.copy(checkpoint.TINY / "model.safetensors", path)
        config = json.loads((path / "config.json").read_text())
        if kind == "cut":
            data = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(data[:len(data) // 2])
        elif kind == "other":
            config |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
            (path / "config.json").write_text(json.dumps(config))
        elif kind == "garbled":
            (path / "config.json").write_text("{not json")
        elif kind == "mute":
            (path / "tokenizer.json").unlink()
        return path
    return build


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_directory_that_is_no_usable_model_is_named(call, broken, tmp_path, script):
    data = rows(tmp_path / "good.jsonl", GOOD, GOOD)
    for kind, said in (("empty", "empty.*config.json"), ("cut", "model.safetensors"),
                       ("other", "gpt_neox|GPTNeoX"), ("garbled", "config.json"), ("mute", "tokenizer.json")):
        refused(call(script, *WITH_MODEL[script], "--model", broken(kind), "--data", data), said)


def test_an_adapter_on_another_base_is_refused_and_on_its_own_it_runs(call, tmp_path):
    """A GRPO adapter belongs to the merged model in its run. On `tiny` it is refused, not scored."""
    model, tokenizer = checkpoint.load("tiny")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:] *= 1.01
    checkpoint.save(model, tokenizer, tmp_path / "grpo" / "base")
    lora.add(model, 4, 8)
    adapter = tmp_path / "grpo" / "adapter"
    lora_files.save(model, adapter, base=tmp_path / "grpo" / "base")
    data = rows(tmp_path / "good.jsonl", GOOD, GOOD)
    for script in ("eval.py", "agents.py", "train_grpo.py"):
        words = [*WITH_MODEL[script], "--data", data]
        refused(call(script, *words, "--adapter", adapter), "trained on .*base, .*other weights.*--model")
    assert call("eval.py", *WITH_MODEL["eval.py"], "--data", data, "--model", adapter)[0] == 0
    shutil.rmtree(tmp_path / "grpo" / "base")
    shutil.copytree(checkpoint.TINY, tmp_path / "grpo" / "base")
    words = [*WITH_MODEL["make_data.py"], "--data", data, "--model", adapter]
    refused(call("make_data.py", *words), "trained on .*base, .*other weights")


def test_a_misspelt_adapter_does_not_claim_the_run_directory(call, tmp_path):
    refused(call("train_grpo.py", "--adapter", "runs/none/adapter"), "runs/none/adapter")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_name_that_is_no_model_is_refused_and_a_hub_id_says_what_to_do_offline(call, tmp_path, script):
    data = rows(tmp_path / "good.jsonl", GOOD, GOOD)
    words = [*WITH_MODEL[script], "--data", data, "--model"]
    refused(call(script, *words, "nosuchmodel"), "nosuchmodel")
    refused(call(script, *words, "some/where"), "some/where", "config.json")


# Data

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_data_file_is_named_with_its_line(call, tmp_path, script):
    for items, said in (
            ([GOOD, GOOD, '{"question": "half a', GOOD], "bad.jsonl line 3"), ([], "bad.jsonl"),
            ([""], "bad.jsonl"), ([GOOD, [1, 2]], "bad.jsonl line 2"), ([{"text": "x"}], "bad.jsonl line 1"),
            ([{**GOOD, "question": ""}], "bad.jsonl line 1")):
        data = rows(tmp_path / "bad.jsonl", *items)
        refused(call(script, *WITH_MODEL[script], "--data", data), said)
    assert not list((tmp_path / "runs").rglob("*.jsonl"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_that_is_not_there_says_what_to_put_where(call, monkeypatch, script):
    refused(call(script, *WITH_MODEL[script], "--data", "no/such/file.jsonl"), "no/such/file.jsonl")
    from slm.formats.sources import SOURCES, Source
    url = "http://127.0.0.1:9/x"
    nowhere = {split: Source(f"svamp/{split}.jsonl", url, 1) for split in ("train", "test")}
    monkeypatch.setitem(SOURCES, "svamp", nowhere)
    refused(call(script, *WITH_MODEL[script], "--data", "svamp"), "save http.* as data/svamp/t", "SLM_DATA")


@pytest.mark.parametrize("script", ["train_grpo.py", "agents.py", "eval.py", "train_sft.py"])
def test_a_prompt_longer_than_the_context_is_named(call, tmp_path, script):
    long = {**GOOD, "question": "How many is one and one? " * 900}
    data = rows(tmp_path / "long.jsonl", long)
    refused(call(script, *WITH_MODEL[script], "--data", data), "tokens|max-length")


# Output

@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_that_cannot_be_written_is_named(call, tmp_path, monkeypatch, script):
    data = rows(tmp_path / "good.jsonl", GOOD, GOOD)
    (tmp_path / "file").write_text("here")
    for place in (tmp_path / "file", "/proc/nowhere", "/dev/null", "/dev/null/run"):
        refused(call(script, *WITH_MODEL[script], "--data", data, "--out", place), Path(place).name)
    make = Path.mkdir

    def locked(self, *args, **kwargs):
        if "locked" in str(self):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        make(self, *args, **kwargs)
    monkeypatch.setattr(Path, "mkdir", locked)
    words = [*WITH_MODEL[script], "--data", data, "--out", tmp_path / "locked" / "run"]
    refused(call(script, *words), "locked", "--out")


@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py"])
def test_metrics_are_flat_rows_of_numbers_with_a_growing_step_as_wandb_and_trackio_take_them(call, script):
    code, _, err = call(script, *WITH_MODEL[script], "--data", "tiny", "--limit", 8, "--out", "run")
    assert code == 0, err
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        assert all(type(value) in (int, float, bool) for value in row.values()), row
    steps = [row["step"] for row in metrics]
    assert metrics and steps == sorted(steps)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("script, log", [
    ("train_sft.py", "metrics.jsonl"), ("train_grpo.py", "metrics.jsonl"), ("agents.py", "episodes.jsonl"),
    ("eval.py", "answers.jsonl")])
def test_a_full_disk_is_one_sentence(call, tmp_path, script, log):
    data = rows(tmp_path / "good.jsonl", GOOD, GOOD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / log).symlink_to("/dev/full")
    words = [*WITH_MODEL[script], "--data", data, "--out", tmp_path / "full"]
    refused(call(script, *words), "No space left", "--out")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_log_that_is_not_utf_8_gets_question_marks(monkeypatch, script):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", log)
    runpy.run_path(str(ROOT / script))["options"]()
    print("3 − 1 = 2 €", flush=True)
    assert log.buffer.getvalue() == b"3 ? 1 = 2 ?\n"


def test_a_folder_of_any_name_an_ascii_log_and_no_home_are_as_everywhere(call, tmp_path, monkeypatch):
    folder, log = tmp_path / "größe 考 & mehr", io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    folder.mkdir()
    turns = [{"role": "user", "content": "Größe − was?"}, {"role": "assistant", "content": "Es ist → 5."}]
    (folder / "sätze 1.jsonl").write_text(json.dumps({"messages": turns}, ensure_ascii=False), "utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SLM_CACHE")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as for an unknown user
    monkeypatch.setattr(sys, "stdout", log)
    code, _, err = call("train_sft.py", "--data", "sätze 1.jsonl", "--out", "lauf ä", "--epochs", 1)
    log.flush()
    assert code == 0 and b"Gr??e ? was?" in log.buffer.getvalue(), err
    assert {"adapter", "metrics.jsonl", "report.html"} <= set(os.listdir("lauf ä"))


@pytest.mark.parametrize("given, expected", [
    ({}, "10000"), ({"OMP_WAIT_POLICY": "passive"}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None),
    ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_how_threads_wait_is_set_before_torch_is_loaded(given, expected):
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    code = ("import sys, os; from slm.runs import cli; import slm.workflows; "
            "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**env, **given}, text=True,
                          capture_output=True, check=True)
    assert done.stdout.split() == ["False", str(expected)]
