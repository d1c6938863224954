"""slm: the post-training of small math models, in code you can read.

Start with the scripts beside this folder (make_data.py, train_sft.py, train_grpo.py, agents.py, eval.py);
the README maps every module here.
"""

import os

# Threads that wait for the next operation look out for it for about 0.1 ms before they sleep: to wake one can
# take longer (60 us) than the operation. OpenMP reads this when torch is loaded, so slm comes before torch.
if os.environ.get("OMP_WAIT_POLICY", "").upper() != "ACTIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class BadInput(Exception):
    """Something a person gave is wrong. The message is one sentence that names the thing (file, line or key),
    the value found and what was expected; the scripts print it and exit with 2, without a traceback."""
