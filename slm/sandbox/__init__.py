"""Runs Python that a model wrote, contained by the kernel.

    pool.py      Sandbox: submit and poll, in the caller's process; it replaces the processes behind it
    child.py     those processes, a program of its own: the supervisor (queue, clocks, outcomes), the zygote
                 (numpy and sympy loaded, forks runs) and the runs (one program of the model each)
    layers.py    the walls around a run, by system call: namespaces, Landlock, seccomp, limits
    messages.py  how these processes talk: JSON with a length before it

A run is contained before it is given its code. What an outcome says about time, kills and exits comes from
the supervisor, never from the run. The files use the standard library only.
"""

from slm.sandbox.pool import Outcome, Sandbox, run_python

__all__ = ["Outcome", "Sandbox", "run_python"]
