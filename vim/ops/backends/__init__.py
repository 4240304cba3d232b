"""Backends of the ops: what runs an op on which device, and the reasons why one does not."""
