"""A layer of the model in one op: residual addition, RMSNorm and the bidirectional mixer."""
