"""Qwen2 over packed tokens.

One module is trained, sampled from and used as its own reference. It sees T tokens in a row, one sequence
behind the other without padding, each token with its position inside its own sequence:

    x = embed[ids]                                              (T, D)
    for every layer:
        h = x + W_o attend(rope(W_q n), rope(W_k n), W_v n)     n = norm(x)
        x = h + W_down (silu(W_gate m) * W_up m)                m = norm(h)
    logits = head norm(x)                                       (T, V)

* norm: RMSNorm, x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)
* rope: rotary position embedding, see `rope` and `rotate` (Su et al. 2021, arXiv:2104.09864, eq. 34)
* grouped-query attention: H / K query heads share a key/value head (Ainslie et al. 2023, arXiv:2305.13245)
* SwiGLU feed-forward, silu(x) = x sigmoid(x) (Shazeer 2020, arXiv:2002.05202, eq. 6)
* the whole: biases on q, k and v only; small models tie the head to the embedding (Qwen2, arXiv:2407.10671)

Who may look at whom is not decided here: `attend` is an object of attention.py that knows where sequences
begin and end, with or without a cache. Parameter names are those of Hugging Face checkpoints. Not covered:
sliding windows, rope scaling, attention dropout; `Config.from_hf` refuses the first two by name.

Shapes: T tokens, D hidden size, H query heads, K key/value heads, E head size, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slm import BadInput
from slm.gpu import fused

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Config:
    """The shape of a model. positions: the longest context. bias: whether q, k and v have biases."""
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

    @classmethod
    def from_hf(cls, config: dict, where: str = "config.json") -> "Config":
        """Read a Hugging Face `config.json`. BadInput names what this model does not do."""
        def refuse(key, value, expected):
            raise BadInput(f"{where}: {key} is {value!r}, expected {expected}")

        if config.get("model_type") != "qwen2":
            refuse("model_type", config.get("model_type"), "'qwen2', the one architecture this project runs")
        for key in SIZES:
            if not isinstance(config.get(key), int) or config[key] < 1:
                refuse(key, config.get(key), "a whole number of 1 or more")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            refuse("rope scaling", kind, "none: scaled rope is not supported")
        only = {"hidden_act": "silu", "use_sliding_window": False, "quantization_config": None}
        for key, supported in only.items():
            if config.get(key, supported) != supported:
                refuse(key, config[key], f"{supported!r}; nothing else is supported")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_size = config.get("head_dim") or hidden // heads
        if heads % kv_heads or head_size % 2:
            refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} query heads, of an even size each")
        return cls(*(config[key] for key in SIZES), kv_heads, head_size,
                   positions=config.get("max_position_embeddings", 32768),
                   rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                   norm_eps=config.get("rms_norm_eps", 1e-6), tied=config.get("tie_word_embeddings", False),
                   bias=config.get("attention_bias", True))

    def to_hf(self) -> dict:
        """The `config.json` that transformers (4 and 5) and `from_hf` read."""
        sizes = (self.vocab, self.hidden, self.intermediate, self.layers, self.heads)
        out = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **dict(zip(SIZES, sizes)),
               "num_key_value_heads": self.kv_heads, "head_dim": self.head_size, "hidden_act": "silu",
               "max_position_embeddings": self.positions, "rope_theta": self.rope_theta,
               "rms_norm_eps": self.norm_eps, "tie_word_embeddings": self.tied, "attention_dropout": 0.0,
               "use_sliding_window": False, "use_cache": True}
        return out if self.bias else {**out, "attention_bias": False}


def rope(positions: Tensor, theta: float, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, 1, E), of the angles position * theta^(-2i/E), i = 0 .. E/2-1, twice in a
    row, the first sines negated for `rotate`. The angles are float32 whatever the model's dtype: bfloat16
    would round position 4,095 to 4,096."""
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    angle = positions.float()[:, None, None] * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) of x (T, heads, E) by their angles."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@contextmanager
def one_thread(when: bool):
    """Small products on a CPU: to wake another core takes longer (0.1 ms) than to do its share."""
    threads = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if when:
            torch.set_num_threads(threads)


@fused
def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, both (T, D), and its RMSNorm."""
    x = x if delta is None else x + delta
    return x, weight * F.rms_norm(x, x.shape[-1:], eps=eps)


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        return norm(x, delta, self.weight, self.eps)


def by_columns(x: Tensor) -> bool:
    """Whether products of x (T, in) are faster as (W x')', on a CPU in bfloat16: the second factor is
    repacked at each call, and of some dozens of rows x is the smaller one. The result lies in memory column
    by column; adding that to rows would cost what it gained, so the residual stream then lies so as well."""
    return x.is_cpu and x.dtype == torch.bfloat16 and 32 <= len(x) <= 128 and not torch.is_grad_enabled()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + bias."""
    return torch.mm(weight, x.t()).t() if bias is None and by_columns(x) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """joint: where its weights and those of other layers lie side by side; the first of these layers has it.
    room: how many rows of A its adapters need there."""
    joint: "Joint | None" = None
    room = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, product(x, self.weight, self.bias), [self])

    def adapt(self, x: Tensor, y: Tensor, layers: list["Linear"]) -> Tensor:
        """What adapters make of y, the outputs of these layers side by side; see lora.py."""
        return y

    def together(self, x: Tensor, joint: "Joint") -> Tensor:
        """The outputs of these joint layers side by side, adapters included."""
        return product(x, *joint.base)


class Joint:
    """The weights of layers with one input, side by side in memory: without gradients they are one product.
    Behind them there is room for the A of an adapter, so that A x comes with it at next to no cost. Values
    stay the same, and so do the parameters: only where they lie changes."""

    def __init__(self, layers: list[Linear]):
        self.size = sum(layer.out_features for layer in layers)
        self.room = sum(layer.room for layer in layers)
        self.weight = self.place([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else self.place([layer.bias for layer in layers])
        self.base = self.rows(self.size)  # without the room: the bits of a product may depend on its shape
        self.layers, self.low = layers, None  # low: a lora.Low, once an adapter was put there

    def place(self, parameters: list[nn.Parameter]) -> Tensor:
        old = [p.data for p in parameters]
        new = torch.cat([*old, old[0].new_zeros(self.room, *old[0].shape[1:])])
        for p, part in zip(parameters, new.split([*map(len, old), self.room])):
            p.data = part
        return new

    def rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The first rows of weight and bias."""
        return self.weight[:count], None if self.bias is None else self.bias[:count]

    def holds(self, layers: list[Linear]) -> bool:
        """False where the model was moved or given other parameters or layers."""
        if layers != self.layers:
            return False
        at, bias_at = self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()
        for layer in layers:
            weight, bias = layer.weight, layer.bias
            if weight.data_ptr() != at or (bias is not None and bias.data_ptr() != bias_at):
                return False
            at += weight.nbytes
            bias_at += 0 if bias is None else bias.nbytes
        return True


def products(x: Tensor, *groups: list[Linear]) -> list[Tensor]:
    """x (T, in) -> for each group the outputs of its layers side by side, (T, out). Without gradients it is
    one product for all, once `Qwen2.join` has put their weights side by side."""
    layers = [layer for group in groups for layer in group]
    joint = layers[0].joint
    if torch.is_grad_enabled() or joint is None or not joint.holds(layers):
        outputs = [[layer(x) for layer in group] for group in groups]
        return [torch.cat(ys, -1) if len(ys) > 1 else ys[0] for ys in outputs]
    # any layer that has had adapters (LoRALinear) multiplies for all of them, or else a plain one does
    adapted = next((layer for layer in layers if type(layer) is not Linear), layers[0])
    y = adapted.together(x, joint)
    return y.split_with_sizes([sum(layer.out_features for layer in group) for group in groups], -1)


class Attention(nn.Module):
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.index, self.head_size = index, c.head_size
        self.q_proj = Linear(c.hidden, c.heads * c.head_size, bias=c.bias)
        self.k_proj = Linear(c.hidden, c.kv_heads * c.head_size, bias=c.bias)
        self.v_proj = Linear(c.hidden, c.kv_heads * c.head_size, bias=c.bias)
        self.o_proj = Linear(c.heads * c.head_size, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        turned, v = (y.unflatten(-1, (-1, self.head_size)) for y in
                     products(x, [self.q_proj, self.k_proj], [self.v_proj]))
        heads = turned.shape[1] - v.shape[1]
        turned = rotate(turned, cos, sin)
        seen = attend(self.index, turned[:, :heads], turned[:, heads:], v)
        return products(seen.flatten(-2), [self.o_proj])[0]


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = products(x, [self.gate_proj], [self.up_proj])
        return products(gated(gate, up), [self.down_proj])[0]


class Layer(nn.Module):
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, index), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)

    def forward(self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend):
        """x + delta -> the same sum after this layer, again in two parts: the next norm adds them, where it
        costs nothing."""
        x, y = self.input_layernorm(x, delta)
        x, y = self.post_attention_layernorm(x, self.self_attn(y, cos, sin, attend))
        return x, self.mlp(y)


class Qwen2(nn.Module):
    """`recompute = True` keeps only each layer's input for the backward pass and computes the rest again:
    about a third more time, and the activations of one layer instead of all."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.recompute, self.joints = config, False, []
        # nn.Embedding's own normal_ would import PyTorch's compiler on the meta device: 1.4 s at every start
        embeddings = torch.empty(config.vocab, config.hidden).uniform_(-0.1, 0.1)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(embeddings, freeze=False),
            "layers": nn.ModuleList(Layer(config, i) for i in range(config.layers)),
            "norm": RMSNorm(config.hidden, config.norm_eps)})
        if not config.tied:
            self.lm_head = Linear(config.hidden, config.vocab, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        """ids (T,), positions (T,) -> hidden states after the last norm (T, D). Not logits: (T, V) would be
        the largest tensor of all, and whoever needs logits needs them of few tokens at a time."""
        x = self.model.embed_tokens(ids)
        if by_columns(x):
            x = x.t().contiguous().t()
        cos, sin = rope(positions, self.config.rope_theta, self.config.head_size, x.dtype)
        delta = None
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = x if delta is None else x + delta  # one tensor to keep, not two
                x, delta = checkpoint(self.as_now(layer), x, None, cos, sin, attend, use_reentrant=False)
            else:
                x, delta = layer(x, delta, cos, sin, attend)
        return self.model.norm(x, delta)[1]

    def as_now(self, layer: Layer):
        """The layer with the adapter that is active now, also when a backward pass computes it again."""
        if not hasattr(self, "lora"):
            return layer
        state, active = self.lora, self.lora.active

        def run(*inputs):
            before, state.active = state.active, active
            try:
                return layer(*inputs)
            finally:
                state.active = before
        return run

    def join(self) -> None:
        """Put weights that multiply the same input side by side in memory: faster to sample from."""
        groups = [] if self.config.tied else [[self.lm_head]]
        for layer in self.model.layers:
            a, mlp = layer.self_attn, layer.mlp
            groups += [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj],
                       [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
        for layers in groups:
            joint = layers[0].joint
            if not joint or not joint.holds(layers) or joint.room < sum(layer.room for layer in layers):
                layers[0].joint = Joint(layers)
        self.joints = [layers[0].joint for layers in groups]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> (N, V) in the model's dtype."""
        if self.config.tied:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return products(hidden, [self.lm_head])[0]
