"""lora.py: exactness of adapters, per-sequence adapters, PEFT's files."""

import copy
import json

import pytest
import torch

from slm import BadInput, lora
from slm.attention import Packed


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


# ---- as the sampler does it: weights joined, no gradients, inside `use` ------------------------------------

@pytest.fixture(params=["float32", "model"])
def sample(request, monkeypatch):
    """sample(model, rows, ids) -> logits. Both ways to multiply with B: as for few tokens, as for many."""
    monkeypatch.setattr(lora, "SMALL", 1e9 if request.param == "float32" else 0)

    def run(model, rows, ids=IDS):
        if not model.eval().joints:
            model.join()
        with torch.inference_mode(), lora.use(model, rows):
            return logits(model, ids).clone()
    return run


def by_hand(model, name, ids=IDS):
    """Logits of a copy of the base model to whose weights s B A is added, in float64."""
    twin = copy.deepcopy(model).double()
    for layer in twin.modules():
        if isinstance(layer, lora.LoRALinear) and name in layer.lora_A:
            layer.weight.data += model.lora.specs[name].scale * (layer.lora_B[name] @ layer.lora_A[name])
    with lora.off(twin):
        return logits(twin, ids)


def assert_near(a, b):
    """Closer by far than any change of an adapter here brings two models."""
    assert (a - b).abs().max() < 1e-4


TARGETS = [lora.ALL, ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"], r".*s\.1\..*(o|gate)_proj"]


@pytest.mark.parametrize("targets", TARGETS)
def test_sampling_with_an_adapter_is_the_model_with_its_weights_changed(random_model, sample, targets):
    model = trained(random_model(), targets=targets)
    base = logits(random_model(), IDS)
    assert_near(sample(model, "default"), by_hand(model, "default"))
    assert (sample(model, "default") - base).abs().max() > 1e-2


def test_sampling_in_bfloat16_is_right_up_to_rounding(random_model, sample):
    model = trained(random_model(dtype=torch.bfloat16))
    exact = by_hand(model, "default")
    assert (sample(model, "default") - exact).abs().max() < 0.05 * exact.abs().max()
    assert (sample(model, None) - exact).abs().max() > 0.2 * exact.abs().max()


def test_the_next_sample_sees_every_change_of_the_adapter(random_model, sample, tmp_path):
    model, other = trained(random_model()), trained(random_model(), seed=2)
    lora.save(other, tmp_path / "adapter")
    saved = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=0.1)

    def step():
        attend = Packed([40])
        model(IDS, attend.positions, attend).square().sum().backward()
        optimizer.step()

    def edit():
        with torch.no_grad():
            lora.parameters(model)[0].mul_(2)  # A of one layer, nothing else

    def load():
        lora.remove(model)
        lora.load(model, tmp_path / "adapter")

    seen = [sample(model, "default")]
    for change in (step, edit, lambda: model.load_state_dict(saved), load):
        change()
        seen.append(sample(model, "default"))
        assert_near(seen[-1], by_hand(model, "default"))
        assert (seen[-1] - seen[-2]).abs().max() > 1e-2
    assert torch.equal(seen[3], seen[0])


def test_an_adapter_takes_the_room_of_one_that_was_removed(random_model, sample):
    model = trained(random_model(), "first", targets=["v_proj"])
    sample(model, "first")
    lora.remove(model, "first")
    lora.add(model, r=4, alpha=4, name="second", targets=["k_proj"])
    for p in lora.parameters(model, "second"):
        torch.nn.init.normal_(p, 0, 0.2)
    model.join()
    assert_near(sample(model, "second"), by_hand(model, "second"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_on_other_groups_of_layers_in_any_dtype(random_model, sample, dtype):
    model = trained(random_model(dtype=dtype), "a", targets=["q_proj", "v_proj"])
    lora.add(model, r=4, alpha=4, name="b", targets=["up_proj"])
    for p in lora.parameters(model, "b"):
        torch.nn.init.normal_(p, 0, 0.2)
    for name in "ab":
        expected = by_hand(model, name)
        error = (sample(model, name).double() - expected).norm() / expected.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-6)


def test_recomputing_layers_uses_the_adapter_of_the_forward_pass(random_model):
    model = trained(random_model(), "a")
    lora.add(model, r=4, alpha=4, name="b")
    gradients = []
    for model.recompute in (False, True):
        attend = Packed([len(IDS)])
        with lora.use(model, "a"):
            loss = model(IDS, attend.positions, attend).square().mean()
        loss.backward()  # now "b" is active
        gradients.append([p.grad.clone() for p in lora.parameters(model, "a")])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][0].any()


def test_sampling_with_adapters_in_turn_and_at_once(random_model, sample):
    """Of other ranks and layers: what one leaves behind the weights is never taken for the other's."""
    model = trained(random_model(), "solver", targets=["q_proj", "v_proj", "down_proj"])
    sample(model, "solver")  # joined before the second one comes
    lora.add(model, r=7, alpha=7, name="checker", targets=["q_proj", "k_proj", "o_proj", "gate_proj"])
    for p in lora.parameters(model, "checker"):
        torch.nn.init.normal_(p, 0, 0.2)
    for _ in range(2):
        alone = {name: by_hand(model, name) for name in ("solver", "checker")}
        for name in ("checker", "solver", "checker"):
            assert_near(sample(model, name), alone[name])
        with torch.inference_mode(), lora.use(model, [("solver", 40), ("checker", 40)]):
            assert_near(logits(model, IDS, IDS), torch.cat(list(alone.values())))
        with torch.no_grad():
            lora.parameters(model, "checker")[-1].mul_(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_off_is_the_base_model_bit_for_bit_after_sampling(random_model, sample, dtype, tokens):
    ids = IDS[:tokens]
    base = sample(random_model(dtype=dtype), None, ids)
    model = trained(random_model(dtype=dtype))
    sample(model, "default", ids)
    assert torch.equal(sample(model, None, ids), base)


def test_training_after_sampling_has_the_bits_of_training_alone(random_model, sample):
    gradients = []
    for sampled in (False, True):
        model, attend = trained(random_model(dtype=torch.bfloat16)), Packed([40])
        if sampled:
            sample(model, "default")
        model(IDS, attend.positions, attend).square().sum().backward()
        gradients.append([p.grad for p in lora.parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_merge_and_unmerge_are_right_after_sampling(random_model, sample):
    model = trained(random_model())
    before, expected = sample(model, "default"), by_hand(model, "default")
    assert lora.merge(model) < 1e-4
    assert_near(sample(model, None), expected)
    lora.unmerge(model)
    assert torch.equal(sample(model, "default"), before)


def test_dropout_in_training_mode_is_not_lost_to_sampling(random_model, sample):
    model = trained(random_model(), dropout=0.5)
    still = sample(model, "default")
    with torch.inference_mode(), lora.use(model.train(), "default"):
        assert (logits(model, IDS) - still).abs().max() > 1e-2


def test_a_copy_of_a_model_that_sampled_is_a_model_of_its_own(random_model, sample):
    model = trained(random_model())
    before = sample(model, "default")
    twin = copy.deepcopy(model)
    twin.join()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert_near(sample(twin, "default"), by_hand(twin, "default"))
    assert torch.equal(sample(model, "default"), before)


def test_a_sample_costs_one_product_more_a_group_of_layers(random_model, sample):
    """A lies behind W, so A x comes with W x, also where the adapter is newer than the sampler."""
    model = random_model(dtype=torch.bfloat16)
    model.join()
    trained(model)
    counts = []
    for name in ("default", "default", None):  # first the adapter is laid out
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sample(model, name)
        counts.append(sum(event.count for event in profile.key_averages()
                          if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")))
    assert counts[1] - counts[2] == 2 * 4


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
    assert model.lora.specs["default"].modules[-1] == "lm_head"


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
    lora.save(model, tmp_path / "adapter", base="somewhere")
    again = random_model()
    lora.load(again, tmp_path / "adapter", "other")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    spec, loaded = model.lora.specs["default"], again.lora.specs["other"]
    assert loaded == spec


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}),
    ("init_lora_weights", "pissa"), ("layers_to_transform", [0]), ("lora_bias", True), ("peft_type", "IA3"),
    ("layer_replication", [[0, 2]]), ("r", 0), ("target_modules", None), ("something_new", 3)])
def test_what_is_not_supported_is_refused_by_name(random_model, tmp_path, key, value):
    model = trained(random_model())
    lora.save(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=key):
        lora.load(random_model(), tmp_path / "adapter")


def test_an_adapter_of_another_model_lists_all_its_faults_and_leaves_none_behind(random_model, tmp_path):
    lora.save(trained(random_model(layers=3, hidden=40)), tmp_path / "adapter")
    model = trained(random_model(), "mine")
    before = logits(model, IDS)
    with pytest.raises(BadInput) as error:
        lora.load(model, tmp_path / "adapter")
    text = str(error.value)
    assert "unexpected base_model.model.model.layers.2" in text and "(4, 40), expected (4, 32)" in text
    assert lora.names(model) == ["mine"] and torch.equal(logits(model, IDS), before)


def test_a_missing_or_cut_adapter_is_named(random_model, tmp_path):
    lora.save(trained(random_model()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="cut short"):
        lora.load(random_model(), tmp_path / "adapter")
    path.unlink()
    with pytest.raises(BadInput, match="adapter_model"):
        lora.load(random_model(), tmp_path / "adapter")
