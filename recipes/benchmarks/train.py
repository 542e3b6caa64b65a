"""
Speed, memory and error of a training step, side by side in one process.

    python recipes/benchmarks/train.py --gen HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl
    python recipes/benchmarks/train.py --sections defaults    # no model and no data needed: the quickstart's world

Sections:

- `step`: forward and backward of a whole batch in each arm, interleaved, median of `--repeats` after one warm-up
- `profile`: the kinds of work that the time of a step goes into, eager and with `--torch_compile`
- `attention`: fused attention and plain products on a CPU, by length of rows; needs no model and no data
- `queries`: queries of an encoder, in rows of their own and in one row for each instance
- `nsp_batch`: memory of GradCache as its batch grows
- `duplicates`: the share of a batch's passages that repeat another one
- `precision`: loss after 300 steps in float32 and bf16
- `defaults`: the paper's optimiser and similarity next to ours

Prints tables and writes `--output_file`.
"""

import contextlib
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import parse

import torch
from transformers import set_seed

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import write_json
from trainer import CoSupTrainer, CoSupTrainingArguments, load_instances
from trainer.judging.figures import figure, shown

from measuring import print_hardware, print_table
from shared.quickstart import WorldArguments, prepare_world
from train_attention import section_attention
from train_nsp_batch import section_nsp_batch
from train_profile import section_profile
from train_queries import section_queries
from train_step import section_step

HELD_OUT = ("ntp_loss", "query_recall@1", "query_recall@5")
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    gen: str | None = field(default=None, metadata={"help": "Name or path of Gen; Emb_seq is a copy of it."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training instances; their lengths and duplicates are the benchmark's."}
    )
    sections: str = field(
        default="step,nsp_batch,duplicates,precision,defaults", metadata={"help": "Comma-separated."}
    )
    batch_size: int = field(default=8, metadata={"help": "Instances of a batch."})
    micro_batch_tokens: int = field(default=2048, metadata={"help": "Token budget of a micro-batch with GradCache."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds of every arm; each round is another batch."})
    profile_steps: int = field(default=3, metadata={"help": "Steps of the profile section, after one warm-up."})
    nsp_batch_sizes: str = field(default="8,16,32,64", metadata={"help": "NSP batches whose memory is measured."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "In every arm."})
    torch_compile: bool = field(default=False, metadata={"help": "Also measure compiled layers."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; defaults to all cores."})
    precision_steps: int = field(default=300, metadata={"help": "Steps of the precision section."})
    precision_layers: int = field(
        default=4, metadata={"help": "Layers of Gen in the precision section, few enough for a CPU."}
    )
    defaults_steps: int = field(default=300, metadata={"help": "Steps of the defaults section."})
    seed: int = field(default=0, metadata={"help": "Of everything."})
    output_file: str | None = field(default=None, metadata={"help": "Where the numbers go, as JSON."})


# ---------------------------------------------------------------------- sections


def section_duplicates(instances: list[dict], seed: int) -> list[dict[str, Any]]:
    """Return the share of passages that repeat in random batches, and of words that need not be encoded again."""
    rng = random.Random(seed)
    results = []
    for size in (8, 64, 512, 4096):
        if size > len(instances):
            continue
        passages = []
        for instance in rng.sample(instances, size):
            for segment in instance["segments"]:
                if segment["passage"]:
                    passages.append(f"{segment['passage']['title']} {segment['passage']['text']}")
        distinct = set(passages)
        num_words = sum(len(text.split()) for text in passages)
        num_distinct_words = sum(len(text.split()) for text in distinct)
        results.append(
            {
                "batch": size,
                "passages": len(passages),
                "duplicates": 1 - len(distinct) / len(passages),
                "words_spared": 1 - num_distinct_words / num_words,
            }
        )
    rows = []
    for result in results:
        shares = [f"{result['duplicates']:.1%}", f"{result['words_spared']:.1%}"]
        rows.append([str(result["batch"]), str(result["passages"]), *shares])
    print_table(["random batch", "passages", "repeated in the batch", "words saved"], rows)
    return results


def section_precision(script: Any, folder: str) -> dict[str, dict[str, float]]:
    """
    Train on real text in three precisions, with the same batches, and return the mean losses of each.

    Gen and Emb_seq are both the first layers of `--gen`. The arms are float32, bf16 autocast over float32 weights, and
    bf16 weights.
    """
    instances = load_instances(script.train_file)
    arms: dict[str, tuple[str, dict]] = {
        "float32": ("float32", {}),
        "bf16 autocast, float32 weights": ("float32", {"bf16": True}),
        "bf16 weights (no master copy)": ("bfloat16", {}),
    }
    results = {}
    for name, (dtype, options) in arms.items():
        set_seed(script.seed)
        model_kwargs = {"dtype": dtype, "num_hidden_layers": script.precision_layers}
        model = CoSupForCausalLM.from_gen_and_emb_seq(script.gen, tie_emb_seq=False, model_kwargs=model_kwargs)
        args = CoSupTrainingArguments(
            folder,
            max_steps=script.precision_steps,
            per_device_train_batch_size=script.batch_size,
            learning_rate=2e-5,
            warmup_steps=20,
            logging_steps=1,
            seed=script.seed,
            **QUIET,
            **options,
        )
        trainer = CoSupTrainer(model, args, train_dataset=instances)
        # after the constructor, which converts trained weights to float32
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        with contextlib.redirect_stdout(sys.stderr):  # a line for every step
            trainer.train()
        results[name] = mean_losses(trainer)
        print(f"  {name}: {results[name]}", flush=True)
    exact = results["float32"]
    header = ["weights and computation"]
    for loss_name in exact:
        header += [loss_name, "to float32"]
    rows = []
    for name, losses in results.items():
        row = [name]
        for loss_name in exact:
            row += [f"{losses[loss_name]:.4f}", f"{losses[loss_name] / exact[loss_name] - 1:+.2%}"]
        rows.append(row)
    print(
        f"\nMean of the last 50 of {script.precision_steps} steps of {script.batch_size} instances,"
        f" {script.precision_layers} layers, seed {script.seed}"
    )
    print_table(header, rows)
    return results


def mean_losses(trainer: CoSupTrainer, steps: int = 50) -> dict[str, float]:
    """Return the mean of each logged loss over the last `steps` steps."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-steps:]
    return {name: statistics.mean(entry[name] for entry in last) for name in last[0] if name.endswith("loss")}


def section_defaults(script: Any, folder: str) -> dict[str, dict[str, float]]:
    """
    Train with the paper's optimiser and similarity, and with modern ones, one change at a time.

    Returns:
        Held-out losses and recall on the quickstart's world, by setting.
    """
    num_instances = 64 * script.defaults_steps // 3  # three epochs, as in the paper
    world = WorldArguments(str(Path(folder) / "world"), seed=script.seed, num_train_instances=num_instances)
    paths = prepare_world(world)
    paper = {"lr_decay_per_epoch": 0.85, "clip_gen_only": True, "weight_decay": 0.0}
    modern = {"lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.01}
    arms: dict[str, tuple[dict, dict]] = {
        "the paper's: dot, λ 0.01, rate x 0.85 an epoch, clip Gen": (paper, {"similarity": "dot"}),
        "the paper's at a tenth of the rate": (paper | {"learning_rate": 2e-4}, {"similarity": "dot"}),
        "dot, λ 0.01, warm-up and cosine schedule": (modern, {"similarity": "dot"}),
        "cosine 0.05, λ 1, the paper's optimiser": (paper, {}),
        "cosine 0.05, λ 1, warm-up and cosine schedule": (modern, {}),
    }
    common = {
        "max_steps": script.defaults_steps,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "learning_rate": 2e-3,
        "bf16": True,
        "adam_beta2": 0.98,
        "logging_steps": 50,
        "seed": script.seed,
        **QUIET,
    }
    results = {}
    for setting, (options, config) in arms.items():
        set_seed(script.seed)
        model = CoSupForCausalLM.from_gen_and_emb_seq(paths["gen"], paths["emb_seq"], max_passage_length=128, **config)
        trainer = CoSupTrainer(
            model,
            CoSupTrainingArguments(folder, **{**common, **options}),
            train_dataset=load_instances(paths["train"]),
            eval_dataset=load_instances(paths["validation"]),
        )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        metrics = trainer.evaluate()
        results[setting] = {
            name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")
        }
        print(f"  {setting}: {results[setting]}", flush=True)
    print(
        f"\nHeld out, after 3 epochs of {script.defaults_steps // 3} steps on the quickstart's world,"
        f" seed {script.seed}, learning rate 2e-3 unless stated,"
    )
    print("recall in percent")
    header = ["setting", *(figure(name).label for name in HELD_OUT), figure("num_passages").label]
    rows = []
    for setting, figures in results.items():
        rows.append([setting, *(shown(figures[name], name) for name in HELD_OUT), str(figures["num_passages"])])
    print_table(header, rows)
    return results


def main() -> None:
    """Run the chosen sections, print their tables and write `--output_file`."""
    (script,) = parse([BenchmarkArguments], __doc__)
    set_seed(script.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(script.num_threads or torch.get_num_threads())
    script.bf16 = True
    results: dict[str, Any] = {**print_hardware(device), "arguments": vars(script)}
    sections = set(script.sections.split(","))
    if sections - {"attention", "defaults"} and not (script.gen and script.train_file):
        sys.exit("error: every section but `attention` and `defaults` needs --gen and --train_file.")
    with tempfile.TemporaryDirectory() as folder:
        if sections & {"step", "profile", "nsp_batch"}:
            model_kwargs = {"dtype": "float32"}
            if script.attn_implementation:
                model_kwargs["attn_implementation"] = script.attn_implementation
            model = CoSupForCausalLM.from_gen_and_emb_seq(script.gen, tie_emb_seq=False, model_kwargs=model_kwargs)
            model.to(device).train()
            if script.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            instances = load_instances(script.train_file)
            if "step" in sections:
                results["step"] = section_step(model, instances, script, folder)
            if "profile" in sections:
                results["profile"] = section_profile(model, instances, script, folder)
            if "nsp_batch" in sections:
                results["nsp_batch"] = section_nsp_batch(model, instances, script, folder)
        if "queries" in sections:
            model_kwargs = {"dtype": "float32"}
            model = CoSupForCausalLM.from_gen_and_emb_seq(
                script.gen, tie_emb_seq=False, query_from="emb_seq", model_kwargs=model_kwargs
            )
            model.to(device).train()
            results["queries"] = section_queries(model, load_instances(script.train_file), script, folder)
        if "attention" in sections:
            results["attention"] = section_attention(script)
        if "duplicates" in sections:
            results["duplicates"] = section_duplicates(load_instances(script.train_file), script.seed)
        if "precision" in sections:
            results["precision"] = section_precision(script, folder)
        if "defaults" in sections:
            results["defaults"] = section_defaults(script, folder)
    if script.output_file:
        write_json(script.output_file, results)


if __name__ == "__main__":
    main()
