"""What a run needs around its loop: device and dtype, a run directory, exact resume, schedule, ranks.

A run directory holds
    settings.json     resolved settings, command, versions, fingerprint of the data
    metrics.jsonl     one line a step          episodes.jsonl   what was sampled and what it earned (GRPO)
    checkpoints/      step-000123/: trained tensors, optimizer, step; the newest one only
    adapter/ or model/  the result: PEFT format, or a Hugging Face directory

Everything random in step n is seeded from (seed, n), so a checkpoint needs no generator state and a resumed
run repeats the bits of an unbroken one (on CPU with the same number of threads; CUDA kernels may differ in
the last bit).
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from slm import BadInput
from slm.cli import is_small
from slm.files import as_lines, lock, read_json, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- device and dtype ------------------------------------------------------------------------------------

def pick_device(device: str = "auto", dtype: str = "auto", model: str | None = None):
    """(torch.device, dtype, the reason in words). `model`: `tiny` and what was trained from it is too small
    to gain from bfloat16 on a CPU. BadInput for a device this machine lacks."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in found.items() if there)
    elif not found.get(device, False):
        here = " and ".join(name for name, there in found.items() if there)
        raise BadInput(f"--device {device}: this machine (or this build of PyTorch) has only {here}")
    if device == "cuda":
        torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", 0)))
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
        return torch.float32, f"CPU, {torch.get_num_threads()} threads; the model is small"
    rate = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - start)
        rate[dtype] = 2 * 256 * 1024 ** 2 / min(seconds) / 1e9
    best = torch.bfloat16 if rate[torch.bfloat16] > 1.3 * rate[torch.float32] else torch.float32
    return best, (f"CPU, {torch.get_num_threads()} threads; matrix products here: float32 "
                  f"{rate[torch.float32]:.0f}, bfloat16 {rate[torch.bfloat16]:.0f} GFLOP/s")


# ---- the run directory -----------------------------------------------------------------------------------

class RunDir:
    """One run's folder, claimed by its process. A new run refuses a folder that holds one; resume=True
    refuses different settings or data, cuts what was logged after the checkpoint (torn last lines too) and
    loads the newest checkpoint."""

    FREE = frozenset({"out", "resume", "save_every"})  # what may differ between a run and its continuation

    def __init__(self, path, settings: dict, data: str = "", resume: bool = False, log: bool = True):
        self.path, self.log_here = Path(path), log
        self.checkpoints = self.path / "checkpoints"
        if self.path.is_file():
            raise BadInput(f"--out {self.path}: a file stands where the folder would be")
        old = read_json(self.path / "settings.json", {})
        if resume:
            self._compare(old, settings, data)
        elif old and any(log.stat().st_size for log in self.path.glob("*.jsonl")):
            raise BadInput(f"{self.path} holds a run already: continue it with --resume, or change --out")
        if log:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path)
        if log and not resume:
            write_json(self.path / "settings.json", {
                "settings": settings, "data": data, "command": " ".join(sys.argv), "versions": versions(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S")})

    def _compare(self, old: dict, settings: dict, data: str) -> None:
        if not old:
            raise BadInput(f"--resume: {self.path} holds no run to continue (no settings.json)")
        now = json.loads(json.dumps(settings))
        for name in sorted(set(now) | set(old["settings"])):
            if name not in self.FREE and now.get(name) != old["settings"].get(name):
                raise BadInput(f"--resume: {self.path} was run with {name}={old['settings'].get(name)}, "
                               f"now it is {now.get(name)}; use the same, or another --out")
        if data != old["data"]:
            raise BadInput(f"--resume: the data changed since {self.path} was started "
                           f"(fingerprint {old['data']}, now {data})")

    def load(self, device="cpu") -> dict | None:
        """The newest checkpoint's state, or None; log lines of later steps are cut away."""
        found = sorted(p for p in self.checkpoints.glob("step-*") if not p.name.endswith(".tmp"))
        state = None
        if found:
            file = found[-1] / f"rank{rank()}.pt"
            try:
                state = torch.load(file, map_location=device, weights_only=True)
            except Exception as e:  # a damaged file fails in many ways
                raise BadInput(f"{file} is not a readable checkpoint ({e}); remove its folder") from None
        if self.log_here:
            for log in self.path.glob("*.jsonl"):
                cut_after(log, state["step"] if state else 0)
        return state

    def log(self, name: str, *rows: dict) -> None:
        """Append rows to <name>.jsonl and flush. Each row has a `step`."""
        if self.log_here:
            with open(self.path / f"{name}.jsonl", "ab") as f:
                f.write(as_lines(rows))

    def save(self, state: dict) -> None:
        """Write checkpoints/step-N, N = state["step"]: a temporary name first; drop older ones."""
        final = self.checkpoints / f"step-{state['step']:06d}"
        part = final.with_name(final.name + ".tmp")
        part.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(state, part / f"rank{rank()}.pt")
        except RuntimeError as e:  # what PyTorch makes of a full disk
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(errno.ENOSPC, "no room for a checkpoint", str(part)) from e
        barrier()
        if self.log_here:
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in self.checkpoints.glob("step-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        barrier()


def cut_after(log: Path, step: int) -> None:
    """Keep the lines of a JSON lines file up to the first that is torn or belongs to a step after `step`."""
    keep = 0
    with open(log, "rb") as f:
        for line in f:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError):
                break
            keep += len(line)
    os.truncate(log, keep)


def new_path(out: str | None, default: str, resume: bool) -> Path:
    """--out, or the first free one of runs/<default>, runs/<default>-2, ...; to resume, the last used."""
    if out:
        return Path(out)
    n, path = 1, Path("runs") / default
    while (following := path if n == 1 else path.with_name(f"{default}-{n}")).exists():
        n, last = n + 1, following
    return last if resume and n > 1 else following


def settled(out: Path, args) -> str:
    """The dtype to ask for: a resumed run keeps the one that it was started with."""
    if args.resume and args.dtype == "auto":
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((out / "settings.json").read_text())["settings"]["dtype"]
    return args.dtype


def versions() -> dict:
    """Python, PyTorch and the commit of this checkout where there is one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                timeout=5, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit}


# ---- the loop's helpers ----------------------------------------------------------------------------------

def cosine(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate of optimizer step `step` (0-based) of `total`: linear warm-up over the
    first `warmup` share of the steps, then half a cosine that would reach 0 at step `total`."""
    first = math.ceil(warmup * total)
    if step < first:
        return (step + 1) / (first + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def update(optimizer, parameters, lr: float, clip: float) -> float:
    """One optimizer step with the gradients' norm cut to `clip`; returns the norm before the cut."""
    parameters = list(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    norm = norm.full_tensor() if world() > 1 else norm
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def steps(total: int, rundir: RunDir, trained: dict, optimizer, args):
    """Yield (step, progress bar) from the last checkpoint on. After each step: a checkpoint every
    args.save_every steps, at the end and after Ctrl-C, which then leaves as KeyboardInterrupt."""
    device = next(iter(trained.values())).device
    state = rundir.load(device) if args.resume else None
    start = restore(state, trained, optimizer) if state else 0
    bar = tqdm(total=total, initial=start, unit="step", disable=rank() > 0)
    with Interrupt() as stop, bar:
        for step in range(start, total):
            torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank())  # for dropout
            yield step, bar
            bar.update()
            stopped = summed({"stop": float(stop.asked)}, device)["stop"] > 0
            if stopped or (step + 1) % args.save_every == 0 or step + 1 == total:
                rundir.save(training_state(step + 1, trained, optimizer))
            if stopped:
                raise KeyboardInterrupt


class Interrupt:
    """The first Ctrl-C or SIGTERM lets the step finish (`asked` turns true); the second stops at once."""

    def __enter__(self):
        self.asked, self.old = False, {}
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            self.old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; once more to stop now, back to the last checkpoint",
              file=sys.stderr)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def peak_memory(model) -> float:
    """Peak memory of this process so far, in GB: resident memory, or the GPU's allocations."""
    if next(model.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- several processes (torchrun) ------------------------------------------------------------------------

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


# ---- trained tensors and optimizer: out of a model and back in, exactly ----------------------------------

def training_state(step: int, parameters: dict[str, torch.nn.Parameter], optimizer) -> dict:
    """What RunDir.save needs to continue after `step` steps; of sharded tensors this rank's part."""
    moments = [{k: _local(v) for k, v in optimizer.state.get(p, {}).items()} for p in parameters.values()]
    tensors = {n: _local(p.detach()) for n, p in parameters.items()}
    return {"step": step, "parameters": tensors, "moments": moments}


def restore(state: dict, parameters: dict[str, torch.nn.Parameter], optimizer) -> int:
    """Put a training_state back; returns its step."""
    if set(state["parameters"]) != set(parameters):
        raise BadInput("the checkpoint holds other tensors than this run trains")
    with torch.no_grad():
        for (name, p), moments in zip(parameters.items(), state["moments"]):
            _local(p).copy_(state["parameters"][name])
            if moments:
                optimizer.state[p] = {k: _spread_like(p, v) for k, v in moments.items()}
    return state["step"]


def _spread_like(p, part):
    """This rank's part of a moment, as a tensor that is spread over the ranks as p is."""
    if not hasattr(p, "to_local") or not part.dim():  # the count of steps has no dimension
        return part
    return type(p.data).from_local(part, p.device_mesh, p.placements)


def _local(x):
    return x.to_local() if hasattr(x, "to_local") else x


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


# ---- before the start ------------------------------------------------------------------------------------

def marked(tokenizer, ids: list[int], mask: list[int]) -> str:
    """The text of a sequence with its trained tokens in green, or between > and < where colours don't
    show."""
    start, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else (">>", "<<")
    text, i = "", 0
    while i < len(ids):
        j = next((k for k in range(i, len(ids)) if mask[k] != mask[i]), len(ids))
        piece = tokenizer.decode(ids[i:j], skip_special=False)
        text, i = text + (f"{start}{piece}{end}" if mask[i] else piece), j
    return text


def parameters(model) -> tuple[list, list]:
    """All parameters, and those that are trained."""
    every = list(model.parameters())
    return every, [p for p in every if p.requires_grad]


def memory(model, tokens: int) -> str:
    """Predicted peak memory of a training step, in words: weights, gradients and moments, activations of
    `tokens`.

    Activations a token and layer: what the backward pass keeps, about 9 D + 2 (H + K) E + 5 times the
    feed-forward width; with `recompute` one layer's and D for each of the others. Within about 25 % where it
    was measured.
    """
    c = model.config
    size = next(model.parameters()).element_size()
    every, trained = (sum(p.numel() for p in ps) for ps in parameters(model))
    layer = 9 * c.hidden + 2 * (c.heads + c.kv_heads) * c.head_size + 5 * c.intermediate
    kept = layer + c.hidden * c.layers if model.recompute else layer * c.layers
    parts = {"weights": every * size, "gradients and moments": trained * 12,
             "activations": tokens * kept * size}
    words = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
    return f"predicted peak {sum(parts.values()) / 1e9:.1f} GB ({words})"
