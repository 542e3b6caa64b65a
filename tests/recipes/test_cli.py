"""Options from dataclasses, YAML files and the command line, and the errors of wrong ones."""

from dataclasses import dataclass, field
from typing import Literal

from shared.cli import parse

import pytest


@dataclass(kw_only=True)
class Arguments:
    words: list[str] = field(default_factory=list, metadata={"positional": True, "may_be_empty": True})
    model: str = field(metadata={"help": "A name."})
    steps: int = 3
    rate: float | None = None
    kind: Literal["full", "half"] | None = None
    quick: bool = field(default=False, metadata={"flag": True, "help": "Takes no value."})
    card: bool = False
    filters: list[str] = field(
        default_factory=lambda: ["long"], metadata={"choices": ("long", "short"), "may_be_empty": True}
    )
    override: list[str] = field(default_factory=list, metadata={"action": "extend"})
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"--steps is {self.steps}, expected at least 0.")


def read(*argv):
    (arguments,) = parse([Arguments], "What it does.", argv)
    return arguments


@pytest.fixture
def config(tmp_path):
    """A function that writes a config and returns its path."""

    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


def test_command_line():
    assert read("--model", "m") == Arguments(model="m")
    assert read("--model", "m", "--quick", "a", "b") == Arguments(model="m", quick=True, words=["a", "b"])
    assert read("a", "--model", "m", "--filters") == Arguments(model="m", words=["a"], filters=[])
    assert read("--model", "m", "--card", "--rate", "1e-4") == Arguments(model="m", card=True, rate=1e-4)
    assert read("--model", "m", "--card", "false").card is False
    overridden = read("--model", "m", "--override", "a=1", "b=2", "--kind", "half", "--override=c=3")
    assert overridden.override == ["a=1", "b=2", "c=3"]


def test_a_config_sets_what_the_command_line_does_not(config):
    path = config("model: m\nsteps: 7\nrate: 1e-4\nkind: half\nquick: true\nfilters: []\nwords: [a]\n")
    expected = Arguments(model="m", steps=7, rate=1e-4, kind="half", quick=True, filters=[], words=["a"])
    assert read("--config", path) == expected
    assert read(f"--config={path}", "--steps", "8", "--filters", "short").steps == 8
    assert read("--conf", path).rate == 1e-4  # argparse accepts a shortened name, so the file must be read too


def test_values_of_a_config_are_converted_as_on_the_command_line(config):
    path = config("model: m\nsteps: '5'\ncard: 'yes'\nrate: null\n")
    assert read("--config", path) == Arguments(model="m", steps=5, card=True)
    assert read("--config", config(""), "--model", "m") == Arguments(model="m")
    path = config("model: m\nsizes: [1, '20']\nwords: one\n")
    assert read("--config", path) == Arguments(model="m", sizes=[1, 20], words=["one"])
    assert read("--config", config("model: m\nsizes: 5\n")).sizes == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 1", "config.yaml: unknown option 'step'."),
        ("steps: some", "config.yaml: steps is 'some', expected an integer."),
        ("steps: 1.5", "config.yaml: steps is 1.5, expected an integer."),
        ("rate: [1]", "config.yaml: rate is [1], expected a number."),
        ("card: perhaps", "config.yaml: card is 'perhaps', expected true or false."),
        ("kind: third", "config.yaml: kind is 'third', expected one of full, half."),
        ("filters: [long, wide]", "config.yaml: filters is 'wide', expected one of long, short."),
        ("sizes: [1, two]", "config.yaml: sizes is 'two', expected an integer."),
        ("steps: [1]", "config.yaml: steps is [1], expected an integer."),
        ("steps: [", "config.yaml: malformed YAML"),
        ("- steps", "config.yaml: found list, expected options"),
        ("steps: -1", "error: --steps is -1, expected at least 0."),
    ],
)
def test_an_error_in_a_config_names_file_and_key(config, text, message):
    with pytest.raises(SystemExit) as ending:
        read("--model", "m", "--config", config(text + "\n"))
    assert message in ending.value.code


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nothing.yaml: no such file"):
        read("--model", "m", "--config", str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--model", "m", "--stepz", "1"], "unrecognized arguments: --stepz"),
        (["--model", "m", "--kind", "third"], "invalid choice: 'third'"),
        (["--model", "m", "--filters", "wide"], "invalid choice: 'wide'"),
        (["--model", "m", "--config"], "expected one argument"),
    ],
)
def test_an_error_on_the_command_line_shows_the_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        read(*argv)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_description_and_the_options(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    printed = capsys.readouterr().out
    assert "What it does." in printed
    assert "A name." in printed
    assert "[words ...]" in printed
