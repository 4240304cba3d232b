"""Depthwise convolution of both directions, channel-last."""
