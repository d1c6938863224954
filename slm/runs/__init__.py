"""What a run needs around its loop: command line, device, folder, ranks, files, statistics. Each module is a
door of its own, since the command line must not load torch."""
