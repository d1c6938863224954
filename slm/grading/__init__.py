"""Which answer a text gives, and whether it is right."""

from slm.grading.grader import boxes, equal, extract, grade

__all__ = ["boxes", "equal", "extract", "grade"]
