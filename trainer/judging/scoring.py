"""From predictions to figures: the scores of each question, their means with intervals, and averages over tasks."""

import importlib.util

import numpy as np

from .correctness import FEVER_LABELS, TEXT_METRICS, cor_metric, correctness, kilt_scores, str_em
from .grounding import HYPOTHESIS, citation_scores, claim_recall, fever_nli, grounding, k_precision
from .intervals import Mean
from .matching import match_by_id, provenance_unknown, retrieved_ids
from .retrieval import cor_minus, ranking_scores, retrieval_scores

RESAMPLES = 1000
MAIN = ("ret", "ret_precision", "cor", "cor_minus", "gr", "k_precision")  # the columns of main tables
RETRIEVING = ("retrieval", "forced")  # modes in which the model searches, so that what it retrieves says something about it

METRICS = {  # name -> (how tables say it, what it is)
    "ret": ("Ret", "a gold passage is among those retrieved while generating"),
    "ret_precision": ("Ret-P", "share of the distinct retrieved passages that are gold"),
    "cor": ("Cor", "the answer is right, by the metric of its dataset"),
    "cor_minus": ("Cor⁻", "Cor, with wrong retrieval counted as wrong"),
    "gr": ("Gr", "share of the sentences between [Cs] and [CE] that follow from their passage, by the NLI model"),
    "k_precision": ("K-precision", "share of the words between [Cs] and [CE] that stand in their passage"),
    "gr_success": ("Gr, Ret = 1", "Gr where a gold passage was retrieved"),
    "gr_failure": ("Gr, Ret = 0", "Gr where none was"),
    "r_precision": ("R-precision", "KILT's: share of an evidence set of R passages among the first R retrieved"),
    "recall@1": ("recall@1", "KILT's: share of the evidence sets retrieved while generating; where passages stand for a page, each is a set of its own"),
    "recall@5": ("recall@5", "the same among the first 5"),
    "nsp_needed": ("[NSP], needed", "share of the questions that need a passage in which [NSP] was emitted"),
    "nsp_not_needed": ("[NSP], not needed", "share of the questions that need none in which [NSP] was emitted"),
    "cor_not_needed": ("Cor, not needed", "Cor of the questions that need no passage"),
    "num_retrievals": ("retrievals", "number of retrievals for each question"),
    "accuracy": ("accuracy", "KILT's: the answer is one of the answers, as they are"),
    "em": ("EM", "exact match after SQuAD's normalisation"),
    "f1": ("F1", "of the normalised words"),
    "rouge_l": ("ROUGE-L", "F, by PyPI's rouge, as in KILT"),
    "kilt_accuracy": ("KILT-accuracy", "accuracy where R-precision is 1, else 0"),
    "kilt_em": ("KILT-EM", "EM where R-precision is 1, else 0"),
    "kilt_f1": ("KILT-F1", "F1 where R-precision is 1, else 0"),
    "kilt_rouge_l": ("KILT-ROUGE-L", "ROUGE-L where R-precision is 1, else 0"),
    "fever_label": ("FEVER, label", "the right verdict stands in the answer"),
    "fever_nli": ("FEVER, NLI", "the answer entails a supported claim, and does not entail a refuted one"),
    "str_em": ("str_em", "ALCE's: share of the readings of which a short answer stands in the answer"),
    "str_hit": ("str_hit", "ALCE's: all readings do"),
    "claim_recall": ("claim recall", "ALCE's: share of the reference claims that follow from the answer"),
    "citation_recall": ("citation recall", "ALCE's: share of the sentences that follow from what they cite"),
    "citation_precision": ("citation precision", "ALCE's: share of the citations that are of use"),
    "mrr": ("MRR", "of the query embedding's ranking"),
    "ndcg@10": ("nDCG@10", "of the query embedding's ranking"),
    **{f"success@{k}": (f"R@{k}", f"a gold passage is among the {k} nearest to the query embedding") for k in (1, 5, 20, 100)},
}
COR_LABELS = {"short_answer": "short answer", **{name: METRICS[name][0] for name in ("accuracy", "em", "f1", "rouge_l", "fever_label", "fever_nli")}}
COR_LABELS |= {name: METRICS[name][0] for name in ("str_em", "claim_recall")} | {"": "needs an NLI model"}
META = {  # what of ALCE's fields is judged, by which metric, and what it must be
    "qa_pairs": ("str_em", 'a list of {"short_answers": [texts]}'),
    "claims": ("claim_recall", "a list of texts"),
}
COUNTS = ("num_retrievals",)  # all others are shares


def has_rouge():
    """Whether ROUGE-L can be computed."""
    return importlib.util.find_spec("rouge") is not None


def score(predictions, questions, mode="retrieval", metric=None, entail=None, gr_hypothesis=HYPOTHESIS):
    """
    The scores of each question.

    Args:
        predictions (`list[dict]`), questions (`list[dict]`): matched by id, which must be the same ones.
        mode (`str`): what is retrieved counts only where the model searches: in `"retrieval"` and `"forced"`.
        metric (`str`, *optional*): what Cor is; defaults to that of each question's dataset.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. Without it there is no `gr`, `fever_nli`, `claim_recall`
            and `citation_…`, and FEVER's Cor is that by label.
        gr_hypothesis (`str`): how the judge reads a sentence for Gr; see [`~trainer.grounding.grounding`].

    Returns:
        `dict[str, list[float | None]]`: by name of `METRICS`, in the order of the questions; `None` where a metric does not apply.

    Raises:
        `ValueError`: with counts, when ids do not match or the judge leaves pairs without an answer.
    """
    predictions = [prediction for prediction, _ in match_by_id(predictions, questions)]
    scores = {"cor": _cor(predictions, questions, metric, entail), "k_precision": [k_precision(each) for each in predictions]}
    needed = [bool(x["provenance"]) for x in questions]
    free = [not (need or provenance_unknown(x)) for need, x in zip(needed, questions, strict=True)]
    hits = [None] * len(questions)
    if mode in RETRIEVING:
        rows = [retrieval_scores(retrieved_ids(p), x["provenance"]) if need else {} for p, x, need in zip(predictions, questions, needed, strict=True)]
        scores |= _columns(rows)
        hits = scores.get("ret", hits)
        scores["cor_minus"] = cor_minus(scores["cor"], hits)
        emitted = [float(bool(prediction["retrievals"])) for prediction in predictions]
        scores["nsp_needed"], scores["nsp_not_needed"] = _where(emitted, needed), _where(emitted, free)
        scores["num_retrievals"] = [float(len(prediction["retrievals"])) for prediction in predictions]
    rows = zip(predictions, questions, scores.get("r_precision", hits), free, strict=True)
    scores |= _columns([{} if no_passage else _text_scores(*each) for *each, no_passage in rows])
    if entail is not None:
        scores |= _nli_scores(predictions, questions, hits, entail, gr_hypothesis)
    scores["cor_not_needed"], scores["cor"] = _where(scores["cor"], free), _where(scores["cor"], [not each for each in free])
    return scores


def check_questions(questions, where, metric=None):
    """
    Raise unless Cor can be computed: before hours of answering, not after them.

    Args:
        questions (`list[dict]`), where (`str`): and whose they are, for the error.
        metric (`str`, *optional*): what Cor is.

    Raises:
        `ValueError`: with counts, for questions without what their metric compares with, or a package that it needs.
    """
    for key, (name, expected) in META.items():
        if malformed := [x["id"] for x in questions if x.get("meta", {}).get(key) and not _has_what_it_needs(x, name)]:
            raise ValueError(f"Task {where}: {len(malformed)} of {len(questions)} questions have other meta.{key} than {expected}, e.g. {malformed[0]!r}.")
    lacking = {}
    for question in questions:
        name = metric or _metric_of(question)
        if not _has_what_it_needs(question, name):
            lacking[name] = lacking.get(name, 0) + 1
    for name, count in lacking.items():
        what = {"str_em": "meta.qa_pairs", "claim_recall": "meta.claims"}.get(name, "verdicts" if name.startswith("fever") else "answers")
        raise ValueError(f"Task {where}: {count} of {len(questions)} questions have no {what}, which {name}, their Cor, compares with.")
    if not has_rouge() and any((metric or _metric_of(x)) == "rouge_l" for x in questions):
        raise ValueError(f"Task {where}: Cor is ROUGE-L, which needs the package that KILT uses: pip install rouge.")


def _metric_of(question, nli=True):
    """What Cor is on a question, by its data set and by what there is to compare with."""
    return cor_metric(question["dataset"], nli, claims=bool(question.get("meta", {}).get("claims")))


def _has_what_it_needs(question, name):
    meta = question.get("meta", {})
    if name == "str_em":
        pairs = meta.get("qa_pairs")
        return bool(pairs) and isinstance(pairs, list) and all(isinstance(pair, dict) and _are_texts(pair.get("short_answers")) for pair in pairs)
    if name == "claim_recall":
        return _are_texts(meta.get("claims"))
    if name.startswith("fever"):
        return len({answer.strip().lower() for answer in question["answers"]} & set(FEVER_LABELS)) == 1
    return bool(question["answers"])


def _are_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def cor_names(questions, metric=None, nli=True):
    """Names of what Cor is on these questions, `list[str]`; `""` stands for those that need an NLI model that is not there."""
    return sorted({(metric or _metric_of(x, nli)) or "" for x in questions})


def _cor(predictions, questions, metric, entail):
    values = [None] * len(questions)
    names = [metric or _metric_of(x, entail is not None) for x in questions]
    for name in set(names) - {None}:
        rows = [i for i, each in enumerate(names) if each == name]
        own = [(predictions[i], questions[i]) for i in rows]
        for i, value in zip(rows, _by_metric(name, own, entail), strict=True):
            values[i] = value
    return values


def _by_metric(name, pairs, entail):
    """One value for each `(prediction, question)`; `None` where the metric needs an NLI model that is not there."""
    if name in TEXT_METRICS:
        return [correctness(p["output"], x["answers"], name) for p, x in pairs]
    if name == "str_em":
        return [str_em(p["output_with_citations"], x.get("meta", {}).get("qa_pairs"))[0] for p, x in pairs]
    if entail is None:
        return [None] * len(pairs)
    outputs = [p["output"] for p, _ in pairs]
    if name == "fever_nli":
        return fever_nli(outputs, [x["input"] for _, x in pairs], [x["answers"] for _, x in pairs], entail)
    return claim_recall(outputs, [x.get("meta", {}).get("claims") or [] for _, x in pairs], entail)


def _text_scores(prediction, question, r_precision):
    """What needs no model: KILT's scores, FEVER's label, ALCE's str_em."""
    scores, meta = {}, question.get("meta", {})
    if any(answer.strip() for answer in question["answers"]):
        scores = kilt_scores(prediction["output"], question["answers"], r_precision, rouge=has_rouge())
        if r_precision is None:
            scores = {name: value for name, value in scores.items() if not name.startswith("kilt_")}
    if is_fever(question):
        scores["fever_label"] = correctness(prediction["output"], question["answers"], "fever_label")
    if meta.get("qa_pairs"):
        scores["str_em"], scores["str_hit"] = str_em(prediction["output_with_citations"], meta["qa_pairs"])
    return scores


def is_fever(question):
    """Whether a question is a claim with a verdict."""
    return question["dataset"] == "fever" and bool(question["answers"]) and all(answer.strip().lower() in FEVER_LABELS for answer in question["answers"])


def _nli_scores(predictions, questions, hits, entail, gr_hypothesis):
    """What the judge says: Gr, also by retrieval success, citations, FEVER, claims."""
    scores = {"gr": grounding(predictions, entail, hypothesis=gr_hypothesis)}
    scores["gr_success"] = [gr if hit is not None and hit > 0 else None for gr, hit in zip(scores["gr"], hits, strict=True)]
    scores["gr_failure"] = [gr if hit is not None and not hit > 0 else None for gr, hit in zip(scores["gr"], hits, strict=True)]
    cited = citation_scores([p["output_with_citations"] for p in predictions], [cited_passages(p) for p in predictions], entail)
    retrieved = any(p["retrievals"] for p in predictions)  # where nothing can be cited, that nothing is cited says nothing
    for name in ("citation_recall", "citation_precision"):
        scores[name] = [each[name] if each is not None and retrieved else None for each in cited]
    for name, applies in (("fever_nli", is_fever), ("claim_recall", lambda x: bool(x.get("meta", {}).get("claims")))):
        rows = [i for i, question in enumerate(questions) if applies(question)]
        values = dict(zip(rows, _by_metric(name, [(predictions[i], questions[i]) for i in rows], entail), strict=True)) if rows else {}
        scores[name] = [values.get(i) for i in range(len(questions))]
    return scores


def cited_passages(prediction):
    """The distinct retrieved passages in the order in which `[n]` counts them: `list[dict]`."""
    passages = {}
    for retrieval in prediction["retrievals"]:
        for id, title, text in zip(retrieval["passage_ids"], retrieval["titles"], retrieval["texts"], strict=True):
            passages.setdefault(id, {"id": id, "title": title, "text": text})
    return list(passages.values())


def score_ranking(rankings, questions, ks):
    """
    The scores of the query embedding's rankings.

    Args:
        rankings (`dict[str, list[str]]`): by id of the question, passage ids, best first.
        questions (`list[dict]`): those without provenance do not count.
        ks (`tuple[int]`): of `success@k`.

    Returns:
        `dict[str, list[float | None]]`, as [`score`].
    """
    return _columns([ranking_scores(rankings[x["id"]], x["provenance"], ks) if x["provenance"] else {} for x in questions])


def _columns(rows):
    """`list[dict]` as `dict` of lists; `None` where a row lacks a name."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _where(values, conditions):
    return [value if condition else None for value, condition in zip(values, conditions, strict=True)]


# ---------------------------------------------------------------------- figures


def figures(scores):
    """`{name: {"value", "interval", "n"}}` of the metrics that apply to any question, in the order of `METRICS`; 95 % bootstrap intervals."""
    means = {name: Mean.of(scores[name]) for name in METRICS if name in scores}
    return {name: mean.to_dict() for name, mean in means.items() if mean.n}


def average(columns):
    """
    The plain mean over tasks of a metric's means.

    Args:
        columns (`list[list[float | None]]`): the scores of each task's questions.

    Returns:
        `{"value", "interval", "n", "tasks"}`: the interval is that of resampling the questions within each task; `n` counts questions; `tasks` those in which
        the metric applies. `None` when there is none.
    """
    columns = [np.array([value for value in column if value is not None], float) for column in columns]
    columns = [column for column in columns if len(column)]
    if not columns:
        return None
    low, high = np.percentile(np.mean([resampled_means(column, seed) for seed, column in enumerate(columns)], 0), [2.5, 97.5])
    value = float(np.mean([column.mean() for column in columns]))
    return {"value": value, "interval": [float(low), float(high)], "n": int(sum(map(len, columns))), "tasks": len(columns)}


def resampled_means(values, seed, resamples=RESAMPLES):
    """Means of `resamples` draws of as many values as there are, with replacement: `numpy.ndarray` of shape `(resamples,)`."""
    if (values == values[0]).all():
        return np.full(resamples, values[0])
    generator, rows = np.random.default_rng(seed), max(1, 2**22 // len(values))  # 32 MB of picks at a time
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([values[generator.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes])


def averages(tasks, scores):
    """
    Averages in-domain, out-of-domain and over all tasks.

    Args:
        tasks (`dict[str, str | None]`): each task's split.
        scores (`dict[str, dict[str, dict]]`): task -> mode -> scores, as from [`score`].

    Returns:
        `dict`: `"in-domain"`, `"out-of-domain"`, `"all"`, those that hold a task -> mode -> metric -> figure, see [`average`].
    """
    groups = {split: [name for name, own in tasks.items() if own == split] for split in ("in-domain", "out-of-domain")} | {"all": list(tasks)}
    result = {}
    for group, names in groups.items():
        modes = dict.fromkeys(mode for name in names for mode in scores[name])
        result[group] = {
            mode: {metric: found for metric in METRICS if (found := average([scores[name].get(mode, {}).get(metric, []) for name in names])) is not None}
            for mode in modes
        }
    return {group: modes for group, modes in result.items() if modes}
