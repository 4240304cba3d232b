"""The machine that a run is on: devices, processes, precision, terminal."""
