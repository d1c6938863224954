"""What other projects' files look like. A reader of the pipeline can skip this room: every module is a door.

    tensors      safetensors, read one tensor at a time; folders that appear whole or not at all
    configs      config.json of the three families of models
    lora_files   adapters in PEFT's format, and which base they belong to
    sources      where the published problem sets come from; their download
    golds        gold answers, however a set writes them
    rows         the shapes in which people keep questions, answers and conversations
"""

__all__: list[str] = []
