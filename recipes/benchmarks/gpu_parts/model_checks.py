"""Checks of a model by itself: its passage embeddings, its checkpoint, its quantized weights, and the search."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from modeling_cosup import PassageIndex, RetrievalConfig
from modeling_cosup.index_build_cosup import record_batch
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_store_cosup import new_config

from gpu_parts.comparing import Comparisons, largest_difference, name_of, share_of_other_tokens
from gpu_parts.errors import FailedProcess
from gpu_parts.runner import Context, Skip
from gpu_parts.small_world import SmallWorld

ROOT = Path(__file__).parents[3]
EXACT = 1e-5  # in float32
HALF_FLOOR = 1e-2  # of the bound of embeddings in bfloat16


def passages_alone(context: Context) -> dict[str, Any]:
    """A passage's embedding does not depend on its batch-mates, nor on the side of the padding."""
    comparisons = Comparisons()
    reference = None
    for dtype in context.dtypes:
        world = SmallWorld(context, dtype)
        rows = world.passage_rows(6 if context.tiny else 64)
        for implementation in ("sdpa", "eager"):
            world.model.emb_seq.set_attn_implementation(implementation)
            alone = torch.cat([world.embed_rows([row]) for row in rows])  # (M, h)
            for side in ("right", "left"):
                batch = world.embed_rows(rows, side)
                what = f"{implementation}: embeddings in a batch padded on the {side}, and alone"
                if reference is None or dtype == torch.float32:
                    comparisons.add(what, dtype, largest_difference(batch, alone), EXACT)
                else:
                    own_error = largest_difference(alone, reference)
                    comparisons.add_half(what, largest_difference(batch, reference), own_error, HALF_FLOOR)
            if dtype == torch.float32:
                reference = alone
    return comparisons.result(passages=len(rows))


# ---------------------------------------------------------------------- a checkpoint

LOADED = """
import json, sys
sys.modules["modeling_cosup"] = sys.modules["trainer"] = None  # the checkpoint must do with its own code
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

job = json.loads(sys.argv[1])
options = {"trust_remote_code": True, "dtype": getattr(torch, job["dtype"])}
model = AutoModelForCausalLM.from_pretrained(job["folder"], **options).to(job["device"]).eval()
index = model.load_index(job["folder"] + "/index")
if job["device"].startswith("cuda"):
    index.to(job["device"], job["dtype"])
ids = torch.tensor(job["prompts"], device=job["device"])
with torch.no_grad():
    logits = model(ids).logits.float().cpu()
config = model.retrieval_config_class(force_nsp_first=True, max_retrievals=1)
options = {"retriever": index, "retrieval_config": config, "max_new_tokens": job["new_tokens"]}
output = model.generate(ids, return_dict_in_generate=True, **options)
save_file({"logits": logits, "sequences": output.sequences.cpu()}, job["folder"] + "/loaded.safetensors")
"""


def saved_model(context: Context) -> dict[str, Any]:
    """A saved model, loaded by a process without this package, has the same logits, tokens and passages."""
    comparisons = Comparisons()
    for dtype in context.dtypes[:1] if context.tiny else context.dtypes:
        world = SmallWorld(context, dtype)
        index = world.index(world.num_passages)
        length = min(map(len, world.prompts(2)))
        prompts = [prompt[:length] for prompt in world.prompts(2)]
        ids = torch.tensor(prompts, device=world.device)
        with torch.no_grad():
            logits = world.model(ids).logits.float()
        config = RetrievalConfig(force_nsp_first=True, max_retrievals=1)
        options = {"retriever": index, "retrieval_config": config, "max_new_tokens": 8}
        output = world.model.generate(ids, return_dict_in_generate=True, **options)
        with tempfile.TemporaryDirectory() as folder:
            world.model.save_pretrained(folder)
            index.save_pretrained(f"{folder}/index")
            job = {"folder": folder, "device": str(context.device), "dtype": name_of(dtype)}
            run_elsewhere({**job, "prompts": prompts, "new_tokens": 8}, folder)
            loaded = load_file(f"{folder}/loaded.safetensors")
        what = "loaded elsewhere and here:"
        error = largest_difference(loaded["logits"], logits) / float(logits.abs().max())
        bound = EXACT if dtype == torch.float32 else HALF_FLOOR
        comparisons.add(f"{what} logits, relative to the largest", dtype, error, bound)
        share = share_of_other_tokens(loaded["sequences"].tolist(), output.sequences.tolist())
        bound = 0.0 if dtype == torch.float32 else None
        comparisons.add(f"{what} share of other tokens", dtype, share, bound)
    return comparisons.result()


def run_elsewhere(job: dict[str, Any], folder: str) -> None:
    """
    Run `LOADED` in a process that does not see this project.

    Raises:
        [`FailedProcess`]: if it ends with an error.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    elsewhere = [path for path in paths if path and not Path(path).resolve().is_relative_to(ROOT)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(elsewhere)}
    variables |= {"HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADED, json.dumps(job)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=150)
    if done.returncode != 0:
        raise FailedProcess("The process that loads the checkpoint", done.stderr)


def quantized_model(context: Context) -> dict[str, Any]:
    """Weights of 8 and 4 bits (bitsandbytes) load, retrieve and generate; their error is reported."""
    from transformers import BitsAndBytesConfig

    from modeling_cosup import CoSupForCausalLM

    dtype = torch.bfloat16
    comparisons = Comparisons()
    world = SmallWorld(context, dtype)
    index = world.index(world.num_passages)
    prompt = world.prompts(1)
    ids = torch.tensor(prompt, device=world.device)
    with torch.no_grad():
        expected = world.model(ids).logits.float()
    with tempfile.TemporaryDirectory() as folder:
        world.model.save_pretrained(folder)
        for bits in (8, 4):
            config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
            options = {"dtype": dtype, "device_map": {"": context.device}, "quantization_config": config}
            model = CoSupForCausalLM.from_pretrained(folder, **options)
            with torch.no_grad():
                logits = model(ids).logits.float()
            error = float((logits - expected).norm() / expected.norm())
            comparisons.add(f"{bits} bits: logits, relative to bfloat16", dtype, error, None)
            settings = RetrievalConfig(force_nsp_first=True, max_retrievals=1)
            output = model.generate(
                ids, retriever=index, retrieval_config=settings, max_new_tokens=8, return_dict_in_generate=True
            )
            retrieved = bool(output.retrievals[0]) and int(output.num_generated_tokens[0]) > 1
            comparisons.add_equal(f"{bits} bits: retrieves and generates", dtype, retrieved)
            linear = model.gen.model.layers[0].self_attn.q_proj
            comparisons.add_equal(
                f"{bits} bits: weights are stored in bytes", dtype, linear.weight.element_size() == 1
            )
    return comparisons.result()


# ---------------------------------------------------------------------- search


def random_index(count: int, width: int) -> PassageIndex:
    """Return an index of random embeddings of unit length, in two shards; its passages are empty."""
    embeddings = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    shards = []
    for start in (0, count // 2):
        rows = range(start, count // 2 if start == 0 else count)
        passages = [{"id": f"m{row}", "title": "", "text": "x"} for row in rows]
        token_ids = [np.array([5, 6], np.int32)] * len(passages)
        shards.append(Shard(record_batch(passages, token_ids), embeddings[rows.start : rows.stop].clone()))
    settings = {"embedding_size": width, "dtype": "float32", "fingerprint": {}}
    return PassageIndex(shards, new_config(settings, shards))


def index_search(context: Context) -> dict[str, Any]:
    """Exact search on the device finds the rows that the CPU finds: all passages, candidates, after a deletion."""
    comparisons = Comparisons()
    count, width, k = (300, 32, 5) if context.tiny else (50_000, 1024, 10)
    on_cpu, on_device, in_half = (random_index(count, width) for _ in range(3))
    on_device.to(context.device)
    in_half.to(context.device, "bfloat16")
    pool = np.arange(1, count, 7)
    for deleted in ("", ", a third deleted"):
        if deleted:
            for index in (on_cpu, on_device, in_half):
                index.delete([f"m{row}" for row in range(0, count, 3)])
        for name in ("all passages", "candidates of the first query"):
            errors: dict[str, list[float]] = {"rows": [], "scores": [], "half": []}
            for num_queries in (1, 5, 70):
                queries = torch.randn(num_queries, width, generator=torch.Generator().manual_seed(num_queries))
                candidates: Any = None if name == "all passages" else [pool, *[None] * (num_queries - 1)]
                scores, rows = on_cpu.search(queries, k, candidates)
                device_scores, device_rows = on_device.search(queries.to(context.device), k, candidates)
                errors["rows"].append(share_of_other_tokens(device_rows.tolist(), rows.tolist()))
                errors["scores"].append(float(np.abs(device_scores - scores).max()))
                _, half_rows = in_half.search(queries.to(context.device), k, candidates)
                pairs = zip(rows, half_rows, strict=True)
                errors["half"].append(np.mean([len(set(row) - set(half)) / k for row, half in pairs]))
            what = f"1, 5, 70 queries, {name}{deleted}:"
            comparisons.add(f"{what} share of other rows", torch.float32, max(errors["rows"]), 0.0)
            # scores of queries of length √width
            comparisons.add(f"{what} scores", torch.float32, max(errors["scores"]), 1e-4)
            comparisons.add(f"{what} share of rows that are missed", torch.bfloat16, max(errors["half"]), None)
    return comparisons.result(passages=count, width=width)


def faiss_gpu(context: Context) -> dict[str, Any]:
    """A FAISS index on the GPU finds the rows that it finds on the CPU."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise Skip("faiss was built without GPU support: faiss-gpu is not installed")
    comparisons = Comparisons()
    index = random_index(20_000, 256)
    index.train_approximate("IVF64,Flat", nprobe=64)
    queries = torch.randn(70, 256, generator=torch.Generator().manual_seed(1))
    _, rows = index.search(queries, 10)
    index.to(context.device)
    _, device_rows = index.search(queries.to(context.device), 10)
    share = share_of_other_tokens(device_rows.tolist(), rows.tolist())
    comparisons.add("share of other rows: IVF64,Flat with all lists, GPU and CPU", torch.float32, share, 0.0)
    return comparisons.result(faiss=faiss.__version__, folder=str(Path(faiss.__file__).parent.name))
