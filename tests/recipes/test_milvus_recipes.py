"""The recipes with an index in Milvus, on a server and in a local file: the same results as with a folder."""

import json
import sys
from types import SimpleNamespace

import pytest

from modeling_cosup import CoSupForCausalLM, MilvusPassageIndex, PassageIndex, milvus_cosup
from modeling_cosup.lines_cosup import read_lines, write_lines
from support.forks import run_forked
from support.models import make_model
from support.recipes import fails_here, train_here

TOKEN = "someone:a-secret-word"


@pytest.fixture(scope="module")
def world(inputs, milvus_server, tmp_path_factory):
    """
    A checkpoint, and its index in a folder and, uploaded by `build_index.py`, in the collection `wiki` of the server.

    Returns `(checkpoint, index folder, uri)`.
    """
    folder = tmp_path_factory.mktemp("milvus_recipes")
    make_model().save_pretrained(folder / "model")
    command = ["recipes/build_index.py", "--model", folder / "model"]
    command += ["--corpus_file", inputs / "corpus.jsonl", "--output_dir", folder / "index"]
    result = run_forked(*command, "--index", "wiki", "--index_uri", milvus_server.uri)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"6 passages in collection wiki of {milvus_server.uri}" in result.stdout
    return folder / "model", folder / "index", milvus_server.uri


def test_build_index_uploads_an_approximate_collection_or_says_what_is_wrong(
    world, inputs, tmp_path, monkeypatch, capsys
):
    import build_index

    model, _, uri = world
    command = ["--model", model, "--corpus_file", inputs / "corpus.jsonl", "--output_dir", tmp_path / "index"]
    wrong = [
        (["--index_uri", uri], "error: --index_uri " + uri + " without --index: name the collection"),
        (["--index", "x"], "error: --index x without --index_uri: name the Milvus server to upload to"),
        (
            ["--index", "x", "--index_uri", uri, "--milvus_index_params", "M=8"],
            "error: --milvus_index_params is 'M=8': malformed JSON",
        ),
    ]
    for options, message in wrong:
        assert message in fails_here(monkeypatch, "build_index", *command, *options)
        assert not (tmp_path / "index").exists()
    options = ["--milvus_index_type", "HNSW", "--milvus_index_params", '{"M": 8, "efConstruction": 32}']
    taken = fails_here(monkeypatch, "build_index", *command, "--index", "wiki", "--index_uri", uri, *options)
    assert "collection 'wiki' already exists and is not an unfinished upload of this index" in taken
    assert not (tmp_path / "index").exists()
    arguments = [*command, "--index", "graph", "--index_uri", uri, *options]
    monkeypatch.setattr(sys, "argv", ["build_index.py", *map(str, arguments)])
    build_index.main()
    assert "6 passages in collection graph of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is searched through HNSW, and search='exact' needs FLAT"):
        CoSupForCausalLM.from_pretrained(model).load_index("graph", uri=uri, search="exact")


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_interrupted_upload_is_resumed_without_embedding_again(world, inputs, tmp_path, monkeypatch, capsys):
    import build_index

    model, _, uri = world
    passages = read_lines(inputs / "corpus.jsonl")
    build = CoSupForCausalLM.build_index
    built = []

    def counted(*args, **options):
        built.append(len(read_lines(args[1])))
        return build(*args, **options)

    def run(collection, corpus, *options):
        write_lines(tmp_path / "corpus.jsonl", corpus)
        command = ["build_index.py", "--model", model, "--corpus_file", tmp_path / "corpus.jsonl", *options]
        command += ["--output_dir", tmp_path / "index", "--index_uri", uri, "--index", collection]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        build_index.main()

    monkeypatch.setattr(CoSupForCausalLM, "build_index", counted)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(milvus_cosup, "finish_upload", interrupt)
        run("resumed", passages)
    run("resumed", passages)
    assert "6 passages in collection resumed of" in capsys.readouterr().out
    assert built == [6]
    run("changed", [{**passages[0], "text": "changed"}, *passages[1:]])
    run("shorter", passages[:5])
    run("shards", passages[:5], "--shard_size", 3)
    assert built == [6, 6, 5, 5]


def test_generate_answers_the_same(world, tmp_path, monkeypatch, capsys):
    import generate

    model, folder, uri = world
    arguments = ["--model", model, "--max_new_tokens", 6, "--force_nsp_first", "who is it?", "where?"]
    command = ["recipes/generate.py", *arguments]
    expected = run_forked(*command, "--index", folder)
    assert expected.returncode == 0
    assert "[1]" in expected.stdout
    from_server = run_forked(*command, "--index", "wiki", "--index_uri", uri)
    assert from_server.returncode == 0, from_server.stderr[-3000:]
    assert from_server.stdout == expected.stdout

    local_file = tmp_path / "wiki.db"
    index = PassageIndex.from_pretrained(folder)
    MilvusPassageIndex.from_index(index, local_file, "wiki", show_progress_bar=False).close()
    arguments += ["--index", "wiki", "--index_uri", local_file]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    generate.main()
    assert capsys.readouterr().out == expected.stdout


def test_clear_errors(world, tmp_path, monkeypatch):
    model, folder, uri = world
    make_model(emb_seq_kwargs={"seed": 9}).save_pretrained(tmp_path / "other")
    cases = [
        (
            model,
            ["--index_uri", uri],
            f"error: --index_uri {uri} without --index: name the collection that holds the index.",
        ),
        (
            model,
            ["--index", "missing", "--index_uri", uri],
            "collection 'missing': there is no such collection, only [",
        ),
        (
            model,
            ["--index", "wiki", "--index_uri", folder],
            "expected a server (http://host:19530) or a local file that ends in .db.",
        ),
        (model, ["--index", "wiki", "--index_uri", tmp_path / "missing.db"], "error: There is no Milvus file"),
        (tmp_path / "other", ["--index", "wiki", "--index_uri", uri], "error: This index was built by another model"),
        (
            model,
            ["--index", "wiki", "--index_uri", uri.replace("//", f"//{TOKEN}@")],
            f"error: uri holds a password; expected {uri}, and user:password in",
        ),
    ]
    for checkpoint, options, message in cases:
        error = fails_here(monkeypatch, "generate", "--model", checkpoint, *options, "who?")
        assert error.startswith("error: ")
        assert message in error
        assert "secret" not in error


def test_a_server_that_is_away_and_a_token_that_is_not_shown(world, monkeypatch, capsys, caplog):
    monkeypatch.setenv("MILVUS_TOKEN", TOKEN)
    without_retries = (None, 5.0, 0, None, None)  # the default takes 15 seconds
    monkeypatch.setattr(MilvusPassageIndex.__init__, "__defaults__", without_retries)
    model, _, _ = world
    arguments = ["--model", model, "--index", "wiki", "--index_uri", "http://127.0.0.1:9", "who?"]
    error = fails_here(monkeypatch, "generate", *arguments)
    no_answer = "no answer to 1 attempts while looking for the collection"
    assert error.startswith(f"error: Milvus at http://127.0.0.1:9, collection 'wiki': {no_answer}")
    assert "Check that the server runs" in error
    assert "secret" not in error + caplog.text + "".join(capsys.readouterr())


def test_the_token_comes_from_the_environment(monkeypatch):
    from modeling_cosup.milvus_client_cosup import MilvusConnection

    monkeypatch.setenv("MILVUS_TOKEN", TOKEN)
    assert MilvusConnection("http://127.0.0.1:9", "wiki").token == TOKEN
    assert MilvusConnection("http://127.0.0.1:9", "wiki", "another:word").token == "another:word"


def without_circumstances(value):
    """Return results without times, paths and the place of the index."""
    dropped = ("time", "index", "index_uri", "command", "scores")
    if isinstance(value, dict):
        names = [name for name in value if name not in dropped and "second" not in name]
        return {name: without_circumstances(value[name]) for name in names}
    if isinstance(value, list):
        return [without_circumstances(item) for item in value]
    return value


def test_run_evaluation_finds_the_same(world, inputs, tmp_path, monkeypatch):
    model, folder, uri = world
    arguments = ["--model", model, "--eval_file", inputs / "eval.jsonl"]
    modes = ["--modes", "retrieval", "forced", "gold", "wrong", "off"]
    command = ["recipes/run_evaluation.py", *arguments, "--max_new_tokens", 6, *modes]
    found = {}
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        output = tmp_path / name
        result = run_forked(*command, *options, "--output_dir", output)
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = json.loads((output / "metrics.json").read_text())
        lines = (output / "eval" / "forced" / "predictions.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        ranking = (output / "eval" / "query" / "ranking.jsonl").read_text()
        found[name] = without_circumstances(metrics["tasks"]), without_circumstances(answers), ranking
    assert found["milvus"] == found["folder"]
    tasks, answers, _ = found["milvus"]
    assert tasks["eval"]["passages"] == 6
    assert any(answer["retrievals"] for answer in answers)

    without_index = [*arguments, "--index_uri", uri, "--output_dir", tmp_path / "out"]
    assert f"error: --index_uri {uri} without --index" in fails_here(monkeypatch, "run_evaluation", *without_index)


def test_a_task_names_a_collection(world, inputs):
    from trainer.judging.tasks import Task, open_index

    checkpoint, folder, uri = world
    model = CoSupForCausalLM.from_pretrained(checkpoint)
    eval_file = str(inputs / "eval.jsonl")
    index, name = open_index(Task("t", eval_file, index="wiki", index_uri=uri), model, None)
    assert isinstance(index, MilvusPassageIndex)
    _, again = open_index(Task("t", eval_file, index="wiki", index_uri=uri), model, None)
    assert name == again
    _, name_of_folder = open_index(Task("t", eval_file, index=str(folder)), model, None)
    assert name != name_of_folder  # nothing shows that a server holds the same passages
    with pytest.raises(ValueError, match="Task t: index_uri is 'http://x', but no index says which collection there"):
        Task("t", "eval.jsonl", index_uri="http://x")


def training(inputs, model, output, *extra):
    """Return the arguments of train.py."""
    arguments = ["--model_name_or_path", model, "--output_dir", output]
    arguments += ["--train_file", inputs / "train.jsonl", "--eval_file", inputs / "eval.jsonl"]
    arguments += ["--max_steps", 2, "--max_new_tokens", 8, "--report_to", "none"]
    return [str(word) for word in [*arguments, *extra]]


def test_train_evaluates_over_an_existing_index(world, inputs, tmp_path):
    model, folder, uri = world
    results = {}
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        frozen = ["--freeze_emb_seq", "true", "--eval_before_training", "true"]
        arguments = training(inputs, model, tmp_path / name, *frozen, *options)
        result = run_forked("recipes/train.py", *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "7 questions over an index of 6 passages" in result.stdout
        assert f"--index {options[1]}" in result.stdout
        assert not (tmp_path / name / "index").exists()
        written = json.loads((tmp_path / name / "results.json").read_text())
        for mode in written["evaluation"]["modes"].values():
            del mode["seconds"]
        results[name] = {part: written[part] for part in ("before", "after", "evaluation")}
    assert results["milvus"] == results["folder"]
    assert results["folder"]["evaluation"]["modes"]["retrieval"]["metrics"]["em"]["n"] > 0


def test_errors_of_train_with_an_index(world, inputs, tmp_path, monkeypatch):
    model, folder, uri = world
    wrong = [
        (["--index", folder], "training changes Emb_seq, and no index of it stays valid; add --freeze_emb_seq true."),
        (
            ["--index", folder, "--corpus_file", inputs / "corpus.jsonl"],
            "--corpus_file and --push_index are for one that training builds",
        ),
        (["--index_uri", uri, "--freeze_emb_seq", "true"], "without --index: name the collection"),
    ]
    for options, message in wrong:
        error = train_here(monkeypatch, *training(inputs, model, tmp_path / "out", *options))
        assert error.startswith("error: ")
        assert message in error
    other = tmp_path / "eval.jsonl"
    other.write_text(json.dumps({"id": "q", "input": "who?", "answers": ["x"], "provenance": [["p99"]]}) + "\n")
    options = ["--index", "wiki", "--index_uri", uri, "--freeze_emb_seq", "true", "--eval_file", other]
    error = train_here(monkeypatch, *training(inputs, model, tmp_path / "out", *options))
    assert "The index holds no passage with id 'p99'" in error
    assert not (tmp_path / "out" / "config.json").exists()


def test_candidates_come_from_a_collection(world, inputs, tmp_path, monkeypatch, capsys):
    import build_candidates

    model, folder, uri = world
    command = ["build_candidates.py", "--model", model, "--eval_file", inputs / "eval.jsonl"]
    command += ["--device", "cpu", "--num_candidates", 3]
    printed, written = [], []
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        output_file = tmp_path / f"{name}.jsonl"
        arguments = [*command, *options, "--output_file", output_file]
        monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
        build_candidates.main()
        printed.append(capsys.readouterr().out)
        written.append(output_file.read_text())
    assert printed[0] == printed[1]
    assert written[0] == written[1]


@pytest.mark.slow
def test_an_experiment_may_name_a_collection(world, inputs, tmp_path, monkeypatch, capsys):
    """run_evaluation.py gets the tasks unchanged; an arm with a frozen Emb_seq searches the existing index."""
    import run_experiments

    model, _, uri = world
    tasks = [{"name": "eval", "eval_file": str(inputs / "eval.jsonl"), "index": "wiki", "index_uri": uri}]
    base = {
        "model_name_or_path": str(model),
        "train_file": str(inputs / "train.jsonl"),
        "freeze_emb_seq": True,
        "max_steps": 1,
        "report_to": "none",
    }
    experiment = {
        "title": "t",
        "arms": {"frozen": {}},
        "base": base,
        "tasks": tasks,
        "evaluation": {"modes": ["forced"], "max_new_tokens": 4},
    }
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))  # JSON is YAML
    command = ["run_experiments.py", "--experiment", tmp_path / "experiment.yaml", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])

    def launch(recipe, arguments, run, log, *options):
        result = run_forked(f"recipes/{recipe}", *arguments)
        log.write_text(result.stdout + result.stderr)
        assert result.returncode == 0, result.stderr[-3000:]
        return recipe, 1.0

    monkeypatch.setattr(run_experiments, "launch", launch)  # accelerate would import everything twice more
    with pytest.raises(SystemExit) as ending:
        run_experiments.main()
    assert ending.value.code == 0, capsys.readouterr().out[-3000:]
    (metrics,) = (tmp_path / "out" / "evaluations").glob("*/results/metrics.json")
    task = json.loads(metrics.read_text())["tasks"]["eval"]
    assert task["passages"] == 6
    assert task["modes"]["forced"]["metrics"]
    assert not list((tmp_path / "out" / "indexes").glob("*"))  # no corpus was embedded


def test_the_demo_answers_from_a_collection(world):
    pytest.importorskip("gradio", reason="the demo is a Gradio app")
    from demo_parts.options import parse
    from demo_parts.page import Demo

    model, folder, uri = world
    request = SimpleNamespace(session_hash="a visitor")
    answers = []
    for options in (["--index", str(folder)], ["--index", "wiki", "--index_uri", uri]):
        page = Demo(parse(["--model", str(model), *options]))
        *_, (answer, _) = page.ask("who is it?", "Forced", 1, 6, "", None, False, request)
        answers.append(answer)
    assert answers[0] == answers[1]
    assert "cosup-passage-1" in answers[0]
