"""Replies from a vLLM server in place of our own sampler: train_grpo.py --rollouts URL.

    remote.py   Rollouts: the Sampler's submit, step, close; and refresh, before each step's sampling

refresh writes each adapter under a new name, has the server load it, and asks for two canaries: the log-probs
of a fixed text, and a short reply at the run's temperature. The trainer computes the same. If the two differ
by more than rounding, the run stops: another base model, an old adapter, another temperature.

Prompts go out as token ids; ids and log-probs come back, and nothing is tokenized again. Where a reply ends
is decided here, by the Sampler's own rules. A server that went away is waited for, gets its adapters again
and is asked again. docs/rollouts.md tells how to start one.
"""

from slm.rollouts.remote import Rollouts

__all__ = ["Rollouts"]
