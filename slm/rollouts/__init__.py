"""Replies from a vLLM server in place of our own sampler: train_grpo.py --rollouts URL, docs/rollouts.md.

    remote.py   Rollouts: the Sampler's protocol, and refresh: adapters to the server, canaries back

Prompts go out as token ids, ids and log-probs come back, and a reply ends by the Sampler's own rules.
"""

from slm.rollouts.remote import Rollouts

__all__ = ["Rollouts"]
