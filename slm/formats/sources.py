"""The published problem sets: where each comes from, and the file it becomes on this machine."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import requests
from tqdm import tqdm

from slm import BadInput
from slm.runs import files


@dataclass(frozen=True)
class Source:
    """Where a split comes from; without a sha256 (the publisher's bytes may change) `rows` is checked."""
    file: str
    url: str
    rows: int
    sha256: str | None = None


_GRADE = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
_QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data/"
_HUB = "https://huggingface.co/datasets/"
SOURCES = {
    "gsm8k": {
        "train": Source("gsm8k/train.jsonl", _GRADE + "train.jsonl", 7473,
                        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        "test": Source("gsm8k/test.jsonl", _GRADE + "test.jsonl", 1319,
                       "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")},
    "math": {  # all of MATH less MATH-500
        "train": Source("math/train.jsonl", "https://raw.githubusercontent.com/rasbt/math_full_minus_math500/main/"
                        "math_full_minus_math500.json", 12000)},
    "math500": {
        "test": Source("math500/test.jsonl", _HUB + "HuggingFaceH4/MATH-500/resolve/main/test.jsonl", 500)},
    "aime24": {
        "test": Source("aime24/test.jsonl", _QWEN + "aime24/test.jsonl", 30,
                       "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac")},
    "amc23": {
        "test": Source("amc23/test.jsonl", _QWEN + "amc23/test.jsonl", 40,
                       "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4")},
    "svamp": {
        "test": Source("svamp/test.jsonl", _QWEN + "svamp/test.jsonl", 1000,
                       "d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d")},
    "multiarith": {
        "test": Source("mawps/multiarith.jsonl", _QWEN + "mawps/multiarith.jsonl", 600,
                       "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951")},
    "mawps": {
        "test": Source("mawps/test.jsonl", _QWEN + "mawps/test.jsonl", 2065,
                       "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b")},
}


def find(source: Source) -> Path:
    """The local file of a source, downloaded into the cache when no folder has it."""
    cache = Path(os.path.expanduser(os.environ.get("SLM_CACHE") or "~/.cache/slm"), "data")
    for folder in (os.environ.get("SLM_DATA") or "data", "data", "../shared/data", cache):
        if (path := Path(folder, source.file)).is_file():
            return path
    if cache.parts[0] == "~":
        raise BadInput(f"{source.file}: this user has no home directory for it; set SLM_CACHE to a folder "
                       "for it, or SLM_DATA to one that holds it")
    try:
        return download(source, cache / source.file)
    except BadInput as e:
        raise BadInput(f"{e}; without a network, save {source.url} as data/{source.file}, or set SLM_DATA "
                       f"to a folder that holds {source.file}") from None


def download(source: Source, path: Path) -> Path:
    """Fetch source.url, going on where an earlier try stopped; `path` appears only after the checks. As for
    models, HF_ENDPOINT names a mirror of the hub, and HF_HUB_OFFLINE forbids downloads."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise BadInput(f"{source.file} is not here, and HF_HUB_OFFLINE forbids to download it")
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    source = replace(source, url=source.url.replace("https://huggingface.co", hub.rstrip("/")))
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        try:
            _fetch(source, part)
            break
        except requests.HTTPError as e:
            raise BadInput(f"{source.url} answered {e.response.status_code}") from None
        except requests.RequestException as e:
            if attempt == 2:
                raise BadInput(f"{source.url} cannot be reached ({type(e).__name__})") from None
    if wrong := _wrong(part, source):
        part.unlink()
        raise BadInput(f"{source.url} is not the expected file: {wrong}")
    os.replace(part, path)
    return path


def _fetch(source: Source, part: Path) -> None:
    """One try: append what `part` lacks, or start over where the server knows no ranges."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(source.url, headers=headers, stream=True, timeout=30) as reply:
        if reply.status_code == 416:  # nothing left to send
            return
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        total = have + int(reply.headers.get("Content-Length", 0))
        with part.open("ab" if have else "wb") as f, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=source.file) as bar:
            for block in reply.iter_content(1 << 16):
                bar.update(f.write(block))
    if part.stat().st_size < total:
        raise requests.ConnectionError("the connection closed early")


def _wrong(path: Path, source: Source) -> str | None:
    """What is wrong with a downloaded file, or None."""
    if source.sha256:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        return None if found == source.sha256 else f"sha256 {found[:12]}..., expected {source.sha256[:12]}..."
    try:
        rows = len(files.read_rows(path))
    except BadInput as e:
        return str(e)
    return None if rows == source.rows else f"{rows} rows, expected {source.rows}"
