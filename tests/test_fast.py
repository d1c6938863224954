"""sampling/fast.py: the network rearranged is the network of model.py, with and without adapters."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from test_lora import IDS, logits, trained
from test_sampler import Letters, build, drain, ids_of, run, some_requests

from slm import lora
from slm.attention import Packed
from slm.episode import Request, Sampling
from slm.formats import lora_files
from slm.sampling import Sampler, fast
from slm.sampling.fast import Fast, Plain, by_columns

NETWORKS = weakref.WeakKeyDictionary()


def sampled(model, rows, *sequences):
    """Logits of the sequences as the sampler computes them. rows: an adapter's name, None, or a list."""
    network = NETWORKS.setdefault(model, Fast(model))
    network.refresh()
    attend = Packed([len(s) for s in sequences])
    rows = rows if isinstance(rows, list) else [(rows, len(attend.positions))]
    with torch.inference_mode():
        chosen = network.choose(rows)
        hidden = network.hidden(torch.cat(sequences), attend.positions, attend, chosen)
        return network.logits(hidden, chosen).clone()


@pytest.fixture(params=["float32", "model"])
def sample(request, monkeypatch):
    """sample(model, rows, ids) -> logits. Both ways to multiply with B: as for few tokens, as for many."""
    monkeypatch.setattr(fast, "SMALL", 1e9 if request.param == "float32" else 0)

    def run(model, rows, ids=IDS):
        return sampled(model.eval(), rows, ids)
    return run


def by_hand(model, name, ids=IDS):
    """Logits of a copy of the base model to whose weights s B A is added, in float64."""
    twin = copy.deepcopy(model).double()
    for layer in twin.modules():
        if isinstance(layer, lora.LoRALinear) and name in layer.lora_A:
            layer.weight.data += lora.spec(model, name).scale * (layer.lora_B[name] @ layer.lora_A[name])
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
    lora_files.save(other, tmp_path / "adapter")
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
        lora_files.load(model, tmp_path / "adapter")

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
        both = sampled(model, [("solver", 40), ("checker", 40)], IDS, IDS)
        assert_near(both, torch.cat(list(alone.values())))
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
    with torch.no_grad():
        assert (logits(model.train(), IDS) - still).abs().max() > 1e-2
    assert torch.equal(sample(model, "default"), still)


def test_a_copy_of_a_model_that_sampled_is_a_model_of_its_own(random_model, sample):
    model = trained(random_model())
    before = sample(model, "default")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert_near(sample(twin, "default"), by_hand(twin, "default"))
    assert torch.equal(sample(model, "default"), before)


def test_a_sample_costs_one_product_more_a_group_of_layers(random_model, sample):
    """A lies behind W, so A x comes with W x, also where the adapter is newer than the sampler."""
    model = random_model(dtype=torch.bfloat16)
    trained(model)
    counts = []
    for name in ("default", "default", None):  # first the adapter is laid out
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sample(model, name)
        counts.append(sum(event.count for event in profile.key_averages()
                          if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")))
    assert counts[1] - counts[2] == 2 * 4


# ---- the rearranged network and the plain one ----------------------------------------------------------

def replies(model, requests, network, **options):
    """Token ids of all replies. network: Fast or Plain."""
    sampler = Sampler(model, Letters(), **options)
    assert type(sampler.network) is Fast
    sampler.network = network(model)
    with lora.off(model):
        return ids_of(sampler.generate(requests, progress=False))


def fresh(model):
    return model


def resumed(model):
    """A second model that was given the first one's tensors."""
    other = build(**vars(model.config))
    for name in lora.names(model):
        spec = lora.spec(model, name)
        lora.add(other, r=spec.r, alpha=spec.alpha, targets=spec.targets, name=name)
    other.load_state_dict(model.state_dict())
    run(other, some_requests(2))  # it has sampled with them before
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def merged(model):
    for name in lora.names(model):
        lora.merge(model, name)
        lora.remove(model, name)
    return model


def moved(model):
    """There and back: every tensor lies elsewhere."""
    run(model, some_requests(2))
    return model.double().float()


SHAPES = [{}, {"heads": 6, "kv_heads": 2}, {"kv_heads": 4, "tied": False},
          {"heads": 3, "kv_heads": 1, "layers": 3}, {"bias": False, "head_size": 16}]


@pytest.mark.parametrize("state", [fresh, resumed, merged, moved])
@pytest.mark.parametrize("adapters", ["none", "one", "one a row"])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_fast_write_the_same_tokens(shape, adapters, state):
    """Greedy in float32, on random models, each with its batches, prefixes and drafts."""
    model = build(seed=len(shape), **shape)
    for name, targets in {"none": {}, "one": {"a": lora.ALL},
                          "one a row": {"a": ["q_proj", "down_proj"], "b": lora.ALL}}[adapters].items():
        lora.add(model, r=4, alpha=4, targets=targets, name=name)
        for p in lora.parameters(model, name):
            torch.nn.init.normal_(p, std=0.2)
    model = state(model)
    names = [*lora.names(model), None] if adapters == "one a row" else lora.names(model) or [None]
    requests = [replace(request, adapter=names[i % len(names)])
                for i, request in enumerate(some_requests(14, seed=3, temperatures=(0.0,)))]
    expected = replies(model, requests, Plain)
    for options in {}, {"max_batch": 3}, {"cache_tokens": 200}:
        assert replies(model, requests, Fast, **options) == expected
    assert replies(model, requests, Plain) == expected  # sampling fast has left the model as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_rearranging_keeps_parameters_and_values(random_model, dtype, bias):
    model = random_model(dtype=dtype, bias=bias)
    parameters, values = list(model.parameters()), [p.clone() for p in model.parameters()]
    before = logits(model, IDS).float()
    assert (sampled(model, None, IDS) - before).abs().max() < 0.05 * before.abs().max()
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(parameters, model.parameters(), values))
    with torch.no_grad():
        for p in parameters:  # an optimizer step
            p.mul_(1.5)
    again = random_model(dtype=dtype, bias=bias)
    again.load_state_dict(model.state_dict())
    assert torch.equal(sampled(model, None, IDS), sampled(again, None, IDS))


def test_a_model_that_moves_after_it_sampled_is_still_right(random_model):
    model = random_model()
    before = sampled(model, None, IDS)
    assert (sampled(model.double(), None, IDS) - before).abs().max() < 1e-4


def test_another_bias_is_seen(random_model):
    model = random_model()
    sampled(model, None, IDS)
    model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.full((16,), 3.0))
    assert torch.allclose(sampled(model, None, IDS), logits(model, IDS), atol=1e-5)


def test_an_adapter_that_comes_while_replies_are_under_way_is_used():
    model = build()
    sampler = Sampler(model, Letters())
    sampler.submit(Request(ids=[5, 6, 7], sampling=Sampling(30)))
    sampler.step()
    lora.add(model, r=4, name="late")
    for p in lora.parameters(model, "late"):
        torch.nn.init.normal_(p, std=0.3)
    request = Request(ids=[8, 9], sampling=Sampling(20), adapter="late")
    sampler.submit(request)
    late = drain(sampler)[-1]
    assert [[late.ids]] == replies(model, [request], Plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count, bounds", [(1, (1, 256)), (2, (1, 256)), (200, (1, 256)), (256, (1, 256)),
                                           (257, (1, 256)), (31, (32, 128)), (32, (32, 128))])
def test_products_by_columns_are_as_exact_as_those_by_rows(random_model, count, bounds, tied, monkeypatch):
    """Many tokens in bfloat16 on a CPU are multiplied the other way round, a lone one as if it were two."""
    monkeypatch.setattr(fast, "COLUMNS", bounds)
    model, ids = random_model(dtype=torch.bfloat16, tied=tied), torch.arange(count) * 7 % 97
    exact = random_model(tied=tied)
    exact.load_state_dict(model.state_dict())
    exact, rows, columns = logits(exact, ids), logits(model, ids), sampled(model, None, ids)
    assert by_columns(columns) == (bounds[0] <= count <= bounds[1])
    error = [(x.float() - exact).abs().mean() for x in (columns, rows)]
    assert 0 < error[0] < 1.3 * error[1]
