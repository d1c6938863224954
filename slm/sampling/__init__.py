"""How a prompt becomes a reply, fast."""

from slm.sampling.draw import warp
from slm.sampling.sampler import Sampler

__all__ = ["Sampler", "warp"]
