"""What CoSupTrainer takes in place of Trainer's arguments, and what it refuses."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import tokenizer_fingerprint

from .batching import CoSupDataCollator
from .training_args import CoSupTrainingArguments, nearest

# arguments of Trainer that have no meaning here, and why
REFUSED = {
    "compute_loss_func": (
        "it would get the output of one micro-batch, and the NSP loss is over all of them and all ranks."
        " A loss is added in trainer/losses.py"
    ),
    "preprocess_logits_for_metrics": (
        "an evaluation keeps no logits. compute_metrics gets the embeddings of queries and passages"
    ),
}

# fields that must be equal to those of the default collator
SET_BY_ARGUMENTS = ("nsp_token_id", "supervision", "encoder_queries", "mask_duplicates", "max_instances", "max_tokens")
# fields that may be on only if they are on in the default collator
OFF_WHERE_WRONG = ("padding_free", "padding_free_passages", "shorten_first_pass")

RENAMED = {"tokenizer": "processing_class"}  # names that Trainer had in earlier releases


def check_trainer_arguments(refused: Mapping[str, Any], names: Iterable[str]) -> None:
    """
    Raise for arguments that CoSupTrainer does not have.

    Args:
        refused (`dict`): these arguments, by name. One of `Trainer`'s that is `None` counts as not given.
        names (`Iterable[str]`): of the arguments that it has.

    Raises:
        `ValueError`: for an argument that `Trainer` has and that has no meaning here.
        `TypeError`: for an unknown one, with the nearest name.
    """
    for name, value in refused.items():
        if name in RENAMED:
            raise TypeError(f"CoSupTrainer has no argument {name!r}: as in Trainer, it is named {RENAMED[name]}.")
        if name not in REFUSED:
            raise TypeError(f"CoSupTrainer has no argument {name!r}{nearest(name, names)}")
        if value is not None:
            raise ValueError(f"{name} has no meaning here: {REFUSED[name]}.")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raise if a given optimiser holds no weight that is trained, such as one made before the adapters."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(
            "The optimizer in `optimizers` holds no weight that is trained, so nothing would be learnt. With"
            " peft_config or frozen parts, give optimizer_cls_and_kwargs instead."
        )


def read_by_tokenizing(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> dict[str, Any]:
    """Return all that the token ids of an instance depend on, by name."""
    names = (
        *("nsp_token_id", "cs_token_id", "ce_token_id", "query_from", "query_prompt", "passage_template"),
        *("passage_prompt", "max_passage_length", "emb_seq_add_bos_token", "emb_seq_add_eos_token"),
    )
    return {
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "chat_template": model.tokenizer.chat_template,
        "emb_seq_tokenizer": tokenizer_fingerprint(model.emb_seq_tokenizer),
        "max_length": args.max_length,
        "train_on_passages": args.train_on_passages,
        "candidates_from": args.candidates_from,
        **{name: getattr(model.config, name) for name in names},
    }


def check_collator(collator: object, expected: CoSupDataCollator) -> None:
    """
    Check that a caller's collator makes the batches that the model and the arguments ask for.

    Args:
        collator: `data_collator` of [`CoSupTrainer`].
        expected ([`CoSupDataCollator`]): the one that it would make by default.

    Raises:
        `TypeError`: for another class.
        `ValueError`: for a field that would change the losses, ignore a limit of memory, or mix rows.
    """
    if not isinstance(collator, CoSupDataCollator):
        raise TypeError(
            f"data_collator is a {type(collator).__name__}, expected a CoSupDataCollator, or a subclass that changes"
            " its instances or batches."
        )
    for name in SET_BY_ARGUMENTS:
        value, needed = getattr(collator, name), getattr(expected, name)
        if value != needed:
            raise ValueError(f"data_collator has {name}={value!r}, and model and arguments need {needed!r}.")
    for name in OFF_WHERE_WRONG:
        if getattr(collator, name) and not getattr(expected, name):
            raise ValueError(f"data_collator has {name}=True, which model and arguments do not allow.")


def check_sharding(args: CoSupTrainingArguments, distributed_type: DistributedType, fsdp_plugin: Any = None) -> None:
    """
    Refuse what sharded models cannot do.

    `nsp_batch_size`, `clip_gen_only` and `control_token_lr` need DDP or FSDP2: DeepSpeed takes one backward pass per
    step, clips by itself and has an optimiser of its own; FSDP1 computes the norms of shards, and its shards have no
    rows. `bf16_full_eval` and `fp16_full_eval` need whole weights, which are kept while they are converted. Candidates
    need whole weights too: ranks encode and read different numbers of rows. `isolate_queries` needs a forward that is
    not computed again, by FSDP's own checkpoints either.
    """
    kind = distributed_type.value
    if args.isolate_queries and getattr(fsdp_plugin, "activation_checkpointing", False):
        raise ValueError(
            "isolate_queries changes the attention of a forward, which activation_checkpointing of FSDP's config would"
            " compute again without it: leave one of them out."
        )
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(args, name):
                raise ValueError(
                    f"{name} would change the weights of a sharded model, under {kind}: leave it out. An evaluation"
                    " computes in bfloat16 if bf16=True."
                )
        if args.candidates_from is not None:
            raise ValueError(
                f"Candidates are retrieved and read by each rank for itself, which needs the whole model, and {kind}"
                " shards it. One process and DDP work."
            )
    is_fsdp1 = distributed_type == DistributedType.FSDP and getattr(fsdp_plugin, "fsdp_version", 1) != 2
    if distributed_type != DistributedType.DEEPSPEED and not is_fsdp1:
        return
    for name in ("nsp_batch_size", "clip_gen_only", "control_token_lr"):
        if getattr(args, name):
            raise ValueError(f"{name} works under DDP and FSDP2, not under {kind} as it is configured.")
