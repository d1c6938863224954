"""The ways tokens attend, and the only place that knows padding, masks and back ends.

An attend object is called once a layer, `attend(layer, q (T,H,E), k (T,K,E), v (T,K,E)) -> (T,H,E)`, with
queries and keys already rotated. It computes softmax(q k' / sqrt(E)) v (Vaswani et al. 2017,
arXiv:1706.03762, eq. 1) over the keys that the query's sequence has so far.

* Packed: many whole sequences in a row, each token sees its own up to itself. Training and log-probs.
* Prefill, Decode: the same with a KV cache, for the sampler.

On CUDA in half precision Packed runs PyTorch's variable-length flash attention (Dao 2023, arXiv:2307.08691).
Elsewhere it calls scaled_dot_product_attention for one sequence after the other. Padding them into batches
was no faster on a CPU, and a kernel that sees another length rounds differently: this way a packed sequence
gets the same bits as alone.
"""

import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.model import Config

varlen_attn, VARLEN_GQA = None, False
if torch.cuda.is_available():  # importing it costs a second or two, and without a GPU it is of no use
    with contextlib.suppress(ImportError):  # an older or a trimmed PyTorch
        from torch.nn.attention.varlen import varlen_attn
        VARLEN_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in PyTorch 2.11


class Packed:
    """Attention over sequences packed one behind the other: causal inside each, nothing across.

    lengths: tokens of each sequence, in order, all of 1 or more; T is their sum.
    positions: (T,) int64, each token's place in its own sequence.
    """

    def __init__(self, lengths: list[int], device="cpu"):
        self.lengths = list(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"sequence lengths must be 1 or more: {self.lengths}")
        self.positions = _ranges(self.lengths).to(device)
        self.longest = max(self.lengths)
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = ends.to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if varlen_attn and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self.flash(q, k, v)
        return torch.cat([_causal(*one) for one in zip(*(x.split(self.lengths) for x in (q, k, v)))])

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and not VARLEN_GQA:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return varlen_attn(q, k, v, self.bounds, self.bounds, self.longest, self.longest,
                           window_size=(-1, 0),  # everything to the left, nothing to the right
                           **({"enable_gqa": groups > 1} if VARLEN_GQA else {}))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence: q (L, H, E), k and v (L, K, E) -> (L, H, E)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type != "cpu":  # only the CPU's fused kernel shares heads in float32
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)[0].transpose(0, 1)


def _ranges(lengths: list[int]) -> Tensor:
    """[3, 2] -> tensor([0, 1, 2, 0, 1])"""
    return torch.cat([torch.arange(n) for n in lengths])


# ---- with a KV cache (sampler.py) --------------------------------------------------------------------------

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens: per layer k and v (slots, K, length, E).

    What nothing was written to is zero, never NaN: it is multiplied by attention weights of 0. spare: columns
    behind `length`, where rows that only fill up a recorded batch may write.
    """

    def __init__(self, config: Config, device="cpu", dtype=torch.float32):
        self.layers, self.heads, self.size = config.layers, config.kv_heads, config.head_size
        self.groups = config.heads // config.kv_heads
        self.device, self.dtype, self.spare = torch.device(device), dtype, int("cuda" in str(device))
        self.token_bytes = 2 * config.layers * config.kv_heads * config.head_size * dtype.itemsize
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self.slots = self.length = 0
        self.k, self.v = [self._zeros()] * self.layers, [self._zeros()] * self.layers

    def _zeros(self) -> Tensor:
        shape = self.slots, self.heads, self.length + self.spare, self.size
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def resize(self, slots: int, length: int) -> None:
        """Change the capacity, one layer after the other; what fits into the new one is kept."""
        s, n = min(self.slots, slots), min(self.length, length)
        self.slots, self.length = slots, length
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._zeros()
                tensors[layer][:s, :, :n] = old[:s, :, :n]

    def copy(self, source: int, targets: list[int], n: int) -> None:
        """Copy the first n tokens of a slot to other slots."""
        for x in self.k + self.v:
            for target in targets:
                x[target, :, :n] = x[source, :, :n]

    def move(self, sources: list[int], targets: list[int], n: int) -> None:
        """Put the first n tokens of each source slot into its target, all at once."""
        for x in self.k + self.v:
            x[targets, :, :n] = x[sources, :, :n]


class Prefill:
    """New tokens of some slots, packed. segments: (slot, tokens already in the cache, new tokens) of each.
    A token sees what its slot holds and, of the new ones, those up to itself."""

    def __init__(self, cache: KVCache, segments: list[tuple[int, int, int]]):
        self.cache, self.segments = cache, segments
        lengths = [n for _, _, n in segments]
        packed = Packed(lengths, cache.device)
        starts, slots = torch.tensor([s[1] for s in segments]), torch.tensor([s[0] for s in segments])
        repeat = lambda x: x.repeat_interleave(torch.tensor(lengths)).to(cache.device)
        self.positions, self.rows = packed.positions + repeat(starts), repeat(slots)
        self.packed = None if starts.any() else packed
        self.seen = [torch.ones(n, start + n, dtype=torch.bool, device=cache.device).tril(start)
                     for _, start, n in segments] if starts.any() else []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        if self.packed:
            return self.packed(layer, q, k, v)
        out = []
        news = q.split([n for _, _, n in self.segments])
        for (slot, start, n), new, seen in zip(self.segments, news, self.seen):
            span = slice(slot, slot + 1), slice(None), slice(start + n)
            out.append(F.scaled_dot_product_attention(
                new.transpose(0, 1)[None], keys[span], values[span], attn_mask=seen,
                enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1))
        return torch.cat(out)


class Decode:
    """New tokens of the first slots, counts[i] of slot i, one behind the other. positions (T,): where to;
    a token sees 0 .. position of its slot. The query heads that share a key head, and the tokens of a slot,
    are rows of one product: keys and values are read once, where they lie. longest: above every position, for
    callers that know it without asking the device."""

    def __init__(self, cache: KVCache, positions: Tensor, counts: list[int], longest: int):
        self.cache, device, most = cache, cache.device, max(counts)
        self.shape = len(counts), most, cache.heads, cache.groups, cache.size
        self.span = min(-(-longest // 64) * 64, cache.length)
        if device.type == "cpu" and cache.length < 2 * self.span:
            self.span = cache.length  # bfloat16 products copy what they don't read whole
        slots, heads = torch.arange(len(counts), device=device), torch.arange(cache.heads, device=device)
        self.padding, seen = None, positions
        if most > 1:  # slots with fewer tokens than others repeat their last one
            count, nth = torch.tensor(counts, device=device)[:, None], torch.arange(most, device=device)
            self.padding = (count.cumsum(0) - count + nth.minimum(count - 1)).flatten()
            self.real = (nth < count).flatten().nonzero().squeeze(1)
            slots, seen = slots.repeat_interleave(count.squeeze(1)), positions[self.padding]
        slots = slots[:, None] * cache.heads + heads
        self.places = (slots * (cache.length + cache.spare) + positions[:, None]).flatten()
        unseen = torch.arange(self.span, device=device) > seen[:, None]
        bias = torch.zeros(unseen.shape, dtype=cache.dtype, device=device).masked_fill_(unseen, -torch.inf)
        bias = bias.view(len(counts), 1, most, 1, self.span).expand(-1, cache.heads, -1, cache.groups, -1)
        self.bias = bias.reshape(-1, most * cache.groups, self.span)  # (B K, n H / K, L)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys.view(-1, k.shape[-1]).index_copy_(0, self.places, k.flatten(0, 1))
        values.view(-1, v.shape[-1]).index_copy_(0, self.places, v.flatten(0, 1))
        slots, most, heads, groups, size = self.shape
        keys, values = (x[:slots, :, :self.span].flatten(0, 1) for x in (keys, values))  # (B K, L, E)
        if self.padding is not None:
            q = q[self.padding]
        q = q.reshape(slots, most, heads, groups, size).transpose(1, 2).reshape(slots * heads, -1, size)
        scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=size ** -0.5)
        out = torch.bmm(scores.softmax(-1), values)                                        # (B K, n H / K, E)
        out = out.view(slots, heads, most, groups, size).transpose(1, 2).reshape(-1, heads * groups, size)
        return out if self.padding is None else out[self.real]
