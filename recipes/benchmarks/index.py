"""
Speed, memory and recall of the passage index, each arm beside what it is measured against, in one process.

    python recipes/benchmarks/index.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python recipes/benchmarks/index.py --sections search,memory       # no model needed: random embeddings, a tiny random model
    python recipes/benchmarks/index.py --quick true                    # a few seconds, to see that it runs

Sections: `encode` (passages/s of building an index against sentence-transformers' `encode` on the same weights), `search` (exact search over mapped files
against raw FAISS, candidates, deletions), `approximate` (HNSW and IVF against exact search, with recall), `memory` (peak while building, by corpus size).
Arms alternate, round by round, and rotate; ratios are medians of the rounds' own ratios. Prints tables and writes `--output_file`.
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
from dataclasses import dataclass, field
from pathlib import Path

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

SHARD_SIZE = 32768


@dataclass
class BenchmarkArguments:
    """What is measured."""

    model: str | None = field(
        default=None,
        metadata={"help": "`encode`: a causal language model, Gen and Emb_seq alike; without it, a tiny random one."},
    )
    sections: str = field(default="encode,search,approximate,memory", metadata={"help": "Comma-separated."})
    num_passages: int = field(default=128, metadata={"help": "`encode`: passages, synthetic, of 10 to 200 words."})
    dtype: str = field(default="float32", metadata={"help": "`encode`: of the weights, in both arms."})
    sizes: str = field(
        default="10000x768,100000x256,100000x1024,1000000x256",
        metadata={"help": "`search`: passages x dimensions, comma-separated."},
    )
    batch_sizes: str = field(default="1,8,32,200", metadata={"help": "Queries that are searched at once."})
    approximate_size: str = field(default="100000x256", metadata={"help": "`approximate`: passages x dimensions."})
    memory_counts: str = field(default="100000,1000000", metadata={"help": "`memory`: passages of each build."})
    repeats: int = field(default=5, metadata={"help": "Timed rounds of every arm, after one that is not counted."})
    device: str | None = field(default=None, metadata={"help": "`search`: also search on this device, e.g. cuda."})
    num_threads: int | None = field(default=None, metadata={"help": "Of torch and FAISS; defaults to all cores."})
    quick: bool = field(
        default=False, metadata={"help": "Tiny sizes: shows that the benchmark runs, measures nothing."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON of all numbers."})


def main():
    """Run the sections, print tables, write the numbers."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.quick:
        args.num_passages, args.sizes, args.approximate_size, args.memory_counts, args.repeats = (
            12,
            "600x16",
            "3000x16",
            "300,900",
            2,
        )
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
    results = {"threads": threads, "versions": versions}
    for section in args.sections.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[section] = {"encode": encode, "search": search, "approximate": approximate, "memory": memory}[
                section
            ](args, Path(folder))
    if args.output_file:
        write_json(args.output_file, results)


def measure(arms, repeats):
    """
    Seconds of each arm in `repeats` rounds after one that is not counted; the order rotates.

    Returns:
        `(dict of medians, function(arm, base) -> (median, smallest, largest) of the rounds' own speed ratios)`.
    """
    seconds, names = {name: [] for name in arms}, list(arms)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}

    def ratio(arm, base):
        ratios = sorted(b / a for a, b in zip(seconds[arm], seconds[base], strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]

    return {name: statistics.median(values) for name, values in seconds.items()}, ratio


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def speed(ratio):
    return f"**{ratio[0]:.2f}** | {ratio[1]:.2f} – {ratio[2]:.2f}"


# ---------------------------------------------------------------------- encoding


def encode(args, folder):
    """Passages/s of `PassageIndex.build` (tokens for Gen, texts and checks included) and of sentence-transformers' `encode`, and how far they differ."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        print("encode: skipped, it needs sentence-transformers (pip install sentence-transformers)\n")
        return None
    name = args.model or tiny_model(folder / "tiny")
    model = CoSupForCausalLM.from_gen_and_emb_seq(name, model_kwargs={"dtype": args.dtype}).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.emb_seq.save_pretrained(folder / "emb_seq")  # the same weights
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = None  # sentence-transformers would wrap every text in it
    tokenizer.save_pretrained(folder / "emb_seq")
    transformer = Transformer(str(folder / "emb_seq"), max_seq_length=2048, model_kwargs={"dtype": args.dtype})
    reference = SentenceTransformer(modules=[transformer, Pooling(model.config.embedding_size, "lasttoken")])
    passages = synthetic_passages(args.num_passages)
    ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    texts = model.emb_seq_tokenizer.batch_decode(
        ids
    )  # BOS and EOS as text, which sentence-transformers' tokenizer reads as the tokens they are
    found = {}
    arms = {
        "sentence-transformers": lambda: found.update(
            reference=reference.encode(texts, batch_size=32, normalize_embeddings=True)
        ),
        "PassageIndex.build": lambda: found.update(
            ours=model.build_index(passages, show_progress_bar=False).embeddings.numpy()
        ),
    }
    seconds, ratio = measure(arms, args.repeats)
    error = float(np.abs(found["ours"] - found["reference"]).max())
    tokens, base = sum(map(len, ids)), "sentence-transformers"
    print(f"Encoding {len(passages)} passages, {tokens:,} tokens, {args.dtype}\n")
    header(
        "arm",
        "passages/s",
        "tokens/s",
        "speed to sentence-transformers",
        "min – max",
        "largest difference of an embedding",
    )
    for arm in arms:
        difference = "" if arm == base else f"{error:.0e}"
        row(
            f"`{arm}`",
            f"{len(passages) / seconds[arm]:.1f}",
            f"{tokens / seconds[arm]:.0f}",
            speed(ratio(arm, base)),
            difference,
        )
    print()
    ours = ratio("PassageIndex.build", base)
    return {
        "seconds": seconds,
        "speed": ours,
        "largest_difference": error,
        "tokens": tokens,
        "passages": len(passages),
    }


def synthetic_passages(count):
    """Passages of 10 to 200 English-looking words, most of them about 80."""
    random = np.random.default_rng(0)
    words = [
        "the",
        "city",
        "painted",
        "river",
        "was",
        "in",
        "born",
        "discovered",
        "of",
        "and",
        "Amsterdam",
        "physicist",
        "1898",
        "long",
        "who",
        "a",
    ]
    lengths = random.lognormal(4.4, 0.5, count).clip(10, 200).astype(int)
    return [
        {"id": str(i), "title": f"Title {i}", "text": " ".join(random.choice(words, length))}
        for i, length in enumerate(lengths)
    ]


def tiny_model(folder):
    """A random causal language model of two layers with a word-level tokenizer, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        token: i
        for i, token in enumerate(
            ["<unk>", "<s>", "</s>", *map(str, range(1000)), "the", "city", "was", "in", "of", "and", "a"]
        )
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    options = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", max_position_embeddings=512, **options)
    ).save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------- searching


def random_index(count, size, folder):
    """An index in files, of clustered random embeddings of unit length (1,000 centres) and passages of a word; and queries of the same kind."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, size, generator=generator)

    def draw(n):
        points = centres[torch.randint(1000, (n,), generator=generator)] + torch.randn(n, size, generator=generator)
        return torch.nn.functional.normalize(points, dim=1)

    shards = []
    for start in range(0, count, SHARD_SIZE):
        passages = [
            {"id": f"p{row}", "title": "", "text": "x"} for row in range(start, min(count, start + SHARD_SIZE))
        ]
        shards.append(Shard(record_batch(passages, [np.zeros(1, np.int32)] * len(passages)), draw(len(passages))))
    settings = {"embedding_size": size, "dtype": "float32", "fingerprint": {}}
    PassageIndex(shards, new_config(settings, shards)).save_pretrained(folder)
    return PassageIndex.from_pretrained(folder, verify=False), draw(200)


def search(args, folder):
    """Exact search over mapped files against `faiss.IndexFlatIP` of a copy in memory; pools of 100 candidates; one passage in a hundred deleted."""
    header(
        "passages x dimensions",
        "queries",
        "raw FAISS ms",
        "mapped files ms",
        "speed",
        "min – max",
        "100 candidates each ms",
        "1 % deleted ms",
        "same rows",
    )
    results = []
    for count, size in (map(int, pair.split("x")) for pair in args.sizes.split(",")):
        results += search_one_size(args, count, size, folder / f"{count}x{size}")
    print()
    return results


def search_one_size(args, count, size, folder):
    index, queries = random_index(count, size, folder)
    raw = faiss.IndexFlatIP(size)
    raw.add(index.embeddings.numpy())
    random, results = np.random.default_rng(0), []
    pools = [random.choice(count, 100, replace=False) for _ in queries]
    thinned = PassageIndex.from_pretrained(folder, verify=False)
    thinned.delete([f"p{row}" for row in random.choice(count, count // 100, replace=False)])
    device = None if args.device is None else PassageIndex.from_pretrained(folder, verify=False).to(args.device)
    for n in map(int, args.batch_sizes.split(",")):
        asked, own = queries[:n], pools[:n]
        arms = {
            "raw": lambda asked=asked: raw.search(asked.numpy(), 10),
            "ours": lambda asked=asked: index.search(asked, 10),
            "pools": lambda asked=asked, own=own: index.search(asked, 10, candidates=own),
            "deleted": lambda asked=asked: thinned.search(asked, 10),
        }
        if device is not None:
            arms["device"] = lambda asked=asked: device.search(asked, 10)
        seconds, ratio = measure(arms, args.repeats)
        same, ours = float((arms["raw"]()[1] == arms["ours"]()[1]).mean()), ratio("ours", "raw")
        times = [f"{1000 * seconds[name]:.2f}" for name in ("raw", "ours", "pools", "deleted")]
        row(f"{count:,} x {size}", n, times[0], times[1], speed(ours), times[2], times[3], f"{100 * same:.1f} %")
        if device is not None:
            print(f"    on {args.device}: {1000 * seconds['device']:.2f} ms")
        results.append(
            {
                "passages": count,
                "dimensions": size,
                "queries": n,
                "seconds": seconds,
                "speed_to_raw_faiss": ours,
                "same_rows": same,
            }
        )
    return results


def approximate(args, folder):
    """HNSW and IVF against exact search: seconds to make, speed, and ann_recall@10 of queries that are no passages."""
    count, size = map(int, args.approximate_size.split("x"))
    index, queries = random_index(count, size, folder / "index")
    exact = PassageIndex.from_pretrained(folder / "index", search="exact", verify=False)
    lists = 16 if args.quick else 1024
    factories = {
        "HNSW32": ("efSearch", [16, 64, 256]),
        f"IVF{lists},Flat": ("nprobe", [1, 8, 32]),
        f"IVF{lists},PQ{size // 8}": ("nprobe", [8, 32]),
    }
    print(f"{count:,} x {size}; exact search is the baseline\n")
    header(
        "index", "options", "made in s", "file MB", "queries", "ms", "exact ms", "speed", "min – max", "ann_recall@10"
    )
    results = []
    for factory, (name, values) in factories.items():
        start = time.perf_counter()
        index.train_approximate(factory)
        made = time.perf_counter() - start
        bytes_of_file = (folder / "index" / index.config["approximate"]["file"]).stat().st_size
        for value in values:
            index.set_search_options(**{name: value})
            recall = index.measure_recall(queries)["ann_recall@10"]
            for n in (1, 32):
                asked = queries[:n]
                seconds, ratio = measure(
                    {"ours": lambda a=asked: index.search(a, 10), "exact": lambda a=asked: exact.search(a, 10)},
                    args.repeats,
                )
                ours, times = ratio("ours", "exact"), [f"{1000 * seconds[arm]:.2f}" for arm in ("ours", "exact")]
                row(
                    f"`{factory}`",
                    f"{name} {value}",
                    f"{made:.1f}",
                    f"{bytes_of_file / 1e6:.1f}",
                    n,
                    *times,
                    speed(ours),
                    f"{100 * recall:.1f} %",
                )
                results.append(
                    {
                        "index_factory": factory,
                        name: value,
                        "made": made,
                        "queries": n,
                        "seconds": seconds,
                        "speed": ours,
                        "ann_recall@10": recall,
                    }
                )
    print()
    return results


# ---------------------------------------------------------------------- memory


def memory(args, folder):
    """Peak memory of a process that builds an index of short synthetic passages with a tiny model: anonymous, and with mapped files."""
    header(
        "passages",
        "shard_size",
        "s",
        "passages/s",
        "peak anonymous MB",
        "peak with mapped files MB",
        "index on disk MB",
    )
    results = []
    for count in map(int, args.memory_counts.split(",")):
        command = [
            sys.executable,
            __file__,
            "build",
            tiny_model(folder / "tiny"),
            str(folder / str(count)),
            str(count),
            str(torch.get_num_threads()),
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        facts = {
            **json.loads(output),
            "disk": sum(path.stat().st_size for path in (folder / str(count)).iterdir()) / 1e6,
        }
        rate = f"{count / facts['seconds']:,.0f}"
        row(
            f"{count:,}",
            f"{SHARD_SIZE:,}",
            f"{facts['seconds']:.0f}",
            rate,
            *(f"{facts[name]:.0f}" for name in ("anonymous", "total", "disk")),
        )
        results.append({"passages": count, **facts})
    print()
    return results


def build(model, folder, count, threads):
    """What `memory` starts: one build, watched twenty times a second."""
    torch.set_num_threads(int(threads))
    peak, done = {"anonymous": 0.0, "total": 0.0}, threading.Event()

    def watch():
        finished = False
        while not finished:
            finished = done.wait(0.05)
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name, key in (("anonymous", "RssAnon"), ("total", "VmRSS")):
                peak[name] = max(peak[name], int(status[key].split()[0]) * 1024 / 1e6)

    watcher = threading.Thread(target=watch)
    model = CoSupForCausalLM.from_gen_and_emb_seq(model)
    watcher.start()
    start = time.perf_counter()
    passages = ({"id": f"passage {i}", "text": f"the city {i % 1000} was {i // 1000}"} for i in range(int(count)))
    model.build_index(passages, save_directory=folder, show_progress_bar=False, batch_size=1024)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, **peak}))


if __name__ == "__main__":
    build(*sys.argv[2:]) if sys.argv[1:2] == ["build"] else main()
