"""Arguments of candidates, which instances without a passage get, and of distillation; imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Any

# the targets of each distillation, the default first, with their default temperatures; None: scores as they are
DISTILLATIONS: dict[str, dict[str, float | None]] = {
    "attention_distillation": {"attention": 0.02, "attention_shares": None},
    "perplexity_distillation": {"perplexity": 0.1, "leave_one_out": 0.1, "emdr": None},
}
SOURCES = (None, "index", "instance")  # of candidates


@dataclass
class DistillationArguments:
    """
    What an instance without a passage gets, and how the reader teaches the retriever with it (arXiv 2402.11794).

    Without candidates each argument must keep its default, because nothing reads it.

    Args:
        num_candidates (`int`): K, the number of passages that an instance without a passage gets. They stand in its
            row as `generate()` with `RetrievalConfig(top_k=K)` would write them.
        candidates_from (`str`, *optional*): `"index"` searches an index of the training corpus, which the model
            embeds, for each instance without a passage; `"instance"` searches the instance's own `candidates` alone,
            and leaves segments without candidates free text. Defaults to `"index"` with a distillation. With
            `supervision="ntp"` it trains Gen alone to read what is retrieved.
        refresh_index_steps (`int`): steps after which the corpus is embedded again, unless Emb_seq is frozen.
        distillation_target (`str`, *optional*): what the target is made of. The first two are for attention, the
            others for perplexity; the first of each kind is the default.
            `"attention"`: shares of attention, each relative to the mean share of its place in the row (see
            `position_bias`). The mean is over all instances of the step, at least two, or of an evaluation set.
            `"attention_shares"`: the shares themselves (Eq. 1 of the paper).
            `"perplexity"`: the answer's mean log-likelihood with each candidate alone.
            `"leave_one_out"`: how much likelier the answer is with a candidate than without.
            `"emdr"`: the posterior of EMDR² (arXiv 2106.05346).
        target_temperature (`float`, *optional*): the target is the softmax of these values, divided by this
            temperature; lower is sharper. Defaults to 0.02 for `"attention"`, and to 0.1 for `"perplexity"` and
            `"leave_one_out"`. By default, the other two are as in their papers: `"attention_shares"` has no softmax,
            so it is nearly flat and teaches little, and `"emdr"` has no temperature.
        rerank_candidates (`int`, *optional*): retrieve this many passages, embed them with the current weights, and
            keep the best `num_candidates`.
        index_factory (`str`, *optional*): FAISS factory string of an approximate search; exact by default.
        shuffle_candidates (`bool`): put the candidates of a training row in a random order, which depends on `seed`,
            step and instance alone; by default the best is first.
        log_indicators (`bool`): also log `indicator_1`, Gen's attention to the tokens nearest to the answer.
    """

    num_candidates: int = field(
        default=5, metadata={"help": "Passages given to an instance whose passage is unknown."}
    )
    candidates_from: str | None = field(
        default=None,
        metadata={"help": "Where these come from: index (of the corpus) or instance. Distillation: index."},
    )
    refresh_index_steps: int = field(
        default=100, metadata={"help": "Steps after which the corpus of candidates is embedded again."}
    )
    distillation_target: str | None = field(
        default=None,
        metadata={"help": "attention or attention_shares; perplexity, leave_one_out or emdr. Default: the first."},
    )
    target_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the target: lower is sharper. Default: depends on the target."}
    )
    rerank_candidates: int | None = field(
        default=None, metadata={"help": "Retrieve this many, embed them again, and keep the best num_candidates."}
    )
    index_factory: str | None = field(
        default=None,
        metadata={"help": "FAISS factory string: approximate search of candidates. Default: exact search."},
    )
    shuffle_candidates: bool = field(
        default=False, metadata={"help": "Put the candidates of a training row in random order. Default: best first."}
    )
    log_indicators: bool = field(
        default=False, metadata={"help": "Also log indicator_1: Gen's attention to the tokens nearest to the answer."}
    )


def check_candidates(args: Any) -> None:
    """
    Check the arguments of candidates and of distillation, before a model is loaded.

    Args:
        args ([`CoSupTrainingArguments`]): their module imports this one, so it cannot be imported here.

    Raises:
        `ValueError`: naming the argument.
    """
    _check_distillation(args)
    if args.candidates_from is None:
        _refuse_without_candidates(args)
        return
    if not args.distills and args.supervision != "ntp":
        raise ValueError(
            f"candidates_from retrieves passages for instances without one, which supervision={args.supervision!r}"
            " cannot train: choose 'ntp', 'attention_distillation' or 'perplexity_distillation'."
        )
    if args.distills and args.num_candidates == 1:
        raise ValueError(
            "num_candidates=1 with a distillation: there is nothing to compare a single passage with. Expected 2 or"
            " more."
        )
    if args.rerank_candidates is not None and args.rerank_candidates <= args.num_candidates:
        raise ValueError(
            f"rerank_candidates is {args.rerank_candidates}, expected more than num_candidates, {args.num_candidates}."
        )
    if args.index_factory is not None and args.candidates_from == "instance":
        raise ValueError(
            "index_factory makes the search of an index approximate, and candidates_from='instance' searches each"
            " instance's own candidates exactly: leave it out."
        )


def _check_distillation(args: Any) -> None:
    """Check the target of a distillation."""
    if not args.distills:
        for name in ("distillation_target", "target_temperature"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is of a distillation, and supervision={args.supervision!r} is none.")
        return
    targets = DISTILLATIONS[args.supervision]
    if args.distillation_target not in (None, *targets):
        raise ValueError(
            f"distillation_target is {args.distillation_target!r}, but supervision={args.supervision!r} has"
            f" {', '.join(map(repr, targets))}."
        )


def _refuse_without_candidates(args: Any) -> None:
    """Raise for an argument that has another value than its default, and no meaning without candidates."""
    for argument in fields(DistillationArguments):
        if getattr(args, argument.name) != argument.default:
            raise ValueError(
                f"{argument.name} has no meaning without candidates: give candidates_from, or leave it out."
            )
