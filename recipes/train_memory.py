"""
Train an MLP memory on the keys of a token datastore, and fit how a memory joins Gen on held-out text.

    python recipes/train_memory.py --model out --memory mem --output_dir mlp --learning_rate 1e-5 --num_train_epochs 2
    accelerate launch recipes/train_memory.py --model out --memory mem --output_dir mlp --kl_weight 0.5 \\
        --fit_file fit.jsonl
    python recipes/train_memory.py --model out --memory mem --fit_only true --fit_file fit.jsonl

The keys are read from their files in shuffled blocks. Any option of `transformers.TrainingArguments` may be given.
`--resume_from_checkpoint` continues a run. The datastore, `--seed`, `--validation_split`, `--kl_weight` and
`--intermediate_size` must be the same. With `--fit_file`, the weight, temperature and (of a KNNMemory) k with the
lowest perplexity are written into the config of the memory, with a hash of the text that they were fitted on. All that
was tried is written into `memory_fit.json` next to it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cli import check_options, clear_errors, parse, refuse_given, table

from shared.memory_arguments import MEMORY_TRAINING_ARGUMENTS, MemoryTrainingScriptArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([MemoryTrainingScriptArguments, MEMORY_TRAINING_ARGUMENTS], __doc__)

import torch
from transformers import set_seed

from modeling_cosup import KNNMemory, MLPMemory
from modeling_cosup.files_cosup import write_json
from modeling_cosup.opening_cosup import load_memory
from modeling_cosup.token_keys_cosup import window_size
from trainer.judging.figures import shown
from trainer.judging.overlap import NgramHashes
from trainer.judging.perplexity import gen_scores, kept_ids_of
from trainer.memory import MemoryTrainer
from trainer.memory_args import MemoryTrainingArguments
from trainer.memory_fit import MemoryFit, fit_memory_config, fit_record, write_memory_config
from trainer.reports.perplexity import shown_overlap
from trainer.watch import last_complete_checkpoint

from shared.indexes import faiss_options
from shared.processes import set_cpu_threads
from shared.progress_bars import progress_bars
from shared.token_memories import load_gen, read_documents

NO_OUTPUT_DIR = "trainer_output"  # what TrainingArguments takes if none is given
TRAINING_OPTIONS = ("learning_rate", "num_train_epochs", "kl_weight", "validation_split", "resume_from_checkpoint")


def main() -> None:
    """Train a memory, or take the one that is given, and fit it."""
    script, args = parse([MemoryTrainingScriptArguments, MEMORY_TRAINING_ARGUMENTS], __doc__)
    with clear_errors(), progress_bars(hidden=bool(args.disable_tqdm)):
        set_cpu_threads(script.num_threads, args.use_cpu)
        check(script, args)
        if not script.fit_only:
            MLPMemory.check_save_directory(str(args.output_dir))
        memory = load_memory(script.memory, **faiss_options(script))
        if not script.fit_only and not isinstance(memory, KNNMemory):
            raise ValueError(f"--memory {script.memory} has no keys to train on; --fit_only true fits it.")
        model, tokenizer = load_gen(script.model, script.dtype)
        model.to(args.device)
        memory.check_model(model, tokenizer)
        folder = Path(script.memory)
        datastore = memory if isinstance(memory, KNNMemory) else None
        is_main_process = True
        if not script.fit_only:
            folder = Path(args.output_dir)
            trainer = train(script, args, model, tokenizer, memory)
            memory = trainer.model
            is_main_process = trainer.is_world_process_zero()
        if script.fit_file and is_main_process:
            fit(script, model, tokenizer, memory, folder, datastore)


def check(script: MemoryTrainingScriptArguments, args: MemoryTrainingArguments) -> None:
    """
    Check the options before anything is loaded.

    Raises:
        `ValueError`: names the option.
    """
    for name in ("intermediate_size", "max_fit_tokens", "max_length", "stride"):
        value = getattr(script, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected at least 1.")
    if script.fit_file and not Path(script.fit_file).is_file():
        raise FileNotFoundError(f"--fit_file {script.fit_file}: no such file.")
    if script.fit_only and not script.fit_file:
        raise ValueError("--fit_only needs a --fit_file: held-out text.")
    if script.fit_only and not Path(script.memory).is_dir():
        raise ValueError(f"--memory {script.memory}: --fit_only writes into a folder, and this is not one.")
    if script.fit_only:
        if args.output_dir != NO_OUTPUT_DIR:
            raise ValueError(f"--output_dir {args.output_dir}: --fit_only writes into the folder of --memory.")
        reason = "is for training, and --fit_only trains nothing"
        refuse_given(script, ("intermediate_size",), reason)
        refuse_given(args, TRAINING_OPTIONS, reason)


def train(
    script: MemoryTrainingScriptArguments,
    args: MemoryTrainingArguments,
    model: Any,
    tokenizer: Any,
    datastore: KNNMemory,
) -> MemoryTrainer:
    """Train an MLP memory, and save it with its losses; return its trainer."""
    set_seed(args.seed)
    memory = MLPMemory.from_gen(model, script.intermediate_size, tokenizer)
    checkpoint = checkpoint_to_resume(args, memory)
    trainer = MemoryTrainer(memory, args, datastore)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    if len(trainer.held_out):
        trainer.save_metrics("eval", trainer.evaluate())
    return trainer


def checkpoint_to_resume(args: MemoryTrainingArguments, memory: MLPMemory) -> str | None:
    """
    Return the folder of the checkpoint to resume from, `None` without `--resume_from_checkpoint`.

    Raises:
        `ValueError`: if there is none, or if it is of a memory of another Gen or size.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, "false", "False"):
        return None
    folder = last_complete_checkpoint(str(args.output_dir)) if wanted in ("true", "True") else wanted
    saved = MLPMemory.from_pretrained(folder)
    if saved.gen_fingerprint != memory.gen_fingerprint:
        raise ValueError(f"{folder} is of a memory of another Gen: start anew.")
    if saved.intermediate_size != memory.intermediate_size:
        raise ValueError(
            f"--intermediate_size is {memory.intermediate_size}, and {folder} has {saved.intermediate_size}: give the"
            " same, or start anew."
        )
    return folder


def fit(
    script: MemoryTrainingScriptArguments,
    model: Any,
    tokenizer: Any,
    memory: KNNMemory | MLPMemory,
    folder: Path,
    datastore: KNNMemory | None,
) -> None:
    """
    Fit the memory on held-out text, write its config and what was tried, and print the best.

    Warns if the `datastore`, which is the memory or what it was trained on, holds the text, or is not known.
    """
    max_length, stride = window_size(model, script.max_length, script.stride)
    kept_ids = kept_ids_of(model)
    parts: list[tuple[torch.Tensor, ...]] = []
    num_tokens = 0
    documents = NgramHashes(read_documents(script.fit_file, tokenizer))
    for scores in gen_scores(model, documents, kept_ids, max_length=max_length, stride=stride, batch_size=1):
        parts.append((scores.states.keys, scores.states.values, scores.lm, scores.lm_kept))
        num_tokens += len(scores.lm)
        if num_tokens >= script.max_fit_tokens:
            break
    if not parts:
        raise ValueError(f"{script.fit_file}: no document has a token to predict; each needs two or more.")
    keys, values, lm, lm_kept = (torch.cat(part)[: script.max_fit_tokens] for part in zip(*parts, strict=True))
    if isinstance(memory, MLPMemory):  # a datastore is searched in its files
        memory.to(keys.device)
    found = fit_memory_config(memory, keys, values, lm, lm_kept, kept_ids)
    overlap = None if datastore is None else documents.overlap(datastore)
    record = fit_record(script.fit_file, len(lm), overlap)
    write_memory_config(memory, folder, found.memory_config, record)
    write_json(folder / "memory_fit.json", {"fit_file": script.fit_file, **record, **asdict(found)})
    print_fit(found, len(lm), folder, len(memory) if isinstance(memory, KNNMemory) else None)
    if overlap is None:
        print(f"warning: not checked: {script.memory} does not record whether it was trained on {script.fit_file}.")
    elif overlap:
        share = f"{shown_overlap(overlap)} of {script.fit_file}"
        print(f"warning: {share} is in the datastore, as 16-grams or as short documents: the weight is too high.")


def print_fit(found: MemoryFit, num_tokens: int, folder: Path, num_entries: int | None = None) -> None:
    """Print what was found, and perplexities with and without the memory; `num_entries` are those of a datastore."""
    config = found.memory_config
    rows = [
        ("perplexity of Gen alone", shown(found.lm_perplexity, "perplexity")),
        ("with the memory", shown(found.perplexity, "perplexity")),
        ("weight", f"{config.weight:g}"),
        ("temperature", f"{config.temperature:.4g}"),
        ("k", f"{config.k:,}"),
    ]
    print(
        f"Fitted on {num_tokens:,} held-out tokens, {len(found.trials)} settings; written to {folder}\n{table(rows)}"
    )
    if num_entries is not None and config.k == max(trial["k"] for trial in found.trials) < num_entries:
        print("The best k is the largest that was tried: more neighbours may be better.")


if __name__ == "__main__":
    main()
