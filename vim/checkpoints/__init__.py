"""Checkpoints: `io` reads and writes files, `upstream` translates the original's arguments."""
