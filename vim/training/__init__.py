"""Training runs: the loop, its state, its files and its log."""
