"""What a run needs around its loop. Each module is a door of its own: the command line must not load torch.

    cli      options, help, one sentence for bad input       device    device and dtype
    rundir   RunDir: a run's folder, its claim, checkpoints   ranks    several processes under torchrun
    files    JSON on disk; Journal: rows that survive a kill  stats    intervals and comparisons
    steps    what a step of GRPO logs                        forecast  what a run will take
"""
