"""The records that travel from the sampler to the grader to the loss. (Stub: the workflow protocol and the
runner follow.)"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn. temperature 0 is greedy; top_p 1 and top_k 0 mean the full distribution."""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_at_box: bool = False  # stop after the first complete \boxed{...}


@dataclass
class Request:
    """One prompt for a Sampler or an Endpoint: messages, or ready token ids (Sampler only)."""
    messages: list[dict] | None = None
    sampling: Sampling = Sampling()
    adapter: str | None = None  # LoRA adapter (Sampler) or model name (Endpoint); None: the default
    n: int = 1                  # samples of this prompt; sample i uses seed + i
    ids: list[int] | None = None


@dataclass
class Reply:
    """One sampled answer. prompt_ids + ids is exactly what the model saw and wrote; logprobs[i] is the
    log-probability of ids[i] under the distribution it was drawn from. An Endpoint leaves the ids empty."""
    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "stop"  # stop | length | box | stop_string | error
    prompt_ids: list[int] = field(default_factory=list)
    error: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    thinking: str | None = None  # a server's separate reasoning_content
