"""The ways tokens attend, and the only place that knows padding, masks and back ends.

An attend object is called once a layer, `attend(layer, q (T,H,E), k (T,K,E), v (T,K,E)) -> (T,H,E)`, with
queries and keys already rotated. It computes softmax(q k' / sqrt(E)) v (Vaswani et al. 2017,
arXiv:1706.03762, eq. 1) over the keys that the query's sequence has so far. Shapes: T tokens, H query heads,
K key/value heads, E head size, as in model.py; B slots, L keys of each, n queries of each.

* Packed: many whole sequences in a row, each token sees its own up to itself. Training and log-probs.
* Prefill, Decode: the same with a KV cache, for the sampler.

Where `flash_attends` (gpu.py) says so they run PyTorch's variable-length flash attention, Decode with one
token a slot. Elsewhere Packed calls scaled_dot_product_attention for one sequence after the other. Padding
them into batches was no faster on a CPU, and a kernel that sees another length rounds differently: this way
a packed sequence gets the same bits as alone.
"""

import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.gpu import flash_attends, fused
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
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        self.longest = max(self.lengths)
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = ends.to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, rope's angles have made them float32
        if varlen_attn and flash_attends(q.device, q.dtype, q.shape[-1]):
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


# ---- with a KV cache (sampler.py) --------------------------------------------------------------------------

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, kv (2, layers, slots, K, length, E).

    What nothing was written to is zero, never NaN: it is multiplied by attention weights of 0. spare: columns
    behind `length`, where rows write that only fill up a recorded batch or are past their limit.
    """

    def __init__(self, config: Config, device="cpu", dtype=torch.float32):
        self.layers, self.heads, self.size = config.layers, config.kv_heads, config.head_size
        self.groups = config.heads // config.kv_heads
        self.device, self.dtype = torch.device(device), dtype
        self.spare = int(self.device.type == "cuda")
        self.flash = flash_attends(self.device, dtype, self.size)
        self.token_bytes = 2 * config.layers * config.kv_heads * config.head_size * dtype.itemsize
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self.slots = self.length = 0
        self.kv = self._zeros()

    def _zeros(self) -> Tensor:
        shape = 2, self.layers, self.slots, self.heads, self.length + self.spare, self.size
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def resize(self, slots: int, length: int) -> None:
        """Change the capacity; what fits into the new one is kept."""
        s, n, old = min(self.slots, slots), min(self.length, length), self.kv
        self.slots, self.length = slots, length
        self.kv = self._zeros()
        self.kv[:, :, :s, :, :n] = old[:, :, :s, :, :n]

    def copy(self, source: int, targets: list[int], n: int) -> None:
        """Copy the first n tokens of a slot to other slots."""
        for target in targets:
            self.kv[:, :, target, :, :n] = self.kv[:, :, source, :, :n]

    def move(self, sources: list[int], targets: list[int], n: int) -> None:
        """Put the first n tokens of each source slot into its target, all at once."""
        sources, targets = (torch.tensor(x, device=self.device) for x in (sources, targets))
        part = self.kv[:, :, :, :, :n]
        part.index_copy_(2, targets, part.index_select(2, sources))

    def attend(self, layer: int, q: Tensor, bounds: Tensor, starts: Tensor, seen: Tensor, most: int):
        """Flash attention of q (N, H / K, E) over the cache of a layer. Each key head of a slot is a sequence
        of its own: its queries begin at bounds (S + 1,), its keys at starts (S + 1,), counted in tokens of
        one head from the beginning of the layer; the last query sees the first `seen` (S,) of them, each one
        before it one less. All int32. most: queries of a sequence, at most."""
        keys, values = (x.view(-1, 1, self.size) for x in self.kv[:, layer])
        return torch.ops.aten._flash_attention_forward(
            q, keys, values, bounds, starts, most, self.length, 0.0, True, False, seqused_k=seen)[0]


class Prefill:
    """New tokens of some slots, packed. segments: (slot, tokens already in the cache, new tokens) of each.
    A token sees what its slot holds and, of the new ones, those up to itself."""

    def __init__(self, cache: KVCache, segments: list[tuple[int, int, int]]):
        self.cache, self.segments, device = cache, segments, cache.device
        slots, starts, lengths = torch.tensor(segments).unbind(1)
        self.packed = packed = Packed(lengths.tolist(), device)
        repeat = lambda x: x.repeat_interleave(lengths).to(device)
        self.positions, self.rows = packed.positions + repeat(starts), repeat(slots)
        if cache.flash:  # sequences: every slot's first key head, every slot's second one, ...
            total, head = len(self.positions), torch.arange(cache.heads)[:, None]
            bounds, last = head * total + lengths.cumsum(0) - lengths, torch.tensor([cache.heads * total])
            places = (slots * cache.heads + head) * (cache.length + cache.spare)
            seen = (starts + lengths).repeat(cache.heads, 1)
            self.flash = [x.int().to(device) for x in (torch.cat((bounds.flatten(), last)),
                                                       torch.cat((places.flatten(), last)), seen.flatten())]
        elif starts.any():
            self.packed = None
            self.seen = [torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)
                         for _, start, n in segments]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.kv[:, layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        if self.cache.flash:
            by_head = q.unflatten(1, (self.cache.heads, -1)).transpose(0, 1)     # (K, T, H / K, E)
            out = self.cache.attend(layer, by_head.flatten(0, 1), *self.flash, self.packed.longest)
            return out.view(by_head.shape).transpose(0, 1).flatten(1, 2)
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


@fused
def write(k: Tensor, v: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
    """k, v (T, K, E) to rows `places` (T, K) of keys and values (slots K length, E)."""
    keys.index_copy_(0, places.flatten(), k.flatten(0, 1))
    values.index_copy_(0, places.flatten(), v.flatten(0, 1))


class Decode:
    """New tokens of the first slots, counts[i] of slot i, one behind the other. positions (T,): where to;
    a token sees 0 .. position of its slot. longest: above every position, for callers that know it without
    asking the device.

    Without flash attention, the query heads that share a key head, and the tokens of a slot, are rows of one
    product: keys and values are read once, where they lie."""

    def __init__(self, cache: KVCache, positions: Tensor, counts: list[int], longest: int):
        self.cache, device, most, length = cache, cache.device, max(counts), cache.length + cache.spare
        self.shape = len(counts), most, cache.heads, cache.groups, cache.size
        slots, heads = torch.arange(len(counts), device=device), torch.arange(cache.heads, device=device)
        self.padding, seen = None, positions
        if most > 1:  # slots with fewer tokens than others repeat their last one
            count, nth = torch.tensor(counts, device=device)[:, None], torch.arange(most, device=device)
            self.padding = (count.cumsum(0) - count + nth.minimum(count - 1)).flatten()
            self.real = (nth < count).flatten().nonzero().squeeze(1)
            slots, seen = slots.repeat_interleave(count.squeeze(1)), positions[self.padding]
        self.places = (slots[:, None] * cache.heads + heads) * length + positions[:, None]
        self.flash = None
        if cache.flash and most == 1:  # a row that only fills up a batch lies outside, and sees one key
            rows = torch.arange(len(counts) * cache.heads + 1, dtype=torch.int32, device=device)
            seen = torch.where(positions < cache.length, positions + 1, 1).int()
            self.flash = rows, rows * length, seen[:, None].repeat(1, cache.heads).flatten(), 1
            return
        self.span = min(-(-longest // 64) * 64, cache.length)
        if device.type == "cpu" and cache.length < 2 * self.span:
            self.span = cache.length  # bfloat16 products copy what they don't read whole
        unseen = torch.arange(self.span, device=device) > seen[:, None]
        bias = torch.zeros(unseen.shape, dtype=cache.dtype, device=device).masked_fill_(unseen, -torch.inf)
        bias = bias.view(len(counts), 1, most, 1, self.span).expand(-1, cache.heads, -1, cache.groups, -1)
        self.bias = bias.reshape(-1, most * cache.groups, self.span)  # (B K, n H / K, L)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.kv[:, layer]
        slots, most, heads, groups, size = self.shape
        write(k, v, self.places, keys.view(-1, size), values.view(-1, size))
        if self.flash:
            return self.cache.attend(layer, q.reshape(-1, groups, size), *self.flash).view(q.shape)
        keys, values = (x[:slots, :, :self.span].flatten(0, 1) for x in (keys, values))  # (B K, L, E)
        if self.padding is not None:
            q = q[self.padding]
        q = q.reshape(slots, most, heads, groups, size).transpose(1, 2).reshape(slots * heads, -1, size)
        scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=size ** -0.5)
        out = torch.bmm(scores.softmax(-1), values)                                        # (B K, n H / K, E)
        out = out.view(slots, heads, most, groups, size).transpose(1, 2).reshape(-1, heads * groups, size)
        return out if self.padding is None else out[self.real]
