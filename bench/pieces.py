"""What each piece of the sampler's machinery saves: the same work with the piece on and off, in one process.

    python bench/pieces.py                                        the built-in model, float32
    python bench/pieces.py --model DIR --data gsm8k --dtype bfloat16 --prompts 48 --tokens 96
    python bench/pieces.py --model DIR --data gsm8k --dtype bfloat16 --prompts 4 --batch 1 --adapter 16

On and off take turns, --repeat times, and every run answers the same prompts; the figure is the median of the
ratios of tokens a second, on over off, with its range. A line says so if a piece changed a reply (products of
other shapes round differently). Recordings, fused kernels and flash attention need a GPU and are left out
elsewhere. The last line is JSON.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from slm import checkpoint, lora, problems
from slm.episode import Request, Sampling
from slm.prompts import SOLVER
from slm.runs import cli
from slm.sampling import Sampler, fast, slots
from slm.sampling.fast import Joint, Plain


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("--model", default="tiny", help="tiny, a directory or a hub id")
    p.add_argument("--data", default="tiny", help="where the prompts come from, as for eval.py")
    p.add_argument("--prompts", type=cli.positive, default=64)
    p.add_argument("--samples", type=cli.positive, default=1, help="samples of each prompt")
    p.add_argument("--tokens", type=cli.positive, default=96, help="new tokens at most")
    p.add_argument("--batch", type=cli.positive, help="rows decoded together; default: the sampler's own")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--adapter", type=cli.positive, help="sample with a LoRA adapter of this rank")
    p.add_argument("--repeat", type=cli.positive, default=5)
    p.add_argument("--only", nargs="+", help="pieces to measure; default: all that this device has")
    return p.parse_args()


# ---- each piece, switched off ------------------------------------------------------------------------------

def layer_by_layer(joint: Joint, x, chosen):
    """Joint weights off: a product for each layer."""
    parts = [F.linear(x, layer.weight, layer.bias) for layer in joint.layers]
    y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return y if chosen is None or not joint.room else low(joint, x, y)


def apart(joint: Joint, x, chosen):
    """The adapter behind the weights off: A x is a product of its own."""
    y = fast.product(x, *joint.base)
    return y if chosen is None or not joint.room else low(joint, x, y)


def low(joint: Joint, x, y):
    return y.addmm_(F.linear(x, joint.weight[joint.size:]), joint.B.t())


def without(piece: str, sampler: Sampler):
    """A block in which this piece is off."""
    owner, attribute, replacement = {
        "the network rearranged": (sampler, "network", Plain(sampler.model)),
        "joint weights": (Joint, "__call__", layer_by_layer),
        "adapter behind the weights": (Joint, "__call__", apart),
        "products by columns": (fast, "by_columns", never),
        "small adapter products in float32": (fast, "SMALL", 0),
        "one thread for a small model": (sampler, "small", False),
        "drafts": (sampler, "drafts", None),
        "prefix copies": (slots.Slots, "shared", nothing_shared),
        "recordings": (sampler, "recorded", None)}[piece]
    return mock.patch.object(owner, attribute, replacement)


def never(x) -> bool:
    return False


def nothing_shared(self, row, rows):
    return None, 0


PIECES = ["the network rearranged", "joint weights", "products by columns", "one thread for a small model",
          "drafts", "prefix copies", "adapter behind the weights",
          "small adapter products in float32", "recordings"]


# ---- the measurement ---------------------------------------------------------------------------------------

def run(sampler: Sampler, requests: list[Request]) -> tuple[float, list]:
    """(tokens a second, ids of all replies)"""
    sampler.forget()
    start = time.perf_counter()
    replies = [reply.ids for group in sampler.generate(requests, progress=False) for reply in group]
    return sum(map(len, replies)) / (time.perf_counter() - start), replies


def main(args) -> None:
    model, tokenizer = checkpoint.load(args.model, args.device, getattr(torch, args.dtype))
    if args.adapter:
        lora.add(model, r=args.adapter)
        for p in lora.parameters(model):
            torch.nn.init.normal_(p, std=1e-4)
    found = problems.load(args.data, "test", args.prompts)
    temperature = 1.0 if args.samples > 1 else 0.0
    requests = [Request([{"role": "user", "content": SOLVER(question=p.question)}],
                        Sampling(args.tokens, temperature), n=args.samples) for p in found]
    sampler = Sampler(model, tokenizer, max_batch=args.batch)
    run(sampler, requests)
    pieces = [name for name in args.only or PIECES
              if (name != "recordings" or sampler.recorded) and ("adapter" not in name or args.adapter)]
    table = {}
    for name in pieces:
        ratios = []
        for turn in range(args.repeat):
            for piece_on in (True, False) if turn % 2 else (False, True):
                with contextlib.nullcontext() if piece_on else without(name, sampler):
                    sampler.network.refresh()
                    rate, ids = run(sampler, requests)
                if piece_on:
                    on, replies = rate, ids
                else:
                    off, others = rate, ids
            ratios.append(on / off)
        table[name] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)],
                       "tokens_per_s": on, "same": replies == others}
        low, high = table[name]["range"]
        print(f"{name:36}{100 * (table[name]['ratio'] - 1):+7.1f} %  ({100 * (low - 1):+.1f} to "
              f"{100 * (high - 1):+.1f}), {on:,.0f} tokens/s{'' if replies == others else ', other replies'}",
              flush=True)
    start = time.perf_counter()
    for _ in range(20):
        sampler.network.refresh()
    look = (time.perf_counter() - start) / 20
    print(f"the look at all weights' versions before a batch of requests: {1e3 * look:.2f} ms")
    print(json.dumps({"model": args.model, "dtype": args.dtype, "prompts": args.prompts, "batch": args.batch,
                      "adapter": args.adapter, "threads": torch.get_num_threads(), "look_ms": 1e3 * look,
                      "pieces": table}))


if __name__ == "__main__":
    cli.run(main, arguments())
