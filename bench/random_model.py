"""Random weights of Qwen2.5-1.5B's shape, to measure speed where the real ones are not at hand.

    python bench/random_model.py DIR --tokenizer QWEN_DIR     QWEN_DIR: tokenizer.json and its configs
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from slm import checkpoint
from slm.model import Config, Qwen2
from slm.runs import cli
from slm.tokenizer import Tokenizer

SHAPE = Config(vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_size=128)


def main(args) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(args.tokenizer)
    model = Qwen2(SHAPE).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.1 if p.dim() == 1 else 0.02)
    checkpoint.save(model, tokenizer, args.directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} random parameters in {args.directory}")


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    cli.run(main, parser.parse_args())
