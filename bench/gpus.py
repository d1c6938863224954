"""What the report's runs need on a GPU, by arithmetic: README's table.

    python bench/gpus.py

Qwen2.5-Math-1.5B in bfloat16: SFT on a record for each problem of GSM8K and MATH, two epochs, LoRA of rank 16
on all linear layers, or all weights; GRPO on GSM8K, one epoch, two samples a problem; GSM8K's test split.
Memory is the formula of slm/runs/forecast.py. Time is work over rate. For each token of training, frozen
weights take 4 N operations, trained ones 6 N (N parameters), at 35 % of the card's dense bfloat16 rate: no
run of ours on a GPU has shown that. Sampling reads weights and live cache once a round, at 29 % of the
card's bandwidth: 256 requests reached that on an H200 (RESULTS.md, Sampler).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.random_model import SHAPE
from slm import lora
from slm.model import Qwen2
from slm.runs import cli, forecast

CARDS = {  # GB, dense bfloat16 TFLOP/s, GB/s: their makers' figures
    "RTX 3060": (12, 51, 360), "RTX 4090": (24, 165, 1008), "L4": (24, 121, 300),
    "A100 40 GB": (40, 312, 1555), "H100": (80, 989, 3350), "H200": (141, 989, 4800)}
ROWS, TOKENS, PROMPT = 19_473, 450, 150  # of GSM8K and MATH; a record's tokens, a prompt's
REPLY, ROWS_AT_ONCE, MICRO = 300, 256, 2048


def main() -> None:
    frozen, full = shape(), shape(full=True)
    size = sum(p.numel() for p in full.parameters())  # the embedding too: it is also the head
    sft, sampled, learned = 2 * ROWS * TOKENS, 7_473 * 2 * REPLY, 7_473 * 2 * (REPLY + PROMPT)
    print("| GPU | SFT, LoRA: GB, hours | SFT, full: GB, hours | GRPO: GB, hours | evaluation: minutes |\n"
          "| --- | --- | --- | --- | --- |")
    for name, (room, rate, bandwidth) in CARDS.items():
        second = 0.35 * rate * 1e12  # operations
        cells = [cell(forecast.needs(frozen, MICRO), room, sft * 4 * size / second),
                 cell(forecast.needs(full, MICRO), room, sft * 6 * size / second)]
        draws = sampled / speed(size, bandwidth, 32)
        learns = learned * (4 + 2) * size / second  # 2 N for the reference's log-probs
        cached = ROWS_AT_ONCE * (PROMPT + REPLY)
        cells.append(cell(forecast.needs(frozen, MICRO, cached), room, draws + learns))
        evaluated = 1319 * REPLY / speed(size, bandwidth, ROWS_AT_ONCE)
        print(f"| {name} | {' | '.join(cells)} | {evaluated / 60:.1f} |")


def shape(full: bool = False) -> Qwen2:
    """The model without its memory; with all weights trained it is in float32."""
    with torch.device("meta"):
        model = Qwen2(SHAPE)
        model = model if full else model.bfloat16()
    model.recompute = None
    if not full:
        lora.add(model, 16, 32)
    return model


def speed(size: int, bandwidth: float, rows: int) -> float:
    """Tokens a second of sampling."""
    cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_size * 2 * (PROMPT + REPLY / 2) * rows
    return rows * 0.29 * bandwidth * 1e9 / (2 * size + cache)


def cell(parts: dict[str, float], room: float, seconds: float) -> str:
    peak = (sum(parts.values()) - min(parts["activations"], parts["or cache"])) / 1e9
    return f"{peak:.0f}, {seconds / 3600:.1f}" if peak + 1 < room else f"{peak:.0f}: too much"


if __name__ == "__main__":
    cli.run(lambda args: main(), cli.parser(__doc__).parse_args())
