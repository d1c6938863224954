"""How the embedded model was made. A reader of the pipeline can skip this room.

    corpus     the documents it read: sums, answers, worked solutions, chats, checks of solutions
    pretrain   its tokenizer and its weights, from the corpus: python -m slm.tiny.rebuild.pretrain
"""

__all__: list[str] = []
