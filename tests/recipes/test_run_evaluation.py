"""Judging: what a results folder holds, that processes share the work, that a killed run goes on, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_cosup import Completion, CoSupForCausalLM, Retrieval
from modeling_cosup.facts_cosup import facts_of
from modeling_cosup.lines_cosup import read_lines
from support.evaluation_world import (
    CORPUS,
    FREE,
    IDS,
    QUESTIONS,
    UNKNOWN,
    question,
    without_times,
    write_checkpoint,
    write_world,
)
from support.models import make_model
from support.nli_models import make_classifier
from trainer.card import write_card
from trainer.judging.answers import as_prediction, cite, embed_queries, wrong_passages
from trainer.judging.figures import MAIN
from trainer.judging.judge import evaluate_tasks
from trainer.judging.matching import retrieved_ids
from trainer.judging.results import read_results
from trainer.judging.scoring import cor_names, measure, score
from trainer.judging.tasks import Task, read_tasks
from trainer.reports.comparison import compare_results
from trainer.reports.evaluation import write_report

ROOT = Path(__file__).parents[2]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def judged(model, world, tmp_path_factory):
    """A results folder with all modes, over the corpus and over a pool, and what was returned."""
    output = tmp_path_factory.mktemp("judged")
    tasks = [Task("full", **world, split="in-domain", **SHORT), Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2, **SHORT)]
    modes = ("retrieval", "gold", "off", "forced", "wrong")
    return output, evaluate_tasks(model, tasks, output, modes, batch_size=3)


def predictions(output, mode, task="full"):
    return read_lines(output / task / mode / "predictions.jsonl")


def pool_of(x, size):
    """Gold candidates, then the others, in the order of the file."""
    gold = [id for id in x["candidates"] if id in sum(x["provenance"], [])]
    return [*gold, *(id for id in x["candidates"] if id not in gold)][:size]


# ---------------------------------------------------------------------- what the model is asked


def test_every_mode_retrieves_what_it_should(judged):
    output, results = judged
    gold = {x["id"]: x["provenance"] for x in QUESTIONS}
    assert [p["id"] for p in predictions(output, "retrieval")] == [x["id"] for x in (*QUESTIONS, FREE, UNKNOWN)]
    assert all(not p["retrievals"] for p in predictions(output, "off"))
    for p in predictions(output, "gold"):
        ids = retrieved_ids(p)
        assert ids and ids == gold[p["id"]][0][: len(ids)]  # in order, the first forced
    for p in predictions(output, "wrong"):
        ids = set(retrieved_ids(p))
        assert ids and ids.isdisjoint(sum(gold[p["id"]], []))
    for p, x in zip(predictions(output, "forced", "pool"), (*QUESTIONS, FREE, UNKNOWN), strict=True):
        ids = [[passage["id"] for passage in r["passages"]] for r in p["retrievals"]]
        assert 1 <= len(ids) <= 2 and all(len(each) == 2 for each in ids)
        assert set(sum(ids, [])) <= set(pool_of(x, 4))
    assert results["tasks"]["full"]["modes"]["gold"]["n"] == len(QUESTIONS)
    assert results["tasks"]["full"]["modes"]["off"]["n"] == len(QUESTIONS) + 2


def test_figures_are_those_of_the_predictions(judged):
    output, results = judged
    found = predictions(output, "forced")[: len(QUESTIONS)]
    hits = [any(id in sum(x["provenance"], []) for id in retrieved_ids(p)) for p, x in zip(found, QUESTIONS, strict=True)]
    figures = results["tasks"]["full"]["modes"]["forced"]["metrics"]
    assert (figures["ret"]["value"], figures["ret"]["n"]) == (pytest.approx(np.mean(hits)), len(QUESTIONS))
    assert figures["nsp_needed"]["value"] == figures["nsp_not_needed"]["value"] == 1.0
    assert figures["cor"]["n"] == len(QUESTIONS) + 1  # that of unknown provenance counts, the one that needs no passage does not
    assert figures["cor_not_needed"]["n"] == 1
    assert figures["str_em"]["n"] == 1
    assert "gr" not in figures and "citation_recall" not in figures and "fever_label" not in figures
    assert "ret" not in results["tasks"]["full"]["modes"]["gold"]["metrics"]  # given, not found
    assert [row["id"] for row in read_lines(output / "full" / "forced" / "scores.jsonl")] == [p["id"] for p in predictions(output, "forced")]
    assert results["averages"]["all"]["forced"]["ret"]["tasks"] == 2
    notes = " ".join(results["tasks"]["full"]["left_out"])
    assert "1 of 9 questions need no passage" in notes and "1 of 9 questions do not say" in notes and "no NLI model" in notes


def test_rankings_against_plain_products(judged, model):
    output, results = judged
    index = model.build_index(CORPUS, show_progress_bar=False)
    scores = (embed_queries(model, QUESTIONS) @ index.embeddings.T).numpy()
    ranked = [[IDS[row] for row in np.argsort(-row_scores)] for row_scores in scores]
    rows = read_lines(output / "pool" / "query" / "ranking.jsonl")
    assert [row["corpus"] for row in rows] == ranked
    for row, x, own in zip(rows, QUESTIONS, ranked, strict=True):
        assert row["pool"] == [id for id in own if id in pool_of(x, 4)]
    ranks = [1 + min(own.index(id) for id in sum(x["provenance"], [])) for own, x in zip(ranked, QUESTIONS, strict=True)]
    figures = results["tasks"]["pool"]["query"]["corpus"]
    assert figures["mrr"]["value"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert figures["query_recall@5"]["value"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    assert "query_recall@20" not in figures  # of seven passages
    assert set(results["tasks"]["pool"]["query"]["pool"]) == {"mrr", "ndcg@10", "query_recall@1"}


def test_pools():
    task = Task("t", "eval.jsonl", pool="2")
    x = question(0, CORPUS[4])
    assert task._pool(x) == ["p4", "p0"]
    assert Task("t", "eval.jsonl", pool=2, gold_in_pool=False)._pool(x) == ["p0", "p1"]


def test_citations_stand_before_the_end_of_each_sentence(model):
    """Two retrievals of one passage, then another, with free text around: numbers count distinct passages."""
    tokenizer, config = model.tokenizer, model.config

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens, trace = [*ids("Well.")], []
    for id, text in (("p0", "It was Rembrandt. He painted"), ("p1", 'who said "radium!"'), ("p0", "")):
        passages = [{"id": id, "title": id, "text": f"text of {id}"}]
        position = 3 + len(tokens)
        tokens += [config.nsp_token_id, *ids("a passage"), config.cs_token_id, *ids(text), config.ce_token_id]
        trace.append(Retrieval(0, position, passages, [0.5], (3 + len(tokens) - 1 - len(ids(text)), 3 + len(tokens) - 1)))
    tokens += ids("end.")
    found = as_prediction(FREE, Completion(0, tokens, "its text", "cited", 9, trace), 3, tokenizer)
    assert found["output_with_citations"] == 'Well. It was Rembrandt [1]. He painted [1] who said "radium [2]!" end.'
    assert [r["grounded_text"] for r in found["retrievals"]] == ["It was Rembrandt. He painted", 'who said "radium!"', ""]
    assert retrieved_ids(found) == ["p0", "p1", "p0"] and found["retrievals"][1]["scores"] == [0.5]
    assert found["retrievals"][1]["passages"] == [{"id": "p1", "title": "p1", "text": "text of p1"}]
    assert (found["id"], found["output"], found["cited_text"], found["num_generated_tokens"]) == ("q90", "its text", "cited", 9)
    assert cite("Yes", "[1][2]") == "Yes [1][2]" and cite("(Really?)", "[1]") == "(Really [1]?)"


def test_wrong_passages_depend_on_seed_and_question_alone(model):
    index = model.build_index(CORPUS, show_progress_bar=False)
    first = wrong_passages(QUESTIONS, index, 0)
    assert [len(ids) for ids in first] == [len(x["provenance"][0]) for x in QUESTIONS]
    assert wrong_passages(QUESTIONS[3:], index, 0) == first[3:]
    assert wrong_passages(QUESTIONS, index, 1) != first
    without_pools = [{**x, "candidates": []} for x in QUESTIONS]
    assert all(set(ids).isdisjoint(sum(x["provenance"], [])) for ids, x in zip(wrong_passages(without_pools, index), QUESTIONS, strict=True))
    with pytest.raises(ValueError, match="1 of 2 questions have no passage but gold ones"):
        wrong_passages([QUESTIONS[0], {**QUESTIONS[1], "candidates": ["p0", "p1", "p3"]}], index)


# ---------------------------------------------------------------------- scores


def prediction(x, output, retrieved=(), grounded=""):
    retrievals = []
    for id in retrieved:
        passages = [{"id": id, "title": "", "text": f"text of {id}"}]
        retrievals.append({"passages": passages, "scores": [1.0], "grounded_text": grounded})
    return {"id": x["id"], "output": output, "output_with_citations": output, "retrievals": retrievals}


def test_scores_by_hand():
    questions = [
        {**QUESTIONS[0], "answers": ["Night Watch"]},
        {**QUESTIONS[2], "dataset": "fever", "answers": ["SUPPORTS"], "input": "a claim"},
        {**FREE, "answers": ["hello"]},
        {**UNKNOWN, "answers": ["x"]},
    ]
    made = [prediction(questions[0], "the Night Watch", ["p1", "p0", "p1"], "text of all"), prediction(questions[1], "this supports it", ["p3"], "text of p3")]
    made += [prediction(questions[2], "hello", ["p0"]), prediction(questions[3], "a Night")]
    found = score(made[::-1], questions)
    assert found["ret"] == [1.0, 0.0, None, None] and found["ret_precision"] == [0.5, 0.0, None, None] and found["r_precision"] == [0.0, 0.0, None, None]
    assert found["cor"] == [1.0, 1.0, None, 1.0] and found["cor_not_needed"] == [None, None, 1.0, None]
    assert found["em_not_needed"] == [None, None, 1.0, None]
    assert found["cor_minus"] == [1.0, 0.0, None, None]
    assert found["kilt_em"] == [0.0, 0.0, None, None] and found["em"] == [1.0, 0.0, None, 0.0]
    assert found["nsp_needed"] == [1.0, 1.0, None, None] and found["nsp_not_needed"] == [None, None, 1.0, None]
    assert found["fever_label"] == [None, 1.0, None, None] and found["str_em"] == [None, None, None, 1.0]
    assert found["k_precision"][1] == 1.0 and found["k_precision"][3] is None
    judged = score(made, questions, entail=lambda pairs: [hypothesis == "text of p3" for _, hypothesis in pairs])
    assert judged["gr"] == [0.0, 1.0, None, None] and judged["gr_success"] == [0.0, None, None, None] and judged["gr_failure"] == [None, 1.0, None, None]
    assert judged["fever_nli"] == [None, 0.0, None, None] and judged["cor"][1] == 0.0  # Cor is by NLI now
    with pytest.raises(ValueError, match="answered 0 of 1 pairs"):
        score(made, questions, entail=lambda pairs: [])
    with pytest.raises(ValueError, match="3 predictions and 4 questions do not match by id: 1 questions have no prediction"):
        score(made[1:], questions)
    assert score([prediction(questions[0], "x")], questions[:1], metric="em")["cor"] == [0.0]


def test_cor_of_questions_with_claims_is_claim_recall():
    """ALCE's ELI5 has the name of KILT's, which is judged by ROUGE-L."""
    with_claims = {**QUESTIONS[0], "dataset": "eli5", "meta": {"claims": ["one", "two"]}}
    questions = [with_claims, {**QUESTIONS[2], "dataset": "eli5", "answers": ["all of it"]}]
    made = [prediction(questions[0], "text of all"), prediction(questions[1], "all of it")]
    found = score(made, questions, entail=lambda pairs: [hypothesis == "one" for _, hypothesis in pairs])
    assert found["cor"] == pytest.approx([0.5, 1.0]) and found["claim_recall"] == [0.5, None]
    assert score(made, questions)["cor"] == [None, pytest.approx(1.0)]
    assert cor_names(questions) == ["claim_recall", "rouge_l"] and cor_names(questions, nli=False) == ["", "rouge_l"]


def test_a_share_of_questions_has_the_interval_of_wilson():
    """Whose width is not nothing where all questions are alike; other means have that of the bootstrap."""
    found = measure({"cor": [1.0, 1.0, None], "ret_precision": [0.5, 1.0], "gr": [None, None]})
    assert list(found) == ["ret_precision", "cor"]  # in the order of the vocabulary; gr applies nowhere
    assert found["cor"]["value"] == 1.0 and found["cor"]["n"] == 2 and found["cor"]["interval"] == pytest.approx([0.342, 1.0], abs=1e-3)
    assert found["ret_precision"] == {"value": 0.75, "interval": [0.5, 1.0], "n": 2}


def test_rows_of_rankings_name_their_scope(judged):
    """One row for each question and scope, with the names that figures have everywhere."""
    output, results = judged
    rows = read_lines(output / "pool" / "query" / "scores.jsonl")
    for scope in ("corpus", "pool"):
        own = [row for row in rows if row["scope"] == scope]
        assert [row["id"] for row in own] == [x["id"] for x in QUESTIONS]
        assert np.mean([row["mrr"] for row in own]) == pytest.approx(results["tasks"]["pool"]["query"][scope]["mrr"]["value"])
    assert len(rows) == 2 * len(QUESTIONS)


def test_results_of_another_format_are_refused(judged, tmp_path):
    output, results = judged
    assert read_results(output) == read_results(output / "metrics.json") == results and results["format"] == 2
    for content, found in (({**results, "format": 3}, 3), ({name: results[name] for name in ("tasks", "settings")}, 1)):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"results.json is of format {found}, expected format 2: .* Run its command again"):
            read_results(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match="no complete results folder"):
        read_results(tmp_path / "none")


# ---------------------------------------------------------------------- going on, and caches


def test_what_is_there_is_kept_and_an_nli_model_may_come_later(model, world, tmp_path, monkeypatch):
    tasks = [Task("t", **world, **SHORT)]
    first = evaluate_tasks(model, tasks, tmp_path / "a", ["forced"], index_cache=tmp_path / "cache")
    monkeypatch.setattr(model, "build_index", lambda *args, **kwargs: pytest.fail("the corpus was embedded again"))
    monkeypatch.setattr("trainer.judging.runs.answer", lambda *args, **kwargs: pytest.fail("questions were answered again"))
    again = evaluate_tasks(model, tasks, tmp_path / "a", ["forced"], entail=lambda pairs: [True] * len(pairs), index_cache=tmp_path / "cache")
    assert again["tasks"]["t"]["modes"]["forced"]["metrics"]["gr"]["value"] == 1.0
    assert first["tasks"]["t"]["modes"]["forced"]["metrics"].items() <= again["tasks"]["t"]["modes"]["forced"]["metrics"].items()
    assert not (tmp_path / "a" / "t" / "forced" / "parts").exists()
    monkeypatch.undo()
    monkeypatch.setattr(model, "build_index", lambda *args, **kwargs: pytest.fail("the corpus was embedded again"))
    evaluate_tasks(model, tasks, tmp_path / "b", ["off"], index_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="(?s)holds answers of other settings.*max_new_tokens: then 6, now 7"):
        evaluate_tasks(model, [Task("t", **world, max_new_tokens=7)], tmp_path / "a", ["forced"], index_cache=tmp_path / "cache")
    run_file = tmp_path / "a" / "t" / "forced" / "run.json"  # as the version before wrote it
    run_file.write_text(json.dumps({name: value for name, value in json.loads(run_file.read_text()).items() if name != "format"}))
    with pytest.raises(ValueError, match="(?s)holds answers of other settings.*format: then None, now 2"):
        evaluate_tasks(model, tasks, tmp_path / "a", ["forced"], index_cache=tmp_path / "cache")


def test_an_index_in_place_of_a_corpus(model, world, tmp_path):
    model.build_index(CORPUS, show_progress_bar=False).save_pretrained(tmp_path / "index")
    task = Task("t", world["eval_file"], index=str(tmp_path / "index"), **SHORT)
    found = evaluate_tasks(model, [task], tmp_path / "out", ["forced"])
    assert found["tasks"]["t"]["passages"] == len(CORPUS) and not (tmp_path / "out" / "indexes").exists()


def test_altered_predictions_are_no_results(model, world, tmp_path):
    tasks = [Task("t", **world, **SHORT)]
    evaluate_tasks(model, tasks, tmp_path, ["off"])
    path = tmp_path / "t" / "off" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], lines[0]]))
    with pytest.raises(ValueError, match=r"1 ids stand twice in the predictions .*2 questions have no prediction"):
        evaluate_tasks(model, tasks, tmp_path, ["off"])
    path.write_text("".join(lines)[:-20])
    with pytest.raises(ValueError, match="predictions.jsonl, line 9: malformed JSON"):
        evaluate_tasks(model, tasks, tmp_path, ["off"])


# ---------------------------------------------------------------------- bad input


def test_bad_sets_are_refused_with_counts_before_anything_is_written(model, tmp_path):
    cases = [
        ([FREE, {**FREE, "id": "f2"}], {}, "none of the 2 questions of .* has provenance"),
        ([*QUESTIONS, QUESTIONS[0]], {}, "1 ids of .* stand twice, e.g. 'q0'"),
        ([*QUESTIONS, {**FREE, "candidates": ["p0", "p1", "p0"]}], {"pool": 3}, "1 of 8 questions have fewer than 3 candidates, e.g. 'q90'"),
        ([*QUESTIONS, {**QUESTIONS[0], "id": "x", "candidates": ["nowhere"]}], {}, "candidates of 1 of 8 questions are missing.* not hold 1 of 8 ids"),
        ([*QUESTIONS, {**QUESTIONS[0], "id": "x", "provenance": [["a", "b"]]}], {}, "gold passages or candidates of 1 of 8 .* does not hold 2 of 9 ids"),
        ([{**QUESTIONS[1], "candidates": ["p0", "p1", "p3"]}], {"pool": 3}, "1 of 1 questions have no passage but gold ones: mode 'wrong'"),
        ([{**QUESTIONS[0], "answers": []}], {}, "1 of 1 questions have no answers, which short_answer, their Cor, compares with"),
        ([{**QUESTIONS[0], "dataset": "fever", "answers": ["maybe"]}, QUESTIONS[1]], {}, "1 of 2 questions have no verdicts, which fever_nli"),
        ([{**UNKNOWN, "meta": {"provenance_unknown": True}}], {}, "1 of 1 questions have no meta.qa_pairs, which str_em"),
        ([{**QUESTIONS[0], "meta": {"qa_pairs": [{}]}}], {}, r"1 of 1 questions have other meta.qa_pairs than a list of .*short_answers.*, e.g. 'q0'"),
        ([{**QUESTIONS[0], "meta": {"claims": "one"}}], {}, "1 of 1 questions have other meta.claims than a list of texts"),
    ]
    for number, (questions, fields, message) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        task = Task("t", **write_world(tmp_path / str(number), questions), **fields, **SHORT)
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(model, [task], tmp_path / str(number) / "out", ["off", "wrong"])
        assert not (tmp_path / str(number) / "out" / "t").exists()


def test_bad_tasks_are_refused():
    for fields, message in [
        ({"pool": "some"}, "pool is 'some'"),
        ({"pool": 0}, "pool is 0"),
        ({"split": "train"}, "split is 'train'"),
        ({"metric": "bleu"}, "metric is 'bleu'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"top_k": 0}, "top_k is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Task(**{"name": "t", "eval_file": "x", **fields})
    with pytest.raises(ValueError, match="Task 2: unknown field 'evalfile'"):
        read_tasks([{"name": "a", "eval_file": "x"}, {"name": "b", "evalfile": "x"}])
    with pytest.raises(ValueError, match="Task 1 has no eval_file"):
        read_tasks([{"name": "a"}])
    with pytest.raises(ValueError, match="1 names of tasks stand twice: a"):
        read_tasks([{"name": "a", "eval_file": "x"}] * 2)
    assert read_tasks([{"name": "a", "eval_file": "x"}, {"name": "b", "eval_file": "x", "pool": "full"}], pool=20, top_k=None)[0].pool == 20


def test_no_index_needs_mode_off(model, world, tmp_path):
    task = Task("t", world["eval_file"], **SHORT)
    assert evaluate_tasks(model, [task], tmp_path, ["off"])["tasks"]["t"]["query"] == {}
    with pytest.raises(ValueError, match="neither an index nor a corpus_file"):
        evaluate_tasks(model, [task], tmp_path / "b", ["off", "retrieval"])
    with pytest.raises(ValueError, match="mode is 'oracle', expected one of"):
        evaluate_tasks(model, [task], tmp_path / "b", ["oracle"])


def test_the_query_embedding_alone(judged, model, world, tmp_path, monkeypatch):
    """Mode query generates nothing; its figures are those that every run has of the query embedding, and reports and comparisons do without answers."""
    monkeypatch.setattr("trainer.judging.runs.answer", lambda *args, **kwargs: pytest.fail("generates"))
    tasks = [Task("full", **world, split="in-domain"), Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2)]
    results = evaluate_tasks(model, tasks, tmp_path, ["query"], batch_size=3)
    for name in ("full", "pool"):
        assert results["tasks"][name]["query"] == judged[1]["tasks"][name]["query"] and not results["tasks"][name]["modes"]
    assert results["averages"]["all"].keys() == {"query"} and results["averages"]["all"]["query"].keys() == {"corpus", "pool"}
    assert results["averages"]["all"]["query"]["corpus"]["mrr"]["tasks"] == 2 and results["averages"]["all"]["query"]["pool"]["mrr"]["tasks"] == 1
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## Query embedding" in report and "## Results" not in report
    found = compare_results(judged[0], tmp_path)
    assert list(found["tasks"]["full"]) == ["query corpus"] and found["tasks"]["full"]["query corpus"]["mrr"]["difference"] == 0
    with pytest.raises(ValueError, match="There is no mode"):
        evaluate_tasks(model, tasks, tmp_path / "b", [])


# ---------------------------------------------------------------------- the recipe


def command(*words):
    return [sys.executable, *map(str, words)]


def run(words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A checkpoint and a set that takes some seconds, with the options to judge it."""
    folder = tmp_path_factory.mktemp("many")
    questions = [question(i, CORPUS[i % 7], input=f"question {'again ' * (i % 5)}{i}?") for i in range(31)]
    paths = write_world(folder, questions)
    checkpoint = write_checkpoint(folder / "model")
    options = ["--model", checkpoint, *(word for name, path in paths.items() for word in (f"--{name}", path))]
    return [*options, "--modes", "forced", "off", "--max_new_tokens", 40, "--batch_size", 2, "--index_cache", folder / "indexes"]


@pytest.fixture(scope="module")
def alone(many, tmp_path_factory):
    """What one process finds."""
    output = tmp_path_factory.mktemp("alone") / "out"
    result = run(command("recipes/run_evaluation.py", *many, "--output_dir", output))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Ret=" in result.stderr and "EM=" in result.stderr  # the running scores
    assert "eval, [NSP] forced first: 31 questions" in result.stdout and (output / "report.html").exists() and (output / "report.md").exists()
    settings = json.loads((output / "metrics.json").read_text())["settings"]
    assert settings["command"].startswith("run_evaluation.py --model") and settings["processes"] == 1
    return output


def same_answers(first, second):
    for mode in ("forced", "off"):
        assert without_times(predictions(first, mode, "eval")) == without_times(predictions(second, mode, "eval"))
    assert read_lines(first / "eval" / "query" / "ranking.jsonl") == read_lines(second / "eval" / "query" / "ranking.jsonl")
    found = [json.loads((folder / "metrics.json").read_text())["tasks"]["eval"]["modes"] for folder in (first, second)]
    assert [found[0][mode]["metrics"] for mode in ("forced", "off")] == [found[1][mode]["metrics"] for mode in ("forced", "off")]


def test_two_processes_share_the_questions_and_the_corpus(many, alone, tmp_path):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "recipes/accelerate_configs/multi_cpu.yaml"]
    words = [*many, "--output_dir", tmp_path / "out", "--index_cache", tmp_path / "indexes"]
    result = run(command(*launcher, "recipes/run_evaluation.py", *words))
    assert result.returncode == 0, result.stderr[-3000:]
    same_answers(tmp_path / "out", alone)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["processes"] == 2
    assert result.stdout.count("eval, [NSP] forced first: 31 questions") == 1

    for part in make_classifier():  # and they share what the NLI model is asked
        part.save_pretrained(tmp_path / "nli")
    judged = run(command(*launcher, "recipes/run_evaluation.py", *words, "--nli_model", tmp_path / "nli"))
    assert judged.returncode == 0, judged.stderr[-3000:]
    shutil.copytree(alone, tmp_path / "alone")
    assert run(command("recipes/run_evaluation.py", *many, "--output_dir", tmp_path / "alone", "--nli_model", tmp_path / "nli")).returncode == 0
    found = [json.loads((tmp_path / name / "metrics.json").read_text())["tasks"]["eval"]["modes"]["forced"]["metrics"] for name in ("out", "alone")]
    assert found[0] == found[1] and found[0]["gr"]["n"] > 10
    keys = [[json.loads(line)["key"] for line in (tmp_path / name / "nli.jsonl").read_text().splitlines() if line] for name in ("out", "alone")]
    assert sorted(keys[0]) == sorted(set(keys[1]))  # no pair was judged twice


def test_a_killed_run_goes_on(many, alone, tmp_path):
    words = command("recipes/run_evaluation.py", *many, "--output_dir", tmp_path)
    answers = tmp_path / "eval" / "forced" / "parts" / "answers-0-of-1.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        try:
            while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") >= 3):
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "eval" / "forced" / "predictions.jsonl").exists()
    kept = [line["index"] for line in map(json.loads, answers.read_text().splitlines(keepends=True)[:3])]
    result = run(words)
    assert result.returncode == 0, result.stderr[-3000:]
    same_answers(tmp_path, alone)
    found = predictions(tmp_path, "forced", "eval")
    assert all(found[i]["seconds"] is None for i in kept) and found[-1]["seconds"] is not None  # the former were not answered again


def test_a_config_lists_tasks_and_errors_are_clear(many, tmp_path, monkeypatch, capsys):
    from run_evaluation import main

    checkpoint, eval_file, corpus_file = many[1], many[3], many[5]
    entries = [{"name": "a", "split": "in-domain"}, {"name": "b", "pool": 4, "max_eval_samples": 3}]
    config = {"tasks": [{**entry, "eval_file": eval_file, "corpus_file": corpus_file} for entry in entries], "modes": ["off"], "max_new_tokens": 4}
    (tmp_path / "tasks.yaml").write_text(json.dumps(config).replace('"off"', "off"))  # JSON is YAML, in which off is false

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run_evaluation.py", *map(str, words), "--output_dir", str(tmp_path / "out")])
        main()

    call("--config", tmp_path / "tasks.yaml", "--model", checkpoint, "--max_eval_samples", 5)
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [results["tasks"][name]["n"] for name in "ab"] == [5, 3] and results["tasks"]["b"]["pool"] == 4
    assert len(list((tmp_path / "out" / "indexes").iterdir())) == 1  # one corpus, embedded once
    assert "b, retrieval off: 3 questions" in capsys.readouterr().out
    for part in make_classifier():
        part.save_pretrained(tmp_path / "nli")
    call("--config", tmp_path / "tasks.yaml", "--model", checkpoint, "--max_eval_samples", 5, "--modes", "forced", "--nli_model", tmp_path / "nli")
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    grounded = [r["grounded_text"] for p in predictions(tmp_path / "out", "forced", "a") for r in p["retrievals"]]
    assert any(grounded) and results["tasks"]["a"]["modes"]["forced"]["metrics"]["gr"]["n"] > 0
    assert (tmp_path / "out" / "nli.jsonl").exists() and results["settings"]["nli_model"] == str(tmp_path / "nli")
    for words, message in [
        (["--model", checkpoint], "error: give either --eval_file"),
        (["--model", checkpoint, "--eval_file", eval_file, "--pool", "x"], "error: Task eval: pool is 'x'"),
        (["--model", checkpoint, "--eval_file", eval_file, "--corpus_file", "none.jsonl"], "none.jsonl"),
    ]:
        with pytest.raises(SystemExit) as ending:
            call(*words)
        assert message in str(ending.value.code)


def test_figures_reach_the_card(many, tmp_path, monkeypatch, capsys):
    """Beside what training recorded, in place of older figures of the same set; not into a card of the owner's making; not of other weights."""
    from run_evaluation import main

    folder = tmp_path / "checkpoint"
    shutil.copytree(many[1], folder)
    model = CoSupForCausalLM.from_pretrained(folder)
    metrics = [{"type": "ret", "name": "Ret", "value": 1.25, "n": 9}]
    older = [{"dataset": {"name": name, "type": "custom"}, "index_size": 2, "metrics": metrics} for name in "ax"]
    write_card(model, folder, "me/model", {"results": older, "training": {"instances": {"nq": 7}}})
    for part in make_classifier():
        part.save_pretrained(tmp_path / "nli")
    entries = [{"name": name, "eval_file": many[3], "corpus_file": many[5], **more} for name, more in (("a", {}), ("b", {"pool": 4}))]
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": entries, "modes": ["forced"], "max_new_tokens": 6, "nli_model": str(tmp_path / "nli")}))

    def call(output, *words):
        monkeypatch.setattr(sys, "argv", ["run_evaluation.py", "--config", str(tmp_path / "tasks.yaml"), "--update_card", "true", *words])
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--output_dir", str(tmp_path / output)])
        main()

    call("out", "--model", str(folder))
    results, facts = json.loads((tmp_path / "out" / "metrics.json").read_text()), json.loads((folder / "training_facts.json").read_text())
    assert [group["dataset"]["name"] for group in facts["results"]] == ["x", "a", "b (pools of 4)"] and facts["training"] == {"instances": {"nq": 7}}
    for group, name in zip(facts["results"][1:], "ab", strict=True):
        own = results["tasks"][name]
        shown = {metric["type"]: metric for metric in group["metrics"]}
        assert {"ret", "cor", "k_precision", "query_recall@1"} <= set(shown) <= {*MAIN, "query_recall@1"}
        for metric in ("ret", "k_precision", "cor"):
            figure = own["modes"]["forced"]["metrics"][metric]
            assert (shown[metric]["value"], shown[metric]["n"]) == (round(100 * figure["value"], 4), figure["n"])
        assert shown["query_recall@1"]["value"] == round(100 * own["query"]["pool" if name == "b" else "corpus"]["query_recall@1"]["value"], 4)
    card = (folder / "README.md").read_text()
    assert f"Gr (by {tmp_path / 'nli'})" in card and "1.25" in card and "7 of nq" in card
    assert facts_of(CoSupForCausalLM.from_pretrained(folder))["results"] == facts["results"]

    (folder / "README.md").write_text("my own card")
    call("again", "--model", str(folder), "--max_eval_samples", "2")
    assert (folder / "README.md").read_text() == "my own card" and "stays as it is" in capsys.readouterr().out
    facts = json.loads((folder / "training_facts.json").read_text())
    assert [metric["n"] for group in facts["results"][1:] for metric in group["metrics"] if metric["type"] == "cor"] == [2, 2]
    with torch.no_grad():
        next(model.gen.parameters()).add_(1.0)
    model.save_pretrained(folder)
    (folder / "training_facts.json").write_text(json.dumps(facts))
    call("other", "--model", str(folder), "--max_eval_samples", "2")
    assert [group["dataset"]["name"] for group in json.loads((folder / "training_facts.json").read_text())["results"]] == ["a", "b (pools of 4)"]
    with pytest.raises(SystemExit) as ending:
        call("hub", "--model", "me/model")
    assert "error: --update_card writes into the folder" in str(ending.value.code)
