"""The recipes over an index in Milvus: the same results as over the folder, from a real server and a local file, and clear errors."""

import json
import sys
from types import SimpleNamespace

import pytest

from modeling_cosup import CoSupForCausalLM, MilvusPassageIndex, PassageIndex
from support.models import make_model
from support.recipes import fails_here, run, train_here

TOKEN = "someone:a-secret-word"


@pytest.fixture(scope="module")
def world(inputs, milvus_server, tmp_path_factory):
    """A checkpoint, its index in a folder, and by `build_index.py` in a collection `wiki` of the server: `(checkpoint, index folder, uri)`."""
    folder = tmp_path_factory.mktemp("milvus_recipes")
    make_model().save_pretrained(folder / "model")
    command = [
        sys.executable,
        "recipes/build_index.py",
        "--model",
        folder / "model",
        "--corpus_file",
        inputs / "corpus.jsonl",
    ]
    result = run(*command, "--output_dir", folder / "index", "--index", "wiki", "--index_uri", milvus_server.uri)
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
            "error: milvus_index_params is 'M=8': malformed JSON",
        ),
    ]
    for options, message in wrong:
        assert (
            message in fails_here(monkeypatch, "build_index", *command, *options) and not (tmp_path / "index").exists()
        )
    options = ["--milvus_index_type", "HNSW", "--milvus_index_params", '{"M": 8, "efConstruction": 32}']
    taken = fails_here(monkeypatch, "build_index", *command, "--index", "wiki", "--index_uri", uri, *options)
    assert "collection 'wiki' exists already and is not an unfinished upload of this index" in taken
    monkeypatch.setattr(
        sys,
        "argv",
        [str(word) for word in ["build_index.py", *command, "--index", "graph", "--index_uri", uri, *options]],
    )
    build_index.main()
    assert "6 passages in collection graph of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is searched through HNSW, and search='exact' needs FLAT"):
        CoSupForCausalLM.from_pretrained(model).load_index("graph", uri=uri, search="exact")


def test_generate_answers_the_same(world, tmp_path, monkeypatch, capsys):
    import generate

    model, folder, uri = world
    command = [
        sys.executable,
        "recipes/generate.py",
        "--model",
        model,
        "--max_new_tokens",
        6,
        "--force_nsp_first",
        "who is it?",
        "where?",
    ]
    expected = run(*command, "--index", folder)
    assert expected.returncode == 0 and "[1]" in expected.stdout
    found = run(*command, "--index", "wiki", "--index_uri", uri)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout == expected.stdout
    MilvusPassageIndex.from_index(
        PassageIndex.from_pretrained(folder), tmp_path / "wiki.db", "wiki", show_progress_bar=False
    ).close()
    monkeypatch.setattr(
        sys,
        "argv",
        [str(word) for word in ["generate.py", *command[2:], "--index", "wiki", "--index_uri", tmp_path / "wiki.db"]],
    )
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
        said = fails_here(monkeypatch, "generate", "--model", checkpoint, *options, "who?")
        assert said.startswith("error: ") and message in said and "secret" not in said


def test_a_server_that_is_away_and_a_token_that_is_not_shown(world, monkeypatch, capsys, caplog):
    monkeypatch.setenv("MILVUS_TOKEN", TOKEN)
    monkeypatch.setattr(
        MilvusPassageIndex.__init__, "__defaults__", (None, 5.0, 0, None, None)
    )  # does not try for 15 seconds
    said = fails_here(
        monkeypatch, "generate", "--model", world[0], "--index", "wiki", "--index_uri", "http://127.0.0.1:9", "who?"
    )
    assert said.startswith(
        "error: Milvus at http://127.0.0.1:9, collection 'wiki': no answer to 1 attempts while looking for the collection"
    )
    assert "Check that the server runs" in said
    assert "secret" not in said + caplog.text + "".join(capsys.readouterr())


def test_the_token_comes_from_the_environment(monkeypatch):
    from modeling_cosup.milvus_client_cosup import MilvusConnection

    monkeypatch.setenv("MILVUS_TOKEN", TOKEN)
    assert MilvusConnection("http://127.0.0.1:9", "wiki").token == TOKEN
    assert MilvusConnection("http://127.0.0.1:9", "wiki", "another:word").token == "another:word"


def without_circumstances(value):
    """Results without times, paths and where the index lives."""
    dropped = ("seconds", "time", "index", "index_uri", "command", "scores")
    if isinstance(value, dict):
        return {
            name: without_circumstances(inner)
            for name, inner in value.items()
            if name not in dropped and "second" not in name
        }
    if isinstance(value, list):
        return [without_circumstances(inner) for inner in value]
    return value


def test_run_evaluation_finds_the_same(world, inputs, tmp_path, monkeypatch):
    model, folder, uri = world
    found = {}
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        command = [
            sys.executable,
            "recipes/run_evaluation.py",
            "--model",
            model,
            "--eval_file",
            inputs / "eval.jsonl",
            *options,
        ]
        result = run(
            *command,
            "--output_dir",
            tmp_path / name,
            "--max_new_tokens",
            6,
            "--modes",
            "retrieval",
            "forced",
            "gold",
            "wrong",
            "off",
        )
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        answers = [
            json.loads(line)
            for line in (tmp_path / name / "eval" / "forced" / "predictions.jsonl").read_text().splitlines()
        ]
        ranking = (tmp_path / name / "eval" / "query" / "ranking.jsonl").read_text()
        found[name] = without_circumstances(metrics["tasks"]), without_circumstances(answers), ranking
    assert found["milvus"] == found["folder"]
    assert found["milvus"][0]["eval"]["passages"] == 6 and any(answer["retrievals"] for answer in found["milvus"][1])
    lonely = [
        "--model",
        model,
        "--eval_file",
        inputs / "eval.jsonl",
        "--index_uri",
        uri,
        "--output_dir",
        tmp_path / "out",
    ]
    assert f"error: --index_uri {uri} without --index" in fails_here(monkeypatch, "run_evaluation", *lonely)


def test_a_task_names_a_collection(world, inputs):
    from trainer.judging.tasks import Task, open_index

    model = CoSupForCausalLM.from_pretrained(world[0])
    opened, name = open_index(Task("t", str(inputs / "eval.jsonl"), index="wiki", index_uri=world[2]), model, None)
    in_folder = open_index(Task("t", str(inputs / "eval.jsonl"), index=str(world[1])), model, None)
    assert isinstance(opened, MilvusPassageIndex) and name == in_folder[1]  # answers over one go on over the other
    with pytest.raises(ValueError, match="Task t: index_uri is 'http://x', but no index says which collection there"):
        Task("t", "eval.jsonl", index_uri="http://x")


def training(inputs, model, output, *extra):
    paths = [
        "--model_name_or_path",
        model,
        "--train_file",
        inputs / "train.jsonl",
        "--eval_file",
        inputs / "eval.jsonl",
        "--output_dir",
        output,
    ]
    return [str(word) for word in [*paths, "--max_steps", 2, "--max_new_tokens", 8, "--report_to", "none", *extra]]


def test_train_evaluates_over_an_index_that_is_there(world, inputs, tmp_path):
    model, folder, uri = world
    results = {}
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        arguments = training(
            inputs, model, tmp_path / name, "--freeze_emb_seq", "true", "--eval_before_training", "true", *options
        )
        result = run(sys.executable, "recipes/train.py", *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "7 questions over an index of 6 passages" in result.stdout and f"--index {options[1]}" in result.stdout
        assert not (tmp_path / name / "index").exists()
        written = json.loads((tmp_path / name / "results.json").read_text())
        for mode in written["evaluation"]["modes"].values():
            del mode["seconds"]
        results[name] = {part: written[part] for part in ("before", "after", "evaluation")}
    assert (
        results["milvus"] == results["folder"]
        and results["folder"]["evaluation"]["modes"]["retrieval"]["metrics"]["em"]["n"] > 0
    )


def test_what_train_cannot_do_with_an_index(world, inputs, tmp_path, monkeypatch):
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
        said = train_here(monkeypatch, *training(inputs, model, tmp_path / "out", *options))
        assert said.startswith("error: ") and message in said
    other = tmp_path / "eval.jsonl"
    other.write_text(json.dumps({"id": "q", "input": "who?", "answers": ["x"], "provenance": [["p99"]]}) + "\n")
    options = ["--index", "wiki", "--index_uri", uri, "--freeze_emb_seq", "true", "--eval_file", other]
    said = train_here(monkeypatch, *training(inputs, model, tmp_path / "out", *options))
    assert "The index holds no passage with id 'p99'" in said and not (tmp_path / "out" / "config.json").exists()


def test_candidates_come_from_a_collection(world, inputs, tmp_path, monkeypatch, capsys):
    import build_candidates

    model, folder, uri = world
    found = []
    for name, options in (("folder", ["--index", folder]), ("milvus", ["--index", "wiki", "--index_uri", uri])):
        command = [
            "build_candidates.py",
            "--model",
            model,
            "--eval_file",
            inputs / "eval.jsonl",
            *options,
            "--device",
            "cpu",
        ]
        command += ["--output_file", tmp_path / f"{name}.jsonl", "--num_candidates", 3]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        build_candidates.main()
        found.append((capsys.readouterr().out, (tmp_path / f"{name}.jsonl").read_text()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_experiment_may_name_a_collection(world, inputs, tmp_path, monkeypatch, capsys):
    """Its tasks go to run_evaluation.py as they are; an arm with a frozen Emb_seq searches the index that is there."""
    import run_experiments

    model, _, uri = world
    tasks = [{"name": "eval", "eval_file": str(inputs / "eval.jsonl"), "index": "wiki", "index_uri": uri}]
    experiment = {
        "title": "t",
        "arms": {"frozen": {}},
        "base": {
            "model_name_or_path": str(model),
            "train_file": str(inputs / "train.jsonl"),
            "freeze_emb_seq": True,
            "max_steps": 1,
            "report_to": "none",
        },
        "tasks": tasks,
        "evaluation": {"modes": ["forced"], "max_new_tokens": 4},
    }
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))  # JSON is YAML
    command = ["run_experiments.py", "--experiment", tmp_path / "experiment.yaml", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as ending:
        run_experiments.main()
    assert ending.value.code == 0, capsys.readouterr().out[-3000:]
    (metrics,) = (tmp_path / "out" / "evaluations").glob("*/results/metrics.json")
    task = json.loads(metrics.read_text())["tasks"]["eval"]
    assert task["passages"] == 6 and task["modes"]["forced"]["metrics"]
    assert not list((tmp_path / "out" / "indexes").glob("*"))  # no corpus was embedded


def test_the_demo_answers_from_a_collection(world):
    pytest.importorskip("gradio", reason="the demo is a Gradio app")
    import demo

    model, folder, uri = world
    request = SimpleNamespace(session_hash="a visitor")
    answers = []
    for options in (["--index", str(folder)], ["--index", "wiki", "--index_uri", uri]):
        page = demo.Demo(demo.parse(["--model", str(model), *options]))
        *_, (answer, _) = page.ask("who is it?", "Forced", 1, 6, "", None, request)
        answers.append(answer)
    assert answers[0] == answers[1] and "cosup-passage-1" in answers[0]
