"""Log-probabilities, advantages and every training objective, as pure functions.

Losses are sums. The trainer divides them once per optimizer step by a count over the whole batch, so neither
micro-batches nor ranks change the gradient. Log-probs have shape (N,), float32, in nats: one for each trained
token. Not covered: value functions and token-level rewards, so no PPO critic and no GAE.
"""

import torch
import torch.nn.functional as F

from slm import BadInput
from slm.attention import Packed
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
        chunk = max(16, (1 << 26 if hidden.is_cuda else 1 << 20) // weight.shape[0])
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


def pack(lengths: list[int], tokens: int) -> list[list[int]]:
    """Lengths of sequences -> micro-batches, as lists of places in `lengths`. A micro-batch has at most
    `tokens` tokens, or one longer sequence; it holds sequences of like length.

    >>> pack([5, 90, 6, 100], tokens=110)
    [[0, 2, 1], [3]]
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[i] > room:
            batches.append([])
            room = tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def score(model, ids: list[list[int]], masks: list[list[int]], temperature: float = 1.0):
    """Sequences and their masks (1 = trained) -> log-prob and entropy of each trained token (N,), in order.

    Nothing predicts a sequence's first token, so its mask must be 0.
    """
    device = next(model.parameters()).device
    attend = Packed([len(x) for x in ids], device)
    flat = torch.tensor([t for x in ids for t in x], device=device)
    trained = torch.tensor([m for x in masks for m in x]).nonzero().squeeze(1).to(device)
    hidden = model(flat, attend.positions, attend)
    return token_logprobs(model, hidden[trained - 1], flat[trained], temperature)


# ---- supervised ------------------------------------------------------------------------------------------

def sft_loss(logp: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum of -log p, number of tokens) over the trained tokens; their quotient is the usual cross-entropy.

    >>> sft_loss(torch.tensor([-1.0, -3.0]))
    (tensor(4.), 2)
    """
    return -logp.sum(), logp.numel()


# ---- advantages ------------------------------------------------------------------------------------------

def advantages(rewards: torch.Tensor, groups: torch.Tensor, kind: str) -> torch.Tensor:
    """Rewards (N,) of episodes and the group (problem) of each (N,) int -> advantages (N,).

    std    (r - mean) / std within the group: GRPO, Shao et al. 2024 (arXiv 2402.03300, section 4.1.2)
    mean   r - mean within the group: Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783, section 3.2)
    loo    r - mean of the group's other members: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, section 3.3)
    batch  (r - mean) / std over all episodes at once: what the report's code did; has no group baseline
    none   r itself: the report's formula

    std is the unbiased one. Equal rewards give exactly 0: a reward within 1e-5 of the mean, relative to the
    reward, counts as the mean, because float32 rounds the mean of -0.3, -0.3 and -0.3.

    >>> advantages(torch.tensor([1., -1., 1., 1.]), torch.tensor([0, 0, 1, 1]), "mean")
    tensor([ 1., -1.,  0.,  0.])
    """
    if kind == "none":
        return rewards
    group = torch.zeros_like(groups) if kind == "batch" else groups.unique(return_inverse=True)[1]

    def group_sum(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(rewards).index_add_(0, group, x)[group]

    n = group_sum(torch.ones_like(rewards))
    centred = rewards - group_sum(rewards) / n
    centred = torch.where(centred.abs() > 1e-5 * rewards.abs(), centred, 0.0)
    if kind == "mean":
        return centred
    if kind == "loo":
        return torch.where(n > 1, centred * n / (n - 1), 0.0)  # equals r - (sum - r) / (n - 1)
    std = (group_sum(centred ** 2) / (n - 1).clamp(min=1)).sqrt()
    return torch.where(std > 0, centred / std, 0.0)


# ---- policy objectives: per-token losses (N,), to be weighted and summed ---------------------------------

def clipped(logp, old, advantage, low: float, high: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logp - old), per token (N,).

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) and GRPO (arXiv 2402.03300, eq. 3) with low = high;
    DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476, eq. 10) with high > low.
    """
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sequence_clipped(logp, old, advantage, sequence, low: float, high: float) -> torch.Tensor:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5-7): one ratio per sequence, exp(mean of logp - old),
    clipped as above. `sequence` (N,) int numbers each token's sequence. Every token carries its sequence's
    value, so weights of 1 / length give the paper's sum."""
    length = sequence.bincount().clamp(min=1)
    mean = torch.zeros(len(length), device=logp.device).index_add(0, sequence, logp - old) / length
    return clipped(mean[sequence], torch.zeros_like(logp), advantage, low, high)


def reinforce(logp, advantage) -> torch.Tensor:
    """-A log p per token (Williams 1992): the report's objective, no ratio and no clip."""
    return -advantage * logp


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
