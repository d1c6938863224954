"""Qwen2 over packed tokens, and the two models that are nearly the same: Llama and Qwen3.

The same weights are trained, sampled from and used as their own reference. It reads T tokens in a row: one
sequence stands behind the other, without padding, and each token has a position inside its own sequence.

    x = embed[ids]                                              (T, D)
    for every layer:
        h = x + W_o attend(rope(W_q n), rope(W_k n), W_v n)     n = norm(x)
        x = h + W_down (silu(W_gate m) * W_up m)                m = norm(h)
    logits = head norm(x)                                       (T, V)

* norm: RMSNorm, x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)
* rope: rotary position embedding, see `rope` and `rotate` (Su et al. 2021, arXiv:2104.09864, eq. 34)
* grouped-query attention: H / K query heads share a key/value head (Ainslie et al. 2023, arXiv:2305.13245)
* SwiGLU feed-forward, silu(x) = x sigmoid(x) (Shazeer 2020, arXiv:2002.05202, eq. 6)
* the whole: biases on q, k and v only; small models use the embedding as their head (Qwen2, arXiv:2407.10671)
* Llama has no biases (arXiv:2302.13971); 3.1 and later turn slowly where angles turn slowly (`rope`)
* Qwen3 has no biases, and a norm over each head's query and key before rope (arXiv:2505.09388, section 2)

The model does not decide which tokens see each other. `attend` does: it is an object of attention.py that
knows where sequences begin and end (slm/sampling has some that read a cache). Parameters have the names of
Hugging Face checkpoints. Not covered: sliding windows, other rope scaling, attention dropout; checkpoint.py
refuses the first two by name.

Shapes: T tokens, D hidden size, H query heads, K key/value heads, E head size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The shape of a model. positions: the longest context. tied: the head is the embedding. bias: q, k and v
    have biases. head_norm: Qwen3's norms of queries and keys. rope_scaling: Llama 3's factor, its low and
    high bounds, and the old context. ids: how many ids the tokenizer has. Qwen's embedding has more rows;
    nothing trains those behind, so they get no logits and nobody can draw them."""
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int = 32768
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True
    bias: bool = True
    head_norm: bool = False
    rope_scaling: tuple[float, float, float, int] | None = None
    ids: int | None = None


def rope(positions: Tensor, c: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (T,) -> cosines and sines, each (T, 1, E), of the angles position * theta^(-2i/E).

    i runs from 0 to E/2 - 1; the E/2 angles stand there twice, and the sines of the first half are negated,
    as `rotate` wants them. The angles are float32 whatever dtype the model has: bfloat16 would round position
    4,095 to 4,096. Llama 3.1 divides the frequencies that turn fewer than `low` times in the old context by
    `factor`, leaves those that turn more than `high` times, and mixes both in between.
    """
    frequency = 1.0 / c.rope_theta ** (
        torch.arange(0, c.head_size, 2, device=positions.device).float() / c.head_size)
    if c.rope_scaling:
        factor, low, high, context = c.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions.float()[:, None, None] * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) of x (T, heads, E) by their angles. (The paper pairs neighbours; the
    weights of Hugging Face's checkpoints are laid out for these pairs.)"""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    """index: which layer this is; a cache keeps the keys and values of each layer apart."""

    def __init__(self, c: Config, index: int):
        super().__init__()
        self.index, self.head_size = index, c.head_size
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_size, bias=c.bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_size, bias=c.bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_size, bias=c.bias)
        self.o_proj = nn.Linear(c.heads * c.head_size, c.hidden, bias=False)
        if c.head_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_size, c.norm_eps), RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))   # (T, H, E)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_size))   # (T, K, E)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self.index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, index), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """recompute: None, or what torch.utils.checkpoint calls `context_fn` (lora.recompute makes one). Then the
    backward pass keeps each layer's input only and computes the rest again: about a third more time, and the
    activations of one layer instead of all."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.recompute: Callable | None = None
        # nn.Embedding's own normal_ would import PyTorch's compiler on the meta device: 1.4 s at every start
        embeddings = torch.empty(config.vocab, config.hidden).uniform_(-0.1, 0.1)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(embeddings, freeze=False),
            "layers": nn.ModuleList(Layer(config, i) for i in range(config.layers)),
            "norm": RMSNorm(config.hidden, config.norm_eps)})
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        """ids (T,), positions (T,) -> hidden states after the last norm (T, D).

        They are not logits: those would be the largest tensor of all, (T, V), and nobody needs them of all
        tokens at once. `logits` makes them of some.
        """
        x = self.model.embed_tokens(ids)
        cos, sin = rope(positions, self.config, x.dtype)
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, context_fn=self.recompute)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> (N, V) in the model's dtype, V the ids of the tokenizer."""
        if self.config.tied:
            return F.linear(hidden, self.model.embed_tokens.weight[:self.config.ids])
        return self.lm_head(hidden)[:, :self.config.ids]
