"""Python imports this module at its start, if its folder is on PYTHONPATH: it imitates a GPU in this process."""

import ctypes
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

LIBRARY = os.environ.get("IMITATED_GPU")  # the compiled device.cpp


class AtImportOfTorch(importlib.abc.MetaPathFinder):
    """Loads the device right before torch is imported, and completes torch's Python side right after."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        import_torch = spec.loader.exec_module

        def exec_module(module):
            folder = Path(spec.origin).with_name("lib")
            for library in [*map(str, folder.glob("libgomp*")), f"{folder}/libc10.so", f"{folder}/libtorch_cpu.so"]:
                ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            device = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
            import_torch(module)
            import imitated_cuda

            imitated_cuda.install(module, device)

        spec.loader.exec_module = exec_module
        return spec


if LIBRARY:
    sys.meta_path.insert(0, AtImportOfTorch())
