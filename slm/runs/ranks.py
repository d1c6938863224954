"""Several processes under torchrun: ranks, sums over all of them, and weights spread with PyTorch's FSDP2.

A process that runs alone has rank 0 of 1. The functions here then do nothing, or return what they got.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from slm import BadInput

# Processes that torchrun started. Other programs, and a shell's leftovers, set WORLD_SIZE too.
STARTED = int(os.environ.get("WORLD_SIZE") or 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1
if STARTED > 1:  # a single process need not wait 0.9 s for this import
    from torch.distributed.fsdp import fully_shard


def start_ranks(device: torch.device) -> None:
    """Join the other processes that torchrun started. BadInput where WORLD_SIZE tells of any others: to wait
    for them might have no end, and to run alone might be to run many times."""
    if STARTED == 1 and os.environ.get("WORLD_SIZE") not in (None, "", "1"):
        raise BadInput(f"WORLD_SIZE={os.environ['WORLD_SIZE']!r}, but torchrun did not start this process; "
                       "unset WORLD_SIZE to run alone, or start with torchrun")
    if STARTED > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks."""
    if world() == 1:
        return rows
    parts = [None] * world()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def summed(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks. All ranks must give the same names in the same order."""
    if world() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def shard(model) -> None:
    """Split weights, gradients and moments over the ranks with PyTorch's FSDP2. Gradients are summed, not
    averaged, because the losses divide by the global count."""
    if world() == 1:
        return
    for part in (*model.model.layers, model):
        fully_shard(part, reshard_after_forward=False)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other


def unshard(model) -> list:
    """Give every rank the full weights; returns the parts of the model that were sharded."""
    parts = [part for part in model.modules() if hasattr(part, "reshard")]
    for part in parts:
        part.unshard()
    return parts


@contextlib.contextmanager
def whole(model):
    """Inside, every rank holds the full weights, so that it can sample without the other ranks. For files,
    use unshard: weights that were handed to safetensors can't be sharded again."""
    parts = unshard(model)
    yield
    for part in parts:
        part.reshard()


def last_micro_batch(model, last: bool) -> None:
    """Let the ranks add up their gradients in a step's last micro-batch only. Before it, each rank works
    alone, so they may have different numbers of micro-batches."""
    if world() > 1:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
