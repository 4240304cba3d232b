"""Fashion-MNIST's idx files are read as what they are, and nothing in them is believed."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from tests.tiny_runs import change, tiny_config
from vim.data.fashion_mnist import CLASS_NAMES, DEBIAN_FOLDER, load_fashion_mnist
from vim.data.sources import open_image_sets

COUNTS = {"train": 20, "t10k": 8}


def idx(magic, shape, data):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + data


@pytest.fixture
def folder(tmp_path):
    """Four small files like those of the package."""
    random = np.random.default_rng(0)
    for part, count in COUNTS.items():
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, contents in (
            ("images-idx3", idx(2051, (count, 28, 28), pixels.tobytes())),
            ("labels-idx1", idx(2049, (count,), labels.tobytes())),
        ):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(contents))
    return tmp_path


def test_the_files_give_images_and_labels(folder):
    train, test = load_fashion_mnist(folder, (28, 28), 1)
    assert (len(train), len(test)) == (20, 8)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert train.images[3, 0].numpy().tobytes() == raw[16 + 3 * 784 : 16 + 4 * 784]
    assert test.labels.tolist() == list(range(8))
    larger = load_fashion_mnist(folder, (32, 40), 3)[0].images
    assert larger.shape == (20, 3, 32, 40)
    assert larger[:, 0].equal(larger[:, 2])


def test_the_setting_opens_it(folder):
    sets = open_image_sets(tiny_config(data__dataset="fashion_mnist", data__path=str(folder), augment__hflip=0.5))
    assert sets.class_names == CLASS_NAMES
    assert sets.train.augment.hflip == 0.5
    assert sets.val.augment is None
    with pytest.raises(ValueError, match=r"model.num_classes must be null or .* 10 .*, got 7"):
        open_image_sets(
            change(tiny_config(data__dataset="fashion_mnist", data__path=str(folder)), model__num_classes=7)
        )


def test_without_the_files_the_install_line_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte.gz, which does not exist: apt-get install dataset-f"
    ):
        load_fashion_mnist(tmp_path, (28, 28), 1)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"no gzip file", "is damaged or not a gzip file"),
        (gzip.compress(idx(2051, (20, 28, 28), bytes(20 * 784)))[:60], "is damaged or not a gzip file"),
        (gzip.compress(idx(2051, (20, 28, 28), bytes(20 * 784)))[:-8] + b"\0" * 8, "is damaged or not a gzip file"),
        (gzip.compress(b"\0\0\x08\x03"), "it ends in its header"),
        (gzip.compress(idx(2049, (20, 28, 28), bytes(20 * 784))), "got magic number 2049"),
        (gzip.compress(idx(2051, (20, 32, 32), bytes(20 * 1024))), r"entries of shape \(32, 32\)"),
        (gzip.compress(idx(2051, (2**32 - 1, 28, 28), b"")), "got magic number 2051, 4,294,967,295 entries"),
        (gzip.compress(idx(2051, (20, 28, 28), bytes(19 * 784))), "must hold 15,680 bytes after its header, got 14896"),
        (gzip.compress(idx(2051, (20, 28, 28), bytes(21 * 784))), "got more"),
        (gzip.compress(idx(2051, (19, 28, 28), bytes(19 * 784))), "has 19 images and 20 labels of the part 'train'"),
    ],
    ids=["text", "cut", "checksum", "header", "kind", "shape", "count", "short", "long", "labels"],
)
def test_a_damaged_or_foreign_file_is_refused(folder, contents, message):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(folder, (28, 28), 1)


def test_a_label_that_is_no_class_is_refused(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(2049, (8,), bytes([10] * 8))))
    with pytest.raises(ValueError, match="labels from 0 to 9 for the part 't10k'"):
        load_fashion_mnist(folder, (28, 28), 1)


if DEBIAN_FOLDER.is_dir():

    def test_the_package_of_debian_holds_what_its_authors_describe():
        train, test = load_fashion_mnist(None, (28, 28), 1)
        assert torch.bincount(train.labels).tolist() == [6000] * 10
        assert torch.bincount(test.labels).tolist() == [1000] * 10
        pixels = train.images.float() / 255
        assert (round(pixels.mean().item(), 3), round(pixels.std().item(), 3)) == (0.286, 0.353)
