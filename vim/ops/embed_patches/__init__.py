"""Patches, class tokens and position embedding of a model, in one op."""
