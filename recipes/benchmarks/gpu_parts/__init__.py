"""The parts of recipes/benchmarks/gpu.py: correctness, speed and training, and what runs and reports them."""
