"""The speed of exact search in a large index, and of encoding passages."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_cosup import PassageIndex
from modeling_cosup.index_build_cosup import record_batch
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_store_cosup import new_config

from encoding_arms import encoding_arms
from gpu_parts.runner import Context
from measuring import GB, Arm, Meter, spread, spread_text, take_turns
from random_instances import random_instances, random_two_towers
from random_world import make_tokenizer, random_words

try:
    import faiss
except ImportError:
    faiss = None

K = 10
SHARD_SIZE = 32768
BATCH_SIZES = (1, 8, 32)
DTYPES = ("bfloat16", "float16", "float32")
CALLS = 10  # searches of an arm in a round: one alone is too short to time
MAX_SECONDS = 30  # for the rounds of a batch size

Search = Callable[[torch.Tensor], np.ndarray]  # queries (N, h) -> rows (N, K)


# ---------------------------------------------------------------------- searching


def search_speed(context: Context) -> dict[str, Any]:
    """
    Compare `PassageIndex.search` on the device with a product and top-k in plain torch, and with faiss.

    The embeddings are random, clustered, and rounded to bfloat16, so that copies in every dtype hold the same numbers.
    Rows are compared with those of float32.
    """
    count, size = (3000, 64) if context.tiny else (rows_that_fit(context.device, 4096), 4096)
    shards, all_queries = random_shards(count, size, context.device)
    searches: dict[str, Search] = {}
    for dtype in DTYPES:
        config = new_config({"embedding_size": size, "dtype": "bfloat16", "fingerprint": {}}, shards)
        index = PassageIndex(shards, config).to(context.device, dtype)
        searches[f"PassageIndex, {dtype}"] = partial(search_index, index)
        searches[f"torch, {dtype}"] = partial(search_plainly, index._device.embeddings)
    notes = add_faiss(searches, shards, size, context.device)
    results = []
    for batch_size in BATCH_SIZES:
        queries = all_queries[:batch_size]
        calls = {name: partial(repeated, search, queries) for name, search in searches.items()}
        arms = take_turns(calls, 1 if context.tiny else 5, Meter(context.device, collect=False), MAX_SECONDS)
        results += search_results(arms, batch_size)
    rows = []
    for result in results:
        milliseconds = {name: 1000 * seconds for name, seconds in result["seconds"].items()}
        cells = [str(result["batch"]), result["arm"], spread_text(milliseconds, ".3f")]
        rows.append([*cells, spread_text(result["speed_to_torch"]), f"{result['recall']:.1%}"])
    header = ["queries", "arm", "ms a search (min to max)", "speed to torch in the same dtype", f"recall@{K}"]
    ours = [result for result in results if result["arm"] == "PassageIndex, bfloat16"]
    times = ", ".join(f"{result['batch']}: {1000 * result['seconds']['median']:.2f} ms" for result in ours)
    return {
        "passages": count,
        "embedding_size": size,
        "results": results,
        "notes": notes,
        "summary": f"bfloat16, by number of queries: {times}",
        "tables": [{"title": f"exact search, {count:,} x {size}, k = {K}", "header": header, "rows": rows}],
    }


def rows_that_fit(device: torch.device, size: int) -> int:
    """Return how many embeddings are searched: a million, or as many as leave a third of a GPU's memory free."""
    if device.type != "cuda":
        return 20_000
    free_bytes, _ = torch.cuda.mem_get_info()
    # copies of 2 + 2 + 4 bytes a number, and in 2 bytes the copy of faiss-gpu
    return min(1_000_000, int(free_bytes * 2 / 3) // (10 * size))


def random_shards(count: int, size: int, device: torch.device) -> tuple[list[Shard], torch.Tensor]:
    """
    Return shards of random embeddings, around 1,000 centres and of unit length, in bfloat16 on the CPU.

    Returns:
        `(shards, queries)`: with 32 queries of the same kind, `(32, size)`, float32 on the device.
    """
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(1000, size, generator=generator, device=device)

    def draw(n: int) -> torch.Tensor:
        numbers = torch.randint(1000, (n,), generator=generator, device=device)
        points = centres[numbers] + torch.randn(n, size, generator=generator, device=device)
        return torch.nn.functional.normalize(points, dim=1)

    shards = []
    for start in range(0, count, SHARD_SIZE):
        rows = range(start, min(count, start + SHARD_SIZE))
        passages = [{"id": f"p{row}", "title": "", "text": "x"} for row in rows]
        no_ids = [np.zeros(1, np.int32)] * len(passages)
        shards.append(Shard(record_batch(passages, no_ids), draw(len(passages)).bfloat16().cpu()))
    return shards, draw(max(BATCH_SIZES))


def search_index(index: PassageIndex, queries: torch.Tensor) -> np.ndarray:
    """Return the rows `(N, K)` that an index finds."""
    return index.search(queries, K)[1]


def search_plainly(embeddings: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """Return the rows `(N, K)` by one product in the dtype of the embeddings `(M, h)`, and top-k."""
    scores = queries.to(embeddings.dtype) @ embeddings.T  # (N, M)
    return scores.topk(K).indices.cpu().numpy()


def add_faiss(searches: dict[str, Search], shards: list[Shard], size: int, device: torch.device) -> list[str]:
    """Add a flat index of faiss, if there is one for the device; return a note if there is none."""
    if faiss is None:
        return ["faiss: not installed"]
    if device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        return ["faiss: installed without GPU support"]
    resources = None
    if device.type == "cuda":
        resources = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        config.device = device.index or 0
        index = faiss.GpuIndexFlatIP(resources, size, config)
        name = "faiss-gpu, float16"
    else:
        index = faiss.IndexFlatIP(size)
        name = "faiss, float32"
    for shard in shards:
        index.add(shard.embeddings.float().numpy())
    searches[name] = partial(search_faiss, index, resources)
    return []


def search_faiss(index: Any, resources: Any, queries: torch.Tensor) -> np.ndarray:
    """Return the rows `(N, K)` that an index of faiss finds; on a GPU it needs its resources while it exists."""
    return index.search(queries.cpu().numpy(), K)[1]


def repeated(search: Search, queries: torch.Tensor) -> np.ndarray:
    """Search [`CALLS`] times, and return the rows of the last search."""
    for _ in range(CALLS):
        rows = search(queries)
    return rows


def search_results(arms: dict[str, Arm], batch_size: int) -> list[dict[str, Any]]:
    """Return seconds of a search, speed and recall of each arm for one number of queries."""
    reference = arms["torch, float32"].results[-1]
    results = []
    for name, arm in arms.items():
        _, dtype = name.split(", ")
        found = arm.results[-1]
        hits = [np.intersect1d(*rows).size for rows in zip(found, reference, strict=True)]
        results.append(
            {
                "batch": batch_size,
                "arm": name,
                "seconds": spread([seconds / CALLS for seconds in arm.seconds]),
                "speed_to_torch": spread(arm.ratios(arms[f"torch, {dtype}"])),
                "recall": sum(hits) / reference.size,
                "peak_memory_gb": arm.peak / GB,
            }
        )
    return results


# ---------------------------------------------------------------------- encoding


def encoding_speed(context: Context) -> dict[str, Any]:
    """
    Measure passages/s of `PassageIndex.build` and of sentence-transformers, with the same weights and token ids.

    `build` also checks the corpus, tokenizes for Gen and stores the texts; sentence-transformers tokenizes once.
    """
    shape, count, dtype = ("tiny", 20, torch.float32) if context.tiny else ("135m", 4000, torch.bfloat16)
    batch_sizes = (4, 8) if context.tiny else (32, 256)
    model = random_two_towers(shape, 0, context.device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies stay in float32
    passages = []
    for instance in random_instances(model.tokenizer, 2 * count, 1):
        passages += [segment["passage"] for segment in instance["segments"] if segment["passage"]]
    passages = passages[:count]
    with tempfile.TemporaryDirectory() as folder:
        calls = encoding_arms(model, make_tokenizer(random_words(0)), passages, Path(folder), batch_sizes)
        arms = take_turns(calls, 1 if context.tiny else 3, Meter(context.device), MAX_SECONDS)
    baseline = arms["sentence-transformers"]
    expected = baseline.results[-1]
    results = []
    rows = []
    for name, arm in arms.items():
        result = {
            "arm": name,
            "seconds": spread(arm.seconds),
            "passages_per_second": count / spread(arm.seconds)["median"],
            "speed": spread(arm.ratios(baseline)),
            "largest_difference": float((arm.results[-1] - expected).abs().max()),
            "peak_memory_gb": arm.peak / GB,
        }
        results.append(result)
        speed, difference = spread_text(result["speed"]), f"{result['largest_difference']:.0e}"
        rows.append([name, f"{result['passages_per_second']:,.0f}", speed, difference])
    header = ["arm", f"passages/s (batches of {batch_sizes[0]} unless named)", "speed (min to max)"]
    header.append("largest difference of embeddings")
    best_other = max(results[:-1], key=lambda result: result["passages_per_second"])
    ours = results[-1]
    to_best = spread(arms[ours["arm"]].ratios(arms[best_other["arm"]]))
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "passages": count,
        "arms": results,
        "speed_to_best": to_best,
        "summary": f"{ours['passages_per_second']:,.0f} passages/s, {spread_text(to_best)} x {best_other['arm']}",
        "tables": [{"title": f"{count:,} passages, random weights, shape {shape}", "header": header, "rows": rows}],
    }
