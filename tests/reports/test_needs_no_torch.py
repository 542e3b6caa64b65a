"""Reports are made from files alone: importing them, and the parts of judging that they read, loads no torch."""

import pkgutil
import subprocess
import sys

import trainer.reports

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
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
