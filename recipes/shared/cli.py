"""
Command lines of the recipes: YAML configs with overrides, tables, and clear endings.

Import this module before torch and before `trainer`: it sets what torch reads when it loads, and checks that `trainer` is the package of this project.
"""

import contextlib
import os
import sys
from pathlib import Path

# Read once, when torch loads: threads that wait for work sleep. Spinning, they take the cores from any other program that runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml
from transformers import HfArgumentParser

import trainer

if not Path(trainer.__file__).with_name("cosup_trainer.py").exists():
    sys.exit(f"`import trainer` found {trainer.__file__}, another package; run `pip uninstall trainer` and install this project again.")


def parse(dataclasses, description, argv=None):
    """
    Dataclass instances from `--config file.yaml` and the command line; the command line wins.

    Args:
        dataclasses (list of dataclass types): fields become options.
        description (`str`): of the program.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Raises:
        `SystemExit`: with the config file and key, when a key is no option.
    """
    parser = HfArgumentParser(dataclasses, description=description)
    parser.add_argument("--config", help="YAML file with any of the options below; the command line wins.")
    argv = sys.argv[1:] if argv is None else argv
    known = {action.dest: action for action in parser._actions}
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            path = Path(word.partition("=")[2] or argv[i + 1])
            if not path.is_file():
                sys.exit(f"--config {path}: no such file.")
            try:
                values = yaml.safe_load(path.read_text()) or {}
            except yaml.YAMLError as error:
                sys.exit(f"{path}: malformed YAML: {error}")
            if not isinstance(values, dict):
                sys.exit(f"{path}: found {type(values).__name__}, expected options, `name: value` a line.")
            if unknown := sorted(set(values) - set(known)):
                sys.exit(f"{path}: unknown option {unknown[0]!r}.")
            for name, value in values.items():
                known[name].required = False
                kind = known[name].type
                if kind in (int, float) and value is not None:
                    try:
                        values[name] = kind(str(value))  # YAML reads 1e-4 as a string
                    except ValueError:
                        sys.exit(f"{path}: {name} is {value!r}, expected {'an integer' if kind is int else 'a number'}.")
            parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[: len(dataclasses)]  # behind them: a namespace with `config`


def table(rows):
    """Two columns of text, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


@contextlib.contextmanager
def clear_errors():
    """Bad input, or an optional package that is not installed, ends the program with its message alone, on the last line, and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
