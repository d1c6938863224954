"""How the embedded model was made: the corpus it read and its pretraining."""
