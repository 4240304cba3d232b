"""Depthwise causal convolution, one direction."""
