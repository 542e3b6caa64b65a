"""
The stages of an experiment with token memories: data, Gen, kNN memory, MLP memory.

The result of a stage is a folder of the cache, named by a hash of all options that decide it. It is complete or not
there at all, and no stage runs twice.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_cosup import KNNMemory, MLPMemory
from modeling_cosup.files_cosup import digest, read_json, write_json
from trainer.memory import train_mlp_memory

from experiments.launching import locked_folder
from experiments.memory_definition import MemoryExperiment
from experiments.memory_training import new_gen, train_gen
from experiments.task_files import digest_of_content
from shared.arguments import MacondoArguments
from shared.macondo import prepare_macondo

DONE = "done.json"  # what a stage says about itself, written last


@dataclass
class Prepared:
    """
    What the stages made for an arm and a seed.

    Args:
        data (`Path`): folder of recipes/prepare_macondo.py.
        gen (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): trained on the sentences.
        knn ([`KNNMemory`]), mlp ([`MLPMemory`]): memories of the same sentences.
        facts (`dict`): name of a stage -> what it says about itself.
        key (`str`): hash of all options.
    """

    data: Path
    gen: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    knn: KNNMemory
    mlp: MLPMemory
    facts: dict[str, dict[str, Any]]
    key: str


def prepare(experiment: MemoryExperiment, arm: str, seed: int, cache: Path) -> Prepared:
    """
    Run the stages of an arm with a seed, or reuse their results.

    Raises:
        `ValueError`: as [`prepare_macondo`] and the memories do.
    """
    options = experiment.arms[arm]
    gen_source = options["gen"]
    given = gen_source if isinstance(gen_source, str) else None
    content = digest_of_content(given) if given else gen_source

    data_key = digest([experiment.data, seed, content if given else None])[:12]
    data = cache / "data" / data_key
    with locked_folder(data):
        prepare_macondo(MacondoArguments(str(data), seed=seed, tokenizer=given, **experiment.data))
    tokenizer = AutoTokenizer.from_pretrained(given or data / "tokenizer")

    pretraining, training = experiment.section(arm, "pretraining"), experiment.section(arm, "training")
    lora = options.get("lora", {})
    gen_key = digest([read_json(data / "macondo.json"), content, pretraining, training, lora, seed])[:12]

    def make_gen(folder: Path) -> dict[str, Any]:
        gen = new_gen(gen_source, tokenizer, seed)
        facts: dict[str, Any] = {"parameters": gen.num_parameters()}
        if pretraining:
            path = data / "other_relations.jsonl"
            facts["pretraining_loss"] = train_gen(gen, tokenizer, path, pretraining, folder / "trainer", seed)
        trained = with_lora(gen, lora) if lora else gen
        facts["loss"] = train_gen(trained, tokenizer, data / "train.jsonl", training, folder / "trainer", seed)
        gen = trained.merge_and_unload() if lora else gen
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        gen.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return facts

    facts = {"gen": stage(cache / "gens" / gen_key, make_gen, f"{arm}, seed {seed}: Gen")}
    gen = AutoModelForCausalLM.from_pretrained(cache / "gens" / gen_key).eval()
    gen.requires_grad_(False)
    if torch.cuda.is_available():
        gen.to("cuda")

    knn_options = experiment.section(arm, "knn")
    knn_folder = cache / "memories" / digest([gen_key, knn_options])[:12]

    def make_knn(folder: Path) -> dict[str, Any]:
        knn = KNNMemory.build(
            gen,
            str(data / "train.jsonl"),
            folder / "memory",
            tokenizer=tokenizer,
            show_progress_bar=False,
            **knn_options,
        )
        return {"keys": len(knn), "key_size": knn.key_size, "bytes": size_of(folder / "memory")}

    facts["knn"] = stage(knn_folder, make_knn, f"{arm}, seed {seed}: kNN memory")
    knn = KNNMemory.from_pretrained(knn_folder / "memory")
    knn.check_model(gen)

    mlp_options = experiment.section(arm, "mlp")
    mlp_folder = cache / "memories" / digest([knn_folder.name, mlp_options, seed])[:12]

    def make_mlp(folder: Path) -> dict[str, Any]:
        settings = dict(mlp_options)
        torch.manual_seed(seed)
        mlp = MLPMemory.from_gen(gen, intermediate_size=settings.pop("intermediate_size", 4096))
        losses = train_mlp_memory(mlp, knn, seed=seed, **settings)
        mlp.save_pretrained(folder / "memory")
        return {**losses, "bytes": size_of(folder / "memory")}

    facts["mlp"] = stage(mlp_folder, make_mlp, f"{arm}, seed {seed}: MLP memory")
    mlp = MLPMemory.from_pretrained(mlp_folder / "memory").to(gen.device)
    mlp.check_model(gen)
    return Prepared(data, gen, tokenizer, knn, mlp, facts, digest([gen_key, knn_folder.name, mlp_folder.name])[:12])


def stage(folder: Path, make: Callable[[Path], dict[str, Any]], name: str) -> dict[str, Any]:
    """
    Make a folder of the cache, unless it is there.

    Args:
        folder (`Path`): the folder.
        make (`Callable`): writes into the folder that it is given, and returns facts as JSON values.
        name (`str`): what is made, for messages.

    Returns:
        `dict`: the facts, and the `seconds` that it took.
    """
    with locked_folder(folder):
        if (folder / DONE).exists():
            return read_json(folder / DONE)
        print(f"[{name}] {folder}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            unfinished = Path(temporary, folder.name)
            unfinished.mkdir()
            facts = make(unfinished)
            write_json(unfinished / DONE, {**facts, "seconds": round(time.monotonic() - start, 1)})
            unfinished.rename(folder)
        return read_json(folder / DONE)


def with_lora(gen: PreTrainedModel, options: dict[str, Any]) -> Any:
    """Return Gen with adapters in its layers; `options` are those of `peft.LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gen, LoraConfig(task_type="CAUSAL_LM", **options))


def size_of(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
