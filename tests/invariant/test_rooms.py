"""Imports point one way, and not in circles: recipes, trainer.reports, trainer.judging, trainer, modeling_cosup."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("modeling_cosup", "trainer", "trainer.judging", "trainer.reports", "recipes")
# pure functions of judging that training may import, for cards
FOR_TRAINING = {
    "trainer.card": {"trainer.judging.figures", "trainer.judging.intervals"},
}


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the project."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    module_name(path): path
    for folder in ("modeling_cosup", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
}


# recipes import each other by the names that they have next to a recipe or a benchmark, such as `shared.cli`
SCRIPTS = {}
for recipe_folder in (ROOT / "recipes" / "benchmarks", ROOT / "recipes"):
    for recipe_path in sorted(recipe_folder.rglob("*.py")):
        SCRIPTS[".".join(recipe_path.relative_to(recipe_folder).with_suffix("").parts)] = recipe_path


def floor(module: str) -> int:
    """Return the place of a module's package in FLOORS, 0 for the lowest."""
    return FLOORS.index(module.rpartition(".")[0])


def origin_of(node: ast.ImportFrom, module: str) -> str:
    """Return the full name of the module or package that a `from ... import` statement in a module names."""
    parts = module.split(".")[: -node.level] if node.level else []
    if node.module:
        parts.append(node.module)
    return ".".join(parts)


def imported(module: str) -> set[str]:
    """Return the modules of this project, recipes included, that a module imports anywhere in its file."""
    names = names_imported(MODULES[module], module)
    return {name for name in names if name in MODULES or name.split(".")[0] in ("recipes", "shared", "experiments")}


def names_imported(path: Path, module: str) -> set[str]:
    """Return every name that the imports of a file give: modules, and what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(node, module)
            names.add(origin)
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module):
    for name in imported(module):
        assert name in MODULES, f"{module} imports {name}"
        if name in FOR_TRAINING.get(module, ()):
            continue
        assert floor(name) <= floor(module), f"{module} imports {name}"


def test_no_circles():
    graph = {module: imported(module) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises for a circle


def test_no_circles_of_recipes():
    graph = {name: names_imported(path, name) & SCRIPTS.keys() for name, path in SCRIPTS.items()}
    assert "gpu_parts.records" in graph["gpu_parts.processes"]
    assert "shared.cli" in graph["train"]
    assert len(list(TopologicalSorter(graph).static_order())) == len(SCRIPTS)  # raises for a circle
