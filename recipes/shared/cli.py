"""
Command lines of the recipes: dataclasses become options, a YAML config sets them, tables, and clear endings.

Import this module before torch and before `trainer`: it sets what torch reads when it loads, and checks that `trainer`
is the package of this project.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read once, when torch loads: threads that wait for work sleep. Spinning, they take the cores from other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml
from transformers import HfArgumentParser

import trainer

if not Path(trainer.__file__).with_name("cosup_trainer.py").exists():
    sys.exit(
        f"`import trainer` found {trainer.__file__}, another package; "
        "run `pip uninstall trainer` and install this project again."
    )

EXPECTED = {int: "an integer", float: "a number"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of each option."""


class Parser(HfArgumentParser):
    """
    `HfArgumentParser` that knows three more keys in the metadata of a field.

    Args of `add_argument`:
        positional (`bool`): the option has no name on the command line.
        flag (`bool`): the option takes no value, so that what comes next may be a positional one.
        may_be_empty (`bool`): the option takes a list, which may hold nothing.
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
    Dataclass instances from `--config file.yaml` and the command line; the command line wins.

    `HfArgumentParser` alone reads either a YAML file or the command line. As in TRL's parser, the values of the file
    become the defaults of the command line.

    Args:
        dataclasses (sequence of dataclass types): fields become options; see [`Parser`] for their metadata.
        description (`str`, *optional*): of the program, e.g. the docstring of its module.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Returns:
        `list`: an instance of each dataclass.

    Raises:
        `SystemExit`: with the config file and key, when a key is no option or its value is of another kind; with the
            message of a `ValueError` that a dataclass raises.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(dataclasses, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="YAML file with any of the options here; the command line wins")
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args(words)[0].config
    if config is not None:
        set_defaults(parser, config)
    with clear_errors():
        *parsed, unknown = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed[: len(dataclasses)]  # the next one is a namespace with `config`


def set_defaults(parser: argparse.ArgumentParser, path: Path) -> None:
    """
    Make the values of a YAML file the defaults of a parser.

    Raises:
        `SystemExit`: names the file, and the key that is no option or whose value is none of the option.
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
    A value of a YAML file as the command line would give it.

    argparse checks no defaults, and YAML reads `1e-4` as a string.

    Raises:
        `SystemExit`: begins with `where`.
    """
    if value is None:
        return None
    kind: Any = action.type
    if callable(kind) and (isinstance(value, str) or kind in EXPECTED):
        expected = EXPECTED.get(kind, "true or false")
        try:
            value = kind(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            sys.exit(f"{where} is {value!r}, expected {expected}.")
    if action.choices is not None:
        for choice in value if isinstance(value, list) else [value]:
            if choice not in action.choices:
                sys.exit(f"{where} is {choice!r}, expected one of {', '.join(map(str, action.choices))}.")
    return value


def table(rows: Sequence[tuple[str, Any]]) -> str:
    """Two columns of text, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


def table_of_counts(counts: Mapping[str, int]) -> str:
    """Names and their counts, one a line."""
    return table([(name, f"{count:>10,}") for name, count in counts.items()])


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """
    Bad input, or an optional package that is not installed, ends the program with its message alone, on the last line, and exit code 1.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
