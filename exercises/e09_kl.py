"""Exercise 9: three estimators of one KL.

Is it solved?  python -m exercises 9
"""


def k3(logp, ref):
    """Log-probs of sampled tokens, of the policy and of the reference -> the estimate for each token."""
    raise NotImplementedError


def expected(estimator, policy, ref):
    """policy, ref (V,): log-probs of every token of a vocabulary. Returns the mean of estimator(logp, ref)
    over tokens drawn from the policy: no sampling, but the sum over the vocabulary."""
    raise NotImplementedError


def pull(estimator, logits, ref):
    """logits (V,) of the policy, with requires_grad; ref (V,) log-probs. Returns (V,): the mean gradient with
    respect to the logits if tokens are drawn from the policy, the draw is held fixed, and the estimator is
    the loss."""
    raise NotImplementedError
