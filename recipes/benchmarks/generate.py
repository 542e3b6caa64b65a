"""
Compare the speed and memory of retrieval inside generate() with other ways to write the same tokens.

    python recipes/benchmarks/generate.py --shape 135m --new_tokens 48 --repeats 2
    python recipes/benchmarks/generate.py --shape 7b --dtype bfloat16 --original_rows 8

Parts:
    1   against the original's algorithm: one row at a time, the whole prefix read again after every passage and every
        `[CE]`, and an index made for each question (FAISS, or torch where it is missing)
    2   against plain `gen.generate` of as many tokens without retrieval, eager and captured
    3   the share of the time that search takes in a large exact index
    4   generate_many against fixed batches, with answers of very different lengths

The arms take turns in one process. Weights, prompts and passages are random and made here (`--gen` takes your own
model). Retrieval is therefore forced, at different steps in each row, and no answer ends early. Every table counts the
rows with the same tokens; only in float32 should this be all of them. Prints tables and writes `--output_file`.
"""

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import torch
from transformers import LogitsProcessorList, set_seed

from modeling_cosup import PassageIndex, RetrievalConfig
from modeling_cosup.files_cosup import write_json

from decoding_arms import captured_view, timed_retrieve
from decoding_parts import equal_rows, measurements, part_1, part_2
from measuring import print_hardware, print_table, spread, spread_text, take_turns
from random_world import SHAPES, Ends, World


@dataclass
class BenchmarkArguments:
    """What to measure, and how."""

    gen: str | None = field(
        default=None, metadata={"help": "Name or path of Gen; defaults to random weights of --shape."}
    )
    shape: str = field(default="135m", metadata={"help": f"Shape of a random Llama: {', '.join(SHAPES)}."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32, bfloat16, float16."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto."})
    parts: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4], metadata={"help": "Which of the four parts to run."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 32], metadata={"help": "Rows of a batch, in parts 1, 2 and 3."}
    )
    new_tokens: int = field(default=96, metadata={"help": "Number of tokens that each row decides."})
    retrievals: int = field(default=2, metadata={"help": "Number of retrievals that are forced in each row."})
    repeats: int = field(default=3, metadata={"help": "Timed rounds of every arm, after a warm-up round."})
    original_rows: int = field(
        default=2,
        metadata={"help": "Rows that the original's algorithm, which has no batches, writes in a round of part 1."},
    )
    num_candidates: int = field(default=50, metadata={"help": "Passages that each row of part 1 searches."})
    num_passages: int = field(default=500, metadata={"help": "Passages of the index in parts 1, 2 and 4."})
    index_size: int | None = field(
        default=None,
        metadata={"help": "Passages of the index in part 3; defaults to 1,000,000 on a GPU, 20,000 on a CPU."},
    )
    num_prompts: int = field(default=48, metadata={"help": "Prompts of part 4."})
    rows_at_once: int = field(
        default=8, metadata={"help": "Rows of a batch in part 4, for generate_many and the fixed batches."}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "No timed round but the first begins later than this after the warm-up."}
    )
    captured: bool = field(
        default=True, metadata={"help": "Add the arms with a static cache and a captured step to parts 2 and 3."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; defaults to all cores."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, prompts, passages and lengths."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}, expected one of {', '.join(SHAPES)}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {self.dtype!r}, expected float32, bfloat16 or float16.")
        if self.device not in ("auto", "cpu") and not torch.cuda.is_available():
            raise ValueError(f"--device is {self.device!r}, but torch finds no GPU here.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: its folder does not exist.")
        if unknown := set(self.parts) - {1, 2, 3, 4}:
            raise ValueError(f"--parts holds {min(unknown)}, expected 1, 2, 3 or 4.")
        if self.new_tokens < 4 * self.retrievals:
            raise ValueError(
                f"--new_tokens is {self.new_tokens}, expected 4 or more for each of the {self.retrievals} retrievals "
                "of a row."
            )
        if self.num_candidates > self.num_passages:
            raise ValueError(
                f"--num_candidates is {self.num_candidates}, expected at most the {self.num_passages} passages of the "
                "index."
            )


# ---------------------------------------------------------------------- parts


def part_3(world: World, script: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure the share of the time that searching and fetching the passages takes."""
    index_size = script.index_size
    if not index_size:
        index_size = 1_000_000 if world.device.type == "cuda" else 20_000
    index = world.index(index_size)
    results = []
    for num_rows in script.batch_sizes:
        calls = calls_of_part_3(world, script, index, num_rows)
        arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
        for name, arm in arms.items():
            search_seconds = [timing["search"] for _, timing in arm.results]
            shares = [search / whole for search, whole in zip(search_seconds, arm.seconds, strict=True)]
            results.append(
                {
                    "batch": num_rows,
                    "arm": name,
                    "index_size": index_size,
                    "search_seconds": statistics.median(search_seconds),
                    "share_of_search": spread(shares),
                    **measurements(arm, num_rows * script.new_tokens),
                }
            )
    print(
        f"\nExact search among {index_size:,} x {world.config.embedding_size}: {script.new_tokens} tokens and "
        f"{script.retrievals} retrievals a row; {world.description}"
    )
    rows = []
    for result in results:
        seconds = f"{result['seconds']['median']:.2f}"
        search = f"{result['search_seconds']:.3f}"
        rows.append(
            [str(result["batch"]), result["arm"], seconds, search, spread_text(result["share_of_search"], ".1%")]
        )
    print_table(["batch", "decoding", "s", "search, s", "share of search (min to max)"], rows)
    return results


def calls_of_part_3(
    world: World, script: BenchmarkArguments, index: PassageIndex, num_rows: int
) -> dict[str, Callable[[], Any]]:
    """Return the function of each arm by its name, for a batch of `num_rows` rows."""
    prompts = world.prompts(num_rows)
    calls = {"eager": lambda: timed_retrieve(world, world.model, prompts, index)}
    if script.captured:
        view = captured_view(world.model)
        calls["captured"] = lambda: timed_retrieve(world, view, prompts, index, **world.capture_options)
    return calls


def part_4(world: World, script: BenchmarkArguments) -> list[dict[str, Any]]:
    """
    Compare generate_many with fixed batches of generate(), on the same prompts.

    Each prompt retrieves once. A quarter of the answers is long.
    """
    index = world.index(script.num_passages)
    rng = random.Random(script.seed)
    rows_at_once = script.rows_at_once
    prompts = [[*prompt, world.config.nsp_token_id] for prompt in world.prompts(script.num_prompts)]
    shortest, longest_of_short = max(1, script.new_tokens // 16), max(1, script.new_tokens // 4)
    lengths = {}  # first token of a prompt -> number of tokens of its answer
    for prompt in prompts:
        is_long = rng.random() < 0.25
        lengths[prompt[0]] = script.new_tokens if is_long else rng.randint(shortest, longest_of_short)
    num_tokens = sum(lengths.values())
    options = {
        "retriever": index,
        "retrieval_config": RetrievalConfig(max_retrievals=1),
        "logits_processor": LogitsProcessorList([Ends(lengths, world)]),
    }

    def fixed_batches():
        answers = []
        for start in range(0, len(prompts), rows_at_once):
            answers += world.generate(world.model, prompts[start : start + rows_at_once], **options)
        return answers

    def queue():
        settings = {"max_new_tokens": script.new_tokens, "batch_size": rows_at_once, "show_progress_bar": False}
        answers = world.model.generate_many(prompts, **settings, **options, **world.options)
        num_written = sum(answer.num_generated_tokens for answer in answers)
        if num_written != num_tokens:
            raise RuntimeError(
                f"The answers have {num_written} tokens in all, expected {num_tokens}: the forced ends are in the "
                "wrong places."
            )
        return [world.without_padding(answer.token_ids) for answer in answers]

    calls = {"fixed batches": fixed_batches, "generate_many": queue}
    arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
    fixed_arm = arms["fixed batches"]
    results = []
    for name, arm in arms.items():
        results.append(
            {
                "arm": name,
                **measurements(arm, num_tokens),
                "rows_equal": equal_rows(arm.results[-1], fixed_arm.results[-1]),
                "speed_to_fixed": spread(arm.ratios(fixed_arm)),
            }
        )
    print(
        f"\nA queue against fixed batches of {rows_at_once}: {len(prompts)} prompts, answers of "
        f"{min(lengths.values())} to {max(lengths.values())} tokens; {world.description}"
    )
    header = ["arm", "s", "tokens/s", "x fixed (min to max)", "peak memory GB", "rows with the same tokens"]
    rows = []
    for result in results:
        rows.append(
            [
                result["arm"],
                f"{result['seconds']['median']:.2f}",
                f"{result['tokens_per_second']:.1f}",
                spread_text(result["speed_to_fixed"]),
                f"{result['peak_memory_gb']:.2f}",
                f"{result['rows_equal']} of {len(prompts)}",
            ]
        )
    print_table(header, rows)
    return results


PARTS = {1: part_1, 2: part_2, 3: part_3, 4: part_4}


def main() -> None:
    """Run the parts, print their tables and write the numbers."""
    with clear_errors():
        (script,) = parse([BenchmarkArguments], __doc__)
        set_seed(script.seed)
        device = select_device(script.device)
        if device.type == "cpu" and script.threads:
            torch.set_num_threads(script.threads)
        results = {**print_hardware(device), "arguments": vars(script)}
        world = World(script, device)
        weights = script.gen or f"random weights, shape {script.shape}"
        world.description = f"{weights}, {script.dtype}, seed {script.seed}, {results['hardware']}"
        for part in script.parts:
            results[f"part_{part}"] = PARTS[part](world, script)
            if script.output_file:  # after each part, so that the failure of a later one loses nothing
                write_json(script.output_file, results)


def select_device(name: str) -> torch.device:
    """Return the device of `--device`; `auto` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


if __name__ == "__main__":
    main()
