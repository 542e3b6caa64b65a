"""
Command lines of the recipes: options from dataclasses and a YAML config, tables, and errors without a traceback.

Import this module before torch and `trainer`: it sets a variable that torch reads when it loads, and checks that
`trainer` is the package of this project. A recipe whose own imports take seconds calls [`check_options`] before them.
"""

import argparse
import ast
import contextlib
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

# Torch reads this once, when it loads. Threads that wait for work then sleep, where spinning would take the cores from
# other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml

import trainer

if TYPE_CHECKING:
    from shared.parser import Parser

if not Path(trainer.__file__).with_name("cosup_trainer.py").exists():
    sys.exit(
        f"`import trainer` found {trainer.__file__}, another package; "
        "run `pip uninstall trainer` and install this project again."
    )

EXPECTED = {int: "an integer", float: "a number"}  # type of an option -> name in errors
NEED_TORCH = ("torch", "accelerate")  # accelerate cannot be imported without torch
TEXT_OR_TRUE = ("resume_from_checkpoint", "fsdp")  # of the Trainer, which takes `true` although they are texts
DATA_SUFFIXES = (".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".txt")


def check_options(dataclasses: Sequence[Any], description: str | None, argv: Sequence[str] | None = None) -> None:
    """
    End the program for `--help`, and for a wrong option, before the recipe imports what takes seconds.

    Without a dataclass that is given by its name, this is [`parse`]. Otherwise only the names of all options are
    checked, and the paths among the values of the others, because the class itself needs torch.

    Args:
        dataclasses, description, argv: see [`parse`].
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if asks_for_help(arguments) or not any(isinstance(option_class, str) for option_class in dataclasses):
        parse(dataclasses, description, arguments)
    else:
        check_names(arguments, dataclasses)
        check_places(arguments, dataclasses)


def parse(dataclasses: Sequence[Any], description: str | None, argv: Sequence[str] | None = None) -> list[Any]:
    """
    Return dataclass instances from `--config file.yaml` and the command line; the command line wins.

    `HfArgumentParser` alone reads either a YAML file or the command line. As in TRL's parser, the values of the file
    become the defaults of the command line.

    Args:
        dataclasses (sequence of dataclass types): their fields become options; see [`~shared.parser.Parser`] for the
            metadata. A type whose module imports torch is given by its name, e.g.
            `"transformers.training_args.TrainingArguments"`, and imported when it is needed.
        description (`str`, *optional*): description of the program, e.g. the docstring of its module.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Returns:
        `list`: one instance of each dataclass, in order.

    Raises:
        `SystemExit`: names an unknown option and the nearest right one; names the config file and key if the key is
            not an option or its value does not fit; names a path that does not exist; shows the message of a
            `ValueError` that a dataclass raises.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    print_any_character()
    if asks_for_help(arguments):
        hide_torch()
    check_names(arguments, dataclasses)
    check_places(arguments, dataclasses)
    parser = make_parser(dataclasses, description)
    config = config_of(arguments)
    if config is not None:
        set_defaults(parser, config)
    with clear_errors():
        *instances, unknown = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return instances[: len(dataclasses)]  # the last one is a namespace with `config`


def make_parser(dataclasses: Sequence[Any], description: str | None) -> "Parser":
    """Return the parser of the options of all dataclasses, and of `--config`."""
    from shared.parser import HelpFormatter, Parser

    option_classes = []
    for option_class in dataclasses:
        if isinstance(option_class, str):
            option_class = resolve_name(option_class)
        option_classes.append(option_class)
    parser = Parser(option_classes, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="YAML file with any of the options here; the command line wins")
    return parser


# ---------------------------------------------------------------------- names of options


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether `--help` is among the options."""
    return not {"-h", "--help"}.isdisjoint(options_of(arguments))


def options_of(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line that name an option: `--name`, without `=value`."""
    options = []
    for argument in arguments:
        if argument == "--":  # everything after it is a positional argument
            break
        is_negative_number = re.fullmatch(r"-[\d.][\d.eE_+-]*", argument)
        if argument.startswith("-") and argument != "-" and " " not in argument and not is_negative_number:
            options.append(argument.partition("=")[0])
    return options


def check_names(arguments: Sequence[str], dataclasses: Sequence[Any]) -> None:
    """
    End the program, with exit code 2, if an option on the command line or in the config does not exist.

    argparse itself checks the command line after everything is imported, and prints hundreds of options.
    """
    known: list[str] = []
    for option_class in dataclasses:
        known += option_names(option_class)
    for option in options_of(arguments):
        name = option.lstrip("-").replace("-", "_")
        names = [*known, *(f"no_{other}" for other in known), "config", "help"]
        is_beginning = any(other.startswith(name) for other in names)  # argparse takes the beginning of a name
        if option != "-h" and not (option.startswith("--") and is_beginning):
            refuse(f"unknown option {option}{nearest(name, names, '--')}")
    config = config_of(arguments)
    if config is not None:
        for name in read_config(config):
            if name not in known:
                sys.exit(f"{config}: unknown option {name!r}{nearest(str(name), known)}.")


def refuse(message: str) -> None:
    """End the program with exit code 2, as argparse does for a wrong command line, but without all its options."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}. --help lists all options.\n")
    sys.exit(2)


def nearest(name: str, names: Collection[str], prefix: str = "") -> str:
    """Return `" (did you mean ...?)"` with the nearest of `names`; an empty string if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def option_names(option_class: Any) -> list[str]:
    """
    Return the names of the options of a dataclass.

    Args:
        option_class (dataclass type or `str`): a name is looked up in the source of its module, which is not imported.
    """
    if not isinstance(option_class, str):
        return [option.name for option in fields(option_class) if option.init]
    package, *modules, class_name = option_class.split(".")
    spec = find_spec(package)  # of the package: a module's would import the package
    if spec is None or spec.origin is None:
        sys.exit(f"error: {package} is not installed.")
    source = Path(spec.origin).parent.joinpath(*modules).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    origins = {}  # name of a class that the module imports -> its module
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            place = [package, *modules[: len(modules) - node.level]] if node.level else []  # of a relative import
            origin = ".".join([*place, node.module or ""])
            origins.update({alias.name: origin for alias in node.names})
    names = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in origins:
                    names += option_names(f"{origins[base.id]}.{base.id}")
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    names.append(statement.target.id)
    return names


def hide_torch() -> None:
    """
    Make torch look as if it were not installed, so that `--help` does not wait for it.

    Transformers has its `TrainingArguments` without torch too; nothing else is done with them before the program ends.
    """
    if "torch" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing
        for package in NEED_TORCH:
            sys.modules[package] = None  # type: ignore[assignment]


def print_any_character() -> None:
    r"""
    Let a console that lacks a character print it as `\u03bb`, as Python's stderr does, instead of raising an error.

    Files are always read and written in UTF-8.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse_given(args: Any, names: Collection[str], reason: str) -> None:
    """
    Raise a `ValueError` for an option that was given and would be ignored.

    Args:
        args (dataclass instance): the options; one that has its default counts as not given.
        names (collection of `str`): options of `args`.
        reason (`str`): why it would be ignored, as the end of a sentence that begins with the option.
    """
    defaults = {}
    for option in fields(args):
        has_factory = option.default_factory is not MISSING
        defaults[option.name] = option.default_factory() if has_factory else option.default
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"--{name} {value} {reason}.")


# ---------------------------------------------------------------------- files and names on the Hub


def check_places(arguments: Sequence[str], dataclasses: Sequence[Any]) -> None:
    """Check the options with `local_or_hub` in their metadata, from config and command line; see [`check_place`]."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option_class in dataclasses:
        if isinstance(option_class, str):
            continue
        for option in fields(option_class):
            if option.metadata.get("local_or_hub"):
                finder.add_argument(*{f"--{option.name}", f"--{option.name.replace('_', '-')}"}, nargs="?")
    given, _ = finder.parse_known_args(arguments)
    config = config_of(arguments)
    in_config = {} if config is None else read_config(config)
    with clear_errors():
        for name, place in vars(given).items():
            if place is None:
                place = in_config.get(name)
            if isinstance(place, str):
                check_place(f"--{name} {place}", place)


def check_place(where: str, place: str) -> None:
    """
    Check that a file or folder exists; if not, say so before the name is looked for on the Hugging Face Hub.

    Without this check, a misspelt folder ends in an error of the connection, half a minute later without a network.

    Args:
        where (`str`): the option with its value, for messages.
        place (`str`): a path, or the name of a model or dataset.

    Raises:
        `FileNotFoundError`: if it does not exist, and cannot be a name on the Hub.
    """
    path = Path(place)
    if path.exists():
        return
    siblings = []
    if path.parent.is_dir():
        siblings = [str(sibling) for sibling in path.parent.iterdir()]
    missing = f"{where}: no such file or folder{nearest(str(path), siblings)}"
    can_be_on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", place) and path.suffix not in DATA_SUFFIXES
    if not can_be_on_hub:
        raise FileNotFoundError(f"{missing}.")
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [Path(HF_HUB_CACHE, f"{kind}--{place.replace('/', '--')}") for kind in ("models", "datasets")]
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process and not any(folder.exists() for folder in cached):
        print_once(f"{missing}; looking for it on the Hugging Face Hub.")


@cache
def print_once(message: str) -> None:
    """Print a message to stderr, even if it comes from [`check_options`] and [`parse`]."""
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- YAML configs


def config_of(arguments: Sequence[str]) -> Path | None:
    """Return the path of `--config`, if it is on the command line."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path, nargs="?")  # the real parser refuses a missing value
    known, _ = finder.parse_known_args(arguments)
    return known.config


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file; `SystemExit` names the file if it is missing or malformed."""
    if not path.is_file():
        sys.exit(f"--config {path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also not UTF-8, too many digits, nested too deeply
        sys.exit(f"{path}: malformed YAML: {error}")
    if not isinstance(values, dict):
        sys.exit(f"{path}: found {type(values).__name__}, expected options, `name: value` a line.")
    return values


def set_defaults(parser: "Parser", path: Path) -> None:
    """
    Make the values of a YAML file, whose names are checked, the defaults of a parser.

    Raises:
        `SystemExit`: names the file, and the key whose value does not fit.
    """
    values = read_config(path)
    as_written = yaml.load(
        path.read_text(encoding="utf-8-sig"), yaml.BaseLoader
    )  # `1.10`, `no` and `2024-01-01` are texts
    actions = {action.dest: action for action in parser._actions}
    texts = text_options(parser.dataclass_types)
    for name, value in values.items():
        actions[name].required = False
        is_text = value is not None and name in texts
        values[name] = convert(as_written[name] if is_text else value, actions[name], f"{path}: {name}", is_text)
    parser.set_defaults(**values)


def text_options(option_classes: Iterable[Any]) -> set[str]:
    """Return the names of the options that are texts, or lists of texts, and nothing else."""
    names = set()
    for option_class in option_classes:
        for name, annotation in get_type_hints(option_class).items():
            kinds = {annotation}
            if get_origin(annotation) in (Union, UnionType):
                kinds = set(get_args(annotation)) - {NoneType}
            if kinds in ({str}, {list[str]}):
                names.add(name)
    return names.difference(TEXT_OR_TRUE)


def convert(value: Any, action: argparse.Action, where: str, is_text: bool) -> Any:
    """
    Convert a value of a YAML file to what the command line would give.

    argparse does not check defaults, and YAML reads `1e-4` as a string. An option that takes several values gets a
    list, even from a single value.

    Args:
        value: the value in the file.
        action (`argparse.Action`): the option.
        where (`str`): file and key, for the beginning of an error.
        is_text (`bool`): whether the option takes text and nothing else; the value is then as it was written.

    Raises:
        `SystemExit`: if the value does not fit the option.
    """
    if value is None:
        return None
    if action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [value]
        return [convert_one(item, action, where, is_text) for item in items]
    return convert_one(value, action, where, is_text)


def convert_one(value: Any, action: argparse.Action, where: str, is_text: bool) -> Any:
    """Convert one value of an option, see [`convert`]."""
    from transformers.hf_argparser import string_to_bool

    if is_text and not isinstance(value, str):
        sys.exit(f"{where} is {value!r}, expected a text: write it in quotes.")
    is_flag = action.type is None and isinstance(action.const, bool)
    takes_bool = action.type is string_to_bool or is_flag
    to_type: Any = string_to_bool if takes_bool else action.type
    if callable(to_type) and (isinstance(value, str) or takes_bool or to_type in EXPECTED):
        expected = EXPECTED.get(to_type, "true or false")
        try:
            value = to_type(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            sys.exit(f"{where} is {value!r}, expected {expected}.")
    if action.choices is not None and value not in action.choices:
        sys.exit(f"{where} is {value!r}, expected one of {', '.join(map(str, action.choices))}.")
    return value


def json_object(value: str | dict[str, Any] | None, name: str) -> dict[str, Any]:
    """
    Return the value of an option that is a JSON object: text on the command line, often a mapping in a config.

    Raises:
        `ValueError`: names the option if its value is not one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--{name} is {value!r}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--{name} is {value!r}, expected a JSON object.")
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
