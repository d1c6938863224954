"""config.json, as transformers writes it: which models it describes that model.py is, and back."""

from slm import BadInput
from slm.model import Config

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OTHER_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read(config: dict, where: str = "config.json") -> Config:
    """Read a Hugging Face `config.json`. BadInput names what this model does not do."""
    def refuse(key, value, expected):
        raise BadInput(f"{where}: {key} is {value!r}, expected {expected}")

    kind = config.get("model_type")
    if kind not in FAMILIES:
        refuse("model_type", kind, f"one of {', '.join(FAMILIES)}")
    for key in (*SIZES, *(key for key in OTHER_SIZES if config.get(key) is not None)):
        if not isinstance(config.get(key), int) or config[key] < 1:
            refuse(key, config.get(key), "a whole number of 1 or more")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, eps = rope.get("rope_theta") or config.get("rope_theta") or 1e4, config.get("rms_norm_eps", 1e-6)
    for key, value in ("rope_theta", theta), ("rms_norm_eps", eps):
        if not isinstance(value, int | float):
            refuse(key, value, "a number")
    way = rope.get("rope_type", rope.get("type", "default"))
    if way not in ("default", "llama3"):
        refuse("rope scaling", way, "none, or llama3")
    for key in SCALING if way == "llama3" else ():
        if not isinstance(rope.get(key), int | float) or rope[key] <= 0:
            refuse(key, rope.get(key), "a number above 0")
    only = {"hidden_act": "silu", "use_sliding_window": False, "quantization_config": None, "mlp_bias": False}
    if kind != "qwen2":
        only["attention_bias"] = False  # it would be on o_proj, too
    for key, supported in only.items():
        if config.get(key, supported) != supported:
            refuse(key, config[key], f"{supported!r}; nothing else is supported")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    if heads % kv_heads or head_size % 2:
        refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} query heads, of an even size each")
    return Config(*(config[key] for key in SIZES), kv_heads, head_size,
                  positions=config.get("max_position_embeddings") or 32768, rope_theta=float(theta),
                  norm_eps=eps, tied=config.get("tie_word_embeddings", False),
                  bias=kind == "qwen2" and config.get("attention_bias", True), head_norm=kind == "qwen3",
                  rope_scaling=tuple(rope[key] for key in SCALING) if way == "llama3" else None)


def write(c: Config) -> dict:
    """The `config.json` that transformers (4 and 5) and `read` read."""
    sizes = (c.vocab, c.hidden, c.intermediate, c.layers, c.heads)
    kind = "qwen3" if c.head_norm else "qwen2" if c.bias else "llama"
    out = {"architectures": [FAMILIES[kind]], "model_type": kind, **dict(zip(SIZES, sizes)),
           "num_key_value_heads": c.kv_heads, "head_dim": c.head_size, "hidden_act": "silu",
           "max_position_embeddings": c.positions, "rope_theta": c.rope_theta,
           "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "attention_dropout": 0.0,
           "use_sliding_window": False, "use_cache": True}
    if c.rope_scaling:
        out["rope_scaling"] = {"rope_type": "llama3", **dict(zip(SCALING, c.rope_scaling))}
    return out if kind == "qwen2" else {**out, "attention_bias": False}
