"""Settings from the command line, from YAML files and from plain dicts, and back again.

Only `parse_command_line` needs jsonargparse, and imports it when called. The settings in a checkpoint can therefore be
read without it.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vim.config.schema import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_logger = logging.getLogger(__name__)

PROG = "python -m vim.train"
CONFIG_FILE = "config.yaml"

_DESCRIPTION = """Train a Vision Mamba, or any other model that timm knows, on labelled images.

Without arguments: a small Vim on scikit-learn's digits, on the CPU, in less than a minute (two without g++).
Settings come from the defaults below, then --config FILE, then the command line; the last one wins.
Each run writes its settings, figures and weights into a folder of its own under runs/."""

_RUN_OPTIONS = {
    "config": "YAML file with settings, such as one of configs/.",
    "output": "Folder of this run; it must be new or empty. Default: runs/RECIPE-TIME.",
    "resume": "Folder of a run that stopped early; it resumes from its last checkpoint.",
}
_OTHER_OPTIONS = frozenset(_RUN_OPTIONS) | {"help", "print_config"}

# Settings that a resumed run may change: they do not affect the result.
_RESUME_MAY_CHANGE = frozenset(
    {"device", "eval_batch_size", "max_skipped_steps", "data.path", "data.workers", "data.pin_memory"}
    | {"compile", "model.grad_checkpointing", "save.steps", "save.minutes", "log.trackers", "log.steps"}
    | {"log.report"}
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """The parsed command line of `python -m vim.train`."""

    config: TrainConfig
    """The settings, resolved."""
    output: Path | None
    """Folder of a new run; `None` leaves the choice to the trainer."""
    resume: Path | None
    """Folder of the run to resume; `None` starts a new run."""


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as nested dicts of plain values, ready for YAML and for a checkpoint."""
    return _plain(dataclasses.asdict(config))


def config_from_dict(data: Mapping[str, Any], source: str = "the settings") -> TrainConfig:
    """Build the settings from nested dicts; missing settings take their defaults.

    Args:
        data: Nested settings as returned by `config_to_dict`.
        source: Origin of the settings, for error messages.

    Raises:
        ValueError: A setting is unknown (the message names the nearest one), or its value is out of range.
        TypeError: A value has a wrong type.
    """
    return _build(TrainConfig, data, source, "")


def dump_config(config: TrainConfig) -> str:
    """Return the settings as YAML for `--config`."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def setting_names() -> list[str]:
    """Return the dotted name of every setting, such as `optim.lr`, in the order of the schema."""
    return list(flatten(config_to_dict(TrainConfig())))


def parse_command_line(argv: Sequence[str]) -> Command:
    """Read the command line of `python -m vim.train`.

    Args:
        argv: The arguments, without the name of the program.

    Raises:
        ValueError: A setting is unknown, a value is out of range, or a file cannot be read; the message is one line.
        TypeError: A value has a wrong type.
        SystemExit: `--help` or `--print_config` was given and has been printed.
    """
    arguments = list(argv)
    _check_names((token[2:].split("=")[0] for token in arguments if token.startswith("--") and token != "--"), "")
    options = {name: _option_values(arguments, name) for name in ("config", "resume")}
    for path in options["config"]:
        _read_yaml(Path(path))
    if not options["resume"]:
        config, output, _ = _parse(arguments)
        return Command(config=config, output=output, resume=None)

    if options["config"]:
        raise ValueError(
            f"--config must not be given with --resume, which takes the run's own settings, got {options['config'][-1]}"
        )
    folder = Path(options["resume"][-1])
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"--resume must name the folder of a run: there is no {folder / CONFIG_FILE}")
    own = ["--config", str(folder / CONFIG_FILE)]
    config, output, _ = _parse(own + arguments)
    if output is not None:
        raise ValueError(f"--output must not be given with --resume, which writes into {folder}, got {output}")
    check_resumable(_parse(own)[0], config)
    return Command(config=config, output=None, resume=folder)


def _parse(arguments: Sequence[str]) -> tuple[TrainConfig, Path | None, Path | None]:
    """Run jsonargparse and build the settings from its result."""
    from argparse import ArgumentError

    try:
        parser = _make_parser()
        values = parser.parse_args(list(arguments)).as_dict()
        rest, dicts = _take_out(arguments, "model.args")
        if dicts and not _option_values(arguments, "model.name"):  # another model takes other arguments
            _say_what_is_dropped(parser.parse_args(rest).as_dict()["model"]["args"], values["model"]["args"])
    except ArgumentError as error:
        raise ValueError(_one_line(str(error))) from error
    values.pop("config")
    output, resume = values.pop("output"), values.pop("resume")
    config = _build(TrainConfig, values, "the command line", "")
    _check_text(config)
    return config, Path(output) if output else None, Path(resume) if resume else None


def _check_text(config: TrainConfig) -> None:
    """Raise for a value that is not UTF-8, which the YAML file of the run cannot hold."""
    for name, value in flatten(config_to_dict(config)).items():
        shown = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
        if shown != str(value):
            raise ValueError(f"{name} must be text in UTF-8, got {shown}: rename it, or link to it under another name")


def _make_parser() -> "ArgumentParser":
    """Make the parser: one option per setting, with type, default and docstring from the schema."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """jsonargparse's types and defaults in the help, and the description without reflowing."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--config FILE] [--output FOLDER] [--SETTING VALUE ...]\n       {PROG} --resume FOLDER",
        description=_DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help=_RUN_OPTIONS["config"])
    for name in ("output", "resume"):
        parser.add_argument(f"--{name}", type=str | None, default=None, metavar="FOLDER", help=_RUN_OPTIONS[name])
    defaults = TrainConfig()
    groups = {
        field.name: type(getattr(defaults, field.name))
        for field in dataclasses.fields(TrainConfig)
        if dataclasses.is_dataclass(getattr(defaults, field.name))
    }
    run = parser.add_argument_group("Run")
    run.add_class_arguments(TrainConfig, as_group=False, skip=set(groups))
    for name, group_type in groups.items():
        title = (group_type.__doc__ or name).strip().rstrip(".")
        group = parser.add_argument_group(title)
        group.add_class_arguments(group_type, name, as_group=False)
    return parser


def _build(kind: Any, data: Any, source: str, prefix: str) -> Any:
    """Build a dataclass of the schema, and the dataclasses nested in it, from a dict."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or source} must hold settings by name, got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _check_names((f"{prefix}{name}" for name in data if name not in fields), source)
    values = {}
    for name, value in data.items():
        factory = fields[name].default_factory
        if dataclasses.is_dataclass(factory):
            values[name] = _build(factory, value, source, f"{prefix}{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings and check their names."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {_one_line(str(error))}") from error
    if not isinstance(data, dict):
        raise ValueError(f"--config {path} must hold settings by name, got {type(data).__name__}")
    _check_names(flatten(data), str(path))
    return data


def _check_names(names: Iterable[str], source: str) -> None:
    """Raise for the first name that is not a setting; any name is allowed under `model.args`."""
    known = setting_names()
    groups = {name.split(".")[0] for name in known if "." in name}
    for name in names:
        if name in known or name in _OTHER_OPTIONS or name.startswith("model.args."):
            continue
        if name in groups:
            raise ValueError(f"{name} must hold settings by name, such as {name}.{_first_in_group(name, known)}")
        place = f" in {source}" if source else ""
        near = _nearest(name, known)
        hint = f"did you mean {near}?" if near else f"`{PROG} --help` lists them"
        raise ValueError(f"unknown setting {name}{place}: {hint}")


def _first_in_group(group: str, known: Sequence[str]) -> str:
    return next(name for name in known if name.startswith(f"{group}.")).split(".", 1)[1]


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the setting that was probably meant: the same last word in another group, or the closest spelling."""
    leaf = name.rsplit(".", 1)[-1]
    options = [*known, *_RUN_OPTIONS]
    same_leaf = [option for option in options if option.rsplit(".", 1)[-1] == leaf]
    whole = difflib.get_close_matches(name, same_leaf or options, n=1, cutoff=0.0 if same_leaf else 0.6)
    if whole:
        return whole[0]
    leaves = {option.rsplit(".", 1)[-1]: option for option in options}
    close = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[close[0]] if close else None


def check_resumable(before: TrainConfig, after: TrainConfig) -> None:
    """Check that a resumed run changes only settings that do not affect the result.

    Raises:
        ValueError: Another setting changed; the message names the first one and both values.
    """
    old, new = flatten(config_to_dict(before)), flatten(config_to_dict(after))
    for name, value in new.items():
        if name not in _RESUME_MAY_CHANGE and old.get(name) != value:
            raise ValueError(
                f"{name} must stay {old.get(name)!r} when a run is resumed, got {value!r}: start a new run to change it"
            )


def _option_values(arguments: Sequence[str], name: str) -> list[str]:
    """Return the values of an option in order, from `--name VALUE` and `--name=VALUE`."""
    values = [token.split("=", 1)[1] for token in arguments if token.startswith(f"--{name}=")]
    return values + [value for token, value in pairwise(arguments) if token == f"--{name}"]


def _say_what_is_dropped(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warn about arguments of the model that a dict on the command line has replaced; an empty one asks for that."""
    dropped = sorted(recipe.keys() - given.keys())
    if given and dropped:
        single = next(iter(given))
        _logger.warning(
            "--model.args replaces the recipe's, and so drops %s; --model.args.%s changes only one",
            ", ".join(f"{name}: {recipe[name]!r}" for name in dropped),
            single,
        )


def _take_out(arguments: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Return the arguments without an option, and the option's values in order."""
    rest, values, tokens = [], [], iter(arguments)
    for token in tokens:
        if token.startswith(f"--{name}="):
            values.append(token.partition("=")[2])
        elif token == f"--{name}" and (value := next(tokens, None)) is not None:
            values.append(value)
        else:  # another option, or one without its value, which the parser refuses
            rest.append(token)
    return rest, values


def flatten(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted name, such as `optim.lr`; `model.args` stays one dict."""
    return dict(_dotted_items(data, ""))


def _dotted_items(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "model.args":
            yield from _dotted_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """Return the value with all tuples replaced by lists, recursively."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_line(message: str) -> str:
    """Return an error of jsonargparse or of the YAML reader in one line, worded like our own errors."""
    line = " ".join(message.split())
    line = re.sub(r"<class '([\w.]+)'>", r"\1", line)
    line = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", line)
    line = re.sub(r'Parser key "([^"]+)": ', r"\1: ", line)
    line = re.sub(r": Expected an? (.+)\. Got value: ", r" must be \1, got ", line)
    union = re.fullmatch(r"([\w.]+): Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)", line)
    return f"{union[1]} must be one of the types {union[2]}, got {union[3]}" if union else line
