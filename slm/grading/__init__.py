"""Which answer a text gives, and whether it is right."""

from slm.grading.boxes import boxes, first_box_end
from slm.grading.grader import Grade, equal, extract, grade
from slm.grading.replies import blocks_of, printed, verdict

__all__ = ["Grade", "blocks_of", "boxes", "equal", "extract", "first_box_end", "grade", "printed", "verdict"]
