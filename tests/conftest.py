"""Fixtures that every test may use. Nothing here needs a network, a GPU or a file outside the repository."""

import os
from pathlib import Path

import pytest
import torch
from small import write_small

from slm import checkpoint
from slm.model import Config, Qwen2

torch.set_num_threads(1)  # two pytest workers share two cores


@pytest.fixture
def tiny():
    """The built-in model and its tokenizer, float32 on the CPU, loaded anew for every test."""
    return checkpoint.load("tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a random model of two layers, for the tests of the trainers."""
    return write_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def random_model():
    """random_model(**config) -> a small Qwen2 with random weights, the same for the same config."""
    def build(seed: int = 0, dtype=torch.float32, **config) -> Qwen2:
        shape = {"vocab": 97, "hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "kv_heads": 2,
                 "head_size": 8, "positions": 512, "rope_theta": 1e4} | config
        torch.manual_seed(seed)
        model = Qwen2(Config(**shape))
        for name, p in model.named_parameters():  # norms and biases too, so that leaving one out is seen
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
        return model.to(dtype).eval()
    return build


@pytest.fixture
def real_model():
    """real_model(name) -> its folder of real weights under $SLM_REAL_MODELS; skips without it."""
    def find(name: str) -> Path:
        folder = Path(os.environ.get("SLM_REAL_MODELS", "")) / name
        if not os.environ.get("SLM_REAL_MODELS") or not (folder / "config.json").is_file():
            pytest.skip(f"set SLM_REAL_MODELS to the folder that holds {name}")
        return folder
    return find
