"""Training, evaluation and prediction: what the entry points call."""
