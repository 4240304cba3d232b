"""Trained models: load, evaluate, predict, convert, export."""
