"""
The commands in the `bash` blocks of the pages: recipes parse their options, files and extras exist, others are known.

No recipe runs. What it would read need not exist, except configs: those of this repository, or YAML blocks of the page
whose first line is a comment with the name of the file.
"""

import contextlib
import importlib.util
import io
import re
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

from support.markdown_pages import ROOT, blocks_of, name_of, pages
from support.shell_commands import commands_of

from experiments.definition import load_experiment

PAGES = pages("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "recipes/**/*.md", ".github/**/*.md")
BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language == "bash"]
# programs of which only the name is checked
KNOWN = {"cd", "curl", "docker", "export", "git", "hf", "milvus-lite", "pip", "pre-commit", "source", "vllm"}
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
RESULTS = ROOT / "docs" / "results" / "README.md"
EXTRAS_OF = re.compile(r"(?:\.|cosup)\[(?P<extras>[\w,-]*)\]")


class Parsed(Exception):
    """A recipe has parsed its options."""


def load(path):
    """Import a recipe that is no module of a package."""
    name = "documented_" + "_".join(path.relative_to(ROOT).with_suffix("").parts)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for the names in annotations
        spec.loader.exec_module(module)
    return sys.modules[name]


def parse_options(path, options, monkeypatch):
    """
    Run a recipe until its own parser has read the options.

    Raises:
        `SystemExit`: with the message of a parser that refuses them.
    """
    monkeypatch.syspath_prepend(path.parent)
    recipe = load(path)
    real = recipe.parse

    def parse(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(recipe, "parse", parse)
    monkeypatch.setattr("shared.cli.check_places", lambda *args: None)  # the files of a reader
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            recipe.main()
    except Parsed:
        pass
    except SystemExit as ending:
        said = [str(ending.code), *stderr.getvalue().splitlines()]
        raise SystemExit(said[-1]) from None
    else:
        raise AssertionError(f"{path} ended without reading its options")


def check_script(words, page, monkeypatch):
    """Check `recipes/x.py --option …`, or a script that the page shows."""
    script, *options = words
    path = ROOT / script
    if not path.exists():
        assert f"`{script}`" in page.read_text(encoding="utf-8"), f"no such script: {script}"
    elif path.is_relative_to(ROOT / "recipes"):
        parse_options(path, options, monkeypatch)
        if path.name == "run_experiments.py":
            check_experiment(options)


def check_experiment(options):
    """Check the experiment that the options name, and what they change in it."""
    overrides = []
    if "--override" in options:
        for word in options[options.index("--override") + 1 :]:
            if word.startswith("--"):
                break
            overrides.append(word)
    load_experiment(options[options.index("--experiment") + 1], overrides)


def check_python(words, command, page, monkeypatch):
    """Check `python …`: a script, a module or a program from stdin."""
    if words[0] == "-":
        compile(command.text, str(page), "exec")
    elif words[0] == "-c":
        compile(words[1], str(page), "exec")
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1].partition(".")[0]), f"no such module: {words[1]}"
    else:
        check_script(words, page, monkeypatch)


def check_launch(words, page, monkeypatch):
    """Check `accelerate launch …`: its options, its config file, and the script."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            launch = launch_command_parser().parse_args(words)
    except SystemExit:
        raise AssertionError(stderr.getvalue().splitlines()[-1]) from None
    assert launch.config_file is None or (ROOT / launch.config_file).is_file(), f"no such file: {launch.config_file}"
    check_script([launch.training_script, *launch.training_script_args], page, monkeypatch)


def check_pip(words):
    """Check the extras and files of `pip install …`."""
    for i, word in enumerate(words):
        match = EXTRAS_OF.fullmatch(word)
        if match:
            unknown = set(match["extras"].split(",")) - EXTRAS
            assert not unknown, f"no such extras: {', '.join(sorted(unknown))}"
        elif words[i - 1] in ("-c", "-r"):
            assert (ROOT / word).is_file(), f"no such file: {word}"
        elif i and not word.startswith(("-", "http")) and words[i - 1] != "-e":
            Requirement(word)


def check(command, page, monkeypatch):
    """Check a command. An error says what is wrong."""
    program, *words = command.words
    if program == "python":
        check_python(words, command, page, monkeypatch)
    elif program == "accelerate":
        assert words[0] == "launch", f"unknown command: accelerate {words[0]}"
        check_launch(words[1:], page, monkeypatch)
    elif program == "pytest":
        files = [word for word in words if "/" in word]
        assert all((ROOT / file.partition("::")[0]).exists() for file in files), files
    elif program == "pip":
        check_pip(words)
    elif "/" in program:
        assert (ROOT / program).is_file(), f"no such program: {program}"
    else:
        assert program in KNOWN, f"unknown command: {program}; should it be checked, or be in KNOWN?"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that has the files of the repository in it."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_configs(page, folder):
    """Write the YAML blocks of a page that begin with the name of their file."""
    for block in blocks_of(page):
        name = re.match(r"# ([\w-]+\.yaml)\b", block.code)
        if block.language == "yaml" and name:
            (folder / name[1]).write_text(block.code, encoding="utf-8")


def faults(page, folder, monkeypatch):
    """Return what is wrong with the commands of a page, each with its line."""
    write_configs(page, folder)
    found = []
    for block in blocks_of(page):
        if block.language == "bash":
            for command in commands_of(block.code):
                try:
                    with monkeypatch.context() as patch:
                        check(command, page, patch)
                except (AssertionError, SystemExit, ValueError, OSError, SyntaxError) as error:
                    found.append(f"{name_of(page)}:{block.line + command.line}: {str(error).splitlines()[0]}")
    return found


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}), ids=name_of)
def test_commands(page, folder, monkeypatch):
    if page == RESULTS:
        (folder / "tasks.yaml").write_text("batch_size: 64")  # the report describes it
    assert faults(page, folder, monkeypatch) == []


# ------------------------------------------------------------------ the test itself


def test_wrong_commands_are_found(folder, tmp_path_factory, monkeypatch):
    page = tmp_path_factory.mktemp("page") / "page.md"
    page.write_text("""
```yaml
# tasks.yaml
batch_sizes: 3
```

```bash
cd cosup && make all  # make is unknown
python recipes/missing.py
python recipes/generate.py --model out --indx out/index "who?" |
    head
P=nothing python recipes/train.py --gen a --max_steps few
accelerate launch --config_file recipes/accelerate_configs/missing.yaml \\
    recipes/train.py --config recipes/configs/quickstart.yaml
accelerate launch --number_of_processes two recipes/train.py
python recipes/run_evaluation.py --config tasks.yaml --model out --output_dir results
pip install -e ".[cpu,missing]" -c missing.txt
for seed in 0 one; do
    python recipes/train.py --config recipes/configs/quickstart.yaml --seed $seed > log 2>&1
done
python recipes/run_experiments.py --experiment recipes/experiments/main_table.yaml --output_dir a --override pool=3
tests/missing.sh; pytest tests/missing/test_a.py
python - <<'PYTHON'
print(1
PYTHON
python recipes/demo.py --modle out
python ask.py "Is this script shown by the page?"
```
""")
    found = [fault.removeprefix(f"{page}:").partition(": ") for fault in faults(page, folder, monkeypatch)]
    expected = {
        "8": "unknown command: make",
        "9": "no such script: recipes/missing.py",
        "10": "generate.py: error: unknown option --indx (did you mean --index?)",
        "11": "unknown command: head",
        "12": "--max_steps",
        "13": "no such file: recipes/accelerate_configs/missing.yaml",
        "15": "--number_of_processes",
        "16": "batch_sizes",
        "17": "no such extras: missing",
        "21": "pool",
        "22": "tests/missing",
        "23": "was never closed",
        "26": "--modle",
        "27": "no such script: ask.py",
    }
    assert list(dict.fromkeys(line for line, _, _ in found)) == list(expected)
    for line, _, fault in found:
        assert expected[line] in fault


def test_a_command_over_several_lines():
    code = """\
curl -d '{
  "a": 1}' \\
  http://a  # comment
A=1; B=2 c "d e" $A 2>&1 | f > g && for x in 7 8; do h $x; done
"""
    commands = commands_of(code)
    assert [command.words for command in commands] == [
        ["curl", "-d", '{\n  "a": 1}', "http://a"],
        ["c", "d e", "1"],
        ["f"],
        ["h", "7"],
    ]
    assert [command.line for command in commands] == [0, 3, 3, 3]
    with pytest.raises(ValueError, match="line 1 of the block does not end"):
        commands_of("a 'b")
