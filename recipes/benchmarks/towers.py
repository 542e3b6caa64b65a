"""
What two towers, one tied model and separate supervision cost: training, checkpoint, index and answers.

    python recipes/benchmarks/towers.py --gen HuggingFaceTB/SmolLM2-135M --train_file train.jsonl \\
        --corpus_file corpus.jsonl --eval_file questions.jsonl

Each arm trains a few steps, embeds a corpus and answers questions, each in a process of its own, so that its peak
memory is its own: on a CPU the resident memory above that of a process that has only imported the libraries. The arms
take turns in `--repeats` rounds. Every answer is forced to retrieve once, because a few steps do not teach when to.
What the arms learn is measured by recipes/experiments/tied.yaml.

Prints a table and writes `--output_file`.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import parse

import torch
from transformers import TrainerCallback, set_seed

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.files_cosup import write_json
from trainer import CoSupTrainer, CoSupTrainingArguments, load_corpus, load_instances
from trainer.judging.answers import answer
from trainer.judging.tasks import Task

from measuring import GB, Meter, print_hardware, print_table, rotated, spread, spread_text

MB = 1e6
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # supervision, and how the model is built
    "co, two towers": ("co", {"tie_emb_seq": False}),
    "co, tied": ("co", {"tie_emb_seq": True}),
    "separate, one encoder": ("separate", {"query_from": "emb_seq"}),
}


@dataclass
class TowersArguments:
    """Options of the benchmark."""

    gen: str = field(metadata={"help": "Name or path of Gen; Emb_seq is a copy of it, or Gen itself."})
    train_file: str = field(metadata={"help": "Training instances."})
    corpus_file: str = field(metadata={"help": "Passages; the first --num_passages are embedded."})
    eval_file: str = field(metadata={"help": "Questions; the first --num_questions are answered."})
    steps: int = field(default=4, metadata={"help": "Optimiser steps; the first is not timed."})
    batch_size: int = field(default=16, metadata={"help": "Instances of a step (GradCache)."})
    micro_batch_size: int = field(default=8, metadata={"help": "Instances of a micro-batch."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the layers."})
    num_passages: int = field(default=256, metadata={"help": "Passages that are embedded."})
    num_questions: int = field(default=32, metadata={"help": "Questions that are answered, in one batch."})
    max_new_tokens: int = field(default=16, metadata={"help": "Decoded tokens of an answer."})
    repeats: int = field(default=3, metadata={"help": "Rounds of every arm."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; defaults to all cores."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows of control tokens and of the order of the data."})
    output_file: str | None = field(default=None, metadata={"help": "Where the numbers go, as JSON."})


class StepTimes(TrainerCallback):
    """The seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def device_of(script: TowersArguments) -> torch.device:
    """Return the device, and set threads on a CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    torch.set_num_threads(script.num_threads or torch.get_num_threads())
    return torch.device("cpu")


def train(name: str, script: TowersArguments, folder: str) -> dict[str, float]:
    """Build and train the model of an arm, save it in `folder`, and return its costs."""
    meter = Meter(device_of(script))
    supervision, settings = ARMS[name]
    times = StepTimes()

    def run() -> CoSupForCausalLM:
        set_seed(script.seed)
        model = CoSupForCausalLM.from_gen_and_emb_seq(script.gen, model_kwargs={"dtype": "float32"}, **settings)
        args = CoSupTrainingArguments(
            f"{folder}/training",
            supervision=supervision,
            max_steps=script.steps,
            nsp_batch_size=script.batch_size,
            per_device_train_batch_size=script.micro_batch_size,
            torch_compile=script.torch_compile,
            bf16=True,
            seed=script.seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        instances = load_instances(script.train_file)[: script.batch_size * script.steps]
        CoSupTrainer(model, args, train_dataset=instances, callbacks=[times]).train()
        return model

    model, _, peak = meter(run)
    model.save_pretrained(folder)
    num_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "parameters": model.num_parameters(),
        "seconds_per_step": statistics.median(times.seconds[1:]),
        "training_memory": peak,
        "checkpoint_bytes": num_bytes,
    }


def embed(name: str, script: TowersArguments, folder: str) -> dict[str, float]:
    """Embed the corpus with the model in `folder`, and return the costs."""
    device = device_of(script)
    corpus = load_corpus(script.corpus_file)[: script.num_passages]

    def run() -> PassageIndex:
        model = CoSupForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        return model.build_index(corpus, show_progress_bar=False)

    index, seconds, peak = Meter(device)(run)
    index.save_pretrained(f"{folder}/index")
    num_bytes = sum(path.stat().st_size for path in Path(folder, "index").rglob("*.safetensors"))
    return {"index_seconds": seconds, "index_memory": peak, "index_bytes": num_bytes / len(index)}


def answer_questions(name: str, script: TowersArguments, folder: str) -> dict[str, float]:
    """Answer the questions with the model and the index in `folder`, and return the costs."""
    device = device_of(script)
    task = Task("questions", script.eval_file, index=f"{folder}/index", max_eval_samples=script.num_questions)
    questions = task.read_questions()
    _, settings = ARMS[name]
    queries_from_gen = "query_from" not in settings

    def load() -> tuple[CoSupForCausalLM, Any]:
        options = {"dtype": torch.bfloat16, "load_emb_seq": not queries_from_gen}
        model = CoSupForCausalLM.from_pretrained(folder, **options).to(device)
        return model, model.load_index(f"{folder}/index")

    def run() -> tuple[int, float]:
        model, index = load()
        options: dict[str, Any] = {"batch_size": len(questions), "max_new_tokens": script.max_new_tokens}
        start = time.perf_counter()
        predictions = answer(model, questions, index, "forced", show_progress_bar=False, **options)
        seconds = time.perf_counter() - start
        retrieved = sum(bool(prediction["retrievals"]) for prediction in predictions)
        if retrieved != len(questions):
            raise RuntimeError(f"{retrieved} of {len(questions)} answers retrieved, expected all.")
        return len(predictions), seconds

    (count, seconds), _, peak = Meter(device)(run)
    return {"answers_per_second": count / seconds, "answering_memory": peak}


def measure(name: str, script: TowersArguments) -> dict[str, float]:
    """Return all costs of an arm, each part measured in a new process."""
    spawn = multiprocessing.get_context("spawn")
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            for part in (train, embed, answer_questions):
                costs |= pool.submit(part, name, script, folder).result()
    print(f"  {name}: {costs}", flush=True)
    return costs


COLUMNS = {  # header -> cost, its unit, and the format of a cell
    "parameters, M": ("parameters", MB, ".0f"),
    "s / step": ("seconds_per_step", 1, ".2f"),
    "training, peak GB": ("training_memory", GB, ".1f"),
    "checkpoint, MB": ("checkpoint_bytes", MB, ".0f"),
    "index, s": ("index_seconds", 1, ".1f"),
    "index, bytes a passage": ("index_bytes", 1, ".0f"),
    "answers / s": ("answers_per_second", 1, ".2f"),
    "answering, peak GB": ("answering_memory", GB, ".2f"),
}
RATIOS = ("seconds_per_step", "training_memory", "index_seconds", "answers_per_second", "answering_memory")


def main() -> None:
    """Run the arms, print their costs, and the ratios of each round to two towers."""
    (script,) = parse([TowersArguments], __doc__)
    results: dict[str, Any] = {**print_hardware(device_of(script)), "arguments": vars(script)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(script.repeats):
        for name in rotated(list(ARMS), turn):
            rounds[name].append(measure(name, script))
    rows = []
    for name, costs in rounds.items():
        row = [name]
        for cost, unit, style in COLUMNS.values():
            row.append(format(statistics.median(values[cost] for values in costs) / unit, style))
        rows.append(row)
    print_table(["arm", *COLUMNS], rows)
    first, *others = ARMS
    ratio_rows = []
    for name in others:
        row = [name]
        for cost in RATIOS:
            pairs = zip(rounds[name], rounds[first], strict=True)
            row.append(spread_text(spread([values[cost] / base[cost] for values, base in pairs])))
        ratio_rows.append(row)
    print_table([f"ratio to {first}", *RATIOS], ratio_rows)
    results["rounds"] = rounds
    if script.output_file:
        write_json(script.output_file, results)


if __name__ == "__main__":
    main()
