"""A random model of two layers with the built-in tokenizer, as a directory; for the tests of the trainers."""

import torch

from slm import checkpoint
from slm.model import Config, Qwen2
from slm.tokenizer import Tokenizer


def write_small(folder):
    tokenizer = Tokenizer.load(checkpoint.TINY)
    torch.manual_seed(0)
    model = Qwen2(Config(vocab=1280, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2,
                         head_size=8, positions=256, rope_theta=1e4))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():  # even and odd ids differ, so that an easy reward can be learned
        model.model.embed_tokens.weight[::2, 0] += 0.35
    checkpoint.save(model, tokenizer, folder)
    return str(folder)
