"""Arguments that say which loss teaches which part of the model; imports no torch."""

from dataclasses import dataclass, field
from typing import Any

GRADIENTS = ("both", "gen", "emb_seq")  # where the gradient of the NSP loss goes


@dataclass
class AblationArguments:
    """
    Ablations of the losses: what does each supervision give to the other?

    Args:
        nsp_gradient (`str`): where the gradient of the NSP loss goes.
            `"both"`: to queries and passages (the method).
            `"gen"`: to queries alone; passage embeddings are constants.
            `"emb_seq"`: to passages alone; query embeddings are constants, so Gen learns next tokens alone, and
            Emb_seq follows its states.
        isolate_queries (`bool`): no gradient of the NTP loss reaches a state at `[NSP]`. The keys and values of
            `[NSP]` are constants in Gen's attention, so later tokens read the query without changing it. It needs an
            attention implementation of transformers, and no gradient checkpointing, nor FSDP's.
        symmetric_nsp (`bool`): also train passages to find their query: `reverse_nsp_loss` is the cross-entropy of
            each passage over all queries of the global batch. Both directions get half of λ.
        gradient_cosine_steps (`int`, *optional*): once in this many steps, also log two figures. `gradient_cosine` is
            the cosine between the gradients of the NTP loss and of the NSP loss with respect to Gen's weights.
            `gradient_ratio` is the norm of λ times the second gradient over the norm of the first. Such a step costs
            as much as three, and holds two more copies of Gen's gradients.
    """

    nsp_gradient: str = field(
        default="both", metadata={"help": "both, gen or emb_seq: where the gradient of the NSP loss goes (ablation)."}
    )
    isolate_queries: bool = field(
        default=False, metadata={"help": "Keep the gradient of the NTP loss from the states at [NSP] (ablation)."}
    )
    symmetric_nsp: bool = field(
        default=False, metadata={"help": "Also train each passage to find its query among all queries of the batch."}
    )
    gradient_cosine_steps: int | None = field(
        default=None,
        metadata={"help": "Every so many steps, log the cosine between the gradients of both losses in Gen."},
    )


def check_ablations(args: Any) -> None:
    """
    Check the ablations against the supervision, before a model is loaded.

    Args:
        args ([`CoSupTrainingArguments`]): their module imports this one, so it cannot be imported here.

    Raises:
        `ValueError`: naming the argument.
    """
    for name in ("nsp_gradient", "isolate_queries", "symmetric_nsp", "gradient_cosine_steps"):
        if getattr(args, name) in (None, False, "both"):
            continue
        if args.supervision != "co" and (name != "symmetric_nsp" or args.distills or not args.trains_embeddings):
            raise ValueError(
                f"{name} compares or changes the two losses of supervision='co', and supervision is"
                f" {args.supervision!r}: leave it out."
            )
    if args.isolate_queries and args.gradient_checkpointing:
        raise ValueError(
            "isolate_queries changes the attention of a forward, which gradient_checkpointing would compute again"
            " without it: leave one of them out."
        )
    if args.isolate_queries and args.train_on_passages:
        raise ValueError(
            "isolate_queries keeps next token prediction from the states at [NSP], from which train_on_passages"
            " predicts the first token of a passage: leave one of them out."
        )
    if args.gradient_cosine_steps is not None and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "gradient_cosine_steps compares the gradients of one batch, and gradient_accumulation_steps adds several:"
            " give nsp_batch_size instead."
        )
    if args.gradient_cosine_steps is not None and args.freeze_gen:
        raise ValueError("gradient_cosine_steps compares gradients of Gen, and freeze_gen leaves it without any.")
    if args.symmetric_nsp and args.gather == "detached":
        raise ValueError(
            "symmetric_nsp compares passages with the queries of all ranks, with their gradients, and"
            " gather='detached' has none of other ranks: choose 'global' or 'local'."
        )
