"""
KILT's and ALCE's figures against numbers that their own code gave on the same predictions.

`official_scores.json` holds the inputs, the numbers, the commits of the two repositories and how their code was run. Only the scoring is compared: in ALCE's
code the NLI model was replaced by the lexical judge that is defined here, and NLTK's sentence splitter by ours. Left out are the cases in which we differ by
intent: an empty evidence set (none for us), and the citation `[0]` (out of range for us, the last passage for ALCE).
"""

import json
import re
from pathlib import Path

import pytest

from trainer.judging.correctness import kilt_scores, str_em
from trainer.judging.grounding import citation_scores, claim_recall
from trainer.judging.retrieval import kilt_recall_at_k, mean_scores, retrieval_scores

METRICS = Path(__file__).parents[2] / "recipes" / "metrics"
OFFICIAL = json.loads((Path(__file__).parent / "official_scores.json").read_text(encoding="utf-8"))
KILT, ALCE = OFFICIAL["kilt"], OFFICIAL["alce"]
KILT_NAMES = {  # theirs -> ours
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
RECALLS = (2, 3, 10)  # further k, whose recall was asked for the whole set only


def same(number):
    return pytest.approx(number, rel=0, abs=1e-9)


def judge(pairs):
    """A hypothesis follows if each of its words of four characters and more is one of the premise's words."""
    return [
        set(re.findall(r"\w{4,}", claim.lower())) <= set(re.findall(r"\w+", premise.lower()))
        for premise, claim in pairs
    ]


# ---------------------------------------------------------------------- KILT


def kilt_row(x):
    """Our scores of one question; where no evidence is known, retrieval is wrong."""
    found = {"r_precision": 0.0, "kilt_recall@5": 0.0} | {f"kilt_recall@{k}": 0.0 for k in RECALLS}
    if x["provenance"]:
        found |= retrieval_scores(x["retrieved"], x["provenance"], ks=(5,))
        found |= {f"kilt_recall@{k}": kilt_recall_at_k(x["retrieved"], x["provenance"], k) for k in RECALLS}
    return found | kilt_scores(x["output"], x["answers"], found["r_precision"])


@pytest.fixture
def kilt_rows():
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    return [kilt_row(x) for x in KILT["instances"]]


@pytest.mark.parametrize("name", KILT_NAMES)
def test_each_score_of_kilt(name, kilt_rows):
    theirs = KILT["scores"]["each"][name]
    assert len(set(theirs)) > 1  # questions on which they differ
    assert [row[KILT_NAMES[name]] for row in kilt_rows] == same(theirs)


@pytest.mark.parametrize("name", [*KILT_NAMES, *(f"recall@{k}" for k in RECALLS)])
def test_mean_scores_of_kilt(name, kilt_rows):
    ours = KILT_NAMES.get(name, f"kilt_{name}")
    assert mean_scores(kilt_rows, [ours])[ours] == same(KILT["scores"]["set"][name])


# ---------------------------------------------------------------------- ALCE


def alce_passages():
    return [[ALCE["documents"][place] for place in x["passages"]] for x in ALCE["instances"]]


def alce_citations(**options):
    return citation_scores([x["output"] for x in ALCE["instances"]], alce_passages(), judge, **options)


@pytest.fixture
def alce_rows():
    """Our scores of each output; those of citations are `None` where it is empty."""
    instances, empty = ALCE["instances"], {"citation_recall": None, "citation_precision": None}
    claims = claim_recall([x["output"] for x in instances], [x["claims"] for x in instances], judge)
    rows = []
    for x, recall, cited in zip(instances, claims, alce_citations(), strict=True):
        share, hit = str_em(x["output"], [{"short_answers": answers} for answers in x["short_answers"]])
        rows.append({"str_em": share, "str_hit": hit, "claim_recall": recall} | (cited or empty))
    return rows


@pytest.mark.parametrize("name", ALCE_NAMES)
def test_each_score_of_alce(name, alce_rows):
    """Theirs are in percent."""
    theirs, ours = ALCE["scores"]["each"][name], [row[ALCE_NAMES[name]] for row in alce_rows]
    assert len(set(theirs)) > 1
    assert [number is None for number in ours] == [number is None for number in theirs]
    assert [100 * number for number in ours if number is not None] == same(
        [number for number in theirs if number is not None]
    )


@pytest.mark.parametrize("name", ALCE_NAMES)
def test_mean_scores_of_alce(name, alce_rows):
    assert 100 * mean_scores(alce_rows, [ALCE_NAMES[name]])[ALCE_NAMES[name]] == same(ALCE["scores"]["set"][name])


@pytest.mark.parametrize("most", ALCE["scores"]["at_most_citations"])
def test_other_numbers_of_citations_that_count(most):
    ours = mean_scores([each for each in alce_citations(at_most_citations=int(most)) if each])
    theirs = ALCE["scores"]["at_most_citations"][most]
    assert sorted(theirs) == ["citation_prec", "citation_rec"]
    assert {name: 100 * ours[ALCE_NAMES[name]] for name in theirs} == same(theirs)


def test_counts_of_several_citations():
    """The percentages that ALCE's code prints, with two decimals."""
    total = {
        name: sum(each[name] for each in alce_citations() if each)
        for name in ("sentences", "several", "supported", "unneeded")
    }
    shares = {
        "multiple citations": total["several"] / total["sentences"],
        "supported": total["supported"] / total["several"],
        "overcite": total["unneeded"] / total["supported"],
    }
    assert {name: float(f"{100 * share:.2f}") for name, share in shares.items()} == {
        name: ALCE["scores"]["set"][name] for name in shares
    }


# ---------------------------------------------------------------------- the evaluate modules


@pytest.fixture
def load(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="the modules are for the library evaluate (extra eval)")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    return lambda name: evaluate.load(str(METRICS / name))


def test_the_module_of_kilt(load):
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    predictions = []
    for x in KILT["instances"]:
        passages = [{"id": id} for id in x["retrieved"]]
        predictions.append({"id": x["id"], "output": x["output"], "retrievals": [{"passages": passages}]})
    ours = load("kilt").compute(predictions=predictions, references=KILT["instances"])
    assert {name: ours[KILT_NAMES[name]] for name in KILT_NAMES} == same(
        {name: KILT["scores"]["set"][name] for name in KILT_NAMES}
    )


def test_the_module_of_alce(load):
    predictions, references = [], []
    for x, passages in zip(ALCE["instances"], alce_passages(), strict=True):
        retrievals = [{"passages": [{"id": p["title"], "title": p["title"], "text": p["text"]}]} for p in passages]
        predictions.append({"id": x["id"], "output_with_citations": x["output"], "retrievals": retrievals})
        references.append(
            {
                "id": x["id"],
                "qa_pairs": [{"short_answers": answers} for answers in x["short_answers"]],
                "claims": x["claims"],
            }
        )
    ours = load("alce").compute(predictions=predictions, references=references, nli=judge)
    assert {name: 100 * ours[ALCE_NAMES[name]] for name in ALCE_NAMES} == same(
        {name: ALCE["scores"]["set"][name] for name in ALCE_NAMES}
    )
    assert ours["num_cited_outputs"] == sum(number is not None for number in ALCE["scores"]["each"]["citation_rec"])
