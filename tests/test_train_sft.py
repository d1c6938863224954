"""Supervised fine-tuning by its promises, on a random model of two layers."""

import contextlib
import json
import os
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_sft
from slm import BadInput, checkpoint, lora, training
from slm.attention import Packed
from slm.formats import lora_files
from slm.runs import rundir
from slm.sampling import Sampler
from slm.tokenizer import Tokenizer


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{"question": f"What is {a} + 1?", "response": f"It is \\boxed{{{a + 1}}}."} for a in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(small, data, out, *options):
    words = ["--model", str(small), "--data", str(data), "--out", str(out), "--batch", "4", "--epochs", "2",
             "--lr", "0.01", "--device", "cpu", "--validate", "0", *options]
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
    ((_, read),), tokenizer = train_sft.read(str(tmp_path / "x.jsonl"), None), Tokenizer.load(checkpoint.TINY)
    row, everything = train_sft.encode(tokenizer, read), train_sft.encode(tokenizer, read, "all")
    marked = lambda row: tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m], skip_special=False)
    assert marked(row) == words and row.ids == everything.ids
    left_out = len(everything.ids) - 1 - sum(everything.mask)
    assert left_out == (len(tokenizer.encode("two<|im_end|>")) if weight == 0 else 0)


@pytest.mark.parametrize("line, named", [
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "line 2: .*not of weight 0"),
    *((f'{{"messages": [{{"role": "assistant", "content": "a", "weight": {weight}}}]}}',
       "line 2: .*weight, from 0 to 1") for weight in ("-0.5", "1.5", '"1"', "NaN", "[]")),
    ('{"question": "a", "response": ', "line 2: not valid JSON"),
    ('[1]', "line 2: .* expected"),
    ('{"question": "a"}', "line 2: expected question and response, or messages; found question"),
    ('{"question": "a", "response": " "}', "line 2: .* found question, response \\(empty\\)"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: .*at least one of the assistant"),
    ('{"messages": [{"role": "assistant"}]}', "line 2: messages must be a list of role and content"),
    ('{"conversations": [{"from": "gpt", "value": "2"}]}', "line 2: .*one of the user")])
def test_a_bad_row_is_named(tmp_path, line, named):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(BadInput, match=named):
        train_sft.read(str(path), None)


def test_the_loss_is_the_mean_weighted_by_the_messages(small, tmp_path):
    """Yes with 3/4 and No with 1/4 are together the cross-entropy with a soft label."""
    model, tokenizer = checkpoint.load(small)
    asked = {"role": "user", "content": "Is 7 odd?"}
    said = [[asked, {"role": "assistant", "content": word, "weight": weight}]
            for word, weight in (("Yes", 0.75), ("No", 0.25), ("Maybe", 1), ("Never", 0))]
    lines = [json.dumps({"messages": messages}) for messages in said[:3]]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = [train_sft.encode(tokenizer, row) for _, row in train_sft.read(str(tmp_path / "x.jsonl"), None)]
    later = train_sft.encode(tokenizer, said[2] + said[3])  # what follows the last trained message goes
    assert (later.ids, later.mask) == (rows[2].ids, rows[2].mask)
    total = count = 0
    for row, (_, message) in zip(rows, said):
        start = next(i for i, weight in enumerate(row.mask) if weight)
        assert tokenizer.decode(row.ids[start:]) == message["content"]
        attend = Packed([len(row.ids)])
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(row.ids), attend.positions, attend))
        total += message["weight"] * F.cross_entropy(
            logits[start - 1:-1], torch.tensor(row.ids[start:]), reduction="sum").item()
        count += message["weight"] * (len(row.ids) - start)
    looked = train_sft.look(model, Sampler(model, tokenizer), rows, contextlib.nullcontext())
    assert looked["held_out_loss"] == pytest.approx(total / count, rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for micro_tokens in (1, 4096):
        args = SimpleNamespace(micro_tokens=micro_tokens, clip=1e9, lr=0.0, dtype="float32")
        found = train_sft.one_step(model, rows, optimizer, 0.0, contextlib.nullcontext(), args)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["trained_tokens"] == count


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="no rows"):
        train_sft.read(str(tmp_path / "x.jsonl"), None)


def test_worked_solutions_of_a_problem_set_will_do(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    ((question, messages),) = train_sft.read(str(path), None)
    assert question == "q"
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
    assert (tmp_path / "run" / "report.html").is_file()
    told = json.loads((tmp_path / "run" / "tokens.json").read_text())
    assert len(told["text"]) == len(told["mask"]) and set(told["mask"]) == {0, 1}
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
             "--lr", "0.01", "--device", "cpu", "--dropout", "0", "--micro-tokens", "60", "--validate", "1"]
    for how, out in (("--lora", "adapter_model.safetensors"), ("--full", "model.safetensors")):
        for ranks in ("1", "2"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
            subprocess.run([*launch, *words, how, "--out", str(tmp_path / ranks / how)], check=True, cwd=root)
        for folder in ("best", "model" if how == "--full" else "adapter"):
            a, b = (load_file(tmp_path / ranks / how / folder / out) for ranks in ("1", "2"))
            assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
        a, b = ((tmp_path / ranks / how / "metrics.jsonl").read_text().splitlines() for ranks in ("1", "2"))
        for row, other in zip(map(json.loads, a), map(json.loads, b), strict=True):
            assert row.get("held_out_loss") == pytest.approx(other.get("held_out_loss"), abs=1e-5)


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


# ---- held-out rows ---------------------------------------------------------------------------------------

def split(rows, wanted, seed=0):
    return training.hold_out(rows, itemgetter(0), wanted, seed)


def without_speed(rows):
    left_out = ("tokens_per_s", "held_out_loss", "held_out_right", "best")
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows if row["step"]]


@pytest.mark.parametrize("how", [["--lora", "--dropout", "0.1"], ["--full"]])
def test_looking_at_held_out_rows_changes_no_bit_of_the_training(small, data, tmp_path, how):
    looked = train(small, data, tmp_path / "looked", *how, "--validate", "1")
    kept = split(train_sft.read(str(data), None), 1)[0]
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(json.dumps({"messages": talk}) + "\n" for _, talk in kept))
    alone = train(small, rest, tmp_path / "alone", *how)
    assert without_speed(looked) == without_speed(alone) and len(kept) == 11
    looks = [row["step"] for row in looked if "held_out_loss" in row]
    assert looks == list(range(7)) and "held_out_loss" not in str(alone)


def test_problems_are_held_out_with_all_their_rows_and_a_tenth_at_most():
    rows = [(f"Question {n}?", [n, way]) for n in range(40) for way in range(3)]
    rows += [(f" QUESTION  {n}?", [n, "shouted"]) for n in range(40)]
    for wanted, got in ((0, 0), (3, 3), (100, 4)):
        train_rows, held_out = split(rows, wanted)
        numbers = {n for _, (n, _) in held_out}
        assert len(numbers) == got and len(held_out) == 4 * got and len(train_rows) == 160 - 4 * got
        assert numbers.isdisjoint(n for _, (n, _) in train_rows)
    other = split(rows, 3, seed=1)[1]
    again = split(rows, 3)[1]
    assert {n for n, _ in other} != {n for n, _ in again}


def test_records_about_one_question_are_one_problem(tmp_path):
    path = tmp_path / "x.jsonl"
    talk = [{"role": "user", "content": "Is 4 right?"}, {"role": "assistant", "content": "CORRECT"}]
    path.write_text(json.dumps({"question": "2 + 2?", "messages": talk}) + "\n"
                    + json.dumps({"messages": talk}) + "\n")
    assert [question for question, _ in train_sft.read(str(path), None)] == ["2 + 2?", "Is 4 right?"]


def test_held_out_loss_and_accuracy_are_those_of_the_model(tiny):
    """Against cross-entropy of each row alone, and a plain loop of argmax."""
    model, tokenizer = tiny
    talks = [train_sft.conversation(f"What is {a} + {b}?", f"{a} + {b} = {a + b}: \\boxed{{{a + b}}}.")
             for a, b in ((3, 4), (20, 5), (7, 8))]
    rows = [train_sft.encode(tokenizer, talk) for talk in talks]
    rows.append(train_sft.encode(tokenizer, [{"role": "user", "content": "Say yes."},
                                             {"role": "assistant", "content": "yes"}]))
    total, count, right = 0.0, 0, 0
    limit = 2 * max(sum(row.mask) for row in rows)
    for row in rows:
        ids, attend = torch.tensor(row.ids), Packed([len(row.ids)])
        with torch.no_grad():
            logits = model.logits(model(ids, attend.positions, attend))
        start = row.mask.index(1)
        total += F.cross_entropy(logits[start - 1:-1], ids[start:], reduction="sum").item()
        count += len(ids) - start
        said = ids[:start]
        while len(said) < start + limit:
            attend = Packed([len(said)])
            with torch.no_grad():
                said = torch.cat([said, model.logits(model(said, attend.positions, attend)[-1:]).argmax(-1)])
            text = tokenizer.decode(said[start:].tolist())
            if int(said[-1]) in tokenizer.stop_ids or re.search(r"boxed\{[^}]*\}.*\n", text):
                break
        wanted = tokenizer.decode(row.ids[start:])
        box = re.search(r"boxed\{(\d+)\}", wanted)
        right += f"boxed{{{box[1]}}}" in text if box else text.strip() == wanted
    got = train_sft.look(model, Sampler(model, tokenizer), rows, contextlib.nullcontext())
    assert got["held_out_loss"] == pytest.approx(total / count, abs=1e-5)
    assert got["held_out_right"] == right / len(rows) and model.training


def test_best_is_the_step_of_the_lowest_held_out_loss_and_the_last_stands_beside_it(small, data, tmp_path,
                                                                                     monkeypatch, capsys):
    told = iter([3.0, 2.0, 1.0, 2.5, 1.0, 1.5, 2.0])
    monkeypatch.setattr(train_sft, "look", lambda *_: {"held_out_loss": next(told), "held_out_right": 0.5})
    rows = train(small, data, tmp_path / "run", "--validate", "1")
    assert [row.get("best") for row in rows] == [None, True, True, False, False, False, False]
    assert f"held-out loss 1.0000, 50% right after step 2; held-out loss 2.0000, 50% right after step 6; " \
        f"the second is {tmp_path / 'run' / 'best'}" in capsys.readouterr().out
    monkeypatch.undo()
    stopped = rundir.RunDir.log

    def dies(self, name, *rows):
        stopped(self, name, *rows)
        if rows[0]["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rundir.RunDir, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, data, tmp_path / "cut", "--validate", "1", "--save-every", "1")
    best, last, second = (load_file(tmp_path / folder / "adapter_model.safetensors")
                          for folder in ("run/best", "run/adapter", "cut/best"))
    assert all(torch.equal(best[k], second[k]) for k in best)
    assert not all(torch.equal(best[k], last[k]) for k in best)


def test_best_survives_a_stop_and_a_resume(small, data, tmp_path, monkeypatch):
    options = ["--validate", "1", "--full", "--save-every", "2"]
    whole = train(small, data, tmp_path / "whole", *options)
    save = rundir.RunDir.save
    for at in (0, 4):
        def dies(self, state, at=at):
            if state["step"] > at:
                raise KeyboardInterrupt
            save(self, state)

        out = tmp_path / f"cut{at}"
        monkeypatch.setattr(rundir.RunDir, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            train(small, data, out, *options)
        monkeypatch.setattr(rundir.RunDir, "save", save)
        cut = train(small, data, out, *options, "--resume")
        pick = ("step", "loss", "held_out_loss", "best")
        assert [[row.get(k) for k in pick] for row in cut] == [[row.get(k) for k in pick] for row in whole]
        a, b = (load_file(folder / "best" / "model.safetensors") for folder in (tmp_path / "whole", out))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_second_ctrl_c_stops_a_look(tiny, monkeypatch):
    """Sampler.generate then gives back the replies that are finished."""
    model, tokenizer = tiny
    rows = [train_sft.encode(tokenizer, train_sft.conversation("What is 1 + 1?", "It is \\boxed{2}."))]
    monkeypatch.setattr(Sampler, "generate", lambda self, requests, progress: [[] for _ in requests])
    with pytest.raises(KeyboardInterrupt):
        train_sft.look(model, Sampler(model, tokenizer), rows, contextlib.nullcontext())


@pytest.mark.parametrize("options", [["--validate", "1"], []])
def test_a_run_in_which_nothing_was_learned_says_so(small, data, tmp_path, capsys, options):
    train(small, data, tmp_path / "run", "--batch", "12", "--lr", "0", *options)
    assert "nothing was learned" in capsys.readouterr().out and not (tmp_path / "run" / "best").exists()
    train(small, data, tmp_path / "more", "--epochs", "6", *options)
    assert "nothing was learned" not in capsys.readouterr().out


@pytest.mark.parametrize("words, full", [([], False), (["--lora"], False), (["--full"], True)])
def test_the_settings_name_what_is_trained(words, full):
    assert train_sft.options().parse_args(words).lora is not full


@pytest.mark.parametrize("how", ["--lora", "--full"])
def test_an_adapter_as_the_model_is_refused_with_the_way_out(small, data, tmp_path, how):
    model, _ = checkpoint.load(small)
    lora.add(model, 4, 8)
    lora_files.save(model, tmp_path / "adapter", base=small)
    with pytest.raises(BadInput, match=r"an adapter, .* export it first: python -m slm"):
        train(tmp_path / "adapter", data, tmp_path / "run", how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--validate", "1"], ["--full"]])
def test_a_dry_run_says_what_the_run_would_do_and_leaves_nothing(small, data, tmp_path, capsys, options):
    words = ["--model", small, "--data", str(data), "--batch", "4", "--device", "cpu", "--out",
             str(tmp_path / "run"), *options]
    train_sft.main(train_sft.options().parse_args([*words, "--dry-run"]))
    said = capsys.readouterr().out
    tokens = re.search(r"rows, ([\d,]+) tokens", said)[1].replace(",", "")
    promise = rf"dry run: 6 steps, {2 * int(tokens):,} tokens; .* 0:00:\d\d .* memory \d\.\d\d GB"
    assert re.search(promise, said)
    assert not (tmp_path / "run").exists()
    train_sft.main(train_sft.options().parse_args(words))
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    taken = [row["tokens"] for row in rows if row["step"]]
    assert len(taken) == 6 and sum(taken) == 2 * int(tokens)


def test_without_data_the_newest_records_that_fit_the_built_in_model_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_sft.newest() == "tiny" and "no run of make_data.py" in capsys.readouterr().out
    for age, (name, data, rows) in enumerate([("old", ["tiny"], "{}"), ("fits", ["tiny"], "{}"),
                                              ("other", ["gsm8k"], "{}"), ("empty", ["tiny"], "")]):
        run = Path("runs") / f"data-{name}"
        run.mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps({"settings": {"data": data}}))
        (run / "records.jsonl").write_text(rows)
        os.utime(run / "records.jsonl", (age, age))
    assert train_sft.newest() == "runs/data-fits/records.jsonl"
