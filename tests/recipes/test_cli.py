"""Options from dataclasses, YAML files and the command line, and the errors of wrong ones."""

import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from shared.cli import check_options, json_object, option_names, parse

import pytest
from generate import GenerateArguments, read_questions

from trainer import CoSupTrainingArguments
from trainer.judging.judge import command_line

from shared.training_run import print_examples


@dataclass(kw_only=True)
class Arguments:
    words: list[str] = field(default_factory=list, metadata={"positional": True, "may_be_empty": True})
    model: str = field(metadata={"help": "A name."})
    steps: int = 3
    rate: float | None = None
    kind: Literal["full", "half"] | None = None
    quick: bool = field(default=False, metadata={"flag": True, "help": "Takes no value."})
    card: bool = False
    kept: bool = True
    options: dict[str, int] | str | None = "{}"
    filters: list[str] = field(
        default_factory=lambda: ["long"], metadata={"choices": ("long", "short"), "may_be_empty": True}
    )
    override: list[str] = field(default_factory=list, metadata={"action": "extend"})
    corpus_file: str | None = field(default=None, metadata={"local_or_hub": True})
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
    path = config("model: m\nsteps: '5'\ncard: 'yes'\nquick: 'no'\nkept: 'no'\nrate: null\n")
    assert read("--config", path) == Arguments(model="m", steps=5, card=True, quick=False, kept=False)
    assert read("--config", config(""), "--model", "m") == Arguments(model="m")
    assert read("--config", config("\ufeffmodel: m\n")) == Arguments(model="m")  # a byte order mark
    path = config("model: m\nsizes: [1, '20']\nwords: one\n")
    assert read("--config", path) == Arguments(model="m", sizes=[1, 20], words=["one"])
    assert read("--config", config("model: m\nsizes: 5\n")).sizes == [5]


def test_a_text_of_a_config_is_what_was_written(config):
    path = config("model: 2024_11_30\ncorpus_file: 1.10\nwords: [2024-01-01, no]\noverride: 007\nkind: half\n")
    words = ["2024-01-01", "no"]
    expected = Arguments(model="2024_11_30", corpus_file="1.10", words=words, override=["007"], kind="half")
    assert read("--config", path) == expected


def test_values_of_the_trainer_that_are_no_texts(config):
    text = "output_dir: 2024\nresume_from_checkpoint: true\nreport_to: [none]\nlr_scheduler_kwargs: {a: 1}\n"
    path = config(text + "fsdp: full_shard\nfsdp_config: {fsdp_version: 2}\n")
    (arguments,) = parse([CoSupTrainingArguments], None, ["--config", path])
    assert (arguments.output_dir, arguments.resume_from_checkpoint) == ("2024", True)
    assert arguments.fsdp
    assert (arguments.report_to, arguments.lr_scheduler_kwargs) == ([], {"a": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [m]", "config.yaml: model is ['m'], expected a text"),
        ("step: 1", "config.yaml: unknown option 'step' (did you mean steps?)."),
        ("passage: 1", "config.yaml: unknown option 'passage'."),
        ("config: other.yaml", "config.yaml: unknown option 'config'."),
        ("steps: some", "config.yaml: steps is 'some', expected an integer."),
        ("steps: 1.5", "config.yaml: steps is 1.5, expected an integer."),
        ("rate: [1]", "config.yaml: rate is [1], expected a number."),
        ("card: perhaps", "config.yaml: card is 'perhaps', expected true or false."),
        ("card: [false]", "config.yaml: card is [False], expected true or false."),
        ("card: 2", "config.yaml: card is 2, expected true or false."),
        ("quick: 'perhaps'", "config.yaml: quick is 'perhaps', expected true or false."),
        ("kind: third", "config.yaml: kind is 'third', expected one of full, half."),
        ("filters: [long, wide]", "config.yaml: filters is 'wide', expected one of long, short."),
        ("sizes: [1, two]", "config.yaml: sizes is 'two', expected an integer."),
        ("steps: [1]", "config.yaml: steps is [1], expected an integer."),
        ("steps: [", "config.yaml: malformed YAML"),
        ("steps: " + "[" * 5000, "config.yaml: malformed YAML"),
        ("steps: " + "1" * 5000, "config.yaml: malformed YAML"),
        ("- steps", "config.yaml: found list, expected options"),
        ("steps: -1", "error: --steps is -1, expected at least 0."),
    ],
)
def test_an_error_in_a_config_names_file_and_key(config, text, message):
    with pytest.raises(SystemExit) as ending:
        read("--model", "m", "--config", config(text + "\n"))
    assert message in ending.value.code


def test_an_option_that_is_a_json_object(config):
    in_config = read("--config", config("model: m\noptions: {seed: 3}\n"))
    for arguments in (in_config, read("--model", "m", "--options", '{"seed": 3}')):
        assert json_object(arguments.options, "options") == {"seed": 3}
    assert json_object(read("--model", "m").options, "options") == {}
    wrong = {"{bad": "'{bad': malformed JSON", "[1]": r"\[1\], expected a JSON object", None: "None, expected"}
    for value, message in wrong.items():
        with pytest.raises(ValueError, match=f"--options is {message}"):
            json_object(value, "options")


def test_a_file_of_questions_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "questions.txt").write_text("who?\n\nwhen?\n", encoding="utf-8-sig")
    args = GenerateArguments(model="m", file=str(tmp_path / "questions.txt"))
    assert read_questions(args) == ["who?", "when?"]


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nothing.yaml: no such file"):
        read("--model", "m", "--config", str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--model", "m", "--stepz", "1"], "unknown option --stepz (did you mean --steps?)"),
        (["--model", "m", "--stepz=1"], "unknown option --stepz (did you mean --steps?)"),
        (["-model", "m"], "unknown option -model (did you mean --model?)"),
        (["--model", "m", "--passages", "-1"], "unknown option --passages"),
        (["--model", "m", "--kind", "third"], "invalid choice: 'third'"),
        (["--model", "m", "--filters", "wide"], "invalid choice: 'wide'"),
        (["--model", "m", "--config"], "expected one argument"),
    ],
)
def test_an_error_on_the_command_line_is_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/some.py"])
    with pytest.raises(SystemExit) as ending:
        read(*argv)
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.removeprefix("pytest: ").removeprefix("some.py: ").startswith("error: ")
    assert message in line
    assert line.endswith(". --help lists all options.")


def test_what_looks_like_an_option_but_is_none():
    assert read("--model", "m", "--rate", "-1.5").rate == -1.5
    assert read("--model", "-", "--mod", "n").model == "n"
    assert read("--model", "m", "--", "--what", "-h").words == ["--what", "-h"]
    assert read("--model", "m", "--what is it?").words == ["--what is it?"]


HEAVY = "trainer.training_args.CoSupTrainingArguments"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nsp_batch_sise", "8"], "unknown option --nsp_batch_sise (did you mean --nsp_batch_size?)"),  # ours
        (["--lerning-rate", "8"], "unknown option --lerning-rate (did you mean --learning_rate?)"),  # of transformers
        (["--model", "m", "--no_mask_duplicate"], None),  # the beginning of an option
        (["--learning_rate", "8", "--eval-strategy=no", "--stepz"], "unknown option --stepz (did you mean --steps?)"),
    ],
)
def test_names_of_options_are_checked_without_importing_their_class(argv, message, capsys):
    if message is None:
        check_options([Arguments, HEAVY], None, argv)
        return
    with pytest.raises(SystemExit) as ending:
        check_options([Arguments, HEAVY], None, argv)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_of_a_config_are_checked_without_importing_their_class(config):
    with pytest.raises(SystemExit, match=r"unknown option 'lerning_rate' \(did you mean learning_rate\?\)."):
        check_options([Arguments, HEAVY], None, ["--config", config("model: m\nlerning_rate: 1\n")])


def test_the_names_that_are_read_from_source_are_those_of_the_class():
    assert set(option_names(HEAVY)) >= {option.name for option in fields(CoSupTrainingArguments) if option.init}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{folder}/corpus/corpos.jsonl", "no such file or folder (did you mean {folder}/corpus/corpus.jsonl?)."),
        ("./nothing", "no such file or folder."),
        ("nothing.jsonl", "no such file or folder."),
        ("a/b/c", "no such file or folder."),
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(place, message, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").touch()
    place, message = place.format(folder=tmp_path), message.format(folder=tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(f"corpus_file: {place}\n")
    for argv in (["--corpus-file", place], [f"--corpus_file={place}"], ["--config", str(config)]):
        for read_options in (parse, check_options):  # the latter without importing a class
            with pytest.raises(SystemExit) as ending:
                read_options([Arguments, HEAVY], None, ["--model", "m", *argv])
            assert ending.value.code == f"error: --corpus_file {place}: {message}"
    assert read("--model", "m", "--config", str(config), "--corpus_file", str(tmp_path)).corpus_file == str(tmp_path)


def test_a_name_that_is_not_here_may_be_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "index").mkdir(parents=True)
    assert read("--model", "m", "--corpus_file", "out/index").corpus_file == "out/index"
    assert capsys.readouterr().err == ""
    assert read("--model", "m", "--corpus_file", "out/indx").corpus_file == "out/indx"
    expected = (
        "--corpus_file out/indx: no such file or folder (did you mean out/index?); "
        "looking for it on the Hugging Face Hub.\n"
    )
    assert capsys.readouterr().err == expected
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--out--indx").mkdir()  # downloaded before
    read("--model", "m", "--corpus_file", "out/indx")
    assert capsys.readouterr().err == ""


def test_help_shows_the_description_and_the_options(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    printed = capsys.readouterr().out
    assert "What it does." in printed
    assert "A name." in printed
    assert "[words ...]" in printed


def test_a_printed_command_can_be_pasted(capsys, monkeypatch):
    run = SimpleNamespace(
        script=SimpleNamespace(num_examples=1, use_peft=False, index="my index", index_uri="http://h:1/?a&b"),
        output_dir=Path("my model"),
        questions=[{"input": "Who's $HOME?", "provenance": [["p1"]], "answers": ["x"]}],
        args=SimpleNamespace(candidates_from="corpus", num_candidates=3),
    )
    print_examples([{"cited_text": "x"}], run)
    command = capsys.readouterr().out.partition("Ask it:")[2]
    options = ["--model", "my model", "--index", "my index", "--index_uri", "http://h:1/?a&b"]
    asked = [*options, "--top_k", "3", "Who's $HOME?"]
    assert shlex.split(command) == ["python", "recipes/generate.py", *asked]
    monkeypatch.setattr(sys, "argv", ["/recipes/run_evaluation.py", *asked])
    assert shlex.split(command_line()) == ["run_evaluation.py", *asked]
