"""Exercise 3: find the bug.

Is it solved?  python -m exercises 3
"""


def mean_loss(logits, ids, mask):
    """logits (T, V) of a sequence, its ids (T,), its mask (T,) with 1 for each trained token -> the mean of
    -log p over the trained tokens. Nothing predicts the first token, so its mask is 0."""
    logp = logits.log_softmax(-1)
    of_tokens = logp.gather(1, ids[:, None]).squeeze(1)
    return -(of_tokens * mask).sum() / mask.sum()
