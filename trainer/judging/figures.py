"""
The vocabulary of figures, shared by logs, results files, reports, model cards and `evaluate` modules.

A figure has one name everywhere. If it depends on the first k places of a ranking, its name ends in `@k`. The tables
below hold such a name once, with a literal k, and [`figure`] fills in the number. No figure is called just `recall@k`,
because that could mean three different ones.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict

Scale = Literal["share", "count", "nats"]
Need = Literal["gold", "judge", "no_passage"]


@dataclass(frozen=True)
class Figure:
    """
    A measured quantity.

    Args:
        name (`str`): name in results files, logs and code.
        label (`str`): name in tables and plots.
        meaning (`str`): one sentence for readers, without a full stop.
        scale (`str`): `"share"` is between 0 and 1 and shown in percent; `"count"` is shown as a number; `"nats"` is a
            loss.
        needs (tuple of `str`): what the figure cannot be measured without: `"gold"` passages, an NLI `"judge"`, or
            questions that need `"no_passage"`.
        binary (`bool`): whether its value for a single question is always 0 or 1. For Cor this depends on the metric,
            see [`is_binary`].
    """

    name: str
    label: str
    meaning: str
    scale: Scale = "share"
    needs: tuple[Need, ...] = ()
    binary: bool = False


class Measured(TypedDict):
    """A figure as results files hold it: its value, the 95 % interval, and the number of questions."""

    value: float
    interval: list[float] | None  # `[low, high]`; None if there are too few questions to know
    n: int


_GOLD: tuple[Need, ...] = ("gold",)
_JUDGE: tuple[Need, ...] = ("judge",)
_GOLD_AND_JUDGE: tuple[Need, ...] = ("gold", "judge")
_NO_PASSAGE: tuple[Need, ...] = ("no_passage",)

_TRAINING = (
    Figure("loss", "loss", "weighted sum of the losses that are trained", "nats"),
    Figure("ntp_loss", "NTP loss", "loss of next token prediction, mean over the trained tokens", "nats"),
    Figure(
        "nsp_loss",
        "NSP loss",
        "loss of next sequence prediction, mean over the queries that have a negative",
        "nats",
    ),
    Figure(
        "reverse_nsp_loss",
        "reverse NSP loss",
        "each passage looks for its query among all queries, mean over those whose passage is wrong for another query",
        "nats",
    ),
    Figure(
        "gradient_cosine",
        "gradient cosine",
        "cosine between the gradients of the NTP loss and of the NSP loss with respect to Gen's weights",
        "count",
    ),
    Figure(
        "gradient_ratio",
        "gradient ratio",
        "norm of the gradient of λ times the NSP loss over that of the NTP loss, with respect to Gen's weights",
        "count",
    ),
    Figure(
        "matryoshka_loss",
        "Matryoshka loss",
        "NSP loss of embeddings that are cut to the widths of matryoshka_dims, mean over the widths",
        "nats",
    ),
    Figure(
        "distillation_loss",
        "distillation loss",
        "KL(target ‖ retriever) over the candidates of a query, mean over the queries that are distilled",
        "nats",
    ),
    Figure(
        "target_entropy",
        "entropy of the target",
        "entropy of a distillation's target over the candidates, mean over queries",
        "nats",
    ),
    Figure(
        "student_entropy",
        "entropy of the student",
        "entropy of the retriever's scores over the candidates, mean over queries",
        "nats",
    ),
    Figure("target_max", "largest target", "largest share in a distillation's target, mean over queries"),
    Figure(
        "num_left_out",
        "left out",
        "number of instances left out: longer than max_length, alone or with their candidates",
        "count",
    ),
    Figure(
        "nsp_accuracy",
        "NSP accuracy",
        "the passage of a query scores above all negatives of its batch",
        binary=True,
    ),
    Figure(
        "nsp_predicted",
        "[NSP], predicted",
        "[NSP] is the most likely token where the reference has one, as a share of these places",
    ),
    Figure(
        "first_query_recall@k",
        "R@k, first [NSP]",
        "R@k of the queries at the first [NSP] of their instance",
        binary=True,
    ),
    Figure(
        "later_query_recall@k",
        "R@k, later [NSP]",
        "R@k of the queries after the first [NSP] of their instance, which have read its passages",
        binary=True,
    ),
    Figure(
        "knn_kl",
        "KL to kNN",
        "KL(p_kNN ‖ p_mem) of an MLP memory, mean over the keys of its datastore",
        "nats",
    ),
    Figure("num_negatives", "negatives", "mean number of negatives of a query", "count"),
    Figure("tokens_per_second", "tokens/s", "tokens per second, without padding", "count"),
    Figure("padding", "padding", "share of the positions of a batch that are padding"),
    Figure("training_seconds", "seconds", "seconds spent training so far, without evaluations and indexes", "count"),
    Figure(
        "peak_memory", "peak memory, GB", "largest memory of a process, of its device or, on a CPU, its own", "count"
    ),
)
RETRIEVAL_WHILE_GENERATING = (
    Figure("ret", "Ret", "a gold passage is among those retrieved while generating", needs=_GOLD, binary=True),
    Figure("ret_precision", "Ret-P", "share of the distinct retrieved passages that are gold", needs=_GOLD),
    Figure(
        "r_precision",
        "R-precision",
        "KILT's: share of an evidence set of R passages that is among the first R retrieved, for the best set",
        needs=_GOLD,
    ),
    Figure(
        "kilt_recall@k",
        "KILT recall@k",
        "KILT's: share of the evidence sets that are complete in the first k places of what was retrieved; "
        "if a page has several passages, each of them is one set",
        needs=_GOLD,
    ),
    Figure(
        "nsp_needed",
        "[NSP], needed",
        "[NSP] was emitted, as a share of the questions that need a passage",
        needs=_GOLD,
        binary=True,
    ),
    Figure(
        "nsp_not_needed",
        "[NSP], not needed",
        "[NSP] was emitted, as a share of the questions that need no passage",
        needs=_NO_PASSAGE,
        binary=True,
    ),
    Figure("num_retrievals", "retrievals", "number of retrievals of a question", "count"),
)
QUERY_FIGURES = (
    Figure(
        "query_recall@k",
        "R@k",
        "a gold passage is among the k nearest to the query embedding",
        needs=_GOLD,
        binary=True,
    ),
    Figure(
        "hit_rate@k",
        "HR@k",
        "an answer string is in one of the k passages nearest to the query embedding",
        binary=True,
    ),
    Figure("mrr", "MRR", "1 / rank of the first gold passage in the ranking by the query embedding", needs=_GOLD),
    Figure(
        "ndcg@k",
        "nDCG@k",
        "nDCG of the first k by the query embedding, with gain 1 for each gold passage",
        needs=_GOLD,
    ),
    Figure("ann_recall@k", "ANN recall@k", "share of the exact k nearest passages that an approximate search finds"),
)
_READER = (
    Figure(
        "indicator_1",
        "Indicator 1",
        "mean attention to one of the 5 % of passage tokens that are nearest to the answer, as a share of the "
        "attention to all passage tokens",
    ),
)
_ANSWERS = (
    Figure("cor", "Cor", "the answer is right, by the metric of its dataset"),
    Figure("cor_minus", "Cor⁻", "Cor, where an answer after a wrong retrieval counts as wrong", needs=_GOLD),
    Figure("cor_success", "Cor, Ret = 1", "Cor where a gold passage was retrieved", needs=_GOLD),
    Figure("cor_failure", "Cor, Ret = 0", "Cor where no gold passage was retrieved", needs=_GOLD),
    Figure("cor_not_needed", "Cor, not needed", "Cor of the questions that need no passage", needs=_NO_PASSAGE),
    Figure("short_answer", "short answer", "a normalised answer is part of the normalised output", binary=True),
    Figure("accuracy", "accuracy", "KILT's: the output is one of the answers, without normalisation", binary=True),
    Figure(
        "em", "EM", "exact match: the normalised output is one of the normalised answers, as in SQuAD", binary=True
    ),
    Figure(
        "em_not_needed", "EM, not needed", "EM of the questions that need no passage", needs=_NO_PASSAGE, binary=True
    ),
    Figure("f1", "F1", "F1 of the normalised words, for the best answer"),
    Figure("rouge_l", "ROUGE-L", "F-score of PyPI's rouge, as in KILT, for the best answer"),
    Figure("kilt_accuracy", "KILT-accuracy", "accuracy where R-precision is 1, else 0", needs=_GOLD, binary=True),
    Figure("kilt_em", "KILT-EM", "EM where R-precision is 1, else 0", needs=_GOLD, binary=True),
    Figure("kilt_f1", "KILT-F1", "F1 where R-precision is 1, else 0", needs=_GOLD),
    Figure("kilt_rouge_l", "KILT-ROUGE-L", "ROUGE-L where R-precision is 1, else 0", needs=_GOLD),
    Figure("fever_label", "FEVER, label", "the right verdict is part of the normalised output", binary=True),
    Figure(
        "fever_nli",
        "FEVER, NLI",
        "a supported claim follows from the output, a refuted one does not; an empty output is wrong",
        needs=_JUDGE,
        binary=True,
    ),
    Figure(
        "str_em",
        "str_em",
        "ALCE's: share of the readings of a question that have a short answer in the normalised output",
    ),
    Figure("str_hit", "str_hit", "ALCE's: every reading has a short answer in the normalised output", binary=True),
    Figure("list_f1", "list F1", "ALCE's F1-5 of the answers listed: with five right ones, recall is 1"),
    Figure(
        "claim_recall",
        "claim recall",
        "ALCE's: share of the reference claims that follow from the output",
        needs=_JUDGE,
    ),
)
_GROUNDING = (
    Figure(
        "gr",
        "Gr",
        "share of the sentences between [Cs] and [CE] that follow from their passages, by the NLI model",
        needs=_JUDGE,
    ),
    Figure("gr_success", "Gr, Ret = 1", "Gr where a gold passage was retrieved", needs=_GOLD_AND_JUDGE),
    Figure("gr_failure", "Gr, Ret = 0", "Gr where no gold passage was retrieved", needs=_GOLD_AND_JUDGE),
    Figure("k_precision", "K-precision", "share of the words between [Cs] and [CE] that are in their passages"),
    Figure(
        "citation_recall",
        "citation recall",
        "ALCE's: share of the sentences, or items of a list, that follow from the passages they cite",
        needs=_JUDGE,
    ),
    Figure(
        "citation_precision",
        "citation precision",
        "ALCE's: share of the citations that support their sentence alone, or without which the others do not",
        needs=_JUDGE,
    ),
)
_TEXT = (
    Figure("perplexity", "perplexity", "exp of the mean NLL of the tokens", "count"),
    Figure("nll", "NLL", "negative log-likelihood of a token of the text, mean over its tokens", "nats"),
    Figure(
        "child_log_likelihood",
        "log-likelihood of a child",
        "log-probability of the name of a child in a Macondo sentence, mean over the sentences",
        "nats",
    ),
    Figure(
        "ngram_overlap",
        "overlap",
        "share of the 16-grams of the text, and of its shorter documents, that a memory holds",
    ),
)
_COUNTS = (
    Figure("num_passages", "passages", "number of distinct passages that the queries are compared with", "count"),
    Figure("num_queries", "queries", "number of queries that have a negative", "count"),
    Figure("num_questions", "questions", "number of questions that need a passage", "count"),
    Figure("num_grounded", "grounded answers", "number of answers that hold grounded text", "count"),
    Figure("num_cited_outputs", "cited outputs", "number of outputs in which citations can be judged", "count"),
    Figure(
        "num_empty_answers",
        "empty answers",
        "number of questions with a reference answer that normalises to nothing, which every output contains",
        "count",
    ),
    Figure(
        "num_without_provenance",
        "without provenance",
        "number of questions without gold passages, whose retrieval counts as wrong",
        "count",
    ),
)

_TABLE = (
    *_TRAINING,
    *RETRIEVAL_WHILE_GENERATING,
    *QUERY_FIGURES,
    *_READER,
    *_ANSWERS,
    *_GROUNDING,
    *_TEXT,
    *_COUNTS,
)
QUESTION_FIGURES = (*RETRIEVAL_WHILE_GENERATING, *QUERY_FIGURES, *_ANSWERS, *_GROUNDING)  # have a value for each
FIGURES: dict[str, Figure] = {entry.name: entry for entry in _TABLE}

COR_FIGURES = ("cor", "cor_minus", "cor_success", "cor_failure", "cor_not_needed")  # by the metric of the dataset
NEUTRAL = ("nsp_not_needed",)  # shares of which more is no better, like counts and losses
MAIN = ("ret", "ret_precision", "cor", "cor_minus", "gr", "k_precision")  # the columns of main tables

# How an evaluation answers its questions -> its label in tables.
MODES: dict[str, str] = {
    "retrieval": "own retrieval",
    "forced": "[NSP] forced first",
    "gold": "gold passages given",
    "wrong": "wrong passages given",
    "off": "retrieval off",
    "query": "query embedding",
}
SEARCHING = ("retrieval", "forced")  # modes in which the model searches for passages itself
GIVEN = ("gold", "wrong")  # modes that give the model its passages; they ask only questions that need one
QUERY = "query"  # the mode that ranks passages by the query embedding and generates nothing
SCOPES: dict[str, str] = {"corpus": "over the corpus", "pool": "over the pool"}  # what mode "query" ranks

SPLITS = ("in-domain", "out-of-domain")  # groups of tasks that are averaged separately

MISSING = "—"  # what tables show for a figure or an interval that does not exist
NO_JUDGE = ""  # replaces the name of Cor's metric if that needs an NLI model and there is none

_FACTOR_AND_DIGITS: dict[Scale, tuple[int, int]] = {"share": (100, 1), "count": (1, 2), "nats": (1, 3)}


def figure(name: str) -> Figure:
    """
    Return the figure with a name, such as `"ret"` or `"query_recall@5"`. The prefixes `eval_` and `train_` of the
    Trainer's logs are ignored.

    Raises:
        `KeyError`: if the vocabulary has no such figure.
    """
    base = name.removeprefix("eval_").removeprefix("train_")
    if base in FIGURES:
        return FIGURES[base]
    stem, _, k = base.partition("@")
    if not k.isdigit() or f"{stem}@k" not in FIGURES:
        raise KeyError(f"{name!r} is not a figure of trainer.judging.figures.")
    entry = FIGURES[f"{stem}@k"]
    label = entry.label.replace("@k", f"@{k}")
    meaning = entry.meaning.replace(" k ", f" {k} ")
    return replace(entry, name=base, label=label, meaning=meaning)


def add_figure(entry: Figure) -> None:
    """
    Add a figure to the vocabulary of this process, for a metric that is not part of this package.

    Raises:
        `ValueError`: if another figure has this name, or the name holds `@`.
    """
    if "@" in entry.name:
        raise ValueError(f"A figure's name is {entry.name!r}, expected one without @, which stands before a k.")
    if FIGURES.setdefault(entry.name, entry) != entry:
        raise ValueError(f"{entry.name!r} is already the name of a figure: {FIGURES[entry.name].meaning}.")


def added_figures() -> list[dict[str, Any]]:
    """Return the figures that [`add_figure`] added, as JSON values: results files hold what their names mean."""
    return [asdict(entry) for entry in FIGURES.values() if entry not in _TABLE]


def add_figures_of(results: Mapping[str, Any]) -> None:
    """Add the figures that the content of a results file describes, see [`added_figures`]."""
    for values in results.get("figures", []):
        add_figure(Figure(**{**values, "needs": tuple(values["needs"])}))


def is_binary(name: str, cor: Collection[str] = ()) -> bool:
    """
    Return whether a figure is always 0 or 1 for a single question. Such a figure has Wilson's interval, any other the
    bootstrap's.

    Args:
        name (`str`): name of the figure.
        cor (collection of `str`): names of the metrics by which Cor is measured. Cor is binary if all of them are, and
            not if there are none.
    """
    if name not in COR_FIGURES:
        return figure(name).binary
    if not cor or NO_JUDGE in cor:
        return False
    return all(figure(metric).binary for metric in cor)


def figures_needing(need: Need) -> list[str]:
    """Return the names of the figures that cannot be measured without `need`, see [`Figure`]."""
    return [entry.name for entry in FIGURES.values() if need in entry.needs]


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of figures in the order of the vocabulary, with `@1` before `@5`, and drop duplicates."""
    places = {name: place for place, name in enumerate(FIGURES)}

    def place_and_k(name: str) -> tuple[int, int]:
        stem, _, k = name.partition("@")
        if not k:
            return places[stem], 0
        return places[f"{stem}@k"], int(k)

    return sorted(set(names), key=place_and_k)


def cor_label(name: str) -> str:
    """Return the label of a metric by which Cor is measured, or a note that it needs an NLI model."""
    return "needs an NLI model" if name == NO_JUDGE else figure(name).label


def shown(value: float, name: str, signed: bool = False) -> str:
    """Format a value for tables: a share in percent with one decimal, a count with two decimals, a loss with three."""
    factor, digits = _FACTOR_AND_DIGITS[figure(name).scale]
    sign = "+" if signed else ""
    return f"{factor * value:{sign}.{digits}f}"


def figure_line(measured: Measured, name: str) -> str:
    """Format a figure as a line for the terminal: value, interval and number of questions."""
    unit = " %" if figure(name).scale == "share" else ""
    interval = shown_interval(measured["interval"], name)
    return f"{shown(measured['value'], name):>6}{unit}  {interval}  n = {measured['n']}"


def shown_interval(interval: Sequence[float] | None, name: str, signed: bool = False) -> str:
    """Format an interval for tables as `[low, high]`, or as a dash if it is not known."""
    if interval is None:
        return MISSING
    low, high = (shown(bound, name, signed) for bound in interval)
    return f"[{low}, {high}]"
