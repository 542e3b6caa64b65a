"""Files that several folders of a run hold."""

import os
import shutil
from pathlib import Path


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name: a hard link, or a copy if the file system has none. Neither must be changed."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
