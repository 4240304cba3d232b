"""Compilation of the kernels in `csrc/`, and the folders that hold the libraries."""
