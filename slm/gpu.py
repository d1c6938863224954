"""What a GPU needs to be kept busy while single tokens are sampled: fewer launches."""

import functools
import warnings

import torch

HALF = torch.bfloat16, torch.float16
OPTIONS = {"emulate_precision_casts": True, "online_softmax": False}
broken = False  # set where PyTorch's compiler does not work: it needs a C compiler and Triton


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
        import torch._dynamo as dynamo  # a second or two
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


def flash_attends(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether PyTorch's flash attention runs heads of this size there (Dao 2023, arXiv:2307.08691)."""
    return (device.type == "cuda" and dtype in HALF and size % 8 == 0 and size <= 256
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= (8, 0))
