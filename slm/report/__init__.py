"""A run directory as one self-contained page."""

from slm.report.page import write

__all__ = ["write"]
