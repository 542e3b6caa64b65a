"""
Speed, memory and recall of the passage index, each arm next to its baseline, in one process.

    python recipes/benchmarks/index.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python recipes/benchmarks/index.py --sections search,memory  # needs no model: random embeddings, a tiny model
    python recipes/benchmarks/index.py --quick true              # takes seconds, only shows that it runs

Sections:
    `encode`: passages/s of building an index, against sentence-transformers' `encode` with the same weights
    `search`: exact search over mapped files, against raw FAISS; also candidates and deletions
    `approximate`: HNSW and IVF against exact search, with recall
    `memory`: peak memory of a build, by corpus size

Arms take turns in each round, in rotating order; a ratio is the median of the ratios within rounds. Prints tables and
writes `--output_file`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import parse

import faiss
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.files_cosup import write_json
from modeling_cosup.index_build_cosup import record_batch
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_store_cosup import new_config
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq

from encoding_arms import SENTENCE_TRANSFORMERS, encoding_arms, synthetic_passages, tiny_model

SHARD_SIZE = 32768


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model: str | None = field(
        default=None,
        metadata={"help": "`encode`: causal language model for both Gen and Emb_seq; without it, a tiny random one."},
    )
    sections: str = field(default="encode,search,approximate,memory", metadata={"help": "Comma-separated."})
    num_passages: int = field(default=128, metadata={"help": "`encode`: synthetic passages of 10 to 200 words."})
    dtype: str = field(default="float32", metadata={"help": "`encode`: dtype of the weights in both arms."})
    sizes: str = field(
        default="10000x768,100000x256,100000x1024,1000000x256",
        metadata={"help": "`search`: passages x dimensions, comma-separated."},
    )
    batch_sizes: str = field(default="1,8,32,200", metadata={"help": "Queries per search, comma-separated."})
    approximate_size: str = field(default="100000x256", metadata={"help": "`approximate`: passages x dimensions."})
    memory_counts: str = field(default="100000,1000000", metadata={"help": "`memory`: passages per build."})
    repeats: int = field(default=5, metadata={"help": "Timed rounds of every arm, after one warm-up round."})
    device: str | None = field(default=None, metadata={"help": "`search`: also search on this device, e.g. cuda."})
    num_threads: int | None = field(default=None, metadata={"help": "For torch and FAISS; defaults to all cores."})
    quick: bool = field(
        default=False, metadata={"help": "Tiny sizes: shows that the benchmark runs, measures nothing."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})


def main() -> None:
    """Run the sections, print tables and write the numbers."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.quick:
        args.num_passages = 12
        args.sizes = "600x16"
        args.approximate_size = "3000x16"
        args.memory_counts = "300,900"
        args.repeats = 2
    threads = args.num_threads or os.cpu_count()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "faiss": faiss.__version__,
        "python": platform.python_version(),
    }
    print(f"{platform.processor() or platform.machine()}, {threads} threads, {versions}\n")
    results: dict[str, Any] = {"threads": threads, "versions": versions}
    sections = {"encode": encode, "search": search, "approximate": approximate, "memory": memory}
    for name in args.sections.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = sections[name](args, Path(folder))
    if args.output_file:
        write_json(args.output_file, results)


@dataclass
class Timings:
    """Seconds of each arm in each round."""

    rounds: dict[str, list[float]]

    def medians(self) -> dict[str, float]:
        """Return the median seconds of each arm."""
        return {name: statistics.median(seconds) for name, seconds in self.rounds.items()}

    def speedup(self, arm: str, baseline: str) -> tuple[float, float, float]:
        """Return the median, smallest and largest ratio of speeds within a round."""
        pairs = zip(self.rounds[arm], self.rounds[baseline], strict=True)
        ratios = sorted(baseline_seconds / seconds for seconds, baseline_seconds in pairs)
        return statistics.median(ratios), ratios[0], ratios[-1]


def measure(arms: dict[str, Callable[[], object]], repeats: int) -> Timings:
    """Time each arm in `repeats` rounds, after one warm-up round; the order rotates."""
    rounds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            arms[name]()
            seconds = time.perf_counter() - start
            if turn > 0:
                rounds[name].append(seconds)
    return Timings(rounds)


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_header(titles: str) -> None:
    """Print the titles of columns, separated by commas, and the line below them."""
    cells = titles.split(", ")
    print_row(*cells)
    print_row(*["---"] * len(cells))


def speed_cells(ratios: tuple[float, float, float]) -> str:
    """Return two table cells: the median and the range."""
    median, smallest, largest = ratios
    return f"**{median:.2f}** | {smallest:.2f} – {largest:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


# ---------------------------------------------------------------------- encoding


def encode(args: BenchmarkArguments, folder: Path) -> dict[str, Any] | None:
    """
    Measure passages/s of `PassageIndex.build` and of sentence-transformers' `encode`, and how much embeddings differ.

    `build` also checks the corpus, tokenizes for Gen and stores the texts.
    """
    if not SENTENCE_TRANSFORMERS:
        print("encode: skipped, it needs sentence-transformers (pip install sentence-transformers)\n")
        return None
    name = args.model or tiny_model(folder / "tiny")
    model = CoSupForCausalLM.from_gen_and_emb_seq(name, tie_emb_seq=False, model_kwargs={"dtype": args.dtype}).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    passages = synthetic_passages(args.num_passages)
    ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    arms = encoding_arms(model, AutoTokenizer.from_pretrained(name), passages, folder)
    timings = measure(arms, args.repeats)
    seconds = timings.medians()
    embeddings = {arm: call() for arm, call in arms.items()}
    difference = float((embeddings["PassageIndex.build"] - embeddings["sentence-transformers"]).abs().max())
    num_tokens = sum(map(len, ids))
    print(f"Encoding {len(passages)} passages, {num_tokens:,} tokens, {args.dtype}\n")
    titles = "arm, passages/s, tokens/s, speed to sentence-transformers, min – max, largest difference of embeddings"
    print_header(titles)
    for arm in arms:
        print_row(
            f"`{arm}`",
            f"{len(passages) / seconds[arm]:.1f}",
            f"{num_tokens / seconds[arm]:.0f}",
            speed_cells(timings.speedup(arm, "sentence-transformers")),
            "" if arm == "sentence-transformers" else f"{difference:.0e}",
        )
    print()
    return {
        "seconds": seconds,
        "speed": timings.speedup("PassageIndex.build", "sentence-transformers"),
        "largest_difference": difference,
        "tokens": num_tokens,
        "passages": len(passages),
    }


# ---------------------------------------------------------------------- searching


def random_index(count: int, size: int, folder: Path) -> tuple[PassageIndex, torch.Tensor]:
    """
    Save and load an index of random embeddings, clustered around 1,000 centres and of unit length.

    Returns:
        The index, and 200 queries of the same kind, `(200, size)`.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, size, generator=generator)

    def draw(n):
        points = centres[torch.randint(1000, (n,), generator=generator)] + torch.randn(n, size, generator=generator)
        return torch.nn.functional.normalize(points, dim=1)

    shards = []
    for start in range(0, count, SHARD_SIZE):
        rows = range(start, min(count, start + SHARD_SIZE))
        passages = [{"id": f"p{row}", "title": "", "text": "x"} for row in rows]
        shards.append(Shard(record_batch(passages, [np.zeros(1, np.int32)] * len(passages)), draw(len(passages))))
    settings = {"embedding_size": size, "dtype": "float32", "fingerprint": {}}
    PassageIndex(shards, new_config(settings, shards)).save_pretrained(folder)
    return PassageIndex.from_pretrained(folder, verify=False), draw(200)


def search(args: BenchmarkArguments, folder: Path) -> list[dict[str, Any]]:
    """
    Measure exact search over mapped files against `faiss.IndexFlatIP` with a copy in memory.

    Of two more arms, one searches pools of 100 candidates, the other an index with one passage in a hundred deleted.
    """
    print_header(
        "passages x dimensions, queries, raw FAISS ms, mapped files ms, speed, min – max, 100 candidates each ms,"
        " 1 % deleted ms, same rows"
    )
    results = []
    for pair in args.sizes.split(","):
        count, size = map(int, pair.split("x"))
        results += search_one_size(args, count, size, folder / f"{count}x{size}")
    print()
    return results


def search_one_size(args: BenchmarkArguments, count: int, size: int, folder: Path) -> list[dict[str, Any]]:
    """Measure search over `count` embeddings of `size` dimensions, for each number of queries."""
    index, all_queries = random_index(count, size, folder)
    raw = faiss.IndexFlatIP(size)
    raw.add(index.embeddings.numpy())
    random = np.random.default_rng(0)
    all_pools = [random.choice(count, 100, replace=False) for _ in all_queries]
    with_deletions = PassageIndex.from_pretrained(folder, verify=False)
    with_deletions.delete([f"p{row}" for row in random.choice(count, count // 100, replace=False)])
    on_device = None
    if args.device is not None:
        on_device = PassageIndex.from_pretrained(folder, verify=False).to(args.device)
    results = []
    for n in map(int, args.batch_sizes.split(",")):
        queries, pools = all_queries[:n], all_pools[:n]
        arms: dict[str, Callable[[], Any]] = {
            "raw": partial(raw.search, queries.numpy(), 10),
            "ours": partial(index.search, queries, 10),
            "pools": partial(index.search, queries, 10, candidates=pools),
            "deleted": partial(with_deletions.search, queries, 10),
        }
        if on_device is not None:
            arms["device"] = partial(on_device.search, queries, 10)
        timings = measure(arms, args.repeats)
        seconds, speedup = timings.medians(), timings.speedup("ours", "raw")
        _, raw_rows = arms["raw"]()
        _, our_rows = arms["ours"]()
        same_rows = float((raw_rows == our_rows).mean())
        print_row(
            f"{count:,} x {size}",
            n,
            milliseconds(seconds["raw"]),
            milliseconds(seconds["ours"]),
            speed_cells(speedup),
            milliseconds(seconds["pools"]),
            milliseconds(seconds["deleted"]),
            f"{100 * same_rows:.1f} %",
        )
        if on_device is not None:
            print(f"    on {args.device}: {milliseconds(seconds['device'])} ms")
        result = {"passages": count, "dimensions": size, "queries": n, "seconds": seconds}
        results.append({**result, "speed_to_raw_faiss": speedup, "same_rows": same_rows})
    return results


def approximate(args: BenchmarkArguments, folder: Path) -> list[dict[str, Any]]:
    """Measure HNSW and IVF against exact search: seconds to train, speed, and ann_recall@10 for random queries."""
    count, size = map(int, args.approximate_size.split("x"))
    index, all_queries = random_index(count, size, folder / "index")
    exact = PassageIndex.from_pretrained(folder / "index", search="exact", verify=False)
    lists = 16 if args.quick else 1024
    factories = {
        "HNSW32": ("efSearch", [16, 64, 256]),
        f"IVF{lists},Flat": ("nprobe", [1, 8, 32]),
        f"IVF{lists},PQ{size // 8}": ("nprobe", [8, 32]),
    }
    print(f"{count:,} x {size}; exact search is the baseline\n")
    print_header("index, options, built in s, file MB, queries, ms, exact ms, speed, min – max, ann_recall@10")
    results = []
    for factory, (option, values) in factories.items():
        start = time.perf_counter()
        index.train_approximate(factory)
        training_seconds = time.perf_counter() - start
        file_size = (folder / "index" / index.config["approximate"]["file"]).stat().st_size
        for value in values:
            index.set_search_options(**{option: value})
            recall = index.measure_recall(all_queries)["ann_recall@10"]
            for n in (1, 32):
                queries = all_queries[:n]
                arms = {"ours": partial(index.search, queries, 10), "exact": partial(exact.search, queries, 10)}
                timings = measure(arms, args.repeats)
                seconds, speedup = timings.medians(), timings.speedup("ours", "exact")
                print_row(
                    f"`{factory}`",
                    f"{option} {value}",
                    f"{training_seconds:.1f}",
                    f"{file_size / 1e6:.1f}",
                    n,
                    milliseconds(seconds["ours"]),
                    milliseconds(seconds["exact"]),
                    speed_cells(speedup),
                    f"{100 * recall:.1f} %",
                )
                result = {"index_factory": factory, option: value, "made": training_seconds, "queries": n}
                results.append({**result, "seconds": seconds, "speed": speedup, "ann_recall@10": recall})
    print()
    return results


# ---------------------------------------------------------------------- memory


def memory(args: BenchmarkArguments, folder: Path) -> list[dict[str, Any]]:
    """
    Measure the peak memory of a process that builds an index, anonymous and with mapped files.

    The passages are short and synthetic, the model is tiny.
    """
    print_header("passages, shard_size, s, passages/s, peak anonymous MB, peak with mapped files MB, index on disk MB")
    results = []
    for count in map(int, args.memory_counts.split(",")):
        model, index_folder = tiny_model(folder / "tiny"), folder / str(count)
        build_arguments = [model, str(index_folder), str(count), str(torch.get_num_threads())]
        command = [sys.executable, __file__, "build", *build_arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        facts = json.loads(output.splitlines()[-1])
        facts["disk"] = sum(path.stat().st_size for path in index_folder.iterdir()) / 1e6
        print_row(
            f"{count:,}",
            f"{SHARD_SIZE:,}",
            f"{facts['seconds']:.0f}",
            f"{count / facts['seconds']:,.0f}",
            f"{facts['anonymous']:.0f}",
            f"{facts['total']:.0f}",
            f"{facts['disk']:.0f}",
        )
        results.append({"passages": count, **facts})
    print()
    return results


def build(model_name: str, folder: str, count: str, threads: str) -> None:
    """Build an index in the process that `memory` starts, and read its memory use twenty times a second."""
    torch.set_num_threads(int(threads))
    peak = {"anonymous": 0.0, "total": 0.0}
    done = threading.Event()

    def watch():
        finished = False
        while not finished:
            finished = done.wait(0.05)
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            )
            for name, key in (("anonymous", "RssAnon"), ("total", "VmRSS")):
                peak[name] = max(peak[name], int(status[key].split()[0]) * 1024 / 1e6)

    watcher = threading.Thread(target=watch)
    model = CoSupForCausalLM.from_gen_and_emb_seq(model_name, tie_emb_seq=False)
    watcher.start()
    start = time.perf_counter()
    passages = ({"id": f"passage {i}", "text": f"the city {i % 1000} was {i // 1000}"} for i in range(int(count)))
    model.build_index(passages, save_directory=folder, show_progress_bar=False, batch_size=1024)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, **peak}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(*sys.argv[2:])
    else:
        main()
