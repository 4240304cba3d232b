"""What lies among images and is no file to read."""

from __future__ import annotations

import os
import signal

import pytest
from PIL import Image

from vim.data.folders import open_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files in folders")


def test_a_pipe_among_images_does_not_hang(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "train" / name / "0.png")
    os.mkfifo(tmp_path / "train" / "a" / "1.png")
    source, _ = open_folder(str(tmp_path), "train")
    refused = 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(20)
    try:
        for index in range(len(source)):
            try:
                source.read(index)
            except OSError:
                refused += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert len(source) - refused == 2
