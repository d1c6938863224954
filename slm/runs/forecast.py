"""What a run will take, said before it starts: memory from the model's shape; tokens, time and memory from a
part of the work, which --dry-run does."""

import contextlib
import re
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from slm import lora
from slm.answers import run_graded
from slm.runs.cli import count
from slm.runs.device import parameter_counts, peak_memory
from slm.sandbox import Sandbox


def say(model, work: str, tokens: float, seconds: float, condition: str = "") -> None:
    """Print what --dry-run found."""
    print(f"dry run: {work}, {count(round(tokens), 'token')}{condition}; by what was measured they take "
          f"{timedelta(seconds=round(seconds))} (h:mm:ss), peak memory {peak_memory(model):.2f} GB")


def scaled(busy: dict[str, float], seconds: float, times: float) -> tuple[float, float]:
    """(tokens, seconds) of `times` as much sampling as was done in `seconds`. busy: a sampler's own account.
    What is added finds the batch full, since only the end of a run does not."""
    tokens, spent = busy["full tokens"] or busy["tokens"], busy["full seconds"] or busy["seconds"]
    more = (times - 1) * busy["tokens"]
    return times * busy["tokens"], seconds + more * spent / tokens * seconds / busy["seconds"]


def rehearse(problems: list, workflows: list[Callable], backend, samples: int = 1, **how) -> None:
    """--dry-run: run workflows on as many problems as fill the batch, spread over all, and say what all would
    take. how: options of run_episodes. A server is asked nothing."""
    names = ", ".join(workflow.__name__ for workflow in workflows)
    work = f"{count(len(problems), 'problem')} x {count(samples, 'sample')} by {names}"
    if not hasattr(backend, "busy"):
        print(f"dry run: {work}; only the server could say how long they take, and it was not asked")
        return
    places = range(0, len(problems), -(-len(problems) * samples // backend.slots.max_rows))
    part, tokens, seconds = [problems[i] for i in places], 0.0, 0.0
    with contextlib.closing(Sandbox()) as sandbox:
        for workflow in workflows:
            backend.busy.clear()
            start = time.monotonic()
            run_graded(part, workflow, backend, sandbox, have=[], write=[].append, samples=samples,
                       bar=workflow.__name__, **how)
            all_of_it = scaled(backend.busy, time.monotonic() - start, len(problems) / len(part))
            tokens, seconds = tokens + all_of_it[0], seconds + all_of_it[1]
    say(backend.model, work, tokens, seconds)


def memory(model, tokens: int, cached: int = 0) -> str:
    """Predicted peak memory, in words: of a training step whose largest micro-batch has `tokens` tokens, or
    of sampling with `cached` tokens in the cache, when gradients and activations are gone."""
    parts = needs(model, tokens, cached)
    now = torch.cuda.memory_allocated() if next(model.parameters()).is_cuda else 1e9 * peak_memory(model)
    parts["process and weights"] = now + 5e7  # and the libraries that a step loads
    words = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items() if n)
    peak = sum(parts.values()) - min(parts["activations"], parts["or cache"])
    return f"predicted peak {peak / 1e9:.2f} GB ({words})"


def needs(model, tokens: int, cached: int = 0) -> dict[str, float]:
    """Bytes of all that `memory` counts; for the process, of the weights alone.

    The backward pass keeps about 7 D + 2 (H + K) E + 4 F numbers for each token and layer (F: feed-forward
    width; with `recompute` D), and twice the inputs that dropout acts on; it works on one layer more. On a
    CPU, measured peaks were within 10 %, but a sixth less under autocast, 1.7 times as much with `recompute`
    and a third more with the small D of SmolLM2 in bfloat16 (LOG.md). --dry-run measures.
    """
    c, weight, dropped = model.config, next(model.parameters()), {}
    for name in lora.names(model):
        for path, part in lora.layers(model, name).items() if lora.spec(model, name).dropout else ():
            dropped[re.sub("(q|k|v|gate|up)_proj", "", path)] = 2 * part.in_features  # these share inputs
    layer = (7 * c.hidden + 2 * (c.heads + c.kv_heads) * c.head_size + 4 * c.intermediate
             + sum(dropped.values()) // c.layers)
    kept = layer + (c.hidden if model.recompute else layer) * c.layers
    head = 2 * weight.numel() if weight.requires_grad else 0  # its gradient is made twice, then added
    parameters, trained = parameter_counts(model)
    return {"process and weights": parameters * weight.element_size(),
            "gradients and moments": trained * 12,
            "activations": (tokens * kept + head) * weight.element_size(),
            "or cache": 2 * c.layers * c.kv_heads * c.head_size * cached * weight.element_size()}
