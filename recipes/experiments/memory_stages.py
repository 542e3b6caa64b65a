"""
The stages of an experiment with token memories: data, Gen, kNN memory, MLP memory.

The result of a stage is a folder of the cache, named by a hash of all options that decide it. It is complete or not
there at all, and no stage runs twice.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_cosup import KNNMemory, MLPMemory
from modeling_cosup.files_cosup import digest, read_json, write_json
from modeling_cosup.token_keys_cosup import ffn_name
from trainer.memory import train_mlp_memory

from experiments.launching import locked_folder
from experiments.memory_definition import MemoryExperiment
from experiments.memory_training import new_gen, train_gen
from experiments.task_files import digest_of_content
from shared.macondo import prepare_macondo
from shared.memory_arguments import MacondoArguments

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
        `ValueError`: as [`~shared.macondo.prepare_macondo`] and the memories do.
    """
    name = f"{arm}, seed {seed}"
    data, tokenizer = make_data(experiment, arm, seed, cache)
    gen_folder, gen_facts = make_gen(experiment, arm, seed, cache, data, tokenizer)
    gen = AutoModelForCausalLM.from_pretrained(gen_folder).eval()
    gen.requires_grad_(False)
    if torch.cuda.is_available():
        gen.to("cuda")

    knn_options = experiment.section(arm, "knn")
    knn_folder = cache / "memories" / digest([gen_folder.name, knn_options])[:12]

    def build_knn(folder: Path) -> dict[str, Any]:
        texts = str(data / "train.jsonl")
        settings = {"show_progress_bar": False, **knn_options}
        knn = KNNMemory.build(gen, texts, folder / "memory", tokenizer=tokenizer, **settings)
        return {"keys": len(knn), "key_size": knn.key_size, "bytes": size_of(folder / "memory")}

    knn_facts = stage(knn_folder, build_knn, f"{name}: kNN memory")
    knn = KNNMemory.from_pretrained(knn_folder / "memory")
    knn.check_model(gen)
    knn.to(gen.device)

    mlp_options = experiment.section(arm, "mlp")
    mlp_folder = cache / "memories" / digest([knn_folder.name, mlp_options, seed])[:12]

    def train_mlp(folder: Path) -> dict[str, Any]:
        settings = dict(mlp_options)
        set_seed(seed)
        mlp = MLPMemory.from_gen(gen, settings.pop("intermediate_size", 4096), tokenizer)
        losses = train_mlp_memory(mlp, knn, seed=seed, **settings)
        mlp.save_pretrained(folder / "memory")
        return {**losses, "bytes": size_of(folder / "memory")}

    mlp_facts = stage(mlp_folder, train_mlp, f"{name}: MLP memory")
    mlp = MLPMemory.from_pretrained(mlp_folder / "memory").to(gen.device)
    mlp.check_model(gen)
    facts = {"gen": gen_facts, "knn": knn_facts, "mlp": mlp_facts}
    asked = [digest_of_content(data / name) for name in ("validation.jsonl", "test.jsonl")]
    key = digest([gen_folder.name, knn_folder.name, mlp_folder.name, *asked])[:12]
    return Prepared(data, gen, tokenizer, knn, mlp, facts, key)


def make_data(experiment: MemoryExperiment, arm: str, seed: int, cache: Path) -> tuple[Path, PreTrainedTokenizerBase]:
    """Make the data set of a seed for the tokenizer of an arm, and return its folder and the tokenizer."""
    gen = experiment.arms[arm]["gen"]
    given = gen if isinstance(gen, str) else None
    folder = cache / "data" / digest([experiment.data, seed, digest_of_content(given) if given else None])[:12]
    with locked_folder(folder):
        prepare_macondo(MacondoArguments(str(folder), seed=seed, tokenizer=given, **experiment.data))
    return folder, AutoTokenizer.from_pretrained(given or folder / "tokenizer")


def make_gen(
    experiment: MemoryExperiment, arm: str, seed: int, cache: Path, data: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, dict[str, Any]]:
    """Train the Gen of an arm with a seed, and return its folder and what is said about it."""
    options = experiment.arms[arm]
    gen_source, lora = options["gen"], options.get("lora", {})
    sections = {name: experiment.section(arm, name) for name in ("pretraining", "training")}
    files = ["train.jsonl", "tokenizer"]
    if sections["pretraining"]:
        files.append("other_relations.jsonl")
    content = [digest_of_content(data / name) for name in files if (data / name).exists()]
    source = digest_of_content(gen_source) if isinstance(gen_source, str) else gen_source
    folder = cache / "gens" / digest([content, source, lora, sections, seed])[:12]

    def train(output: Path) -> dict[str, Any]:
        gen = new_gen(gen_source, tokenizer, seed)
        ffn_name(gen)  # an architecture without a known key is refused before it is trained
        facts: dict[str, Any] = {"parameters": gen.num_parameters()}
        if sections["pretraining"]:
            texts = data / "other_relations.jsonl"
            facts["pretraining_loss"] = train_gen(gen, tokenizer, texts, sections["pretraining"], output, seed)
        trained = with_lora(gen, lora) if lora else gen
        facts["loss"] = train_gen(trained, tokenizer, data / "train.jsonl", sections["training"], output, seed)
        if lora:
            gen = trained.merge_and_unload()
        gen.save_pretrained(output)
        tokenizer.save_pretrained(output)
        return facts

    return folder, stage(folder, train, f"{arm}, seed {seed}: Gen")


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

    gen.enable_input_require_grads()  # gradient checkpointing needs an input that has a gradient
    return get_peft_model(gen, LoraConfig(task_type="CAUSAL_LM", **options))


def size_of(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
