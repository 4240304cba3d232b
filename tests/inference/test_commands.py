"""Commands end in one line and code 2 for what cannot be done, and leave nothing half written."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import assert_refused
from vim import benchmark, convert, export, predict, train, validate
from vim.checkpoints.io import save_checkpoint
from vim.inference import export as exporting
from vim.inference.export import Checked
from vim.models.build import create_named
from vim.runtime import distributed


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (export, ["no_such_model", "{}/x.onnx"], "model.name must be a model that timm knows, got 'no_such_model'"),
        (export, ["vim_tiny_patch16_224", "{}/x.pth"], "out must end in .onnx"),
        (export, ["vit_tiny_patch16_224", "{}/x.onnx", "--dtype", "float64"], "dtype must be one of"),
        (export, ["vim_tiny_patch16_224", "{}/x.onnx", "--checkpoint_path", "{}/none.pth"], ""),
        (export, ["", "{}/x.onnx"], "model must be a run folder"),
        (export, ["vim_tiny_patch16_224", __file__ + "/x.onnx"], "out must be in a folder, and"),
        (export, ["vim_tiny_patch16_224", "{}/x.onnx", "--quantize", "int4"], "quantize must be one of"),
        (benchmark, ["--models", "[no_such_model]"], "timm knows no model 'no_such_model'"),
        (benchmark, ["--rounds", "0"], "rounds must be >= 1"),
        (convert, ["{}", "{}/x.safetensors"], "there is no checkpoint"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(command, arguments, message, tmp_path, capsys):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert_refused(command, arguments, message, capsys)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_load_are_named(tmp_path, capsys):
    (tmp_path / "junk.pth").write_text("junk\n")
    arguments = ["vim_tiny_patch16_224", str(tmp_path / "x.onnx"), "--checkpoint_path", str(tmp_path / "junk.pth")]
    assert_refused(export, arguments, "junk.pth does not load: KeyError", capsys)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (train, "--optim.lr LR"),
        (validate, "--batch-size"),
        (predict, "--topk"),
        (export, "checkpoint_path"),
        (convert, "--weights"),
        (benchmark, "--rounds"),
    ],
)
def test_help_names_the_module_and_its_options(command, option, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m {command.__name__} ")
    assert option in printed


def test_an_unknown_option_ends_with_code_2(capsys):
    for command in (export, benchmark):
        with pytest.raises(SystemExit) as caught:
            command.main(["--no-such-option"])
        assert caught.value.code == 2


def test_a_convolutional_network_has_no_size(monkeypatch, tmp_path):
    written = []
    checked = Checked(difference=0.0, agreement=1.0, images=8)
    monkeypatch.setattr(exporting, "write_checked", lambda *arguments, **options: written.append(arguments) or checked)
    monkeypatch.setitem(exporting.FORMATS, "onnx", dataclasses.replace(exporting.FORMATS["onnx"], describe=str))
    exporting.export_model("resnet18", str(tmp_path / "m.onnx"), img_size=64)
    ((network, _, _, samples),) = written
    assert samples.shape[1:] == (3, 64, 64)
    assert network(samples[:1]).shape == (1, 1000)


def test_an_assertion_of_timm_is_an_error_in_words():
    with pytest.raises(ValueError, match="dim should be divisible by num_heads"):
        create_named("vit_tiny_patch16_224", embed_dim=32)


def test_a_run_folder_is_converted(tmp_path):
    model = create_named("vim_tiny_patch16_224", depth=1)
    save_checkpoint(tmp_path / "best.pth", {"model": model.state_dict()})
    assert convert.main([str(tmp_path), str(tmp_path / "out.safetensors")]) == 0
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_an_export_that_is_stopped_leaves_nothing(tmp_path):
    """It waits in place of the exporter, with its folder made."""
    code = (
        "import sys, time, torch; from vim import export\n"
        "torch.onnx.export = lambda *args, **kwargs: (print('begun', flush=True), time.sleep(60))\n"
        f"sys.exit(export.main(['vim_tiny_patch16_224', {str(tmp_path / 'x.onnx')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert list(tmp_path.iterdir())
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_cannot_be_resolved_is_said_soon(monkeypatch, capsys):
    asked = []

    def fail(name, port):
        asked.append(name)
        raise socket.gaierror(-2, "Name or service not known")

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nod0", "MASTER_PORT": "29500"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.socket, "getaddrinfo", fail)
    monkeypatch.setattr(distributed, "_RESOLVING", 0.1)
    message = "MASTER_ADDR must be the name or address of the machine of process 0, and 'nod0' cannot be resolved: "
    assert_refused(train, [], message, capsys)
    assert len(asked) > 1, "the name may appear while a cluster starts"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "LOCAL_RANK is not set, but WORLD_SIZE is 2: start the processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK must be a number, got ''"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "2"}, "RANK must be < WORLD_SIZE = 2, got 2: start"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}, "the 2 processes cannot meet at None:None: "),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ({"MASTER_PORT": "in use"}, "MASTER_PORT chooses another port"),
    ],
)
def test_processes_that_cannot_meet(environment, message, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    listener = None
    if "MASTER_PORT" in environment:
        listener = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(listener.port)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(train, [], message, capsys)
    assert os.environ["WORLD_SIZE"]
