"""model.py and attention.py: the forward pass against its equations, packed against alone."""

import math
from dataclasses import replace

import pytest
import torch

from slm import BadInput, lora
from slm.attention import Packed
from slm.formats import configs
from slm.model import Config, Qwen2, rope, rotate

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def naive(lengths, q, k, v):
    """Causal attention inside each segment, one query at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, start = torch.zeros_like(q), 0
    for n in lengths:
        for t in range(start, start + n):
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                scores = k[start:t + 1, g] @ q[t, h] / math.sqrt(q.shape[2])
                out[t, h] = scores.softmax(0) @ v[start:t + 1, g]
        start += n
    return out


def logits(model, *sequences):
    """Logits (T, V) of the sequences in one pack."""
    device = model.model.embed_tokens.weight.device
    attend = Packed([len(s) for s in sequences], device)
    return model.logits(model(torch.cat(sequences).to(device), attend.positions, attend))


@pytest.mark.parametrize("lengths", [[1], [7], [5, 5, 5], [1, 9, 2, 30, 3, 28, 1], [40, 2]])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_packed_attention_is_softmax_over_the_own_past(lengths, dtype, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 16, dtype=dtype, device=device) for heads in (6, 2, 2))
    out = Packed(lengths, device)(0, q, k, v)
    assert (out - naive(lengths, q, k, v)).abs().max() < TYPES[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_stay_inside_their_sequence_and_are_right(device):
    lengths = [3, 8, 1, 7]
    torch.manual_seed(0)
    inputs = [torch.randn(19, heads, 8, device=device, requires_grad=True) for heads in (4, 2, 2)]
    weight = torch.randn(19, 4, 8, device=device)
    ours = torch.autograd.grad((Packed(lengths, device)(0, *inputs) * weight).sum(), inputs)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    out, start = [], 0
    for n in lengths:
        q, k, v = (x[start:start + n].transpose(0, 1) for x in twins)
        scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(8)
        mask = torch.ones(n, n, device=device).tril() == 0
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        out.append((weights @ v.repeat_interleave(2, 0)).transpose(0, 1))
        start += n
    for a, b in zip(ours, torch.autograd.grad((torch.cat(out) * weight).sum(), twins)):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_packed_forward_is_each_sequence_alone(random_model, tied):
    model = random_model(tied=tied)
    torch.manual_seed(1)
    sequences = [torch.randint(0, 97, (n,)) for n in (5, 64, 1, 17, 17, 300)]
    with torch.no_grad():
        alone = torch.cat([logits(model, s) for s in sequences])
        assert (logits(model, *sequences) - alone).abs().max() < 1e-5


def test_tokens_never_see_what_follows(random_model):
    model = random_model()
    a, b = torch.arange(20), torch.arange(20)
    b[12:] = 5
    with torch.no_grad():
        a, b = logits(model, a), logits(model, b)
    assert torch.equal(a[:12], b[:12]) and not torch.allclose(a[12:], b[12:])


SHAPE = Config(97, 32, 64, 2, 2, 1, 16, rope_theta=1e4)


def test_llama_3_slows_down_what_turns_slowly():
    """Head size 16, theta 10,000: the frequencies are 10^0, 10^-0.5, ... 10^-3.5. In 2,000 pi tokens they
    turn 1,000, 316, 100, 31.6, 10, 3.16, 1 and 0.316 times."""
    scaled = replace(SHAPE, rope_scaling=(8.0, 2.0, 10.0, 2000 * math.pi))
    cos, _ = rope(torch.tensor([1]), scaled, torch.float64)
    frequencies = cos[0, 0, :8].acos()
    mixed = 10 ** -2.5 * ((10 ** 0.5 - 2) / 8 + (1 - (10 ** 0.5 - 2) / 8) / 8)
    expected = [1, 10 ** -0.5, 0.1, 10 ** -1.5, 0.01, mixed, 1e-3 / 8, 10 ** -3.5 / 8]
    assert frequencies.tolist() == pytest.approx(expected, rel=1e-3, abs=3e-4)


def test_rope_depends_on_the_distance_only():
    """q at m and k at n meet as q R(n - m) k: equation 16 of the paper."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16)
    turned = lambda x, at: rotate(x, *rope(torch.tensor([at]), SHAPE, torch.float32))
    dot = lambda m, n: (turned(q, m) * turned(k, n)).sum()
    assert abs(dot(3, 10) - dot(1003, 1010)) < 1e-3
    assert abs(dot(3, 10) - dot(3, 11)) > 1e-3


def test_recomputing_activations_changes_no_gradient(random_model):
    model = random_model()
    grads = []
    for recompute in (None, lora.recompute(model)):
        model.recompute = recompute
        model.zero_grad()
        logits(model, torch.arange(30), torch.arange(11)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_bfloat16_runs_on_the_cpu(random_model):
    ids = torch.arange(50)
    with torch.no_grad():
        wide, narrow = (logits(random_model(dtype=d), ids).float() for d in (torch.float32, torch.bfloat16))
    assert (wide - narrow).abs().max() < 0.05 * wide.abs().max()


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mistral"}, "mistral"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "gelu"), ({"vocab_size": 0}, "vocab_size"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"), ({"hidden_size": None}, "hidden_size"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor is None"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
])
def test_configs_of_other_models_are_refused_by_name(change, named):
    config = configs.write(Config(97, 32, 64, 2, 4, 2, 8))
    with pytest.raises(BadInput, match=named):
        configs.read(config | change)


def test_config_round_trip():
    for tied, more in ((True, {}), (False, {"bias": False}), (True, {"bias": False, "head_norm": True}),
                       (True, {"bias": False, "rope_scaling": (8.0, 1.0, 4.0, 64)})):
        config = Config(97, 32, 64, 2, 4, 2, 8, positions=77, rope_theta=123.0, tied=tied, **more)
        assert configs.read(configs.write(config)) == config


def test_weights_carry_hugging_face_names(random_model):
    found = set(dict(random_model(tied=False).named_parameters()))
    assert "lm_head.weight" in found and "model.layers.1.self_attn.q_proj.bias" in found
    assert "lm_head.weight" not in dict(random_model().named_parameters())
    assert isinstance(random_model(), Qwen2)
