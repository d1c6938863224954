"""Log-probs, advantages and objectives against autograd, brute force and hand-worked numbers."""

import math

import pytest
import torch

from slm import BadInput, lora, losses
from slm.losses import (
    advantages,
    clipped,
    kl,
    pack,
    score,
    sequence_clipped,
    token_logprobs,
    token_weights,
    warp,
)
from slm.model import Config, Qwen2


def random_model(vocab=97, hidden=32, layers=2):
    torch.manual_seed(0)
    model = Qwen2(Config(vocab, hidden, intermediate=48, layers=layers, heads=4, kv_heads=2, head_size=8))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
    return model


@pytest.fixture
def model():
    return random_model()


def draw(model, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, model.config.vocab, (n,), generator=g).tolist() for n in lengths]
    masks = [[0, 0, *[1] * (n - 2)] for n in lengths]
    return ids, masks


def naive(model, ids, masks, temperature=1.0):
    """Each sequence alone, the whole (T, V) log-softmax at once, in float64."""
    found = []
    for x, m in zip(ids, masks):
        attend = losses.Packed([len(x)])
        hidden = model(torch.tensor(x), attend.positions, attend)
        logp = (model.logits(hidden).double() / temperature).log_softmax(-1)
        found += [logp[t - 1, x[t]] for t in range(len(x)) if m[t]]
    return torch.stack(found)


# ---- the one distribution --------------------------------------------------------------------------------

def test_warp_is_temperature_then_top_k_then_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert torch.allclose(warp(logits, 2.0), logits / 2)
    assert warp(logits, 1.0, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert warp(logits, 1.0, top_p=0.75).isfinite().tolist() == [[True, True, False, False]]
    assert warp(logits, 1.0, top_p=0.76).isfinite().tolist() == [[True, True, True, False]]
    assert warp(logits, 1.0, top_p=1e-9).isfinite().tolist() == [[True, False, False, False]]
    # after top-k 3 the three are renormalized to .56 .28 .17: 0.8 is reached with two
    assert warp(logits, 1.0, top_k=3, top_p=0.8).isfinite().sum() == 2


def test_warp_takes_one_setting_a_row():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    settings = [(0.5, 0, 1.0), (1.0, 4, 1.0), (2.0, 7, 0.6)]
    rows = warp(logits, *(torch.tensor(x) for x in zip(*settings)))
    for row, one, setting in zip(rows, logits, settings):
        assert torch.equal(row, warp(one[None], *setting)[0])


# ---- log-probs -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_log_probs_entropy_and_gradients_equal_the_whole_softmax(model, temperature, chunk):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 32, generator=g, requires_grad=True)
    targets = torch.randint(0, 97, (13,), generator=g)
    weight, incoming = model.model.embed_tokens.weight, torch.randn(13, generator=g)
    whole = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = torch.autograd.grad((whole[range(13), targets] * incoming).sum(), (hidden, weight))
    logp, entropy = token_logprobs(model, hidden, targets, temperature, chunk)
    found = torch.autograd.grad((logp * incoming).sum(), (hidden, weight))
    assert torch.allclose(logp, whole[range(13), targets], atol=1e-5)
    assert torch.allclose(entropy, -(whole.exp() * whole).sum(-1), atol=1e-5)
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_frozen_head_gives_the_same_gradient(model):
    hidden, targets = torch.randn(9, 32), torch.arange(9)
    grads = []
    for frozen in (False, True):
        model.model.embed_tokens.weight.requires_grad_(not frozen)
        h = hidden.clone().requires_grad_()
        logp, _ = token_logprobs(model, h, targets, 0.8, 4)
        (logp * torch.arange(9.0)).sum().backward()
        grads.append(h.grad)
    assert torch.allclose(*grads, atol=1e-6)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("rows", [0, 9])
def test_an_incoming_gradient_of_zero_gives_zero(poisoned, model, trained_head, rows):
    assert torch.empty(3).isnan().all()
    weight = model.model.embed_tokens.weight.requires_grad_(trained_head)
    hidden = torch.ones(rows, 32, requires_grad=True)
    logp, _ = token_logprobs(model, hidden, torch.arange(rows), 0.8, 4)
    (0.0 * logp.sum()).backward()
    assert torch.equal(hidden.grad, torch.zeros(rows, 32))
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_value_and_no_gradient_comes_from_memory_that_nobody_wrote(poisoned, model, trained_head):
    model.model.embed_tokens.weight.requires_grad_(trained_head)
    logp, entropy = score(model, *draw(model, [8, 5]))
    loss = sequence_clipped(logp, logp.detach(), torch.ones(9), torch.tensor([0] * 6 + [1] * 3), 0.2, 0.2)
    (loss + kl(logp, logp.detach())).sum().backward()
    assert entropy.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_adapter_on_the_head_is_refused_not_ignored():
    untied = Qwen2(Config(97, 32, intermediate=48, layers=1, heads=4, kv_heads=2, head_size=8, tied=False))
    lora.add(untied, r=2, targets=["lm_head"])
    with pytest.raises(BadInput, match="adapter on lm_head"):
        score(untied, *draw(untied, [5]))
    lora.merge(untied)
    lora.remove(untied)
    score(untied, *draw(untied, [5]))


def test_log_probs_never_hold_tokens_times_vocabulary():
    model = random_model(vocab=5000, hidden=16, layers=1)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    hidden = torch.randn(600, 16, requires_grad=True)
    with Watch():
        logp, _ = token_logprobs(model, hidden, torch.zeros(600, dtype=torch.long))
        logp.sum().backward()
    assert max(sizes) < 600 * 5000 / 2


@pytest.mark.parametrize("lengths", [[7], [5, 9, 3], [3] * 8, [40, 3, 17]])
def test_packed_scores_equal_each_sequence_alone(model, lengths):
    ids, masks = draw(model, lengths)
    logp, _ = score(model, ids, masks, 0.9)
    assert torch.allclose(logp.double(), naive(model, ids, masks, 0.9), atol=1e-5)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_gradient_is_the_same_for_every_cut_into_micro_batches(model):
    ids, masks = draw(model, [4, 9, 6, 12, 5, 7, 8])
    count = sum(map(sum, masks))
    reference = gradient(model, -naive(model, ids, masks).sum() / count)
    for tokens in (1, 13, 20, 1000):
        total = None
        for members in pack([len(x) for x in ids], tokens):
            logp, _ = score(model, [ids[i] for i in members], [masks[i] for i in members])
            part = gradient(model, losses.sft_loss(logp)[0] / count)
            total = part if total is None else total + part
        assert torch.allclose(total, reference, atol=1e-6)


def test_micro_batches_hold_every_sequence_once_within_their_size():
    lengths = [5, 90, 6, 100, 31, 30, 300]
    batches = pack(lengths, 110)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(sum(lengths[i] for i in b) <= 110 or len(b) == 1 for b in batches)


@pytest.mark.parametrize("mask", [[0] * 9 + [1], [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]])
def test_tokens_outside_the_mask_have_no_gradient(model, mask):
    """A prompt's or a tool's tokens (mask 0) are read, not learned: no prediction of one reaches the loss."""
    ids, _ = draw(model, [10])
    final = []

    def keep(module, args, out):
        final.append(out.detach().requires_grad_())
        return final[-1]

    model.model.norm.register_forward_hook(keep)
    logp, _ = score(model, ids, [mask])
    logp.sum().backward()
    moved = final[-1].grad.abs().sum(-1).nonzero().squeeze(1).tolist()
    assert moved == [t - 1 for t in range(10) if mask[t]]


# ---- advantages ------------------------------------------------------------------------------------------

R = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
G = torch.tensor([0, 0, 7, 7, 7, 7])


def test_advantages_by_hand():
    s = math.sqrt(2)
    assert advantages(R[:2], G[:2], "std").tolist() == pytest.approx([1 / s, -1 / s])
    assert advantages(R, G, "mean").tolist() == [1, -1, 1, 1, -1, -1]
    assert advantages(R, G, "loo").tolist() == pytest.approx([2, -2, 4 / 3, 4 / 3, -4 / 3, -4 / 3])
    assert advantages(R, G, "none").tolist() == R.tolist()
    whitened = (R - R.mean()) / R.std()
    assert advantages(R, G, "batch").tolist() == pytest.approx(whitened.tolist())


@pytest.mark.parametrize("kind", ["std", "mean", "loo"])
def test_a_group_without_spread_and_a_single_sample_get_nothing(kind):
    assert advantages(torch.ones(5), torch.tensor([0, 0, 0, 1, 2]), kind).tolist() == [0] * 5


@pytest.mark.parametrize("kind", ["std", "mean", "loo", "batch"])
@pytest.mark.parametrize("reward", [-0.3, 0.1, 1e-9, 12345.678])
def test_a_spread_of_rounding_size_is_none(kind, reward):
    for size in (2, 3, 7, 100, 1000):
        groups = torch.zeros(size, dtype=torch.long)
        assert advantages(torch.full((size,), reward), groups, kind).tolist() == [0] * size


@pytest.mark.parametrize("kind", ["std", "mean", "loo", "batch"])
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e6])
def test_a_real_spread_counts_however_small_the_rewards(kind, unit):
    found = advantages(torch.tensor([1.0, 1.0, 1.0, 1.001]) * unit, torch.zeros(4, dtype=torch.long), kind)
    assert (found[:3] < 0).all() and found[3] > 0


def test_leave_one_out_against_brute_force():
    torch.manual_seed(3)
    r, g = torch.randn(12), torch.randint(0, 3, (12,))
    for i, a in enumerate(advantages(r, g, "loo")):
        others = [r[j] for j in range(12) if g[j] == g[i] and j != i]
        assert a.item() == pytest.approx((r[i] - sum(others) / len(others)).item(), abs=1e-5)


# ---- objectives ------------------------------------------------------------------------------------------

def test_at_ratio_one_every_objective_has_the_reinforce_gradient():
    logp = torch.randn(6, requires_grad=True)
    a = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
    expected = torch.autograd.grad(losses.reinforce(logp, a).sum(), logp)[0]
    assert expected.tolist() == (-a).tolist()
    old = logp.detach()
    assert torch.allclose(torch.autograd.grad(clipped(logp, old, a, 0.2, 0.2).sum(), logp)[0], expected)
    sequence = torch.tensor([0, 0, 1, 2, 2, 2])
    a = torch.tensor([1.0, 1.0, 0.5, -1.0, -1.0, -1.0])
    found = torch.autograd.grad(sequence_clipped(logp, old, a, sequence, 3e-4, 4e-4).sum(), logp)[0]
    assert torch.allclose(found, -a)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 1.1, True), (1, 1.25, True), (1, 1.3, False), (1, 0.5, True),
    (-1, 0.9, True), (-1, 0.7, False), (-1, 1.5, True)])
def test_clip_higher_stops_the_gradient_outside_its_bounds_only(advantage, ratio, moves):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.2, 0.28)
    assert loss.item() == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage))
    assert bool(torch.autograd.grad(loss.sum(), logp)[0]) == moves


def test_the_sequence_ratio_is_the_geometric_mean():
    logp, old = torch.tensor([0.1, 0.3, -0.2]), torch.tensor([0.0, 0.1, -0.1])
    loss = sequence_clipped(logp, old, torch.tensor([2.0, 2.0, 1.0]), torch.tensor([0, 0, 1]), 0.5, 0.5)
    assert loss.tolist() == pytest.approx([-2 * math.exp(0.15)] * 2 + [-math.exp(-0.1)])


def test_weights_give_the_papers_sums():
    lengths, values = torch.tensor([2, 6]), [torch.full((2,), 3.0), torch.full((6,), 1.0)]
    expected = {"token": (2 * 3 + 6 * 1) / 8, "sequence": (3 + 1) / 2, "constant": (2 * 3 + 6 * 1) / (2 * 10)}
    for how, value in expected.items():
        weights, divisor = token_weights(lengths, how, max_tokens=10)
        assert sum(w * v.sum() for w, v in zip(weights, values)).item() / divisor == pytest.approx(value)


def test_kl_estimators_in_expectation_and_in_gradient():
    """Exact sums over a small vocabulary: k1 and k3 have the KL as mean; k2 has its gradient, k1 none."""
    torch.manual_seed(0)
    logits, ref = torch.randn(8, requires_grad=True), torch.randn(8).log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    true = (logp.exp() * (logp - ref)).sum()
    for kind in ("k1", "k3"):
        assert (p * kl(logp, ref, kind)).sum().item() == pytest.approx(true.item(), rel=1e-5)
    expected = torch.autograd.grad(true, logits, retain_graph=True)[0]
    slope = {k: torch.autograd.grad((p * kl(logp, ref, k)).sum(), logits, retain_graph=True)[0]
             for k in ("k1", "k2", "k3")}
    assert torch.allclose(slope["k2"], expected, atol=1e-6)
    assert slope["k1"].abs().max() < 1e-6 < slope["k3"].abs().max()


def test_the_reference_is_the_policy_with_its_adapter_off(model):
    ids, masks = draw(model, [8, 5])
    before, _ = score(model, ids, masks)
    lora.add(model, 4, 8, ["q_proj", "v_proj"])
    assert torch.equal(score(model, ids, masks)[0], before)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.add_(0.1)
    assert not torch.allclose(score(model, ids, masks)[0], before)
    with lora.off(model):
        assert torch.equal(score(model, ids, masks)[0], before)
