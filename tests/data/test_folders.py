"""Tar files and WebDataset's shards give the same images and labels as folders do."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import pytest
import torch
from PIL import Image

from tests.tiny_runs import tiny_config, write_image_folder
from vim.data.loaders import build_loaders
from vim.data.sources import open_image_sets

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "images", CLASSES, {"train": 8, "val": 3}, suffix=".png")


def config(dataset, path, **changes):
    return tiny_config(data__dataset=dataset, data__path=str(path), model__in_chans=3, **changes)


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_shards(images, root, label=lambda label: (".cls", str(label).encode()), samples=5):
    """Write the splits of an image folder as shards of so many samples."""
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"))
        (root / split).mkdir(parents=True)
        for start in range(0, len(files), samples):
            with tarfile.open(root / split / f"{start:05d}.tar", "w") as archive:
                for index, file in enumerate(files[start : start + samples], start):
                    extension, data = label(CLASSES.index(file.parent.name))
                    add(archive, f"{index:06d}{extension}", data)
                    add(archive, f"{index:06d}.png", file.read_bytes())
                add(archive, f"{start + samples:06d}.png", b"an image without a label is left out")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def everything(loaders):
    return torch.cat([images for images, _ in loaders.val]), torch.cat([labels for _, labels in loaders.val])


def test_a_tar_file_a_split_is_read_as_a_folder_is(images, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(images / split, arcname=".")
    loaders = build_loaders(config("folder", tmp_path), CPU)
    expected = build_loaders(config("folder", images), CPU)
    assert loaders.class_names == expected.class_names == tuple(CLASSES)
    assert all(map(torch.equal, everything(loaders), everything(expected)))
    assert next(iter(loaders.train))[0].equal(next(iter(expected.train))[0])


def test_the_class_is_the_first_folder_in_a_tar_file_too(images, tmp_path):
    """With folders around it and in it, hidden files of macOS, hard links, and a tar file a class inside."""
    image = (images / "val" / "ant" / "0.png").read_bytes()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name in ("ant/p1/0.png", "ant/p2/0.png", "bee/p1/0.png", "._ant", "ant/@eaDir/0.png", "ant/x.heic"):
                add(archive, f"./set/{name}", image)
            for name, kind in (("bee/1.png", tarfile.LNKTYPE), ("bee/2.png", tarfile.SYMTYPE)):
                link = tarfile.TarInfo(f"./set/{name}")
                link.type, link.linkname = kind, "./set/bee/p1/0.png"
                archive.addfile(link)
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as inside:
                add(inside, "0.png", image)
            add(archive, "set/cat.tar", inner.getvalue())
    sets = open_image_sets(config("folder", tmp_path))
    assert sets.class_names == ("ant", "bee", "cat")
    source = sets.train.source
    assert list(source.keys()) == [
        f"train.tar:set/{name}" for name in ("ant/p1/0.png", "ant/p2/0.png", "bee/1.png", "bee/p1/0.png", "cat/0.png")
    ]
    assert source.labels() == [0, 0, 1, 1, 2]
    expected = Image.open(io.BytesIO(image)).tobytes()
    assert all(source.read(index)[0].tobytes() == expected for index in range(5))
    assert source.passed_over == {".heic": 1, "link in an archive": 1}


def test_a_tar_file_that_is_compressed_is_refused_by_name(images, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w:gz") as archive:
            archive.add(images / split, arcname=".")
    with pytest.raises(ValueError, match=rf"damaged, compressed or not a tar file, {tmp_path / 'train.tar'}"):
        open_image_sets(config("folder", tmp_path))


def test_a_class_without_images_is_noticed_in_a_tar_file_too(images, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("benign/p1/0.png", "benign/p2/0.png"):
            add(archive, name, (images / "val" / "ant" / "0.png").read_bytes())
        folder = tarfile.TarInfo("malignant/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(ValueError, match=r"in folders of 'benign', and none is in 'malignant'"):
        open_image_sets(config("folder", tmp_path))


@pytest.mark.parametrize("kind", ["folder", "wds/"])
@pytest.mark.parametrize("damage", ["cut in a header", "flipped bit", "no end mark"])
def test_a_tar_file_that_is_damaged_between_images_is_refused(images, tmp_path, kind, damage):
    """Python's tarfile takes a damaged header for the end."""
    root = tmp_path / "archives"
    write_shards(images, root)
    if kind == "folder":
        shutil.rmtree(root)
        root.mkdir()
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}.tar", "w") as archive:
                archive.add(images / split, arcname=".")
    file = root / ("train.tar" if kind == "folder" else "train/00000.tar")
    with tarfile.open(file) as archive:
        header, end = archive.getmembers()[6].offset, archive.offset
    data = bytearray(file.read_bytes())
    if damage == "no end mark":  # which some programs do not write
        file.write_bytes(data[:end])
        assert len(open_image_sets(config(kind, root)).train) == 24
        return
    data[header + 3] ^= 4
    file.write_bytes(data[: header + 100] if damage == "cut in a header" else data)
    with pytest.raises(ValueError, match=rf"damaged, .*, {file}: damaged or truncated at byte {header:,}"):
        open_image_sets(config(kind, root))


def test_what_shards_hold_besides_labelled_images_is_counted(images, tmp_path):
    image = (images / "val" / "ant" / "0.png").read_bytes()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for name, data in (
                *(("0.png", image), ("0.cls", b"0"), ("1.JPG", image), ("1.png", image), ("1.cls", b"\xef\xbb\xbf1")),
                *(("2.heic", image), ("2.cls", b"1"), ("3.png", image), ("4.json", b'{"label": 0}'), ("5.txt", b"x")),
                *(("a.b.png", image), ("a.b.cls", b"1")),
            ):
                add(archive, name, data)
    (tmp_path / "classnames.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\n")  # as Windows' editor writes it
    sets = open_image_sets(config("wds/", tmp_path))
    assert sets.class_names == ("ant", "bee")
    assert list(sets.train.source.keys()) == ["train-0.tar:0.png", "train-0.tar:1.JPG"]
    assert sets.train.source.labels() == [0, 1]
    assert sets.train.source.passed_over == {
        "second image of a sample": 1,
        ".heic": 1,
        "label without an image": 1,
        "image without a label": 1,
        ".txt": 1,
        ".b.png": 1,  # the key of a sample ends at the first dot
    }


@pytest.mark.parametrize(("names", "words"), [(b"ant\nbee\nant\n", "'ant' twice"), (b"caf\xe9\n", "is not UTF-8")])
def test_names_of_classes_that_cannot_be_are_refused_with_their_file(images, tmp_path, names, words):
    write_shards(images, tmp_path)
    (tmp_path / "classnames.txt").write_bytes(names)
    with pytest.raises(ValueError, match=rf"{words}.*{tmp_path / 'classnames.txt'}"):
        open_image_sets(config("wds/", tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_as_a_folder_is(images, tmp_path, workers):
    write_shards(images, tmp_path / "shards")
    loaders = build_loaders(config("wds/", tmp_path / "shards", data__workers=workers), CPU)
    expected = build_loaders(config("folder", images), CPU)
    assert loaders.class_names == tuple(CLASSES)
    assert all(map(torch.equal, everything(loaders), everything(expected)))
    assert next(iter(loaders.train))[0].equal(next(iter(expected.train))[0])


def test_labels_of_shards_may_be_in_json_and_classes_without_names(images, tmp_path):
    write_shards(images, tmp_path, lambda label: (".json", json.dumps({"label": label, "text": "x"}).encode()))
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"data.dataset 'wds/' does not name its classes"):
        open_image_sets(config("wds/", tmp_path))
    sets = open_image_sets(config("wds/", tmp_path, model__num_classes=3))
    assert sets.class_names == ("0", "1", "2")
    assert [sets.val.source.read(index)[1] for index in range(9)] == [0] * 3 + [1] * 3 + [2] * 3
    assert sets.val.source.name(7) == f"{tmp_path}/val/00005.tar:000007.png"


def test_a_label_beyond_the_classes_is_named_and_left_out(images, tmp_path, caplog):
    write_shards(images, tmp_path)
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    loaders = build_loaders(config("wds/", tmp_path), CPU)
    assert torch.cat([labels for _, labels in loaders.val]).tolist() == [0] * 3 + [1] * 3
    assert loaders.val_unreadable.take() == 3
    assert "its label must be from 0 to 1, got 2" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_shards_that_cannot_be_used_are_refused(images, tmp_path, damage):
    write_shards(images, tmp_path)
    shard = tmp_path / "train" / "00000.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:3000])
    elif damage == "text":
        shard.write_text("not a tar file")
    else:
        for file in (tmp_path / "train").iterdir():
            file.unlink()
    reason = (
        "must have shards for the split 'train'"
        if damage == "empty"
        else rf"damaged, compressed or not a tar file, {shard}"
    )
    with pytest.raises(ValueError, match=reason):
        open_image_sets(config("wds/", tmp_path))


def test_a_stream_is_refused_and_says_what_to_use():
    with pytest.raises(ValueError, match=r"'hfids/cifar10' is a stream: use hfds/NAME, or wds/"):
        open_image_sets(tiny_config(data__dataset="hfids/cifar10"))
    with pytest.raises(ValueError, match=r"data.path must name the folder of shards when data.dataset is 'wds/'"):
        tiny_config(data__dataset="wds/")
