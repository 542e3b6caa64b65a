"""What the benchmarks share: time and memory of a call, arms that take turns, tables, and the line that says on what they ran."""

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

GB = 1e9


class Meter:
    """Seconds and peak memory of a call, on the CPU (resident memory of the process) or a GPU (allocated memory), above what was held before it."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __call__(self, call):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier arms freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            held = self._resident("VmRSS")
        start = time.perf_counter()
        result = call()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        return result, seconds, peak - held

    @staticmethod
    def _resident(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


class Clock:
    """Seconds by name; on a GPU it waits for what is under way before and behind what it times."""

    def __init__(self, device):
        self.cuda, self.seconds = device.type == "cuda", {}

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, name, seconds):
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def time(self, name):
        start = self.now()
        yield
        self.add(name, self.now() - start)

    @contextlib.contextmanager
    def time_reading(self, gen):
        """Forwards of several columns, but for the first one, which reads the prompts: those of passages."""
        starts = []

        def before(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                starts.append(self.now())

        def behind(module, args, kwargs, output):
            if kwargs["input_ids"].shape[1] > 1 and len(starts) > 1:
                self.add("reading", self.now() - starts[-1])

        hooks = [
            gen.base_model.register_forward_pre_hook(before, with_kwargs=True),
            gen.base_model.register_forward_hook(behind, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class TimedIndex:
    """A retriever whose searches are timed."""

    def __init__(self, index, clock):
        self.index, self.clock = index, clock
        self.check_model, self.rows_of = index.check_model, index.rows_of

    def search(self, *args, **kwargs):
        with self.clock.time("search"):
            return self.index.search(*args, **kwargs)

    def get_passages(self, rows):
        with self.clock.time("search"):
            return self.index.get_passages(rows)


@dataclass
class Arm:
    """
    What an arm did in the timed rounds.

    Args:
        results (`list`): what each round returned.
        seconds (`list[float]`): of each round.
        peak (`float`): most memory of a round above what was held before it, in bytes.
    """

    results: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    peak: float = 0.0

    def ratios(self, other, work=1.0):
        """This arm's speed in units of another's, round by round; `work` is what this one did in units of what the other did."""
        return [work * theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]


def take_turns(arms, repeats, meter):
    """
    Call each arm once to warm up, then once in each of `repeats` rounds; a slow minute of the machine is every arm's, and none always goes first.

    Args:
        arms (`dict[str, callable]`): called without arguments.
        repeats (`int`): timed rounds.
        meter ([`Meter`]): of the device.

    Returns:
        `dict[str, Arm]`.
    """
    done, names = {name: Arm() for name in arms}, list(arms)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            result, seconds, peak = meter(arms[name])
            if turn:
                done[name].results.append(result)
                done[name].seconds.append(seconds)
                done[name].peak = max(done[name].peak, peak)
        if turn:
            print(
                f"  round {turn} of {repeats}: "
                + ", ".join(f"{name} {done[name].seconds[-1]:.2f} s" for name in names),
                flush=True,
            )
    return done


def spread(values):
    """Median, smallest and largest of a list, as JSON has them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(numbers, style=".2f"):
    """What `spread` found, as a cell of a table."""
    return f"{numbers['median']:{style}} ({numbers['min']:{style}} to {numbers['max']:{style}})"


def print_table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def describe(device):
    """Hardware and versions, printed; the head of a benchmark's JSON."""
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    print(f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    return {"hardware": hardware, "torch": torch.__version__, "transformers": transformers.__version__}


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
