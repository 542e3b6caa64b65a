"""Judging on tasks: what a results folder holds, what is kept of it, and what is refused."""

import json

import numpy as np
import pytest

from modeling_cosup.lines_cosup import read_lines
from support.evaluation_world import CORPUS, FREE, IDS, QUESTIONS, UNKNOWN, write_world
from support.models import make_model
from trainer.judging.answers import embed_queries
from trainer.judging.figures import figure
from trainer.judging.judge import evaluate_tasks
from trainer.judging.matching import retrieved_ids
from trainer.judging.results import read_results
from trainer.judging.tasks import Task
from trainer.reports.comparison import compare_results
from trainer.reports.evaluation import write_report

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
    tasks = [
        Task("full", **world, split="in-domain", **SHORT),
        Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2, **SHORT),
    ]
    modes = ("retrieval", "gold", "off", "forced", "wrong")
    return output, evaluate_tasks(model, tasks, output, modes, batch_size=3)


def predictions(output, mode, task="full"):
    return read_lines(output / task / mode / "predictions.jsonl")


def pool_of(x, size):
    """Gold candidates, then the others, in the order of the file."""
    gold = [id for id in x["candidates"] if id in sum(x["provenance"], [])]
    return [*gold, *(id for id in x["candidates"] if id not in gold)][:size]


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
    hits = [
        any(id in sum(x["provenance"], []) for id in retrieved_ids(p)) for p, x in zip(found, QUESTIONS, strict=True)
    ]
    figures = results["tasks"]["full"]["modes"]["forced"]["metrics"]
    assert (figures["ret"]["value"], figures["ret"]["n"]) == (pytest.approx(np.mean(hits)), len(QUESTIONS))
    assert figures["nsp_needed"]["value"] == figures["nsp_not_needed"]["value"] == 1.0
    assert (
        figures["cor"]["n"] == len(QUESTIONS) + 1
    )  # a question of unknown provenance counts, one that needs no passage does not
    assert figures["cor_not_needed"]["n"] == 1
    assert figures["str_em"]["n"] == 1
    assert "gr" not in figures and "citation_recall" not in figures and "fever_label" not in figures
    assert "ret" not in results["tasks"]["full"]["modes"]["gold"]["metrics"]  # given, not found
    assert [row["id"] for row in read_lines(output / "full" / "forced" / "scores.jsonl")] == [
        p["id"] for p in predictions(output, "forced")
    ]
    assert results["averages"]["all"]["forced"]["ret"]["tasks"] == 2
    notes = " ".join(results["tasks"]["full"]["left_out"])
    assert (
        "1 of 9 questions need no passage" in notes
        and "1 of 9 questions do not say" in notes
        and "no NLI model" in notes
    )
    free, judge = (
        next(note for note in results["tasks"]["full"]["left_out"] if start in note)
        for start in ("need no passage", "no NLI model")
    )
    assert (
        all(
            f"'{label}'" in free
            for label in ("EM, not needed", "Cor, not needed", "[NSP], not needed", "K-precision", "retrievals")
        )
        and "'Gr'" not in free
    )
    assert (
        all(f"'{figure(name).label}'" in judge for name in ("gr", "fever_nli", "claim_recall", "citation_recall"))
        and "'Cor'" not in judge
    )


def test_rankings_against_plain_products(judged, model):
    output, results = judged
    index = model.build_index(CORPUS, show_progress_bar=False)
    scores = (embed_queries(model, QUESTIONS) @ index.embeddings.T).numpy()
    ranked = [[IDS[row] for row in np.argsort(-row_scores)] for row_scores in scores]
    rows = read_lines(output / "pool" / "query" / "ranking.jsonl")
    assert [row["corpus"] for row in rows] == ranked
    for row, x, own in zip(rows, QUESTIONS, ranked, strict=True):
        assert row["pool"] == [id for id in own if id in pool_of(x, 4)]
    ranks = [
        1 + min(own.index(id) for id in sum(x["provenance"], [])) for own, x in zip(ranked, QUESTIONS, strict=True)
    ]
    figures = results["tasks"]["pool"]["query"]["corpus"]
    assert figures["mrr"]["value"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert figures["query_recall@5"]["value"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    assert "query_recall@20" not in figures  # of seven passages
    assert set(results["tasks"]["pool"]["query"]["pool"]) == {"mrr", "ndcg@10", "query_recall@1"}


def test_rows_of_rankings_name_their_scope(judged):
    """One row for each question and scope, with the names that figures have everywhere."""
    output, results = judged
    rows = read_lines(output / "pool" / "query" / "scores.jsonl")
    for scope in ("corpus", "pool"):
        own = [row for row in rows if row["scope"] == scope]
        assert [row["id"] for row in own] == [x["id"] for x in QUESTIONS]
        assert np.mean([row["mrr"] for row in own]) == pytest.approx(
            results["tasks"]["pool"]["query"][scope]["mrr"]["value"]
        )
    assert len(rows) == 2 * len(QUESTIONS)


def test_results_of_another_format_are_refused(judged, tmp_path):
    output, results = judged
    assert read_results(output) == read_results(output / "metrics.json") == results and results["format"] == 2
    of_mode = json.loads((output / "full" / "off" / "metrics.json").read_text())
    assert of_mode == {"format": 2, **results["tasks"]["full"]["modes"]["off"]}
    for content, found in (
        ({**results, "format": 3}, 3),
        ({name: results[name] for name in ("tasks", "settings")}, 1),
    ):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=rf"results.json is of format {found}, expected format 2: .* Run its command again"
        ):
            read_results(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match="no complete results folder"):
        read_results(tmp_path / "none")


def test_what_is_there_is_kept_and_an_nli_model_may_come_later(model, world, tmp_path, monkeypatch):
    tasks = [Task("t", **world, **SHORT)]
    first = evaluate_tasks(model, tasks, tmp_path / "a", ["forced"], index_cache=tmp_path / "cache")
    monkeypatch.setattr(model, "build_index", lambda *args, **kwargs: pytest.fail("the corpus was embedded again"))
    monkeypatch.setattr(
        "trainer.judging.runs.answer", lambda *args, **kwargs: pytest.fail("questions were answered again")
    )
    again = evaluate_tasks(
        model,
        tasks,
        tmp_path / "a",
        ["forced"],
        entail=lambda pairs: [True] * len(pairs),
        index_cache=tmp_path / "cache",
    )
    assert again["tasks"]["t"]["modes"]["forced"]["metrics"]["gr"]["value"] == 1.0
    assert (
        first["tasks"]["t"]["modes"]["forced"]["metrics"].items()
        <= again["tasks"]["t"]["modes"]["forced"]["metrics"].items()
    )
    assert not (tmp_path / "a" / "t" / "forced" / "parts").exists()
    monkeypatch.undo()
    monkeypatch.setattr(model, "build_index", lambda *args, **kwargs: pytest.fail("the corpus was embedded again"))
    evaluate_tasks(model, tasks, tmp_path / "b", ["off"], index_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="(?s)holds answers of other settings.*max_new_tokens: then 6, now 7"):
        evaluate_tasks(
            model, [Task("t", **world, max_new_tokens=7)], tmp_path / "a", ["forced"], index_cache=tmp_path / "cache"
        )
    run_file = tmp_path / "a" / "t" / "forced" / "run.json"  # as the version before wrote it
    run_file.write_text(
        json.dumps({name: value for name, value in json.loads(run_file.read_text()).items() if name != "format"})
    )
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
    with pytest.raises(ValueError, match=r"1 ids occur twice in the predictions .*2 questions have no prediction"):
        evaluate_tasks(model, tasks, tmp_path, ["off"])
    path.write_text("".join(lines)[:-20])
    with pytest.raises(ValueError, match="predictions.jsonl, line 9: malformed JSON"):
        evaluate_tasks(model, tasks, tmp_path, ["off"])


def test_bad_sets_are_refused_with_counts_before_anything_is_written(model, tmp_path):
    cases = [
        ([FREE, {**FREE, "id": "f2"}], {}, "none of the 2 questions of .* has provenance"),
        ([*QUESTIONS, QUESTIONS[0]], {}, "1 ids of .* occur twice, e.g. 'q0'"),
        (
            [*QUESTIONS, {**FREE, "candidates": ["p0", "p1", "p0"]}],
            {"pool": 3},
            "1 of 8 questions have fewer than 3 candidates, e.g. 'q90'",
        ),
        (
            [*QUESTIONS, {**QUESTIONS[0], "id": "x", "candidates": ["nowhere"]}],
            {},
            "candidates of 1 of 8 questions are missing.* not hold 1 of 8 ids",
        ),
        (
            [*QUESTIONS, {**QUESTIONS[0], "id": "x", "provenance": [["a", "b"]]}],
            {},
            "gold passages or candidates of 1 of 8 .* does not hold 2 of 9 ids",
        ),
        (
            [{**QUESTIONS[1], "candidates": ["p0", "p1", "p3"]}],
            {"pool": 3},
            "1 of 1 questions have no passage but gold ones: mode 'wrong'",
        ),
        (
            [{**QUESTIONS[0], "answers": []}],
            {},
            "1 of 1 questions have no answers, which short_answer, their Cor, compares with",
        ),
        (
            [{**QUESTIONS[0], "dataset": "fever", "answers": ["maybe"]}, QUESTIONS[1]],
            {},
            "1 of 2 questions have no verdicts, which fever_nli",
        ),
        (
            [{**UNKNOWN, "meta": {"provenance_unknown": True}}],
            {},
            "1 of 1 questions have no meta.qa_pairs, which str_em",
        ),
        (
            [{**QUESTIONS[0], "meta": {"qa_pairs": [{}]}}],
            {},
            r"1 of 1 questions have other meta.qa_pairs than a list of .*short_answers.*, e.g. 'q0'",
        ),
        (
            [{**QUESTIONS[0], "meta": {"claims": "one"}}],
            {},
            "1 of 1 questions have other meta.claims than a list of texts",
        ),
    ]
    for number, (questions, fields, message) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        task = Task("t", **write_world(tmp_path / str(number), questions), **fields, **SHORT)
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(model, [task], tmp_path / str(number) / "out", ["off", "wrong"])
        assert not (tmp_path / str(number) / "out" / "t").exists()


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
    tasks = [
        Task("full", **world, split="in-domain"),
        Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2),
    ]
    results = evaluate_tasks(model, tasks, tmp_path, ["query"], batch_size=3)
    for name in ("full", "pool"):
        assert (
            results["tasks"][name]["query"] == judged[1]["tasks"][name]["query"]
            and not results["tasks"][name]["modes"]
        )
    assert results["averages"]["all"].keys() == {"query"} and results["averages"]["all"]["query"].keys() == {
        "corpus",
        "pool",
    }
    assert (
        results["averages"]["all"]["query"]["corpus"]["mrr"]["tasks"] == 2
        and results["averages"]["all"]["query"]["pool"]["mrr"]["tasks"] == 1
    )
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## Query embedding" in report and "## Results" not in report
    found = compare_results(judged[0], tmp_path)
    assert (
        list(found["tasks"]["full"]) == ["query corpus"]
        and found["tasks"]["full"]["query corpus"]["mrr"]["difference"] == 0
    )
    with pytest.raises(ValueError, match="There is no mode"):
        evaluate_tasks(model, tasks, tmp_path / "b", [])
