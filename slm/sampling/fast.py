"""The network of model.py, arranged so that sampling is fast: the same tensors in another order of work.

`Fast` runs all layers in one flat function. Layers that read the same input (q, k and v; gate and up) have
their weights side by side in memory, so they are one product. The A of every adapter lies right behind these
weights, so A x comes with the same product. `Plain` is the model as it stands, for weights that FSDP has
spread. tests/test_fast.py holds the two equal, token for token.

Weights are the model's own: `arrange` moves a parameter's data into the joint memory, and the parameter stays
a view of it, so an optimizer step is seen at once. Adapters are copied; `refresh` looks, before a batch of
requests, whether any parameter changed, and copies them again.

LOG.md has the table of what each piece saves, measured with bench/pieces.py.
"""

import contextlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm import lora
from slm.model import Qwen2, rope, rotate
from slm.sampling.graphs import fused

COLUMNS = (1, 256) if torch.cpu._is_amx_tile_supported() else (32, 128)  # tokens, from and to; AMX or not
SMALL = 2 ** 18  # multiplications: a smaller product is faster in float32, bfloat16 has a fixed cost of 13 us
Spans = list[tuple[str | None, int]]  # the adapter (or None) of consecutive tokens, and how many these are


@contextlib.contextmanager
def one_thread(when: bool) -> Iterator[None]:
    """Small products on a CPU: waking another core takes longer (0.1 ms) than its share of the work."""
    threads = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if when:
            torch.set_num_threads(threads)


# ---- the network as it stands ------------------------------------------------------------------------------

class Plain:
    """The model as it stands. `versions` tells whether anything changed since `refresh` last looked."""
    moves = None  # changes when a tensor moves that a recording may use

    def __init__(self, model: nn.Module):
        self.model, self.versions, self.parameters = model, None, []

    def refresh(self) -> bool:
        """Whether any weight changed since the last call: its identity, its place or its version."""
        before, self.parameters = self.versions, list(self.model.parameters())  # kept: ids stay theirs
        self.versions = [(id(p), p.data_ptr(), p._version) for p in self.parameters]
        return self.versions != before

    def choose(self, spans: Spans):
        """What `hidden` and `logits` need to know of the adapters of consecutive tokens."""
        return spans

    def hidden(self, ids: Tensor, positions: Tensor, attend, chosen) -> Tensor:
        """ids, positions (T,) -> hidden states after the last norm (T, D), without dropout."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with lora.use(self.model, chosen):
                return self.model(ids, positions, attend)
        finally:
            if training:
                self.model.train()

    def logits(self, hidden: Tensor, chosen) -> Tensor:
        """hidden (N, D) -> (N, V)."""
        with lora.use(self.model, chosen):
            return self.model.logits(hidden)


# ---- the network rearranged --------------------------------------------------------------------------------

@fused
def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, both (T, D), and its RMSNorm: one kernel on a GPU."""
    x = x if delta is None else x + delta
    return x, weight * F.rms_norm(x, x.shape[-1:], eps=eps)


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    return F.silu(gate) * up


turn = fused(rotate)


def by_columns(x: Tensor) -> bool:
    """Whether products of x (T, in) are faster as the transpose of W x'. On a CPU in bfloat16 the second
    factor is repacked at each call, and x is smaller than W. The result lies in memory column by column.
    Adding it to a residual stream that lies row by row would cost the gain, so the residual stream lies
    column by column, too."""
    return x.is_cpu and x.dtype == torch.bfloat16 and COLUMNS[0] <= len(x) <= COLUMNS[1]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + bias."""
    if not by_columns(x):
        return F.linear(x, weight, bias)
    columns = x.t() if len(x) > 1 else x.expand(2, -1).t()  # of one column it takes as long as of 32
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return y.t()[:len(x)]


class Chosen:
    """Which adapters act on which tokens. member: (T or 1, adapters) of 0 and 1, None if there is only one
    adapter and it acts on all tokens."""

    def __init__(self, member: Tensor | None):
        self.member, self.masks = member, {}

    def mask(self, owner: list[int]) -> Tensor:
        """(T or 1, R): 1 if column i of A x, which belongs to adapter owner[i], counts for a token."""
        key = tuple(owner)
        if key not in self.masks:
            self.masks[key] = self.member[:, owner]
        return self.masks[key]


class Joint:
    """Layers that read the same input: weight (size + R, in) holds their weights side by side, then the A of
    all their adapters; B (size, R) holds s B of each adapter in the rows of its layer."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.size = sum(self.sizes)

    def place(self, specs: dict[str, lora.Spec]) -> None:
        """Move the layers' parameters side by side, with room for their adapters."""
        self.adapters = [(name, i) for name in specs for i, layer in enumerate(self.layers)
                         if isinstance(layer, lora.LoRALinear) and name in layer.lora_A]
        names = list(specs)
        self.owner = [names.index(name) for name, _ in self.adapters for _ in range(specs[name].r)]
        self.room, bias = len(self.owner), self.layers[0].bias is not None
        self.weight = self._joined([layer.weight for layer in self.layers])
        self.bias = self._joined([layer.bias for layer in self.layers]) if bias else None
        # without adapters the product leaves them out: its bits may depend on its shape
        self.base = self.weight[:self.size], self.bias[:self.size] if bias else None
        self.B = self.weight.new_zeros(self.size, self.room)

    def _joined(self, parameters: list[nn.Parameter]) -> Tensor:
        old = [p.data for p in parameters]
        new = torch.cat([*old, old[0].new_zeros(self.room, *old[0].shape[1:])])
        for p, part in zip(parameters, new.split([*self.sizes, self.room])):
            p.data = part
        return new

    def write(self, specs: dict[str, lora.Spec]) -> None:
        """Copy the adapters to their places."""
        B, at = torch.zeros(self.B.shape, device=self.B.device), 0
        for name, i in self.adapters:
            layer, start, r = self.layers[i], sum(self.sizes[:i]), specs[name].r
            self.weight[self.size + at:self.size + at + r] = layer.lora_A[name]
            B[start:start + self.sizes[i], at:at + r] = layer.lora_B[name] * specs[name].scale
            at += r
        self.B.copy_(B)
        self.exact = B.t().contiguous() if B.is_cpu else None

    def __call__(self, x: Tensor, chosen: Chosen | None) -> Tensor:
        """x (T, in) -> the outputs of the layers side by side (T, size), adapters included."""
        if chosen is None or not self.room:
            return product(x, *self.base)
        y, h = product(x, self.weight, self.bias).split_with_sizes([self.size, self.room], -1)
        if chosen.member is not None:
            h = h * chosen.mask(self.owner)
        if x.is_cpu and len(x) * self.B.numel() < SMALL:
            return y.add_(h.float() @ self.exact)
        if by_columns(x):
            return y.t().addmm_(self.B, h.t()).t()
        return y.addmm_(h, self.B.t())


class Arrangement:
    """The groups of a model's layers, and where its parameters were when they were placed."""

    def __init__(self):
        self.joints: list[Joint] = []
        self.places, self.moves = None, 0


ARRANGED: WeakKeyDictionary[Qwen2, Arrangement] = WeakKeyDictionary()  # samplers of one model share it


class Fast(Plain):
    """The same functions as Plain's over rearranged weights, without gradients."""

    def __init__(self, model: Qwen2):
        super().__init__(model)
        self.arrangement = ARRANGED.setdefault(model, Arrangement())
        self.names: list[str] = []

    def refresh(self) -> bool:
        changed = super().refresh()
        if changed:
            self.arrange()
            super().refresh()  # arranging moves parameters, which is no change
        return changed

    @torch.inference_mode(False)
    @torch.no_grad()
    def arrange(self) -> None:
        """Bring every group of layers into place, with the adapters that are on the model now."""
        a, self.names = self.arrangement, lora.names(self.model)
        specs = {name: lora.spec(self.model, name) for name in self.names}
        if self._places() != a.places:
            a.joints = [Joint(group) for group in self._groups()]
            for joint in a.joints:
                joint.place(specs)
            a.places, a.moves = self._places(), a.moves + 1
        for joint in a.joints:
            joint.write(specs)
        self.moves, self.uniform = a.moves, {}

    def _places(self) -> tuple:
        """Changes if the model is moved, or given other parameters, layers or adapters."""
        return self.names, [(name, id(p), p.data_ptr()) for name, p in self.model.named_parameters()]

    def _groups(self) -> list[list[nn.Linear]]:
        groups = []
        for layer in self.model.model.layers:
            a, mlp = layer.self_attn, layer.mlp
            groups += [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [mlp.gate_proj, mlp.up_proj],
                       [mlp.down_proj]]
        return groups if self.model.config.tied else [*groups, [self.model.lm_head]]

    def choose(self, spans: Spans) -> Chosen | None:
        used = {name for name, _ in spans}
        if used == {None}:
            return None
        if not used <= {None, *self.names}:
            self.arrange()  # an adapter that came after the last look
        if len(used) > 1:
            return self._chosen(spans)
        if spans[0][0] not in self.uniform:  # kept: recordings use its tensors
            self.uniform[spans[0][0]] = Chosen(None) if len(self.names) == 1 else self._chosen(spans[:1])
        return self.uniform[spans[0][0]]

    def _chosen(self, spans: Spans) -> Chosen:
        embeddings = self.model.model.embed_tokens.weight
        at = torch.tensor([self.names.index(name) if name else len(self.names) for name, _ in spans])
        member = F.one_hot(at, len(self.names) + 1)[:, :-1].to(embeddings.device, embeddings.dtype)
        if len(spans) > 1:
            counts = torch.tensor([count for _, count in spans], device=embeddings.device)
            member = member.repeat_interleave(counts, 0)
        return Chosen(member)

    def hidden(self, ids: Tensor, positions: Tensor, attend, chosen: Chosen | None) -> Tensor:
        c, model, joints = self.model.config, self.model.model, self.arrangement.joints
        queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        x = F.embedding(ids, model.embed_tokens.weight)
        if by_columns(x):
            x = x.t().contiguous().t()
        cos, sin = rope(positions, c, x.dtype)
        delta = None  # what the last block adds to x; the next norm does it
        for i, layer in enumerate(model.layers):
            qkv, o, gate_up, down = joints[4 * i:4 * i + 4]
            x, n = norm(x, delta, layer.input_layernorm.weight, c.norm_eps)
            qk, v = qkv(n, chosen).split_with_sizes([queries + keys, keys], -1)
            qk = qk.unflatten(-1, (-1, c.head_size))
            if c.head_norm:
                a = layer.self_attn
                qk = torch.cat((a.q_norm(qk[:, :c.heads]), a.k_norm(qk[:, c.heads:])), 1)
            qk = turn(qk, cos, sin)
            out = attend(i, qk[:, :c.heads], qk[:, c.heads:], v.unflatten(-1, (-1, c.head_size)))
            x, n = norm(x, o(out.flatten(-2), chosen), layer.post_attention_layernorm.weight, c.norm_eps)
            gate, up = gate_up(n, chosen).split_with_sizes([c.intermediate, c.intermediate], -1)
            delta = down(gated(gate, up), chosen)
        return norm(x, delta, model.norm.weight, c.norm_eps)[1]

    def logits(self, hidden: Tensor, chosen: Chosen | None) -> Tensor:
        ids = self.model.config.ids
        if self.model.config.tied:
            return product(hidden, self.model.model.embed_tokens.weight[:ids], None)
        return self.arrangement.joints[-1](hidden, chosen)[:, :ids]
