"""The parser of options from dataclasses. It needs transformers, so `shared.cli` imports it only when it parses."""

import argparse
from typing import Any, NoReturn

from transformers import HfArgumentParser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the line breaks of the description and shows the default of each option."""


class Parser(HfArgumentParser):
    """
    `HfArgumentParser` with more keys in the metadata of a field, and errors of one line.

    Args of `add_argument`:
        positional (`bool`): the argument has no name on the command line.
        flag (`bool`): the option takes no value, so that a positional argument may follow it.
        may_be_empty (`bool`): the option takes a list, which may be empty.
        local_or_hub (`bool`): the value is a path or a name on the Hub; `shared.cli.parse` checks that it may exist.
    """

    def add_argument(
        self,
        *names: Any,
        positional: bool = False,
        flag: bool = False,
        may_be_empty: bool = False,
        local_or_hub: bool = False,
        **options: Any,
    ) -> argparse.Action:
        if flag:
            options = {"action": "store_true", "default": False, "help": options["help"]}
        if may_be_empty:
            options["nargs"] = "*"
        if positional:
            names = (names[0].removeprefix("--"),)
            options.pop("required", None)  # a positional argument is required unless it is a list that may be empty
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """End the program with one line; the usage of `recipes/train.py` alone is a hundred lines."""
        self.exit(2, f"{self.prog}: error: {message}. --help lists all options.\n")
