"""How a prompt becomes a reply: continuous batching over one KV cache.

    sampler.py   submit, step, collect: start here
    slots.py     which reply sits in which slot of the cache, and whose beginning can be copied
    cache.py     the cache, and attention that reads it
    draw.py      the distribution that tokens are drawn from (the losses use it too), and the drawing
    endings.py   where a reply ends: stop ids, stop strings, boxes

    and what only serves speed:
    fast.py      the network of model.py rearranged over the same tensors
    drafts.py    guesses of the next tokens, checked several at a time (few rows on a CPU)
    flash.py     attention over the cache on a GPU
    graphs.py    fused kernels and recorded rounds on a GPU
"""

from slm.sampling.draw import warp
from slm.sampling.endings import Endings
from slm.sampling.sampler import Sampler
from slm.sampling.slots import Row

__all__ = ["Endings", "Row", "Sampler", "warp"]
