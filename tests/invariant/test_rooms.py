"""Imports point one way: recipes, trainer.reports, trainer.judging, trainer, modeling_cosup; and no file waits for itself."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("modeling_cosup", "trainer", "trainer.judging", "trainer.reports", "recipes")
TRAINING_ASKS = {"trainer.judging.figures", "trainer.judging.intervals"}  # for the card of a training


def module_name(path: Path) -> str:
    """The dotted name of a file of the project."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    module_name(path): path
    for folder in ("modeling_cosup", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
}


def floor(module: str) -> int:
    """Number of the floor that a module is on, 0 for the lowest."""
    package = module.rpartition(".")[0]
    if module.startswith("recipes"):
        package = "recipes"
    return FLOORS.index(package)


def imported(module: str) -> set[str]:
    """Modules of this project that a module imports, anywhere in its file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            names.add(origin)
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return {name for name in names if name in MODULES or name.split(".")[0] in ("recipes", "shared", "experiments")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module):
    for name in imported(module):
        assert name in MODULES, f"{module} imports {name}"
        above = floor(name) > floor(module)
        assert not above or (module == "trainer.card" and name in TRAINING_ASKS), f"{module} imports {name}"


def test_no_circles():
    graph = {module: imported(module) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises for a circle
