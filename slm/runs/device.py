"""Which device and dtype a run uses, and the memory it took."""

import contextlib
import ctypes
import os
import resource
import sys
import timeit

import torch

from slm import BadInput
from slm.runs.cli import count, is_small
from slm.runs.ranks import STARTED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str = "auto", dtype: str = "auto", model: str | None = None):
    """(torch.device, dtype, the reason in words). `model` is a name: on a CPU, `tiny` and what was trained
    from it are too small to gain from bfloat16. BadInput for a device that this machine lacks."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in found.items() if there)
    elif not found.get(device, False):
        here = " and ".join(name for name, there in found.items() if there)
        raise BadInput(f"--device {device}: this machine (or this build of PyTorch) has only {here}")
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"]) if STARTED > 1 else 0
        torch.cuda.set_device(local)
        major, minor = torch.cuda.get_device_capability()
        best, why = (torch.bfloat16, "has bf16 units") if major >= 8 else (torch.float32, "has no bf16 units")
        where, why = torch.device("cuda", local), f"{torch.cuda.get_device_name()} (SM {major}{minor}) {why}"
    elif device == "mps":
        where, best, why = torch.device("mps"), torch.float32, "Apple GPU; bf16 is not safe on every macOS"
    else:
        where, (best, why) = torch.device("cpu"), _cpu_dtype(model)
    if dtype != "auto":
        return where, DTYPES[dtype], f"--dtype; {why}"
    return where, best, why


def _cpu_dtype(model: str | None):
    if model is not None and is_small(model):
        return torch.float32, f"CPU, {count(torch.get_num_threads(), 'thread')}; the model is small"
    full, half = _matrix_rate(torch.float32), _matrix_rate(torch.bfloat16)
    return torch.bfloat16 if half > 1.3 * full else torch.float32, (
        f"CPU, {count(torch.get_num_threads(), 'thread')}; matrix products here: float32 {full:.0f}, "
        f"bfloat16 {half:.0f} GFLOP/s")


def _matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of matrix products on this CPU."""
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = min(timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=6))
    return 2 * 256 * 1024 ** 2 / seconds / 1e9


def peak_memory(model) -> float:
    """Peak memory of this process so far, in GB: resident memory, or the GPU's allocations."""
    if next(model.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def release() -> None:
    """Return freed memory to the system. On Linux the C library keeps it, often in pieces that are too small
    for what comes next: a run that samples and learns in turns then holds both at once."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not every C library can
            ctypes.CDLL(None).malloc_trim(0)


def parameter_counts(model) -> tuple[int, int]:
    """(numbers in all of the model's parameters, numbers in those that are trained)."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return sum(p.numel() for p in model.parameters()), sum(trained)
