"""Settings of the test run."""

import os

# Two workers on two cores: a thread each. Spinning OpenMP threads on shared cores cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
