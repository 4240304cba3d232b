"""Memory at high resolution: what gradient checkpointing saves, and that inference needs no more than its tokens do."""

from __future__ import annotations

import sys

import pytest

from tests.processes import run_python

MEASURE = """
import ctypes, torch, vim

torch.set_num_threads(1)
# Freed blocks go back to the system; else the peak of one model would hide in what another one left.
libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
assert libc.mallopt(trim_threshold, 65536) and libc.mallopt(mmap_threshold, 65536)
libc.malloc_trim(0)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

def growth(run):
    \"\"\"MiB by which a call exceeds what was there before it, at its peak.\"\"\"
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")


def measure(script: str) -> list[float]:
    """Numbers that a script prints, run after MEASURE in a process of its own."""
    printed = run_python("-c", MEASURE + script)
    return [float(number) for number in printed.split()]


def test_checkpointing_cuts_training_memory_at_1024_px_to_two_fifths():
    with_checkpoints, without = measure("""
def train(checkpointing, side=1024):
    model = vim.VisionMamba(img_size=side, embed_dim=32, depth=24, num_classes=10, drop_path_rate=0.0)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(1, 3, side, side)
    return growth(lambda: model(images).sum().backward())

train(True, 32), train(False, 32)  # what a first call loads
print(train(True), train(False))
""")
    assert without > 100, "the activations of 24 blocks over 4097 tokens"
    assert with_checkpoints <= 0.4 * without


@pytest.mark.slow
def test_4096_px_take_the_memory_of_their_tokens_however_many_blocks():
    shallow, deep = measure("""
def infer(depth, side=4096):
    model = vim.VisionMamba(img_size=side, embed_dim=32, depth=depth, num_classes=10).eval()
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        return growth(lambda: model(images))

infer(1, 32)
print(infer(2), infer(4))
""")
    assert deep < 200, "MiB; the states of one direction alone, (65537 tokens, 64 channels, 16), would be 256"
    assert deep < 1.1 * shallow + 5
