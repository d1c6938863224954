"""Rebuild the built-in model: its tokenizer and its weights, from the corpus, with fixed seeds.

    python -m slm.tiny.rebuild.pretrain --out slm/tiny        (LOG.md: how long it takes, on what)

The shape of the network, the stop ids and the chat template come from the built-in model's JSON files.

A Qwen2 of 2.6 million parameters reads documents of corpus.py, packed, in float32. Muon updates the matrices
(Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW the rest; the weights are stored in bfloat16.
"""

from pathlib import Path

from slm.runs import cli

if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder to write (default runs/tiny)")
    p.add_argument("--steps", type=cli.positive, default=1100,
                   help="optimizer steps of phase 1; phase 2 has 3/8 of it (default 1100)")
    p.add_argument("--seed", type=int, default=1, help="corpus and initialization (default 1)")
    args = p.parse_args()  # before the heavy imports, so that --help answers at once

import contextlib
import math
import re
import shutil
import time
from itertools import islice

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slm import checkpoint, prompts
from slm.attention import Packed
from slm.model import Qwen2
from slm.runs.files import read_json
from slm.tiny.rebuild.corpus import MORE_CHATS, documents

TOKENS = 8192             # a step, about
MUON, ADAM = 0.02, 0.004  # learning rates
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY = Path(__file__).parents[1]
CONFIG = checkpoint.read_config(read_json(TINY / "config.json"))
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
    texts = [re.sub(r"<\|.*?\|>", "", text) for text in islice(documents(0), 20000)]
    asked = [p.text for p in vars(prompts).values() if isinstance(p, prompts.Prompt)]
    t.train_from_iterator(texts + 20 * asked, trainer)
    t.add_special_tokens(SPECIAL)
    t.save(str(out / "tokenizer.json"))


def batches(bpe, texts):
    """Packs of whole documents, each of about TOKENS tokens: lists of id lists."""
    pack, size = [], 0
    for text in texts:
        pack.append(bpe.encode(text).ids)
        size += len(pack[-1])
        if size >= TOKENS:
            yield pack
            pack, size = [], 0


def learning_rate(step: int, steps: int, decay: float) -> float:
    """A factor: up over the first 2 %, flat, then down to 0 over the last share `decay` of the steps."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (decay * steps))


def train(model, texts, out: Path, steps: int, peak: float, decay: float) -> None:
    """One phase of `steps` steps, then the weights in bfloat16; peak scales both learning rates."""
    bpe = Tokenizer.from_file(str(out / "tokenizer.json"))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=MUON, weight_decay=0.01, momentum=0.95),
                  torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {TOKENS} tokens")
    start, seen = time.time(), 0
    for step, pack in zip(range(steps), batches(bpe, texts)):
        for optimizer, rate in zip(optimizers, (MUON, ADAM)):
            optimizer.param_groups[0]["lr"] = rate * peak * learning_rate(step, steps, decay)
        ids = torch.tensor([i for row in pack for i in row])
        attend = Packed([len(row) for row in pack])
        last = attend.bounds[1:].long() - 1
        target = ids.roll(-1)
        target[last] = -100  # a document's last token predicts nothing
        loss = F.cross_entropy(model.logits(model(ids, attend.positions, attend)), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += len(ids)
        if step % 50 == 0 or step == steps - 1:
            rate = seen / (time.time() - start)
            print(f"step {step} loss {loss.item():.4f} tokens/s {rate:.0f} "
                  f"left {(steps - step) * TOKENS / rate / 60:.1f} min", flush=True)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


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
    build_tokenizer(args.out)
    initialize(model)
    train(model, documents(args.seed), args.out, args.steps, peak=1.0, decay=0.4)
    model.load_state_dict(load_file(args.out / "model.safetensors"))  # rounded to bfloat16
    train(model, documents(args.seed + 1, MORE_CHATS), args.out, args.steps * 3 // 8, peak=0.5, decay=0.95)


if __name__ == "__main__":
    cli.run(main, args)
