"""Looking at a file connects to nobody, whatever the file says."""

from __future__ import annotations

import json
import socket

import huggingface_hub
import pytest

from tests.tiny_runs import tiny_config
from vim.checkpoints.io import CheckpointError, save_checkpoint
from vim.config.load import config_to_dict
from vim.inference.trained_model import load_trained_model
from vim.models.build import build_model, without_download


@pytest.fixture
def connections(monkeypatch):
    """What is connected to, in a process that may."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse(None, args))
    return tried


def save_run(path, **changes):
    config = config_to_dict(tiny_config())
    for name, value in changes.items():
        group, _, name = name.partition("__")
        config[group][name] = value
    weights = {"model": {}, "model_ema": None, "weights": "raw", "class_names": ["a", "b"]}
    save_checkpoint(path, {"config": config, **weights})


@pytest.mark.parametrize("name", ["hf-hub:nobody/model", "hf_hub:nobody/model"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_model_of_the_hub(name, pretrained, tmp_path, connections):
    save_run(tmp_path / "best.pth", model__name=name, model__pretrained=pretrained)
    with pytest.raises(CheckpointError, match="nobody/model") as caught:
        load_trained_model(str(tmp_path / "best.pth"))
    assert "\n" not in str(caught.value)
    assert connections == []


def test_a_model_of_the_hub_is_built_from_its_description_in_the_cache(tmp_path, connections, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    description = {"architecture": "resnet10t", "model_args": {"stem_width": 8}, "pretrained_cfg": {}}
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(description))
    config = without_download(tiny_config(model__name="hf-hub:somebody/model", model__args={}).model)
    model = build_model(config, 2)
    assert model.conv1[0].out_channels == 6  # three quarters of stem_width
    assert connections == []


def test_data_that_its_run_fetched(tmp_path, connections):
    config = tiny_config(data__dataset="torch/cifar10", data__path=str(tmp_path), data__download=True)
    from vim.inference.validation import ValidateOptions, validate

    model = build_model(config.model, 10)
    names = [str(i) for i in range(10)]
    weights = {"model": model.state_dict(), "model_ema": None, "weights": "raw", "class_names": names}
    save_checkpoint(tmp_path / "best.pth", {"config": config_to_dict(config), **weights})
    with pytest.raises(ValueError, match="cannot be opened"):
        validate(ValidateOptions(source=str(tmp_path / "best.pth")))
    assert connections == []
