"""
A GPU's hour in a box: correctness, speed and training on this machine, in three parts that resume.

    python recipes/benchmarks/gpu.py --output_dir OUT
    python recipes/benchmarks/gpu.py --output_dir OUT --parts speed --minutes 8 --gen SMOLLM2 --train_file train.jsonl
    python recipes/benchmarks/gpu.py --output_dir OUT --retry true        # also what failed or never ended
    python recipes/benchmarks/gpu.py --output_dir OUT --parts correctness --checks packed_flex captured_step

Each part takes at most `--minutes`. A check that does not fit into what is left of them is left for the next call.
The same command again does what is missing. Each check has a file OUT/<part>/<check>.json. OUT/results.json holds
them all, and OUT/report.md shows them. A folder with results.json alone can be continued too, e.g. on another machine.
The exit status is 1 if a check failed.

It starts with torch, transformers, accelerate, peft, sentence-transformers and pyarrow alone, without a network. A
check that needs another package says so and is skipped; recipes/benchmarks/gpu.md says how to bring packages.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`
sys.path.insert(0, str(Path(__file__).parents[2]))  # the packages of this project, which need not be installed

from shared.cli import clear_errors, parse

from gpu_parts.processes import Call, run_part
from gpu_parts.records import check_size, read_part, restore_records, try_again
from gpu_parts.report import PARTS, write_report


@dataclass
class GpuArguments:
    """What to run, and for how long."""

    output_dir: str = field(metadata={"help": "Folder of the results; a second call continues there."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"Which parts to run: {', '.join(PARTS)}."}
    )
    tiny: bool = field(default=False, metadata={"help": "Tiny shapes, to try the program on a CPU."})
    minutes: float = field(default=8.0, metadata={"help": "Time of each part; what does not fit is left."})
    checks: list[str] = field(default_factory=list, metadata={"help": "Which checks to run; default: all of a part."})
    retry: bool = field(default=False, metadata={"help": "Try again what failed, or was begun and never ended."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto."})
    gen: str | None = field(
        default=None, metadata={"help": "Name or path of Gen; without it, random weights.", "local_or_hub": True}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training instances.", "local_or_hub": True})
    data: str | None = field(
        default=None,
        metadata={"help": "Folder of training instances, questions and corpora.", "local_or_hub": True},
    )

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"--parts holds {part!r}, expected some of {', '.join(PARTS)}.")
        if self.minutes <= 0:
            raise ValueError(f"--minutes is {self.minutes:g}, expected more than 0.")


def main() -> None:
    """Run the parts and write the report; the exit status is 1 if a check failed."""
    with clear_errors():
        (script,) = parse([GpuArguments], __doc__)
        Path(script.output_dir).mkdir(parents=True, exist_ok=True)
        restore_records(script.output_dir)
        check_size(script.output_dir, PARTS, script.tiny)
    call = Call(
        output_dir=script.output_dir,
        minutes=script.minutes,
        checks=script.checks,
        tiny=script.tiny,
        device=script.device,
        gen=script.gen,
        train_file=script.train_file,
        data=script.data,
        command=shlex.join(["python", *sys.argv]),
    )
    failed = []
    known = set()
    for part in script.parts:
        if script.retry:
            try_again(script.output_dir, part)
        if not run_part(part, call):
            failed.append(part)
        for record in read_part(script.output_dir, part):
            known.add(record["check"])
            if record["status"] in ("failed", "begun"):
                failed.append(f"{part}/{record['check']}")
    write_report(script.output_dir)
    print(f"{script.output_dir}/report.md", flush=True)
    if unknown := sorted(set(script.checks) - known):
        failed.append(f"no check is named {', '.join(unknown)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
