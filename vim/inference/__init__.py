"""Trained models: load, evaluate, predict, convert and export."""
