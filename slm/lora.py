"""LoRA: y = W x + s B A x with W frozen, A (r, in) and B (out, r) trained, s = alpha / r.

Hu et al. 2021, arXiv:2106.09685, eq. 3. A is drawn as in a linear layer and B starts at zero, so a new
adapter changes nothing. With rslora s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732). A and B are
kept in float32 and computed with in the model's dtype (B in float32 where a few tokens are sampled: faster).

Several adapters live on one base model, each under a name. One is active (`add` and `load` activate
theirs); `off` and `use` change that for a while, and `use` can give every sequence of a batch its own. Only
`merge` ever touches the base weights: with its adapter off, a model is its base model, bit for bit, so
policy and reference are one model. The files are PEFT's.
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
from slm.checkpoint import SafeTensors, atomic_directory, check_tensors, write_safetensors
from slm.model import Joint, Linear, Qwen2, by_columns, one_thread, product
from slm.runs.files import read_json

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = 2 ** 18  # multiplications: a smaller product is faster in float32, bfloat16 has a fixed cost of 13 us


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


class State:
    """What all layers of a model share: its adapters, which are merged (in order), and which is applied now.
    active: None, a name for all tokens, or {name: indices of its tokens}.
    stamps: inside `use` without gradients, one for each adapter in use; see `_stamp`."""

    def __init__(self):
        self.specs: dict[str, Spec] = {}
        self.merged: list[str] = []
        self.active: str | dict[str, Tensor] | None = None
        self.stamps: dict[str, list] = {}
        self.last: dict[str, tuple[list, list]] = {}  # by adapter: its parameters and its last stamp


class LoRALinear(Linear):
    """A linear layer with adapters. It takes over the parameters of the layer it replaces, names included."""

    def __init__(self, base: nn.Linear, state: State):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.state = base.weight, base.bias, state
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.backups: dict[str, Tensor] = {}  # the weight before each merge
        self.cast: dict[tuple, tuple] = {}    # see `factors`

    @property
    def room(self) -> int:
        return max(map(len, self.lora_A.values()), default=0)

    def together(self, x: Tensor, joint: Joint) -> Tensor:
        """With one adapter in use to sample, A x comes out of the product with W; only B is left to do."""
        active = self.state.active
        if isinstance(active, str) and active in self.state.stamps and joint.low and not self.training:
            return joint.low(x)
        return self.adapt(x, product(x, *joint.base), joint.layers)

    def adapt(self, x: Tensor, y: Tensor, layers: list[Linear]) -> Tensor:
        """y, the outputs of these layers side by side, plus what the active adapters add to each token."""
        active = self.state.active
        if isinstance(active, str):
            return self.add(active, x, y, layers)
        for name, tokens in (active or {}).items():
            y = y.index_copy(0, tokens, self.add(name, x[tokens], y[tokens], layers))
        return y

    def add(self, name: str, x: Tensor, y: Tensor, layers: list[Linear]) -> Tensor:
        """y += s B A x, for x (T, in) and y (T, out)."""
        A, B = self.factors(name, x.dtype, layers)
        if not len(A):
            return y
        spec = self.state.specs[name]
        if self.training:
            x = F.dropout(x, spec.dropout)
        with one_thread(x.is_cpu and len(x) <= 256 and not torch.is_grad_enabled()):
            return y.addmm_(F.linear(x, A), B.t(), alpha=spec.scale)  # in place: y is of no use without it

    def factors(self, name: str, dtype: torch.dtype, layers: list[Linear]) -> list[Tensor]:
        """Their A and B in the activations' dtype, kept as long as the stamp stays the same."""
        stamp, key = self.state.stamps.get(name), (name, dtype, len(layers))
        kept, *factors = self.cast.get(key, [None])
        if stamp is not None and kept is stamp:
            return factors
        new = [x.to(dtype) for x in side_by_side(layers, name)]
        if stamp is not None:
            self.cast[key] = stamp, *new
        return new


def side_by_side(layers: list[Linear], name: str) -> tuple[Tensor, Tensor]:
    """One adapter for layers side by side, A (R, in) and B (out, R): the As below each other, the Bs along
    the diagonal. R is 0 where it changes none of them."""
    pairs = [(layer.lora_A[name], layer.lora_B[name]) if name in getattr(layer, "lora_A", ()) else
             (layer.weight.new_zeros(0, layer.in_features), layer.weight.new_zeros(layer.out_features, 0))
             for layer in layers]
    return pairs[0] if len(pairs) == 1 else (torch.cat([A for A, _ in pairs]),
                                             torch.block_diag(*[B for _, B in pairs]))


class Low:
    """One adapter on joint layers, as it is sampled with: A lies behind W, so W x and A x are one product.
    Another adapter takes the same place, which recorded rounds know."""

    def __init__(self, joint: Joint):
        self.joint, self.stamp = joint, None
        with torch.inference_mode(False):  # it is written to inside and outside of that mode
            self.room = joint.weight.new_zeros(joint.size, joint.room)

    def lay(self, A: Tensor, B: Tensor, scale: float, stamp: list) -> None:
        self.stamp, self.sizes = stamp, [self.joint.size, len(A)]
        self.wide = self.joint.rows(self.joint.size + len(A))
        self.wide[0][self.joint.size:] = A
        self.B = self.room[:, :len(A)].copy_(B * scale)
        self.exact = (B.t().float() * scale).contiguous() if B.is_cpu else None

    def __call__(self, x: Tensor) -> Tensor:
        y, h = product(x, *self.wide).split_with_sizes(self.sizes, -1)
        if x.is_cpu and len(x) * self.B.numel() < SMALL:
            return y.add_(h.float() @ self.exact)
        if by_columns(x):
            return y.t().addmm_(self.B, h.t()).t()
        return y.addmm_(h, self.B.t())


# ---- adapters on a model -----------------------------------------------------------------------------------

def add(model: Qwen2, r: int = 16, alpha: float = 32, targets: list[str] | str = ALL, dropout: float = 0.0,
        name: str = "default", rslora: bool = False) -> None:
    """Put a new adapter on the linear layers that `targets` names, freeze the base, make the adapter active.
    BadInput: a rank below 1, a target that the model lacks, the head where it is tied to the embedding."""
    state = _state(model)
    if name in state.specs or not name or "." in name:
        raise BadInput(f"adapter name {name!r}: expected a new one without dots; there are {names(model)}")
    if r < 1 or not 0 <= dropout < 1:
        raise BadInput(f"LoRA rank {r}, dropout {dropout}: expected a rank of 1 or more, a dropout in [0, 1)")
    spec = Spec(r, alpha, targets if isinstance(targets, str) else list(targets), dropout, rslora)
    spec.modules = _matches(model, spec.targets)
    for path, p in model.named_parameters():
        p.requires_grad_(".lora_" in path)
    for path in spec.modules:
        layer = _wrap(model, path, state)
        like = {"device": layer.weight.device, "dtype": torch.float32}
        layer.lora_A[name] = nn.Parameter(torch.empty(r, layer.in_features, **like))
        layer.lora_B[name] = nn.Parameter(torch.zeros(layer.out_features, r, **like))
        nn.init.kaiming_uniform_(layer.lora_A[name], a=math.sqrt(5))
    state.specs[name], state.active = spec, name
    if model.joints:
        model.join()  # with room for A


def names(model: Qwen2) -> list[str]:
    """The adapters on this model that can be used: those not merged into it."""
    state = _state(model)
    return [name for name in state.specs if name not in state.merged]


def parameters(model: Qwen2, name: str = "default") -> list[nn.Parameter]:
    """The trainable tensors of one adapter."""
    return [p for layer in _layers(model, name) for p in (layer.lora_A[name], layer.lora_B[name])]


@contextmanager
def use(model: Qwen2, active: str | list[tuple[str | None, int]] | None):
    """Apply another adapter inside the block: a name, None, or rows [(name or None, tokens)], one after the
    other over the packed tokens, so that every sequence of a batch has its own. Without gradients, what is
    made of the adapters' parameters is kept, and whether they changed is looked at here, once a block."""
    state = _state(model)
    wanted = {name for name, _ in active} if isinstance(active, list) else {active}
    for name in wanted - {None, *names(model)}:
        raise BadInput(f"adapter {name!r}: not on this model or merged into it; there are {names(model)}")
    if len(wanted) == 1:
        active, = wanted
    elif isinstance(active, list):
        of_token = [name for name, count in active for _ in range(count)]
        device = model.model.embed_tokens.weight.device
        active = {name: torch.tensor([i for i, other in enumerate(of_token) if other == name], device=device)
                  for name in wanted - {None}}
    before = state.active, state.stamps
    state.active, state.stamps = active, {}
    if not torch.is_grad_enabled() and not hasattr(model, "unshard"):  # FSDP gathers without a new version
        state.stamps = {name: _stamp(model, name) for name in wanted - {None}}
        if isinstance(active, str):
            _lay(model, active, state.stamps[active])
    try:
        yield
    finally:
        state.active, state.stamps = before


def off(model: Qwen2):
    """The base model inside the block: `with lora.off(model): reference = ...`"""
    return use(model, None)


@torch.no_grad()
def merge(model: Qwen2, name: str = "default") -> float:
    """Fold an adapter into the weights: W + s B A in float32, then rounded to the weights' dtype. Returns
    the largest difference of any logit on 64 probe tokens, merged against not. `unmerge` undoes it,
    `remove` makes it final and frees the copy of the weights that is kept until then."""
    with use(model, name):
        apart = _probe(model)
    state = model.lora
    for layer in _layers(model, name):
        layer.backups[name] = layer.weight.detach().clone()
        update = layer.lora_B[name].float() @ layer.lora_A[name].float() * state.specs[name].scale
        layer.weight.copy_(layer.weight.float() + update)
    state.merged.append(name)
    state.active = None if state.active == name else state.active
    return float((_probe(model) - apart).abs().max())


@torch.no_grad()
def unmerge(model: Qwen2, name: str = "default") -> None:
    """Undo the last merge, to the bit, and make the adapter active again."""
    state = _state(model)
    if state.merged[-1:] != [name]:
        raise ValueError(f"adapter {name!r} is not the last one merged: {state.merged}")
    for layer in _layers(model, name):
        layer.weight.copy_(layer.backups.pop(name))
    state.merged.pop()
    state.active = name


def remove(model: Qwen2, name: str = "default") -> None:
    """Take an adapter off. What was merged stays in the weights, for good."""
    state = _state(model)
    for layer in _layers(model, name):
        layer.backups.pop(name, None)
        layer.cast.clear()
        del layer.lora_A[name], layer.lora_B[name]
    del state.specs[name]
    state.last.pop(name, None)
    state.merged = [other for other in state.merged if other != name]
    state.active = None if state.active == name else state.active


def _state(model: Qwen2) -> State:
    if not hasattr(model, "lora"):
        model.lora = State()
    return model.lora


def _stamp(model: Qwen2, name: str) -> list:
    """Addresses and versions of an adapter's parameters: the same object as long as they stay the same, so
    that who keeps something made of them sees at a glance whether it still holds."""
    state = model.lora
    watched, stamp = state.last.get(name) or (parameters(model, name), None)
    now = [(p.data_ptr(), p._version) for p in watched]
    if now != stamp:
        state.last[name] = watched, now
    return state.last[name][1]


def _lay(model: Qwen2, name: str, stamp: list) -> None:
    """Put an adapter behind the weights that lie side by side, unless it is there."""
    for joint in filter(lambda joint: joint.room, model.joints):
        joint.low = joint.low or Low(joint)
        if joint.low.stamp is not stamp:
            joint.low.lay(*side_by_side(joint.layers, name), model.lora.specs[name].scale, stamp)


def _layers(model: Qwen2, name: str) -> list[LoRALinear]:
    specs = _state(model).specs
    if name not in specs:
        raise BadInput(f"adapter {name!r}: not on this model; there are {list(specs)}")
    return [model.get_submodule(path) for path in specs[name].modules]


def _wrap(model: Qwen2, path: str, state: State) -> LoRALinear:
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALinear):
        parent, _, leaf = path.rpartition(".")
        layer = LoRALinear(layer, state).train(layer.training)
        setattr(model.get_submodule(parent), leaf, layer)
    return layer


def _matches(model: Qwen2, targets: list[str] | str) -> list[str]:
    """Full names of the linear layers that PEFT's target_modules means: full names, their ends, a pattern."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    hits = lambda t: [path for path in linear if path == t or path.endswith("." + t)]
    if isinstance(targets, str):
        hits, targets = (lambda t: [path for path in linear if re.fullmatch(t, path)]), [targets]
    for target in targets:
        if target.endswith("lm_head") and model.config.tied:
            raise BadInput("LoRA target 'lm_head': this model's head is its embedding (tied), so merging "
                           "an adapter there would change the embedding too; leave lm_head out")
        if not hits(target):
            there = sorted({path.rpartition(".")[2] for path in linear})
            raise BadInput(f"LoRA target {target!r}: no such linear layer in the model; there are {there}")
    wanted = {path for target in targets for path in hits(target)}
    return [path for path in linear if path in wanted]


def _probe(model: Qwen2) -> Tensor:
    device, training = model.model.embed_tokens.weight.device, model.training
    ids, attend = torch.arange(64, device=device) * 977 % model.config.vocab, Packed([64], device)
    logits = model.eval().logits(model(ids, attend.positions, attend)).float()
    model.train(training)
    return logits


# ---- PEFT's files ------------------------------------------------------------------------------------------

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Keys of adapter_config.json that say what we need or nothing about the numbers; any other must be unset.
KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path",
         "peft_type", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "eva_config",
         "loftq_config", "corda_config", "megatron_core", "qalora_group_size", "runtime_config"}
UNSET = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}  # else falsy


def save(model: Qwen2, directory: str | Path, name: str = "default", base: str | Path = "") -> None:
    """Write an adapter in PEFT's format, adapter_config.json and adapter_model.safetensors; all or nothing.
    base: the model it belongs to (directory or hub id), stored as base_model_name_or_path."""
    layers = _layers(model, name)
    spec = model.lora.specs[name]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
              "r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "use_rslora": spec.rslora,
              "target_modules": spec.targets, "bias": "none", "fan_in_fan_out": False,
              "init_lora_weights": True, "inference_mode": True, "modules_to_save": None}
    tensors = {f"{PREFIX}{path}.lora_{x}.weight": getattr(layer, f"lora_{x}")[name]
               for path, layer in zip(spec.modules, layers) for x in "AB"}
    with atomic_directory(directory) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load(model: Qwen2, directory: str | Path, name: str = "default") -> None:
    """Put an adapter in PEFT's format on the model and make it active. BadInput names what is not
    supported, and lists all missing, unexpected and wrongly shaped tensors at once."""
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    _refuse(config, directory / CONFIG)
    file, before = SafeTensors(directory / WEIGHTS), _state(model).active
    add(model, config["r"], config["lora_alpha"], config["target_modules"], config.get("lora_dropout") or 0.0,
        name, bool(config.get("use_rslora")))
    wanted = {f"{PREFIX}{path}.lora_{x}.weight": getattr(layer, f"lora_{x}")[name]
              for path, layer in zip(model.lora.specs[name].modules, _layers(model, name)) for x in "AB"}
    try:
        check_tensors(directory / WEIGHTS, {key: tuple(p.shape) for key, p in wanted.items()}, file.shapes)
        for key, p in wanted.items():
            p.copy_(file.read(key))
    except BadInput:
        remove(model, name)
        model.lora.active = before
        raise


def _refuse(config: dict, where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not config.get(key) or not isinstance(config[key], kind):
            raise BadInput(f"{where}: {key} is {config.get(key)!r}, expected a value")
    for key, value in config.items():
        if key not in KNOWN and value not in UNSET.get(key, ()) and (value or key in UNSET):
            raise BadInput(f"{where}: {key} is {value!r}, which is not supported here")
