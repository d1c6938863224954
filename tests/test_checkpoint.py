"""checkpoint.py: round trips, bad input named, nothing half-written, downloads from a stand-in of the hub."""

import hashlib
import http.server
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm import BadInput, checkpoint, lora
from slm.checkpoint import TINY
from slm.formats import lora_files
from slm.formats.tensors import SafeTensors, write_safetensors
from slm.tokenizer import Tokenizer


@pytest.fixture
def saved(random_model, tmp_path):
    """A small random model with the built-in tokenizer, saved; (directory, model)."""
    model = random_model(vocab=2000)
    checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model")
    return tmp_path / "model", model


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(random_model, tmp_path, shard_bytes, dtype):
    model = random_model(vocab=2000, tied=False, dtype=dtype)
    checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model", shard_bytes=shard_bytes)
    again, tokenizer = checkpoint.load(tmp_path / "model", dtype=dtype)
    assert same(model, again) and replace(again.config, ids=None) == model.config and not again.training
    assert tokenizer.chat([{"role": "user", "content": "2+3?"}])
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard_bytes < 10**9)
    assert os.listdir(tmp_path) == ["model"]


def test_saved_files_say_what_we_know(saved):
    directory, _ = saved
    generation = json.loads((directory / "generation_config.json").read_text())
    tokenizer = Tokenizer.load(directory)
    assert set(generation["eos_token_id"]) == tokenizer.stop_ids
    assert set(tokenizer.stop_texts) == {"<|endoftext|>", "<|im_end|>"}
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"


def test_our_safetensors_are_the_librarys(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half(),
               "empty": torch.empty(0, 4), "number": torch.tensor(2.5)}
    write_safetensors(tmp_path / "ours", tensors)
    theirs = load_file(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs")
    file = SafeTensors(tmp_path / "theirs")
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(file.read(name), tensor)


def test_the_tied_head_may_be_stored_twice(saved):
    directory, model = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    assert same(checkpoint.load(directory)[0], model)


def test_a_head_of_its_own_counts_where_the_config_ties_it(saved, capsys):
    directory, model = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    again, tokenizer = checkpoint.load(directory)
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight + 1) and not again.config.tied
    assert "lm_head.weight is another, and is used" in capsys.readouterr().err
    checkpoint.save(again, tokenizer, directory.parent / "saved")  # says now what it is
    assert same(checkpoint.load(directory.parent / "saved")[0], again) and not capsys.readouterr().err


def test_the_single_file_counts_and_not_an_older_index_beside_it(saved, random_model):
    directory, model = saved
    older = directory.parent / "older"
    checkpoint.save(random_model(vocab=2000, seed=3), Tokenizer.load(TINY), older, shard_bytes=20_000)
    for path in older.glob("model*"):
        path.rename(directory / path.name)
    assert len(list(directory.glob("*.safetensors"))) > 2 and same(checkpoint.load(directory)[0], model)
    for path in directory.glob("model-*"):  # the index without its shards
        path.unlink()
    assert same(checkpoint.load(directory)[0], model)


def test_of_two_shards_with_one_tensor_the_one_counts_that_the_index_names(random_model, tmp_path):
    model = random_model(vocab=2000)
    checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model", shard_bytes=20_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    tensors = [load_file(shard) for shard in shards]
    for others, shard in ((tensors[-1], shards[0]), (tensors[0], shards[-1])):
        wrong = {name: torch.zeros_like(tensor) for name, tensor in others.items()}
        save_file(wrong | load_file(shard), shard)
    assert same(checkpoint.load(tmp_path / "model")[0], model)


# ---- bad input ---------------------------------------------------------------------------------------------

def no_model(d):
    shutil.rmtree(d)
    d.mkdir()
    (d / "notes.txt").write_text("hello")


def in_a_run(d):
    no_model(d)
    (d / "adapter").mkdir()
    (d / "adapter" / "adapter_config.json").write_text("{}")


def cut(d, keep=0.6):
    path = d / "model.safetensors"
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


def pickle_only(d):
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def shard_gone(d):
    (d / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil, named", [
    (no_model, "not a model"),
    (in_a_run, "not a model, .*; try .*/adapter"),
    (cut, "cut short"),
    (lambda d: cut(d, 0.0001), "not a safetensors file"),
    (lambda d: (d / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 4096), "not a safetensors file"),
    (pickle_only, "pytorch_model.bin is a pickle"),
    (shard_gone, "model-00001-of-00002"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda d: edit(d / "config.json", model_type="gpt2"), "gpt2"),
    (lambda d: edit(d / "config.json", vocab_size=1000), "the tokenizer has id"),
    (lambda d: edit(d / "config.json", num_key_value_heads="2"), "value_heads is '2', expected a whole"),
    (lambda d: edit(d / "config.json", head_dim=8.5), "head_dim is 8.5, expected a whole"),
    (lambda d: edit(d / "config.json", max_position_embeddings="512"), "max_position_embeddings is '512'"),
    (lambda d: edit(d / "config.json", rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a number"),
    (lambda d: edit(d / "config.json", rope_theta="x"), "rope_theta is 'x', expected a number"),
    (lambda d: (d / "config.json").write_text("{"), "config.json: not readable as JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer file"),
])
def test_a_spoilt_directory_is_one_sentence(saved, spoil, named):
    directory, _ = saved
    spoil(directory)
    with pytest.raises(BadInput, match=named) as error:
        checkpoint.load(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_all_wrong_tensors_are_listed_at_once(saved):
    directory, _ = saved
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.9.extra"] = torch.zeros(2)
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(3)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BadInput, match="4 tensors") as error:
        checkpoint.load(directory)
    for text in ("missing model.layers.0.mlp.up_proj.weight (64, 32)", "missing model.norm.weight (32,)",
                 "unexpected model.layers.9.extra (2,)", "q_proj.bias is (3,), expected (32,)"):
        assert text in str(error.value)


def test_integer_weights_are_refused_by_name(saved):
    directory, _ = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.norm\.weight is I8"):
        checkpoint.load(directory)


@pytest.mark.parametrize("name", ["no/such/directory", "nothing-here", "/not/there", "./a/b", ""])
def test_a_name_that_is_nothing_is_said(name):
    with pytest.raises(BadInput):
        checkpoint.resolve(name)


# ---- nothing half-written ----------------------------------------------------------------------------------

def test_an_interrupted_save_leaves_the_old_model(saved, random_model, monkeypatch):
    directory, model = saved
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", fails)
    with pytest.raises(OSError):
        checkpoint.save(random_model(vocab=2000, seed=5), Tokenizer.load(TINY), directory)
    assert same(checkpoint.load(directory)[0], model) and os.listdir(directory.parent) == ["model"]
    with pytest.raises(OSError):
        checkpoint.save(model, Tokenizer.load(TINY), directory.parent / "new")
    assert os.listdir(directory.parent) == ["model"]


def test_a_full_disk_is_an_oserror_and_leaves_nothing(saved, tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails in the same place."""
    model, tokenizer = checkpoint.load(saved[0])
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(model, tokenizer, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_with_other_things_is_not_replaced(random_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="something other than a model"):
        checkpoint.save(random_model(vocab=2000), Tokenizer.load(TINY), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_adapter_that_was_not_merged_cannot_be_forgotten(random_model, tmp_path):
    model = random_model(vocab=2000)
    plain = random_model(vocab=2000)
    lora.add(model, r=2)
    with pytest.raises(ValueError, match="merge"):
        checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model")
    lora.merge(model)
    checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model")
    assert same(checkpoint.load(tmp_path / "model")[0], plain)


def test_an_adapter_directory_loads_its_base_and_itself(tmp_path):
    model, _ = checkpoint.load("tiny")
    lora.add(model, r=2)
    torch.nn.init.normal_(lora.parameters(model)[1])
    lora_files.save(model, tmp_path / "adapter", base="tiny")
    again, tokenizer = checkpoint.load(tmp_path / "adapter")
    assert lora.names(again) == ["default"] and lora.active(again) == "default"
    assert torch.equal(lora.parameters(again)[1], lora.parameters(model)[1])
    assert tokenizer.directory == TINY


def test_an_adapter_without_its_base_says_where_it_looked(random_model, tmp_path):
    model = random_model()
    lora.add(model, r=2)
    lora_files.save(model, tmp_path / "adapter", base="/not/there")
    with pytest.raises(BadInput, match=r"adapter_config\.json: base_model_name_or_path '/not/there'"):
        checkpoint.load(tmp_path / "adapter")


@pytest.mark.parametrize("name", [5, ["a"], "a" * 5000])
def test_a_base_that_is_no_name_is_one_sentence(random_model, tmp_path, name):
    model = random_model()
    lora.add(model, r=2)
    lora_files.save(model, tmp_path / "adapter", base=tmp_path)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=name)
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({"path": name}))
    with pytest.raises(BadInput, match=r"adapter_config\.json: base_model_name_or_path "):
        checkpoint.load(tmp_path / "adapter")


@pytest.mark.parametrize("bases", [["a"], ["b", "a"], ["b", None]])
def test_an_adapter_whose_base_is_an_adapter_is_one_sentence(random_model, tmp_path, bases):
    """The base of a is itself; or they are each other's; or b is an adapter without a base."""
    model = random_model()
    lora.add(model, r=2)
    for name, base in zip("ab", bases):
        lora_files.save(model, tmp_path / name)
        edit(tmp_path / name / "adapter_config.json", base_model_name_or_path=base and str(tmp_path / base))
    with pytest.raises(BadInput, match=r"a/adapter_config\.json: base_model.*: an adapter, expected"):
        checkpoint.load(tmp_path / "a")


# ---- cost --------------------------------------------------------------------------------------------------

def test_loading_needs_the_weights_and_one_tensor(random_model, tmp_path):
    """Peak memory of a fresh process that loads 30 MB of bfloat16 as 60 MB of float32."""
    model = random_model(vocab=2000, hidden=512, intermediate=4096, heads=8, dtype=torch.bfloat16)
    checkpoint.save(model, Tokenizer.load(TINY), tmp_path / "model")
    code = """if True:
        import resource, sys
        from slm import checkpoint
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        checkpoint.load("tiny")
        before = peak()
        model, _ = checkpoint.load(sys.argv[1])
        sizes = [p.nbytes for p in model.parameters()]
        print(peak() - before, sum(sizes), max(sizes))"""
    command = [sys.executable, "-c", code, tmp_path / "model"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights, largest = map(int, out.stdout.split())
    assert grown < weights + largest + 4e6


# ---- the hub -----------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs: a repository's file list, and the files."""
    directory: Path
    fetched: list[str]
    breaks = 0  # so many downloads of the weights break off in the middle

    def do_GET(self, body=True):
        path = self.path.split("?")[0]
        files = {p.name: p.read_bytes() for p in self.directory.iterdir()}
        if path.startswith("/api/models/org/small/tree/"):
            return self.answer([{"type": "file", "path": name, "size": len(data), "oid": _sha(data)}
                                for name, data in files.items()], body)
        if path.startswith("/api/models/org/small"):
            return self.answer({"id": "org/small", "sha": "a" * 40, "siblings": []}, body)
        name = path.rpartition("/")[2]
        if not path.startswith("/org/small/resolve/") or name not in files:
            return self.answer({"error": "Repository not found"}, body, 404, {"X-Error-Code": "RepoNotFound"})
        cut = body and name == "model.safetensors" and self.breaks > 0
        type(self).breaks -= cut
        self.fetched.extend([name] if body else [])
        headers = {"ETag": f'"{_sha(files[name])}"', "X-Repo-Commit": "a" * 40}
        self.answer(files[name], body, headers=headers, cut=cut)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, data, body, code=200, headers=(), cut=False):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:len(data) // 2] if cut else data)

    def log_message(self, *_):
        pass


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(saved, tmp_path):
    """A hub on this machine that has org/small. hub(*names) resolves the names in one fresh process, a line
    of output each; the name "offline" switches the network off from there on."""
    handler = type("Handler", (Hub,), {"directory": saved[0], "fetched": []})
    (saved[0] / "pytorch_model.bin").write_bytes(b"a pickle")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if True:
        import sys
        from huggingface_hub import constants
        from slm import BadInput, checkpoint
        for name in sys.argv[1:]:
            constants.HF_HUB_OFFLINE |= name == "offline"
            try:
                print(name == "offline" or checkpoint.resolve(name))
            except BadInput as e:
                print("bad:", e)"""

    def resolve(*names, port=server.server_port):
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "cache"),
                            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        run = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    resolve.handler = handler
    yield resolve
    server.shutdown()


def test_a_hub_id_is_downloaded_once_without_pickles_and_then_works_offline(hub, saved):
    first, none, _, again, offline = hub("org/small", "org/other", "offline", "org/small", "org/other")
    assert first == again and same(checkpoint.load(first)[0], saved[1])
    fetched = hub.handler.fetched
    assert "pytorch_model.bin" not in fetched and fetched.count("model.safetensors") == 1
    assert none == "bad: org/other: no such directory, and no such model on the hub"
    assert "bad: org/other: no such directory, and it cannot be downloaded" in offline
    assert "put config.json" in offline


@pytest.mark.slow
def test_a_download_that_breaks_off_is_not_taken_for_a_model(hub, saved):
    hub.handler.breaks = 1000
    broken, = hub("org/small")
    hub.handler.breaks = 0
    whole, = hub("org/small")
    assert broken.startswith("bad: org/small: no such directory, and it cannot be downloaded")
    assert same(checkpoint.load(whole)[0], saved[1])


@pytest.mark.slow
def test_an_unreachable_hub_says_what_to_do(hub):
    line, = hub("org/small", port=9)
    assert line.startswith("bad: org/small") and "into a directory" in line


def test_loading_does_not_import_the_compiler():
    """One normal_ on the meta device would, and cost every script more than a second."""
    code = ("import sys\nfrom slm import checkpoint\ncheckpoint.load('tiny')\n"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---- export ------------------------------------------------------------------------------------------------

def a_run(model, folder, path, dtype):
    """A run's folder: the model in base/, and an adapter for it in adapter/."""
    checkpoint.save(model.to(dtype), Tokenizer.load(TINY), path / "base")
    model, _ = checkpoint.load(path / "base", dtype=dtype)
    lora.add(model, 4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.normal_(std=0.1)
    lora_files.save(model, path / folder, base=path / "base")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["", "adapter"])
def test_a_run_is_exported_merged_in_the_dtype_of_its_base(random_model, tmp_path, dtype, given):
    model = a_run(random_model(vocab=2000), "adapter", tmp_path, dtype)
    checkpoint.export(tmp_path / given, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    for path, layer in lora.layers(model).items():  # W + s B A by hand
        A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        expected = (layer.weight.double() + 2 * B @ A).to(dtype)
        assert torch.allclose(tensors[f"{path}.weight"], expected, rtol=2 ** -7, atol=1e-6), path
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= there
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_export_is_one_command_and_says_what_is_no_run(random_model, tmp_path, monkeypatch, capsys):
    a_run(random_model(vocab=2000), "adapter", tmp_path / "run", torch.float32)

    def command(*words):  # python -m slm.checkpoint ...
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, words)])
        runpy.run_path(checkpoint.__file__, run_name="__main__")
        return capsys.readouterr().out

    assert "next: python eval.py --model" in command("export", tmp_path / "run", tmp_path / "out")
    assert not lora.names(checkpoint.load(tmp_path / "out")[0])
    for words in (("export", tmp_path / "none", tmp_path / "x"), ("export", tmp_path / "run", tmp_path)):
        with pytest.raises(SystemExit, match="2"):
            command(*words)
        assert capsys.readouterr().err.startswith("error: ")


def test_a_full_fine_tuning_is_exported_as_it_is(random_model, tmp_path):
    checkpoint.save(random_model(vocab=2000), Tokenizer.load(TINY), tmp_path / "run" / "model")
    checkpoint.export(tmp_path / "run", tmp_path / "out")
    assert same(checkpoint.load(tmp_path / "run" / "model")[0], checkpoint.load(tmp_path / "out")[0])


def test_a_folder_left_half_by_a_kill_is_replaced(random_model, tmp_path):
    model, tokenizer = random_model(vocab=2000), Tokenizer.load(TINY)
    for left in (".m.part", ".m.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    checkpoint.save(model, tokenizer, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and same(checkpoint.load(tmp_path / "m")[0], model)
