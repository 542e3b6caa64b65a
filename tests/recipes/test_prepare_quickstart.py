"""The quickstart world: valid files, no unseen name in training, a lossless tokenizer, folders reused or refused."""

import json
from pathlib import Path

import pytest
from prepare_quickstart_documents import NUM_PASSAGES, SampleArguments, write_documents
from transformers import AutoTokenizer

from modeling_cosup import CoSupForCausalLM
from trainer import load_corpus, load_evaluation_set, load_instances
from trainer.questions import answers_to_find, has_answer

from shared import quickstart_models, quickstart_world
from shared.quickstart import WorldArguments, prepare_world

SMALL = {"num_train_entities": 300, "num_validation": 20, "num_unseen_entities": 30, "num_train_instances": 400}
SMALL |= {"num_eval_no_passage": 10, "drill_max_steps": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare_world(WorldArguments(str(tmp_path_factory.mktemp("quickstart") / "world"), **SMALL))


def test_files_are_valid_and_unseen_entities_are_unseen(world):
    train, validation = load_instances(world["train"]), load_instances(world["validation"])
    corpus = load_corpus(world["corpus"])
    questions = load_evaluation_set(world["eval"], corpus=corpus)
    assert (len(train), len(validation), len(corpus)) == (400, 20, 350)
    assert sum(not question["provenance"] for question in questions) == 10
    num_no_passage = sum(instance["segments"][0]["passage"] is None for instance in train)
    assert 0.03 < num_no_passage / 400 < 0.25
    titles = {passage["id"]: passage["title"] for passage in corpus}
    assert len(set(titles.values())) == 350  # no two entities share a name
    training_text = Path(world["train"]).read_text()
    for question in questions:
        for (gold,) in question["provenance"]:
            assert titles[gold] not in training_text
            assert titles[gold] in question["input"]
            assert question["answers"][0].startswith(titles[gold])
        assert answers_to_find(question) == []  # a passage says the same in other words: HR@k would mean nothing


def test_gen_learns_to_say_that_it_does_not_know_what_the_world_does_not_hold(world):
    first_segments = [row["segments"][0] for row in load_instances(world["train"])]
    passages = [segment["passage"] for segment in first_segments if segment["text"] == "I do not know."]
    assert len(passages) > 5
    assert set(passages) == {None}
    for question in load_evaluation_set(world["eval"]):
        assert (question["answers"] == ["I do not know."]) == (question["input"] in quickstart_world.REAL_QUESTIONS)
    inputs = {row["input"] for row in load_instances(world["train"])}
    assert not inputs & set(quickstart_world.REAL_QUESTIONS)  # evaluation asks what training does not


def test_tokenizer_is_lossless_and_reads_no_special_token_in_text(world):
    tokenizer = AutoTokenizer.from_pretrained(world["gen"])
    for instance in load_instances(world["train"]):
        text = instance["segments"][0]["text"]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("a </s> b <s> <pad>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special_ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special_ids & set(ids)
    CoSupForCausalLM.from_gen_and_emb_seq(world["gen"], world["emb_seq"], max_passage_length=128)


def test_same_settings_are_reused_and_foreign_folders_refused(world, tmp_path):
    folder = str(Path(world["train"]).parent)
    before = Path(world["train"]).stat().st_mtime_ns
    assert prepare_world(WorldArguments(folder, **SMALL)) == world
    assert Path(world["train"]).stat().st_mtime_ns == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        prepare_world(WorldArguments(str(tmp_path), **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert json.loads(Path(folder, "world.json").read_text())["num_train_entities"] == 300


def test_pairs_are_the_training_questions_without_their_gold_passages(world, tmp_path):
    folder = tmp_path / "world"
    pairs_world = prepare_world(WorldArguments(str(folder), pairs=True, **SMALL))
    corpus = {passage["id"]: passage for passage in load_corpus(pairs_world["corpus"])}
    assert Path(pairs_world["train"]).read_text() == Path(world["train"]).read_text()  # the world is the same
    pairs = load_instances(pairs_world["pairs"])
    for pair, instance in zip(pairs, load_instances(world["train"]), strict=True):
        (segment,) = instance["segments"]
        assert (pair["input"], pair["segments"]) == (instance["input"], [])
        assert pair["answers"][0] == segment["text"]
        if segment["passage"]:
            assert pair["provenance"] == [[segment["passage"]["id"]]]
            assert has_answer(corpus[segment["passage"]["id"]], pair["answers"])
            assert pair["answers"][0].endswith(f"{pair['answers'][1]}.")
    for question in load_evaluation_set(pairs_world["eval"]):
        if question["provenance"]:
            assert has_answer(corpus[question["provenance"][0][0]], answers_to_find(question))
    assert all(not answers_to_find(question) for question in load_evaluation_set(world["eval"]))  # sentences alone
    starts = load_instances(pairs_world["start"])
    assert not {instance["segments"][0]["passage"]["id"] for instance in starts} & set(corpus)

    prepare_world(WorldArguments(str(folder), **SMALL))  # replaces it
    assert not (folder / "pairs.jsonl").exists()


@pytest.mark.parametrize("module", [quickstart_world, quickstart_models], ids=lambda module: module.__name__)
def test_other_code_makes_the_world_anew(module, tmp_path, monkeypatch):
    args = WorldArguments(str(tmp_path / "world"), **SMALL)
    path = Path(prepare_world(args)["train"])
    before = path.stat().st_mtime_ns
    (tmp_path / "code.py").write_text(Path(module.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "code.py"))
    prepare_world(args)
    assert path.stat().st_mtime_ns > before


def test_documents_of_the_world_hold_its_passages(world, tmp_path):
    pypdf = pytest.importorskip("pypdf")
    pytest.importorskip("fpdf")
    write_documents(SampleArguments(world["corpus"], str(tmp_path)))
    passages = load_corpus(world["corpus"])[:NUM_PASSAGES]
    notes = (tmp_path / "notes" / "notes-20.md").read_text()
    assert [passage["text"] in notes for passage in passages[57:60]] == [True] * 3
    last_page = pypdf.PdfReader(tmp_path / "register-10.pdf").pages[2].extract_text()
    assert [passage["title"] in last_page for passage in passages[-3:]] == [True] * 3
    assert len(list(tmp_path.rglob("*.*"))) == 30
