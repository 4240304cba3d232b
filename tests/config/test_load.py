"""The command line, YAML files and dicts give the same settings, and a slip of the pen is named."""

from __future__ import annotations

import os
import re

import pytest

from tests.tiny_runs import change
from vim.config.load import (
    CONFIG_FILE,
    config_from_dict,
    config_to_dict,
    dump_config,
    parse_command_line,
    setting_names,
)
from vim.config.schema import TrainConfig

CHANGED = change(
    TrainConfig(),
    recipe="trial",
    precision="bfloat16",
    ema_decay=None,
    eval_batch_size=7,
    model__img_size=(16, 24),
    model__in_chans=3,
    model__args={"depth": 2, "directions": "v1", "rotary_side": 7},
    data__mean=(0.1, 0.2, 0.3),
    data__dataset="synthetic",
    augment__color_jitter=0.25,
    augment__scale=(0.5, 0.75),
    optim__lr=1e-7,
    optim__betas=(0.9, 0.95),
    optim__no_weight_decay=(),
    optim__clip_grad=None,
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_argument_gives_the_defaults():
    command = parse_command_line([])
    assert command.config == TrainConfig()
    assert command.output is None
    assert command.resume is None


def test_written_settings_read_back_equal(tmp_path):
    file = write(tmp_path / "config.yaml", dump_config(CHANGED))
    assert parse_command_line(["--config", file]).config == CHANGED
    assert config_from_dict(config_to_dict(CHANGED)) == CHANGED


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", "epochs: 7\noptim: {lr: 1e-4, weight_decay: 0.2}\n")
    config = parse_command_line(["--config", file, "--optim.lr=3e-4"]).config
    assert (config.epochs, config.optim.lr, config.optim.weight_decay) == (7, 3e-4, 0.2)
    assert config.batch_size == TrainConfig().batch_size


@pytest.mark.parametrize(
    ("arguments", "dropped"),
    [
        (["--model.args", "{depth: 3}"], "embed_dim: 64, rotary: 'residual'"),
        (["--model.args={depth: 3, embed_dim: 32}"], "rotary: 'residual'"),
        (["--model.args", "{depth: 3, embed_dim: 32, rotary: all}"], None),
        (["--model.args", "{}"], None),  # which asks for it
        (["--model.args", "{depth: 3}", "--model.name", "vit_tiny_patch16_224"], None),  # which takes other arguments
        (["--model.args.depth", "3"], None),
    ],
)
def test_a_dict_of_model_arguments_names_what_it_drops_of_the_recipe(arguments, dropped, tmp_path, caplog):
    recipe = write(tmp_path / "recipe.yaml", "model: {args: {depth: 2, embed_dim: 64, rotary: residual}}\n")
    parse_command_line(["--config", recipe, *arguments])
    said = f"--model.args replaces the recipe's, and so drops {dropped}; --model.args.depth changes only one"
    assert [record.getMessage() for record in caplog.records] == ([] if dropped is None else [said])


def test_arguments_of_the_model_are_replaced_by_a_file_and_added_to_by_the_command_line(tmp_path):
    file = write(tmp_path / "a.yaml", "model: {args: {depth: 3}}\n")
    config = parse_command_line(["--config", file, "--model.args.embed_dim", "48"]).config
    assert config.model.args == {"depth": 3, "embed_dim": 48}


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--optim.lrr", "optim.lr"),
        ("--lr", "optim.lr"),
        ("--epoch", "epochs"),
        ("--data.workerss", "data.workers"),
        ("--augment.mix_up", "augment.mixup"),
        ("--optim.label_smoothing", "loss.label_smoothing"),
        ("--confg", "config"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(argument, nearest):
    with pytest.raises(ValueError, match=f"unknown setting {argument[2:]}: did you mean {re.escape(nearest)}"):
        parse_command_line([argument, "1"])


def test_an_option_like_no_other_points_to_the_help():
    with pytest.raises(ValueError, match=r"unknown setting qqqqq: `python -m vim.train --help` lists them"):
        parse_command_line(["--qqqqq", "1"])


def test_an_unknown_key_in_a_file_is_refused_with_the_file_and_the_nearest_known_one(tmp_path):
    file = write(tmp_path / "a.yaml", "optim:\n  weight_deacy: 0.1\n")
    with pytest.raises(ValueError, match=r"unknown setting optim.weight_deacy in .*a.yaml: did you mean optim.weight"):
        parse_command_line(["--config", file])


def test_an_unknown_key_in_a_dict_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"unknown setting schedule.warmup in the file: did you mean schedule.warmup"):
        config_from_dict({"schedule": {"warmup": 3}}, "the file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "fast"], "optim.lr must be float, got fast"),
        (["--optim.lr", "-1"], "optim.lr must be > 0, got -1.0"),
        (["--epochs", "1.5"], "epochs must be int, got 1.5"),
        (["--precision", "fp16"], "precision.*float16.* fp16"),
        (["--optim.betas", "3"], r"optim.betas must be .*tuple\[float, float\].*, got 3"),
        (["--augment.scale", "[0.5]"], r"augment.scale must be .*2 elements, got \[0.5\]"),
        (["--model.args", "deep"], "model.args must be dict, got deep"),
        (["--model", "vim"], "model must hold settings by name, such as model.name"),
        (["--epochs"], "--epochs.* expected one argument"),
        (["digits"], "[Uu]nrecognized arguments: digits"),
        (["--config", "/nowhere/a.yaml"], "--config /nowhere/a.yaml cannot be read: No such file"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_its_option(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_command_line(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [3\n", "is not YAML"), ("- 3\n", "must hold settings by name, got list"), ("optim: 3\n", "optim must")],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_command_line(["--config", write(tmp_path / "a.yaml", text)])
    assert "\n" not in str(caught.value)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name in setting_names():
        described = re.search(rf" --{re.escape(name)} (?:\{{.*?\}}|\S+) (\S+)", words)
        assert described, f"{name} is not in the help"
        assert not described[1].startswith(("(type", "--")), f"{name} has no description"


def test_resuming_takes_the_settings_of_the_run_and_only_where_it_computes_may_change(tmp_path):
    write(tmp_path / CONFIG_FILE, dump_config(CHANGED))
    command = parse_command_line(["--resume", str(tmp_path), "--device", "cpu", "--data.workers=2"])
    assert command.resume == tmp_path
    assert command.config == change(CHANGED, device="cpu", data__workers=2)
    with pytest.raises(ValueError, match=r"optim.lr must stay 1e-07 when a run is resumed, got 0.01"):
        parse_command_line(["--resume", str(tmp_path), "--optim.lr", "0.01"])
    with pytest.raises(ValueError, match="--config must not be given with --resume"):
        parse_command_line(["--resume", str(tmp_path), "--config", str(tmp_path / CONFIG_FILE)])
    with pytest.raises(ValueError, match="--output must not be given with --resume"):
        parse_command_line(["--resume", str(tmp_path), "--output", "elsewhere"])
    with pytest.raises(ValueError, match=r"--resume must name the folder of a run: there is no .*nowhere/config.yaml"):
        parse_command_line(["--resume", str(tmp_path / "nowhere")])


def test_a_value_that_is_not_text_is_refused_for_no_file_of_settings_could_hold_it():
    with pytest.raises(ValueError, match=r"data.path must be text in UTF-8, got d\\udce9: rename it, or link to it"):
        parse_command_line(["--data.dataset", "folder", "--data.path", os.fsdecode(b"d\xe9")])
