"""Run a command whose Python processes see the imitated GPU."""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import build, missing, variables

if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(sys.argv[1:], env=variables(build(Path(folder)))).returncode)
