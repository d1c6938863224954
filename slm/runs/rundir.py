"""A run directory: its settings, its log, its newest checkpoint.

    settings.json     resolved settings, command, versions, fingerprint of the data
    metrics.jsonl     one line a step          episodes.jsonl   what was sampled and what it earned (GRPO)
    report.html       the run as a page, written while it goes on
    checkpoints/      step-000123/: trained tensors, optimizer, step; the newest one only
    adapter/ or model/  the result: PEFT format, or a Hugging Face directory

Everything random in step n is seeded from (seed, n), so a checkpoint needs no generator state and a resumed
run repeats the bits of an unbroken one (on CPU with the same number of threads; CUDA kernels may differ in
the last bit).
"""

import errno
import fcntl
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from slm import BadInput
from slm.report import Live
from slm.runs.files import Journal, read_json, write_json
from slm.runs.ranks import barrier, rank

CHECKPOINTS = "checkpoints/step-*[0-9]"  # a half-written one ends in .tmp


class RunDir:
    """One run's folder, claimed by its process until `lock` is closed or the process ends.

    A new run refuses a folder that holds rows of another. resume=True goes on with that run and refuses other
    settings or data. goes_on=True is for data that is collected: the run resumes by itself where there are
    rows, and its data may have grown. log=False: this process only reads, and saves its part of checkpoints.
    """

    FREE = frozenset({"dry_run", "out", "resume", "rollouts", "save_every"})  # may change when a run goes on

    def __init__(self, path, settings: dict, data: str = "", resume: bool = False, log: bool = True,
                 goes_on: bool = False):
        self.path, self.log_here, self.journals = Path(path), log, {}
        self.page = Live(self.path)
        self.checkpoints = self.path / "checkpoints"
        for place in (self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                raise BadInput(f"--out {self.path}: a file stands where the folder would be")
        old = read_json(self.path / "settings.json", {})
        begun = bool(old) and any(rows.stat().st_size for rows in self.path.glob("*.jsonl"))
        self.resumed = resume or (goes_on and begun)
        if self.resumed:
            self._compare(old, settings, data if resume else old["data"])
        elif begun:
            raise BadInput(f"{self.path} holds a run already: continue it with --resume, or change --out")
        if log:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # /proc
                raise BadInput(f"--out {self.path}: no folder can be made there; choose another") from None
            self.lock = (self.path / "lock").open("a")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadInput(f"{self.path}: in use by another process; wait or choose another "
                               "--out") from None
        if log and not self.resumed:
            write_json(self.path / "settings.json", {
                "settings": settings, "data": data, "command": shlex.join(sys.argv), "versions": versions(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S")})

    def _compare(self, old: dict, settings: dict, data: str) -> None:
        if not old:
            raise BadInput(f"--resume: {self.path} holds no run to continue (no settings.json)")
        now = json.loads(json.dumps(settings))
        if now.keys() - self.FREE != old["settings"].keys() - self.FREE:
            raise BadInput(f"{self.path} is a run of another script, or of another version of this one: "
                           f"{old['command']}")
        for name in sorted(now.keys() - self.FREE):
            was, is_now = (" ".join(str(x[name]).split()) for x in (old["settings"], now))
            if now[name] != old["settings"][name]:
                raise BadInput(f"{self.path} was run with {name}={was}, now it is {is_now}; use the same "
                               f"(--resume --out {self.path} takes them), or another --out")
        if data != old["data"]:
            raise BadInput(f"the data changed since {self.path} was started (fingerprint {old['data']}, now "
                           f"{data}); use the same, or another --out")

    def journal(self, name: str) -> Journal:
        """The folder's <name>.jsonl."""
        if name not in self.journals:
            self.journals[name] = Journal(self.path / f"{name}.jsonl", self.page.refresh)
        return self.journals[name]

    def log(self, name: str, *rows: dict) -> None:
        """Append rows to <name>.jsonl. A trainer's rows have a `step`, since load() cuts by it."""
        if self.log_here and rows:
            self.journal(name).append(*rows)

    def load(self, device="cpu") -> dict | None:
        """The newest checkpoint's state, or None; log lines of later steps are cut away."""
        found = sorted(self.path.glob(CHECKPOINTS))
        state = None
        if found:
            file = found[-1] / f"rank{rank()}.pt"
            try:
                state = torch.load(file, map_location=device, weights_only=True)
            except Exception as e:  # a damaged file fails in many ways
                raise BadInput(f"{file} is not a readable checkpoint ({e}); remove its folder") from None
        last = state["step"] if state else -1  # what is measured before the first step is step 0
        for rows in self.path.glob("*.jsonl") if self.log_here else ():
            self.journal(rows.stem).keep(lambda row: row["step"] <= last)
        return state

    def save(self, state: dict) -> None:
        """Write checkpoints/step-N, N = state["step"]: a temporary name first; drop older ones."""
        final = self.checkpoints / f"step-{state['step']:06d}"
        part = final.with_name(final.name + ".tmp")
        part.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(state, part / f"rank{rank()}.pt")
        except RuntimeError as e:  # what PyTorch makes of a full disk
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(errno.ENOSPC, "no room for a checkpoint", str(part)) from e
        barrier()
        if self.log_here:
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in self.checkpoints.glob("step-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        barrier()


def new_path(out: str | None, default: str) -> str:
    """--out, or the first free one of runs/<default>, runs/<default>-2, ..."""
    n, path = 1, Path("runs") / default
    while not out and path.exists():
        n, path = n + 1, path.with_name(f"{default}-{n + 1}")
    return out or str(path)


def name_of(model: str) -> str:
    """What a run calls its model: grpo-tiny for runs/grpo-tiny/adapter, else the last part of the name."""
    folder = Path(model)
    return folder.parent.name if folder.name in ("adapter", "model", "best") else folder.name


def versions() -> dict:
    """Python, PyTorch and the commit of this checkout where there is one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                timeout=5, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit}
