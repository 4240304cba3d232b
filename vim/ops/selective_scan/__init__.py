"""Mamba's selective scan, one direction."""
