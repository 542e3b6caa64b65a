"""Every script of recipes/: no other module imports it, and its help shows its description and its options."""

import ast
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import generate
import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
MODULES = sorted(RECIPES.rglob("*.py"))
SCRIPTS = [path for path in MODULES if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]


def name_of(path):
    return str(path.relative_to(RECIPES))


def imported(path):
    """Return the top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{path}, line {node.lineno}: the name of this import is computed"
            names.add(name.value)
    return {name.partition(".")[0] for name in names}


def test_scripts_are_found():
    assert {"train.py", "demo.py", "benchmarks/train.py"} <= {name_of(path) for path in SCRIPTS}
    assert not {"shared/cli.py", "experiments/definition.py"} & {name_of(path) for path in SCRIPTS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_a_script(path):
    """Code that several recipes share is in recipes/shared or recipes/experiments."""
    assert not imported(path) & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != "demo.py"], ids=name_of)
def test_the_command_line_is_imported_before_torch(path):
    """The command line sets a variable that torch reads when it loads. The demo imports nothing of the project."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names.append(node.names[0].name)
    others = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "shared.cli"


PRINT_HELP = """
import contextlib, io, json, runpy, sys

printed = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    # a console of Windows in Western Europe, which has no λ
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="cp1252")) as console:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ending:
            assert ending.code == 0, f"{path}: {ending.code}"
        console.flush()
    printed[path] = console.buffer.getvalue().decode("cp1252")
    for package in ("torch", "accelerate", "gradio"):
        assert sys.modules.get(package) is None, f"{path} imports {package} before it prints its help"
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed():
    """What `--help` of each recipe prints, in one process without torch."""
    paths = [str(path) for path in SCRIPTS if path.parent == RECIPES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RECIPES), str(RECIPES.parent)])}
    command = [sys.executable, "-c", PRINT_HELP, *paths]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent == RECIPES], ids=name_of)
def test_help_does_not_wait_for_torch(path, printed):
    check_help(path, printed[str(path)])


def test_help_of_training_lists_the_options_of_all_dataclasses(printed):
    for name in ("train.py", "train_nli.py"):
        assert "--learning_rate LEARNING_RATE" in printed[str(RECIPES / name)]
    help_of_training = printed[str(RECIPES / "train.py")]
    assert "--nsp_batch_size NSP_BATCH_SIZE" in help_of_training
    assert "(default: adamw_torch_fused)" in help_of_training
    assert "\\u03bb, the weight of the NSP loss" in help_of_training


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent != RECIPES], ids=name_of)
def test_help_of_a_benchmark(path, monkeypatch, capsys):
    """In this process: importing torch for each script would take minutes."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert ending.value.code == 0
    check_help(path, capsys.readouterr().out)


def check_help(path, text):
    """Check that the help of a script shows its description and its options."""
    description = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert description.splitlines()[0] in text
    assert "--" in text.partition("options:")[2]


def opened_without_encoding(path):
    """Return the lines of a file that open text, or read or write a whole one, without saying the encoding."""
    lines: list[str] = []
    source = path.read_text(encoding="utf-8")
    if "open(" not in source and "_text(" not in source:
        return lines
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        modes = [argument.value for argument in node.args[-1:] if isinstance(argument, ast.Constant)]
        is_binary = any("b" in str(mode) for mode in modes)
        if name.endswith((".read_text", ".write_text")) or (name == "open" and not is_binary):
            lines.append(f"{path}, line {node.lineno}: {ast.unparse(node)}")
    return lines


def test_every_text_file_is_opened_as_utf_8():
    """The encoding of the machine, which Python takes without `encoding=`, is not UTF-8 on every Windows."""
    lines = []
    for folder in ("modeling_cosup", "trainer", "recipes"):
        for path in sorted((RECIPES.parent / folder).rglob("*.py")):
            lines += opened_without_encoding(path)
    assert lines == []


@pytest.mark.parametrize("source", ["--file", "stdin"])
def test_questions_are_read_as_utf_8_with_and_without_bom(source, tmp_path, monkeypatch):
    generate = importlib.import_module("generate")
    path = tmp_path / "questions.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("was ist λ?\n\n何?\nwho\u2028painted\x0cit\x85?\r\nwhen?", encoding=encoding)
        arguments = generate.GenerateArguments(model="m", file=str(path))
        if source == "stdin":
            arguments.file = None
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes()), encoding="cp1252"))
        questions = ["was ist λ?", "何?", "who\u2028painted\x0cit\x85?", "when?"]
        assert generate.read_questions(arguments) == questions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stream": True, "output_file": "a.jsonl"},
            "--stream prints answers while they are written, and --output_file",
        ),
        ({"stream": True, "batch_size": 2}, "--stream answers one question after the other: leave out --batch_size"),
        ({"file": "questions.txt"}, "Questions on the command line and --file: give one"),
        ({"top_k": 5}, "--top_k without --index: nothing is retrieved"),
        ({"force_nsp_first": True}, "--force_nsp_first without --index: nothing is retrieved"),
    ],
)
def test_options_of_generate_that_would_be_ignored_are_refused(options, message):
    args = generate.GenerateArguments(model="out", questions=["who?"], **options)
    with pytest.raises(ValueError, match=message):
        generate.check_options(args)


def test_options_of_generate_with_an_index_have_an_effect():
    generate.check_options(
        generate.GenerateArguments(model="out", questions=["who?"], index="i", force_nsp_first=True)
    )
    generate.check_options(generate.GenerateArguments(model="out", questions=["who?"], stream=True, batch_size=1))
