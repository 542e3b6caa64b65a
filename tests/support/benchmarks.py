"""Importing this makes the modules of `recipes/benchmarks/` importable, next to those of `recipes/`."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # at the end: recipes/ has a train.py and a generate.py too
