"""What answers: a model on this machine, or a server. Both have submit, step, pending and close."""

from slm import checkpoint, lora, lora_files
from slm.runs.device import pick_device
from slm.sampling import Sampler
from slm.teachers import Endpoint
from slm.workflows import refuse_roles


def open_backend(args):
    """(a Sampler or an Endpoint, role -> adapter name)."""
    if args.endpoint:
        return Endpoint(args.endpoint, args.model, key_env=args.key_env), {}
    device, dtype, reason = pick_device(args.device, args.dtype, args.model)
    print(f"{args.model} on {device}, {str(dtype).removeprefix('torch.')}: {reason}")
    model, tokenizer = checkpoint.load(args.model, device, dtype)
    adapters = {}
    with lora.off(model):  # what is active stays so afterwards, for the roles without an adapter of their own
        for given in args.adapter:
            role, _, folder = given.rpartition("=")
            refuse_roles("--adapter", [role] if role else [])
            adapters[role or "*"] = role or "all"
            lora_files.load(model, checkpoint.resolve(folder), adapters[role or "*"])
    return Sampler(model, tokenizer), adapters
