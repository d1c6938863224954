"""The KV cache, and the attend objects that read it: Prefill for prompts, Decode for single tokens.

They are called like attention.Packed, attend(layer, q (T,H,E), k (T,K,E), v (T,K,E)) -> (T,H,E), and store
the new keys and values first. flash.py has the same two for GPUs.

Shapes: T tokens, H query heads, K key/value heads, E head size; B slots, L keys and n queries of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.attention import Packed
from slm.model import Config
from slm.sampling.graphs import fused


class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, kv (2, layers, slots, K, length, E).

    Columns that nothing was written to are zero, never NaN: attention weights of 0 multiply them. spare:
    columns behind `length`. Rows that only fill up a recorded batch, or are past their limit, write there.
    """

    def __init__(self, config: Config, device="cpu", dtype=torch.float32):
        self.layers, self.heads, self.size = config.layers, config.kv_heads, config.head_size
        self.groups = config.heads // config.kv_heads
        self.device, self.dtype = torch.device(device), dtype
        self.spare = int(self.device.type == "cuda")
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


class Prefill:
    """New tokens of some slots, packed. segments: (slot, tokens already in the cache, new tokens) of each.
    A token sees what its slot holds and, of the new ones, those up to itself."""

    def __init__(self, cache: KVCache, segments: list[tuple[int, int, int]]):
        self.cache, self.segments, device = cache, segments, cache.device
        self.slots, self.starts, self.lengths = torch.tensor(segments).unbind(1)
        self.packed = Packed(self.lengths.tolist(), device)
        self.positions = self.packed.positions + self.starts.repeat_interleave(self.lengths).to(device)
        self.rows = self.slots.repeat_interleave(self.lengths).to(device)
        self.seen = None
        if self.starts.any():
            self.seen = [torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)
                         for _, start, n in segments]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.kv[:, layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        return self.attend(layer, q, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.seen is None:  # all slots were empty: the new tokens are all there is to see
            return self.packed(layer, q, k, v)
        out, (keys, values) = [], self.cache.kv[:, layer]
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
    """New tokens of the first slots, counts[i] of slot i, one behind the other. positions (T,): where they
    go; a token sees 0 .. position of its slot. longest: above every position, so that nobody asks the device.

    The query heads that share a key head, and the tokens of a slot, are rows of one product: keys and values
    are read once, where they lie."""

    def __init__(self, cache: KVCache, positions: Tensor, counts: list[int], longest: int):
        self.cache, self.counts, self.most = cache, counts, max(counts)
        self.padding, self.seen = None, positions
        slots = torch.arange(len(counts), device=cache.device)
        if self.most > 1:  # slots with fewer tokens than others repeat their last one
            count = torch.tensor(counts, device=cache.device)[:, None]
            nth = torch.arange(self.most, device=cache.device)
            self.padding = (count.cumsum(0) - count + nth.minimum(count - 1)).flatten()
            self.real = (nth < count).flatten().nonzero().squeeze(1)
            slots, self.seen = slots.repeat_interleave(count.squeeze(1)), positions[self.padding]
        heads, length = torch.arange(cache.heads, device=cache.device), cache.length + cache.spare
        self.places = (slots[:, None] * cache.heads + heads) * length + positions[:, None]
        self.prepare(longest)

    def prepare(self, longest: int) -> None:
        """The mask, as a bias (B K, n H / K, L) on the scores. It also depends only on the positions, so all
        layers share it."""
        cache, most, slots = self.cache, self.most, len(self.counts)
        self.span = min(-(-longest // 64) * 64, cache.length)
        if cache.device.type == "cpu" and cache.length < 2 * self.span:
            self.span = cache.length  # bfloat16 products on a CPU would copy a part of the columns
        unseen = torch.arange(self.span, device=cache.device) > self.seen[:, None]
        bias = torch.zeros(unseen.shape, dtype=cache.dtype, device=cache.device)
        bias = bias.masked_fill_(unseen, -torch.inf).view(slots, 1, most, 1, self.span)
        bias = bias.expand(-1, cache.heads, -1, cache.groups, -1)
        self.bias = bias.reshape(-1, most * cache.groups, self.span)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.kv[:, layer]
        write(k, v, self.places, keys.view(-1, self.cache.size), values.view(-1, self.cache.size))
        return self.attend(layer, q)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        keys, values = self.cache.kv[:, layer]
        slots, most, heads = len(self.counts), self.most, self.cache.heads
        groups, size = self.cache.groups, self.cache.size
        keys, values = (x[:slots, :, :self.span].flatten(0, 1) for x in (keys, values))  # (B K, L, E)
        if self.padding is not None:
            q = q[self.padding]
        q = q.reshape(slots, most, heads, groups, size).transpose(1, 2).reshape(slots * heads, -1, size)
        scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=size ** -0.5)
        out = torch.bmm(scores.softmax(-1), values)                                        # (B K, n H / K, E)
        out = out.view(slots, heads, most, groups, size).transpose(1, 2).reshape(-1, heads * groups, size)
        return out if self.padding is None else out[self.real]
