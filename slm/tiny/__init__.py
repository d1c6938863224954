"""The embedded model and the world it knows, so that every script runs offline and with no arguments.

    world      word problems put together from relations.txt, with solutions, programs and wrong solutions
    teacher    StandIn: a teacher for make_data.py that knows this world
    *.json, model.safetensors    a Qwen2 of 2.6 million parameters, read as any Hugging Face directory
    rebuild/   the corpus that the model read, and its pretraining
"""

from slm.tiny import world
from slm.tiny.teacher import StandIn

__all__ = ["StandIn", "world"]
