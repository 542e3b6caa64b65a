"""Evaluation on tasks: what a results folder holds, what a later run keeps, and what is refused."""

import json

import numpy as np
import pytest

from modeling_cosup import Completion
from modeling_cosup.lines_cosup import read_lines
from support.evaluation_world import CORPUS, FREE, IDS, QUESTIONS, UNKNOWN, write_world
from support.models import make_model
from trainer.judging import runs
from trainer.judging.answers import embed_queries, prompt_ids
from trainer.judging.figures import figure
from trainer.judging.judge import _notes_on_empty_answers, evaluate_tasks
from trainer.judging.matching import retrieved_ids
from trainer.judging.results import read_results
from trainer.judging.runs import Clock
from trainer.judging.tasks import Task
from trainer.questions import ANSWERS_IN_PASSAGES, gold_ids
from trainer.reports.comparison import compare_results
from trainer.reports.evaluation import write_report

SHORT = {"max_new_tokens": 6}
RANKED = [*QUESTIONS, UNKNOWN]  # with gold passages or, where these are unknown, with answers


def fail_if_called(message):
    return lambda *args, **kwargs: pytest.fail(message)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def judged(model, world, tmp_path_factory):
    """A results folder with all modes, over the corpus and over a pool, and the results."""
    output = tmp_path_factory.mktemp("judged")
    tasks = [
        Task("full", **world, split="in-domain", **SHORT),
        Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2, **SHORT),
    ]
    modes = ("retrieval", "gold", "off", "forced", "wrong")
    return output, evaluate_tasks(model, tasks, output, modes, batch_size=3)


def predictions(output, mode, task="full"):
    return read_lines(output / task / mode / "predictions.jsonl")


def pool_of(question, size):
    """Return the gold candidates, then the others, in the order of the file."""
    gold = [id for id in question["candidates"] if id in gold_ids(question)]
    others = [id for id in question["candidates"] if id not in gold]
    return [*gold, *others][:size]


def test_every_mode_asks_its_questions(judged):
    output, results = judged
    all_ids = [question["id"] for question in (*QUESTIONS, FREE, UNKNOWN)]
    assert [prediction["id"] for prediction in predictions(output, "retrieval")] == all_ids
    modes = results["tasks"]["full"]["modes"]
    assert modes["off"]["n"] == len(QUESTIONS) + 2
    assert modes["gold"]["n"] == len(QUESTIONS)


def test_every_mode_retrieves_what_it_should(judged):
    output, _ = judged
    assert all(not prediction["retrievals"] for prediction in predictions(output, "off"))
    for prediction, question in zip(predictions(output, "gold"), QUESTIONS, strict=True):
        ids = retrieved_ids(prediction)
        assert ids
        assert ids == question["provenance"][0][: len(ids)]  # in order, the first one forced
    for prediction, question in zip(predictions(output, "wrong"), QUESTIONS, strict=True):
        ids = retrieved_ids(prediction)
        assert ids
        assert gold_ids(question).isdisjoint(ids)


def test_a_pool_limits_what_is_retrieved(judged):
    """So do top_k=2 and max_retrievals=2."""
    output, _ = judged
    for prediction, question in zip(predictions(output, "forced", "pool"), (*QUESTIONS, FREE, UNKNOWN), strict=True):
        assert 1 <= len(prediction["retrievals"]) <= 2
        assert all(len(retrieval["passages"]) == 2 for retrieval in prediction["retrievals"])
        assert set(retrieved_ids(prediction)) <= set(pool_of(question, 4))


def test_figures_are_those_of_the_predictions(judged):
    output, results = judged
    forced = predictions(output, "forced")
    hits = []
    for prediction, question in zip(forced[: len(QUESTIONS)], QUESTIONS, strict=True):
        hits.append(not gold_ids(question).isdisjoint(retrieved_ids(prediction)))
    figures = results["tasks"]["full"]["modes"]["forced"]["metrics"]
    assert figures["ret"]["value"] == pytest.approx(np.mean(hits))
    assert figures["ret"]["n"] == len(QUESTIONS)
    assert figures["nsp_needed"]["value"] == figures["nsp_not_needed"]["value"] == 1.0
    # A question of unknown provenance counts for Cor, one that needs no passage does not.
    assert figures["cor"]["n"] == len(QUESTIONS) + 1
    assert figures["cor_not_needed"]["n"] == 1
    assert figures["str_em"]["n"] == 1
    assert {"gr", "citation_recall", "fever_label"}.isdisjoint(figures)
    assert "ret" not in results["tasks"]["full"]["modes"]["gold"]["metrics"]  # given, not retrieved
    rows = read_lines(output / "full" / "forced" / "scores.jsonl")
    assert [row["id"] for row in rows] == [prediction["id"] for prediction in forced]
    assert results["averages"]["all"]["forced"]["ret"]["tasks"] == 2


def test_notes_say_what_is_left_out(judged):
    _, results = judged
    notes = results["tasks"]["full"]["left_out"]
    assert any("1 of 9 questions do not say" in note for note in notes)
    (on_free_questions,) = [note for note in notes if "1 of 9 questions need no passage" in note]
    for label in ("EM, not needed", "Cor, not needed", "[NSP], not needed", "K-precision", "retrievals"):
        assert f"'{label}'" in on_free_questions
    assert "'Gr'" not in on_free_questions
    (on_judge,) = [note for note in notes if "no NLI model" in note]
    for name in ("gr", "fever_nli", "claim_recall", "citation_recall"):
        assert f"'{figure(name).label}'" in on_judge
    assert "'Cor'" not in on_judge


def test_rankings_against_plain_products(judged, model):
    output, results = judged
    index = model.build_index(CORPUS, show_progress_bar=False)
    scores = (embed_queries(model, RANKED) @ index.embeddings.T).numpy()
    rankings = [[IDS[row] for row in np.argsort(-question_scores)] for question_scores in scores]
    rows = read_lines(output / "pool" / "query" / "ranking.jsonl")
    assert [row["corpus"] for row in rows] == rankings
    for row, question, ranking in zip(rows, RANKED, rankings, strict=True):
        pool = pool_of(question, 4)
        assert row["pool"] == [id for id in ranking if id in pool]
    ranks = []
    for ranking, question in zip(rankings, QUESTIONS, strict=False):
        ranks.append(1 + min(ranking.index(id) for id in gold_ids(question)))
    figures = results["tasks"]["pool"]["query"]["corpus"]
    assert figures["mrr"]["value"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert figures["query_recall@5"]["value"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    assert "query_recall@20" not in figures  # of seven passages
    assert set(results["tasks"]["pool"]["query"]["pool"]) == {"mrr", "ndcg@10", "query_recall@1", "hit_rate@1"}


def test_hit_rates_need_no_gold_passage(judged):
    """They count the question of unknown provenance too, and neither verdicts nor a question that needs no passage."""
    output, results = judged
    texts = {passage["id"]: f"{passage['title']} / {passage['text']}".lower() for passage in CORPUS}
    strings = [texts[id].split(" / ")[0] or "none" for id in IDS] + ["night"]  # the answers, in lower case
    rows = read_lines(output / "pool" / "query" / "ranking.jsonl")
    query = results["tasks"]["pool"]["query"]
    for scope, k in (("corpus", 1), ("corpus", 5), ("pool", 1)):
        hits = []
        for row, string in zip(rows, strings, strict=True):
            hits.append(any(string in texts[id] for id in row[scope][:k]))
        measured = query[scope][f"hit_rate@{k}"]
        assert (measured["value"], measured["n"]) == (pytest.approx(np.mean(hits)), len(QUESTIONS) + 1)
        assert query[scope]["query_recall@1"]["n"] == len(QUESTIONS)
    assert "hit_rate@20" not in query["corpus"]  # of seven passages


def test_questions_without_an_answer_to_find_have_no_hit_rate(model, tmp_path):
    questions = [
        changed(QUESTIONS[0], answers=["Yes"]),
        QUESTIONS[2],
        changed(QUESTIONS[4], meta={"long_answers": True}),
    ]
    results = evaluate_tasks(model, [Task("t", **write_world(tmp_path, questions))], tmp_path / "out", ["query"])
    task = results["tasks"]["t"]
    assert task["query"]["corpus"]["hit_rate@5"]["n"] == 1
    assert any("2 of 3 questions have no answer to look for" in note for note in task["left_out"])


def test_a_ranking_by_another_rule_is_made_again(model, tmp_path):
    """Of an earlier version, whose run.json does not name its rule, or of another one; other settings are refused."""
    task = Task("t", **write_world(tmp_path, QUESTIONS))
    folder = tmp_path / "out" / "t" / "query"
    before = evaluate_tasks(model, [task], tmp_path / "out", ["query"])["tasks"]["t"]["query"]["corpus"]
    assert "hit_rate@1" in before
    settings = json.loads((folder / "run.json").read_text())
    assert settings.pop("answers in passages") == ANSWERS_IN_PASSAGES
    places = {"answer_places": {"corpus": 0}}
    rows = [json.dumps({**row, **places}) + "\n" for row in read_lines(folder / "ranking.jsonl")]
    for rule in ({}, {"answers in passages": 1}):
        (folder / "run.json").write_text(json.dumps({**settings, **rule}))
        (folder / "ranking.jsonl").write_text("".join(rows))
        after = evaluate_tasks(model, [task], tmp_path / "out", ["query"])["tasks"]["t"]["query"]["corpus"]
        assert after == before
    (folder / "run.json").write_text(json.dumps({**settings, "weights": "others"}))
    with pytest.raises(ValueError, match="(?s)query holds answers of other settings.*  weights: the model has other"):
        evaluate_tasks(model, [task], tmp_path / "out", ["query"])


@pytest.mark.parametrize("num_lists", [1, len(QUESTIONS)])
def test_rankings_of_questions_that_are_no_longer_ranked_do_not_count(model, tmp_path, monkeypatch, num_lists):
    """An earlier version ranked passages for questions of unknown provenance whose answer is a list."""
    lists = {"provenance": [], "meta": {"provenance_unknown": True, "answers": [["Alpha"], ["Beta"]]}}
    questions = [changed(question, **lists) for question in QUESTIONS[:num_lists]] + QUESTIONS[num_lists:]
    task = Task("t", **write_world(tmp_path, questions))
    with monkeypatch.context() as earlier:
        earlier.setattr(runs, "ANSWERS_IN_PASSAGES", 1)
        earlier.setattr(runs, "ranking_can_be_judged", lambda question: True)
        evaluate_tasks(model, [task], tmp_path / "out", ["off"])
    scores_file = tmp_path / "out" / "t" / "query" / "scores.jsonl"
    scores_file.touch()
    query = evaluate_tasks(model, [task], tmp_path / "out", ["off"])["tasks"]["t"]["query"]
    num_ranked = len(QUESTIONS) - num_lists
    assert (query["corpus"]["mrr"]["n"] == num_ranked) if num_ranked else query == {}
    assert scores_file.exists() == bool(num_ranked)


def test_recall_among_as_many_places_as_passages_is_no_figure(model, world, tmp_path, monkeypatch):
    """It would be 100 %, whatever the ranking."""
    monkeypatch.setattr("trainer.judging.judge.KS", (1, 4, 6, 7))
    results = evaluate_tasks(model, [Task("pool", **world, pool=4, **SHORT)], tmp_path, ["query"])
    query = results["tasks"]["pool"]["query"]
    by_k = {f"{stem}@{k}" for stem in ("query_recall", "hit_rate") for k in (1, 4, 6)}
    assert set(query["corpus"]) == {"mrr", "ndcg@10", *by_k}
    assert set(query["pool"]) == {"mrr", "ndcg@10", "query_recall@1", "hit_rate@1"}


def test_rows_of_rankings_name_their_scope(judged):
    """There is one row for each question and scope, with the names that figures have everywhere."""
    output, results = judged
    rows = read_lines(output / "pool" / "query" / "scores.jsonl")
    for scope in ("corpus", "pool"):
        scope_rows = [row for row in rows if row["scope"] == scope]
        assert [row["id"] for row in scope_rows] == [question["id"] for question in RANKED]
        assert scope_rows[-1]["mrr"] is None  # of unknown provenance
        mrr = results["tasks"]["pool"]["query"][scope]["mrr"]["value"]
        assert np.mean([row["mrr"] for row in scope_rows[:-1]]) == pytest.approx(mrr)
    assert len(rows) == 2 * len(RANKED)


def test_results_of_another_format_are_refused(judged, tmp_path):
    output, results = judged
    assert results["format"] == 2
    assert read_results(output) == results
    assert read_results(output / "metrics.json") == results
    mode_results = json.loads((output / "full" / "off" / "metrics.json").read_text())
    assert mode_results == {"format": 2, **results["tasks"]["full"]["modes"]["off"]}

    of_format_3 = {**results, "format": 3}
    of_format_1 = {name: results[name] for name in ("tasks", "settings")}
    for number, content in ((3, of_format_3), (1, of_format_1)):
        (tmp_path / "results.json").write_text(json.dumps(content))
        message = rf"results.json is of format {number}, expected format 2: .* Run its command again"
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match="no complete results folder"):
        read_results(tmp_path / "none")


@pytest.fixture
def forced(model, world, tmp_path):
    """A results folder of mode 'forced', next to the cache of its index, and its figures."""
    output = tmp_path / "forced"
    results = evaluate_tasks(model, [Task("t", **world, **SHORT)], output, ["forced"], index_cache=tmp_path / "cache")
    return output, results["tasks"]["t"]["modes"]["forced"]["metrics"]


def test_answers_are_kept_when_an_nli_model_comes_later(model, world, forced, tmp_path, monkeypatch):
    output, figures = forced
    monkeypatch.setattr(model, "build_index", fail_if_called("the corpus was embedded again"))
    monkeypatch.setattr("trainer.judging.runs.answer", fail_if_called("questions were answered again"))
    results = evaluate_tasks(
        model,
        [Task("t", **world, **SHORT)],
        output,
        ["forced"],
        entail=lambda pairs: [True] * len(pairs),
        index_cache=tmp_path / "cache",
    )
    figures_with_judge = results["tasks"]["t"]["modes"]["forced"]["metrics"]
    assert figures_with_judge["gr"]["value"] == 1.0
    assert figures.items() <= figures_with_judge.items()
    assert not (output / "t" / "forced" / "parts").exists()


def test_an_embedded_corpus_serves_other_runs(model, world, forced, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "build_index", fail_if_called("the corpus was embedded again"))
    evaluate_tasks(model, [Task("t", **world, **SHORT)], tmp_path / "b", ["off"], index_cache=tmp_path / "cache")


def test_answers_of_other_settings_are_refused(model, world, forced, tmp_path):
    output, _ = forced
    longer = Task("t", **world, max_new_tokens=7)
    with pytest.raises(ValueError, match="(?s)holds answers of other settings.*max_new_tokens: then 6, now 7"):
        evaluate_tasks(model, [longer], output, ["forced"], index_cache=tmp_path / "cache")
    run_file = output / "t" / "forced" / "run.json"
    settings = json.loads(run_file.read_text())
    del settings["format"]  # the previous version did not write it
    run_file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="(?s)holds answers of other settings.*format: then None, now 2"):
        evaluate_tasks(model, [Task("t", **world, **SHORT)], output, ["forced"], index_cache=tmp_path / "cache")


def test_a_refusal_says_what_has_changed_and_questions_are_tokenized_once_for_all_modes(
    model, world, forced, tmp_path, monkeypatch
):
    """Of a digest, the two values would say nothing."""
    output, _ = forced
    asked = []
    monkeypatch.setattr(runs, "prompt_ids", lambda model, question: asked.append(question["id"]) or [1])
    message = r"(?s)  prompts: the same questions give other tokens: the tokenizer or its chat template has changed$"
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(model, [Task("t", **world, **SHORT)], output, ["forced"], index_cache=tmp_path / "cache")
    monkeypatch.undo()
    evaluate_tasks(model, [Task("t", **world, **SHORT)], output, ["forced"], index_cache=tmp_path / "cache")
    fewer = Task("t", **world, **SHORT, max_eval_samples=3)
    with pytest.raises(
        ValueError, match="(?s)  questions: those asked in this mode have changed[^\n]*\n  number of questions:"
    ):
        evaluate_tasks(model, [fewer], output, ["forced"], index_cache=tmp_path / "cache")
    monkeypatch.setattr(
        runs, "prompt_ids", lambda model, question: asked.append(question["id"]) or prompt_ids(model, question)
    )
    asked.clear()
    evaluate_tasks(model, [Task("t", **world, **SHORT)], output, ["forced"], index_cache=tmp_path / "cache")
    assert len(asked) == len(set(asked)) == len(QUESTIONS) + 2


@pytest.mark.parametrize(
    ("part", "name", "value", "setting", "modes"),
    [
        ("generation_config", "repetition_penalty", 3.0, "generation config", ["forced"]),
        ("tokenizer", "chat_template", "{{ messages[-1]['content'] }}", "prompts", ["query", "forced"]),
        ("config", "query_prompt", "Q: ", "model config", ["query", "forced"]),
    ],
)
def test_answers_with_another_config_or_template_are_refused(
    model, world, forced, tmp_path, monkeypatch, part, name, value, setting, modes
):
    """The weights are the same, but the answers would not be. An older run.json lacks the setting, and is accepted."""
    output, _ = forced
    tasks, cache = [Task("t", **world, **SHORT)], tmp_path / "cache"
    monkeypatch.setattr(getattr(model, part), name, value)
    for mode in modes:
        change = "the same questions give other tokens" if setting == "prompts" else "then"
        with pytest.raises(ValueError, match=f"(?s)t/{mode} holds answers of other settings.*  {setting}: {change}"):
            evaluate_tasks(model, tasks, output, ["forced"], index_cache=cache)
        run_file = output / "t" / mode / "run.json"
        settings = json.loads(run_file.read_text())
        del settings[setting]
        run_file.write_text(json.dumps(settings))
    evaluate_tasks(model, tasks, output, ["forced"], index_cache=cache)


def test_an_index_in_place_of_a_corpus(model, world, tmp_path):
    model.build_index(CORPUS, show_progress_bar=False).save_pretrained(tmp_path / "index")
    task = Task("t", world["eval_file"], index=str(tmp_path / "index"), **SHORT)
    results = evaluate_tasks(model, [task], tmp_path / "out", ["forced"])
    assert results["tasks"]["t"]["passages"] == len(CORPUS)
    assert not (tmp_path / "out" / "indexes").exists()


def test_altered_predictions_are_refused(model, world, tmp_path):
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


def changed(question, **fields):
    return {**question, **fields}


@pytest.mark.parametrize(
    ("questions", "fields", "message"),
    [
        pytest.param(
            [FREE, changed(FREE, id="f2")], {}, "none of the 2 questions of .* has provenance", id="no provenance"
        ),
        pytest.param([*QUESTIONS, QUESTIONS[0]], {}, "1 ids of .* occur twice, e.g. 'q0'", id="a repeated id"),
        pytest.param(
            [*QUESTIONS, changed(FREE, candidates=["p0", "p1", "p0"])],
            {"pool": 3},
            "1 of 8 questions have fewer than 3 candidates, e.g. 'q90'",
            id="too few candidates",
        ),
        pytest.param(
            [*QUESTIONS, changed(QUESTIONS[0], id="x", candidates=["nowhere"])],
            {},
            "candidates of 1 of 8 questions are missing.* not hold 1 of 8 ids",
            id="an unknown candidate",
        ),
        pytest.param(
            [*QUESTIONS, changed(QUESTIONS[0], id="x", provenance=[["a", "b"]])],
            {},
            "gold passages or candidates of 1 of 8 .* does not hold 2 of 9 ids",
            id="unknown gold passages",
        ),
        pytest.param(
            [QUESTIONS[1], changed(QUESTIONS[0], provenance=[["p0", "p1", "p2", "p3"]])],
            {},
            "The index has too few wrong passages for 1 of 2 questions: mode 'wrong'",
            id="too few wrong passages",
        ),
        pytest.param(
            [changed(QUESTIONS[0], answers=[])],
            {},
            "1 of 1 questions have no answers, which short_answer, their Cor, compares with",
            id="no answers",
        ),
        pytest.param(
            [changed(QUESTIONS[0], dataset="fever", answers=["maybe"]), QUESTIONS[1]],
            {},
            "1 of 2 questions have no verdicts, which fever_nli",
            id="no verdict",
        ),
        pytest.param(
            [changed(UNKNOWN, meta={"provenance_unknown": True})],
            {},
            "1 of 1 questions have no meta.qa_pairs, which str_em",
            id="no readings",
        ),
        pytest.param(
            [changed(QUESTIONS[0], meta={"qa_pairs": [{}]})],
            {},
            r"1 of 1 questions have other meta.qa_pairs than a list of .*short_answers.*, e.g. 'q0'",
            id="malformed readings",
        ),
        pytest.param(
            [changed(QUESTIONS[0], meta={"claims": "one"})],
            {},
            "1 of 1 questions have other meta.claims than a list of texts",
            id="malformed claims",
        ),
    ],
)
def test_bad_sets_are_refused_with_counts_before_anything_is_written(model, tmp_path, questions, fields, message):
    task = Task("t", **write_world(tmp_path, questions), **fields, **SHORT)
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(model, [task], tmp_path / "out", ["off", "wrong"])
    assert not (tmp_path / "out" / "t").exists()


def test_no_index_needs_mode_off(model, world, tmp_path):
    task = Task("t", world["eval_file"], **SHORT)
    assert evaluate_tasks(model, [task], tmp_path, ["off"])["tasks"]["t"]["query"] == {}
    with pytest.raises(ValueError, match="neither an index nor a corpus_file"):
        evaluate_tasks(model, [task], tmp_path / "b", ["off", "retrieval"])
    with pytest.raises(ValueError, match="mode is 'oracle', expected one of"):
        evaluate_tasks(model, [task], tmp_path / "b", ["oracle"])


def test_the_query_embedding_alone(judged, model, world, tmp_path, monkeypatch):
    """
    Mode query generates nothing. Its figures are those of the query embedding that every run has. Reports and
    comparisons work without answers.
    """
    full_output, full_results = judged
    monkeypatch.setattr("trainer.judging.runs.answer", fail_if_called("an answer was generated"))
    tasks = [
        Task("full", **world, split="in-domain"),
        Task("pool", **world, split="out-of-domain", pool=4, top_k=2, max_retrievals=2),
    ]
    results = evaluate_tasks(model, tasks, tmp_path, ["query"], batch_size=3)
    for name in ("full", "pool"):
        assert results["tasks"][name]["query"] == full_results["tasks"][name]["query"]
        assert results["tasks"][name]["modes"] == {}
    averages = results["averages"]["all"]
    assert averages.keys() == {"query"}
    assert averages["query"].keys() == {"corpus", "pool"}
    assert averages["query"]["corpus"]["mrr"]["tasks"] == 2
    assert averages["query"]["pool"]["mrr"]["tasks"] == 1

    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "## Query embedding" in report
    by_answer = results["tasks"]["full"]["query"]["corpus"]["hit_rate@5"]
    header, _, row = report[report.index("|  | ranked | n | HR@1 |") :].splitlines()[:3]
    assert "| HR@5 |" in header
    assert row.startswith(f"| full | corpus of 7 | {by_answer['n']} | ")
    assert f"| {100 * by_answer['value']:.1f} " in row
    assert "## Results" not in report
    comparison = compare_results(full_output, tmp_path)["tasks"]["full"]
    assert list(comparison) == ["query corpus"]
    assert comparison["query corpus"]["mrr"]["difference"] == 0


def test_no_mode_or_task_is_refused(model, world, tmp_path):
    tasks = [Task("full", **world)]
    with pytest.raises(ValueError, match="There is no mode"):
        evaluate_tasks(model, tasks, tmp_path / "b", [])
    with pytest.raises(ValueError, match="There is no task"):
        evaluate_tasks(model, [], tmp_path / "b", ["off"])


def test_questions_without_a_usable_answer_are_counted_and_left_out(model, tmp_path):
    """A later call that asks for them scores the same answers again."""
    questions = [
        changed(QUESTIONS[0], answers=["The", "..."]),
        changed(QUESTIONS[2], answers=["A", "no such words"]),
        changed(QUESTIONS[3], answers=["no such words"]),
    ]
    eval_file = write_world(tmp_path, questions)["eval_file"]
    measured = {}
    for counted in (False, True):
        task = Task("t", eval_file, count_empty_answers=counted, max_new_tokens=2)
        results = evaluate_tasks(model, [task], tmp_path / "out", ["off"])["tasks"]["t"]
        cor = results["modes"]["off"]["metrics"]["cor"]
        measured[counted] = (cor["value"], cor["n"], [note for note in results["left_out"] if "normalise" in note])
    assert measured[False] == (
        0.0,
        2,
        [
            "1 of 3 questions have only answers that normalise to nothing, e.g. 'The': they do not count in Cor, EM "
            "and other figures of answers (unless count_empty_answers is set)",
            "1 of 3 questions have answers that normalise to nothing, e.g. 'A': these are not compared with",
        ],
    )
    value, n, notes = measured[True]
    assert (value, n) == (pytest.approx(2 / 3), 3)
    assert notes == ["2 of 3 questions have answers that normalise to nothing, e.g. 'The': every output contains them"]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            [["Alpha", "The"]],
            "questions have answers that normalise to nothing, e.g. 'The': these are not compared with",
        ),
        ([["The"]], "questions have only answers that normalise to nothing, e.g. 'The': they do not count in Cor"),
    ],
)
def test_aliases_that_normalise_to_nothing_are_noted(lists, message):
    """They need not be among the answers, in which the example was looked for."""
    question = changed(QUESTIONS[0], answers=["Alpha"], meta={"answers": lists})
    (note,) = _notes_on_empty_answers([question], counted=False)
    assert note.startswith(f"1 of 1 {message}")


def test_an_index_of_gold_passages_alone_is_noted(model, tmp_path):
    """Whatever is retrieved is right then: R@1 of 100 % shows nothing."""
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in CORPUS[:2]))
    paths = {
        **write_world(tmp_path, [changed(QUESTIONS[0], provenance=[["p0"], ["p1"]], candidates=[])]),
        "corpus_file": str(tmp_path / "two.jsonl"),
    }
    results = evaluate_tasks(model, [Task("t", **paths)], tmp_path / "out", ["query"])["tasks"]["t"]
    assert results["query"]["corpus"]["query_recall@1"]["value"] == 1.0
    assert any("holds the gold passages of 1 of 1 questions alone" in note for note in results["left_out"])


def test_the_progress_bar_counts_only_answers_that_can_be_judged():
    clock = Clock([changed(QUESTIONS[0], answers=["The"]), changed(QUESTIONS[2], answers=["Night"])])
    assert clock(Completion(0, [], "", "", 0, [])) == {"Ret": "0.0"}
    assert clock(Completion(1, [5], "Night", "Night", 1, [])) == {"Ret": "0.0", "EM": "100.0"}


def test_scores_of_two_judges_are_not_a_complete_folder(forced, model, world, tmp_path):
    output, _ = forced

    def fails(pairs):
        raise ValueError("the judge is gone")

    with pytest.raises(ValueError, match="the judge is gone"):
        evaluate_tasks(
            model, [Task("t", **world, **SHORT)], output, ["forced"], entail=fails, index_cache=tmp_path / "cache"
        )
    with pytest.raises(FileNotFoundError, match="no complete results folder"):
        read_results(output)
