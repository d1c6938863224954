"""Models in and out: Hugging Face directories (config.json, *.safetensors, tokenizer.json, ...), nothing
else.

    python -m slm.checkpoint export runs/grpo-tiny DIR      a run's result, merged, for vLLM and llama.cpp

A name is `tiny` (inside this package), a directory, or a hub id such as Qwen/Qwen2.5-Math-1.5B, which is
downloaded once. Weights are read one tensor at a time straight into their place, so the peak is the model
plus one tensor; pickles are never opened. Files appear under their final name only when they are complete.
"""

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors
from torch import nn

from slm import BadInput, lora
from slm.formats import configs, lora_files
from slm.formats.tensors import SafeTensors, atomic_directory, check_tensors, write_safetensors
from slm.model import Qwen2
from slm.runs import cli
from slm.runs.files import ADAPTER, CONFIG, base_of, read_json, write_json
from slm.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# ---- names to directories ----------------------------------------------------------------------------------

def resolve(name: str | Path) -> Path:
    """`tiny`, a directory or a hub id -> the directory that holds the model or adapter. BadInput if it is
    none of these, or not there and not to be had."""
    if str(name) == "tiny":
        return TINY
    path = Path(os.path.expanduser(str(name)))
    if os.path.isdir(path) and str(name):
        if not (path / CONFIG).is_file() and not (path / ADAPTER).is_file():
            places = (path / "adapter" / ADAPTER, path / "model" / CONFIG, *sorted(path.glob(f"*/{ADAPTER}")))
            inside = next((f"; try {p.parent}" for p in places if p.is_file()), "")
            raise BadInput(f"{path}: not a model, this directory has no {CONFIG} and no {ADAPTER}{inside}")
        return path
    if os.path.isfile(path):
        raise BadInput(f"{path}: a file, expected a Hugging Face directory, a hub id or 'tiny'")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return download(str(name))
    raise BadInput(f"{str(name)!r}: no such directory, expected one, or a hub id such as "
                   "Qwen/Qwen2.5-Math-1.5B, or 'tiny'")


def download(hub_id: str) -> Path:
    """The cached copy of a model on the hub, fetched first, with progress bars, if it is not there. Cache
    folder, mirror, token and offline mode are huggingface_hub's own: HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE."""
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
    the adapter, active under the name "default"; one that holds a model too loads that model alone.

    Where the config ties the head to the embedding and the weights have a head with other values, that head
    is used, with a note, as in transformers 5."""
    directory = resolve(name)
    if is_adapter(directory):
        base = base_of(directory)
        try:
            if is_adapter(resolve(base or "")):
                raise BadInput("an adapter, expected the model that it belongs to")
            model, tokenizer = load(base, device, dtype)
        except BadInput as e:
            raise BadInput(f"{directory / ADAPTER}: base_model_name_or_path {base!r}: {e}") from None
        lora_files.load(model, directory)
        return model, tokenizer
    config = configs.read(read_json(directory / CONFIG), str(directory / CONFIG))
    tokenizer = Tokenizer.load(directory)
    if tokenizer.largest >= config.vocab:
        raise BadInput(f"{directory}: the tokenizer has id {tokenizer.largest}, the model {config.vocab} ids")
    holder = tensor_files(directory)
    if config.tied and HEAD in holder and EMBEDDING in holder and not torch.equal(
            *(holder[name].read(name, dtype=dtype) for name in (EMBEDDING, HEAD))):
        print(f"note: {directory}: {CONFIG} ties the head to the embedding; {HEAD} is another, and is used",
              file=sys.stderr)
        config = replace(config, tied=False)
    with torch.device("meta"):
        model = Qwen2(replace(config, ids=tokenizer.largest + 1))
    read_weights(model, directory, holder, device, dtype)
    return model.eval(), tokenizer


def is_adapter(directory: Path) -> bool:
    weights = any((directory / name).is_file() for name in (WEIGHTS, INDEX))
    return (directory / ADAPTER).is_file() and not weights


def own_dtype(directory: Path) -> torch.dtype:
    """The dtype of a model's largest tensor on disk; of an adapter's base."""
    if is_adapter(directory):
        directory = resolve(base_of(directory) or "")
    file = SafeTensors(weight_files(directory)[0])
    return file.read(max(file.shapes, key=lambda name: math.prod(file.shapes[name]))).dtype


def read_weights(model: Qwen2, directory: Path, holder: dict[str, SafeTensors], device, dtype) -> None:
    """Fill a model that is on the meta device. holder: each tensor's name -> the file that holds it."""
    known_extra = {HEAD} if model.config.tied else set()
    found = {name: file.shapes[name] for name, file in holder.items()
             if name not in known_extra and not name.endswith("rotary_emb.inv_freq")}
    wanted = dict(model.named_parameters())
    check_tensors(directory, {name: tuple(p.shape) for name, p in wanted.items()}, found)
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        tensor = holder[name].read(name, device, dtype)
        model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))


def tensor_files(directory: Path) -> dict[str, SafeTensors]:
    """Name of each tensor -> the file that holds it; if several shards do, the one that the index names."""
    files = {path.name: SafeTensors(path) for path in weight_files(directory)}
    found = {name: file for file in files.values() for name in file.shapes}
    if WEIGHTS not in files:
        places = read_json(directory / INDEX)["weight_map"].items()
        found |= {name: files[place] for name, place in places if name in files[place].shapes}
    return found


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: the one, as in transformers even beside an index, which is then an
    older model's; else those that the index names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing or not shards:
            raise BadInput(f"{directory / INDEX}: names {', '.join(missing) or 'nothing'}, not there")
        return [directory / name for name in shards]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    hint = f"; {pickles[0]} is a pickle and is not opened, convert it first" if pickles else ""
    raise BadInput(f"{directory}: no {WEIGHTS} and no {INDEX}{hint}")


# ---- saving ------------------------------------------------------------------------------------------------

def save(model: Qwen2, tokenizer: Tokenizer, directory: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that this project and transformers load: weights in the model's dtype (in files of at
    most `shard_bytes` with an index), config, generation config with the stop ids, tokenizer, chat template.
    What the configs beside the tokenizer say beyond what we know is kept. The directory appears, or replaces
    an older one, when it is complete.
    """
    if lora.names(model):
        raise ValueError("the model has an adapter: merge it first, or write it with lora_files.save")
    origin = tokenizer.directory
    config = {key: value for key, value in read_json(origin / CONFIG, {}).items()
              if key not in ("rope_parameters", "rope_scaling", "dtype")}
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config |= configs.write(model.config) | {"torch_dtype": dtype}
    generation = read_json(origin / GENERATION, {}) | {"eos_token_id": sorted(tokenizer.stop_ids)}
    tensors = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    with atomic_directory(directory) as temporary:
        split = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
        for file, names in split.filename_to_tensors.items():
            write_safetensors(temporary / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(temporary / INDEX, index)
        write_json(temporary / CONFIG, config)
        write_json(temporary / GENERATION, generation)
        tokenizer.save(temporary)


def export(source: str | Path, directory: str | Path) -> None:
    """Write a run's result, an adapter with its base or a model as one directory, in the dtype that the base
    has on disk. An adapter is merged in float32, then rounded."""
    inside = (Path(source) / name for name in ("adapter", "model"))
    source = resolve(next((path for path in inside if path.is_dir()), source))
    dtype = own_dtype(source)
    model, tokenizer = load(source, dtype=dtype)
    for name in lora.names(model):
        print(f"merged {source}: logits change by at most {lora.merge(model, name):.1e}")
        lora.remove(model, name)
    save(model, tokenizer, directory)
    print(f"{directory}: {str(dtype).removeprefix('torch.')}; next: python eval.py --model {directory}\n"
          f"  or: vllm serve {directory}\n  or: python convert_hf_to_gguf.py {directory}  (of llama.cpp)")


if __name__ == "__main__":
    p = cli.parser("Write a run's result as one model directory, for transformers, vLLM or llama.cpp.")
    p.add_argument("what", choices=("export",))
    p.add_argument("source", help="a run directory, an adapter's, a model's, or a hub id")
    p.add_argument("out", help="the directory to write")
    cli.run(lambda args: export(args.source, args.out), p.parse_args())
