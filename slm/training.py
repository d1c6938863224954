"""What both trainers share: everything about a step except what its loss is.

A trainer settles where and on what it runs, makes a plan (which rows in which step), and loops:

    device, dtype, words = settle(args, name)
    plan = batches(len(rows), args.batch, args.epochs, args.seed)
    trained, optimizer = start(model, weight_decay)
    for step, lr, bar in steps(len(plan), rundir, trained, optimizer, args):
        for records in micro_batches(model, batch, micro_tokens):
            (loss of these records, divided by the count of the whole batch).backward()
        update(optimizer, lr, clip)

`steps` seeds the step, gives its learning rate, saves checkpoints, and goes on from the newest one with
--resume: the continued run ends on the same bits as an unbroken one. All this holds for one process and for
several under torchrun: losses are sums, so neither micro-batches nor ranks change the gradient.

Not covered: mixed precision with a loss scale.
"""

import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from tqdm import tqdm

from slm import BadInput
from slm.episode import TokenRecord, seed_of
from slm.losses import pack_for
from slm.runs import ranks
from slm.runs.cli import Interrupt, count
from slm.runs.device import pick_device, release
from slm.runs.forecast import say
from slm.runs.rundir import RunDir, new_path

SAVE_SECONDS = 300  # between two checkpoints at most, if a step is not longer


def settle(args, name: str) -> tuple[torch.device, torch.dtype, str]:
    """Decide args.out (default runs/<name>), args.dtype and args.ranks, so that settings.json tells them;
    join the other ranks and seed what is drawn before the first step -> (device, dtype, both in words)."""
    device, dtype, reason = pick_device(args.device, args.dtype, args.model)
    args.out, args.dtype = new_path(args.out, name), str(dtype).removeprefix("torch.")
    ranks.start_ranks(device)
    args.ranks = ranks.world()  # another number of processes adds up in another order
    torch.manual_seed(args.seed)  # an adapter's initial values
    return device, dtype, f"{device}, {args.dtype} ({reason})"


def batches(n: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every step. Each epoch has its own order; its last batch may be smaller than `size`."""
    steps = []
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[i:i + size] for i in range(0, n, size)]
    return steps


def hold_out(rows: list, question: Callable[..., str], count: int, seed: int) -> tuple[list, list]:
    """(rows to train on, those about `count` questions, a tenth of all at most, drawn from the seed).
    Questions that differ in case or space only are one."""
    keys = [" ".join(question(row).lower().split()) for row in rows]
    drawn = sorted(set(keys), key=partial(seed_of, seed, "held out"))
    held = set(drawn[:min(count, len(drawn) // 10)])
    return ([row for key, row in zip(keys, rows) if key not in held],
            [row for key, row in zip(keys, rows) if key in held])


def look_due(step: int, total: int) -> bool:
    """Whether what is held out is looked at after this step: ten times on the way, and at the end."""
    return (step + 1) % max(1, total // 10) == 0 or step + 1 == total


def start(model, weight_decay: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Spread the model over the ranks -> (its trained parameters by name, AdamW for them)."""
    ranks.shard(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained, torch.optim.AdamW(trained.values(), weight_decay=weight_decay)


def steps(total: int, rundir: RunDir, trained: dict, optimizer, args, extra: dict | None = None,
          look: Callable[[], dict] | None = None) -> Iterator[tuple[int, float, tqdm]]:
    """Yield (step, its learning rate, progress bar) from the newest checkpoint on. A checkpoint is saved
    every args.save_every steps, every SAVE_SECONDS, at the end, and after Ctrl-C, which then leaves as
    KeyboardInterrupt. extra: what else a step hands to the next, numbers and tensors by name. The caller
    changes it in place; each checkpoint holds it, and it is put back before the first step. look: gives what
    is logged as step 0."""
    extra = {} if extra is None else extra
    device = next(iter(trained.values())).device
    state = rundir.load(device) if args.resume else None
    first, saved = restore(state, trained, optimizer, extra) if state else 0, time.monotonic()
    bar = tqdm(total=total, initial=first, unit="step", disable=ranks.rank() > 0)
    ends = [time.monotonic()]  # the start, and when each step ended
    with Interrupt(lambda: print(stopping(ends), file=sys.stderr)) as stop, bar:
        for step in range(first, total):
            torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + ranks.rank())  # for dropout
            if look and step == 0:
                rundir.log("metrics", {"step": 0, **look()})
            yield step, args.lr * cosine(step, total, args.warmup), bar
            bar.update()
            ends.append(time.monotonic())
            late = time.monotonic() - saved > SAVE_SECONDS
            stopped, late = ranks.summed({"stop": stop.asked, "late": late}).values()  # on any rank
            if stopped or late or (step + 1) % args.save_every == 0 or step + 1 == total:
                rundir.save(training_state(step + 1, trained, optimizer, extra))
                saved = time.monotonic()
            if stopped:
                raise KeyboardInterrupt


def stopping(ends: list[float]) -> str:
    """What Ctrl-C says in the middle of a step, which may be long."""
    left = f"the first one, {time.monotonic() - ends[-1]:.0f} s so far"
    if len(ends) > 1:
        more = max(0, 2 * ends[-1] - ends[-2] - time.monotonic())
        left = f"about {more:.0f} s more if it takes as long as the one before"
    return (f"\nfinishing this step ({left}), then saving; Ctrl-C again stops at once, and --resume then "
            "goes on from the last checkpoint")


def cosine(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate of optimizer step `step` (0-based) of `total`: linear warm-up over the
    first `warmup` share of the steps, then half a cosine that would reach 0 at step `total`."""
    first = math.ceil(warmup * total)
    if step < first:
        return (step + 1) / (first + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def micro_batches(model, records: list[TokenRecord], tokens: int) -> Iterator[list[TokenRecord]]:
    """Yield this rank's records in micro-batches of at most `tokens` tokens (or of one record).

    The ranks add up their gradients in the backward pass of the last micro-batch, and each of them must take
    part. So a rank that has no record gets a stand-in: two tokens, none of them trained, gradient 0."""
    records = records or [TokenRecord(ids=[0, 0], mask=[0, 0])]
    parts = pack_for(model, [record.ids for record in records], [record.mask for record in records], tokens)
    for n, part in enumerate(parts, 1):
        ranks.last_micro_batch(model, n == len(parts))
        yield [records[i] for i in part]


def update(optimizer, lr: float, clip: float) -> float:
    """One optimizer step with the gradients' norm cut to `clip`; returns the norm before the cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # several ranks: each holds a part
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    release()
    return norm.item()


def training_state(step: int, trained: dict[str, torch.nn.Parameter], optimizer, extra: dict) -> dict:
    """What RunDir.save needs to continue after `step` steps. It holds this rank's part of sharded tensors."""
    tensors = {name: _local(p.detach()) for name, p in trained.items()}
    moments = []
    for p in trained.values():
        moments.append({name: _local(value) for name, value in optimizer.state.get(p, {}).items()})
    return {"step": step, "parameters": tensors, "moments": moments, "extra": extra}


def restore(state: dict, trained: dict[str, torch.nn.Parameter], optimizer, extra: dict) -> int:
    """Put a training_state back; returns its step. BadInput when it holds other tensors."""
    if set(state["parameters"]) != set(trained):
        raise BadInput("the checkpoint holds other tensors than this run trains")
    with torch.no_grad():
        for (name, p), moments in zip(trained.items(), state["moments"]):
            _local(p).copy_(state["parameters"][name])
            if moments:
                optimizer.state[p] = {name: _sharded_like(p, value) for name, value in moments.items()}
    extra.update(state["extra"])
    return state["step"]


def _local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _sharded_like(p: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """This rank's part of a moment, as a tensor that is sharded like parameter p."""
    if not hasattr(p, "to_local") or not part.dim():  # the count of steps has no dimension
        return part
    return type(p.data).from_local(part, p.device_mesh, p.placements)


# ---- what a person reads ---------------------------------------------------------------------------------

def forecast(model, steps: int, tokens: int, seconds: float, look: float, condition: str = "") -> None:
    """Say what --dry-run found. seconds: of all steps, without looks; look: of one look at held-out rows."""
    seconds += look * (1 + sum(look_due(step, steps) for step in range(steps)))
    if ranks.rank() == 0:
        say(model, count(steps, "step"), tokens, seconds, condition)


def marked(tokenizer, ids: list[int], mask: list[int]) -> str:
    """The text of a sequence with its trained tokens in green; where the output shows no colours, between
    >> and <<."""
    start, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else (">>", "<<")
    text = ""
    for trained, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], skip_special=False)
        text += f"{start}{piece}{end}" if trained else piece
    return text
