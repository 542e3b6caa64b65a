"""
Compare the speed and memory of retrieval inside generate() with other ways to write the same tokens.

    python recipes/benchmarks/generate.py --shape 135m --new_tokens 48 --repeats 2
    python recipes/benchmarks/generate.py --shape 7b --dtype bfloat16 --original_rows 8

Parts:
    1   against the original's algorithm: one row at a time, the whole prefix read again after every passage and every
        `[CE]`, and a FAISS index made for each question
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import torch
from transformers import LogitsProcessorList, set_seed

from modeling_cosup import PassageIndex, RetrievalConfig
from modeling_cosup.files_cosup import write_json

from decoding_arms import captured_view, original_generate, print_captures, timed_retrieve
from measuring import GB, Arm, print_hardware, print_table, spread, spread_text, take_turns
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


# ---------------------------------------------------------------------- results


def equal_rows(first: Sequence[list[int]], second: Sequence[list[int]]) -> int:
    """Return how many rows are the same in both lists, up to the end of the shorter list."""
    pairs = zip(first, second, strict=False)
    return sum(first_row == second_row for first_row, second_row in pairs)


def measurements(arm: Arm, num_tokens: int) -> dict[str, Any]:
    """Return the measurements of an arm that decides `num_tokens` tokens in each round."""
    return {
        "seconds": spread(arm.seconds),
        "tokens_per_second": num_tokens / statistics.median(arm.seconds),
        "peak_memory_gb": arm.peak / GB,
    }


# ---------------------------------------------------------------------- parts


def part_1(world: World, script: BenchmarkArguments) -> list[dict[str, Any]]:
    """Compare with the original's algorithm, which writes the same tokens row by row."""
    index = world.index(script.num_passages)
    results = []
    for size in script.batch_sizes:
        prompts = world.prompts(size)
        plan = world.plan(size).tolist()
        rng = random.Random(script.seed)
        candidates = []
        for _ in prompts:
            numbers = rng.sample(range(script.num_passages), script.num_candidates)
            candidates.append([f"p{number}" for number in numbers])
        pools = [index.get_passages(index.rows_of(ids)) for ids in candidates[: script.original_rows]]
        embeds = [world.embed(pool) for pool in pools]
        original_rows = list(zip(prompts, plan, pools, embeds, strict=False))  # only the first have pools

        def original(rows=original_rows):
            return [original_generate(world, *row) for row in rows]

        def cosup(prompts=prompts, candidates=candidates):
            return world.retrieve(world.model, prompts, index, candidates)

        arms = take_turns({"original": original, "CoSup": cosup}, script.repeats, world.meter)
        original_arm = arms["original"]
        cosup_arm = arms["CoSup"]
        num_compared = len(original_arm.results[-1])
        results.append(
            {
                "batch": size,
                "rows_equal": equal_rows(original_arm.results[-1], cosup_arm.results[-1]),
                "rows_compared": num_compared,
                "speed_to_original": spread(cosup_arm.ratios(original_arm, work=size / num_compared)),
                "original": measurements(original_arm, num_compared * script.new_tokens),
                "CoSup": measurements(cosup_arm, size * script.new_tokens),
            }
        )
    print_part_1(results, world, script)
    return results


def print_part_1(results: list[dict[str, Any]], world: World, script: BenchmarkArguments) -> None:
    """Print the table of part 1."""
    print(
        f"\nAgainst the original's algorithm, one row after another: {script.new_tokens} tokens and "
        f"{script.retrievals} retrievals a row; {world.description}"
    )
    header = ["batch", "the original, tokens/s", "CoSup, tokens/s", "x the original (min to max)"]
    header += ["peak memory GB: original, CoSup", "rows with the same tokens"]
    rows = []
    for result in results:
        original = result["original"]
        cosup = result["CoSup"]
        speeds = [f"{arm['tokens_per_second']:.1f}" for arm in (original, cosup)]
        peaks = f"{original['peak_memory_gb']:.2f}, {cosup['peak_memory_gb']:.2f}"
        equal = f"{result['rows_equal']} of {result['rows_compared']}"
        rows.append([str(result["batch"]), *speeds, spread_text(result["speed_to_original"]), peaks, equal])
    print_table(header, rows)


def part_2(world: World, script: BenchmarkArguments) -> list[dict[str, Any]]:
    """Compare with plain gen.generate of the same number of tokens."""
    index = world.index(script.num_passages)
    results = []
    for size in script.batch_sizes:
        arms = take_turns(calls_of_part_2(world, script, index, size), script.repeats, world.meter)
        captures = print_captures() if script.captured else None
        plain = arms["plain"]
        for name, arm in arms.items():
            is_captured = "captured" in name
            plain_of_its_kind = arms["plain, captured"] if is_captured else plain
            rows = arm.results[-1]
            eager_rows = plain.results[-1]
            timings: list[dict[str, float]] = []
            if name.endswith(", retrieves"):  # its results are rows and timings
                rows = arm.results[-1][0]
                eager_rows = arms["CoSup, retrieves"].results[-1][0]
                timings = [seconds for _, seconds in arm.results]
            result = {"batch": size, "arm": name, **measurements(arm, size * script.new_tokens)}
            result["rows_equal"] = equal_rows(rows, eager_rows)
            result["captures"] = captures if is_captured else None
            result["parts"] = medians(timings)
            result["speed_to_plain"] = spread(arm.ratios(plain))
            result["speed_to_plain_of_its_kind"] = spread(arm.ratios(plain_of_its_kind))
            if "reading" in result["parts"]:  # plain generation neither reads passages nor searches
                pairs = zip(arm.seconds, timings, strict=True)
                rest = Arm(seconds=[seconds - sum(timing.values()) for seconds, timing in pairs])
                result["speed_to_plain_without_parts"] = spread(rest.ratios(plain))
            results.append(result)
    print_part_2(results, world, script)
    return results


def calls_of_part_2(
    world: World, script: BenchmarkArguments, index: PassageIndex, size: int
) -> dict[str, Callable[[], Any]]:
    """Return the function of each arm by its name, for a batch of `size` rows."""
    model = world.model
    prompts = world.prompts(size)
    never = {"retrieval_config": RetrievalConfig(forbid_nsp=True, max_retrievals=0)}
    calls = {
        "plain": lambda: world.generate(model.gen, prompts),
        "plain again": lambda: world.generate(model.gen, prompts),
        "CoSup, never retrieves": lambda: world.generate(model, prompts, **never),
        "CoSup, retrieves": lambda: timed_retrieve(world, model, prompts, index, time_reading=True),
    }
    if script.captured:
        static = world.capture_options
        never_view = captured_view(model)
        view = captured_view(model)
        calls |= {
            "plain, captured": lambda: world.generate(model.gen, prompts, **static),
            "CoSup, captured, never retrieves": lambda: world.generate(never_view, prompts, **never, **static),
            "CoSup, captured, retrieves": lambda: timed_retrieve(world, view, prompts, index, **static),
        }
    return calls


def medians(timings: list[dict[str, float]]) -> dict[str, float]:
    """Return the median over rounds of each timed part."""
    if not timings:
        return {}
    return {part: statistics.median(timing[part] for timing in timings) for part in timings[0]}


def print_part_2(results: list[dict[str, Any]], world: World, script: BenchmarkArguments) -> None:
    """Print the table of part 2."""
    print(
        f"\nAgainst plain gen.generate: {script.new_tokens} tokens a row; {script.retrievals} passages a row in the "
        f"arms that retrieve; {world.description}"
    )
    header = ["batch", "arm", "s", "reading passages, s", "search, s", "tokens/s", "x plain"]
    header += ["x plain without reading and search", "x plain, captured alike", "peak memory GB"]
    header += ["rows as in the eager arm"]
    rows = []
    for result in results:
        parts = {name: f"{seconds:.2f}" for name, seconds in result["parts"].items()}
        without_parts = result.get("speed_to_plain_without_parts")
        rows.append(
            [
                str(result["batch"]),
                result["arm"],
                f"{result['seconds']['median']:.2f}",
                parts.get("reading", ""),
                parts.get("search", ""),
                f"{result['tokens_per_second']:.1f}",
                spread_text(result["speed_to_plain"]),
                "" if without_parts is None else spread_text(without_parts),
                spread_text(result["speed_to_plain_of_its_kind"]),
                f"{result['peak_memory_gb']:.2f}",
                f"{result['rows_equal']} of {result['batch']}",
            ]
        )
    print_table(header, rows)


def part_3(world: World, script: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure the share of the time that searching and fetching the passages takes."""
    index_size = script.index_size
    if not index_size:
        index_size = 1_000_000 if world.device.type == "cuda" else 20_000
    index = world.index(index_size)
    results = []
    for num_rows in script.batch_sizes:
        arms = take_turns(calls_of_part_3(world, script, index, num_rows), script.repeats, world.meter)
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

    arms = take_turns({"fixed batches": fixed_batches, "generate_many": queue}, script.repeats, world.meter)
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
