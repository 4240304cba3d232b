"""One decoder for all: upright images of 8 bits, from whatever a camera wrote."""

from __future__ import annotations

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.tiny_runs import tiny_config
from vim.data import decoding
from vim.data.decoding import read_image, to_color_mode
from vim.data.image_files import TorchvisionSource
from vim.data.loaders import build_loaders
from vim.data.preprocessing import Preprocessing
from vim.data.sources import open_image_sets


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(decoding, "_warned", set())


def photograph(path, orientation, size=(16, 8)):
    """Write what a camera writes that is held in some way: a bright stripe at one side, and the note of the way."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[274] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_whatever_its_format(tmp_path, suffix, orientation):
    path = photograph(tmp_path / f"a{suffix}", orientation)
    image = read_image(path)
    with Image.open(path) as raw:
        expected = ImageOps.exif_transpose(raw)
    assert image.size == expected.size == ((8, 16) if orientation >= 5 else (16, 8))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_folders_and_hugging_face_show_a_photograph_in_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "val"):
        for index, name in enumerate("ab"):
            photograph(tmp_path / "images" / split / name / "0.jpg", 6 + 2 * index)
    common = {"model__in_chans": 3, "data__path": str(tmp_path / "images")}
    folder = open_image_sets(tiny_config(data__dataset="folder", **common)).val.source
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "val"):
        files = [str(tmp_path / "images" / split / name / "0.jpg") for name in "ab"]
        table = datasets.Dataset.from_dict({"image": files, "label": [0, 1]}, features=columns)
        table.to_parquet(str(tmp_path / "set" / f"{split}-0.parquet"))
    config = tiny_config(
        data__dataset=f"hfds/{tmp_path}/set",
        data__path=str(tmp_path / "cache"),
        data__val_split="validation",
        model__in_chans=3,
    )
    hugging_face = open_image_sets(config).val.source
    for index in range(2):
        (image, label), (other, other_label) = folder.read(index), hugging_face.read(index)
        assert label == other_label == index
        assert image.size == (8, 16)
        assert np.array_equal(np.asarray(image), np.asarray(other))


def test_images_that_come_opened_are_turned_too(tmp_path):
    image = Image.open(photograph(tmp_path / "a.jpg", 6))
    assert TorchvisionSource([(image, 3)], "set").read(0)[0].size == (8, 16)
    preprocessing = Preprocessing.from_config(tiny_config(model__img_size=(16, 8)))
    turned = ImageOps.exif_transpose(image)
    assert preprocessing.transform()(image).equal(preprocessing.transform()(turned))


def test_damaged_exif_data_cost_no_image(tmp_path, caplog):
    path = photograph(tmp_path / "a.webp", 6)
    data = path.read_bytes()
    assert data.count(b"MM\0*") + data.count(b"II*\0") == 1
    path.write_bytes(data.replace(b"MM\0*", b"MX\7*").replace(b"II*\0", b"IX*\7"))
    for _ in range(2):
        assert read_image(path).size == (16, 8)
    assert caplog.text.count("EXIF data that cannot be read") == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the odd tag
def test_odd_exif_data_beside_the_orientation_do_not_matter(tmp_path):
    path = photograph(tmp_path / "a.jpg", 6)
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    Image.open(path).save(path, exif=exif)
    data = path.read_bytes()
    text = b"\x01\x0f\0\2" if b"Exif\0\0MM" in data else b"\x0f\x01\2\0"
    assert text in data
    path.write_bytes(data.replace(text, text.replace(b"\2", b"\5")))  # the maker's name is a fraction now
    image = read_image(path)
    assert image.size == (8, 16)
    assert read_image(path).getexif().get(274) is None


def test_an_image_of_16_bits_keeps_its_upper_8():
    pixels = np.array([[0, 255, 256], [32_768, 65_279, 65_535]], dtype=np.uint16)
    converted = to_color_mode(Image.fromarray(pixels), "RGB")
    assert np.array(converted)[..., 1].tolist() == [[0, 0, 1], [128, 254, 255]]
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="its pixels are 32-bit numbers"):
            to_color_mode(Image.fromarray(pixels.astype(kind)), "L")


@pytest.mark.parametrize("largest", [1023, 4095, 65_535])
def test_a_grey_netpbm_file_of_16_bits_is_read_like_others(tmp_path, largest):
    pixels = np.array([[0, largest // 2, largest]], dtype=">u2")
    file = tmp_path / "0.pgm"
    file.write_bytes(f"P5 3 1 {largest}\n".encode() + pixels.tobytes())
    image = read_image(file)
    assert image.mode == "I;16"
    assert np.asarray(to_color_mode(image, "L")).tolist() == [[0, 127, 255]]


def test_12_bits_in_16_are_warned_once_and_kept_if_the_setting_says_so(caplog):
    ramp = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    for _ in range(2):
        assert len(np.unique(to_color_mode(ramp, "L"))) == 16
    (record,) = caplog.records
    assert "is 4,095, so data.bits = 16 leaves 16 grey levels" in record.message
    assert "set --data.bits 12" in record.message
    assert len(np.unique(to_color_mode(ramp, "L", 12))) == 256
    assert len(caplog.records) == 1
    assert (
        np.asarray(to_color_mode(Image.fromarray(np.full((2, 2), 5000, np.uint16)), "L", 12)).tolist()
        == [[255] * 2] * 2
    )
    assert "has pixels of 5,000, and data.bits = 12 clips them to white" in caplog.text


def png_of_16_bits(pixels):
    """Pillow writes no colour image of 16 bits: (height, width, 3), uint16, as a PNG file."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(("brightest", "said"), [(4095, 1), (65_535, 0), (0, 0)])
def test_few_levels_of_a_colour_image_of_16_bits_are_warned_once(caplog, brightest, said):
    pixels = np.zeros((4, 4, 3), np.uint16)
    pixels[1, 2, 0] = brightest
    for _ in range(2):
        image = read_image(png_of_16_bits(pixels))
        assert (image.mode, np.asarray(image).max()) == ("RGB", brightest >> 8)
    assert caplog.text.count("is so dark that 16 of 256 levels are left") == said
    assert len(caplog.records) == said


def test_the_setting_reaches_training_and_prediction(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((16, 16), 2048, np.uint16)).save(tmp_path / split / name / "0.png")
    batch = {"batch_size": 2, "micro_batch_size": 2, "data__mean": (0.0,), "data__std": (1.0,)}
    config = tiny_config(data__dataset="folder", data__path=str(tmp_path), data__bits=12, **batch)
    images, _ = next(iter(build_loaders(config, torch.device("cpu")).val))
    assert images.unique().tolist() == pytest.approx([128 / 255])
    image = Image.open(tmp_path / "val" / "a" / "0.png")
    assert Preprocessing.from_config(config).transform()(image).max() == 128 / 255


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.jpg").write_bytes(pointer)
    for file in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), io.BytesIO(pointer)):
        with pytest.raises(OSError, match="it is a Git LFS pointer and not the file itself: run git lfs pull"):
            read_image(file)
    (tmp_path / "a.jpg").write_bytes(b"version 1 of nothing")
    with pytest.raises(OSError, match="cannot identify image file"):
        read_image(tmp_path / "a.jpg")
