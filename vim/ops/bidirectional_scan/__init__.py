"""Selective scans of both directions with projection, gate and merge, channel-last."""
