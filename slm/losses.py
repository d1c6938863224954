"""Log-probabilities, advantages and every training objective, as pure functions.

Losses are sums. The trainer divides them once per optimizer step by a count over the whole batch, so neither
micro-batches nor ranks change the gradient. Log-probs have shape (N,), float32, in nats: one for each trained
token. Not covered: value functions, so no PPO critic and no GAE.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from slm import BadInput
from slm.branches import Branches, prompts_of
from slm.sampling import warp

# ---- log-probs without the (N, V) matrix -----------------------------------------------------------------

def token_logprobs(model, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0,
                   chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, D), targets (N,) -> log-probs of the targets, entropies, both (N,) float32, in nats.

    Row i of hidden predicts targets[i]. Only `chunk` rows of the (N, V) logits exist at a time, here and in
    the backward pass. (V is 151,936 for Qwen: the logits of 8k tokens would be 5 GB, twice.) No gradient
    flows through the entropy. BadInput for an adapter on the output head.
    """
    head = model.model.embed_tokens if model.config.tied else model.lm_head
    if getattr(head, "lora_A", None):
        raise BadInput("an adapter on lm_head: the losses do not cover it; merge it, or leave lm_head out of "
                       "its target_modules")
    weight = head.weight[:model.config.ids]
    if chunk is None:
        chunk = max(128, (1 << 26 if hidden.is_cuda else 1 << 20) // weight.shape[0])
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)


class _TokenLogprobs(torch.autograd.Function):
    """d logp_t / d hidden_t = (W[target] - softmax_t W) / temperature. The incoming gradient only scales this
    direction, (N, D), so with a frozen head (LoRA) the forward pass computes and keeps it. A trained head
    needs the softmax for its own gradient, so there the backward pass computes it again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        kind = hidden.device.type
        w = weight.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype)
        logp = hidden.new_zeros(len(hidden), dtype=torch.float32)
        entropy = torch.zeros_like(logp)
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        direction = torch.zeros_like(hidden) if frozen else None
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = warp(F.linear(hidden[rows].to(w.dtype), w).float(), temperature)
            total = logits.logsumexp(-1)
            logp[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - total
            p = (logits - total[:, None]).exp_()
            entropy[rows] = total - torch.linalg.vecdot(p, logits)
            if frozen:
                direction[rows] = (w[targets[rows]] - p.to(w.dtype) @ w) / temperature
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, w.dtype
        ctx.save_for_backward(direction, hidden, weight, targets)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        direction, hidden, weight, targets = ctx.saved_tensors
        if direction is not None:
            return (direction * grad[:, None]).to(hidden.dtype), None, None, None, None
        w = weight.to(ctx.dtype)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            h = hidden[rows].to(w.dtype)
            p = warp(F.linear(h, w).float(), ctx.temperature).softmax(-1)
            p.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None])
            p = p.div_(ctx.temperature).to(w.dtype)
            grad_hidden[rows] = p @ w
            grad_weight += p.T @ h
        return grad_hidden, grad_weight, None, None, None


def pack(lengths: list[int], tokens: int, prompts: list[tuple[int, ...]] | None = None) -> list[list[int]]:
    """Lengths of sequences -> micro-batches, as lists of places in `lengths`. A micro-batch has at most
    `tokens` tokens, or one longer sequence; it holds sequences of like length. Those that share a prompt stay
    together. It counts once, and an eighth of it for each further sequence, which copies keys and values.

    >>> pack([5, 90, 6, 100], tokens=110), pack([5, 90, 6, 100], 110, [(1, 2), (), (1, 2), ()])
    ([[0, 2, 1], [3]], [[0, 2], [1], [3]])
    """
    heads = prompts or [()] * len(lengths)
    groups: dict = {}
    for i, head in enumerate(heads):
        groups.setdefault(head or i, []).append(i)  # one without a prompt is a group of its own
    batches: list[list[int]] = []
    room = 0
    for group in sorted(groups.values(), key=lambda group: max(lengths[i] for i in group)):
        for i in group:
            shared = len(heads[i]) * 7 // 8 if batches and heads[batches[-1][-1]] == heads[i] else 0
            if not batches or lengths[i] - shared > room:
                batches.append([])
                room, shared = tokens, 0
            batches[-1].append(i)
            room -= lengths[i] - shared
    return batches


def pack_for(model, ids: list[list[int]], masks: list[list[int]], tokens: int) -> list[list[int]]:
    """Sequences and their masks -> micro-batches for `score`, which shares prompts: see pack."""
    return pack(list(map(len, ids)), tokens, prompts_of(model, ids, masks))


def score(model, ids: list[list[int]], masks: list[list[int]], temperature: float = 1.0):
    """Sequences and their masks (1 = trained) -> log-prob and entropy of each trained token (N,), in order.

    Nothing predicts a sequence's first token, so its mask must be 0.
    """
    device = next(model.parameters()).device
    attend = Branches(ids, prompts_of(model, ids, masks), device)
    trained = torch.tensor([m for x in masks for m in x]).nonzero().squeeze(1).to(device)
    hidden = model(attend.tokens, attend.positions, attend)
    targets = attend.tokens[attend.places[trained]]
    return token_logprobs(model, hidden[attend.places[trained - 1]], targets, temperature)


# ---- supervised ------------------------------------------------------------------------------------------

def sft_loss(logp: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum of -log p, number of tokens) over the trained tokens; their quotient is the usual cross-entropy.

    >>> sft_loss(torch.tensor([-1.0, -3.0]))
    (tensor(4.), 2)
    """
    return -logp.sum(), logp.numel()


# ---- advantages: functions of one group's rewards (K,) -> (K,) -------------------------------------------

def advantages(rewards: torch.Tensor, groups: torch.Tensor, of_group: Callable) -> torch.Tensor:
    """Rewards (N,) of episodes, the group (problem) of each (N,) int, a function below -> advantages (N,).

    >>> advantages(torch.tensor([1., -1., 1., 1.]), torch.tensor([0, 0, 1, 1]), minus_mean)
    tensor([ 1., -1.,  0.,  0.])
    """
    found = torch.zeros_like(rewards)
    for group in groups.unique():
        found[groups == group] = of_group(rewards[groups == group])
    return found


def raw(r: torch.Tensor) -> torch.Tensor:
    """r itself: the report's formula, -E[r log pi] + beta KL, has no baseline."""
    return r


def minus_mean(r: torch.Tensor) -> torch.Tensor:
    """r - mean: Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783, section 3.2).

    Equal rewards give exactly 0: a reward within 1e-5 of the mean, relative to the reward, counts as the
    mean, because float32 rounds the mean of -0.3, -0.3 and -0.3."""
    centred = r - r.mean()
    return torch.where(centred.abs() > 1e-5 * r.abs(), centred, 0.0)


def over_std(r: torch.Tensor) -> torch.Tensor:
    """(r - mean) / std, with the unbiased std: GRPO, Shao et al. 2024 (arXiv 2402.03300, section 4.1.2)."""
    centred = minus_mean(r)
    std = (centred.square().sum() / max(1, len(r) - 1)).sqrt()
    return centred / std if std > 0 else centred


def leave_one_out(r: torch.Tensor) -> torch.Tensor:
    """r - mean of the others: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, section 3.3). One alone: 0."""
    return minus_mean(r) * len(r) / max(1, len(r) - 1)  # equals r - (sum - r) / (K - 1)


def max_rl(r: torch.Tensor) -> torch.Tensor:
    """(R - p) / p with R = 1 if r > 0, else 0, and p the mean of R; 0 if p is 0: MaxRL (arXiv 2602.02710).
    In expectation the gradient of log p, as a series in 1 - p cut after K - 1 terms; the first is p."""
    right = (r > 0).float()
    return (right - right.mean()) / right.mean().clamp(min=1e-9)


def pass_at_k(r: torch.Tensor, k: int) -> torch.Tensor:
    """Pass@k (arXiv 2508.10751, eq. 14-15): a subset of k episodes earns 1 if one of it is right (r > 0). An
    episode gets the mean over its subsets of (earned - mean) / std. So K must exceed k."""
    n, wrong = len(r), int((r <= 0).sum())
    rate = 1 - math.comb(wrong, k) / max(1, math.comb(n, k))
    std = math.sqrt(rate * (1 - rate)) or math.inf
    alone = math.comb(max(0, wrong - 1), k - 1) / max(1, math.comb(n - 1, k - 1))  # of a wrong one's subsets
    return torch.where(r > 0, (1 - rate) / std, (1 - rate - alone) / std)


# ---- policy objectives: per-token losses (N,), to be weighted and summed ---------------------------------
# All take logp, the log-probs now; old, those at the start of the step; the advantage of each token; and
# sequence, int, the number of each token's sequence; all (N,). r = exp(logp - old).

def ratio(logp, old) -> torch.Tensor:
    """exp(logp - old), at most e^60. Above e^88 float32 has only inf, and inf times 0 is no number."""
    return (logp - old).clamp(max=60).exp()


def clipped(logp, old, advantage, sequence, low: float, high: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) and GRPO
    (arXiv 2402.03300, eq. 3) with low = high; DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 10) with more."""
    r = ratio(logp, old)
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


def sequence_clipped(logp, old, advantage, sequence, low: float, high: float) -> torch.Tensor:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5-7): one ratio per sequence, exp(mean of logp - old),
    clipped as above. Each token carries its sequence's value: weights of 1 / length give the paper's sum."""
    mean = _mean(logp - old, sequence)
    return clipped(mean, torch.zeros_like(mean), advantage, sequence, low, high)


def geometric(logp, old, advantage, sequence, width: float) -> torch.Tensor:
    """-A (product over the sequence of min(r^s, clip(r^s, e^-width, e^width))^s) ^ (1 / length) with s the
    sign of A: GMPO (arXiv 2507.20673). min leaves only the upper bound of r^s. Weights as for GSPO."""
    sign = advantage.sign()
    mean = _mean(sign * (sign * (logp - old)).clamp(max=width), sequence)
    return -mean.exp() * advantage


def _mean(x: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """For each token, the mean of x over its sequence (N,)."""
    length = sequence.bincount().clamp(min=1)
    return (x.new_zeros(len(length)).index_add(0, sequence, x) / length)[sequence]


def cispo(logp, old, advantage, sequence, low: float, high: float) -> torch.Tensor:
    """-sg(clip(r, 1 - low, 1 + high)) A log p: CISPO (arXiv 2506.13585, eq. 4-5), with ratios up to 5 as in
    arXiv 2510.13786. The clip bounds a token's weight and never stops its gradient; none flows through sg."""
    return -ratio(logp, old).clamp(1 - low, 1 + high).detach() * advantage * logp


def reinforce(logp, old, advantage, sequence) -> torch.Tensor:
    """-A log p (Williams 1992): no ratio and no clip."""
    return -advantage * logp


def distill(logp, old, teacher, sequence) -> torch.Tensor:
    """-r sg(teacher - logp): on-policy distillation (Thinking Machines, "On-policy distillation", 2025), with
    the teacher's log-probs (N,). The expected gradient is that of each token's KL(policy || teacher), given
    what is before it."""
    return -ratio(logp, old) * (teacher - logp).detach()


# ---- where the sampler's distribution is not the trainer's -----------------------------------------------

def trust(logp, old, sampled, advantage, cap: float, delta: float) -> torch.Tensor:
    """Factors (N,) for the gradients of tokens that the sampler drew with log-probs `sampled` (N,).

    cap    min(p_old / p_sampled, cap): truncated importance weights, Yao et al. 2025 ("Your efficient RL
           framework secretly brings you off-policy RL training"). 0: all are 1
    delta  0 for a token that has gone too far already: p - p_sampled > delta if A > 0, p_sampled - p > delta
           if A < 0. DPPO's mask with the binary total variation (arXiv 2602.04879, eq. 13). 0: no mask
    """
    weight = ratio(old, sampled).clamp(max=cap) if cap else torch.ones_like(old)
    gone = advantage.sign() * (logp.exp() - sampled.exp()) > (delta or torch.inf)
    return torch.where(gone, 0.0, weight)


# ---- staying near the reference, and what a token weighs -------------------------------------------------

def kl(logp, ref, kind: str = "k3") -> torch.Tensor:
    """Per-token estimate (N,) of KL(policy || reference) from tokens the policy sampled, with gradient.

    k1 = logp - ref, k2 = (logp - ref)^2 / 2, k3 = exp(ref - logp) - 1 - (ref - logp) (Schulman 2020,
    "Approximating KL divergence"; k3 is GRPO's eq. 4). As a loss, k1's expected gradient is zero, k2's is
    that of the KL above.
    """
    d = ref - logp
    if kind == "k1":
        return -d
    return d.exp() - 1 - d if kind == "k3" else d ** 2 / 2


def token_weights(lengths: torch.Tensor, how: str, max_tokens: int = 1) -> tuple[torch.Tensor, int]:
    """Trained tokens of each sequence (S,) -> (weight of one token of each (S,), divisor of the sum).

    What counts are the episodes of the whole batch that have a reward, so failed ones must not be in
    `lengths`. An episode with a reward and no trained token has length 0 and counts in the divisor.

    token     sum / tokens of the batch. DAPO (arXiv 2503.14476, eq. 8) divides by the tokens of each prompt's
              group and takes the mean over prompts; here a prompt weighs as much as it has tokens
    sequence  mean over sequences of each one's mean token: GRPO (arXiv 2402.03300, eq. 3). A token of a short
              sequence weighs more than one of a long sequence
    constant  sum / (sequences * max_tokens): Dr. GRPO (arXiv 2503.20783, section 3.2), free of length bias.
              RLOO (arXiv 2402.14740) divides by sequences only, so this is its sum divided by max_tokens
    """
    one = torch.ones(len(lengths), device=lengths.device)
    if how == "token":
        return one, int(lengths.sum())
    if how == "sequence":
        return one / lengths.clamp(min=1), len(lengths)
    return one / max_tokens, len(lengths)
