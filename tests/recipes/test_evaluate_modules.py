"""The `evaluate` modules: loaded as a user loads them, by path and offline; each README's example gives what it says."""

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
PASSAGE = {"id": "p1", "title": "Night Watch", "text": "Rembrandt painted it in 1642."}
RETRIEVAL = {"passages": [PASSAGE], "scores": [0.5], "grounded_text": "Rembrandt painted it."}
PREDICTIONS = [  # lines as predictions.jsonl has them
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """evaluate's files of a computation go to a folder of the test's own."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def load(name):
    return evaluate.load(str(METRICS / name))


def test_all_modules_are_there():
    assert NAMES == ["alce", "correctness", "grounding", "kilt", "nsp_retrieval"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_readme(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (METRICS / name / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(examples[0], {}, name, None, None)
    assert len(test.examples) >= 4
    assert doctest.DocTestRunner().run(test).failed == 0
    assert readme.startswith("---\ntitle: ")


@pytest.mark.parametrize("name", NAMES)
def test_whole_lines_of_both_files_will_do(name):
    """Fields of which a module knows nothing, ids that are numbers, another order."""
    module = load(name)
    assert "Args:" in module.inputs_description and module.description.strip() and module.citation.strip()
    options = {"nli": lambda pairs: [True] * len(pairs)} if name in ("alce", "grounding") else {}
    references = [
        {**x, "meta": {"qa_pairs": [{"short_answers": x["answers"], "question": "?"}], "claims": ["a claim"]}}
        for x in REFERENCES
    ]
    found = module.compute(predictions=PREDICTIONS, references=references, **options)
    assert found == pytest.approx(EXPECTED[name], nan_ok=True)
    assert all(figure(measured).name == measured for measured in found if measured != "metric")  # in the vocabulary


EXPECTED = {
    "nsp_retrieval": {"ret": 0.5, "ret_precision": 0.5, "r_precision": 0.5, "kilt_recall@1": 0.5, "kilt_recall@5": 0.5}
    | {
        "nsp_needed": 0.5,
        "nsp_not_needed": float("nan"),
        "num_questions": 2,
        "mrr": 0.75,
        "ndcg@10": (1 + 0.63092975 / 1.63092975) / 2,
    }
    | {"query_recall@1": 0.5, "query_recall@5": 1.0},
    "kilt": {
        "accuracy": 0.0,
        "em": 0.0,
        "f1": 0.25,
        "rouge_l": 0.25,
        "kilt_accuracy": 0.0,
        "kilt_em": 0.0,
        "kilt_f1": 0.25,
        "kilt_rouge_l": 0.25,
    }
    | {"r_precision": 0.5, "kilt_recall@5": 0.5, "num_without_provenance": 0},
    "alce": {
        "str_em": 0.5,
        "str_hit": 0.5,
        "claim_recall": 1.0,
        "citation_recall": 1.0,
        "citation_precision": 1.0,
        "num_cited_outputs": 1,
    },
    "grounding": {"k_precision": 1.0, "num_grounded": 1, "gr": 1.0, "gr_success": 1.0, "gr_failure": float("nan")},
    "correctness": {"cor": 0.5, "cor_minus": 0.5, "metric": "short_answer", "cor_success": 1.0, "cor_failure": 0.0},
}


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_do_not_match_are_an_error(name):
    references = [{**REFERENCES[0]}, {**REFERENCES[1], "id": "3"}]
    with pytest.raises(
        ValueError, match=r"1 questions have no prediction \(3\); 1 predictions have no question \(2\)"
    ):
        load(name).compute(predictions=PREDICTIONS, references=references)


@pytest.mark.parametrize("name", ["nsp_retrieval", "kilt", "grounding", "correctness"])
def test_missing_provenance_is_an_error(name):
    references = [REFERENCES[0], {key: value for key, value in REFERENCES[1].items() if key != "provenance"}]
    with pytest.raises(ValueError, match=r"1 of 2 instances have no provenance \(2\)"):
        load(name).compute(predictions=PREDICTIONS, references=references)


def test_a_missing_text_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 rows have no 'output'"):
        load("kilt").compute(
            predictions=[{"id": "1", "retrievals": []}, {"id": "2", "output": "x", "retrievals": []}],
            references=REFERENCES,
        )


def test_questions_that_need_no_passage():
    free = {**REFERENCES[1], "provenance": []}
    found = load("nsp_retrieval").compute(predictions=PREDICTIONS, references=[REFERENCES[0], free], ks=[1])
    assert (found["ret"], found["nsp_not_needed"], found["num_questions"]) == (1.0, 0.0, 1)
    assert (
        load("kilt").compute(predictions=PREDICTIONS, references=[REFERENCES[0], free], rouge=False)[
            "num_without_provenance"
        ]
        == 1
    )
    found = load("correctness").compute(predictions=PREDICTIONS, references=[REFERENCES[0], free])
    assert (found["cor"], found["cor_minus"]) == (0.5, 1.0)


def test_rankings_of_an_evaluation_and_questions_of_which_nobody_knows():
    """As the files of an evaluation are: the ranking of the query embedding in a file of its own."""
    predictions = [{name: value for name, value in row.items() if name != "query_ranking"} for row in PREDICTIONS]
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
    found = load("nsp_retrieval").compute(predictions=predictions, references=references, rankings=rankings)
    assert found["mrr"] == 0.75 and found["nsp_not_needed"] == 0.0 and found["num_questions"] == 2
    assert (
        load("nsp_retrieval").compute(
            predictions=predictions, references=references, rankings=rankings, ranking="pool"
        )["query_recall@1"]
        == 0.5
    )
    assert "mrr" not in load("nsp_retrieval").compute(predictions=predictions, references=references)


def test_alce_judges_what_the_references_hold():
    """ELI5 has claims and no readings; an output without one of both is an error, with counts."""
    judge = {"nli": lambda pairs: [hypothesis in premise for premise, hypothesis in pairs]}
    claims = [{"id": "1", "claims": ["Rembrandt", "1642"]}, {"id": "2", "claims": ["x"]}]
    found = load("alce").compute(predictions=PREDICTIONS, references=claims, **judge)
    assert (found["claim_recall"], found["citation_recall"]) == (0.25, 0.0) and "str_em" not in found
    with pytest.raises(ValueError, match="1 of 2 questions have no claims"):
        load("alce").compute(predictions=PREDICTIONS, references=[claims[0], {"id": "2"}], **judge)
    with pytest.raises(ValueError, match="1 of 2 rows have no 'retrievals'"):
        load("alce").compute(
            predictions=[PREDICTIONS[0], {"id": "1", "output_with_citations": "x"}], references=claims
        )


def test_correctness_of_fever_by_label_and_by_nli():
    claims = [{**x, "dataset": "fever", "input": "Rembrandt painted it.", "answers": ["SUPPORTS"]} for x in REFERENCES]
    predictions = [{**PREDICTIONS[0], "output": "supports"}, PREDICTIONS[1]]
    module = load("correctness")
    assert module.compute(predictions=predictions, references=claims) == {
        "cor": 0.5,
        "cor_minus": 0.0,
        "metric": "fever_label",
        "cor_success": 0.0,
        "cor_failure": 1.0,
    }
    by_nli = module.compute(
        predictions=predictions,
        references=claims,
        nli=lambda pairs: [hypothesis in premise for premise, hypothesis in pairs],
    )
    assert (by_nli["cor"], by_nli["cor_minus"], by_nli["metric"]) == (0.5, 0.5, "fever_nli")
    with pytest.raises(ValueError, match="fever_nli.*needs an NLI model"):
        module.compute(predictions=predictions, references=claims, metric="fever_nli")
    with pytest.raises(ValueError, match="different metrics"):
        module.compute(predictions=predictions, references=[claims[0], REFERENCES[1]])


def test_grounding_without_an_nli_model_has_no_gr():
    assert set(load("grounding").compute(predictions=PREDICTIONS, references=REFERENCES)) == {
        "k_precision",
        "num_grounded",
    }


def test_a_judge_by_its_name(tmp_path):
    """`nli` as a user gives it: the folder of a (trained) model."""
    from support.nli_models import make_classifier

    for part in make_classifier(labels=["not_entailment", "entailment"]):
        part.save_pretrained(tmp_path / "nli")
    spans = []
    for id, text in (("p1", "w3 red"), ("p9", "w3 blue")):
        spans.append({"passages": [{"id": id, "title": "", "text": "w1 red w2"}], "grounded_text": text})
    predictions = [{"id": "1", "retrievals": spans[:1]}, {"id": "2", "retrievals": spans[1:]}]
    found = load("grounding").compute(predictions=predictions, references=REFERENCES, nli=str(tmp_path / "nli"))
    assert {name: found[name] for name in ("gr", "gr_success", "gr_failure")} == {
        "gr": 0.5,
        "gr_success": 1.0,
        "gr_failure": 0.0,
    }
    asked = []
    options = {
        "references": REFERENCES,
        "nli": lambda pairs: asked.extend(pairs) or [True] * len(pairs),
        "hypothesis": "{question} {sentence}",
    }
    assert (
        load("grounding").compute(
            predictions=[{**prediction, "input": "which?"} for prediction in predictions], **options
        )["gr"]
        == 1.0
    )
    assert [hypothesis for _, hypothesis in asked] == ["which? w3 red", "which? w3 blue"]
    with pytest.raises(ValueError, match="2 of 2 rows have no 'input'"):
        load("grounding").compute(predictions=predictions, **options)


def test_the_foreign_trainer_package_is_named(tmp_path):
    """Where PyPI's `trainer` comes first, the error says which package is meant."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    code = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]; "  # it would find ours all the same
    code += f"sys.path.insert(0, {str(tmp_path)!r}); import evaluate; evaluate.load({str(METRICS / 'kilt')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 1 and "pip install cosup" in result.stderr


def test_predictions_survive_a_file(tmp_path):
    """From JSON Lines on disk to a figure."""
    files = {"predictions": PREDICTIONS, "references": REFERENCES}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in files}
    assert load("kilt").compute(**inputs, rouge=False)["kilt_f1"] == 0.25
