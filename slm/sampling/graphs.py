"""Recordings of a decoding step: all its kernels replayed with a single call from the host (a CUDA graph)."""

import copy

import torch


class Recordings:
    """CUDA graphs: a function is recorded when first met and then replayed with one launch."""

    def __init__(self):
        self.kept: dict[tuple, tuple] = {}
        self.places = None

    def at(self, places: list | None) -> None:
        """Where the tensors are that recordings use: when they have moved, all recordings are dropped."""
        if places != self.places:
            self.kept, self.places = {}, places

    def replay(self, key: tuple, run, state):
        """Do what run() does, which reads and changes the tensors of `state`, and return its results. The
        state that was recorded under this key takes the place of this one (its take() copies what is in it)
        and comes first: go on with that."""
        if key not in self.kept:
            self.kept[key] = state, *record(run, state, [graph for _, graph, _ in self.kept.values()])
        own, graph, results = self.kept[key]
        if own is not state:
            own.take(state)
        graph.replay()
        return own, *[x.clone() for x in results]


def record(run, state, others: list) -> tuple:
    """Run on CUDA, after a warm-up, into a graph: (graph, results). The state is put back to where it was;
    what is written elsewhere is written again. others: graphs to share memory with; all are replayed one
    after the other, and their results copied before the next one."""
    before, graph = copy.deepcopy(state), torch.cuda.CUDAGraph()
    run()  # compiles kernels and loads libraries
    with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
        results = run()
    state.take(before)
    return graph, results
