"""Train a Gen for an experiment with token memories, on plain sentences with the Trainer of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.token_keys_cosup import document_ids

IGNORED = -100  # label of a position that is not trained


class Sentences(Dataset):
    """Rows of token ids: BOS (if the tokenizer has one), a text and EOS (likewise)."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.rows = [document_ids(line["text"], tokenizer) + end for line in read_lines(path)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[index]


def collate(rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Return a padded batch. Padding is masked by position: its id may be the id of EOS."""
    ids, mask = pad_rows(rows)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def new_gen(gen: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Load a checkpoint in float32, or make a model from scratch, with the vocabulary of the tokenizer."""
    set_seed(seed)
    if isinstance(gen, str):
        return AutoModelForCausalLM.from_pretrained(gen, dtype=torch.float32)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **gen})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train_gen(
    gen: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_file: Path,
    options: dict[str, Any],
    output_dir: Path,
    seed: int,
    callbacks: list | None = None,
) -> float:
    """
    Train Gen, in place, on the texts of a file.

    Args:
        gen (`PreTrainedModel`): the model, or a PEFT model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        train_file (`Path`): JSON Lines with `text`.
        options (`dict`): of `TrainingArguments`.
        output_dir (`Path`): folder of checkpoints, if options ask for them.
        seed (`int`): seed of the order of the texts.
        callbacks (`list`, *optional*): callbacks of the Trainer.

    Returns:
        `float`: the mean training loss.
    """
    defaults = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "epoch"}
    args = TrainingArguments(str(output_dir), **{**defaults, **options, "seed": seed})
    trainer = Trainer(
        gen, args, data_collator=collate, train_dataset=Sentences(train_file, tokenizer), callbacks=callbacks
    )
    loss = trainer.train().training_loss
    gen.eval()
    return loss
