"""A prompt that several sequences share is computed once in the loss.

The samples of a problem begin with the same tokens, and up to there the model computes the same for each. So
`Branches` packs a shared prompt once, as a piece of its own, and each sample is a piece that goes on from it:
its positions count on, and its tokens see the whole prompt. Log-probs and gradients are those of the
sequences one by one, up to rounding: the gradients of all samples flow into the one prompt.

It is done on a CPU, where one adapter acts on all tokens. The flash attention that packs sequences on a GPU
has no such form.
"""

from itertools import takewhile
from operator import not_

import torch
from torch import Tensor

from slm import lora
from slm.attention import Packed, causal

LEAST = 16, 1 / 6  # a prompt with fewer tokens, or a smaller part of its sequence, is faster computed again


def prompts_of(model, sequences: list[list[int]], masks: list[list[float]]) -> list[tuple[int, ...]]:
    """What each sequence may share: its tokens before the first trained one; () if that does not pay."""
    several = len(lora.names(model)) > 1 or isinstance(lora.active(model), dict)
    if several or next(model.parameters()).device.type != "cpu":
        return [()] * len(sequences)
    lengths = [len(list(takewhile(not_, mask))) for mask in masks]
    return [tuple(ids[:n]) if max(LEAST[0], LEAST[1] * len(ids)) <= n < len(ids) else ()
            for ids, n in zip(sequences, lengths)]


class Branches(Packed):
    """Attention over sequences of which some begin with the same prompt. prompts: of each sequence.

    tokens: (T,) int64, what to compute. places: (all tokens of all sequences,) where in T each token lies.
    after: for each piece the place of the one that it goes on from, or None.
    """

    def __init__(self, sequences: list[list[int]], prompts: list[tuple[int, ...]], device="cpu"):
        pieces, self.after, places, known, end = [], [], [], {}, 0
        for ids, head in zip(sequences, prompts):
            shared = len(head) if prompts.count(head) > 1 else 0
            if shared and head not in known:
                known[head] = len(pieces), range(end, end + shared)
                pieces.append(list(head))
                self.after.append(None)
                end += shared
            piece, before = known[head] if shared else (None, ())
            pieces.append(ids[shared:])
            self.after.append(piece)
            places += [*before, *range(end, end + len(ids) - shared)]
            end += len(ids) - shared
        super().__init__([len(piece) for piece in pieces], device)
        starts = [0 if piece is None else self.lengths[piece] for piece in self.after]
        self.positions += torch.tensor(starts).repeat_interleave(torch.tensor(self.lengths)).to(device)
        self.seen = [torch.ones(n, start + n, dtype=torch.bool).tril(start) if start else None
                     for start, n in zip(starts, self.lengths)]
        self.tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
        self.places = torch.tensor(places, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not any(piece is not None for piece in self.after):
            return super().__call__(layer, q, k, v)
        q, k, v = (x.to(v.dtype).split(self.lengths) for x in (q, k, v))
        out = []
        for i, piece in enumerate(self.after):
            keys, values = (x[i] if piece is None else torch.cat((x[piece], x[i])) for x in (k, v))
            out.append(causal(q[i], keys, values, self.seen[i]))
        return torch.cat(out)
