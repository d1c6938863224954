"""Runs Python that a model wrote, contained by the kernel."""

from slm.sandbox.pool import Outcome, Sandbox, run_python

__all__ = ["Outcome", "Sandbox", "run_python"]
