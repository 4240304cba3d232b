"""Products by a weight on the CPU, outside of a block."""
