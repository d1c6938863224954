"""slm: the post-training of small math models, in code you can read.

Start with the scripts beside this folder (make_data.py, train_sft.py, train_grpo.py, agents.py, eval.py);
the README maps every module here.
"""


class BadInput(Exception):
    """Something a person gave is wrong. The message is one sentence that names the thing (file, line or key),
    the value found and what was expected; the scripts print it and exit with 2, without a traceback."""
