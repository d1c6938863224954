"""Causal attention over packed sequences. Nothing pads, and but for slm/branches.py nothing has masks.

The model calls an attend object once a layer: attend(layer, q (T,H,E), k (T,K,E), v (T,K,E)) -> (T,H,E), with
queries and keys already rotated. It computes softmax(q k' / sqrt(E)) v (Vaswani et al. 2017,
arXiv:1706.03762, eq. 1) over the keys that the query's own sequence has so far.

`Packed` holds many whole sequences in a row, for training and log-probs; slm/sampling has attend objects that
read a cache. On a GPU Packed is one call of PyTorch's variable-length flash attention. Elsewhere it calls
scaled_dot_product_attention for one sequence after the other. Padding them into batches was no faster on a
CPU, and the kernel rounds differently when the length changes: one by one, a packed sequence gets the same
bits as alone.
"""

import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn, VARLEN_GQA = None, False
if torch.cuda.is_available():  # without a GPU the import of a second or two is of no use
    with contextlib.suppress(ImportError):  # an older or a trimmed PyTorch
        from torch.nn.attention.varlen import varlen_attn
        VARLEN_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in PyTorch 2.11


class Packed:
    """Attention over sequences packed one behind the other: causal inside each, nothing across.

    lengths: tokens of each sequence, in order, all of 1 or more; T is their sum.
    positions: (T,) int64, each token's place in its own sequence. bounds: (S + 1,) int32, where each sequence
    begins, and the end of the last.
    """

    def __init__(self, lengths: list[int], device="cpu"):
        self.lengths = list(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"sequence lengths must be 1 or more: {self.lengths}")
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds, self.longest = ends.to(device), max(self.lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, rope's angles have made them float32
        if varlen_attn and flash_runs(q.device, q.dtype, q.shape[-1]):
            return self.flash(q, k, v)
        q, k, v = (x.split(self.lengths) for x in (q, k, v))
        return torch.cat([causal(*sequence) for sequence in zip(q, k, v)])

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and not VARLEN_GQA:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return varlen_attn(q, k, v, self.bounds, self.bounds, self.longest, self.longest,
                           window_size=(-1, 0),  # everything to the left, nothing to the right
                           **({"enable_gqa": groups > 1} if VARLEN_GQA else {}))


def flash_runs(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether PyTorch's flash attention runs heads of this size there (Dao 2023, arXiv:2307.08691)."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and size % 8 == 0 and size <= 256 and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= (8, 0))


def causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """One sequence: q (L, H, E), k and v (L', K, E) -> (L, H, E). seen: (L, L') bool where L' is not L."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type != "cpu":  # only the CPU's fused kernel shares heads in float32
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None,
                                          enable_gqa=groups > 1)[0].transpose(0, 1)
