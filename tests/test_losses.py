"""Log-probs, advantages and objectives against autograd, brute force and hand-worked numbers."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from slm import BadInput, lora, losses, training
from slm.attention import Packed
from slm.branches import Branches, prompts_of
from slm.episode import TokenRecord
from slm.losses import (
    advantages,
    cispo,
    clipped,
    distill,
    geometric,
    kl,
    leave_one_out,
    max_rl,
    minus_mean,
    over_std,
    pack,
    pass_at_k,
    ratio,
    raw,
    reinforce,
    score,
    sequence_clipped,
    token_logprobs,
    token_weights,
    trust,
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
        attend = Packed([len(x)])
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


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # the nucleus: most of 6,000 tokens, hundreds, a few
def test_warp_of_a_large_vocabulary_is_the_definition(spread):
    logits = spread * torch.randn(7, 6000, generator=torch.Generator().manual_seed(1))
    settings = [(0, 1.0), (0, 0.9), (300, 1.0), (5000, 0.97), (2, 0.5), (0, 0.999), (0, 0.3)]
    rows = warp(logits, 0.7, *(torch.tensor(x) for x in zip(*settings)))
    for row, one, (top_k, top_p) in zip(rows, (logits / 0.7).double().numpy(), settings):
        order = np.argsort(-one)
        first = np.exp(one[order] - one.max())[:top_k or None]
        before = np.cumsum(first / first.sum()) - first / first.sum()
        kept = int((before < top_p).sum()) if top_p < 1 else len(first)
        found = row.isfinite().nonzero().flatten().numpy()
        assert abs(len(found) - kept) <= 1  # where a float32 sum ends may be a token off
        assert set(found) ^ set(order[:kept]) <= {order[kept - 1], order[min(kept, 5999)]}
        assert np.allclose(row[found], one[found], atol=1e-5)


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
    loss = loss + geometric(logp, logp.detach(), torch.ones(9), torch.tensor([0] * 6 + [1] * 3), 0.4)
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

GROUPED = [minus_mean, over_std, leave_one_out, max_rl, partial(pass_at_k, k=1), partial(pass_at_k, k=2)]


def near(expected):
    return pytest.approx(expected, abs=1e-6)


def test_advantages_by_hand():
    r, s = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]), math.sqrt(1.2)  # mean -0.2; 2 x 1.44 + 3 x 0.64 = 4.8
    assert raw(r) is r
    assert minus_mean(r).tolist() == near([1.2, 1.2, -0.8, -0.8, -0.8])
    assert over_std(r).tolist() == near([1.2 / s, 1.2 / s, -0.8 / s, -0.8 / s, -0.8 / s])
    assert leave_one_out(r).tolist() == near([1.5, 1.5, -1, -1, -1])  # 1 - (1 - 3) / 4, -1 - (2 - 2) / 4
    assert max_rl(r).tolist() == near([1.5, 1.5, -1, -1, -1])         # p = 0.4: 0.6 / 0.4, -0.4 / 0.4
    # R = 1 - 3 / 10 = 0.7, s = sqrt(0.21); a wrong one: 0.3 - C(2, 1) / C(4, 1) = -0.2
    s = math.sqrt(0.21)
    assert pass_at_k(r, 2).tolist() == near([0.3 / s, 0.3 / s, -0.2 / s, -0.2 / s, -0.2 / s])


def test_groups_are_compared_apart():
    r, g = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0]), torch.tensor([7, 0, 0, 7, 7, 7])
    assert advantages(r, g, minus_mean).tolist() == [1, -1, 1, 1, -1, -1]
    whole = advantages(r + torch.arange(6), torch.zeros_like(g), over_std)
    assert torch.allclose(whole, (r + torch.arange(6) - 2.5) / (r + torch.arange(6)).std())


def test_who_is_left_out_of_a_group_moves_no_mean():
    """Of [1, 1, 0, 0] the second has failed, then the third."""
    assert minus_mean(torch.tensor([1.0, 0.0, 0.0])).tolist() == near([2 / 3, -1 / 3, -1 / 3])
    assert minus_mean(torch.tensor([1.0, 1.0, 0.0])).tolist() == near([1 / 3, 1 / 3, -2 / 3])


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("reward", [-1.0, -0.3, 0.0, 1e-9, 0.1, 1.0, 12345.678])
def test_a_group_without_spread_and_a_single_sample_get_nothing(kind, reward):
    for size in (1, 2, 3, 7, 100):
        assert kind(torch.full((size,), reward)).tolist() == [0] * size


@pytest.mark.parametrize("kind", [minus_mean, over_std, leave_one_out])
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e6])
def test_a_real_spread_counts_however_small_the_rewards(kind, unit):
    found = kind(torch.tensor([1.0, 1.0, 1.0, 1.001]) * unit)
    assert (found[:3] < 0).all() and found[3] > 0


def test_leave_one_out_against_brute_force():
    torch.manual_seed(3)
    r = torch.randn(12)
    for i, a in enumerate(leave_one_out(r)):
        others = [r[j] for j in range(12) if j != i]
        assert a.item() == pytest.approx((r[i] - sum(others) / len(others)).item(), abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("right", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k, right):
    """Every subset of k earns 1 if one of it is right; whitened over the subsets."""
    r = torch.tensor([1.0] * right + [-1.0] * (6 - right))
    subsets = list(itertools.combinations(range(6), k))
    earned = [float(any(i < right for i in subset)) for subset in subsets]
    rate = sum(earned) / max(1, len(earned))
    std = math.sqrt(rate * (1 - rate))
    expected = []
    for i in range(6):
        own = [(e - rate) / std for e, subset in zip(earned, subsets) if i in subset] if std else [0.0]
        expected.append(sum(own) / len(own))
    assert pass_at_k(r, k).tolist() == near(expected)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_max_rl_has_the_gradient_of_log_p_cut_after_the_terms_that_its_docstring_names(p, size):
    """A policy that is right with probability p: the exact mean over all groups of K against the derivative
    of -sum_k (1 - p)^k / k, k < K. REINFORCE's is the first term, 1."""
    slope = {True: 1 / p, False: -1 / (1 - p)}  # d log(probability of the outcome) / dp
    total = reinforced = 0.0
    for outcome in itertools.product((True, False), repeat=size):
        r = torch.tensor([1.0 if right else -1.0 for right in outcome])
        chance = math.prod(p if right else 1 - p for right in outcome)
        total += chance * sum(a * slope[right] for a, right in zip(max_rl(r).tolist(), outcome)) / size
        reinforced += chance * sum(slope[right] for right in outcome if right) / size
    assert total == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size)), rel=1e-5)
    assert reinforced == pytest.approx(1)


# ---- objectives ------------------------------------------------------------------------------------------

OBJECTIVES = {
    "clipped": partial(clipped, low=0.2, high=0.28), "sequence": partial(sequence_clipped, low=0.1, high=0.2),
    "geometric": partial(geometric, width=0.4), "cispo": partial(cispo, low=1, high=4),
    "reinforce": reinforce, "distill": distill}


def paper(name, now, old, a):
    """The paper's value for one sequence, in place of the sum over its tokens; `now` has gradients."""
    r = [(x - y).exp() for x, y in zip(now, old)]
    if name == "clipped":
        return sum(min(x * b, min(max(x, torch.tensor(0.8)), torch.tensor(1.28)) * b) for x, b in zip(r, a))
    if name == "sequence":
        s = math.prod(r) ** (1 / len(r))
        return len(r) * min(s * a[0], min(max(s, torch.tensor(0.9)), torch.tensor(1.2)) * a[0])
    if name == "geometric":
        s, product = math.copysign(1, a[0]), 1.0
        for x in r:
            product = product * min(x ** s, (x ** s).clamp(math.exp(-0.4), math.exp(0.4))) ** s
        return len(r) * product ** (1 / len(r)) * a[0]
    if name == "cispo":
        return sum(min(max(x.item(), 0.0), 5.0) * b * y for x, b, y in zip(r, a, now))
    if name == "reinforce":
        return sum(b * y for b, y in zip(a, now))
    return sum(x * (b - y.item()) for x, b, y in zip(r, a, now))  # distill: `a` is the teacher


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_its_papers_formula_token_by_token(name):
    """Value and gradient, far from ratio 1, so that clips are active; sequences of different lengths."""
    g = torch.Generator().manual_seed(5)
    lengths = [1, 3, 7, 2, 30]
    old = -3 * torch.rand(sum(lengths), generator=g, dtype=torch.float64)
    shift = torch.randn(sum(lengths), generator=g, dtype=torch.float64)
    logp = (old + shift).requires_grad_()
    sequence = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    advantage = torch.tensor([1.0, -1.0, 0.3, -2.0, 1.5], dtype=torch.float64)[sequence]
    if name == "distill":
        advantage = -2 * torch.rand(len(logp), generator=g, dtype=torch.float64)
    ours = OBJECTIVES[name](logp, old, advantage, sequence)
    theirs = -sum(paper(name, list(n), list(o), a.tolist()) for n, o, a in zip(
        logp.split(lengths), old.split(lengths), advantage.split(lengths)))
    assert ours.shape == logp.shape and ours.sum().item() == pytest.approx(theirs.item(), rel=1e-6)
    expected, = torch.autograd.grad(theirs, logp)
    found, = torch.autograd.grad(ours.sum(), logp)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-9)
    if name in ("clipped", "sequence", "geometric"):  # the clip stops some tokens, not all
        assert 0 < (found == 0).sum() < len(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_ratio_one_every_objective_has_the_reinforce_gradient(name):
    logp = torch.randn(6, requires_grad=True)
    sequence, a = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1.0, 1.0, 0.5, -1.0, -1.0, -1.0])
    given = a + logp.detach() if name == "distill" else a
    found, = torch.autograd.grad(OBJECTIVES[name](logp, logp.detach(), given, sequence).sum(), logp)
    assert torch.allclose(found, -a, atol=1e-6)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 1.1, True), (1, 1.25, True), (1, 1.3, False), (1, 0.5, True),
    (-1, 0.9, True), (-1, 0.7, False), (-1, 1.5, True)])
def test_clip_higher_stops_the_gradient_outside_its_bounds_only(advantage, ratio, moves):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = OBJECTIVES["clipped"](logp, torch.zeros(1), torch.tensor([float(advantage)]), None)
    assert loss.item() == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage))
    assert bool(torch.autograd.grad(loss.sum(), logp)[0]) == moves


@pytest.mark.parametrize("name", [*OBJECTIVES, "trust"])
def test_a_gap_of_90_nats_has_numbers_as_loss_and_gradient(name):
    """exp(90) is more than float32 holds. Tokens without an advantage have no loss and no gradient."""
    gap, sequence, none = torch.tensor([90.0, 0.5]), torch.tensor([0, 0]), torch.zeros(2)
    if name == "trust":
        assert trust(gap, gap, none, none, 2, 0).tolist() == pytest.approx([2, math.exp(0.5)])
        assert ratio(gap, none).tolist() == pytest.approx([math.exp(60), math.exp(0.5)]) and ratio(
            none, gap).tolist() == pytest.approx([math.exp(-90), math.exp(-0.5)])
        return
    for a in (0.0, 1.0, -1.0):
        logp = gap.clone().requires_grad_()
        loss = OBJECTIVES[name](logp, none, logp.detach() + a if name == "distill" else none + a, sequence)
        slope, = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all() and slope.isfinite().all()
        assert a or not (loss.any() or slope.any())


def test_objectives_by_hand():
    """Two sequences: A = 2 with ratios e^0.1, e^0.6, and A = -1 with e^-0.5, whose clip stops it."""
    logp, old = torch.tensor([0.1, 0.7, -0.6]), torch.tensor([0.0, 0.1, -0.1])
    a, sequence, e = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([0, 0, 1]), math.exp
    found = sequence_clipped(logp, old, a, sequence, 0.5, 0.5)
    assert found.tolist() == pytest.approx([-2 * e(0.35)] * 2 + [e(-0.5)])
    found = geometric(logp, old, a, sequence, 0.4)
    assert found.tolist() == pytest.approx([-2 * e(0.25)] * 2 + [e(-0.4)])
    found = cispo(logp, old, a, sequence, 1, 0.5)  # ratios at most 1.5
    assert found.tolist() == pytest.approx([-2 * e(0.1) * 0.1, -2 * 1.5 * 0.7, e(-0.5) * -0.6])
    assert reinforce(logp, old, a, sequence).tolist() == pytest.approx([-0.2, -1.4, -0.6])
    teacher = torch.tensor([0.0, 0.2, -0.6])
    assert distill(logp, old, teacher, sequence).tolist() == pytest.approx([e(0.1) * 0.1, e(0.6) * 0.5, 0.0])


def categorical(seed, n=8):
    """(logits with gradient, another distribution) over n tokens."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=g, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(n, generator=g, dtype=torch.float64).log_softmax(-1)


def test_distillation_has_the_gradient_of_the_kl_to_the_teacher():
    """The exact mean over a vocabulary, with tokens from the policy and from an older one."""
    logits, teacher = categorical(0)
    logp = logits.log_softmax(-1)
    expected, = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    for old in (logp.detach(), categorical(1)[1]):
        loss = (old.exp() * distill(logp, old, teacher, None)).sum()
        assert torch.allclose(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)


# ---- sampler against trainer -----------------------------------------------------------------------------

def test_trust_by_hand():
    p, old, sampled = (torch.tensor(x).log() for x in ([0.5, 0.5, 0.1, 0.1], [0.6, 0.4, 0.3, 0.1],
                                                       [0.2, 0.8, 0.31, 0.1]))
    up, no = torch.tensor([1.0, -1.0, -1.0, 0.0]), torch.ones(4)
    assert trust(p, old, sampled, up, 0, 0).tolist() == [1, 1, 1, 1]
    assert trust(p, old, sampled, up, 2, 0).tolist() == pytest.approx([2, 0.5, 0.3 / 0.31, 1])  # not 3
    # p - p_sampled: 0.3, -0.3, -0.21, 0: gone the way that A wants by more than 0.2
    assert trust(p, old, sampled, up, 0, 0.2).tolist() == [0, 0, 0, 1]
    assert trust(p, old, sampled, -up, 0, 0.2).tolist() == [1, 1, 1, 1]
    assert trust(p, old, sampled, no, 2, 0.25).tolist() == pytest.approx([0, 0.5, 0.3 / 0.31, 1])


@pytest.mark.parametrize("name", ["clipped", "reinforce", "cispo"])
def test_a_sampler_at_a_wrong_temperature_is_corrected(name):
    """Tokens come from a sampler at temperature 3. Weighed by p / p_sampled they have the gradient of the
    policy; not weighed, another one. A cap of 2 takes away a part of the bias."""
    logits, _ = categorical(2)
    reward = torch.arange(8.0, dtype=torch.float64)
    logp, sampled = (3 * logits).log_softmax(-1), logits.detach().log_softmax(-1)
    expected, = torch.autograd.grad(-(logp.exp() * reward).sum(), logits, retain_graph=True)
    old, error = logp.detach(), {}
    for cap in (0, 2, 50):
        loss = OBJECTIVES[name](logp, old, reward, None) * trust(old, old, sampled, reward, cap, 0)
        found, = torch.autograd.grad((sampled.exp() * loss).sum(), logits, retain_graph=True)
        error[cap] = ((found - expected).norm() / expected.norm()).item()
    assert error[50] < 1e-9 < 0.1 < error[2] < error[0], error


# ---- sums ------------------------------------------------------------------------------------------------

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


def samples(prompt: int, replies: list[int], seed: int = 0) -> tuple[list, list]:
    """(sequences, masks): samples of one prompt, of these lengths."""
    drawn = torch.Generator().manual_seed(seed)
    head, *tails = (torch.randint(1, 13, (n,), generator=drawn).tolist() for n in (prompt, *replies))
    return [head + tail for tail in tails], [[0] * prompt + [1] * len(tail) for tail in tails]


def test_a_prompt_that_several_sequences_share_gives_the_log_probs_and_gradients_of_each_alone(
        model, monkeypatch):
    """Three samples of one prompt, two of another, one alone, two whose prompt is too short to share, and two
    of which nothing is trained."""
    parts = [samples(16, [2, 1, 5]), samples(20, [1, 1], seed=1), samples(17, [3], seed=2),
             samples(3, [2, 2], seed=3), ([[4] * 18] * 2, [[0] * 18] * 2)]
    ids, masks = ([x for part in parts for x in part[i]] for i in (0, 1))
    slope = torch.arange(1.0, 18.0)

    def run() -> tuple:
        model.zero_grad()
        logp, _ = score(model, ids, masks)
        (logp * slope).sum().backward()
        return logp.detach(), [p.grad.clone() for p in model.parameters()]

    shared, got = run()
    branches = Branches(ids, prompts_of(model, ids, masks))
    assert branches.lengths == [16, 2, 1, 5, 20, 1, 1, 20, 5, 5, 18, 18]
    assert branches.after == [None, 0, 0, 0, None, 4, 4, None, None, None, None, None]
    monkeypatch.setattr(losses, "prompts_of", lambda model, ids, masks: [()] * len(ids))
    alone, wanted = run()
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_with_adapters_of_their_own_share_no_prompt(model):
    lora.add(model, r=2)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    ids, masks = samples(16, [2, 3])
    with lora.use(model, [("default", 18), (None, 19)]):
        got = score(model, ids, masks)[0]
    first = score(model, ids[:1], masks[:1])[0]
    with lora.off(model):
        second = score(model, ids[1:], masks[1:])[0]
    torch.testing.assert_close(got, torch.cat((first, second)), atol=1e-5, rtol=1e-5)


def test_samples_of_a_prompt_fill_a_micro_batch_as_if_it_were_there_once_and_an_eighth():
    lengths, prompts = [60, 70, 65, 90], [(1,) * 48, (1,) * 48, (1,) * 48, (2,) * 48]
    assert losses.pack(lengths, 111, prompts) == [[0, 1, 2], [3]]  # 60 + 70 - 42 + 65 - 42
    assert losses.pack(lengths, 110, prompts) == [[0, 1], [2], [3]]
    assert losses.pack(lengths, 155) == [[0, 2], [1], [3]]


def test_the_trainer_s_micro_batches_keep_samples_of_a_prompt_together(model):
    (first, one), (second, two) = samples(20, [3, 9]), samples(20, [5, 7], seed=1)
    records = [TokenRecord(*pair) for pair in zip([first[0], second[0], first[1], second[1]],
                                                  [one[0], two[0], one[1], two[1]])]
    parts = [[record.ids for record in part] for part in training.micro_batches(model, records, 40)]
    assert parts == [second, first]  # 25 + 27 - 17, 23 + 29 - 17
