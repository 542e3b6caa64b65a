"""
KILT's and ALCE's figures against those of their own code on the same predictions.

`official_scores.json` holds the inputs, the figures, the commits of the two repositories and how their code was run.
Only the scoring is compared: in ALCE's code, the NLI model was replaced by the lexical judge below and NLTK's sentence
splitter by ours. Deliberate differences are left out: empty evidence sets, which we ignore, and the citation `[0]`,
which is out of range for us and the last passage for ALCE.
"""

import json
import re
from pathlib import Path

import pytest

from trainer.judging.correctness import kilt_scores, list_f1, str_em
from trainer.judging.grounding import citation_scores, claim_recall
from trainer.judging.retrieval import kilt_recall_at_k, mean_scores, retrieval_scores

METRICS = Path(__file__).parents[2] / "recipes" / "metrics"
OFFICIAL = json.loads((Path(__file__).parent / "official_scores.json").read_text(encoding="utf-8"))
KILT, ALCE = OFFICIAL["kilt"], OFFICIAL["alce"]
# Their names -> ours.
KILT_NAMES = {
    "accuracy": "accuracy",
    "em": "em",
    "f1": "f1",
    "rougel": "rouge_l",
    "KILT-accuracy": "kilt_accuracy",
    "KILT-em": "kilt_em",
    "KILT-f1": "kilt_f1",
    "KILT-rougel": "kilt_rouge_l",
    "Rprec": "r_precision",
    "recall@5": "kilt_recall@5",
}
ALCE_NAMES = {
    "str_em": "str_em",
    "str_hit": "str_hit",
    "claims_nli": "claim_recall",
    "citation_rec": "citation_recall",
    "citation_prec": "citation_precision",
}
RECALLS = (2, 3, 10)  # further k of recall@k, for which only the mean was computed


def same(number):
    return pytest.approx(number, rel=0, abs=1e-9)


def judge(pairs):
    """Say that a hypothesis follows if the premise contains each of its words of four or more characters."""
    labels = []
    for premise, hypothesis in pairs:
        long_words = set(re.findall(r"\w{4,}", hypothesis.lower()))
        labels.append(long_words <= set(re.findall(r"\w+", premise.lower())))
    return labels


# ---------------------------------------------------------------------- KILT


def kilt_row(instance):
    """Return our scores of one question. Without provenance, its retrieval is wrong."""
    retrieved, provenance = instance["retrieved"], instance["provenance"]
    if provenance:
        scores = retrieval_scores(retrieved, provenance, ks=(5,))
        scores |= {f"kilt_recall@{k}": kilt_recall_at_k(retrieved, provenance, k) for k in RECALLS}
    else:
        scores = {"r_precision": 0.0, "kilt_recall@5": 0.0, **{f"kilt_recall@{k}": 0.0 for k in RECALLS}}
    return scores | kilt_scores(instance["output"], instance["answers"], scores["r_precision"])


@pytest.fixture
def kilt_rows():
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    return [kilt_row(instance) for instance in KILT["instances"]]


@pytest.mark.parametrize("name", KILT_NAMES)
def test_each_score_of_kilt(name, kilt_rows):
    theirs = KILT["scores"]["each"][name]
    assert len(set(theirs)) > 1  # the questions do not all score the same
    assert [row[KILT_NAMES[name]] for row in kilt_rows] == same(theirs)


@pytest.mark.parametrize("name", [*KILT_NAMES, *(f"recall@{k}" for k in RECALLS)])
def test_mean_scores_of_kilt(name, kilt_rows):
    ours = KILT_NAMES.get(name, f"kilt_{name}")
    assert mean_scores(kilt_rows, [ours])[ours] == same(KILT["scores"]["set"][name])


# ---------------------------------------------------------------------- ALCE


def alce_passages():
    return [[ALCE["documents"][place] for place in instance["passages"]] for instance in ALCE["instances"]]


def alce_readings(instance):
    return [{"short_answers": answers} for answers in instance["short_answers"]]


def alce_citations(**options):
    """Return our scores of the citations of each output, `None` if it is empty."""
    outputs = [instance["output"] for instance in ALCE["instances"]]
    return citation_scores(outputs, alce_passages(), judge, **options)


@pytest.fixture
def alce_rows():
    """Our scores of each output; the scores of its citations are `None` if it is empty."""
    instances = ALCE["instances"]
    outputs = [instance["output"] for instance in instances]
    recalls = claim_recall(outputs, [instance["claims"] for instance in instances], judge)
    rows = []
    for instance, recall, citations in zip(instances, recalls, alce_citations(), strict=True):
        share, hit = str_em(instance["output"], alce_readings(instance))
        row = {"str_em": share, "str_hit": hit, "claim_recall": recall}
        row |= citations or {"citation_recall": None, "citation_precision": None}
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ALCE_NAMES)
def test_each_score_of_alce(name, alce_rows):
    """Theirs are in percent."""
    theirs = ALCE["scores"]["each"][name]
    ours = [row[ALCE_NAMES[name]] for row in alce_rows]
    assert len(set(theirs)) > 1
    assert [number is None for number in ours] == [number is None for number in theirs]
    our_numbers = [100 * number for number in ours if number is not None]
    assert our_numbers == same([number for number in theirs if number is not None])


@pytest.mark.parametrize("name", ALCE_NAMES)
def test_mean_scores_of_alce(name, alce_rows):
    assert 100 * mean_scores(alce_rows, [ALCE_NAMES[name]])[ALCE_NAMES[name]] == same(ALCE["scores"]["set"][name])


@pytest.mark.parametrize("at_most", ALCE["scores"]["at_most_citations"])
def test_other_numbers_of_citations_that_count(at_most):
    ours = mean_scores([row for row in alce_citations(at_most_citations=int(at_most)) if row])
    theirs = ALCE["scores"]["at_most_citations"][at_most]
    assert sorted(theirs) == ["citation_prec", "citation_rec"]
    assert {name: 100 * ours[ALCE_NAMES[name]] for name in theirs} == same(theirs)


def test_counts_of_several_citations():
    """ALCE's code prints these percentages, with two decimals."""
    rows = [row for row in alce_citations() if row]
    totals = {name: sum(row[name] for row in rows) for name in ("sentences", "several", "supported", "unneeded")}
    shares = {
        "multiple citations": totals["several"] / totals["sentences"],
        "supported": totals["supported"] / totals["several"],
        "overcite": totals["unneeded"] / totals["supported"],
    }
    for name, share in shares.items():
        assert float(f"{100 * share:.2f}") == ALCE["scores"]["set"][name]


# ---------------------------------------------------------------------- ALCE's lists

RIVERS = [["Rhine", "Rhein"], ["Elbe"], ["Oder"], ["Po"], ["Seine"], ["Ems"]]
RIVER_PASSAGES = [{"title": "", "text": text} for text in ("the Rhine", "Elbe and Oder", "Rhine and Oder")]
RIVER_QUESTION = "Which rivers?"


def f1(precision, recall):
    return 2 * precision * recall / (precision + recall)


# (output, list F1, citation recall, citation precision), worked out from the formulas of eval.py at the commit above:
# precision is over the items that are not empty, recall over five answers; a citation counts with its item, and every
# item counts in the citation recall, even an empty one.
LISTS = [
    ("Rhine [1], Elbe [2].", f1(1, 2 / 5), 1, 1),
    ("Rhine, Elbe, Oder, Po, Seine, Ems", 1, 0, 0),  # five are enough, and nothing is cited
    ("Rhine, Elbe, Oder, Po, Seine, Danube", f1(5 / 6, 1), 0, 0),
    ("", 0, 0, 0),
    ("Rhine [1][3], Danube [2]", f1(1 / 2, 1 / 5), 1 / 2, 2 / 3),
    ("Elbe [1][2]", f1(1, 1 / 5), 1, 1 / 2),  # [1] is not needed
    ("Elbe [2], , Oder [2]", f1(1, 2 / 5), 2 / 3, 1),
    ("Rhine [1], Rhine [1], Elbe [9]", f1(1, 2 / 5), 2 / 3, 1),  # named twice; out of range
    ("The RHEIN [1], Oder [2][2],", f1(1, 2 / 5), 1 / 2, 2 / 3),  # an alias, which the passage lacks
    ("Rhine [1]\nElbe [2]", f1(1, 1 / 5), 1, 1),  # the first line alone
    ("Rhine [1] and Elbe [2]", 0, 0, 0),  # no comma: one item
    ("Oder [1][2][3][3]", f1(1, 1 / 5), 1, 2 / 3),  # three citations count, of which [1] is not needed
    ("Rhine,Elbe [2]<|im_end|>", f1(1, 2 / 5), 1 / 2, 1),
]


def names_river(pairs):
    """Say that a hypothesis follows if the premise contains its item, which comes after the question."""
    for _, hypothesis in pairs:
        assert hypothesis.startswith(f"{RIVER_QUESTION} ")
    return [hypothesis.removeprefix(RIVER_QUESTION).strip() in premise for premise, hypothesis in pairs]


@pytest.mark.parametrize(("output", "expected", "recall", "precision"), LISTS)
def test_lists_by_the_formulas_of_alce(output, expected, recall, precision):
    assert list_f1(output, RIVERS) == same(expected)
    (scores,) = citation_scores([output], [RIVER_PASSAGES], names_river, list_questions=[RIVER_QUESTION])
    assert (scores["citation_recall"], scores["citation_precision"]) == (same(recall), same(precision))


# ---------------------------------------------------------------------- the evaluate modules


@pytest.fixture
def load(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="the modules are for the library evaluate (extra eval)")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    return lambda name: evaluate.load(str(METRICS / name))


def test_the_module_of_kilt(load):
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    predictions = []
    for instance in KILT["instances"]:
        passages = [{"id": id} for id in instance["retrieved"]]
        retrievals = [{"passages": passages}]
        predictions.append({"id": instance["id"], "output": instance["output"], "retrievals": retrievals})
    ours = load("kilt").compute(predictions=predictions, references=KILT["instances"])
    for their_name, our_name in KILT_NAMES.items():
        assert ours[our_name] == same(KILT["scores"]["set"][their_name])


def test_the_module_of_alce(load):
    predictions, references = [], []
    for instance, passages in zip(ALCE["instances"], alce_passages(), strict=True):
        id, output = instance["id"], instance["output"]
        retrievals = []
        for passage in passages:
            retrievals.append({"passages": [{"id": passage["title"], **passage}]})
        predictions.append({"id": id, "output_with_citations": output, "retrievals": retrievals})
        references.append({"id": id, "qa_pairs": alce_readings(instance), "claims": instance["claims"]})
    ours = load("alce").compute(predictions=predictions, references=references, nli=judge)
    for their_name, our_name in ALCE_NAMES.items():
        assert 100 * ours[our_name] == same(ALCE["scores"]["set"][their_name])
    assert ours["num_cited_outputs"] == sum(number is not None for number in ALCE["scores"]["each"]["citation_rec"])


@pytest.mark.parametrize("place", ["top level", "meta"])
def test_the_module_of_alce_judges_lists_item_by_item(load, place):
    retrievals = [{"passages": [{"id": str(number), **passage}]} for number, passage in enumerate(RIVER_PASSAGES)]
    predictions, references = [], []
    for number, (output, *_) in enumerate(LISTS):
        predictions.append({"id": str(number), "output_with_citations": output, "retrievals": retrievals})
        reference = {"id": str(number), "input": RIVER_QUESTION, "answers": RIVERS}
        if place == "meta":
            reference |= {"answers": ["Rhine", "Rhein"], "meta": {"answers": RIVERS}}
        references.append(reference)
    ours = load("alce").compute(predictions=predictions, references=references, nli=names_river)
    for name, column in (("list_f1", 1), ("citation_recall", 2), ("citation_precision", 3)):
        assert ours[name] == same(sum(row[column] for row in LISTS) / len(LISTS))
    assert ours["num_cited_outputs"] == len(LISTS)
    with pytest.raises(ValueError, match="Reference '0' has lists of answers, but no input"):
        without = [{**reference, "input": None} for reference in references]
        load("alce").compute(predictions=predictions, references=without, nli=names_river)
