"""
Parts 1 and 2 of generate.py: retrieval inside generate() against the original's algorithm, and against plain
`gen.generate`.

A `script` holds the batch sizes, the tokens and retrievals of a row, the rounds, and the size of the index, like the
arguments of generate.py. Each part returns its results, and prints them as a table.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from modeling_cosup import PassageIndex, RetrievalConfig

from decoding_arms import CANDIDATE_SEARCH, captured_view, original_generate, print_captures, timed_retrieve
from measuring import GB, Arm, print_table, spread, spread_text, take_turns
from random_world import World


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


def part_1(world: World, script: Any) -> list[dict[str, Any]]:
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

        calls = {"original": original, "CoSup": cosup}
        arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
        original_arm = arms["original"]
        cosup_arm = arms["CoSup"]
        num_compared = len(original_arm.results[-1])
        results.append(
            {
                "batch": size,
                "candidate_search": CANDIDATE_SEARCH,
                "rows_equal": equal_rows(original_arm.results[-1], cosup_arm.results[-1]),
                "rows_compared": num_compared,
                "speed_to_original": spread(cosup_arm.ratios(original_arm, work=size / num_compared)),
                "original": measurements(original_arm, num_compared * script.new_tokens),
                "CoSup": measurements(cosup_arm, size * script.new_tokens),
            }
        )
    print_part_1(results, world, script)
    return results


def print_part_1(results: list[dict[str, Any]], world: World, script: Any) -> None:
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


def part_2(world: World, script: Any) -> list[dict[str, Any]]:
    """Compare with plain gen.generate of the same number of tokens."""
    index = world.index(script.num_passages)
    results = []
    for size in script.batch_sizes:
        calls = calls_of_part_2(world, script, index, size)
        arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
        captures = print_captures() if script.captured else None
        results += results_of_part_2(arms, size, script.new_tokens, captures)
    print_part_2(results, world, script)
    return results


def results_of_part_2(
    arms: dict[str, Arm], size: int, new_tokens: int, captures: dict[str, int] | None
) -> list[dict[str, Any]]:
    """
    Return the results of the arms of one batch size.

    Args:
        arms (`dict[str, Arm]`): "plain", and any others of [`calls_of_part_2`]. The tokens of an arm that is captured
            and retrieves are compared with those of the eager one, if that is there.
        size (`int`): rows of the batch.
        new_tokens (`int`): tokens that each row decides.
        captures (`dict`, *optional*): what [`~decoding_arms.print_captures`] returned.
    """
    plain = arms["plain"]
    results = []
    for name, arm in arms.items():
        is_captured = "captured" in name
        rows = arm.results[-1]
        eager_rows: list[list[int]] | None = plain.results[-1]
        timings: list[dict[str, float]] = []
        if name.endswith(", retrieves"):  # its results are rows and timings
            rows = arm.results[-1][0]
            eager = arms.get("CoSup, retrieves")
            eager_rows = None if eager is None else eager.results[-1][0]
            timings = [seconds for _, seconds in arm.results]
        result = {"batch": size, "arm": name, **measurements(arm, size * new_tokens)}
        result["rows_equal"] = None if eager_rows is None else equal_rows(rows, eager_rows)
        result["captures"] = captures if is_captured else None
        result["parts"] = medians(timings)
        result["speed_to_plain"] = spread(arm.ratios(plain))
        plain_of_its_kind = arms.get("plain, captured") if is_captured else plain
        if plain_of_its_kind is not None:
            result["speed_to_plain_of_its_kind"] = spread(arm.ratios(plain_of_its_kind))
        if "reading" in result["parts"]:  # plain generation neither reads passages nor searches
            pairs = zip(arm.seconds, timings, strict=True)
            rest = Arm(seconds=[seconds - sum(timing.values()) for seconds, timing in pairs])
            result["speed_to_plain_without_parts"] = spread(rest.ratios(plain))
        results.append(result)
    return results


def calls_of_part_2(world: World, script: Any, index: PassageIndex, size: int) -> dict[str, Callable[[], Any]]:
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


def print_part_2(results: list[dict[str, Any]], world: World, script: Any) -> None:
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
