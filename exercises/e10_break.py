"""Exercise 10: break the mask.

Is it solved?  python -m exercises 10
"""

# As pytest prints it, such as "tests/test_model.py::test_config_round_trip"
ONLY_THE_FIRST = ""   # fails if a token sees those behind it, passes if sequences see each other
ONLY_THE_SECOND = ""  # passes if a token sees those behind it, fails if sequences see each other
