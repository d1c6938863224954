"""Which answer a text gives, and whether it is right."""

from slm.grading.boxes import boxes, first_box_end
from slm.grading.grader import Grade, equal, extract, grade

__all__ = ["Grade", "boxes", "equal", "extract", "first_box_end", "grade"]
