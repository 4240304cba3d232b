"""Residual addition and RMSNorm in one pass."""
