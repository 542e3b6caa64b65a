"""
Command lines of the recipes: options from dataclasses and a YAML config, tables, and errors without a traceback.

Import this module before torch and `trainer`: it sets a variable that torch reads when it loads, and checks that
`trainer` is the package of this project.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Torch reads this once, when it loads. Threads that wait for work then sleep, where spinning would take the cores from
# other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml
from transformers import HfArgumentParser

import trainer

if not Path(trainer.__file__).with_name("cosup_trainer.py").exists():
    sys.exit(
        f"`import trainer` found {trainer.__file__}, another package; "
        "run `pip uninstall trainer` and install this project again."
    )

EXPECTED = {int: "an integer", float: "a number"}  # type of an option -> name in errors


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the line breaks of the description and shows the default of each option."""


class Parser(HfArgumentParser):
    """
    `HfArgumentParser` with three more keys in the metadata of a field.

    Args of `add_argument`:
        positional (`bool`): the argument has no name on the command line.
        flag (`bool`): the option takes no value, so that a positional argument may follow it.
        may_be_empty (`bool`): the option takes a list, which may be empty.
    """

    def add_argument(
        self, *names: Any, positional: bool = False, flag: bool = False, may_be_empty: bool = False, **options: Any
    ) -> argparse.Action:
        if flag:
            options = {"action": "store_true", "default": False, "help": options["help"]}
        if may_be_empty:
            options["nargs"] = "*"
        if positional:
            names = (names[0].removeprefix("--"),)
            options.pop("required", None)  # a positional argument is required unless it is a list that may be empty
        return super().add_argument(*names, **options)


def parse(dataclasses: Sequence[Any], description: str | None, argv: Sequence[str] | None = None) -> list[Any]:
    """
    Return dataclass instances from `--config file.yaml` and the command line; the command line wins.

    `HfArgumentParser` alone reads either a YAML file or the command line. As in TRL's parser, the values of the file
    become the defaults of the command line.

    Args:
        dataclasses (sequence of dataclass types): their fields become options; see [`Parser`] for the metadata.
        description (`str`, *optional*): description of the program, e.g. the docstring of its module.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Returns:
        `list`: one instance of each dataclass, in order.

    Raises:
        `SystemExit`: names the config file and key if the key is not an option or its value does not fit; shows the
            message of a `ValueError` that a dataclass raises.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(dataclasses, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="YAML file with any of the options here; the command line wins")
    config_finder = argparse.ArgumentParser(add_help=False)
    config_finder.add_argument("--config", type=Path)
    known, _ = config_finder.parse_known_args(arguments)
    if known.config is not None:
        set_defaults(parser, known.config)
    with clear_errors():
        *instances, unknown = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return instances[: len(dataclasses)]  # the last one is a namespace with `config`


def set_defaults(parser: argparse.ArgumentParser, path: Path) -> None:
    """
    Make the values of a YAML file the defaults of a parser.

    Raises:
        `SystemExit`: names the file, and the key that is not an option or has a value that does not fit.
    """
    if not path.is_file():
        sys.exit(f"--config {path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        sys.exit(f"{path}: malformed YAML: {error}")
    if not isinstance(values, dict):
        sys.exit(f"{path}: found {type(values).__name__}, expected options, `name: value` a line.")
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions:
            sys.exit(f"{path}: unknown option {name!r}.")
        actions[name].required = False
        values[name] = convert(value, actions[name], f"{path}: {name}")
    parser.set_defaults(**values)


def convert(value: Any, action: argparse.Action, where: str) -> Any:
    """
    Convert a value of a YAML file to what the command line would give.

    argparse does not check defaults, and YAML reads `1e-4` as a string. An option that takes several values gets a
    list, even from a single value.

    Args:
        value: the value in the file.
        action (`argparse.Action`): the option.
        where (`str`): file and key, for the beginning of an error.

    Raises:
        `SystemExit`: if the value does not fit the option.
    """
    if value is None:
        return None
    if action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [value]
        return [convert_one(item, action, where) for item in items]
    return convert_one(value, action, where)


def convert_one(value: Any, action: argparse.Action, where: str) -> Any:
    """Convert one value of an option, see [`convert`]."""
    to_type: Any = action.type
    if callable(to_type) and (isinstance(value, str) or to_type in EXPECTED):
        expected = EXPECTED.get(to_type, "true or false")
        try:
            value = to_type(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            sys.exit(f"{where} is {value!r}, expected {expected}.")
    if action.choices is not None and value not in action.choices:
        sys.exit(f"{where} is {value!r}, expected one of {', '.join(map(str, action.choices))}.")
    return value


def table(rows: Sequence[tuple[str, Any]]) -> str:
    """Return the rows as two aligned columns of text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


def table_of_counts(counts: Mapping[str, int]) -> str:
    """Return names with their counts, one per line."""
    return table([(name, f"{count:>10,}") for name, count in counts.items()])


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """
    End the program with the message of an error alone, on the last line, and exit code 1.

    This covers errors of bad input, and of optional packages that are not installed.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
