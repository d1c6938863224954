"""Models in and out: Hugging Face directories (config.json, *.safetensors, tokenizer.json, ...), nothing
else.

A name is `tiny` (inside this package), a directory, or a hub id such as Qwen/Qwen2.5-Math-1.5B, which is
downloaded once. Weights are read one tensor at a time straight into their place, so the peak is the model
plus one tensor; pickles are never opened. Files appear under their final name only when they are complete.

A safetensors file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin,
end]}}, then the data (huggingface.co/docs/safetensors, "Format"). It is read and written here and not by the
library: mapped pages count twice while a tensor is converted, its writer copies the whole model, and neither
names a cut file or a full disk as such.
"""

import json
import math
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
from slm.runs.files import read_json, write_json
from slm.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, ADAPTER, GENERATION = "config.json", "adapter_config.json", "generation_config.json"


# ---- names to directories ----------------------------------------------------------------------------------

def resolve(name: str | Path) -> Path:
    """`tiny`, a directory or a hub id -> the directory that holds the model or adapter. BadInput if it is
    none of these, or not there and not to be had."""
    if str(name) == "tiny":
        return TINY
    path = Path(name).expanduser()
    if path.is_dir() and str(name):
        if not (path / CONFIG).is_file() and not (path / ADAPTER).is_file():
            inside = next((f"; try {p.parent}" for p in (path / "adapter" / ADAPTER, path / "model" / CONFIG)
                           if p.is_file()), "")
            raise BadInput(f"{path}: not a model, this directory has no {CONFIG} and no {ADAPTER}{inside}")
        return path
    if path.is_file():
        raise BadInput(f"{path}: a file, expected a Hugging Face directory, a hub id or 'tiny'")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return download(str(name))
    raise BadInput(f"{str(name)!r}: no such directory, expected one, or a hub id such as "
                   "Qwen/Qwen2.5-Math-1.5B, or 'tiny'")


def download(hub_id: str) -> Path:
    """The cached copy of a model on the hub, fetched first, with progress bars, if it is not there. Cache
    folder, mirror, token and offline mode are huggingface_hub's own: HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE."""
    import huggingface_hub
    from huggingface_hub import errors
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        path = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except errors.GatedRepoError:
        raise BadInput(f"{hub_id}: accept its licence on the hub first, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(f"{hub_id}: no such directory, and no such model on the hub") from None
    except Exception as e:  # no network, a cut connection, ...: the errors of several libraries arrive here
        if isinstance(e, OSError) and e.errno and e.filename:  # a full disk or a locked cache folder
            raise
        cause = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"{hub_id}: no such directory, and it cannot be downloaded ({cause}); offline, put "
                       f"{CONFIG}, {GENERATION}, tokenizer.json, tokenizer_config.json, *.safetensors of it "
                       "into a directory and name that instead") from None
    if not (path / CONFIG).is_file() and not (path / ADAPTER).is_file():
        raise BadInput(f"{hub_id}: the hub has no {CONFIG} for it, so it is not a model")
    return path


# ---- loading -----------------------------------------------------------------------------------------------

def load(name: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[Qwen2, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer. An adapter's directory loads its base model and then
    the adapter, active under the name "default"."""
    directory = resolve(name)
    if (directory / ADAPTER).is_file() and not any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        from slm import lora
        base = read_json(directory / ADAPTER).get("base_model_name_or_path")
        try:
            model, tokenizer = load(base or "", device, dtype)
        except BadInput as e:
            raise BadInput(f"{directory / ADAPTER}: base_model_name_or_path {base!r}: {e}") from None
        lora.load(model, directory)
        return model, tokenizer
    config = Config.from_hf(read_json(directory / CONFIG), str(directory / CONFIG))
    tokenizer = Tokenizer.load(directory)
    if tokenizer.largest >= config.vocab:
        raise BadInput(f"{directory}: the tokenizer has id {tokenizer.largest}, the model {config.vocab} ids")
    with torch.device("meta"):
        model = Qwen2(config)
    read_weights(model, directory, device, dtype)
    return model.eval(), tokenizer


def read_weights(model: Qwen2, directory: Path, device, dtype: torch.dtype) -> None:
    """Fill a model that is on the meta device from a directory's safetensors files."""
    files = [SafeTensors(path) for path in weight_files(directory)]
    holder = {name: file for file in files for name in file.shapes}
    known_extra = {"lm_head.weight"} if model.config.tied else set()
    found = {name: file.shapes[name] for name, file in holder.items()
             if name not in known_extra and not name.endswith("rotary_emb.inv_freq")}
    wanted = dict(model.named_parameters())
    check_tensors(directory, {name: tuple(p.shape) for name, p in wanted.items()}, found)
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        tensor = holder[name].read(name).to(device, dtype)
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: those that the index names, or the one."""
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing or not shards:
            raise BadInput(f"{directory / INDEX}: names {', '.join(missing) or 'nothing'}, not there")
        return [directory / name for name in shards]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    hint = f"; {pickles[0]} is a pickle and is not opened, convert it first" if pickles else ""
    raise BadInput(f"{directory}: no {WEIGHTS} and no {INDEX}{hint}")


def check_tensors(where: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """BadInput that lists every missing, unexpected and wrongly shaped tensor at once."""
    faults = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    faults += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in wanted]
    faults += [f"{name} is {found[name]}, expected {shape}" for name, shape in wanted.items()
               if found.get(name, shape) != shape]
    if faults:
        raise BadInput(f"{where}: {len(faults)} tensors do not fit the config: {'; '.join(faults)}")


class SafeTensors:
    """A safetensors file: the `shapes` of its tensors by name, and `read` for one of them. BadInput if the
    file is cut, is not of this format, or holds something other than floating-point numbers."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                length, = struct.unpack("<Q", f.read(8))
                if length > size:
                    raise ValueError(f"it promises a header of {length} bytes and has {size}")
                header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self.codes = {name: entry["dtype"] for name, entry in header.items()}
            self.spans = {name: [8 + length + x for x in entry["data_offsets"]]
                          for name, entry in header.items()}
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
            raise BadInput(f"{path}: not a safetensors file, or a broken one ({e})") from None
        if (end := max((span[1] for span in self.spans.values()), default=0)) > size:
            raise BadInput(f"{path}: cut short, {size} bytes where its header promises {end}; copy it again")
        for name, (begin, end) in self.spans.items():
            if self.codes[name] not in DTYPES:
                raise BadInput(f"{path}: {name} is {self.codes[name]}, expected one of {', '.join(DTYPES)}")
            needed = math.prod(self.shapes[name]) * DTYPES[self.codes[name]].itemsize
            if end - begin != needed:
                raise BadInput(f"{path}: {name} has {end - begin} bytes, expected {needed}")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype that it is stored in."""
        out = torch.empty(self.shapes[name], dtype=DTYPES[self.codes[name]])
        rest = memoryview(out.view(-1).view(torch.uint8).numpy())
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.spans[name][0])
            while rest:  # one read gives at most 2 GiB
                if not (got := f.readinto(rest)):
                    raise BadInput(f"{self.path}: ended inside {name}; it changed while it was read")
                rest = rest[got:]
        return out


# ---- saving ------------------------------------------------------------------------------------------------

def save(model: Qwen2, tokenizer: Tokenizer, directory: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that this project and transformers load: weights in the model's dtype (in files of at
    most `shard_bytes` with an index), config, generation config with the stop ids, tokenizer, chat template.
    What the configs beside the tokenizer say beyond what we know is kept. The directory appears, or replaces
    an older one, when it is complete.
    """
    adapters = getattr(model, "lora", None)
    if adapters and set(adapters.specs) - set(adapters.merged):
        raise ValueError("the model has an adapter: merge it first, or write it with lora.save")
    origin = tokenizer.directory
    config = {key: value for key, value in read_json(origin / CONFIG, {}).items()
              if key not in ("rope_parameters", "rope_scaling", "dtype")}
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config |= model.config.to_hf() | {"torch_dtype": dtype}
    generation = read_json(origin / GENERATION, {}) | {"eos_token_id": sorted(tokenizer.stop_ids)}
    tensors = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    with atomic_directory(directory) as temporary:
        _write_shards(temporary, tensors, shard_bytes)
        write_json(temporary / CONFIG, config)
        write_json(temporary / GENERATION, generation)
        tokenizer.save(temporary)


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return write_safetensors(directory / WEIGHTS, tensors)
    place = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        place.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors one at a time, so that the peak is one tensor. OSError if the disk is full."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def atomic_directory(directory: str | Path):
    """A temporary directory beside the final one. It takes the final name when the block ends well, in
    place of an older model or adapter there, and vanishes when the block raises. BadInput if something else
    is in the way."""
    directory = Path(directory)
    ours = (directory / CONFIG).is_file() or (directory / ADAPTER).is_file()
    if directory.exists() and not ours and not (directory.is_dir() and not any(directory.iterdir())):
        raise BadInput(f"{directory}: holds something other than a model, choose a new name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            older = Path(f"{temporary}.old")
            directory.rename(older)
            temporary.rename(directory)
            shutil.rmtree(older)
        else:
            temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
