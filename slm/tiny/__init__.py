"""The embedded model: weights, tokenizer, and the world of problems it knows."""
