"""Files that no run can be carried on from: each is refused in one line, runs no code, and stays as it is."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import zipfile

import pytest
import torch

from tests.helpers import assert_refused
from tests.tiny_runs import TINY_OPTIONS, tiny_config
from vim import train
from vim.checkpoints.io import CheckpointError, load_weights, save_checkpoint, save_weights
from vim.inference.trained_model import load_trained_model
from vim.models.build import build_model, without_weights
from vim.models.starting_weights import load_starting_weights
from vim.tasks.classification import ClassificationTask
from vim.training.state import Position


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def cut(path, mark):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(member):
    """Flip a bit in the middle of a member of the archive."""

    def damage(path, mark):
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith(member))
        data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2 + 64] ^= 16
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


def set_in(name, **values):
    return change(lambda contents: contents[name].update(values))


def first_state(edit):
    """Change what the optimizer keeps of its first parameter."""
    return change(lambda contents: edit(contents["optimizer"]["state"][0]))


def first_group(edit):
    return change(lambda contents: edit(contents["optimizer"]["param_groups"][0]))


DAMAGES = {
    "half": (cut, "is truncated, damaged or not a checkpoint"),
    "a bit in the tensors": (flip("/data/0"), "is damaged: the checksum of"),
    "a bit in the structure": (flip("/data.pkl"), "is damaged: the checksum of"),
    "code in it": (insert_attack, "holds objects other than plain data, and was not loaded"),
    "a plain pickle": (replace(write_plain_pickle), "is truncated, damaged or not a checkpoint"),
    "an old format": (replace(write_legacy), "is truncated, damaged or not a checkpoint"),
    "another archive": (replace(write_zip), "is a zip file but not a PyTorch checkpoint"),
    "text": (replace(lambda path, mark: path.write_text("hello")), "is truncated, damaged or not a checkpoint"),
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
    "an average of another shape": (
        first_state(lambda state: state.update(exp_avg=torch.zeros(3))),
        "cannot be resumed from: the optimizer's 'exp_avg' of ",
    ),
    "an average of text": (first_state(lambda state: state.update(exp_avg_sq="0")), "got of type str"),
    "no average": (first_state(lambda state: state.pop("exp_avg")), "got of type NoneType"),
    "many counts of steps": (first_state(lambda state: state.update(step=torch.zeros(2))), "must be a tensor (), got"),
    "a decay of text": (first_group(lambda group: group.update(weight_decay="x")), "optimizer's 'weight_decay' must"),
    "no betas": (first_group(lambda group: group.pop("betas")), "the optimizer's 'betas' must be like (0.9, 0.999)"),
    "a position of a wrong kind": (change(lambda contents: contents.update(position=7)), "cannot be resumed from"),
    "an epoch that is text": (set_in("position", epoch="1"), "position.epoch must be a whole number >= 0, got '1'"),
    "settings of a wrong kind": (change(lambda contents: contents.update(config=[1])), "must hold settings by name"),
    "a setting of a wrong kind": (
        change(lambda contents: contents["config"]["data"].update(dataset=5)),
        "cannot be resumed from",
    ),
    "weights of a wrong kind": (change(lambda contents: contents.update(model=3)), "cannot be resumed from"),
    "a weight that is a number": (
        change(lambda contents: contents["model"].update({"head.weight": 1.0})),
        "does not fit the model: 'head.weight' must be a tensor, got float",
    ),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    options = ["--data.dataset", "synthetic", "--data.synthetic_images", "64", "--output", str(folder)]
    assert train.main([*TINY_OPTIONS, *options]) == 0
    return folder


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


ENVIRONMENTS = {
    "cut short": '[{"started": "2',
    "of a wrong kind": '{"started": "2025"}',
    "no text": b"\xff\xfe",
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_a_damaged_record_of_environments_is_refused_in_one_line(kind, tmp_path, capfd, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    text = ENVIRONMENTS[kind]
    (folder / "environment.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(train, ["--resume", str(folder)], "environment.json", capfd)


def edit_best(edit):
    def damage(folder):
        contents = torch.load(folder / "best.pth", weights_only=True)
        edit(contents)
        save_checkpoint(folder / "best.pth", contents)
        return folder

    return damage


def edit_metadata(metadata):
    def damage(folder):
        path = folder / "best.safetensors"
        save_weights(path, load_weights(path)[0], metadata)
        return path

    return damage


MALFORMED = {
    "settings are a list": (edit_best(lambda c: c.update(config=[1])), "must hold settings by name, got [1]"),
    "settings are none": (edit_best(lambda c: c.update(config=None)), "must hold settings by name, got None"),
    "a name is a number": (edit_best(lambda c: c["config"]["data"].update(dataset=5)), "cannot be used"),
    "a size is missing": (edit_best(lambda c: c["config"]["model"].update(img_size=[16])), "cannot be used"),
    "an argument is text": (edit_best(lambda c: c["config"]["model"]["args"].update(depth="x")), "cannot be used"),
    "classes are a number": (edit_best(lambda c: c.update(class_names=10)), "class_names must be a list"),
    "classes are numbers": (edit_best(lambda c: c.update(class_names=[*range(10)])), "class_names must be a list"),
    "weights are a list": (edit_best(lambda c: c.update(model=[1], model_ema=[1])), "must be tensors by name"),
    "weights are numbers": (edit_best(lambda c: c.update(model={"a": 1}, model_ema={"a": 1})), "must be tensors"),
    "the kind of weights is a list": (edit_best(lambda c: c.update(weights=["ema"])), "'raw' or 'ema', got ['ema']"),
    "metadata are cut short": (edit_metadata({"vimamba": '{"config":'}), "its settings are not JSON"),
    "metadata are a list": (edit_metadata({"vimamba": "[]"}), "cannot be used"),
    "metadata lack settings": (edit_metadata({"vimamba": "{}"}), "cannot be used: KeyError: 'config'"),
    "metadata are too deep": (edit_metadata({"vimamba": "[" * 100_000}), "its settings are not JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(name, tmp_path, capfd, whole_run):
    """By what looks at it, and by what starts from it."""
    damage, message = MALFORMED[name]
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    source = damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_trained_model(str(source))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    config = tiny_config(model__checkpoint=str(source)).model
    model = build_model(without_weights(config), 10)
    with contextlib.suppress(ValueError):  # the weights themselves may be whole
        load_starting_weights(model, config)


ROW = {"epoch": 1, "step": 4}
POSITION = {"epoch": 1, "step": 4, "history": [ROW], "best": {"epoch": 1, "weights": "raw", "top1": 9.0, "loss": 2.0}}


def test_a_position_that_a_run_can_have():
    assert Position.from_dict(POSITION, 4, ClassificationTask) == Position(**POSITION)
    assert Position.from_dict({}, 4, ClassificationTask) == Position()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"updates": 5},
        {"epoch": 1.0},
        {"epoch": True},
        {"meter": {"steps": 1}},
        {"meter": [1]},
        {"history": []},
        {"history": [1]},
        {"history": [{"step": 1}]},
        {"epoch": 2, "history": [ROW, {**ROW, "more": 1}]},
        {"best": None},
        {"best": [1]},
        {"best": {"epoch": 1, "top1": "9", "loss": 1.0}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_position_that_no_run_can_have(changes):
    """`RunState.load_state_dict` makes one line of each of these."""
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)):
        Position.from_dict({**POSITION, **changes}, 4, ClassificationTask)
