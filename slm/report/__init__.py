"""A run directory as one self-contained page: report.html.

    python -m slm.report runs/sft-tiny

`write(run_dir)` works on what any script leaves behind, finished or not; every script calls it at its end.
The page needs no other file and no network, and text of models is always escaped. page.py builds it. Not
covered: several runs on one page (eval.py --compare prints a table), live updates.
"""

from slm.report.page import write

__all__ = ["write"]
