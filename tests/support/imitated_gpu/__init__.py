"""
A GPU that computes on the CPU: finds code that would break on a GPU, such as tensors of two devices in one operator.

It knows nothing of a GPU's speed, rounding, memory, CUDA graphs or Triton. From the folder `tests`:

    python -m support.imitated_gpu python -m pytest training
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
WRITTEN_FOR = "2.13."  # torch's version: device.cpp implements interfaces that change


def missing() -> str:
    """Return why the device cannot be imitated here, or an empty string."""
    if not torch.__version__.startswith(WRITTEN_FOR) or torch.version.cuda:
        return f"needs torch {WRITTEN_FOR}* for CPUs"
    return "" if shutil.which("g++") else "needs g++"


def build(folder: Path) -> Path:
    """Compile the device into a folder, put what Python needs next to it, and return the library."""
    library = folder / "imitated_gpu.so"
    for name in ("sitecustomize.py", "imitated_cuda.py"):
        shutil.copy(FOLDER / name, folder)
    installed = Path(torch.__file__).parent
    include = installed / "include"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [str(FOLDER / "device.cpp"), "-o", str(library), f"-L{installed}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def variables(library: Path) -> dict[str, str]:
    """Return environment variables with which Python imitates the device at its start."""
    paths = [str(library.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "IMITATED_GPU": str(library), "PYTHONPATH": os.pathsep.join(paths)}
