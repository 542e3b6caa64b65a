"""Experiments: their YAML files, and the code that `run_experiments.py` needs to read them and launch their runs."""
