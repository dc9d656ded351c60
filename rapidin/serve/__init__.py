"""A live view of caches: a web server that keeps the model, the caches and the training data loaded."""
