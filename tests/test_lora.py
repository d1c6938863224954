"""lora.py: exactness of adapters, per-sequence adapters, PEFT's files."""

import json

import pytest
import torch

from slm import BadInput, checkpoint, lora, lora_files
from slm.attention import Packed
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
    assert loaded == spec


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}),
    ("init_lora_weights", "pissa"), ("layers_to_transform", [0]), ("lora_bias", True), ("peft_type", "IA3"),
    ("layer_replication", [[0, 2]]), ("r", 0), ("target_modules", None), ("something_new", 3)])
def test_what_is_not_supported_is_refused_by_name(random_model, tmp_path, key, value):
    model = trained(random_model())
    lora_files.save(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=key):
        lora_files.load(random_model(), tmp_path / "adapter")


def test_an_adapter_of_another_model_lists_all_its_faults_and_leaves_none_behind(random_model, tmp_path):
    lora_files.save(trained(random_model(layers=3, hidden=40)), tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").unlink()  # PEFT's adapters do not know their base
    model = trained(random_model(), "mine")
    before = logits(model, IDS)
    with pytest.raises(BadInput) as error:
        lora_files.load(model, tmp_path / "adapter")
    text = str(error.value)
    assert "unexpected base_model.model.model.layers.2" in text and "(4, 40), expected (4, 32)" in text
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
