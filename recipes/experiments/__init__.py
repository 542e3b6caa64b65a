"""Experiments: their YAML files, and what `run_experiments.py` needs to read them and to launch their runs."""
