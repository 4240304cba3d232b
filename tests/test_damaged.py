"""Twenty files that no run can be carried on from: each is refused in one line, runs no code, and stays as it is."""

from __future__ import annotations

import pickle
import shutil
import zipfile

import pytest
import torch

from tests.training import TINY_OPTIONS
from vim import train
from vim.checkpoints.io import save_checkpoint


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def cut(share):
    return lambda path, mark: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(member):
    """Flip a bit in the middle of a member of the archive."""

    def damage(path, mark):
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith(member))
        data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2 + 64] ^= 16
        path.write_bytes(data)

    return damage


def overwrite(start, count):
    """Put zeros into the file, from a share of its length on."""

    def damage(path, mark):
        data = bytearray(path.read_bytes())
        place = int(start * len(data))
        data[place : place + count] = bytes(count)
        path.write_bytes(data)

    return damage


def change(edit):
    """Save other contents, with the checksums that belong to them."""

    def damage(path, mark):
        contents = torch.load(path, weights_only=True)
        edit(contents)
        save_checkpoint(path, contents)

    return damage


def replace(write):
    def damage(path, mark):
        path.unlink()
        write(path, mark)

    return damage


def insert_attack(path, mark):
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "history": Attack(mark)}, path)


def write_plain_pickle(path, mark):
    path.write_bytes(pickle.dumps({"format": "vimamba", "format_version": 1, "model": Attack(mark)}))


def write_legacy(path, mark):
    torch.save({"model": Attack(mark)}, path, _use_new_zipfile_serialization=False)


def write_zip(path, mark):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def drop(name):
    return change(lambda contents: contents.pop(name))


DAMAGES = {
    "empty": (cut(0.0), "is truncated, damaged or no checkpoint"),
    "a tenth": (cut(0.1), "is truncated, damaged or no checkpoint"),
    "half": (cut(0.5), "is truncated, damaged or no checkpoint"),
    "all but the end": (cut(0.9999), "is truncated, damaged or no checkpoint"),
    "a bit in the tensors": (flip("/data/0"), "is damaged: the checksum of"),
    "a bit in the structure": (flip("/data.pkl"), "is damaged: the checksum of"),
    "zeros at the start": (overwrite(0.0, 64), "damaged"),
    "zeros in the middle": (overwrite(0.5, 512), "damaged"),
    "zeros at the end": (overwrite(0.999, 4096), "damaged"),
    "code in it": (insert_attack, "holds objects other than plain data, and was not loaded"),
    "a plain pickle": (replace(write_plain_pickle), "is truncated, damaged or no checkpoint"),
    "an old format": (replace(write_legacy), "is truncated, damaged or no checkpoint"),
    "another archive": (replace(write_zip), "is a zip file but no checkpoint of PyTorch"),
    "text": (replace(lambda path, mark: path.write_text("hello")), "is truncated, damaged or no checkpoint"),
    "of somebody else": (replace(lambda path, mark: torch.save({"model": {}}, path)), "was not written by vim.train"),
    "another model": (
        change(lambda contents: contents["model"].update({"head.weight": torch.zeros(3, 16)})),
        "does not fit the model: 'head.weight' has shape (3, 16)",
    ),
    "other settings": (
        change(lambda contents: contents["config"]["optim"].update(lr=1.0)),
        "optim.lr must stay 1.0 when a run is resumed",
    ),
    "no optimizer": (drop("optimizer"), "cannot be resumed from: it lacks 'optimizer'"),
    "an optimizer of another model": (
        change(lambda contents: contents["optimizer"]["param_groups"].pop()),
        "cannot be resumed from: loaded state dict has a different number of parameter groups",
    ),
    "a position of a wrong kind": (change(lambda contents: contents.update(position=7)), "cannot be resumed from"),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    options = ["--data.dataset", "synthetic", "--data.synthetic_images", "64", "--output", str(folder)]
    assert train.main([*TINY_OPTIONS, *options]) == 0
    return folder


def test_there_are_twenty():
    assert len(DAMAGES) == 20


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_is_run_or_lost(tmp_path, capfd, whole_run, name):
    damage, message = DAMAGES[name]
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(whole_run, folder)
    damage(folder / "last.pth", mark)
    mark.unlink(missing_ok=True)  # torch.save opens nothing, but pickling may have
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train.main(["--resume", str(folder)]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith("vim.train: ")
    assert "last.pth" in error
    assert message in error
    assert not mark.exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
