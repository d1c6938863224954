"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors in a folder. base.json, which
PEFT does not read, tells the base model's fingerprint, and the way to its folder from the adapter's."""

import os
from pathlib import Path

import torch

from slm import BadInput, lora
from slm.model import Qwen2
from slm.runs.files import base_of, fingerprint, read_json, write_json
from slm.tensors import ADAPTER, SafeTensors, atomic_directory, check_tensors, write_safetensors

WEIGHTS, BASE, PREFIX = "adapter_model.safetensors", "base.json", "base_model.model."
# Keys of adapter_config.json that say what we need or nothing about the numbers; any other must be unset.
KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path",
         "peft_type", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "eva_config",
         "loftq_config", "corda_config", "megatron_core", "qalora_group_size", "runtime_config"}
UNSET = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}  # else falsy


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
    """Put an adapter of PEFT's on the model and make it active. BadInput names what is not supported, and
    lists all missing, unexpected and wrongly shaped tensors at once; then the model is as it was. BadInput if
    the adapter knows its base and this model is another."""
    directory = Path(directory)
    config = read_json(directory / ADAPTER)
    _refuse(config, directory / ADAPTER)
    known, here = read_json(directory / BASE, {}).get("fingerprint"), weights_fingerprint(model)
    if known not in (None, here):
        base = base_of(directory) or "a model without a name"
        raise BadInput(f"{directory}: this adapter was trained on {base}, the model has other weights "
                       f"(fingerprint {here}, expected {known}); give --model {directory}")
    file, r, targets = SafeTensors(directory / WEIGHTS), config["r"], config["target_modules"]
    shapes = {}
    for path in lora.matching(model, targets):
        layer = model.get_submodule(path)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (layer.out_features, r)
    check_tensors(directory / WEIGHTS, shapes, file.shapes)
    values = {key: file.read(key) for key in shapes}
    lora.add(model, r, config["lora_alpha"], targets, config.get("lora_dropout") or 0.0, name,
             bool(config.get("use_rslora")))
    for key, p in _tensors(model, name).items():
        p.copy_(values[key])


@torch.no_grad()
def weights_fingerprint(model: Qwen2) -> str:
    """A hash of the base weights: name and shape of every tensor, and 64 of its numbers in bfloat16, so that
    the dtype in which a model is loaded does not matter. A fine-tuned or merged model differs; a change of a
    few numbers, or one that bfloat16 rounds away, is not seen. Adapters that are not merged don't count."""
    found = []
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            some = torch.arange(64, device=p.device) * 2_654_435_761 % p.numel()  # spread over the tensor
            found.append([name, list(p.shape), p.flatten()[some].cpu().bfloat16().tolist()])
    return fingerprint(found)


def _tensors(model: Qwen2, name: str) -> dict[str, torch.nn.Parameter]:
    """The tensors of an adapter under their names in PEFT's file."""
    found = {}
    for path, layer in lora.layers(model, name).items():
        found[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name]
        found[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name]
    return found


def _refuse(config: dict, where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not config.get(key) or not isinstance(config[key], kind):
            raise BadInput(f"{where}: {key} is {config.get(key)!r}, expected a value")
    for key, value in config.items():
        if key not in KNOWN and value not in UNSET.get(key, ()) and (value or key in UNSET):
            raise BadInput(f"{where}: {key} is {value!r}, which is not supported here")
