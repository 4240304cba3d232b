"""Settings of a training run: `schema` defines them, `load` reads and writes them."""
