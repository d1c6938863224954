"""Fewer launches on a GPU, where a decoding step is some hundreds of small operations.

Each operation is a kernel that reads its input from memory and writes it back, and each costs a few
microseconds even if it does nothing.

* `fused` makes one kernel of several element-wise operations (PyTorch's compiler writes it).
* `Recordings` replay all kernels of a step with a single call from the host (a CUDA graph).
"""

import copy
import functools
import warnings

import torch

if torch.cuda.is_available():  # the import takes two seconds
    import torch._dynamo as dynamo

HALF = torch.bfloat16, torch.float16
OPTIONS = {"emulate_precision_casts": True, "online_softmax": False}
broken = False  # whether PyTorch's compiler fails here: it needs a C compiler and Triton


def fused(function):
    """Run `function(x, ...)` as one kernel: for tensors on a GPU in half precision without gradients,
    elsewhere as it stands. Element by element it gives the same bits: it rounds where the single operations
    would. Sums (softmax, cumulative sums) may be added in another order. The first dimension of tensors may
    vary from call to call."""
    compiled = None

    @functools.wraps(function)
    def call(x, *rest):
        nonlocal compiled
        global broken
        if broken or not x.is_cuda or x.dtype not in HALF or torch.is_grad_enabled():
            return function(x, *rest)
        if compiled is None:
            dynamo.config.recompile_limit = 64  # one row or several, with all arguments or not, other strides
            compiled = torch.compile(function, options=OPTIONS)
        for tensor in (x, *rest):
            if torch.is_tensor(tensor) and (tensor.dim() > 1 or len(tensor) == len(x)):
                dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(x, *rest)
        except dynamo.exc.TorchDynamoException as e:
            broken = True
            warnings.warn(f"PyTorch's compiler does not work here, so sampling is slower: {e}", stacklevel=2)
            return function(x, *rest)
    return call


class Recordings:
    """CUDA graphs: a function is recorded when first met and then replayed with one launch."""

    def __init__(self):
        self.kept: dict[tuple, tuple] = {}
        self.places = None

    def forget_if_moved(self, places) -> None:
        """places: anything that changes when a tensor moves that recordings use. Then all are dropped."""
        if places != self.places:
            self.kept, self.places = {}, places

    def replay(self, key: tuple, run, state):
        """Do what run() does and return (state, *its results); run() changes the tensors of `state`.

        A recording works on its own tensors. So the first state that came with a key stays with it, and a
        later one is copied into it (state.take). The caller goes on with the state returned.
        """
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
