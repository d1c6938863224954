"""Supervised fine-tuning by its promises, on a random model of two layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import write_small

import train_sft
from slm import BadInput, checkpoint, lora, training
from slm.runs import rundir
from slm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{"question": f"What is {a} + 1?", "response": f"It is \\boxed{{{a + 1}}}."} for a in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(small, data, out, *options):
    words = ["--model", small, "--data", str(data), "--out", str(out), "--batch", "4", "--epochs", "2",
             "--lr", "0.01", "--device", "cpu", *options]
    args = train_sft.options().parse_args(words)
    train_sft.main(args)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- data ------------------------------------------------------------------------------------------------

def test_the_response_and_its_end_token_are_trained_and_nothing_else():
    tokenizer = Tokenizer.load(checkpoint.TINY)
    row = train_sft.encode(tokenizer, train_sft.conversation("What is 1 + 1?", "It is \\boxed{2}."))
    trained = [i for i, m in zip(row.ids, row.mask) if m]
    assert tokenizer.decode(trained, skip_special=False) == "It is \\boxed{2}.<|im_end|>"
    assert trained[-1] == tokenizer.end_of_turn and row.mask == sorted(row.mask)
    assert train_sft.encode(tokenizer, train_sft.conversation("a", "b"), "all").mask[:3] == [0, 1, 1]


def test_every_assistant_message_is_trained_and_ids_equal_the_whole_rendering():
    tokenizer = Tokenizer.load(checkpoint.TINY)
    said = [("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    talk = [{"role": role, "content": content} for role, content in said]
    row = train_sft.encode(tokenizer, talk)
    assert tokenizer.chat(talk, generation=False)[:len(row.ids)] == row.ids
    trained = tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m], skip_special=False)
    assert trained == "two<|im_end|>four<|im_end|>"


@pytest.mark.parametrize("weight, words", [(0, "four<|im_end|>"), (1, "two<|im_end|>four<|im_end|>"),
                                           (None, "two<|im_end|>four<|im_end|>")])
def test_a_message_of_weight_0_is_not_trained(tmp_path, weight, words):
    """As in OpenAI's files; null is what tables write where a row lacks the field."""
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    talk = [{"role": role, "content": content} for role, content in said]
    talk[1]["weight"] = weight
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk}))
    (read,), tokenizer = train_sft.read(str(tmp_path / "x.jsonl"), None), Tokenizer.load(checkpoint.TINY)
    row, everything = train_sft.encode(tokenizer, read), train_sft.encode(tokenizer, read, "all")
    marked = lambda row: tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m], skip_special=False)
    assert marked(row) == words and row.ids == everything.ids
    left_out = len(everything.ids) - 1 - sum(everything.mask)
    assert left_out == (len(tokenizer.encode("two<|im_end|>")) if weight == 0 else 0)


@pytest.mark.parametrize("line, named", [
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "line 2: .*not of weight 0"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "line 2: .*weight, 0 or 1"),
    ('{"question": "a", "response": ', "line 2: not valid JSON"),
    ('[1]', "line 2: .* expected"),
    ('{"question": "a"}', "line 2: expected question and response, or messages; found question"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: .*at least one of the assistant"),
    ('{"messages": [{"role": "assistant"}]}', "line 2: messages must be a list of role and content")])
def test_a_bad_row_is_named(tmp_path, line, named):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(BadInput, match=named):
        train_sft.read(str(path), None)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="no rows"):
        train_sft.read(str(tmp_path / "x.jsonl"), None)


def test_worked_solutions_of_a_problem_set_will_do(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    (messages,) = train_sft.read(str(path), None)
    assert messages[1]["content"] == "1+1=2\nThe answer is \\boxed{2}."


def test_every_epoch_has_every_row_once_in_another_order():
    steps = training.batches(10, 4, 2, seed=1)
    assert [len(batch) for batch in steps] == [4, 4, 2] * 2
    first, second = ([i for batch in part for i in batch] for part in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


# ---- runs ------------------------------------------------------------------------------------------------

def test_the_loss_falls_and_the_adapter_loads(small, data, tmp_path, capsys):
    rows = train(small, data, tmp_path / "run", "--epochs", "6")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert "<<" in (said := capsys.readouterr().out) and "predicted peak" in said and "next: python" in said
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "metrics.png").is_file()
    model, _ = checkpoint.load(tmp_path / "run" / "adapter")
    assert lora.active(model) == "default"


def test_full_fine_tuning_saves_a_model_directory(small, data, tmp_path):
    train(small, data, tmp_path / "run", "--full", "--epochs", "1")
    tuned, tokenizer = checkpoint.load(tmp_path / "run" / "model")
    before, _ = checkpoint.load(small)
    assert not torch.equal(tuned.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert tokenizer.encode("apples") == Tokenizer.load(checkpoint.TINY).encode("apples")


@pytest.mark.parametrize("how", [["--lora", "--dropout", "0.1"], ["--full"]])
def test_a_run_stopped_anywhere_and_resumed_ends_on_the_same_bits(small, data, tmp_path, monkeypatch, how):
    """6 steps = 4 steps, killed (checkpoint at 3), + resume: same tensors, same metrics."""
    whole = train(small, data, tmp_path / "whole", *how)
    log = rundir.RunDir.log

    def dies(self, name, *rows):
        if rows[0]["step"] == 5:
            raise KeyboardInterrupt
        log(self, name, *rows)

    monkeypatch.setattr(rundir.RunDir, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, data, tmp_path / "cut", *how, "--save-every", "3")
    monkeypatch.setattr(rundir.RunDir, "log", log)
    cut = train(small, data, tmp_path / "cut", *how, "--save-every", "3", "--resume")
    clean = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows] for rows in (whole, cut)]
    assert clean[0] == clean[1] and len(whole) == 6
    a, b = (torch.load(tmp_path / n / "checkpoints" / "step-000006" / "rank0.pt") for n in ("whole", "cut"))
    assert all(torch.equal(a["parameters"][k], b["parameters"][k]) for k in a["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["4", "11"])  # with 11, the second rank has no row in every other step
def test_two_ranks_take_the_same_steps_as_one_process(small, data, tmp_path, batch):
    root = Path(train_sft.__file__).parent
    words = [str(root / "train_sft.py"), "--model", small, "--data", str(data), "--batch", batch,
             "--lr", "0.01", "--device", "cpu", "--dropout", "0", "--micro-tokens", "60"]
    for how, out in (("--lora", "adapter/adapter_model.safetensors"), ("--full", "model/model.safetensors")):
        for ranks in ("1", "2"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
            subprocess.run([*launch, *words, how, "--out", str(tmp_path / ranks / how)], check=True, cwd=root)
        a, b = (load_file(tmp_path / ranks / how / out) for ranks in ("1", "2"))
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_long_rows_are_left_out_and_counted(small, data, tmp_path, capsys):
    with data.open("a") as f:
        f.write(json.dumps({"question": "long", "response": "and so on " * 200}) + "\n")
    train(small, data, tmp_path / "run", "--epochs", "1")
    assert "left out: 1 of 13 rows" in capsys.readouterr().out
    with pytest.raises(BadInput, match="all 13 rows"):
        train(small, data, tmp_path / "other", "--max-length", "3")


def test_the_cut_into_micro_batches_does_not_change_the_run(small, data, tmp_path):
    runs = [train(small, data, tmp_path / n, "--epochs", "1", "--micro-tokens", n) for n in ("1", "9", "99")]
    for rows in runs[1:]:
        assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in runs[0]], rel=1e-5)
        assert [r["grad_norm"] for r in rows] == pytest.approx([r["grad_norm"] for r in runs[0]], rel=1e-4)
