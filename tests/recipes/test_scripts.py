"""Every script of recipes/: no other module imports it, and its help shows its description and its options."""

import ast
import runpy
import sys
from pathlib import Path

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


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_help(path, monkeypatch, capsys):
    """Like `python recipes/X.py --help`, but in this process: importing torch for each script would take minutes."""
    if path.name == "demo.py":
        pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    description = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert description.splitlines()[0] in printed
    assert "--" in printed.partition("options:")[2]
