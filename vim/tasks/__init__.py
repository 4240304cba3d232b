"""Tasks: what a model learns, from a batch to a loss."""
