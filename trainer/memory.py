"""Train an MLP memory on the keys of a token datastore."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.utils import logging

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.files_cosup import read_json, write_json

from .memory_args import MemoryTrainingArguments
from .memory_keys import ShuffledBlocks, StoredKeys, held_out_rows
from .running import widest_float

logger = logging.get_logger(__name__)

TRAINING_FILE = "memory_training.json"  # next to a saved memory: what it was trained on
EVALUATED = ("eval_loss", "eval_ntp_loss", "eval_knn_kl")


def train_mlp_memory(
    memory: MLPMemory,
    datastore: KNNMemory,
    *,
    batch_size: int = 256,
    memory_config: MemoryConfig | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
    output_dir: str | Path | None = None,
    **training_arguments: Any,
) -> dict[str, float]:
    """
    Train an MLP memory in place on the keys of a datastore; see [`MemoryTrainer`].

    Args:
        memory ([`MLPMemory`]): of the Gen whose keys the datastore holds.
        datastore ([`KNNMemory`]): keys and the tokens after them.
        batch_size (`int`): keys per step.
        memory_config ([`MemoryConfig`], *optional*): see [`MemoryTrainer`].
        seed (`int`): of the order of the keys and of the documents that are held out.
        show_progress_bar (`bool`): show progress and logs.
        output_dir (`str` or `Path`, *optional*): where checkpoints go; without it nothing is written.
        **training_arguments: fields of [`MemoryTrainingArguments`], such as `num_train_epochs`, `learning_rate`,
            `kl_weight`, `validation_split`, `weight_decay`, `warmup_steps`, `bf16` or `save_strategy`.

    Returns:
        `dict[str, float]`: `train_loss` and, with `validation_split`, `eval_loss`, `eval_ntp_loss` and, with
        `kl_weight`, `eval_knn_kl`, of the last epoch.

    Raises:
        `ValueError`: see [`MemoryTrainer`].
    """
    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "seed": seed,
        "disable_tqdm": not show_progress_bar,
        "logging_strategy": "steps" if show_progress_bar else "no",
        "eval_strategy": "epoch" if training_arguments.get("validation_split") else "no",
        "save_strategy": "no",
        "report_to": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        args = MemoryTrainingArguments(output_dir=str(output_dir or folder), **(settings | training_arguments))
        trainer = MemoryTrainer(memory, args, datastore, memory_config)
        metrics = {"train_loss": trainer.train().training_loss}
    for entry in trainer.state.log_history:
        metrics |= {name: value for name, value in entry.items() if name in EVALUATED}
    return metrics


class MemoryTrainer(Trainer):
    """
    A `Trainer` whose data are the keys of a datastore, read from its files in shuffled blocks.

    Checkpoints are memories, and a run can be resumed with the same datastore, `seed`, `validation_split` and
    `kl_weight`. [`MemoryTrainingArguments`] says what the loss is.

    Args:
        memory ([`MLPMemory`]): trained in place.
        args ([`MemoryTrainingArguments`]): of the run.
        datastore ([`KNNMemory`]): keys and the tokens after them.
        memory_config ([`MemoryConfig`], *optional*): `k` and `temperature` of p_kNN; defaults to the datastore's.
        callbacks (`list`, *optional*): as for `Trainer`.

    Raises:
        `ValueError`: for keys of another Gen, width or vocabulary, and for a datastore that is too small to hold out
            documents, or to leave out an entry. `train` raises it for a checkpoint of a run with other data.
    """

    def __init__(
        self,
        memory: MLPMemory,
        args: MemoryTrainingArguments,
        datastore: KNNMemory,
        memory_config: MemoryConfig | None = None,
        callbacks: list | None = None,
    ) -> None:
        _check_training(memory, datastore, args)
        self.datastore = datastore
        self.kl_weight = args.kl_weight
        self.validation_split = args.validation_split
        self.knn_config = memory_config or datastore.memory_config
        self.held_out = held_out_rows(datastore, args.validation_split, args.seed)
        if 0 < len(self.held_out) < args.world_size:
            raise ValueError(
                f"validation_split {args.validation_split} holds out {len(self.held_out)} keys, fewer than the "
                f"{args.world_size} processes: raise it, or leave it out."
            )
        super().__init__(
            model=memory,
            args=args,
            data_collator=_as_it_is,
            train_dataset=StoredKeys(datastore),
            eval_dataset=StoredKeys(datastore) if len(self.held_out) else None,
            callbacks=callbacks,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return ShuffledBlocks(len(self.datastore), self.held_out, self.args.seed)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the number of keys in an epoch, from which `Trainer` computes samples per second."""
        return len(self.datastore) - len(self.held_out)

    def compute_loss(  # type: ignore[override]  # the arguments that Trainer passes
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the mean loss of a batch."""
        losses = self._losses(model, inputs)
        loss = losses["loss"].mean()
        return (loss, losses) if return_outputs else loss

    def _losses(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return, by the names of the vocabulary of figures, the losses `(n,)` of a batch."""
        keys, labels = inputs["keys"].float(), inputs["labels"]  # (n, d), (n,)
        log_probs = model(keys).float().log_softmax(-1)  # (n, V)
        losses = {"ntp_loss": -log_probs.gather(1, labels[:, None])[:, 0]}
        losses["loss"] = losses["ntp_loss"]
        if self.kl_weight:
            config = self.knn_config
            neighbors = self.datastore.search(keys, config.k, exclude_rows=inputs["rows"])
            values, distances = neighbors.values.to(labels.device), neighbors.distances.to(labels.device)
            losses["knn_kl"] = knn_kl(log_probs, values, distances, config.temperature)
            losses["loss"] = (1 - self.kl_weight) * losses["ntp_loss"] + self.kl_weight * losses["knn_kl"]
        return losses

    @torch.no_grad()
    def evaluate(  # type: ignore[override]  # the rows that are held out are the only ones to evaluate
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean losses over the keys that are held out, and log them."""
        memory, size = self.model, self.args.eval_batch_size
        assert memory is not None
        memory.eval()
        rows = self.held_out[self.args.process_index :: self.args.world_size]
        sums: dict[str, torch.Tensor] = {}
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(StoredKeys(self.datastore).__getitems__(rows[start : start + size]))
            for name, losses in self._losses(memory, batch).items():
                sums[name] = sums.get(name, 0.0) + losses.to(widest_float(losses.device)).sum()
        metrics = {}
        for name, total in sums.items():
            everywhere = self.accelerator.reduce(total, reduction="sum")
            metrics[f"{metric_key_prefix}_{name}"] = float(everywhere) / len(self.held_out)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the memory, which is also what a checkpoint resumes from, and what it was trained on."""
        folder = Path(output_dir or str(self.args.output_dir))
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        write_json(folder / TRAINING_FILE, self._trained_on())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """
        Load a checkpoint. Refuse one of other data or order.

        A resumed run skips by count, and would skip the wrong rows.
        """
        path = Path(resume_from_checkpoint, TRAINING_FILE)
        if not path.is_file():
            logger.warning(f"{resume_from_checkpoint} does not say which datastore it was trained on: not checked.")
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        before = read_json(path)
        different = [name for name, value in self._trained_on().items() if before.get(name) != value]
        if different:
            raise ValueError(
                f"{resume_from_checkpoint} is of a run with another {', '.join(different)}: resume it with the same,"
                " or start anew."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _trained_on(self) -> dict[str, Any]:
        """Return what decides which rows are trained, in which order, and what the loss is."""
        return {
            "datastore": self.datastore.fingerprint,
            "seed": self.args.seed,
            "validation_split": self.validation_split,
            "kl_weight": self.kl_weight,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_training(memory: MLPMemory, datastore: KNNMemory, args: MemoryTrainingArguments) -> None:
    """Raise a `ValueError` unless the memory can be trained on the datastore."""
    made_for, made_by = memory.gen_fingerprint, datastore.config["fingerprint"]
    different = [name for name in made_for if made_by.get(name, made_for[name]) != made_for[name]]
    if different:
        raise ValueError(f"The memory is of another Gen than the datastore: {', '.join(different)} differ.")
    if memory.hidden_size != datastore.key_size:
        raise ValueError(
            f"The memory reads keys of width {memory.hidden_size}, the datastore's have width {datastore.key_size}."
        )
    if memory.vocab_size < datastore.vocab_size:
        raise ValueError(
            f"The memory predicts {memory.vocab_size:,} tokens, the datastore's vocabulary has"
            f" {datastore.vocab_size:,}."
        )
    if args.kl_weight and len(datastore) < 2:
        raise ValueError("kl_weight needs a datastore of at least 2 keys: a key's own entry is left out.")


# ---------------------------------------------------------------------- the target of a datastore


def knn_kl(
    log_probs: torch.Tensor, values: torch.Tensor, distances: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    Return KL(p_kNN ‖ p), where p_kNN(v) is proportional to the sum of exp(-d²/T) over the neighbours of value v. It is
    0 for a key without neighbours.

    Args:
        log_probs (`torch.FloatTensor` of shape `(n, V)`): log p.
        values (`torch.LongTensor` of shape `(n, k)`): tokens of the neighbours.
        distances (`torch.FloatTensor` of shape `(n, k)`): squared L2, inf where nothing was found.
        temperature (`float`): T.

    Returns:
        `torch.FloatTensor` of shape `(n,)`.
    """
    weights = (-distances / temperature).softmax(1).nan_to_num(0.0)  # (n, k); all 0 where nothing was found
    values, order = values.sort(1)
    weights = weights.gather(1, order)
    is_new = F.pad((values[:, 1:] != values[:, :-1]).long(), (1, 0))
    groups = is_new.cumsum(1)  # (n, k): neighbours of one value share a number
    log_knn = torch.zeros_like(weights).scatter_add(1, groups, weights).gather(1, groups).log()
    terms = weights * (log_knn - log_probs.gather(1, values))
    return terms.masked_fill(weights == 0, 0.0).sum(1)  # of far neighbours, where 0 · log 0 would be NaN
