"""
Speed, size and memory of token memories, each arm next to what the best known implementation does in the same place.

    python recipes/benchmarks/memory.py --output_file memory.json
    python recipes/benchmarks/memory.py --sections search perplexity
    python recipes/benchmarks/memory.py --quick true                    # takes seconds, only shows that it runs

Nothing is downloaded: weights, keys and tokens are random. Sections:
    `search`: exact search in half precision, against `faiss.knn` over float32 keys
    `perplexity`: arithmetic of the target alone after a search, against a dense buffer of the vocabulary's width
    `build`: tokens/s of `KNNMemory.build`, against a hooked forward that saves into dense memory maps
    `decode`: a step of generate() with an MLP memory and with datastores of several sizes, against one without
    `memory`: peak memory of building and loading a datastore, by its size, and its size on disk

The baselines of `perplexity` and `build` follow the algorithm of knn-transformers, written anew. Arms take turns in
each round, in rotating order; a ratio is the median of the ratios within rounds. Errors stand beside speeds.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from modeling_cosup import CoSupForCausalLM, KNNMemory, MemoryConfig
from modeling_cosup.files_cosup import write_json
from modeling_cosup.memory_cosup import target_log_probs
from modeling_cosup.token_keys_cosup import ffn_name
from trainer.judging.perplexity import target_and_kept

from measuring import Arm, Meter, print_hardware, print_table, resident_bytes, spread, spread_text, take_turns
from memory_arms import decoding_with_memories, random_datastore, step_costs
from random_world import SHAPES, World

SECTIONS = ("search", "perplexity", "build", "decode", "memory")
CHECKED = 8  # queries whose distances are compared with float64


@dataclass
class BenchmarkArguments:
    """What to measure, and how."""

    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "Sections to run."})
    shape: str = field(default="135m", metadata={"help": f"Shape of a random Llama: {', '.join(SHAPES)}."})
    num_keys: int = field(default=100_000, metadata={"help": "`search`, `perplexity`: keys of the datastore."})
    key_size: int = field(default=768, metadata={"help": "`search`, `perplexity`: width of the keys."})
    vocab_size: int = field(default=50_257, metadata={"help": "`search`, `perplexity`: size of the vocabulary."})
    num_queries: list[int] = field(
        default_factory=lambda: [32, 128, 512], metadata={"help": "`search`, `perplexity`: queries at a time."}
    )
    k: int = field(default=1024, metadata={"help": "Neighbours of a query."})
    num_documents: int = field(default=16, metadata={"help": "`build`: documents of --document_length tokens."})
    document_length: int = field(default=256, metadata={"help": "`build`: tokens of a document, and of a window."})
    decode_sizes: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000], metadata={"help": "`decode`: keys of the datastores."}
    )
    batch_size: int = field(default=8, metadata={"help": "`build`, `decode`: rows of a batch."})
    new_tokens: int = field(default=32, metadata={"help": "`decode`: tokens that each row decides."})
    memory_sizes: list[int] = field(
        default_factory=lambda: [50_000, 200_000], metadata={"help": "`memory`: tokens of the datastores."}
    )
    repeats: int = field(default=5, metadata={"help": "Timed rounds of every arm, after a warm-up round."})
    num_threads: int | None = field(default=None, metadata={"help": "For torch and FAISS; defaults to all cores."})
    seed: int = field(default=0, metadata={"help": "Of weights, keys and tokens."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes: shows that it runs, measures nothing."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})

    def __post_init__(self) -> None:
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"--sections holds {min(unknown)!r}, expected some of {', '.join(SECTIONS)}.")
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}, expected one of {', '.join(SHAPES)}.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: its folder does not exist.")
        if self.quick:
            self.shape, self.num_keys, self.key_size, self.vocab_size, self.k = "tiny", 600, 16, 200, 32
            self.num_queries, self.num_documents, self.document_length = [4], 4, 24
            self.decode_sizes, self.new_tokens, self.batch_size = [100, 300], 4, 2
            self.memory_sizes, self.repeats = [300, 900], 1


def main() -> None:
    """Run the sections, print tables and write the numbers."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    faiss.omp_set_num_threads(torch.get_num_threads())
    torch.manual_seed(args.seed)
    with clear_errors():
        device = torch.device("cpu")
        results: dict[str, Any] = {**print_hardware(device), "faiss": faiss.__version__}
        sections: dict[str, Callable] = {
            "search": search,
            "perplexity": perplexity,
            "build": build,
            "decode": decode,
            "memory": memory,
        }
        for name in args.sections:
            results[name] = sections[name](args, Meter(device))
            if args.output_file:
                write_json(args.output_file, results)


def near_queries(datastore: KNNMemory, count: int) -> torch.Tensor:
    """Return queries `(n, d)` next to keys of a datastore."""
    keys = datastore.get_keys(torch.randint(0, len(datastore), (count,))).float()
    return keys + 0.5 * torch.randn(keys.shape)


def compared(arms: dict[str, Arm], arm: str, baseline: str) -> dict[str, Any]:
    """Return speed and memory of two arms."""
    return {
        "speed": spread(arms[arm].ratios(arms[baseline])),
        "seconds": {name: spread(measured.seconds) for name, measured in arms.items()},
        "peak": {name: measured.peak for name, measured in arms.items()},
    }


def milliseconds(seconds: dict[str, float]) -> str:
    return f"{1000 * seconds['median']:.1f}"


# ---------------------------------------------------------------------- after the keys are there


def search(args: BenchmarkArguments, meter: Meter) -> list[dict[str, Any]]:
    """Measure exact search against `faiss.knn`, which has the same keys in float32."""
    datastore = random_datastore(args.num_keys, args.key_size, args.vocab_size)
    keys = datastore.get_keys(torch.arange(len(datastore))).float()
    results = []
    for count in args.num_queries:
        queries = near_queries(datastore, count)
        arms = take_turns(
            {
                "faiss.knn": partial(faiss.knn, queries.numpy(), keys.numpy(), args.k, faiss.METRIC_L2),
                "KNNMemory.search": partial(datastore.search, queries, args.k),
            },
            args.repeats,
            meter,
        )
        distances = {
            "faiss.knn": torch.from_numpy(arms["faiss.knn"].results[-1][0][:CHECKED]),
            "KNNMemory.search": arms["KNNMemory.search"].results[-1].distances[:CHECKED],
        }
        exact = torch.stack([(keys.double() - query).square().sum(1) for query in queries[:CHECKED].double()])
        exact = exact.sort(1).values[:, : args.k]
        errors = {name: float(((found - exact).abs() / exact).max()) for name, found in distances.items()}
        results.append({"queries": count, "errors": errors, **compared(arms, "KNNMemory.search", "faiss.knn")})
    rows = []
    for result in results:
        names = ("faiss.knn", "KNNMemory.search")
        cells = [f"{milliseconds(result['seconds'][name])} (error {result['errors'][name]:.0e})" for name in names]
        rows.append([str(result["queries"]), *cells, spread_text(result["speed"])])
    print_table(["queries", "faiss.knn, float32, ms", "KNNMemory.search, float16, ms", "speed"], rows)
    return results


def perplexity(args: BenchmarkArguments, meter: Meter) -> list[dict[str, Any]]:
    """Measure the arithmetic between logits and neighbours on one side, and log-probabilities of targets."""
    datastore = random_datastore(args.num_keys, args.key_size, args.vocab_size)
    config = MemoryConfig(k=args.k)
    no_kept_ids = torch.empty(0, dtype=torch.long)
    results = []
    for count in args.num_queries:
        neighbors = datastore.search(near_queries(datastore, count), config.k)
        logits = torch.randn(count, args.vocab_size)
        targets = torch.where(torch.rand(count) < 0.5, neighbors.values[:, 0], torch.zeros(count, dtype=torch.long))

        def dense(neighbors: Any = neighbors, logits: torch.Tensor = logits, targets: torch.Tensor = targets) -> Any:
            """Scatter the neighbours into a buffer of V columns, as knn-transformers does."""
            log_probs = logits.log_softmax(-1)
            weights = (-neighbors.distances).softmax(-1)
            memory = torch.zeros_like(logits).scatter_add(1, neighbors.values, weights).log()
            memory = torch.nan_to_num(memory, nan=None, neginf=-10000.0)
            mixture = torch.logaddexp(log_probs + np.log(1 - config.weight), memory + np.log(config.weight))
            return -F.cross_entropy(mixture, targets, reduction="none")

        def target_only(
            neighbors: Any = neighbors, logits: torch.Tensor = logits, targets: torch.Tensor = targets
        ) -> Any:
            lm, _ = target_and_kept(logits, targets, no_kept_ids)
            log_weights = neighbors.log_weights(config.temperature)
            memory = log_weights.masked_fill(neighbors.values != targets[:, None], -torch.inf).logsumexp(1)
            return target_log_probs(lm, memory, config.weight)

        arms = take_turns({"dense": dense, "target only": target_only}, args.repeats, meter)
        errors = {name: _error_of_mixture(arm.results[-1], neighbors, logits, targets) for name, arm in arms.items()}
        results.append({"queries": count, "errors": errors, **compared(arms, "target only", "dense")})
    rows = []
    for result in results:
        cells = [f"{milliseconds(result['seconds'][n])} (error {result['errors'][n]:.0e})" for n in result["errors"]]
        peaks = [f"{result['peak'][name] / 1e6:.0f}" for name in result["errors"]]
        rows.append([str(result["queries"]), *cells, spread_text(result["speed"]), *peaks])
    print_table(["tokens", "dense, ms", "target only, ms", "speed", "dense, peak MB", "target only, peak MB"], rows)
    return results


def _error_of_mixture(found: torch.Tensor, neighbors: Any, logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the largest difference of log-probabilities from float64."""
    config = MemoryConfig()
    weights = (-neighbors.distances.double()).softmax(-1)
    memory = (weights * (neighbors.values == targets[:, None])).sum(1)
    lm = logits.double().softmax(-1).gather(1, targets[:, None])[:, 0]
    return float((found - ((1 - config.weight) * lm + config.weight * memory).log()).abs().max())


# ---------------------------------------------------------------------- building


def build(args: BenchmarkArguments, meter: Meter) -> dict[str, Any]:
    """Measure tokens/s of a build against a hooked forward; the documents fill their windows, so no arm pads."""
    world = make_world(args)
    model, tokenizer = world.model, world.model.tokenizer
    documents = []
    length = args.document_length
    for start in range(args.num_documents):
        text = " ".join(world.words[(start + place * 7) % len(world.words)] for place in range(length))
        documents.append(text)
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> KNNMemory:
            options = {"max_length": length, "stride": length // 2, "batch_size": args.batch_size}
            return KNNMemory.build(model, first_tokens, show_progress_bar=False, **options)

        first_tokens = _cut(documents, tokenizer, length)
        baseline = partial(hooked_forward, model, first_tokens, Path(folder), args.batch_size)
        arms = take_turns({"hooked forward": baseline, "KNNMemory.build": ours}, args.repeats, meter)
        expected = np.array(arms["hooked forward"].results[-1])
    datastore = arms["KNNMemory.build"].results[-1]
    keys = datastore.get_keys(torch.arange(len(datastore))).float().numpy()
    result = {
        "tokens": len(datastore),
        "largest_difference": float(np.abs(keys - expected.astype(np.float32)).max()),
        **compared(arms, "KNNMemory.build", "hooked forward"),
    }
    rows = []
    for name, seconds in result["seconds"].items():
        speed = spread_text(result["speed"]) if name == "KNNMemory.build" else "1.00"
        rows.append([name, f"{result['tokens'] / seconds['median']:,.0f}", speed, f"{result['peak'][name] / 1e6:.0f}"])
    print_table(["arm", "tokens/s", "speed", "peak MB"], rows)
    print(f"Largest difference of keys: {result['largest_difference']:.0e}", flush=True)
    return result


def _cut(documents: list[str], tokenizer: Any, length: int) -> list[str]:
    """Return texts that have exactly `length - 1` tokens, so that BOS and text fill a window."""
    texts = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1]
        texts.append(tokenizer.decode(ids))
    return texts


@torch.no_grad()
def hooked_forward(model: CoSupForCausalLM, texts: list[str], folder: Path, batch_size: int) -> np.ndarray:
    """
    Save the keys of texts of one length as knn-transformers does: a hook on the whole model's forward, loss included.

    Returns:
        `numpy.memmap` of shape `(N, d)`: float16.
    """
    gen, tokenizer = model.gen, model.tokenizer
    captured: list[torch.Tensor] = []
    hook = gen.get_submodule(ffn_name(gen)).register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    bos = [tokenizer.bos_token_id]
    rows = [bos + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    count = sum(len(row) - 1 for row in rows)
    width = gen.config.hidden_size
    keys = np.memmap(folder / "keys.npy", dtype=np.float16, mode="w+", shape=(count, width))
    values = np.memmap(folder / "values.npy", dtype=np.int32, mode="w+", shape=(count, 1))
    place = 0
    for start in range(0, len(rows), batch_size):
        ids = torch.tensor(rows[start : start + batch_size])
        gen(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        found = captured.pop()[:, :-1].flatten(0, 1)  # (n, d)
        targets = ids[:, 1:].flatten()
        keys[place : place + len(found)] = found.numpy().astype(np.float16)
        values[place : place + len(found)] = targets.numpy().astype(np.int32)[:, None]
        place += len(found)
    keys.flush()
    values.flush()
    hook.remove()
    return keys


def make_world(args: BenchmarkArguments) -> World:
    """Return a random model with a tokenizer."""
    script = SimpleNamespace(seed=args.seed, dtype="float32", gen=None, shape=args.shape, new_tokens=args.new_tokens)
    return World(script, torch.device("cpu"))


# ---------------------------------------------------------------------- generating


def decode(args: BenchmarkArguments, meter: Meter) -> list[dict[str, Any]]:
    """Measure a decode step of generate() with memories of several sizes."""
    world = make_world(args)
    calls = decoding_with_memories(world, args.batch_size, args.decode_sizes, args.k)
    arms = take_turns(calls, args.repeats, meter)
    results = step_costs(arms, args.new_tokens)
    rows = []
    for result in results:
        step = spread_text(result["seconds_per_step"], ".4f")
        rows.append([result["arm"], step, spread_text(result["cost"]), f"{result['peak'] / 1e6:.0f}"])
    print_table([f"{args.batch_size} rows", "s per step, prompt included", "times no memory", "peak MB"], rows)
    return results


# ---------------------------------------------------------------------- memory and size


def memory(args: BenchmarkArguments, meter: Meter) -> list[dict[str, Any]]:
    """Measure peak memory of processes that build and load a datastore, and its size on disk."""
    results = []
    for size in args.memory_sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "build_and_load", folder, str(size), str(torch.get_num_threads())]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            facts = json.loads(output.splitlines()[-1])
            facts["disk"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        facts["formula"] = facts["keys"] * (2 * facts["key_size"] + 8)
        results.append(facts)
    rows = []
    for facts in results:
        cells = [f"{facts[name] / 1e6:.1f}" for name in ("build_peak", "load_peak", "disk", "formula")]
        rows.append([f"{facts['keys']:,}", *cells])
    print_table(["keys", "build, anonymous MB more", "load, MB more", "on disk, MB", "N (2d + 8), MB"], rows)
    return results


def build_and_load(folder: str, size: str, threads: str) -> None:
    """Build a datastore of about `size` tokens with a tiny model and load it, and print the memory that both need."""
    torch.set_num_threads(int(threads))
    world = make_world(BenchmarkArguments(shape="tiny"))
    words_per_text = 40
    tokens_per_text = len(world.model.tokenizer(" ".join(world.words[:words_per_text]))["input_ids"])
    count = int(size) // tokens_per_text + 1
    texts = (" ".join(world.words[:words_per_text]) for _ in range(count))
    options = {"shard_size": 16384, "max_length": 256, "stride": 128, "show_progress_bar": False}
    build_peak = _peak_of("RssAnon", partial(KNNMemory.build, world.model, texts, Path(folder, "mem"), **options))
    loaded: list[KNNMemory] = []
    load_peak = _peak_of("VmRSS", lambda: loaded.append(KNNMemory.from_pretrained(Path(folder, "mem"))))
    facts = {"keys": len(loaded[0]), "key_size": loaded[0].key_size, "build_peak": build_peak, "load_peak": load_peak}
    print(json.dumps(facts))


def _peak_of(name: str, call: Callable[[], Any]) -> int:
    """Return by how many bytes a line of /proc/self/status grew during a call, read fifty times a second."""
    done = threading.Event()
    before = resident_bytes(name)
    peak = before

    def watch() -> None:
        nonlocal peak
        finished = False
        while not finished:
            finished = done.wait(0.02)
            peak = max(peak, resident_bytes(name))

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peak - before


if __name__ == "__main__":
    if sys.argv[1:2] == ["build_and_load"]:
        build_and_load(*sys.argv[2:])
    else:
        main()
