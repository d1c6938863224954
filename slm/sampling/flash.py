"""Prefill and Decode on a GPU: flash attention that reads the cache where it lies.

To flash attention each key head of a slot is a sequence of its own, whose queries are the H / K query heads
that share it. So the cache keeps the layout that a CPU reads best.
"""

import torch
from torch import Tensor

from slm.sampling.cache import Decode, KVCache, Prefill


def flash(cache: KVCache, layer: int, q: Tensor, bounds: Tensor, starts: Tensor, seen: Tensor, most: int):
    """q (N, H / K, E) attends over the cache of a layer -> (N, H / K, E).

    There are S sequences. Queries of sequence i are q[bounds[i]:bounds[i + 1]]; its keys begin at starts[i],
    counted in tokens of one head from the beginning of the layer. The last query sees the first seen[i] keys,
    each one before it one key less. bounds and starts (S + 1,), seen (S,), int32. most: queries of one
    sequence, at most.
    """
    keys, values = (x.view(-1, 1, cache.size) for x in cache.kv[:, layer])
    return torch.ops.aten._flash_attention_forward(
        q, keys, values, bounds, starts, most, cache.length, 0.0, True, False, seqused_k=seen)[0]


class FlashPrefill(Prefill):
    def __init__(self, cache: KVCache, segments: list[tuple[int, int, int]]):
        super().__init__(cache, segments)
        # sequences: every slot's first key head, every slot's second one, ...
        total, head = len(self.positions), torch.arange(cache.heads)[:, None]
        last = torch.tensor([cache.heads * total])
        bounds = head * total + self.lengths.cumsum(0) - self.lengths
        places = (self.slots * cache.heads + head) * (cache.length + cache.spare)
        seen = (self.starts + self.lengths).repeat(cache.heads, 1)
        self.sequences = [x.int().to(cache.device) for x in (
            torch.cat((bounds.flatten(), last)), torch.cat((places.flatten(), last)), seen.flatten())]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_head = q.unflatten(1, (self.cache.heads, -1)).transpose(0, 1)     # (K, T, H / K, E)
        out = flash(self.cache, layer, by_head.flatten(0, 1), *self.sequences, self.packed.longest)
        return out.view(by_head.shape).transpose(0, 1).flatten(1, 2)


class FlashDecode(Decode):
    """One token a slot."""

    def prepare(self, longest: int) -> None:
        cache, positions = self.cache, self.seen
        rows = torch.arange(len(self.counts) * cache.heads + 1, dtype=torch.int32, device=cache.device)
        # a row that only fills up a batch has a position outside the cache, and sees one key
        seen = torch.where(positions < cache.length, positions + 1, 1).int()
        self.sequences = (rows, rows * (cache.length + cache.spare),
                          seen[:, None].repeat(1, cache.heads).flatten(), 1)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        by_head = q.reshape(-1, self.cache.groups, self.cache.size)
        return flash(self.cache, layer, by_head, *self.sequences).view(q.shape)
