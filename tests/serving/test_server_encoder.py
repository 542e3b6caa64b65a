"""Building an index through a server of Emb_seq: against a stand-in for vLLM, over real HTTP."""

import sys

import numpy as np
import pytest

from modeling_cosup import PassageIndex
from modeling_cosup.shard_build_cosup import unfinished_folder
from support.models import PASSAGES, make_model
from support.vllm_server import StandIn, running

from serving import vllm_client
from serving.server_encoder import ServerEncoder


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def served(model, monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_WAIT", 0.001)
    with running(StandIn(model, "emb_seq")) as server:
        yield server


def build(model, server, batch_size=2, **options):
    encoder = ServerEncoder(model, server.url, batch_size=batch_size)
    try:
        return PassageIndex.build(PASSAGES, model, encoder=encoder, show_progress_bar=False, **options)
    finally:
        encoder.close()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_an_index_equals_the_one_built_here(tmp_path, similarity):
    model = make_model(emb_seq_kwargs={"hidden_size": 48}, similarity=similarity, truncate_dim=24)
    with running(StandIn(model, "emb_seq")) as server:
        index = build(model, server, save_directory=tmp_path / "index", shard_size=4)
    expected = PassageIndex.build(PASSAGES, model, show_progress_bar=False)
    length = float(expected.embeddings.norm(dim=1).min())
    assert np.abs(index.embeddings.numpy() - expected.embeddings.numpy()).max() < 1e-6 * length
    assert index.fingerprint == expected.fingerprint
    assert index.get_passages([5]) == expected.get_passages([5])


def test_temporary_failures_are_tried_again_and_others_are_named(model, served):
    served.stand_in.faults += ["", "503", "429", "500"]  # the first request compares
    assert len(build(model, served)) == len(PASSAGES)
    faults = {
        "400": r"--encoder_url refused \(400\)",
        "garbage": "--encoder_url sent malformed JSON",
        "nan": "--encoder_url sent embeddings that are not finite",
        "503": r"--encoder_url refused \(503\)",
    }
    for fault, message in faults.items():
        served.stand_in.faults.clear()
        served.stand_in.faults += ["", *[fault] * 20]
        with pytest.raises(ConnectionError, match=message):
            build(model, served)


def test_a_build_resumes_after_the_last_complete_shard(model, served, tmp_path):
    options = {"save_directory": tmp_path / "index", "shard_size": 2}
    served.stand_in.faults += ["", "", "400"]
    with pytest.raises(ConnectionError):
        build(model, served, **options)
    assert len(list(unfinished_folder(tmp_path / "index").glob("shard-*.json"))) == 1
    served.stand_in.bodies.clear()
    served.stand_in.faults.clear()
    index = build(model, served, **options)
    expected = PassageIndex.build(PASSAGES, model, show_progress_bar=False)
    assert np.abs(index.embeddings.numpy() - expected.embeddings.numpy()).max() < 1e-6
    assert len(served.stand_in.bodies) == 3  # a comparison, and two shards


def test_servers_of_other_models_are_recognised(model):
    other = make_model(emb_seq_kwargs={"seed": 7})
    wide = make_model(gen_kwargs={"hidden_size": 48}, emb_seq_kwargs={"hidden_size": 48})
    for wrong, message in ((other, "does not serve the Emb_seq of this checkpoint"), (wide, "width 48, expected 32")):
        with running(StandIn(wrong, "emb_seq")) as server, pytest.raises(ValueError, match=message):
            build(model, server)


def test_a_server_that_reads_too_little_is_refused(model, served):
    served.stand_in.max_model_len = 200
    with pytest.raises(ValueError, match="reads 200 tokens, but a passage may have 258, with BOS and EOS"):
        build(model, served)


def test_the_recipe_embeds_through_a_server(model, served, tmp_path, monkeypatch, capsys):
    import build_index

    model.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "title": "T", "text": "x"}\n{"id": "b", "text": "y"}\n')
    options = {"model": tmp_path / "model", "corpus_file": corpus, "output_dir": tmp_path / "index"}
    options |= {"encoder_url": served.url}
    argv = ["build_index.py"]
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", argv)
    build_index.main()
    assert "2 passages in" in capsys.readouterr().out
    assert [len(body["input"]) for body in served.stand_in.bodies] == [2, 2]
    served.stand_in.faults.append("400")
    with pytest.raises(SystemExit, match="error: --encoder_url refused .*http://127.0.0.1"):
        build_index.main()
