"""LoRA: y = W x + s B A x with W frozen, A (r, in) and B (out, r) trained, s = alpha / r.

Hu et al. 2021, arXiv:2106.09685, eq. 3. A starts like the weight of nn.Linear and B at zero, so a new adapter
changes nothing. With rslora s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732). A and B are kept in
float32 and used in the model's dtype. sampling/fast.py computes the same; formats/lora_files.py has files.

Several adapters can live on one base model, each under a name. One is active: `add` activates its own. `use`
and `off` change that inside a with block. Only `merge` and `unmerge` change base weights. So with its adapter
off a model is its base model, bit for bit, and policy and reference are one model.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm import BadInput
from slm.attention import Packed
from slm.model import Qwen2
from slm.runs.cli import TARGETS

ALL = TARGETS["all"]
Active = str | dict[str, Tensor] | None  # an adapter for all tokens, {name: indices of its tokens}, or none


@dataclass
class Spec:
    """What an adapter is. targets: names of linear layers, or one regular expression for their full names.
    modules: the full names of the layers that it changes."""
    r: int
    alpha: float
    targets: list[str] | str
    dropout: float = 0.0
    rslora: bool = False
    modules: list[str] = field(default_factory=list)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass
class Adapters:
    """What all layers of a model share: its adapters by name, those merged (in order), and what is active."""
    specs: dict[str, Spec] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    active: Active = None
    dropped: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # last x, dropout(x)


class LoRALinear(nn.Linear):
    """A linear layer with adapters. It takes over the parameters of the layer it replaces, names included."""

    def __init__(self, base: nn.Linear, adapters: Adapters):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.adapters = base.weight, base.bias, adapters
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.before_merge: dict[str, Tensor] = {}  # the weight before each merge

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> W x + s B A x (T, out)"""
        y, active = F.linear(x, self.weight, self.bias), self.adapters.active
        if isinstance(active, str):
            return self.plus(y, x, active)
        for name, tokens in (active or {}).items():
            y = y.index_copy(0, tokens, self.plus(y[tokens], x, name, tokens))
        return y

    def plus(self, y: Tensor, x: Tensor, name: str, tokens=slice(None)) -> Tensor:
        """y + s B A x[tokens], written into y: nothing else needs W x. Dropout is drawn once for all layers
        that read the same x (q, k, v; gate, up)."""
        if name not in self.lora_A:
            return y
        spec, A, B = self.adapters.specs[name], self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        if self.training and spec.dropout:
            if self.adapters.dropped.get(name, (None,))[0] is not x:
                self.adapters.dropped[name] = x, F.dropout(x, spec.dropout)
            x = self.adapters.dropped[name][1]
        return y.addmm_(F.linear(x[tokens], A), B.t(), alpha=spec.scale)


def add(model: Qwen2, r: int = 16, alpha: float = 32, targets: list[str] | str = ALL, dropout: float = 0.0,
        name: str = "default", rslora: bool = False) -> None:
    """Put a new adapter on the linear layers that `targets` names, freeze the base, make the adapter active.
    BadInput: a rank below 1, a target that the model lacks, the head if it is tied to the embedding."""
    adapters = _adapters(model)
    if name in adapters.specs or not name or "." in name:
        raise BadInput(f"adapter name {name!r}: expected a new one without dots; there are {names(model)}")
    if r < 1 or not 0 <= dropout < 1:
        raise BadInput(f"LoRA rank {r}, dropout {dropout}: expected a rank of 1 or more, a dropout in [0, 1)")
    targets = targets if isinstance(targets, str) else list(targets)
    spec = Spec(r, alpha, targets, dropout, rslora, matching(model, targets))
    for path, p in model.named_parameters():
        p.requires_grad_(".lora_" in path)
    for path in spec.modules:
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, adapters).train(layer.training)
            model.set_submodule(path, layer)
        layer.lora_A[name] = nn.Parameter(layer.weight.new_empty(r, layer.in_features, dtype=torch.float32))
        layer.lora_B[name] = nn.Parameter(layer.weight.new_zeros(layer.out_features, r, dtype=torch.float32))
        nn.init.kaiming_uniform_(layer.lora_A[name], a=math.sqrt(5))
    adapters.specs[name], adapters.active = spec, name


def matching(model: Qwen2, targets: list[str] | str) -> list[str]:
    """Full names of the linear layers that PEFT's target_modules means: full names, their ends, a pattern."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = set()
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = targets if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        if target.endswith("lm_head") and model.config.tied:
            raise BadInput("LoRA target 'lm_head': this model's head is tied to its embedding; leave it out")
        hits = [path for path in linear if re.fullmatch(pattern, path)]
        if not hits:
            there = sorted({path.rpartition(".")[2] for path in linear})
            raise BadInput(f"LoRA target {target!r}: no such linear layer in the model; there are {there}")
        wanted.update(hits)
    return [path for path in linear if path in wanted]


def names(model: Qwen2) -> list[str]:
    """The adapters on this model that can be used: those not merged into it."""
    adapters = _adapters(model)
    return [name for name in adapters.specs if name not in adapters.merged]


def active(model: Qwen2) -> Active:
    return _adapters(model).active


def spec(model: Qwen2, name: str = "default") -> Spec:
    """What an adapter is. BadInput if the model has none of this name."""
    if name not in _adapters(model).specs:
        raise BadInput(f"adapter {name!r}: not on this model; there are {list(_adapters(model).specs)}")
    return _adapters(model).specs[name]


def layers(model: Qwen2, name: str = "default") -> dict[str, LoRALinear]:
    """Full name -> layer that this adapter changes."""
    return {path: model.get_submodule(path) for path in spec(model, name).modules}


def parameters(model: Qwen2, name: str = "default") -> list[nn.Parameter]:
    """The trainable tensors of one adapter."""
    return [p for layer in layers(model, name).values() for p in (layer.lora_A[name], layer.lora_B[name])]


@contextlib.contextmanager
def use(model: Qwen2, wanted: str | list[tuple[str | None, int]] | None) -> Iterator[None]:
    """Apply another adapter inside the block: a name, None, or rows [(name or None, tokens), ...], one after
    the other over the packed tokens, so that every sequence of a batch has its own."""
    rows = wanted if isinstance(wanted, list) else [(wanted, 0)]
    used, now = {name for name, _ in rows}, rows[0][0]
    for name in used - {None, *names(model)}:
        raise BadInput(f"adapter {name!r}: not on this model or merged into it; there are {names(model)}")
    if len(used) > 1:
        counts, now = torch.tensor([count for _, count in rows]), {}
        for name in used - {None}:
            own = torch.tensor([other == name for other, _ in rows]).repeat_interleave(counts)
            now[name] = own.nonzero().squeeze(1).to(model.model.embed_tokens.weight.device)
    with _activated(model, now):
        yield


def off(model: Qwen2):
    """The base model inside the block: `with lora.off(model): reference = ...`"""
    return use(model, None)


def recompute(model: Qwen2) -> Callable:
    """For Qwen2.recompute: a layer that is computed again uses the adapter that its forward pass used."""
    return lambda: (contextlib.nullcontext(), _activated(model, active(model)))


@torch.no_grad()
def merge(model: Qwen2, name: str = "default") -> float:
    """Fold an adapter into the weights: W + s B A in float32, then rounded to the weights' dtype. Returns
    the largest difference of any logit on 64 probe tokens, merged against not. `unmerge` undoes it,
    `remove` makes it final and frees the copy of the weights that is kept until then."""
    with use(model, name):
        apart = _probe(model)
    adapters, scale = _adapters(model), spec(model, name).scale
    for layer in layers(model, name).values():
        layer.before_merge[name] = layer.weight.detach().clone()
        update = layer.lora_B[name].float() @ layer.lora_A[name].float() * scale
        layer.weight.copy_(layer.weight.float() + update)
    adapters.merged.append(name)
    adapters.active = None if adapters.active == name else adapters.active
    return float((_probe(model) - apart).abs().max())


@torch.no_grad()
def unmerge(model: Qwen2, name: str = "default") -> None:
    """Undo the last merge, to the bit, and make the adapter active again."""
    adapters = _adapters(model)
    if adapters.merged[-1:] != [name]:
        raise ValueError(f"adapter {name!r} is not the last one merged: {adapters.merged}")
    for layer in layers(model, name).values():
        layer.weight.copy_(layer.before_merge.pop(name))
    adapters.active = adapters.merged.pop()


def remove(model: Qwen2, name: str = "default") -> None:
    """Take an adapter off. What was merged stays in the weights, for good."""
    adapters = _adapters(model)
    for layer in layers(model, name).values():
        layer.before_merge.pop(name, None)
        del layer.lora_A[name], layer.lora_B[name]
    del adapters.specs[name]
    adapters.merged = [other for other in adapters.merged if other != name]
    adapters.active = None if adapters.active == name else adapters.active


def _adapters(model: Qwen2) -> Adapters:
    """What the model's LoRALinears share; something new and empty as long as it has none."""
    return next((m.adapters for m in model.modules() if isinstance(m, LoRALinear)), Adapters())


@contextlib.contextmanager
def _activated(model: Qwen2, now: Active) -> Iterator[None]:
    before, _adapters(model).active = active(model), now
    try:
        yield
    finally:
        _adapters(model).active = before


def _probe(model: Qwen2) -> Tensor:
    attend, training = Packed([64], model.model.embed_tokens.weight.device), model.training
    ids = attend.positions * 977 % model.config.vocab
    logits = model.eval().logits(model(ids, attend.positions, attend)).float()
    model.train(training)
    return logits
