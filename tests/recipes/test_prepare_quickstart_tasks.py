"""Tasks and encoders over a quickstart world: valid files, nothing of them in training, reuse and refusal, the world untouched."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from modeling_cosup import CoSupForCausalLM
from trainer import load_corpus, load_evaluation_set, load_instances

from shared.quickstart import (
    EncoderArguments,
    TaskArguments,
    WorldArguments,
    prepare_encoders,
    prepare_tasks,
    prepare_world,
)
from shared.quickstart_models import embed
from shared.quickstart_tasks import SPLITS

SMALL = {"num_train_entities": 300, "num_validation": 20, "num_unseen_entities": 60, "num_train_instances": 400}
SMALL |= {"num_eval_no_passage": 10, "drill_max_steps": 0}
FEW = {"num_questions": 20, "num_no_passage": 5, "pool_size": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare_world(WorldArguments(str(tmp_path_factory.mktemp("quickstart") / "world"), **SMALL))


@pytest.fixture(scope="module")
def tasks(world, tmp_path_factory):
    before = {path: path.stat().st_mtime_ns for path in Path(world["world"]).parent.rglob("*")}
    folder, output = str(Path(world["world"]).parent), str(tmp_path_factory.mktemp("tasks") / "tasks")
    made = prepare_tasks(TaskArguments(folder, output, **FEW))
    assert before == {path: path.stat().st_mtime_ns for path in Path(world["world"]).parent.rglob("*")}
    return made


def test_tasks_are_valid_and_what_they_ask_is_in_no_training_instance(world, tasks):
    assert {name: task["split"] for name, task in tasks.items()} == SPLITS
    instances = load_instances(world["train"])
    asked_in_training = {
        x["input"].replace(p["title"], "X") for x in instances for p in [x["segments"][0]["passage"]] if p
    }
    read = Path(world["train"]).read_text()
    corpus = {passage["id"]: passage for passage in load_corpus(tasks["people"]["corpus_file"])}
    for name, task in tasks.items():
        questions = load_evaluation_set(task["eval_file"], corpus=list(corpus.values()))
        assert 12 <= sum(bool(x["provenance"]) for x in questions) <= 20
        for x in questions:
            assert len(set(x["candidates"])) == len(x["candidates"]) == 30
            for (gold,) in x["provenance"]:
                passage = corpus[gold]
                assert gold in x["candidates"]
                assert passage["title"] not in read
                assert (passage["title"] in x["input"]) == (name != "surnames")
                value = x["answers"][0].removeprefix(passage["title"]).rstrip(".").split()[-1]
                assert value in passage["text"]
            if name == "wordings":
                assert x["input"].replace(passage["title"], "X") not in asked_in_training
            if name == "people" and x["provenance"]:
                assert x["input"].replace(passage["title"], "X") in asked_in_training
            if name == "surnames":
                name_asked = re.findall("[A-Z][a-z]+", x["input"])[-1]
                assert sum(name_asked in passage["text"] for passage in corpus.values()) == 1


def test_the_look_alikes_of_a_pool_share_letters_with_the_question(tasks):
    corpus = {passage["id"]: passage for passage in load_corpus(tasks["people"]["corpus_file"])}
    for x in load_evaluation_set(tasks["wordings"]["eval_file"]):
        names = [name for name in re.findall("[A-Z][a-z]+", corpus[x["candidates"][0]]["title"])]
        runs = {name[i : i + 3] for name in names for i in range(len(name) - 2)}
        assert any(run in corpus[x["candidates"][1]]["text"] for run in runs)


def test_the_same_tasks_are_reused_and_foreign_folders_refused(world, tasks, tmp_path):
    folder, made = str(Path(world["world"]).parent), Path(tasks["people"]["eval_file"])
    before = made.stat().st_mtime_ns
    assert prepare_tasks(TaskArguments(folder, str(made.parent), **FEW)) == tasks
    assert made.stat().st_mtime_ns == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        prepare_tasks(TaskArguments(folder, str(tmp_path)))
    with pytest.raises(FileExistsError, match="choose another folder"):
        prepare_encoders(EncoderArguments(folder, str(tmp_path)))


def test_encoders_become_emb_seq_and_the_retriever_has_learned(world, tmp_path):
    folder = str(Path(world["world"]).parent)
    paths = prepare_encoders(EncoderArguments(folder, str(tmp_path / "models"), retriever_steps=60))
    for name, pooling in (("emb_seq_small", "eos"), ("emb_seq_bert", "eos"), ("retriever", "mean")):
        for query_from in ("gen", "emb_seq", "query_encoder"):
            extra = {"query_encoder": paths[name]} if query_from == "query_encoder" else {}
            model = CoSupForCausalLM.from_gen_and_emb_seq(
                world["gen"],
                paths[name],
                query_from=query_from,
                emb_seq_pooling=pooling,
                max_passage_length=128,
                **extra,
            )
            assert model.build_index([{"id": "p", "title": "t", "text": "x"}]).embeddings.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(paths["retriever"])
    texts = [f"{p['title']} :: {p['text']}" for p in load_corpus(world["corpus"])[:64]]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]

    def found(name):
        model = AutoModel.from_pretrained(paths[name]).eval()
        with torch.no_grad():
            first, second = (
                embed(model, tokenizer, part)
                for part in ([ids[: len(ids) // 2] for ids in rows], [ids[len(ids) // 4 :] for ids in rows])
            )
        return int(((first @ second.T).argmax(1) == torch.arange(64)).sum())

    assert found("retriever") > found("emb_seq_bert")
    assert found("retriever") > 32
