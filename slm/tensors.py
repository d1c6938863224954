"""Safetensors files, read and written one tensor at a time; folders that appear whole or not at all.

A safetensors file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin,
end]}}, then the data (huggingface.co/docs/safetensors, "Format"). We read and write it here and not with the
library: mapped pages count twice while a tensor is converted, the library's writer copies the whole model,
and neither names a cut file or a full disk as such.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import uuid
from pathlib import Path

import torch

from slm import BadInput

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CONFIG, ADAPTER = "config.json", "adapter_config.json"  # the file that makes a folder a model, an adapter


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
            self.spans = {}  # name -> first byte, byte after the last one
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                self.spans[name] = 8 + length + begin, 8 + length + end
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


def check_tensors(where: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """BadInput that lists every missing, unexpected and wrongly shaped tensor at once."""
    faults = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    faults += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in wanted]
    faults += [f"{name} is {found[name]}, expected {shape}" for name, shape in wanted.items()
               if found.get(name, shape) != shape]
    if faults:
        raise BadInput(f"{where}: {len(faults)} tensors do not fit the config: {'; '.join(faults)}")


@contextlib.contextmanager
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
