"""Gradients: from a model and a batch of texts to each text's preconditioned gradient sketch."""
