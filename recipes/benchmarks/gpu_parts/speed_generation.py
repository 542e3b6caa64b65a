"""The speed of generation: against plain `gen.generate`, against the original's algorithm, and with memories."""

from types import SimpleNamespace
from typing import Any

from transformers import CompileConfig

from decoding_arms import print_captures
from decoding_parts import calls_of_part_2, part_1, results_of_part_2
from gpu_parts.runner import Context
from gpu_parts.speed_failures import first_calls, require
from gpu_parts.speed_goals import goal
from measuring import spread_text, take_turns
from memory_arms import decoding_with_memories, step_costs
from random_world import World

NUM_PASSAGES = 500  # of the index
MAX_SECONDS = 45  # for the rounds of a check, besides the warm-up
COMPILE_SECONDS = 60  # for the warm-up of an arm that begins last, before those


def make_script(context: Context, shape: str, **options: Any) -> SimpleNamespace:
    """Return what [`World`] and the parts of generate.py need to know; tiny shapes decide few tokens."""
    defaults: dict[str, Any] = {
        "gen": None,
        "shape": shape,
        "dtype": "bfloat16",
        "seed": 0,
        "new_tokens": 64,
        "retrievals": 2,
        "repeats": 3,
        "num_passages": NUM_PASSAGES,
        "num_candidates": 50,
        "captured": True,
        "max_seconds": MAX_SECONDS,
    }
    tiny: dict[str, Any] = {
        "shape": "tiny",
        "dtype": "float32",  # in which all arms write the same tokens
        "new_tokens": 8,
        "repeats": 1,
        "num_passages": 60,
        "num_candidates": 20,
    }
    return SimpleNamespace(**(defaults | options | (tiny if context.tiny else {})))


def make_world(context: Context, script: SimpleNamespace) -> World:
    """Return the random model of a script; tiny, its captured step is traced but not compiled."""
    world = World(script, context.device)
    world.description = f"random weights, shape {script.shape}, {script.dtype}"
    if context.tiny:
        compile_config = CompileConfig(backend="eager", mode="default")
        compile_config._compile_all_devices = True
        world.capture_options["compile_config"] = compile_config
    return world


# ---------------------------------------------------------------------- against plain generate


def against_plain(context: Context, shape: str, batch_size: int, names: tuple[str, ...]) -> dict[str, Any]:
    """
    Compare generate() with plain `gen.generate` of as many tokens: eager and captured, with and without retrieval.

    Args:
        context (`Context`): of the check.
        shape (`str`): of [`random_world.SHAPES`].
        batch_size (`int`): rows.
        names (`tuple[str]`): arms of [`decoding_parts.calls_of_part_2`]; each captured one compiles for a while.
    """
    script = make_script(context, shape)
    world = make_world(context, script)
    all_calls = calls_of_part_2(world, script, world.index(script.num_passages), batch_size)
    seconds_left = context.seconds_left() - MAX_SECONDS - COMPILE_SECONDS
    errors = first_calls({name: all_calls[name] for name in names}, seconds_left)
    require("plain", errors)
    calls = {name: all_calls[name] for name in names if name not in errors}
    arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
    captures = print_captures()
    results = results_of_part_2(arms, batch_size, script.new_tokens, captures)
    rows = []
    for result in results:
        parts = {name: f"{seconds:.3f}" for name, seconds in result["parts"].items()}
        without_parts = result.get("speed_to_plain_without_parts")
        rows.append(
            [
                result["arm"],
                f"{1000 * result['seconds']['median'] / script.new_tokens:.2f}",
                f"{result['tokens_per_second']:,.0f}",
                spread_text(result["speed_to_plain"]),
                parts.get("reading", ""),
                parts.get("search", ""),
                "" if without_parts is None else spread_text(without_parts),
                f"{result['peak_memory_gb']:.2f}",
                "" if result["rows_equal"] is None else f"{result['rows_equal']} of {batch_size}",
            ]
        )
    rows += [[name, *[""] * 7, f"does not run: {error}"] for name, error in errors.items()]
    header = ["arm", "ms a step", "tokens/s", "x plain eager (min to max)", "reading passages, s", "search, s"]
    header += ["x plain without reading and search", "peak memory GB", "rows as in the eager arm"]
    title = f"{batch_size} rows of {script.new_tokens} tokens; {world.description}; captured: {captures}"
    ours = [result for result in results if result["arm"] != "plain"]
    if not ours:
        raise RuntimeError(f"No arm of ours runs: {errors}")
    fastest = max(ours, key=lambda result: result["speed_to_plain"]["median"])
    speed = fastest["speed_to_plain"]
    goals = []
    if shape == "7b":
        goals.append(goal(context, "generate() at 7B shape, x HF eager", speed["median"], at_least=3))
    return {
        "shape": script.shape,
        "dtype": script.dtype,
        "batch_size": batch_size,
        "new_tokens": script.new_tokens,
        "arms": results,
        "errors": errors,
        "summary": f"{batch_size} rows: {fastest['arm']} {spread_text(speed)} x plain eager",
        "goals": goals,
        "tables": [{"title": title, "header": header, "rows": rows}],
    }


# ---------------------------------------------------------------------- against the original's algorithm


def against_original(context: Context) -> dict[str, Any]:
    """Compare with the original's algorithm, which writes one row after another, at batch 32."""
    size = 3 if context.tiny else 32
    script = make_script(context, "135m", batch_sizes=[size], original_rows=2)
    world = make_world(context, script)
    (result,) = part_1(world, script)
    row = [
        str(size),
        f"{result['original']['tokens_per_second']:.1f}",
        f"{result['CoSup']['tokens_per_second']:.1f}",
        spread_text(result["speed_to_original"]),
        f"{result['rows_equal']} of {result['rows_compared']}",
    ]
    header = ["batch", "the original, tokens/s", "CoSup, tokens/s", "x the original (min to max)"]
    header.append("rows with the same tokens")
    title = f"{script.new_tokens} tokens and {script.retrievals} retrievals a row, eager; {world.description}"
    title += f"; an index for each question: {result['candidate_search']}"
    speed = result["speed_to_original"]
    return {
        **result,
        "summary": f"batch {size}: {spread_text(speed)} x the original",
        "goals": [goal(context, "batch 32, x the original's algorithm", speed["median"], at_least=10)],
        "tables": [{"title": title, "header": header, "rows": [row]}],
    }


# ---------------------------------------------------------------------- memories


def with_memories(context: Context) -> dict[str, Any]:
    """Measure a decode step with an MLP memory, and with a datastore of a million keys, against one without."""
    num_keys, rows, k = (200, 2, 16) if context.tiny else (1_000_000, 8, 1024)
    script = make_script(context, "135m", new_tokens=32)
    world = make_world(context, script)
    calls = decoding_with_memories(world, rows, [num_keys], k)
    arms = take_turns(calls, script.repeats, world.meter, script.max_seconds)
    results = step_costs(arms, script.new_tokens)
    cells = []
    for result in results:
        milliseconds = {name: 1000 * value for name, value in result["seconds_per_step"].items()}
        peak = f"{result['peak'] / 1e6:.0f}"
        cells.append([result["arm"], spread_text(milliseconds), spread_text(result["cost"]), peak])
    header = [f"{rows} rows", "ms a step, prompt included", "times no memory (min to max)", "peak MB"]
    costs = ", ".join(f"{result['arm']} {result['cost']['median']:.2f}" for result in results[1:])
    return {
        "rows": rows,
        "k": k,
        "key_size": world.model.gen.config.hidden_size,
        "arms": results,
        "summary": f"times a step without memory: {costs}",
        "tables": [{"title": f"k = {k}; {world.description}", "header": header, "rows": cells}],
    }
