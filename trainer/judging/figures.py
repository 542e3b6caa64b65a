"""
The one vocabulary of figures: what training logs, results files, reports, model cards and `evaluate` modules call what they measure.

A figure has one name everywhere. A name ends in `@k` where the figure looks at the first k places of a ranking; the table below holds it once, with a
literal k, and [`figure`] fills the number in. `recall@k` alone is no name: recall of what, over what, is what makes three different figures of it.
"""

from dataclasses import dataclass, replace
from typing import Literal

Scale = Literal["share", "count", "nats"]
Need = Literal["gold", "judge", "no_passage"]


@dataclass(frozen=True)
class Figure:
    """
    One thing that is measured.

    Args:
        name (`str`): in results files, logs and code.
        label (`str`): in tables and plots.
        meaning (`str`): one sentence for readers, without a full stop.
        scale (`str`): `"share"`, from 0 to 1, shown in percent; `"count"`, shown as it is; `"nats"`, a loss.
        needs (tuple of `str`): what must be there, or the figure is absent: `"gold"` passages, an NLI `"judge"`, or questions that need `"no_passage"`.
    """

    name: str
    label: str
    meaning: str
    scale: Scale = "share"
    needs: tuple[Need, ...] = ()


_GOLD, _JUDGE = ("gold",), ("judge",)

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        # while training, and over an evaluation set
        Figure("loss", "loss", "weighted sum of the losses that are trained", "nats"),
        Figure("ntp_loss", "NTP loss", "next token prediction, mean over trained tokens", "nats"),
        Figure("nsp_loss", "NSP loss", "next sequence prediction, mean over queries", "nats"),
        Figure("nsp_accuracy", "NSP accuracy", "the right passage of a query scores above all negatives of its batch"),
        Figure("num_negatives", "negatives", "number of negatives of each query", "count"),
        # retrieval while generating
        Figure("ret", "Ret", "a gold passage is among those retrieved while generating", needs=_GOLD),
        Figure("ret_precision", "Ret-P", "share of the distinct retrieved passages that are gold", needs=_GOLD),
        Figure("r_precision", "R-precision", "KILT's: share of an evidence set of R passages among the first R retrieved", needs=_GOLD),
        Figure(
            "kilt_recall@k",
            "KILT recall@k",
            "KILT's: share of the evidence sets that are complete among the first k retrieved while generating; where passages stand for a page, each is a set",
            needs=_GOLD,
        ),
        Figure("nsp_needed", "[NSP], needed", "share of the questions that need a passage in which [NSP] was emitted", needs=_GOLD),
        Figure("nsp_not_needed", "[NSP], not needed", "share of the questions that need none in which [NSP] was emitted", needs=("no_passage",)),
        Figure("num_retrievals", "retrievals", "number of retrievals for each question", "count"),
        # the query embedding, without generating
        Figure("query_recall@k", "R@k", "a gold passage is among the k nearest to the query embedding", needs=_GOLD),
        Figure("mrr", "MRR", "1 / rank of the first gold passage in the ranking of the query embedding", needs=_GOLD),
        Figure("ndcg@k", "nDCG@k", "of the ranking of the query embedding, gain 1 for each gold passage", needs=_GOLD),
        Figure("ann_recall@k", "ANN recall@k", "share of the exact k nearest passages that an approximate search finds"),
        # answers
        Figure("cor", "Cor", "the answer is right, by the metric of its dataset"),
        Figure("cor_minus", "Cor⁻", "Cor, with wrong retrieval counted as wrong", needs=_GOLD),
        Figure("cor_not_needed", "Cor, not needed", "Cor of the questions that need no passage", needs=("no_passage",)),
        Figure("short_answer", "short answer", "a right answer stands in the output, or the output in a right answer"),
        Figure("accuracy", "accuracy", "KILT's: the answer is one of the answers, as they are"),
        Figure("em", "EM", "exact match after SQuAD's normalisation"),
        Figure("f1", "F1", "of the normalised words"),
        Figure("rouge_l", "ROUGE-L", "F, by PyPI's rouge, as in KILT"),
        Figure("kilt_accuracy", "KILT-accuracy", "accuracy where R-precision is 1, else 0", needs=_GOLD),
        Figure("kilt_em", "KILT-EM", "EM where R-precision is 1, else 0", needs=_GOLD),
        Figure("kilt_f1", "KILT-F1", "F1 where R-precision is 1, else 0", needs=_GOLD),
        Figure("kilt_rouge_l", "KILT-ROUGE-L", "ROUGE-L where R-precision is 1, else 0", needs=_GOLD),
        Figure("fever_label", "FEVER, label", "the right verdict stands in the answer"),
        Figure("fever_nli", "FEVER, NLI", "the answer entails a supported claim, and does not entail a refuted one", needs=_JUDGE),
        Figure("str_em", "str_em", "ALCE's: share of the readings of which a short answer stands in the answer"),
        Figure("str_hit", "str_hit", "ALCE's: all readings do"),
        # grounding
        Figure("gr", "Gr", "share of the sentences between [Cs] and [CE] that follow from their passage, by the NLI model", needs=_JUDGE),
        Figure("gr_success", "Gr, Ret = 1", "Gr where a gold passage was retrieved", needs=("gold", "judge")),
        Figure("gr_failure", "Gr, Ret = 0", "Gr where none was", needs=("gold", "judge")),
        Figure("k_precision", "K-precision", "share of the words between [Cs] and [CE] that are in their passage"),
        Figure("claim_recall", "claim recall", "ALCE's: share of the reference claims that follow from the answer", needs=_JUDGE),
        Figure("citation_recall", "citation recall", "ALCE's: share of the sentences that follow from what they cite", needs=_JUDGE),
        Figure("citation_precision", "citation precision", "ALCE's: share of the citations that are of use", needs=_JUDGE),
    )
}

MAIN = ("ret", "ret_precision", "cor", "cor_minus", "gr", "k_precision")  # the columns of main tables

MODES: dict[str, str] = {  # how an evaluation answers its questions, and what tables call it
    "retrieval": "own retrieval",
    "forced": "[NSP] forced first",
    "gold": "gold passages given",
    "wrong": "wrong passages given",
    "off": "retrieval off",
    "query": "query embedding",
}
SEARCHING = ("retrieval", "forced")  # modes in which the model searches, so that what it retrieves says something about it


def figure(name: str) -> Figure:
    """
    The figure of a name, `"query_recall@5"` as well as `"ret"`; a prefix `eval_` or `train_`, as the Trainer logs it, is read over.

    Raises:
        `KeyError`: when the vocabulary has no such figure, with the name.
    """
    base = name.removeprefix("eval_").removeprefix("train_")
    if base in FIGURES:
        return FIGURES[base]
    stem, at, k = base.partition("@")
    if not k.isdigit() or f"{stem}@k" not in FIGURES:
        raise KeyError(f"{name!r} is no figure of trainer.judging.figures.")
    general = FIGURES[f"{stem}@k"]
    meaning = general.meaning.replace("first k ", f"first {k} ").replace("the k ", f"the {k} ").replace("exact k ", f"exact {k} ")
    return replace(general, name=base, label=general.label.replace("@k", f"@{k}"), meaning=meaning)


def shown(value: float, name: str, signed: bool = False) -> str:
    """A value as tables show it: percent with one digit for a share, two digits for a count, three for a loss."""
    scale, digits = {"share": (100, 1), "count": (1, 2), "nats": (1, 3)}[figure(name).scale]
    return f"{scale * value:{'+' if signed else ''}.{digits}f}"
