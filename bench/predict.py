"""What --dry-run promises, beside what then happens: tokens, time and memory of five runs.

    python bench/predict.py                        on the built-in model, minutes on two quiet cores
    python bench/predict.py --model DIR            the same five runs on another model, shorter ones
    python bench/predict.py --only sft grpo

Each run is started twice, with --dry-run and without, one after the other. The real time runs from the moment
at which settings.json is written, when the model is loaded and the work begins, to the end of the process.
The real memory is the process's peak. The last line is JSON: predicted / real for each run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.shared import ROOT, processor, rows

PROMISE = re.compile(r"dry run: .*?([\d,]+) tokens?.*? take (\d+):(\d\d):(\d\d) .*peak memory ([\d.]+) GB")
SFT = "train_sft.py --data gsm8k --limit 96 --validate 8 --batch 16 --epochs 1 --max-length 400"
RUNS = {  # name: options on the built-in model, on another one
    "sft_full": ("train_sft.py --data tiny --limit 400 --validate 32 --full", f"{SFT} --full"),
    "sft": ("train_sft.py --data tiny --limit 400 --validate 32 --lora", f"{SFT} --lora"),
    "grpo": ("train_grpo.py --limit 400 --steps 24",
             "train_grpo.py --data gsm8k --limit 60 --batch 4 --samples 4 --max-tokens 128 --steps 8 "
             "--evaluate 0"),
    "eval": ("eval.py --limit 500 --batch 64",
             "eval.py --data gsm8k --limit 200 --max-tokens 128 --batch 48"),
    "data": ("make_data.py --teacher self --limit 400 --samples 2",
             "make_data.py --data gsm8k --teacher self --limit 200 --samples 2 --max-tokens 128"),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny")
    p.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs")
    args = p.parse_args()
    print(f"{args.model}, {processor()}; predicted / real")
    found = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            words = [*RUNS[name][args.model != "tiny"].split(), "--model", args.model]
            told = promise(run([*words, "--dry-run"], Path(folder) / "dry"))
            real = measured(words, Path(folder) / "run")
        found[name] = {what: round(told[what] / real[what], 3) for what in real}
        texts = [f"{what} {told[what]:,.4g} / {real[what]:,.4g} = {ratio:.2f}"
                 for what, ratio in found[name].items()]
        print(f"{name:9} {'; '.join(texts)}", flush=True)
    print(json.dumps(found))


def run(words: list[str], out: Path) -> str:
    """What a script prints."""
    done = subprocess.run([sys.executable, *words, "--out", str(out)], cwd=ROOT, text=True, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout


def promise(said: str) -> dict[str, float]:
    tokens, hours, minutes, seconds, memory = PROMISE.search(said).groups()
    return {"tokens": int(tokens.replace(",", "")), "memory": float(memory),
            "seconds": 3600 * int(hours) + 60 * int(minutes) + int(seconds)}


def measured(words: list[str], out: Path) -> dict[str, float]:
    """Tokens, GB and seconds of a run."""
    process = subprocess.Popen([sys.executable, *words, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    ended = time.time()
    if status:
        raise SystemExit(f"{' '.join(words)}: exit {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"tokens": tokens(out), "memory": used.ru_maxrss * unit / 1e9,
            "seconds": ended - (out / "settings.json").stat().st_mtime}


def tokens(out: Path) -> int:
    """Trained on or sampled, as the script counts them."""
    kinds = {"answers": "tokens", "episodes": "tokens", "records": "tokens_out", "rejected": "tokens_out"}
    sampled = sum(row[field] for name, field in kinds.items() for row in rows(out / f"{name}.jsonl"))
    return sampled or sum(row.get("tokens", 0) for row in rows(out / "metrics.jsonl"))


if __name__ == "__main__":
    main()
