"""
README.md: its size, its two set-up commands, which .ci/run runs, and its other commands, which run here.

They run as they stand there, followed by options that make them short, in a copy of the folder of stand-ins
(`support/stand_ins.py`). Its Python blocks are run by test_blocks.py.
"""

import re
import shutil
import socket

import pytest

from support.forks import run_forked
from support.markdown_pages import ROOT, blocks_of
from support.shell_commands import commands_of

README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"
BASH = "".join(block.code for block in blocks_of(README) if block.language == "bash")
SET_UP = ("cd", "git", "hf", "pip", "pytest")  # their arguments are checked in test_commands.py
SHORT = {"train.py": ["--max_steps", "2", "--max_new_tokens", "4"]}  # further options of a recipe
RUN = "from support.page_runner import run_script; run_script()"
SERVE = "from support.page_runner import run_server; run_server()"


def set_up_commands():
    """Return the commands that .ci/run runs, by their names there."""
    return dict(re.findall(r"^(quickstart|tests)='(.*)'$", CI.read_text(encoding="utf-8"), re.MULTILINE))


def recipe_of(words):
    """Return the recipe of a command and its options; `None` if it runs none."""
    if words[0] == "python":
        return words[1:]
    if words[0] != "accelerate":
        return None
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[start:]


def commands_here():
    """Return the recipes of README.md with their options, without the command that .ci/run runs."""
    lines = "\n".join(
        line for line in BASH.replace("\\\n", " ").splitlines() if line not in set_up_commands().values()
    )
    found = []
    for command in commands_of(lines):
        recipe = recipe_of(command.words)
        if recipe:
            found.append(recipe)
        else:
            assert command.words[0] in SET_UP, f"no test runs {command.words}"
    return found


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_size():
    """A page for a newcomer; the rest is in docs/."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    assert len(text.splitlines()) <= 150


def test_ci_runs_the_two_set_up_commands():
    ci = CI.read_text(encoding="utf-8")
    commands = set_up_commands()
    assert list(commands) == ["quickstart", "tests"]
    for name, command in commands.items():
        assert command in BASH.splitlines()
        assert re.search(rf'^run "\${name}\b', ci, re.MULTILINE), f".ci/run does not run ${name}"


@pytest.mark.parametrize("recipe", commands_here(), ids=lambda recipe: recipe[0])
def test_commands_run(recipe, folder, hub_variables):
    script, *options = recipe
    name = script.rpartition("/")[2]
    variables = dict(hub_variables)
    code = RUN
    words = [script, *options, *SHORT.get(name, [])]
    if name == "train.py":
        shutil.rmtree(folder / "out")
    if name in ("demo.py", "serve.py"):
        if name == "demo.py":
            pytest.importorskip("gradio", reason="the demo is a Gradio app")
        port = free_port()
        variables["GRADIO_SERVER_PORT"] = str(port)
        url = f"http://127.0.0.1:{port}"
        if name == "serve.py":
            url += "/v1"
            words += ["--port", str(port)]
        words = [url, *words]
        code = SERVE
    ended = run_forked("-c", code, *words, cwd=folder, env=variables, timeout=120)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
    check_result(name, folder, ended.stdout)


def check_result(name, folder, printed):
    """Check what a recipe has printed and written."""
    if name == "train.py":
        for path in ("model.safetensors", "README.md", "results.json", "index/index_config.json"):
            assert (folder / "out" / path).is_file()
        assert "query embedding: R@1" in printed
    elif name in ("generate.py", "serve.py"):
        assert "Rembrandt" in printed  # the answer of the stand-in
        assert "[1]" in printed or name == "serve.py"
    elif name == "demo.py":
        assert "An index of 6 passages is searched." in printed
    else:
        raise AssertionError(f"no test of what {name} does")
