"""What a run needs around its loop. Each module is a door of its own, since the command line must not load
torch.

cli.py      options that scripts share, defaults by size of the model, one sentence for bad input, Ctrl-C
rundir.py   the folder of a run: settings, journals, the newest checkpoint, the lock that keeps others out
files.py    JSON and JSON lines that survive a kill and a full disk
device.py   which device and dtype, and how much memory a step needs
ranks.py    several processes under torchrun; a process that runs alone has rank 0 of 1
stats.py    95 % intervals, pass@k, two runs compared on the same problems
"""
