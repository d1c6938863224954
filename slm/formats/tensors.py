"""Safetensors files, read one tensor at a time; folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slm import BadInput
from slm.runs.files import ADAPTER, CONFIG

DTYPES = ("F32", "BF16", "F16", "F64")


class SafeTensors:
    """A safetensors file: the `shapes` of its tensors by name, and `read` for one of them. BadInput if the
    file is cut, is not of this format, or holds something other than floating-point numbers."""

    def __init__(self, path: Path):
        self.path, self.shapes = path, {}
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    if tensor.get_dtype() not in DTYPES:
                        raise BadInput(f"{path}: {name} is {tensor.get_dtype()}, expected one of "
                                       f"{', '.join(DTYPES)}")
        except SafetensorError as e:
            raise BadInput(f"{path}: not a safetensors file, or one that was cut short ({e})") from None

    def read(self, name: str, device="cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, by default in the dtype that it is stored in. The library maps the file into memory.
        Opened for each tensor anew, it never counts more than one as ours."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).to(device, dtype, copy=True)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors without a copy of those that lie on the CPU. OSError if the disk is full."""
    try:
        save_file(tensors, path, {"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as e:
        raise OSError(errno.ENOSPC, str(e), str(path)) from e


def misfits(wanted: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """The wrongly shaped, missing and unexpected tensors, a phrase each."""
    faults = [f"{name} is {found[name]}, expected {shape}" for name, shape in wanted.items()
              if found.get(name, shape) != shape]
    faults += [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    return faults + [f"unexpected {name} {shape}" for name, shape in found.items() if name not in wanted]


def check_tensors(where: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """BadInput that counts the misfits, and lists the first 20."""
    if faults := misfits(wanted, found):
        shown = "; ".join(faults[:20] + ["..."] * (len(faults) > 20))
        raise BadInput(f"{where}: {len(faults)} tensors do not fit the config: {shown}")


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
    temporary, older = (directory.parent / f".{directory.name}.{part}" for part in ("part", "old"))
    for left in (temporary, older):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            directory.rename(older)
        temporary.rename(directory)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
