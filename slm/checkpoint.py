"""Models in and out: Hugging Face directories (config.json, *.safetensors, tokenizer.json, ...) and nothing else.

A name is `tiny` (inside this package), a directory, or a hub id such as Qwen/Qwen2.5-Math-1.5B, which is downloaded
once. Weights are read one tensor at a time straight into their place, so the peak is the model plus one tensor; pickles
are never opened. Files appear under their final name only when they are complete.

A safetensors file is: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}},
then the data (https://huggingface.co/docs/safetensors, "Format"). It is read here and not mapped into memory by the
library, because mapped pages count twice while a tensor is converted, and because a cut file must be named as such.
"""

import json
import os
import re
import shutil
import struct
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from slm import BadInput
from slm.model import Config, Qwen2
from slm.tokenizer import Tokenizer, read_json

TINY = Path(__file__).parent / "tiny"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


# ---- names to directories ----------------------------------------------------------------------------------

def resolve(name: str | Path) -> Path:
    """`tiny`, a directory or a hub id -> the directory that holds the model or adapter.
    BadInput if it is none of these, or not there and not downloadable."""
    if str(name) == "tiny":
        return TINY
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise BadInput(f"{path}: not a model, no config.json (nor adapter_config.json) in this directory")
        return path
    if path.exists():
        raise BadInput(f"{path}: a file, expected a Hugging Face directory, a hub id or 'tiny'")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).startswith("."):
        return download(str(name))
    raise BadInput(f"--model {name}: no such directory, and not a hub id such as Qwen/Qwen2.5-Math-1.5B")


def download(hub_id: str) -> Path:
    """The cached copy of a model on the hub, fetched with a progress bar if it is not there. Offline settings, mirrors
    and the cache folder are huggingface_hub's own: HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME, HF_TOKEN."""
    import huggingface_hub
    from huggingface_hub import errors
    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise BadInput(f"--model {hub_id}: the hub wants you to accept its licence first, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(f"--model {hub_id}: the hub has no such model, and there is no such directory") from None
    except Exception as e:  # no network, interrupted, ...: many libraries' errors arrive here
        cause = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BadInput(f"--model {hub_id}: cannot be downloaded ({cause}); offline, put config.json, *.safetensors, "
                       "tokenizer.json and tokenizer_config.json of it into a directory and give --model that "
                       "directory") from None


# ---- loading -----------------------------------------------------------------------------------------------

def load(name: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[Qwen2, Tokenizer]:
    """The model in evaluation mode and its tokenizer. An adapter's directory loads its base model and then the adapter
    under the name "default", active."""
    directory = resolve(name)
    if (directory / "adapter_config.json").is_file():
        from slm import lora
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise BadInput(f"{directory / 'adapter_config.json'}: base_model_name_or_path is missing")
        model, tokenizer = load(base, device, dtype)
        lora.load(model, directory)
        return model, tokenizer
    config = read_json(directory / "config.json")
    with torch.device("meta"):
        model = Qwen2(Config.from_hf(config, str(directory / "config.json")))
    read_weights(model, directory, device, dtype)
    tokenizer = Tokenizer.load(directory)
    if len(tokenizer) > model.config.vocab:
        raise BadInput(f"{directory}: the tokenizer has {len(tokenizer)} ids, but the model only {model.config.vocab}")
    return model.eval(), tokenizer


def read_weights(model: Qwen2, directory: Path, device, dtype: torch.dtype) -> None:
    """Fill a model on the meta device from a directory's safetensors file or files."""
    files = [SafeTensors(path) for path in weight_files(directory)]
    holder = {name: file for file in files for name in file.shapes}
    found = {name: shape for file in files for name, shape in file.shapes.items()
             if not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and model.config.tied)}
    check_tensors(directory, {name: tuple(p.shape) for name, p in model.named_parameters()}, found)
    for name, _ in list(model.named_parameters()):
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(holder[name].read(name).to(device, dtype)))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: one, or those that the index names."""
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing or not shards:
            raise BadInput(f"{directory / INDEX}: names {missing or 'no files'}, expected files beside it")
        return [directory / name for name in shards]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    other = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.gguf"))
    raise BadInput(f"{directory}: no model.safetensors and no {INDEX}"
                   + (f"; {other[0]} is not opened, convert it to safetensors first" if other else ""))


def check_tensors(directory: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """BadInput that lists every missing, unexpected and wrongly shaped tensor at once."""
    faults = [f"missing {name} {wanted[name]}" for name in wanted if name not in found]
    faults += [f"unexpected {name} {found[name]}" for name in found if name not in wanted]
    faults += [f"{name} has shape {found[name]}, expected {wanted[name]}"
               for name in wanted if name in found and found[name] != wanted[name]]
    if faults:
        raise BadInput(f"{directory}: {len(faults)} tensors do not fit the config: " + "; ".join(faults))


class SafeTensors:
    """A safetensors file: `shapes` of its tensors by name, and `read` for one of them. BadInput if the file is cut,
    is not of this format, or holds a dtype other than a floating-point one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                length = struct.unpack("<Q", f.read(8))[0]
                if length > size:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(f.read(length))
                header.pop("__metadata__", None)
                self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
                self.kinds = {name: entry["dtype"] for name, entry in header.items()}
                self.spans = {name: tuple(8 + length + x for x in entry["data_offsets"])
                              for name, entry in header.items()}
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
            raise BadInput(f"{path}: not a safetensors file ({e})") from None
        end = max((end for _, end in self.spans.values()), default=0)
        if end > size:
            raise BadInput(f"{path}: cut short, {size} bytes where its header promises {end}; copy it again")
        for name, kind in self.kinds.items():
            if kind not in DTYPES:
                raise BadInput(f"{path}: {name} has dtype {kind}, expected one of {', '.join(DTYPES)}")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        out = torch.empty(self.shapes[name], dtype=DTYPES[self.kinds[name]])
        begin, end = self.spans[name]
        if end - begin != out.numel() * out.itemsize:
            raise BadInput(f"{self.path}: {name} has {end - begin} bytes, expected {out.numel() * out.itemsize}")
        with open(self.path, "rb", buffering=0) as f:
            f.seek(begin)
            view, done = memoryview(out.view(-1).view(torch.uint8).numpy()), 0
            while done < len(view):  # one read returns at most 2 GiB
                got = f.readinto(view[done:])
                if not got:
                    raise BadInput(f"{self.path}: ended inside {name}; it changed while it was read")
                done += got
        return out


# ---- saving ------------------------------------------------------------------------------------------------

def save(model: Qwen2, tokenizer: Tokenizer, directory: str | Path, source: str | Path | None = None,
         shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that this project and transformers load: weights in the model's dtype (in files of at most
    `shard_bytes`, with an index), config, generation config with the stop ids, tokenizer and chat template.

    source: the model's origin (a name for `resolve`); what its config.json and generation_config.json say beyond
    what we know is kept. The directory appears, or replaces an older one, only when it is complete.
    """
    if any(name not in model.lora.merged for name in getattr(model, "lora", None) and model.lora.specs or ()):
        raise ValueError("the model has an adapter that is not merged: merge it, or save it with lora.save")
    origin = resolve(source) if source is not None else tokenizer.directory
    stop = sorted(tokenizer.stop_ids)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    known = model.config.to_hf()
    old = read_json(origin / "config.json", {})
    config = {**{k: v for k, v in old.items() if k not in ("rope_parameters", "dtype")}, **known,
              "torch_dtype": dtype}
    generation = {**read_json(origin / "generation_config.json", {}), "eos_token_id": stop}
    tensors = {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    with atomic_directory(directory) as temporary:
        _write_shards(temporary, tensors, shard_bytes)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", generation)
        tokenizer.save(temporary)


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    shards: list[dict] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return write_safetensors(directory / "model.safetensors", tensors)
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        where.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors, one at a time, so that the peak is one tensor. OSError if the disk is full."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at := at + tensor.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_directory(directory: str | Path):
    """A temporary directory beside the final one; it takes the final name when the block ends well, in the place of
    what was there, and vanishes when the block raises."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        if directory.exists():
            older = temporary.with_name(temporary.name + ".old")
            directory.rename(older)
            temporary.rename(directory)
            shutil.rmtree(older)
        else:
            temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
