"""Which answer a text gives, and whether it is right."""

from slm.grading.grader import boxes, equal, extract, grade
from slm.grading.replies import blocks_of, printed, verdict

__all__ = ["blocks_of", "boxes", "equal", "extract", "grade", "printed", "verdict"]
