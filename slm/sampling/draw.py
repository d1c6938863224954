"""The next tokens of a batch, drawn from its logits: every row has its own temperature, truncation and stream
of random numbers.

A stream is a hash of (key, place), so a draw depends on nothing else in the batch, costs nothing to seek, and
needs no generator on any device. Drawing inverts the cumulative sum at one such number a token. (Gumbel noise
would need one for each entry of the vocabulary.)
"""

import torch

from slm.sampling.graphs import fused

BLOCK = 64  # entries of the vocabulary whose probabilities are summed first
HEADS = 256, 4096  # so many of the most likely tokens are put in order before all are
PART = 2 ** 21  # logits that are drawn from at once on a CPU, whose own caches hold no more


class Controls:
    """What rows (B,) need to draw their next tokens, on the device; draw() moves it on to the token after.

    rows: (last token, its position, key, tokens drawn so far, Sampling) of each. size: how many rows a
    recorded batch has at least; rows that are missing stand at position `outside`, and nobody looks at what
    they draw.
    """

    def __init__(self, rows: list[tuple], device, size: int = 0, outside: int = 0):
        def tensor(values, fill, dtype):
            values = [*values, *[fill] * (size - len(rows))]
            return torch.tensor(values, dtype=dtype, device=device)

        last, position, key, place, s = zip(*rows)
        self.last, self.position = tensor(last, 0, torch.int64), tensor(position, outside, torch.int64)
        self.key, self.place = tensor(key, 0, torch.int64), tensor(place, 0, torch.int64)
        self.sampled, self.greedy_rows = any(x.temperature for x in s), not all(x.temperature for x in s)
        self.greedy = tensor([x.temperature == 0 for x in s], not self.sampled, torch.bool)
        self.temperature = tensor([x.temperature or 1.0 for x in s], 1.0, torch.float32)
        self.scaled = size > 0 or any(x.temperature not in (0, 1) for x in s)  # a recording serves any batch
        self.outside = outside
        # Greedy is not a distribution: its log-probs are those at temperature 1, nothing cut.
        self.top_k, self.top_p = 0, 1.0
        if any(x.top_k and x.temperature for x in s):
            self.top_k = tensor([x.top_k if x.temperature else 0 for x in s], 0, torch.int64)
        if any(x.top_p < 1 and x.temperature for x in s):
            self.top_p = tensor([x.top_p if x.temperature else 1.0 for x in s], 1.0, torch.float32)

    def take(self, other: "Controls") -> None:
        """Copy another batch's state into these tensors, which stay where they are."""
        for name in ("last", "position", "place", "key", "greedy", "temperature"):
            getattr(self, name).copy_(getattr(other, name))

    def draw(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, V) -> ids (B,), log-probs (B,) float32 under the distribution drawn from."""
        size = len(logits)
        if logits.is_cpu:  # where they may lie column by column
            logits, size = logits.contiguous(), max(1, PART // logits.shape[1])
        parts = [self._draw(logits[i:i + size], slice(i, i + size)) for i in range(0, len(logits), size)]
        ids, logprobs = map(torch.cat, zip(*parts)) if len(parts) > 1 else parts[0]
        self.last.copy_(ids)
        self.position.add_(1)
        if self.outside:
            self.position.clamp_(max=self.outside)
        self.place.add_(1)
        return ids, logprobs

    def _draw(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for some rows, with nothing moved on."""
        temperature, top_k, top_p = (x[rows] if torch.is_tensor(x) else x for x in (
            self.temperature if self.sampled and self.scaled else None, self.top_k, self.top_p))
        if torch.is_tensor(top_k) or torch.is_tensor(top_p):
            logits, temperature = warp(logits.float(), self.temperature[rows], top_k, top_p), None
        return choose(logits, temperature, self.greedy[rows] if self.greedy_rows else None,
                      self.key[rows] if self.sampled else None, self.place[rows])


@fused
def choose(logits, temperature, greedy, key, place):
    """logits (B, V) -> ids, log-probs (B,). Rows draw at random unless there is no key; those where `greedy`
    is set take the most likely token."""
    if greedy is not None or temperature is not None:
        logits = logits.float()  # PyTorch's argmax is slow in bfloat16
    best = logits.argmax(-1) if greedy is not None else None
    if temperature is not None:
        logits = warp(logits, temperature)
    p = logits.softmax(-1, dtype=torch.float32)
    ids = best
    if key is not None:
        ids = categorical(p, uniform(key, place))
        if greedy is not None:
            ids = torch.where(greedy, best, ids)
    return ids, p.gather(1, ids[:, None]).squeeze(1).log()


def uniform(key: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), (B,) float32 with 24 random bits, from int64 keys and places: splitmix64 (Steele
    et al. 2014, "Fast splittable pseudorandom number generators") of place in the stream of key."""
    def mix(z):
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z
    z = mix(mix(key) + (place + 1) * -0x61C8864680B583EB)
    return ((z >> 40) & 0xFFFFFF).float() * 2.0 ** -24


def categorical(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draw from probabilities p (B, V) by inverting their cumulative sum at u (B,) -> ids (B,). The sum runs
    over blocks first, then inside the block that was hit: one pass over the vocabulary, and no copy of it."""
    size, full = p.shape[1], p.shape[1] // BLOCK
    sums = p[:, :full * BLOCK].view(len(p), full, BLOCK).sum(-1)
    sums = torch.cat((sums, p[:, full * BLOCK:].sum(-1, keepdim=True)), 1)
    block, rest = _invert(sums, u * sums.sum(-1))
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, places.clamp(max=size - 1)).masked_fill(places >= size, 0)
    ids = block * BLOCK + _invert(inside, rest)[0]
    return ids.clamp_(max=size - 1)  # NaN probabilities lead anywhere


def _invert(mass: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First index at which the cumulative mass (B, N) exceeds the target (B,), and how far into its mass. A
    target that rounding put at the total or above is moved below it, so mass 0 is never selected."""
    sums = mass.cumsum(-1)
    target = torch.minimum(target, sums[:, -1] * (1 - 1e-6))
    index = torch.searchsorted(sums, target[:, None], right=True).clamp_(max=mass.shape[1] - 1)
    before = (sums - mass).gather(1, index).squeeze(1)
    return index.squeeze(1), (target - before).clamp_(min=0)


def warp(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """(N, V) logits of the distribution that is sampled from: temperature, then top-k, then top-p (nucleus,
    Holtzman et al. 2020). The sampler and the losses both call this, so they mean the same distribution.

    Each setting is a number or an (N,) tensor with one value a row; temperature > 0; top_k 0 and top_p 1 are
    off. The most likely token always stays; tokens that are cut get -inf.
    """
    def column(x):
        return x.unsqueeze(-1) if torch.is_tensor(x) else x

    if torch.is_tensor(temperature) or temperature != 1.0:
        logits = logits / column(temperature)
    if not (torch.is_tensor(top_k) or torch.is_tensor(top_p) or top_k or top_p < 1):
        return logits
    size, mass = logits.shape[-1], column(torch.as_tensor(top_p, device=logits.device))
    limit = column(torch.as_tensor(top_k, device=logits.device))
    limit = torch.where(limit > 0, limit, size)
    whole, total = (limit == size) & (mass >= 1), logits.logsumexp(-1, keepdim=True)
    for count in (*(n for n in HEADS if n < size), size):  # all in order takes longer than all else together
        ordered, order = logits.topk(count)
        place = torch.arange(count, device=logits.device)
        p = ordered.masked_fill(place >= limit, -torch.inf)
        p = (p - torch.where(limit < size, p.logsumexp(-1, keepdim=True), total)).exp()
        kept = (place < limit) & ((p.cumsum(-1) - p < mass) | (mass >= 1) | (place == 0))
        if (whole | torch.where(limit < size, limit <= count, ~kept[:, -1:])).all():
            break
    cut = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(~kept, -torch.inf))
    return torch.where(whole, logits, cut)
