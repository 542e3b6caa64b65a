"""What reports need: no torch, and templates that are part of an installed package."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainer.reports
from trainer.reports.document import TEMPLATES

JUDGING = ("correctness", "figures", "grounding", "intervals", "matching", "results")


def test_no_module_of_the_reports_imports_torch():
    modules = [f"trainer.reports.{module.name}" for module in pkgutil.iter_modules(trainer.reports.__path__)]
    assert len(modules) > 5
    modules += [f"trainer.judging.{name}" for name in JUDGING]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
        "    assert 'transformers' not in sys.modules, f'{name} imports transformers'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_a_wheel_holds_every_package():
    root = Path(__file__).parents[2]
    setuptools = pytest.importorskip("setuptools.config.pyprojecttoml", reason="reads pyproject.toml")
    configuration = setuptools.read_configuration(root / "pyproject.toml", expand=False)
    folders = {path.parent for name in ("modeling_cosup", "trainer") for path in (root / name).rglob("*.py")}
    packages = {".".join(folder.relative_to(root).parts) for folder in folders}
    assert set(configuration["tool"]["setuptools"]["packages"]) == packages


def test_a_wheel_holds_the_templates():
    setuptools = pytest.importorskip("setuptools.config.pyprojecttoml", reason="reads pyproject.toml")
    configuration = setuptools.read_configuration(Path(__file__).parents[2] / "pyproject.toml", expand=False)
    declared = configuration["tool"]["setuptools"]
    assert "trainer.reports" in declared["packages"]
    patterns = declared["package-data"]["trainer.reports"]
    held = {path for pattern in patterns for path in TEMPLATES.parent.glob(pattern)}
    assert held
    assert held == set(TEMPLATES.iterdir())
