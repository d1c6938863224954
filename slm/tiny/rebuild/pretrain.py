"""Rebuild the built-in model: its tokenizer and its weights, from the corpus, with fixed seeds.

    python -m slm.tiny.rebuild.pretrain --out DIR               (LOG.md: how long it takes, on what)
    python -m slm.tiny.rebuild.pretrain --out DIR --resume      after a stop, to the same weights

The shape of the network, the stop ids and the chat template come from the built-in model's JSON files.

A Qwen2 of 2.6 million parameters reads documents of corpus.py, packed, under autocast to bfloat16. Muon
updates the matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW the rest. The learning
rate is flat in phase 1 and falls to 0 in phase 2, which reads MORE_CHATS. Every step draws its documents from
a seed of its own, so a resumed run reads what the first would have read. While a run is in phase 1 its
--steps may change. DIR gets the weights in bfloat16 every 50 steps.
"""

from pathlib import Path

from slm.runs import cli

if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder to write (default runs/tiny)")
    p.add_argument("--steps", type=cli.positive, default=3000,
                   help="optimizer steps; the last 2/5 are phase 2 (default 3000)")
    p.add_argument("--seed", type=int, default=1, help="corpus and initialization (default 1)")
    p.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    args = p.parse_args()  # before the heavy imports, so that --help answers at once

import contextlib
import math
import re
import shutil
import time
from itertools import islice

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slm import BadInput, prompts
from slm.attention import Packed
from slm.formats import configs
from slm.model import Qwen2
from slm.runs.files import read_json
from slm.tiny.rebuild.corpus import KINDS, MORE_CHATS, documents

TOKENS = 2048               # a step
MUON, ADAM = 0.015, 0.003  # learning rates
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY = Path(__file__).parents[1]
CONFIG = configs.read(read_json(TINY / "config.json"))
# Qwen2.5's pre-tokenizer: words with their space, digits one by one, punctuation, line breaks
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def build_tokenizer(out: Path) -> None:
    """Train a byte-level BPE on the corpus and the project's prompts; write it to `out`."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG.vocab - len(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = [re.sub(r"<\|.*?\|>", "", text) for text in islice(documents(0), 5000)]
    asked = [p.text for p in vars(prompts).values() if isinstance(p, prompts.Prompt)]
    t.train_from_iterator(texts + 20 * asked, trainer)
    t.add_special_tokens(SPECIAL)
    t.save(str(out / "tokenizer.json"))


class Exact(Packed):
    """Attention in float32: its backward pass in bfloat16 is nine times slower on a CPU with AMX."""

    def __call__(self, layer: int, q, k, v):
        with torch.autocast("cpu", enabled=False):
            return super().__call__(layer, q.float(), k.float(), v.float())


def batch(bpe, texts) -> list[list[int]]:
    """The ids of documents, TOKENS in all: the last one is cut. (In bfloat16 every new number of tokens makes
    oneDNN compile its kernels again, which took longer than the step itself.)"""
    pack, room = [], TOKENS
    while room:
        pack.append(bpe.encode(next(texts)).ids[:room])
        room -= len(pack[-1])
    return pack


def learning_rate(step: int, first: int, steps: int) -> float:
    """A factor: up over the first 2 %, flat in phase 1, down to 0 in phase 2, which begins at `first`."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (steps - first))


def save(model, optimizers, step: int, args) -> None:
    """The weights in bfloat16, and everything that --resume needs."""
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    torch.save({"step": step, "seed": args.seed, "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers]}, args.out / "state.new")
    (args.out / "state.new").replace(args.out / "state.pt")


def resume(model, optimizers, args) -> int:
    """The steps that were done; model and optimizers get their values."""
    if not (args.out / "state.pt").exists():
        raise BadInput(f"{args.out / 'state.pt'}: no such file; expected the state of a run to resume")
    state = torch.load(args.out / "state.pt")
    if state["seed"] != args.seed:
        raise BadInput(f"{args.out}: began with --seed {state['seed']}; expected the same to resume")
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(values)
    return state["step"]


def train(model, args) -> None:
    bpe = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=MUON, weight_decay=0.01, momentum=0.95),
                  torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    done, first = resume(model, optimizers, args) if args.resume else 0, args.steps * 3 // 5
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps of {TOKENS} tokens")
    start, seen = time.time(), 0
    for step in range(done, args.steps):
        for optimizer, rate in zip(optimizers, (MUON, ADAM)):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(step, first, args.steps)
        pack = batch(bpe, documents(f"{args.seed} {step}", KINDS if step < first else MORE_CHATS))
        ids = torch.tensor([i for row in pack for i in row])
        attend = Exact([len(row) for row in pack])
        last = attend.bounds[1:].long() - 1
        target = ids.roll(-1)
        target[last] = -100  # a document's last token predicts nothing
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(model(ids, attend.positions, attend))
        loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += len(ids)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            save(model, optimizers, step + 1, args)
            rate = seen / (time.time() - start)
            print(f"step {step + 1} loss {loss.item():.4f} tokens/s {rate:.0f} "
                  f"left {(args.steps - step - 1) * TOKENS / rate / 60:.1f} min", flush=True)


def initialize(model) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            deep = math.sqrt(2 * CONFIG.layers) if last else 1
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5 / deep)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def main(args) -> None:
    model = Qwen2(CONFIG)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in "config.json", "generation_config.json", "tokenizer_config.json":
        with contextlib.suppress(shutil.SameFileError):
            shutil.copy(TINY / name, args.out)
    if not args.resume:
        build_tokenizer(args.out)
    initialize(model)
    train(model, args)


if __name__ == "__main__":
    cli.run(main, args)
