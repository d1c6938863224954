"""Several processes under torchrun: who is who, sums over all of them, weights spread with PyTorch's FSDP2.

Alone, every function here does nothing or returns what it was given.
"""

import contextlib
import os

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def start_ranks(device: torch.device) -> None:
    """Join the other processes when started by torchrun; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def gather(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks."""
    if world() == 1:
        return rows
    parts = [None] * world()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def summed(values: dict[str, float], device) -> dict[str, float]:
    """Each value summed over the ranks."""
    if world() == 1:
        return values
    t = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return dict(zip(values, t.tolist()))


def spread_like(p, part):
    """This rank's part of a moment, as a tensor that is spread over the ranks as p is."""
    if not hasattr(p, "tolocal") or not part.dim():  # the count of steps has no dimension
        return part
    return type(p.data).fromlocal(part, p.device_mesh, p.placements)


def local(x):
    return x.tolocal() if hasattr(x, "tolocal") else x


def shard(model) -> None:
    """Split weights, gradients and moments over the ranks with PyTorch's FSDP2; alone, do nothing. Gradients
    are summed, not averaged: the losses divide by the global count."""
    if world() == 1:
        return
    from torch.distributed.fsdp import fully_shard  # 0.8 s that a single process need not wait
    for part in (*model.model.layers, model):
        fully_shard(part, reshard_after_forward=False)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other


def unshard(model) -> None:
    """Give every rank the full weights."""
    for part in _sharded(model):
        part.unshard()


@contextlib.contextmanager
def whole(model):
    """Inside, every rank holds the full weights, so that sampling needs no collective a token."""
    unshard(model)
    yield
    for part in _sharded(model):
        part.reshard()


def _sharded(model) -> list:
    return [part for part in model.modules() if hasattr(part, "reshard")]


def last_micro_batch(model, last: bool) -> None:
    """Ranks meet only in a step's last micro-batch, so they may have different numbers of them."""
    if world() > 1:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


