"""The `evaluate` modules, loaded by path and offline as users do. The examples of the READMEs give what they show."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.judging.figures import figure

evaluate = pytest.importorskip("evaluate", reason="the modules are for the library evaluate (extra eval)")

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "recipes" / "metrics"
NAMES = sorted(folder.name for folder in METRICS.iterdir() if folder.is_dir())
NAN = float("nan")
PASSAGE = {"id": "p1", "title": "Night Watch", "text": "Rembrandt painted it in 1642."}
RETRIEVAL = {"passages": [PASSAGE], "scores": [0.5], "grounded_text": "Rembrandt painted it."}
# Lines of predictions.jsonl, in another order than the references.
PREDICTIONS = [
    {
        "id": "2",
        "dataset": "nq",
        "output": "",
        "output_with_citations": "",
        "retrievals": [],
        "query_ranking": ["p9", "p2"],
        "seconds": 0.1,
    },
    {
        "id": "1",
        "output": "Rembrandt painted it.",
        "output_with_citations": "Rembrandt painted it [1].",
        "retrievals": [RETRIEVAL],
        "query_ranking": ["p1"],
    },
]
REFERENCES = [
    {
        "id": 1,
        "dataset": "nq",
        "instruction": "",
        "input": "who?",
        "answers": ["Rembrandt"],
        "provenance": [["p1"]],
        "candidates": ["p1", "p9"],
    },
    {
        "id": 2,
        "dataset": "nq",
        "instruction": "",
        "input": "when?",
        "answers": ["1642"],
        "provenance": [["p2", "p3"]],
        "candidates": [],
    },
]
# What each module gives for these.
EXPECTED = {
    "nsp_retrieval": {
        "ret": 0.5,
        "ret_precision": 0.5,
        "r_precision": 0.5,
        "kilt_recall@1": 0.5,
        "kilt_recall@5": 0.5,
        "nsp_needed": 0.5,
        "nsp_not_needed": NAN,
        "num_questions": 2,
        "mrr": 0.75,
        "ndcg@10": (1 + 0.63092975 / 1.63092975) / 2,
        "query_recall@1": 0.5,
        "query_recall@5": 1.0,
    },
    "kilt": {
        "accuracy": 0.0,
        "em": 0.0,
        "f1": 0.25,
        "rouge_l": 0.25,
        "kilt_accuracy": 0.0,
        "kilt_em": 0.0,
        "kilt_f1": 0.25,
        "kilt_rouge_l": 0.25,
        "r_precision": 0.5,
        "kilt_recall@5": 0.5,
        "num_without_provenance": 0,
        "num_empty_answers": 0,
    },
    "alce": {
        "str_em": 0.5,
        "str_hit": 0.5,
        "num_empty_answers": 0,
        "claim_recall": 1.0,
        "citation_recall": 1.0,
        "citation_precision": 1.0,
        "num_cited_outputs": 1,
    },
    "grounding": {"k_precision": 1.0, "num_grounded": 1, "gr": 1.0, "gr_success": 1.0, "gr_failure": NAN},
    "correctness": {
        "cor": 0.5,
        "cor_minus": 0.5,
        "metric": "short_answer",
        "cor_success": 1.0,
        "cor_failure": 0.0,
        "num_empty_answers": 0,
    },
}


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path, monkeypatch):
    """Make evaluate write its temporary files into the folder of the test."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def load(name):
    return evaluate.load(str(METRICS / name))


def says_yes(pairs):
    return [True] * len(pairs)


def is_contained(pairs):
    return [hypothesis in premise for premise, hypothesis in pairs]


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def test_all_modules_are_there():
    assert NAMES == ["alce", "correctness", "grounding", "kilt", "nsp_retrieval"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_readme(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (METRICS / name / "README.md").read_text()
    assert readme.startswith("---\ntitle: ")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(examples[0], {}, name, None, None)
    assert len(test.examples) >= 4
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_module_describes_itself(name):
    module = load(name)
    assert "Args:" in module.inputs_description
    assert module.description.strip()
    assert module.citation.strip()


@pytest.mark.parametrize("name", NAMES)
def test_whole_lines_of_both_files_are_accepted(name):
    """The lines have fields that a module does not know, ids that are numbers, and another order."""
    references = []
    for reference in REFERENCES:
        readings = [{"short_answers": reference["answers"], "question": "?"}]
        references.append({**reference, "meta": {"qa_pairs": readings, "claims": ["a claim"]}})
    options = {"nli": says_yes} if name in ("alce", "grounding") else {}
    scores = load(name).compute(predictions=PREDICTIONS, references=references, **options)
    assert scores == pytest.approx(EXPECTED[name], nan_ok=True)
    for figure_name in set(scores) - {"metric"}:
        assert figure(figure_name).name == figure_name  # in the vocabulary


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_do_not_match_are_an_error(name):
    references = [REFERENCES[0], {**REFERENCES[1], "id": "3"}]
    message = r"1 questions have no prediction \(3\); 1 predictions have no question \(2\)"
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=PREDICTIONS, references=references)


@pytest.mark.parametrize("name", ["nsp_retrieval", "kilt", "grounding", "correctness"])
def test_missing_provenance_is_an_error(name):
    references = [REFERENCES[0], without(REFERENCES[1], "provenance")]
    with pytest.raises(ValueError, match=r"1 of 2 instances have no provenance \(2\)"):
        load(name).compute(predictions=PREDICTIONS, references=references)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_refused_by_name(name):
    metric = load(name)
    with pytest.raises(TypeError, match="predictions holds 'Rembrandt', expected dictionaries"):
        metric.compute(predictions=["Rembrandt"], references=REFERENCES)
    with pytest.raises(TypeError, match="references holds 'Rembrandt', expected dictionaries"):
        metric.compute(predictions=PREDICTIONS, references=["Rembrandt"])


def test_a_missing_text_is_an_error():
    predictions = [{"id": "1", "retrievals": []}, {"id": "2", "output": "x", "retrievals": []}]
    with pytest.raises(ValueError, match="1 of 2 rows have no 'output'"):
        load("kilt").compute(predictions=predictions, references=REFERENCES)


def test_questions_that_need_no_passage():
    references = [REFERENCES[0], {**REFERENCES[1], "provenance": []}]
    inputs = {"predictions": PREDICTIONS, "references": references}
    retrieval = load("nsp_retrieval").compute(**inputs, ks=[1])
    assert (retrieval["ret"], retrieval["nsp_not_needed"], retrieval["num_questions"]) == (1.0, 0.0, 1)
    assert load("kilt").compute(**inputs, rouge=False)["num_without_provenance"] == 1
    correctness = load("correctness").compute(**inputs)
    assert (correctness["cor"], correctness["cor_minus"]) == (0.5, 1.0)


def test_rankings_of_an_evaluation_and_questions_of_unknown_provenance():
    """An evaluation writes the rankings by the query embedding into another file than the predictions."""
    predictions = [without(prediction, "query_ranking") for prediction in PREDICTIONS]
    predictions += [{"id": "3", "retrievals": [RETRIEVAL]}, {"id": "4", "retrievals": []}]
    references = [
        *REFERENCES,
        {"id": "3", "provenance": [], "meta": {"provenance_unknown": True}},
        {"id": "4", "provenance": []},
    ]
    rankings = [
        {"id": "1", "corpus": ["p9", "p1"], "pool": ["p1"]},
        {"id": "2", "corpus": ["p2", "p9"], "pool": ["p9", "p2"]},
    ]
    inputs = {"predictions": predictions, "references": references}
    over_corpus = load("nsp_retrieval").compute(**inputs, rankings=rankings)
    assert over_corpus["mrr"] == 0.75
    assert over_corpus["nsp_not_needed"] == 0.0
    assert over_corpus["num_questions"] == 2
    over_pool = load("nsp_retrieval").compute(**inputs, rankings=rankings, ranking="pool")
    assert over_pool["query_recall@1"] == 0.5
    of_two = load("nsp_retrieval").compute(**inputs, rankings=rankings, ks=[1, 2], num_passages=2)
    assert "query_recall@1" in of_two and "query_recall@2" not in of_two  # both passages: nothing can be missed
    assert "mrr" not in load("nsp_retrieval").compute(**inputs)
    nothing_found = [rankings[0], {**rankings[1], "corpus": []}]
    assert load("nsp_retrieval").compute(**inputs, rankings=nothing_found)["mrr"] == 0.25
    with pytest.raises(ValueError, match="1 of 2 questions with provenance have no ranking"):
        load("nsp_retrieval").compute(**inputs, rankings=rankings[:1])
    with pytest.raises(ValueError, match="1 of the rankings repeat the id of another"):
        load("nsp_retrieval").compute(**inputs, rankings=[*rankings, rankings[0]])
    with pytest.raises(ValueError, match="None of the rankings has the id of a prediction"):
        load("nsp_retrieval").compute(**inputs, rankings=[{**rankings[0], "id": "77"}])
    with pytest.raises(ValueError, match="2 of 2 rankings have no 'all'"):
        load("nsp_retrieval").compute(**inputs, rankings=rankings, ranking="all")


def test_answers_that_normalise_to_nothing_count_as_in_the_official_code_and_are_counted():
    readings = [{"short_answers": ["The"]}]
    references = [{**REFERENCES[0], "answers": ["The"], "meta": {"qa_pairs": readings}}]
    predictions = [{**PREDICTIONS[1], "output": "no idea", "output_with_citations": "no idea"}]
    for name, figure_name, value in (("correctness", "cor", 1.0), ("kilt", "em", 0.0), ("alce", "str_em", 1.0)):
        scores = load(name).compute(predictions=predictions, references=references)
        assert (scores[figure_name], scores["num_empty_answers"]) == (value, 1)
    empty = [{**REFERENCES[0], "answers": [" "]}]
    for name in ("correctness", "kilt"):
        with pytest.raises(ValueError, match="1 of 1 questions have no answers, or only empty ones"):
            load(name).compute(predictions=predictions, references=empty)


def test_alce_judges_what_the_references_hold():
    """ELI5 has claims and no readings. A reference without either, or a prediction without retrievals, is an error."""
    references = [{"id": "1", "claims": ["Rembrandt", "1642"]}, {"id": "2", "claims": ["x"]}]
    scores = load("alce").compute(predictions=PREDICTIONS, references=references, nli=is_contained)
    assert (scores["claim_recall"], scores["citation_recall"]) == (0.25, 0.0)
    assert "str_em" not in scores
    with pytest.raises(ValueError, match="1 of 2 questions have no claims"):
        load("alce").compute(predictions=PREDICTIONS, references=[references[0], {"id": "2"}], nli=is_contained)
    without_retrievals = [PREDICTIONS[0], {"id": "1", "output_with_citations": "x"}]
    with pytest.raises(ValueError, match="1 of 2 rows have no 'retrievals'"):
        load("alce").compute(predictions=without_retrievals, references=references)


def test_correctness_of_fever_by_label_and_by_nli():
    fields = {"dataset": "fever", "input": "Rembrandt painted it.", "answers": ["SUPPORTS"]}
    claims = [{**reference, **fields} for reference in REFERENCES]
    predictions = [{**PREDICTIONS[0], "output": "supports"}, PREDICTIONS[1]]
    module = load("correctness")
    assert module.compute(predictions=predictions, references=claims) == {
        "cor": 0.5,
        "cor_minus": 0.0,
        "metric": "fever_label",
        "cor_success": 0.0,
        "cor_failure": 1.0,
        "num_empty_answers": 0,
    }
    by_nli = module.compute(predictions=predictions, references=claims, nli=is_contained)
    assert (by_nli["cor"], by_nli["cor_minus"], by_nli["metric"]) == (0.5, 0.5, "fever_nli")
    with pytest.raises(ValueError, match="fever_nli.*needs an NLI model"):
        module.compute(predictions=predictions, references=claims, metric="fever_nli")
    with pytest.raises(ValueError, match="different metrics"):
        module.compute(predictions=predictions, references=[claims[0], REFERENCES[1]])


def test_grounding_without_an_nli_model_has_no_gr():
    scores = load("grounding").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert set(scores) == {"k_precision", "num_grounded"}


@pytest.fixture
def grounded_predictions():
    """One answer that is grounded on the right passage and entailed by it, and one that is neither."""
    predictions = []
    for id, passage_id, text in (("1", "p1", "w3 red"), ("2", "p9", "w3 blue")):
        passage = {"id": passage_id, "title": "", "text": "w1 red w2"}
        predictions.append({"id": id, "retrievals": [{"passages": [passage], "grounded_text": text}]})
    return predictions


def test_a_judge_by_its_name(grounded_predictions, tmp_path):
    """As a user does, `nli` names the folder of a (trained) model."""
    from support.nli_models import make_classifier

    model, tokenizer = make_classifier(labels=["not_entailment", "entailment"])
    model.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    scores = load("grounding").compute(
        predictions=grounded_predictions, references=REFERENCES, nli=str(tmp_path / "nli")
    )
    assert (scores["gr"], scores["gr_success"], scores["gr_failure"]) == (0.5, 1.0, 0.0)


def test_a_hypothesis_with_the_question(grounded_predictions):
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return says_yes(pairs)

    options = {"references": REFERENCES, "nli": judge, "hypothesis": "{question} {sentence}"}
    with_inputs = [{**prediction, "input": "which?"} for prediction in grounded_predictions]
    assert load("grounding").compute(predictions=with_inputs, **options)["gr"] == 1.0
    assert [hypothesis for _, hypothesis in asked] == ["which? w3 red", "which? w3 blue"]
    with pytest.raises(ValueError, match="2 of 2 rows have no 'input'"):
        load("grounding").compute(predictions=grounded_predictions, **options)


def test_the_foreign_trainer_package_is_named(tmp_path):
    """If PyPI's `trainer` is found first, the error says which package is meant."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    lines = [
        "import sys",
        # The finder of an editable installation would find our package in any case.
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]",
        f"sys.path.insert(0, {str(tmp_path)!r})",
        "import evaluate",
        f"evaluate.load({str(METRICS / 'kilt')!r})",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 1
    assert "pip install cosup" in result.stderr


def test_predictions_survive_a_file(tmp_path):
    """From JSON Lines on disk to a figure."""
    inputs = {}
    for name, rows in {"predictions": PREDICTIONS, "references": REFERENCES}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs[name] = [json.loads(line) for line in path.read_text().splitlines()]
    assert load("kilt").compute(**inputs, rouge=False)["kilt_f1"] == 0.25
