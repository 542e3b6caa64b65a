"""Tasks and encoders over a quickstart world: valid files, unseen in training, folders reused or refused."""

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
    folder = Path(world["world"]).parent
    before = modification_times(folder)
    tasks = prepare_tasks(TaskArguments(str(folder), str(tmp_path_factory.mktemp("tasks") / "tasks"), **FEW))
    assert modification_times(folder) == before
    return tasks


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_tasks_are_valid_and_their_questions_are_in_no_training_instance(world, tasks):
    assert {name: task["split"] for name, task in tasks.items()} == SPLITS
    trained_questions = set()
    for instance in load_instances(world["train"]):
        passage = instance["segments"][0]["passage"]
        if passage:
            trained_questions.add(instance["input"].replace(passage["title"], "X"))
    training_text = Path(world["train"]).read_text()
    corpus = {passage["id"]: passage for passage in load_corpus(tasks["people"]["corpus_file"])}
    for name, task in tasks.items():
        questions = load_evaluation_set(task["eval_file"], corpus=list(corpus.values()))
        assert 12 <= sum(bool(question["provenance"]) for question in questions) <= 20
        for question in questions:
            assert len(set(question["candidates"])) == len(question["candidates"]) == 30
            for (gold,) in question["provenance"]:
                title, text = corpus[gold]["title"], corpus[gold]["text"]
                assert gold in question["candidates"]
                assert title not in training_text
                assert (title in question["input"]) == (name != "surnames")
                value = question["answers"][0].removeprefix(title).rstrip(".").split()[-1]
                assert value in text
                if name == "people":
                    assert question["input"].replace(title, "X") in trained_questions
            if name == "wordings":
                assert question["input"].replace(title, "X") not in trained_questions
            if name == "surnames":
                surname = re.findall("[A-Z][a-z]+", question["input"])[-1]
                assert sum(surname in passage["text"] for passage in corpus.values()) == 1


def test_the_look_alikes_of_a_question_share_letters_with_it(tasks):
    corpus = {passage["id"]: passage for passage in load_corpus(tasks["people"]["corpus_file"])}
    num_compared = 0
    for question in load_evaluation_set(tasks["wordings"]["eval_file"]):
        gold, nearest = question["candidates"][:2]
        runs = set()
        for name in re.findall("[A-Z][a-z]+", question["input"]):
            runs.update(name[i : i + 3] for i in range(len(name) - 2))
        others = [passage["text"] for id, passage in corpus.items() if id != gold]
        if not any(run in text for text in others for run in runs):
            continue  # in so small a world a name may have no look-alike
        num_compared += 1
        assert any(run in corpus[nearest]["text"] for run in runs)
    assert num_compared > 10


def test_the_same_tasks_are_reused_and_foreign_folders_refused(world, tasks, tmp_path):
    folder, eval_file = str(Path(world["world"]).parent), Path(tasks["people"]["eval_file"])
    before = eval_file.stat().st_mtime_ns
    assert prepare_tasks(TaskArguments(folder, str(eval_file.parent), **FEW)) == tasks
    assert eval_file.stat().st_mtime_ns == before
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
            options = {"query_from": query_from, "emb_seq_pooling": pooling, "max_passage_length": 128}
            if query_from == "query_encoder":
                options["query_encoder"] = paths[name]
            model = CoSupForCausalLM.from_gen_and_emb_seq(world["gen"], paths[name], **options)
            index = model.build_index([{"id": "p", "title": "t", "text": "x"}])
            assert index.embeddings.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(paths["retriever"])
    texts = [f"{passage['title']} :: {passage['text']}" for passage in load_corpus(world["corpus"])[:64]]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    first_halves = [ids[: len(ids) // 2] for ids in rows]
    ends = [ids[len(ids) // 4 :] for ids in rows]

    def num_hits(name):
        """Return for how many of 64 passages the first half is nearest to the end of the same passage."""
        model = AutoModel.from_pretrained(paths[name]).eval()
        with torch.no_grad():
            scores = embed(model, tokenizer, first_halves) @ embed(model, tokenizer, ends).T
        return int((scores.argmax(1) == torch.arange(64)).sum())

    assert num_hits("retriever") > num_hits("emb_seq_bert")
    assert num_hits("retriever") > 32
