"""How the program reports an error: its cause on one line, and where in this project it was raised."""

import re
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[3]
MAX_LINE = 600  # characters of an error on one line
MAX_STDERR = 2000  # characters of a process's errors
EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|Exit|Failed|Unsupported)\b")
LAUNCHER = "ChildFailedError"  # of torch.distributed.run; the process it launched has printed its own error before


class FailedProcess(RuntimeError):
    """
    A process ended with an error; the message names its cause.

    Args:
        what (`str`): what failed.
        stderr (`str`): all that the process printed as errors.
    """

    def __init__(self, what: str, stderr: str) -> None:
        lines = stderr.rstrip().splitlines() or ["it printed nothing"]
        causes = [number for number, line in enumerate(lines) if EXCEPTION.match(line) and LAUNCHER not in line]
        last = causes[-1] if causes else len(lines) - 1
        super().__init__(f"{what} failed: {lines[last]}")
        self.printed = "\n".join(lines[: last + 1])[-MAX_STDERR:]


def one_line(error: BaseException) -> str:
    """
    Return the type and the message of an error on one line.

    Compilers and the dispatcher say in the first line only that something failed, so all lines are joined; of a long
    message the beginning is kept.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]} …"


def cause_and_place(error: BaseException) -> str:
    """Return an error on one line, then the frames of this project and the one that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) or frame is frames[-1]]
    places = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}' for frame in shown]
    printed = [error.printed] if isinstance(error, FailedProcess) else []
    return "\n".join([one_line(error), *places, *printed])
