"""The parts of `recipes/demo.py`; a Space needs this folder next to its `app.py`."""
