"""slm: the post-training of small math models, in code you can read.

The five scripts beside this folder are the stages: make_data.py, train_sft.py, train_grpo.py, agents.py and
eval.py. Start with one of them. The modules directly in this folder are the teaching core. The folders are
engine rooms: they make the core fast, safe and durable, and you may skip them at first. README.md lists every
file.
"""

import os

# A sleeping thread of PyTorch needs about 60 us to wake up, often longer than the work that it wakes up for.
# With this setting an idle thread checks for new work for about 0.1 ms before it sleeps. OpenMP reads the
# setting when torch is loaded, so slm must be imported before torch.
if os.environ.get("OMP_WAIT_POLICY", "").upper() != "ACTIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN keeps the code it made for products of 1,024 shapes, and each micro-batch is of another shape. In a
# long run that is a GB; with 128 a run is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


class BadInput(Exception):
    """A person gave something that does not work. The message is one sentence: it names the file, the line or
    the key, the value found and what was expected. The scripts print it and exit with 2, and no traceback."""
