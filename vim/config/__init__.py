"""The settings of a training run: `schema` says what they are, `load` reads and writes them."""
