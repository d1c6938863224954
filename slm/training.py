"""The step loop that both trainers share: batches, learning rate, update, checkpoints, resume."""

import contextlib
import math
import random
import signal
import sys

import torch
from tqdm import tqdm

from slm import BadInput
from slm.runs.ranks import local, rank, spread_like, summed, world
from slm.runs.rundir import RunDir


def batches(n: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every step: each epoch in its own order, its last batch as small as it comes."""
    steps = []
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[i:i + size] for i in range(0, n, size)]
    return steps


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


# ---- trained tensors and optimizer: out of a model and back in, exactly ----------------------------------

def training_state(step: int, parameters: dict[str, torch.nn.Parameter], optimizer) -> dict:
    """What RunDir.save needs to continue after `step` steps; of sharded tensors this rank's part."""
    moments = [{k: local(v) for k, v in optimizer.state.get(p, {}).items()} for p in parameters.values()]
    tensors = {n: local(p.detach()) for n, p in parameters.items()}
    return {"step": step, "parameters": tensors, "moments": moments}


def restore(state: dict, parameters: dict[str, torch.nn.Parameter], optimizer) -> int:
    """Put a training_state back; returns its step."""
    if set(state["parameters"]) != set(parameters):
        raise BadInput("the checkpoint holds other tensors than this run trains")
    with torch.no_grad():
        for (name, p), moments in zip(parameters.items(), state["moments"]):
            local(p).copy_(state["parameters"][name])
            if moments:
                optimizer.state[p] = {k: spread_like(p, v) for k, v in moments.items()}
    return state["step"]


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


