"""Progress bars of a recipe."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def progress_bars(hidden: bool) -> Iterator[None]:
    """
    Hide the progress bars of all libraries in the block, if `disable_tqdm` asks for it.

    `Trainer` hides only its own bars. Those of this package, datasets and transformers are subclasses of tqdm's.
    """
    if not hidden:
        yield
        return
    show = tqdm.__init__

    def hide(bar: tqdm, *args: Any, **options: Any) -> None:
        show(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = hide
    try:
        yield
    finally:
        tqdm.__init__ = show
