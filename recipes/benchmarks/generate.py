"""
Speed and memory of retrieval inside generate(), beside what others do for the same tokens, arms taking turns in one process.

    python recipes/benchmarks/generate.py --shape 135m --new_tokens 48 --repeats 2
    python recipes/benchmarks/generate.py --shape 7b --dtype bfloat16 --original_rows 8

Parts: `1` against the original's algorithm (one row at a time, the whole prefix read again behind every passage and every `[CE]`, a FAISS index made for
each question), `2` against plain `gen.generate` of as many tokens without retrieval, eager and captured, `3` what share of the time is search in a large
exact index, `4` generate_many against fixed batches, answers being of very different lengths.
Weights, prompts and passages are random and made here (`--gen` takes a model of yours), so retrieval is forced, at other steps in every row, and no answer
ends early. Every table says in how many rows the tokens are the same; expect all of them in float32 only. Prints tables and writes `--output_file`.
"""

import contextlib
import copy
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import faiss
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LogitsProcessorList, set_seed

from modeling_cosup import RetrievalConfig
from modeling_cosup.files_cosup import write_json

from measuring import GB, Arm, Clock, TimedIndex, describe, print_table, show, spread, take_turns
from random_world import SHAPES, Ends, World


@dataclass
class BenchmarkArguments:
    """What is measured."""

    gen: str | None = field(
        default=None, metadata={"help": "Name or path of Gen; defaults to random weights of --shape."}
    )
    shape: str = field(default="135m", metadata={"help": f"Of a Llama with random weights: {', '.join(SHAPES)}."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or auto."})
    parts: list[int] = field(default_factory=lambda: [1, 2, 3, 4], metadata={"help": "Which of the four parts run."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 32], metadata={"help": "Rows of a batch, in parts 1, 2 and 3."}
    )
    new_tokens: int = field(default=96, metadata={"help": "Tokens that each row decides itself."})
    retrievals: int = field(default=2, metadata={"help": "Of each row, where retrieval is forced."})
    repeats: int = field(default=3, metadata={"help": "Timed rounds of every arm, after one to warm up."})
    original_rows: int = field(
        default=2,
        metadata={"help": "Rows that the original's algorithm writes in a round of part 1: it knows no batches."},
    )
    num_candidates: int = field(default=50, metadata={"help": "Passages among which each row of part 1 searches."})
    num_passages: int = field(default=500, metadata={"help": "Of the index in parts 1, 2 and 4."})
    index_size: int | None = field(
        default=None,
        metadata={"help": "Passages of the index in part 3; defaults to 1,000,000 on a GPU, 20,000 on a CPU."},
    )
    num_prompts: int = field(default=48, metadata={"help": "Of part 4."})
    rows_at_once: int = field(
        default=8, metadata={"help": "Of part 4: batch_size of generate_many, and of the fixed batches."}
    )
    captured: bool = field(
        default=True, metadata={"help": "Add the arms with a static cache and a captured step to parts 2 and 3."}
    )
    threads: int | None = field(default=None, metadata={"help": "On a CPU; defaults to all cores."})
    seed: int = field(default=0, metadata={"help": "Of everything."})
    output_file: str | None = field(default=None, metadata={"help": "Where the numbers go, as JSON."})

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}, expected one of {', '.join(SHAPES)}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {self.dtype!r}, expected float32, bfloat16 or float16.")
        if self.device not in ("auto", "cpu") and not torch.cuda.is_available():
            raise ValueError(f"--device is {self.device!r}, but torch finds no GPU here.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: its folder does not exist.")
        if wrong := set(self.parts) - {1, 2, 3, 4}:
            raise ValueError(f"--parts holds {min(wrong)}, expected 1, 2, 3 or 4.")
        if self.new_tokens < 4 * self.retrievals:
            raise ValueError(
                f"--new_tokens is {self.new_tokens}, expected 4 or more for each of the {self.retrievals} retrievals of a row."
            )
        if self.num_candidates > self.num_passages:
            raise ValueError(
                f"--num_candidates is {self.num_candidates}, expected at most the {self.num_passages} passages of the index."
            )


# ---------------------------------------------------------------------- what it is compared with, and clocks


@torch.no_grad()
def original_generate(world, prompt, plan, pool, embeds):
    """
    One row as the original writes it: an ordinary KV cache that is thrown away at every passage and every `[CE]`, a FAISS index of its own.

    Args:
        prompt (`list[int]`), plan (`list[int]`): token ids, and what is forced at each step (-1: nothing).
        pool (`list[dict]`), embeds (`numpy.ndarray` of shape `(C, h)`): the row's candidates and their embeddings, made beforehand.
    """
    gen, config = world.model.gen, world.config
    index = faiss.IndexFlatIP(embeds.shape[1])
    index.add(embeds)
    ids, unread, cache = list(prompt), list(prompt), DynamicCache()

    def read(tokens, cache):
        return gen.base_model(
            torch.tensor([tokens], device=world.device), past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]

    for token in plan:
        hidden = read(unread, cache)
        if ids[-1] == config.nsp_token_id:  # its length does not matter to the order of inner products
            _, found = index.search(hidden.float().cpu().numpy(), 1)
            ids += [*pool[found[0, 0]]["input_ids"], config.cs_token_id]
            cache = DynamicCache()
            hidden = read(ids, cache)
        if token < 0:
            logits = gen.get_output_embeddings()(hidden)
            logits[:, world.options["suppress_tokens"]] = float("-inf")
            token = int(logits.argmax())
        ids.append(token)
        unread = [token]
        if token == config.ce_token_id:
            unread, cache = list(ids), DynamicCache()
    return ids[len(prompt) :]


def timed_retrieve(world, model, prompts, index, reading=False, **kwargs):
    """Tokens of each row, and the seconds that went into searching and (not in a captured arm: a hook would be captured too) reading passages."""
    clock = Clock(world.device)
    with clock.time_reading(world.model.gen) if reading else contextlib.nullcontext():
        rows = world.retrieve(model, prompts, TimedIndex(index, clock), **kwargs)
    return rows, clock.seconds


# ---------------------------------------------------------------------- parts


def equal(first, second):
    """Rows of the shorter list that stand in the other one too."""
    return sum(a == b for a, b in zip(first, second, strict=False))


def facts(arm, tokens):
    """What is said of every arm; `tokens` is what a round of it decides."""
    return {
        "seconds": spread(arm.seconds),
        "tokens_per_second": tokens / statistics.median(arm.seconds),
        "peak_memory_gb": arm.peak / GB,
    }


def part_1(world, script):
    """Against the original's algorithm: the same tokens, row by row."""
    index, results = world.index(script.num_passages), []
    for size in script.batch_sizes:
        prompts, plan, rng = world.prompts(size), world.plan(size).tolist(), random.Random(script.seed)
        candidates = [
            [f"p{i}" for i in rng.sample(range(script.num_passages), script.num_candidates)] for _ in prompts
        ]
        pools = [index.get_passages(index.rows_of(ids)) for ids in candidates[: script.original_rows]]
        embeds = [world.embed(pool) for pool in pools]

        timed = list(
            zip(prompts, plan, pools, embeds, strict=False)
        )  # ends with the shortest: the first `original_rows`

        def original(rows=timed):
            return [original_generate(world, *row) for row in rows]

        def ours(prompts=prompts, candidates=candidates):
            return world.retrieve(world.model, prompts, index, candidates)

        arms = take_turns({"original": original, "CoSup": ours}, script.repeats, world.meter)
        first, mine = arms["original"].results[-1], arms["CoSup"].results[-1]
        results.append({"batch": size, "rows_equal": equal(first, mine), "rows_compared": len(first)})
        results[-1]["speed_to_original"] = spread(arms["CoSup"].ratios(arms["original"], work=size / len(first)))
        results[-1]["original"] = facts(arms["original"], len(first) * script.new_tokens)
        results[-1]["CoSup"] = facts(arms["CoSup"], size * script.new_tokens)
    print(
        f"\nAgainst the original's algorithm, one row after another: {script.new_tokens} tokens and {script.retrievals} retrievals a row; {world.said}"
    )
    print_table(
        [
            "batch",
            "the original, tokens/s",
            "CoSup, tokens/s",
            "x the original (min to max)",
            "peak memory GB: original, CoSup",
            "rows with the same tokens",
        ],
        [
            [str(r["batch"]), f"{r['original']['tokens_per_second']:.1f}", f"{r['CoSup']['tokens_per_second']:.1f}"]
            + [
                show(r["speed_to_original"]),
                ", ".join(f"{r[name]['peak_memory_gb']:.2f}" for name in ("original", "CoSup")),
            ]
            + [f"{r['rows_equal']} of {r['rows_compared']}"]
            for r in results
        ],
    )
    return results


def part_2(world, script):
    """Against plain gen.generate of as many tokens."""
    index, results, model = world.index(script.num_passages), [], world.model
    never = {"retrieval_config": RetrievalConfig(forbid_nsp=True, max_retrievals=0)}
    for size in script.batch_sizes:
        prompts = world.prompts(size)
        arms = {
            "plain": lambda p=prompts: world.generate(model.gen, p),
            "plain again": lambda p=prompts: world.generate(model.gen, p),
            "CoSup, never retrieves": lambda p=prompts: world.generate(model, p, **never),
            "CoSup, retrieves": lambda p=prompts: timed_retrieve(world, model, p, index, reading=True),
        }
        if script.captured:
            never_view, view = captured_view(model), captured_view(model)
            arms["plain, captured"] = lambda p=prompts: world.generate(model.gen, p, **world.compile)
            arms["CoSup, captured, never retrieves"] = lambda p=prompts, m=never_view: world.generate(
                m, p, **never, **world.compile
            )
            arms["CoSup, captured, retrieves"] = lambda p=prompts, m=view: timed_retrieve(
                world, m, p, index, **world.compile
            )
        done = take_turns(arms, script.repeats, world.meter)
        captures = say_captures() if script.captured else None
        for name, arm in done.items():
            kind, timed = done["plain, captured" if "captured" in name else "plain"], name.endswith(", retrieves")
            rows, expected = arm.results[-1], done["CoSup, retrieves" if timed else "plain"].results[-1]
            result = {"batch": size, "arm": name, **facts(arm, size * script.new_tokens)}
            result["rows_equal"] = (
                equal(rows[0], expected[0]) if timed else equal(rows, expected)
            )  # to the eager arm that does the same
            result["captures"] = captures if "captured" in name else None
            parts = [part for _, part in arm.results] if timed else [{}]
            result["parts"] = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
            result |= {
                "speed_to_plain": spread(arm.ratios(done["plain"])),
                "speed_to_plain_of_its_kind": spread(arm.ratios(kind)),
            }
            if "reading" in parts[0]:  # what plain generation does not do
                rest = Arm(
                    seconds=[whole - sum(part.values()) for whole, part in zip(arm.seconds, parts, strict=True)]
                )
                result["speed_to_plain_without_parts"] = spread(rest.ratios(done["plain"]))
            results.append(result)
    print(
        f"\nAgainst plain gen.generate: {script.new_tokens} tokens a row; where it retrieves, {script.retrievals} passages a row; {world.said}"
    )
    header = [
        "batch",
        "arm",
        "s",
        "reading passages, s",
        "search, s",
        "tokens/s",
        "x plain",
        "x plain without reading and search",
    ]
    print_table(
        [*header, "x plain, captured alike", "peak memory GB", "rows as in the eager arm"],
        [
            [str(r["batch"]), r["arm"], f"{r['seconds']['median']:.2f}"]
            + [f"{r['parts'][key]:.2f}" if key in r["parts"] else "" for key in ("reading", "search")]
            + [f"{r['tokens_per_second']:.1f}", show(r["speed_to_plain"])]
            + [
                show(r["speed_to_plain_without_parts"]) if "reading" in r["parts"] else "",
                show(r["speed_to_plain_of_its_kind"]),
            ]
            + [f"{r['peak_memory_gb']:.2f}", f"{r['rows_equal']} of {r['batch']}"]
            for r in results
        ],
    )
    return results


def captured_view(model):
    """The same weights with a captured cache of its own: of its own size, and not one that another arm made larger."""
    torch._dynamo.reset()  # else the shapes of the batch before would make this one's dynamic
    counters.clear()
    return copy.copy(model)


def say_captures():
    """What torch.compile made of the captured arms of a batch size, all together: a step that silently stays eager would be seen here."""
    found = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    found["cuda_graphs_skipped"] = counters["inductor"]["cudagraph_skips"]
    print(f"  captured: {found}", flush=True)
    return found


def part_3(world, script):
    """Searching and fetching passages as a share of the whole."""
    size = script.index_size or (1_000_000 if world.device.type == "cuda" else 20_000)
    index, results = world.index(size), []
    for rows in script.batch_sizes:
        prompts = world.prompts(rows)
        arms = {"eager": lambda p=prompts: timed_retrieve(world, world.model, p, index)}
        if script.captured:
            view = captured_view(world.model)
            arms["captured"] = lambda p=prompts, m=view: timed_retrieve(world, m, p, index, **world.compile)
        for name, arm in take_turns(arms, script.repeats, world.meter).items():
            search = [seconds["search"] for _, seconds in arm.results]
            shares = spread([part / whole for part, whole in zip(search, arm.seconds, strict=True)])
            results.append(
                {
                    "batch": rows,
                    "arm": name,
                    "index_size": size,
                    "search_seconds": statistics.median(search),
                    "share_of_search": shares,
                }
            )
            results[-1] |= facts(arm, rows * script.new_tokens)
    print(
        f"\nExact search among {size:,} x {world.config.embedding_size}: {script.new_tokens} tokens and {script.retrievals} retrievals a row; {world.said}"
    )
    print_table(
        ["batch", "decoding", "s", "search, s", "share of search (min to max)"],
        [
            [
                str(r["batch"]),
                r["arm"],
                f"{r['seconds']['median']:.2f}",
                f"{r['search_seconds']:.3f}",
                show(r["share_of_search"], ".1%"),
            ]
            for r in results
        ],
    )
    return results


def part_4(world, script):
    """generate_many and batches of generate() on the same prompts, each of which retrieves once; a quarter of the answers is long."""
    index, rng, rows = world.index(script.num_passages), random.Random(script.seed), script.rows_at_once
    prompts = [[*prompt, world.config.nsp_token_id] for prompt in world.prompts(script.num_prompts)]
    short = max(1, script.new_tokens // 16), max(1, script.new_tokens // 4)
    lengths = {prompt[0]: script.new_tokens if rng.random() < 0.25 else rng.randint(*short) for prompt in prompts}
    tokens = sum(lengths.values())
    options = {
        "retriever": index,
        "retrieval_config": RetrievalConfig(max_retrievals=1),
        "logits_processor": LogitsProcessorList([Ends(lengths, world)]),
    }

    def fixed():
        chunks = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
        return [answer for chunk in chunks for answer in world.generate(world.model, chunk, **options)]

    def queue():
        settings = {"max_new_tokens": script.new_tokens, "batch_size": rows, "show_progress_bar": False}
        answers = world.model.generate_many(prompts, **settings, **options, **world.options)
        if (found := sum(answer.num_generated_tokens for answer in answers)) != tokens:
            raise RuntimeError(
                f"The answers have {found} tokens in all, expected {tokens}: the ends that were forced are not where they belong."
            )
        return [world.without_padding(answer.token_ids) for answer in answers]

    arms = take_turns({"fixed batches": fixed, "generate_many": queue}, script.repeats, world.meter)
    first = arms["fixed batches"]
    results = [
        {
            "arm": name,
            **facts(arm, tokens),
            "rows_equal": equal(arm.results[-1], first.results[-1]),
            "speed_to_fixed": spread(arm.ratios(first)),
        }
        for name, arm in arms.items()
    ]
    shortest, longest = min(lengths.values()), max(lengths.values())
    print(
        f"\nA queue against fixed batches of {rows}: {len(prompts)} prompts, answers of {shortest} to {longest} tokens; {world.said}"
    )
    print_table(
        ["arm", "s", "tokens/s", "x fixed (min to max)", "peak memory GB", "rows with the same tokens"],
        [
            [r["arm"], f"{r['seconds']['median']:.2f}", f"{r['tokens_per_second']:.1f}", show(r["speed_to_fixed"])]
            + [f"{r['peak_memory_gb']:.2f}", f"{r['rows_equal']} of {len(prompts)}"]
            for r in results
        ],
    )
    return results


def main():
    with clear_errors():
        (script,) = parse([BenchmarkArguments], __doc__)
        set_seed(script.seed)
        device = torch.device(
            script.device if script.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        if device.type == "cpu" and script.threads:
            torch.set_num_threads(script.threads)
        results = {**describe(device), "arguments": vars(script)}
        world = World(script, device)
        weights = script.gen or f"random weights, shape {script.shape}"
        world.said = f"{weights}, {script.dtype}, seed {script.seed}, {results['hardware']}"
        for part in script.parts:
            results[f"part_{part}"] = {1: part_1, 2: part_2, 3: part_3, 4: part_4}[part](world, script)
            if script.output_file:  # after each part: a later one that fails takes nothing along
                write_json(script.output_file, results)


if __name__ == "__main__":
    main()
