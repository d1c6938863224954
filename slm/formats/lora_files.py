"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors in a folder. base.json, which
PEFT does not read, tells the base model's fingerprint, and the way to its folder from the adapter's."""

import os
import re
from pathlib import Path

import torch

from slm import BadInput, lora
from slm.formats.tensors import SafeTensors, atomic_directory, misfits, write_safetensors
from slm.model import Qwen2
from slm.runs.files import ADAPTER, BASE, CONFIG, base_of, fingerprint, read_json, write_json

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
# Keys of adapter_config.json that say what we need or nothing about the numbers; any other must be unset.
KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path",
         "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "eva_config",
         "loftq_config", "corda_config", "megatron_core", "qalora_group_size", "runtime_config",
         "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save",
         "ensure_weight_tying", "fan_in_fan_out"}  # peft, too, ignores the last for linear layers
UNSET = {"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "bias": ("none",),
         "peft_type": ("LORA",), "layers_pattern": (None, "", [], "layers", ["layers"])}  # else falsy


def save(model: Qwen2, directory: str | Path, name: str = "default", base: str | Path = "") -> None:
    """Write an adapter; the folder appears, or replaces an older one, when it is complete. base: its model's
    directory or hub id, stored as base_model_name_or_path; a directory also as a path from the adapter."""
    spec = lora.spec(model, name)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
              "r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "use_rslora": spec.rslora,
              "target_modules": spec.targets, "bias": "none", "fan_in_fan_out": False,
              "init_lora_weights": True, "inference_mode": True, "modules_to_save": None}
    known = {"fingerprint": weights_fingerprint(model)}
    if str(base) not in ("", "tiny") and Path(base).is_dir():
        known["path"] = os.path.relpath(Path(base).resolve(), Path(directory).resolve())
    with atomic_directory(directory) as temporary:
        write_safetensors(temporary / WEIGHTS, _tensors(model, name))
        write_json(temporary / BASE, known)
        write_json(temporary / ADAPTER, config)


@torch.no_grad()
def load(model: Qwen2, directory: str | Path, name: str = "default") -> None:
    """Put an adapter of PEFT's on the model, active: the same function as in peft. BadInput for what is not
    supported, for another base than it knows, for all tensors that don't fit; then the model is as it was.

    Layers may have ranks and alphas of their own. Here all get the largest rank, filled up with zeros, and
    one alpha; B is multiplied by what that changes. A tensor saved beside (modules_to_save, an embedding)
    must be the base model's: peft puts it in its place, but here a model without its adapter is its base.
    """
    directory = Path(directory)
    if (directory / CONFIG).is_file() and not (directory / ADAPTER).is_file():
        raise BadInput(f"{directory}: a model, expected an adapter's folder")
    config = read_json(directory / ADAPTER)
    _refuse(config, directory / ADAPTER)
    known = read_json(directory / BASE, {}).get("fingerprint")
    if known is not None and known != (here := weights_fingerprint(model)):
        base = base_of(directory) or "a model without a name"
        raise BadInput(f"{directory}: this adapter was trained on {base}, the model has other weights "
                       f"(fingerprint {here}, expected {known}); give --model {directory}")
    try:
        file, layers = SafeTensors(directory / WEIGHTS), _layers(model, config)
    except (re.error, TypeError, AttributeError, ArithmeticError) as e:
        found = {k: v for k, v in config.items() if v and re.search("pattern|modules|layers", k)}
        raise BadInput(f"{directory / ADAPTER}: {found} cannot be read as peft reads it ({e})") from None
    if not layers:
        raise BadInput(f"{directory / ADAPTER}: target_modules {config['target_modules']!r} is nothing here")
    keys, shapes = _own_keys(model, file, config), {}
    for path, (r, _) in layers.items():
        layer = model.get_submodule(path)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (layer.out_features, r)
    if wrong := misfits(shapes, {name: file.shapes[key] for name, key in keys.items()}):
        raise BadInput(f"{directory}: the adapter of another base ({base_of(directory) or '?'}), or not "
                       f"a whole one: {len(wrong)} tensors do not fit, such as {wrong[0]}")
    values = {name: file.read(keys[name]) for name in shapes}
    lora.add(model, max(r for r, _ in layers.values()), config["lora_alpha"], list(layers),
             config.get("lora_dropout") or 0.0, name, bool(config.get("use_rslora")))
    for path, layer in lora.layers(model, name).items():
        (r, scale), ours = layers[path], lora.spec(model, name).scale
        layer.lora_A[name].zero_()[:r] = values[f"{PREFIX}{path}.lora_A.weight"]
        layer.lora_B[name][:, :r] = values[f"{PREFIX}{path}.lora_B.weight"].float() * (scale / ours)


def _layers(model: Qwen2, config: dict) -> dict[str, tuple[int, float]]:
    """Full name -> (rank, scale) of the layers to change. As in peft, a name may be unknown."""
    numbers, found = config.get("layers_to_transform"), {}
    numbers = [numbers] if isinstance(numbers, int) else numbers
    targets, *without = (config.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save"))
    for path, module in model.named_modules():
        number = re.match(r"model\.layers\.(\d+)\.", path)
        here = not numbers or path in targets or (number and int(number[1]) in numbers)
        if isinstance(module, torch.nn.Linear) and here and _meant(path, targets) and not any(
                _meant(path, names) for names in without):
            r = _of_layer(path, config.get("rank_pattern"), config["r"])
            alpha = _of_layer(path, config.get("alpha_pattern"), config["lora_alpha"])
            found[path] = r, lora.Spec(r, alpha, path, rslora=bool(config.get("use_rslora"))).scale
    return found


def _meant(path: str, names: list[str] | str | None) -> bool:
    """Is the layer meant by a list of full names and their ends, or by this pattern?"""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(f".{path}".endswith(f".{name}") for name in names or ())


def _of_layer(path: str, patterns: dict | None, common):
    """What the first pattern says that fits the end of the layer's name; else what is common to all."""
    return next((value for pattern, value in (patterns or {}).items()
                 if re.match(rf"(.*\.)?({pattern})$", path)), common)


def _own_keys(model: Qwen2, file: SafeTensors, config: dict) -> dict[str, str]:
    """Name of each tensor of the adapter, without an adapter's name in it, -> its name in the file. BadInput
    for a second adapter, or a tensor saved beside that is missing or differs from the base model's."""
    base, keys, beside = dict(model.named_parameters()), {}, ""
    base.setdefault("lm_head.weight", base["model.embed_tokens.weight"])
    for key in file.shapes:
        p = base.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if p is None:
            keys[re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", key)] = key
        elif not torch.equal(p, file.read(key, p.device, p.dtype)):
            raise BadInput(f"{file.path}: {key} differs from the base model's; modules_to_save and trained "
                           "embeddings are not supported, merge the adapter into its base with peft first")
        else:
            beside += f"{key} "
    if len(keys) + beside.count(" ") < len(file.shapes):
        raise BadInput(f"{file.path}: holds several adapters, expected one")
    for module in config.get("modules_to_save") or []:
        if f".{module}.weight " not in beside:
            raise BadInput(f"{file.path}: modules_to_save names {module}, which is not there")
    return keys


@torch.no_grad()
def weights_fingerprint(model: Qwen2) -> str:
    """A hash of name, shape and 64 numbers of each base tensor, in bfloat16, so that a model's dtype does not
    matter. A fine-tuned or merged model differs; a change of few numbers, or one that bfloat16 rounds away,
    is not seen. Adapters that are not merged don't count."""
    found = []
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            some = torch.arange(64, device=p.device) * 2_654_435_761 % p.numel()  # spread over the tensor
            found.append([name, list(p.shape), p.flatten()[some].cpu().bfloat16().tolist()])
    return fingerprint(found)


def _tensors(model: Qwen2, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under their names in PEFT's file. As copies: FSDP can't split weights again
    that safetensors looked at."""
    found = {}
    for path, layer in lora.layers(model, name).items():
        found[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach().clone()
        found[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach().clone()
    return found


def _refuse(config: dict, where: Path) -> None:
    for key, value in config.items():
        if key not in KNOWN and value not in UNSET.get(key, ()) and (value or key in UNSET):
            raise BadInput(f"{where}: {key} is {value!r}, which is not supported here")
    number = (int, float)
    for key, kind in {"r": int, "lora_alpha": number, "target_modules": (list, str)}.items():
        if not config.get(key) or not isinstance(config[key], kind):
            raise BadInput(f"{where}: {key} is {config.get(key)!r}, expected a value")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, number) or not 0 <= dropout < 1:
        raise BadInput(f"{where}: lora_dropout is {dropout!r}, expected a number from 0 to less than 1")
