"""What answers: a model on this machine, or a server."""

from collections.abc import Sequence

from slm import checkpoint, lora
from slm.formats import lora_files
from slm.runs.device import pick_device
from slm.sampling import Sampler
from slm.teachers import Endpoint
from slm.tokenizer import PLAIN
from slm.workflows import refuse_roles


def open_backend(options, batch: int | None = None,
                 stream: bool = False) -> tuple[Sampler | Endpoint, dict[str, str]]:
    """(what answers, role -> name of the adapter that serves it, "*" for the other roles).

    options: those of cli.answer_options and cli.run_options, and workflow. batch: replies drawn at once
    (None: as many as the backend chooses). stream: a server sends replies word by word. Both backends have
    submit(Request) -> ticket, step() -> [(ticket, sample, Reply)], pending, written(ticket) and close().
    """
    if options.endpoint:
        how = {"stream": stream, **({"workers": batch} if batch else {})}
        fields = {} if stream else {"logprobs": True, "return_token_ids": True}
        return Endpoint(options.endpoint, options.model, key_env=options.key_env, fields=fields, **how), {}
    names, folders = {}, []
    for given in options.adapter:
        role, _, folder = given.rpartition("=")
        refuse_roles("--adapter", [role] if role else [], options.workflow or "")
        names[role or "*"] = role or "all"
        folders.append((role or "all", folder))
    return own_model(options.model, options.device, options.dtype, folders, batch), names


def own_model(model: str, device: str, dtype: str, adapters: Sequence[tuple[str, str]] = (),
              batch: int | None = None) -> Sampler:
    """A Sampler around a model on this machine.

    model: tiny, a directory or a hub id. device, dtype: as on the command line, "auto" too; the choice is
    printed. adapters: (name, directory). BadInput if one of them is not there.
    """
    for folder in (model, *(folder for _, folder in adapters)):
        checkpoint.resolve(folder)  # a misspelt one is said before anything is measured
    place, precision, reason = pick_device(device, dtype, model)
    print(f"{model} on {place}, {str(precision).removeprefix('torch.')}: {reason}")
    network, tokenizer = checkpoint.load(model, place, precision)
    with lora.off(network):  # the adapter that came with the model stays active for the other roles
        for name, folder in adapters:
            lora_files.load(network, checkpoint.resolve(folder), name)
    return Sampler(network, tokenizer, max_batch=batch)


def asked_with(backend: Sampler | Endpoint) -> dict[str, str]:
    """For a run's settings: whether prompts follow the model's own template or are plain. A server does that
    itself."""
    if not hasattr(backend, "tokenizer"):
        return {}
    return {"template": "plain" if backend.tokenizer.template == PLAIN else "the model's own"}
