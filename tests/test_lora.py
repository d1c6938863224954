"""lora.py: exactness of adapters, per-sequence adapters, PEFT's files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm import BadInput, checkpoint, lora
from slm.attention import Packed
from slm.formats import lora_files
from slm.runs import cli
from slm.tokenizer import Tokenizer


def logits(model, *sequences):
    attend = Packed([len(s) for s in sequences])
    with torch.no_grad():
        return model.logits(model(torch.cat(sequences), attend.positions, attend))


def trained(model, name="default", seed=1, **options):
    """The model with an adapter whose B is not zero any more."""
    lora.add(model, r=4, alpha=8, name=name, **options)
    torch.manual_seed(seed)
    for p in lora.parameters(model, name):
        torch.nn.init.normal_(p, 0, 0.1)
    return model


IDS = torch.arange(40) * 7 % 97


def test_a_new_adapter_changes_nothing(random_model):
    model = random_model()
    base = logits(model, IDS)
    lora.add(model, r=4)
    assert torch.equal(logits(model, IDS), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_the_base_model_bit_for_bit(random_model, dtype):
    model = random_model(dtype=dtype)
    base = logits(model, IDS)
    trained(model)
    assert not torch.equal(logits(model, IDS), base)
    with lora.off(model):
        assert torch.equal(logits(model, IDS), base)
    assert not torch.equal(logits(model, IDS), base)


def test_only_the_adapter_trains_and_dropout_acts_in_training_only(random_model):
    model = trained(random_model(), dropout=0.5)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora.parameters(model)}
    still = logits(model, IDS)
    assert torch.equal(still, logits(model, IDS))
    assert not torch.equal(still, logits(model.train(), IDS))


def test_merge_is_exact_in_float32_and_unmerge_restores_the_bits(random_model):
    model = trained(random_model())
    before = {name: p.clone() for name, p in model.named_parameters()}
    apart = logits(model, IDS)
    difference = lora.merge(model)
    assert (logits(model, IDS) - apart).abs().max() < 1e-5 and difference < 1e-5
    lora.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(logits(model, IDS), apart)


def test_merge_into_bfloat16_is_computed_in_float32_and_says_what_it_cost(random_model):
    model = trained(random_model(dtype=torch.bfloat16))
    layer = model.model.layers[0].mlp.down_proj
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    exact = (layer.weight.float() + B @ A * 2).bfloat16()
    before, apart = layer.weight.clone(), logits(model, torch.arange(64) * 977 % 97).float()
    difference = lora.merge(model)
    assert torch.equal(layer.weight, exact)
    assert difference == (logits(model, torch.arange(64) * 977 % 97).float() - apart).abs().max() > 0
    lora.unmerge(model)
    assert torch.equal(layer.weight, before)


def test_merging_two_adapters_and_undoing_both(random_model):
    model = trained(trained(random_model(), "one"), "two", seed=2)
    bits = [p.clone() for p in model.parameters()]
    lora.merge(model, "one")
    lora.merge(model, "two")
    with pytest.raises(ValueError):
        lora.unmerge(model, "one")
    with pytest.raises(BadInput), lora.use(model, "one"):
        pass
    lora.unmerge(model, "two")
    lora.unmerge(model, "one")
    assert all(torch.equal(a, b) for a, b in zip(bits, model.parameters()))


def test_after_merge_and_remove_a_new_adapter_starts_from_the_merged_model(random_model):
    """What GRPO does with an SFT adapter: the reference is the merged model, adapter off."""
    model = trained(random_model())
    lora.merge(model)
    merged = logits(model, IDS)
    lora.remove(model)
    assert lora.names(model) == []
    trained(model, seed=3)
    assert not torch.equal(logits(model, IDS), merged)
    with lora.off(model):
        assert torch.equal(logits(model, IDS), merged)


def test_every_sequence_of_a_batch_can_have_its_own_adapter(random_model):
    model = trained(trained(random_model(), "solver"), "checker", seed=2)
    rows = [("solver", 5), (None, 9), ("checker", 1), ("checker", 12), ("solver", 30)]
    sequences = [IDS[:n] for _, n in rows]
    alone = []
    for (name, _), ids in zip(rows, sequences):
        with lora.use(model, name):
            alone.append(logits(model, ids))
    with lora.use(model, rows):
        together = logits(model, *sequences)
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert (alone[0] - logits(model, sequences[0])).abs().max() > 1e-3  # "checker" is active again


def test_recomputing_layers_uses_the_adapter_of_the_forward_pass(random_model):
    model = trained(random_model(), "a")
    lora.add(model, r=4, alpha=4, name="b")
    gradients = []
    for recompute in (None, lora.recompute(model)):
        model.recompute = recompute
        attend = Packed([len(IDS)])
        with lora.use(model, "a"):
            loss = model(IDS, attend.positions, attend).square().mean()
        loss.backward()  # now "b" is active
        gradients.append([p.grad.clone() for p in lora.parameters(model, "a")])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][0].any()


def test_an_adapter_gets_gradients_from_its_own_rows_only(random_model):
    model = trained(trained(random_model(), "a"), "b", seed=2)
    attend = Packed([8, 8])
    with lora.use(model, [("a", 8), ("b", 8)]):
        hidden = model(IDS[:16], attend.positions, attend)
    hidden[:8].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters(model, "a"))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in lora.parameters(model, "b"))


def test_lora_on_a_tied_head_is_refused_with_the_reason(random_model):
    with pytest.raises(BadInput, match="tied"):
        lora.add(random_model(tied=True), targets=["q_proj", "lm_head"])
    model = trained(random_model(tied=False), targets=["q_proj", "lm_head"])
    assert lora.spec(model).modules[-1] == "lm_head"


@pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}, {"targets": ["c_attn"]}, {"name": "a.b"}])
def test_bad_options_are_refused(random_model, options):
    with pytest.raises(BadInput):
        lora.add(random_model(), **options)


def test_an_unknown_adapter_is_named(random_model):
    with pytest.raises(BadInput, match="verifier"), lora.use(random_model(), "verifier"):
        pass


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": ["q_proj", "v_proj"], "dropout": 0.1},
                                     {"targets": r".*layers\.1\..*_proj"}])
def test_save_and_load_give_the_same_adapter(random_model, tmp_path, options):
    model = trained(random_model(), **options)
    lora_files.save(model, tmp_path / "adapter", base="somewhere")
    again = random_model()
    lora_files.load(again, tmp_path / "adapter", "other")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    spec, loaded = lora.spec(model), lora.spec(again, "other")
    assert replace(loaded, targets=spec.targets) == spec and loaded.targets == spec.modules


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("layers_pattern", "h"),
    ("init_lora_weights", "pissa"), ("lora_bias", True), ("peft_type", "IA3"), ("something_new", 3),
    ("layer_replication", [[0, 2]]), ("r", 0), ("target_modules", None), ("target_modules", ["c_attn"]),
    ("target_modules", "(q"), ("rank_pattern", {"(": 2}), ("rank_pattern", ["q"]),
    ("rank_pattern", {"q_proj": "2"}), ("alpha_pattern", {"q_proj": None}), ("layers_to_transform", "1"),
    ("exclude_modules", 5), ("modules_to_save", 5), ("lora_dropout", "0.1"), ("lora_dropout", [0.1]),
    ("lora_dropout", 1.5), ("lora_alpha", "32"), ("r", "8"), ("r", 2.5), ("rank_pattern", {"q_proj": 0})])
def test_what_is_not_supported_is_refused_by_name(random_model, tmp_path, key, value):
    model = trained(random_model())
    lora_files.save(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=key):
        lora_files.load(random_model(), tmp_path / "adapter")


def test_an_adapter_of_another_model_is_called_that_and_leaves_nothing_behind(random_model, tmp_path):
    lora_files.save(trained(random_model(layers=3, hidden=40)), tmp_path / "adapter", base="some/where")
    (tmp_path / "adapter" / "base.json").unlink()  # PEFT's adapters do not know their base
    model = trained(random_model(), "mine")
    before = logits(model, IDS)
    with pytest.raises(BadInput) as error:
        lora_files.load(model, tmp_path / "adapter")
    text = str(error.value)
    assert "the adapter of another base (some/where)" in text and "(4, 40), expected (4, 32)" in text
    assert "28 tensors do not fit" in text and text.count("lora_") == 1  # 2 x 7 sizes, a layer of 14
    assert lora.names(model) == ["mine"] and torch.equal(logits(model, IDS), before)


def test_a_missing_or_cut_adapter_is_named(random_model, tmp_path):
    lora_files.save(trained(random_model()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="cut short"):
        lora_files.load(random_model(), tmp_path / "adapter")
    path.unlink()
    with pytest.raises(BadInput, match="adapter_model"):
        lora_files.load(random_model(), tmp_path / "adapter")


# ---- an adapter knows its base -----------------------------------------------------------------------------

@pytest.fixture
def model_and_adapter(random_model, tmp_path):
    """A model's folder and an adapter for it, in runs/sft/adapter: (model folder, adapter folder)."""
    model, adapter = random_model(vocab=2000), tmp_path / "runs" / "sft" / "adapter"
    checkpoint.save(model, Tokenizer.load(checkpoint.TINY), tmp_path / "models" / "m")
    lora_files.save(trained(model), adapter, base=tmp_path / "models" / "m")
    return tmp_path / "models" / "m", adapter


def test_an_adapter_is_refused_on_another_base_in_one_sentence(model_and_adapter, random_model):
    folder, adapter = model_and_adapter
    for other in (random_model(vocab=2000, seed=1), random_model(vocab=2000, layers=3)):
        with pytest.raises(BadInput, match=f"trained on {folder}.*other weights.*--model {adapter}") as error:
            lora_files.load(other, adapter)
        assert "\n" not in str(error.value) and not lora.names(other)


def test_an_adapter_is_refused_on_a_model_that_differs_by_a_merged_adapter(model_and_adapter):
    folder, adapter = model_and_adapter
    model, _ = checkpoint.load(folder)
    lora_files.load(model, adapter, "first")
    lora_files.load(model, adapter, "second")  # an adapter beside it is no part of the base
    lora.remove(model, "second")
    lora.merge(model, "first")
    with pytest.raises(BadInput, match="other weights"):
        lora_files.load(model, adapter, "second")


def test_the_fingerprint_is_of_the_weights_and_not_of_dtype_adapters_or_order(model_and_adapter, tmp_path):
    folder, _ = model_and_adapter
    full, half = (checkpoint.load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    known = lora_files.weights_fingerprint(full[0])
    assert known == lora_files.weights_fingerprint(half[0])
    checkpoint.save(*half, tmp_path / "half")
    assert known == lora_files.weights_fingerprint(checkpoint.load(tmp_path / "half")[0])
    assert known == lora_files.weights_fingerprint(trained(full[0]))
    for name, p in full[0].named_parameters():  # a change anywhere, of the size that training makes
        if ".lora_" not in name:
            before = p.detach().clone()
            with torch.no_grad():
                p += 1e-2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            assert known != lora_files.weights_fingerprint(full[0]), name
            p.data = before


def test_a_model_given_as_an_adapter_is_called_a_model(random_model):
    with pytest.raises(BadInput, match=r"tiny: a model, expected an adapter's folder"):
        lora_files.load(random_model(), checkpoint.TINY)


def test_an_adapter_without_identity_still_loads(model_and_adapter, random_model):
    _, adapter = model_and_adapter
    (adapter / "base.json").unlink()
    lora_files.load(random_model(vocab=2000, seed=1), adapter)


def test_copied_together_base_and_adapter_find_each_other(model_and_adapter, tmp_path, monkeypatch):
    _, adapter = model_and_adapter
    before = logits(checkpoint.load(adapter)[0], IDS)
    (tmp_path / "models").rename(tmp_path / "gone")
    with pytest.raises(BadInput, match="base_model_name_or_path"):
        checkpoint.load(adapter)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "gone").rename(tmp_path / "elsewhere" / "models")
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere" / "runs")
    assert torch.equal(logits(checkpoint.load("sft/adapter")[0], IDS), before)
    assert cli.is_small("sft/adapter") and not cli.is_small("sft")


def test_a_base_that_changed_under_its_adapter_is_noticed(model_and_adapter, random_model):
    folder, adapter = model_and_adapter
    checkpoint.save(random_model(vocab=2000, seed=1), Tokenizer.load(checkpoint.TINY), folder)
    with pytest.raises(BadInput, match="other weights"):
        checkpoint.load(adapter)


# ---- adapters as other people save them (tests/test_parity.py compares with peft) --------------------------

def others(model, folder, ranks, rename=str, dtype=torch.float32, **config):
    """An adapter of alpha 8 in PEFT's format. ranks: end of a layer's name -> rank. Returns full name of each
    layer -> B A."""
    torch.manual_seed(5)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(ranks)} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors, products = {}, {}
    for path, layer in model.named_modules():
        r = next((r for end, r in ranks.items() if path.endswith(end)), None)
        if r:
            A, B = torch.randn(r, layer.in_features).to(dtype), torch.randn(layer.out_features, r).to(dtype)
            name = rename(f"base_model.model.{path}.lora_X.weight")
            tensors |= {name.replace("_X", "_A"): A, name.replace("_X", "_B"): B}
            products[path] = B.float() @ A.float()
    save_file(tensors, folder / "adapter_model.safetensors")
    return products


def changes(model, folder):
    """Full name of each layer -> what the adapter adds to its weight."""
    before = {path: m.weight.clone() for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    lora_files.load(model, folder)
    lora.merge(model)
    return {path: model.get_submodule(path).weight - w for path, w in before.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_with_ranks_and_alphas_of_their_own_change_the_weights_as_their_own_scales_say(
        random_model, tmp_path, rslora):
    model = random_model()
    products = others(model, tmp_path / "a", {"q_proj": 2, "layers.1.mlp.down_proj": 6, "mlp.down_proj": 4},
                      target_modules=["q_proj", "down_proj"], use_rslora=rslora,
                      alpha_pattern={".*q_proj": 5},
                      rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6})
    scale = {"q_proj": 5 / 2, "1.mlp.down_proj": 8 / 6, "0.mlp.down_proj": 8 / 4}
    if rslora:
        scale = {"q_proj": 5 / 2**.5, "1.mlp.down_proj": 8 / 6**.5, "0.mlp.down_proj": 8 / 4**.5}
    changed = changes(model, tmp_path / "a")
    assert lora.spec(model).r == 6 and len(products) == 4
    for path, change in changed.items():
        wanted = next((s * products[path] for end, s in scale.items() if path.endswith(end)), 0 * change)
        assert (change - wanted).abs().max() < 1e-4, path


@pytest.mark.parametrize("how", [
    {"target_modules": ["q_proj", "c_attn", "w1"]},
    {"rename": lambda name: name.replace(".weight", ".default.weight")}, {"dtype": torch.float16},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ".*_proj", "exclude_modules": r".*(v|k|o|gate|up|down)_proj"},
    {"fan_in_fan_out": True}, {"layers_pattern": ["layers"]}, {"layers_to_transform": []},
    {"alpha_pattern": {"^q_proj": 100}}], ids=",".join)  # in peft, too, this pattern fits no full name
def test_what_can_be_meant_exactly_is_loaded(random_model, tmp_path, how):
    model = random_model()
    products = others(model, tmp_path / "a", {"q_proj": 4}, **how)
    changed = changes(model, tmp_path / "a")
    assert len(products) == 2
    for path, change in changed.items():
        assert (change - 2 * products.get(path, 0 * change)).abs().max() < 1e-4, path


@pytest.mark.parametrize("numbers", [1, [1]])
def test_layers_to_transform_counts_layers_from_zero(random_model, tmp_path, numbers):
    model = random_model()
    others(model, tmp_path / "a", {"layers.1.self_attn.q_proj": 4}, target_modules=["q_proj"],
           layers_to_transform=numbers)
    changed = changes(model, tmp_path / "a")
    assert [path for path, change in changed.items() if change.any()] == ["model.layers.1.self_attn.q_proj"]


def beside(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{n}": t.clone() for n, t in tensors.items()}, path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_of_the_base_beside_an_adapter_changes_nothing_and_a_trained_one_is_refused(
        random_model, tmp_path, tied):
    model = random_model(tied=tied)
    others(model, tmp_path / "a", {"q_proj": 4}, modules_to_save=["lm_head"])
    with pytest.raises(BadInput, match="modules_to_save names lm_head"):
        lora_files.load(model, tmp_path / "a")
    embedding = model.model.embed_tokens.weight.detach()
    head = embedding if tied else model.lm_head.weight.detach()
    beside(tmp_path / "a", **{"lm_head.weight": head, "model.embed_tokens.weight": embedding.bfloat16()})
    with pytest.raises(BadInput, match=r"embed_tokens\.weight differs .* merge the adapter"):
        lora_files.load(model, tmp_path / "a")
    assert lora.names(model) == []
    beside(tmp_path / "a", **{"model.embed_tokens.weight": embedding})
    lora_files.load(model, tmp_path / "a")
    assert lora.names(model) == ["default"]


def test_an_embedding_of_another_vocabulary_beside_an_adapter_is_named(random_model, tmp_path):
    others(random_model(), tmp_path / "a", {"q_proj": 4})
    beside(tmp_path / "a", **{"model.embed_tokens.weight": torch.zeros(99, 32)})
    with pytest.raises(BadInput, match=r"embed_tokens\.weight differs from the base model's"):
        lora_files.load(random_model(), tmp_path / "a")


@pytest.mark.parametrize("names_left", [True, False])
def test_an_adapter_saved_without_its_numbers_is_one_short_sentence(random_model, tmp_path, names_left):
    """DeepSpeed's ZeRO-3 leaves such files where nobody gathered the parts of the weights."""
    model = random_model(layers=12)
    others(model, tmp_path / "a", {"_proj": 4}, target_modules=".*_proj")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(path) if names_left}, path)
    with pytest.raises(BadInput, match="168 tensors do not fit") as error:
        lora_files.load(model, tmp_path / "a")
    assert str(error.value).count("lora_") == 1 and lora.names(model) == []


def test_several_adapters_in_one_file_are_refused(random_model, tmp_path):
    model = random_model()
    others(model, tmp_path / "a", {"q_proj": 4}, rename=lambda name: name.replace(".weight", ".one.weight"))
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {n.replace(".one.", ".two."): t.clone() for n, t in tensors.items()}, path)
    with pytest.raises(BadInput, match="several adapters"):
        lora_files.load(model, tmp_path / "a")
