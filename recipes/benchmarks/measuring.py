"""Helpers that the benchmarks share: time and memory of a call, arms that take turns, tables and hardware."""

import contextlib
import ctypes
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from modeling_cosup import Retriever

GB = 1e9


def resident_bytes(name: str, process: str = "self") -> int:
    """Return the value of one line of `/proc/<process>/status`, e.g. `VmRSS`, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{process}/status has no {name}.")


@contextlib.contextmanager
def memory_samples(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Append what `measure()` returns to a list: once a second while the context lasts."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1 if samples else 0):
            samples.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def thinned(samples: list[int], count: int = 12) -> list[int]:
    """Return about `count` of the samples, evenly spread."""
    return samples[:: max(1, len(samples) // count)]


class Meter:
    """
    A meter of the seconds and the peak memory of a call.

    The peak is what the call needs in addition to the memory that was in use before it: resident memory of the process
    on a CPU, allocated memory on a GPU. Each call resets the peak that the system or torch keeps;
    `Meter.highest` is the highest of all that any meter saw since it was set to 0, in bytes.

    Args:
        device (`torch.device`): where the calls compute.
        collect (`bool`, *optional*, defaults to `True`): collect garbage before each call. That takes a part of a
            second, which adds up with many short calls.
    """

    highest: ClassVar[float] = 0.0

    def __init__(self, device: torch.device, collect: bool = True) -> None:
        self.cuda = device.type == "cuda"
        self.collect = collect

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        """Return the result of a call, its seconds, and its peak memory in bytes."""
        if self.collect:
            gc.collect()
        Meter.highest = max(Meter.highest, self.peak())
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            bytes_before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # returns the memory that earlier arms freed to the system
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
            bytes_before = resident_bytes("VmRSS")
        start = time.perf_counter()
        result = call()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = self.peak()
        Meter.highest = max(Meter.highest, peak)
        return result, seconds, peak - bytes_before

    def peak(self) -> float:
        """Return the highest memory in use since the peak was reset, in bytes."""
        return torch.cuda.max_memory_allocated() if self.cuda else resident_bytes("VmHWM")


class Clock:
    """A clock that adds up seconds by name. On a GPU it waits for running work before and after each measurement."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Return the current time in seconds."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a name."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to a name."""
        start = self.now()
        yield
        self.add(name, self.now() - start)

    @contextlib.contextmanager
    def time_reading(self, gen: torch.nn.Module) -> Iterator[None]:
        """
        Add the time of the forwards that read passages to "reading".

        These are the forwards of several columns. The first of them reads the prompts and is left out.
        """
        starts = []

        def before(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                starts.append(self.now())

        def after(module, args, kwargs, output):
            if kwargs["input_ids"].shape[1] > 1 and len(starts) > 1:
                self.add("reading", self.now() - starts[-1])

        hooks = [
            gen.base_model.register_forward_pre_hook(before, with_kwargs=True),
            gen.base_model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class TimedIndex:
    """A retriever that times its searches, and how long it takes to fetch the passages."""

    def __init__(self, index: Retriever, clock: Clock) -> None:
        self.index = index
        self.clock = clock
        self.fingerprint = index.fingerprint
        self.check_model = index.check_model
        self.rows_of = index.rows_of

    def search(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.time("search"):
            return self.index.search(*args, **kwargs)

    def get_passages(self, rows: Sequence[int]) -> Any:
        with self.clock.time("search"):
            return self.index.get_passages(rows)


CPU_MATMUL_SIZES = (1024, 1536, 2048)  # large enough to reach the peak
ACCELERATOR_MATMUL_SIZES = (4096, 8192, 16384)


def matmul_peak(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] | None = None, repeats: int = 8
) -> float:
    """
    Return the speed of the fastest matrix product that the device was seen to do.

    It is measured, so it holds for the threads and the clock rate of this process. Unlike a data sheet's number, it
    can be reached.

    Args:
        device (`torch.device`): on a CPU, with the threads that torch has now.
        dtype (`torch.dtype`): of both factors.
        sizes (`list[int]`, *optional*): n of the products of n x n matrices; by default three that suit the device.
        repeats (`int`, *optional*, defaults to 8): timed products of each size, after one warm-up.

    Returns:
        `float`: FLOP/s, 2 n³ for each product; the best of all.
    """
    if sizes is None:
        sizes = CPU_MATMUL_SIZES if device.type == "cpu" else ACCELERATOR_MATMUL_SIZES
    clock = Clock(device)
    peak = 0.0
    for n in sizes:
        factors = torch.randn(2, n, n, device=device).to(dtype)
        torch.matmul(*factors)
        for _ in range(repeats):
            start = clock.now()
            torch.matmul(*factors)
            peak = max(peak, 2 * n**3 / (clock.now() - start))
    return peak


@dataclass
class Arm:
    """
    Results, times and memory of an arm in the timed rounds.

    Args:
        results (`list`): what each round returned.
        seconds (`list[float]`): time of each round.
        peak (`float`): the highest peak memory of a round, in bytes, as [`Meter`] measures it.
    """

    results: list = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    def ratios(self, other: "Arm", work: float = 1.0) -> list[float]:
        """
        Return the speed of this arm relative to another arm, round by round.

        `work` is the work of this arm in a round, relative to the work of the other arm.
        """
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [work * other_seconds / seconds for seconds, other_seconds in pairs]


def take_turns(
    arms: dict[str, Callable[[], Any]], repeats: int, meter: Meter, max_seconds: float | None = None
) -> dict[str, Arm]:
    """
    Call each arm once to warm up, then once in each of `repeats` rounds.

    A slow minute of the machine therefore affects all arms, and no arm always goes first.

    Args:
        arms (`dict[str, Callable]`): name -> function without arguments.
        repeats (`int`): number of timed rounds.
        meter ([`Meter`]): the meter of the device.
        max_seconds (`float`, *optional*): no timed round but the first begins later than this after the warm-up.
    """
    measured = {name: Arm() for name in arms}
    end = float("inf")
    for turn in range(repeats + 1):
        if turn == 1 and max_seconds is not None:
            end = time.perf_counter() + max_seconds
        if turn > 1 and time.perf_counter() > end:
            break
        for name in rotated(list(arms), turn):
            result, seconds, peak = meter(arms[name])
            if turn == 0:
                continue
            measured[name].results.append(result)
            measured[name].seconds.append(seconds)
            measured[name].peak = max(measured[name].peak, peak)
        if turn > 0:
            times = ", ".join(f"{name} {arm.seconds[-1]:.2f} s" for name, arm in measured.items())
            print(f"  round {turn} of {repeats}: {times}", flush=True)
    return measured


def rotated(names: list[str], turn: int) -> list[str]:
    """Return the names, rotated so that each turn begins with a different one."""
    first = turn % len(names)
    return names[first:] + names[:first]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread_text(numbers: dict[str, float], style: str = ".2f") -> str:
    """Return the result of [`spread`] as text, for a cell of a table."""
    return f"{numbers['median']:{style}} ({numbers['min']:{style}} to {numbers['max']:{style}})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_hardware(device: torch.device) -> dict[str, str]:
    """Print hardware and versions, and return them for the results file."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    print(f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    return {"hardware": hardware, "torch": torch.__version__, "transformers": transformers.__version__}


def cpu_name() -> str:
    """Return the processor's model name."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()
