"""LoRA: y = W x + s B A x with W frozen, A (r, in), B (out, r) trained, s = alpha / r.

Hu et al. 2021, arXiv:2106.09685, eq. 3; A is drawn as in a linear layer, B starts at zero, so a new adapter changes
nothing. With rslora s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732). A and B are kept in float32 and computed
with in the model's dtype.

Several adapters live on one base model, each under a name. One is active (`add` and `load` activate theirs); `off` and
`use` change that for a while, and `use` can give every sequence of a batch its own. The base weights are never touched
except by `merge`, so with the adapter off the model is the base model, bit for bit: policy and reference are one model.
The files are PEFT's.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm import BadInput
from slm.attention import Packed
from slm.model import Qwen2
from slm.tokenizer import read_json

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Spec:
    """What an adapter is, as PEFT's adapter_config.json says it."""
    r: int
    alpha: float
    targets: list[str] | str  # names of linear layers, or one regular expression for their full names
    dropout: float = 0.0
    rslora: bool = False
    modules: list[str] = field(default_factory=list)  # full names of the layers it changes

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class State:
    """What all layers of one model share: the adapters, and which of them are applied now.
    active: None, a name, or rows [(name or None, number of tokens)] that cover the tokens in order."""

    def __init__(self):
        self.specs: dict[str, Spec] = {}
        self.active: str | None | list[tuple[str | None, int]] = None
        self.merged: list[str] = []


class LoRALinear(nn.Linear):
    """A linear layer with adapters. It takes over the weight and bias of the layer that it replaces, names included."""

    def __init__(self, base: nn.Linear, state: State):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.state = base.weight, base.bias, state
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.backups: dict[str, Tensor] = {}  # the weight before each merge, to the bit

    def forward(self, x: Tensor) -> Tensor:
        y, active = F.linear(x, self.weight, self.bias), self.state.active
        if active is None:
            return y
        if isinstance(active, str):
            return y + self.delta(active, x) if active in self.lora_A else y
        if all(name not in self.lora_A for name, _ in active):
            return y
        counts = [count for _, count in active]
        parts = [part + self.delta(name, rows) if name in self.lora_A else part
                 for (name, _), rows, part in zip(active, x.split(counts), y.split(counts))]
        return torch.cat(parts)

    def delta(self, name: str, x: Tensor) -> Tensor:
        """s B A x, (T, in) -> (T, out)."""
        spec, A, B = self.state.specs[name], self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        x = F.dropout(x, spec.dropout, self.training) if spec.dropout else x
        return F.linear(F.linear(x, A), B) * spec.scale


# ---- adapters on a model -----------------------------------------------------------------------------------

def add(model: Qwen2, r: int = 16, alpha: float = 32, targets: list[str] | str = ALL, dropout: float = 0.0,
        name: str = "default", rslora: bool = False) -> None:
    """Put a new adapter on the linear layers named in `targets`, freeze everything else, and make it the active one.
    BadInput: a rank below 1, a target the model does not have, or the head where it is tied to the embedding."""
    state = _state(model)
    if name in state.specs or not name or "." in name:
        raise BadInput(f"adapter name {name!r}: expected a new name without dots; there are {list(state.specs)}")
    if r < 1 or not 0 <= dropout < 1:
        raise BadInput(f"LoRA rank {r} and dropout {dropout}: expected a rank of 1 or more and a dropout from 0 to 1")
    spec = Spec(r, alpha, targets if isinstance(targets, str) else list(targets), dropout, rslora)
    spec.modules = _matches(model, spec.targets)
    for p in model.parameters():
        p.requires_grad_(False)
    for path in spec.modules:
        layer = _wrap(model, path, state)
        device = layer.weight.device
        layer.lora_A[name] = nn.Parameter(torch.empty(r, layer.in_features, device=device))
        layer.lora_B[name] = nn.Parameter(torch.zeros(layer.out_features, r, device=device))
        nn.init.kaiming_uniform_(layer.lora_A[name], a=math.sqrt(5))
    state.specs[name], state.active = spec, name


def parameters(model: Qwen2, name: str = "default") -> list[nn.Parameter]:
    """The trainable tensors of one adapter."""
    return [p for layer in _layers(model, name) for p in (layer.lora_A[name], layer.lora_B[name])]


def names(model: Qwen2) -> list[str]:
    """The adapters on this model, merged ones included."""
    return list(_state(model).specs)


@contextmanager
def use(model: Qwen2, active: str | None | list[tuple[str | None, int]]):
    """Apply another adapter inside the block: a name, None, or rows [(name or None, tokens)], one after the other
    over the packed tokens, so that every sequence of a batch can have its own."""
    state = _state(model)
    rows = active if isinstance(active, list) else [(active, 0)]
    for name, _ in rows:
        if name is not None and (name not in state.specs or name in state.merged):
            raise BadInput(f"adapter {name!r}: not on this model or merged into it; there are {list(state.specs)}")
    if isinstance(active, list):
        joined: list[tuple[str | None, int]] = []
        for name, count in active:
            if joined and joined[-1][0] == name:
                joined[-1] = (name, joined[-1][1] + count)
            else:
                joined.append((name, count))
        active = joined
    before, state.active = state.active, active
    try:
        yield
    finally:
        state.active = before


def off(model: Qwen2):
    """The base model inside the block: `with lora.off(model): reference = ...`"""
    return use(model, None)


@torch.no_grad()
def merge(model: Qwen2, name: str = "default") -> float:
    """Fold an adapter into the weights: W + s B A in float32, then rounded to the weights' dtype. Returns the largest
    difference of any logit on 64 probe tokens, merged against not. The weight before is kept for `unmerge`."""
    state, layers = _state(model), _layers(model, name)
    if name in state.merged:
        raise ValueError(f"adapter {name!r} is merged already")
    with use(model, name):
        apart = _probe(model)
    for layer in layers:
        layer.backups[name] = layer.weight.detach().clone()
        update = layer.lora_B[name].float() @ layer.lora_A[name].float() * state.specs[name].scale
        layer.weight.copy_(layer.weight.float() + update)
    state.merged.append(name)
    if state.active == name:
        state.active = None
    return float((_probe(model) - apart).abs().max())


@torch.no_grad()
def unmerge(model: Qwen2, name: str = "default") -> None:
    """Undo the last merge, to the bit, and make the adapter active again."""
    state = _state(model)
    if not state.merged or state.merged[-1] != name:
        raise ValueError(f"adapter {name!r} is not the last one merged: {state.merged}")
    for layer in _layers(model, name):
        layer.weight.copy_(layer.backups.pop(name))
    state.merged.pop()
    state.active = name


def remove(model: Qwen2, name: str = "default") -> None:
    """Take an adapter off. If it is merged, the weights stay as they are: this makes the merge final."""
    state = _state(model)
    for layer in _layers(model, name):
        layer.backups.pop(name, None)
        del layer.lora_A[name], layer.lora_B[name]
    del state.specs[name]
    state.merged = [other for other in state.merged if other != name]
    state.active = None if state.active == name else state.active


def _state(model: Qwen2) -> State:
    if not hasattr(model, "lora"):
        model.lora = State()
    return model.lora


def _layers(model: Qwen2, name: str) -> list[LoRALinear]:
    state = _state(model)
    if name not in state.specs:
        raise BadInput(f"adapter {name!r}: not on this model; there are {list(state.specs)}")
    return [model.get_submodule(path) for path in state.specs[name].modules]


def _wrap(model: Qwen2, path: str, state: State) -> LoRALinear:
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALinear):
        parent, _, leaf = path.rpartition(".")
        layer = LoRALinear(layer, state)
        setattr(model.get_submodule(parent), leaf, layer)
    return layer


def _matches(model: Qwen2, targets: list[str] | str) -> list[str]:
    """Full names of the linear layers that PEFT's target_modules mean: a full name, its last part, or a pattern."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        return [path for path in linear if path != "lm_head"]
    if isinstance(targets, str):
        found = [path for path in linear if re.fullmatch(targets, path)]
        if not found:
            raise BadInput(f"LoRA target_modules: the pattern {targets!r} matches no linear layer")
        return found
    for target in targets:
        if target == "lm_head" and model.config.tied:
            raise BadInput("LoRA target 'lm_head': this model's head is its embedding matrix (tied), so an adapter or a "
                           "merge there would change the embedding too; leave lm_head out")
        if not any(path == target or path.endswith("." + target) for path in linear):
            raise BadInput(f"LoRA target {target!r}: the model has no such linear layer; there are "
                           f"{sorted({path.rpartition('.')[2] for path in linear})}")
    return [path for path in linear if any(path == t or path.endswith("." + t) for t in targets)]


def _probe(model: Qwen2) -> Tensor:
    device, training = model.model.embed_tokens.weight.device, model.training
    ids = torch.arange(64, device=device) * 977 % model.config.vocab
    attend = Packed([64], device)
    model.eval()
    logits = model.logits(model(ids, attend.positions, attend)).float()
    model.train(training)
    return logits


# ---- PEFT's files ------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Keys of adapter_config.json that change what an adapter computes, with the values that mean "not used".
UNUSED = {"bias": ("none",), "fan_in_fan_out": (False,),
          "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None)}
HARMLESS = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "r",
            "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_version", "eva_config",
            "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"}


def save(model: Qwen2, directory: str | Path, name: str = "default", base: str = "") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors. base: the model it belongs to
    (directory or hub id), stored as base_model_name_or_path."""
    from slm.checkpoint import atomic_directory, write_safetensors
    spec = _state(model).specs[name]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": spec.r,
              "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "target_modules": spec.targets,
              "use_rslora": spec.rslora, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
              "inference_mode": True, "modules_to_save": None}
    tensors = {}
    for path, layer in zip(spec.modules, _layers(model, name)):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach()
    with atomic_directory(directory) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: Qwen2, directory: str | Path, name: str = "default") -> None:
    """Put an adapter in PEFT's format on the model and make it active. BadInput names what is not supported, and all
    missing, unexpected and wrongly shaped tensors at once."""
    from slm.checkpoint import SafeTensors, check_tensors
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    _refuse(config, directory / CONFIG)
    targets = config["target_modules"]
    add(model, config["r"], config["lora_alpha"], targets if isinstance(targets, str) else sorted(targets),
        config.get("lora_dropout", 0.0), name, config.get("use_rslora", False))
    wanted = {}
    for path, layer in zip(model.lora.specs[name].modules, _layers(model, name)):
        wanted[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name]
        wanted[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name]
    file = SafeTensors(directory / WEIGHTS)
    try:
        check_tensors(directory, {key: tuple(p.shape) for key, p in wanted.items()}, file.shapes)
    except BadInput:
        remove(model, name)
        raise
    with torch.no_grad():
        for key, p in wanted.items():
            p.copy_(file.read(key))


def _refuse(config: dict, where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key in ("r", "lora_alpha", "target_modules"):
        if not config.get(key):
            raise BadInput(f"{where}: {key} is {config.get(key)!r}, expected a value")
    for key, value in config.items():
        unused = UNUSED.get(key, (None, False, [], {}, ""))
        if key not in HARMLESS and value not in unused:
            raise BadInput(f"{where}: {key} is {value!r}, which is not supported; expected {unused[0]!r}")
