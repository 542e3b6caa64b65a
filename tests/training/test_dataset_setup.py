"""What the trainer checks in a whole dataset of any kind: ids, passages, lengths, and where it ends."""

import re

import datasets
import pytest
import torch

from support.models import PASSAGES, make_model
from support.training import NAMES, Endless, arguments, world
from trainer import CoSupTrainer, dataset_setup, load_instances
from trainer.data import check_instance
from trainer.dataset_setup import PATIENCE, no_duplicates_sampler, tokenize_dataset
from trainer.passage_contents import PassageContents


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "list": list,
    "dataset": datasets.Dataset.from_list,
    "map-style": Endless,
    "streamed dataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "stream": Stream,
}


@pytest.fixture(scope="module")
def tiny_model():
    return make_model()


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(dataset_setup.logger, "warning", messages.append)
    return messages


def instance(*passages, **segment):
    segments = [{"text": "a", "passage": passage, **segment} for passage in passages]
    return {"input": "q?", "segments": segments or [{"text": "a", "passage": None}]}


def prepared(model, tmp_path, dataset, **options):
    """Tokenize a dataset as the trainer does, and return all its rows."""
    tokenizers = model.tokenizer, model.emb_seq_tokenizer
    tokenized = tokenize_dataset(dataset, tokenizers, model.config, arguments(tmp_path, **options), "training set")
    return list(tokenized)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_ends(tiny_model, tmp_path, kind):
    rows = prepared(tiny_model, tmp_path, KINDS[kind](world(NAMES[:7])))
    assert [row["id"] for row in rows] == NAMES[:7]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_a_formatted_dataset_gives_the_rows_of_a_plain_one(tiny_model, tmp_path, format, is_stream):
    """Of instances, and of rows that are tokenized already, whose format would make tensors of their columns."""
    rows = [{**row, "id": number} for number, row in enumerate(world(NAMES[:7]))]
    tokenized = prepared(tiny_model, tmp_path, rows)
    for plain_rows in (rows, tokenized):
        dataset = datasets.Dataset.from_list(plain_rows)
        formatted = (dataset.to_iterable_dataset() if is_stream else dataset).with_format(format)
        from_formatted = prepared(tiny_model, tmp_path, formatted)
        assert [{name: row[name] for name in tokenized[0]} for row in from_formatted] == tokenized


@pytest.mark.parametrize("kind", ["list", "dataset", "map-style", "stream"])  # datasets streams no empty dataset
def test_an_empty_dataset_is_refused(tiny_model, tmp_path, kind):
    with pytest.raises(ValueError, match="The training set is empty"):
        prepared(tiny_model, tmp_path, KINDS[kind]([]))


def test_the_name_of_a_file_is_no_dataset(tiny_model, tmp_path):
    with pytest.raises(TypeError, match=r"training set is the name 'a.jsonl'.*load_instances\('a.jsonl'\)"):
        prepared(tiny_model, tmp_path, "a.jsonl")


def test_a_dictionary_of_splits_is_no_dataset(tiny_model, tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(world(["Ann"])))
    with pytest.raises(TypeError, match=r"training set is a dictionary of the splits 'train', expected one of them"):
        prepared(tiny_model, tmp_path, splits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_passage_id_with_two_contents_names_both_rows(tiny_model, tmp_path, kind):
    """Otherwise all passages of a set could count as one: no loss, and a recall of 100 %."""
    rows = [instance(PASSAGES[0]), instance(), instance(PASSAGES[1]), instance(dict(PASSAGES[0], text="other"))]
    message = "training set, row 3: the passage id 'p0' has another title or text than in training set, row 0"
    with pytest.raises(ValueError, match=message):
        prepared(tiny_model, tmp_path, KINDS[kind](rows))
    rows[3] = instance(PASSAGES[3], negatives=[dict(PASSAGES[0], text="other")])
    with pytest.raises(ValueError, match=message):
        prepared(tiny_model, tmp_path, KINDS[kind](rows))
    rows[3] = instance(dict(PASSAGES[0]))
    assert len(prepared(tiny_model, tmp_path, KINDS[kind](rows))) == 4


def test_two_contents_in_joined_files_name_both_files(tiny_model, tmp_path):
    files = []
    for name, text in (("first", "one"), ("second", "two")):
        path = tmp_path / f"{name}.jsonl"
        segments = f'[{{"text": "a", "passage": {{"id": 0, "text": "{text}"}}}}]'
        path.write_text(f'\n{{"input": "{name}?", "segments": {segments}}}\n')
        files.append(load_instances(path))
    message = "second.jsonl, line 2: the passage id '0' has another title or text than in .*first.jsonl, line 2"
    with pytest.raises(ValueError, match=message):
        CoSupTrainer(tiny_model, arguments(tmp_path), train_dataset=files[0] + files[1])
    CoSupTrainer(tiny_model, arguments(tmp_path), train_dataset=files[0], eval_dataset=files[1])  # two sets


def test_tokenized_datasets_are_checked_too(tiny_model, tmp_path):
    rows = prepared(tiny_model, tmp_path, [instance(PASSAGES[0])])
    rows += prepared(tiny_model, tmp_path, [instance(dict(PASSAGES[0], title="other"))])
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(ValueError, match="row 1: the passage id 'p0' has another .* than in training set, row 0"):
            prepared(tiny_model, tmp_path, dataset)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()  # found in the batch that has both
    trainer = CoSupTrainer(tiny_model, arguments(tmp_path, max_steps=1), train_dataset=stream)
    with pytest.raises(ValueError, match="the passage id 'p0' has another"):
        trainer.train()


def test_a_stream_remembers_a_limited_number_of_ids_and_still_finds_two_contents():
    """The contents of "a" are six ids apart, and four are remembered: one of the epochs finds them."""
    contents = PassageContents(most=4)
    ids = [str(i) for i in range(12)]
    epoch = [("a", "text"), *((id, "text") for id in ids[:6]), ("a", "other"), *((id, "text") for id in ids[6:])]
    with pytest.raises(ValueError, match="the passage id 'a' has another title or text than in row [07]"):
        for _ in range(100):
            for row, (id, text) in enumerate(epoch):
                contents.add(id, text, f"row {row}")
                assert len(contents._first) <= 4


def test_tokenized_passages_without_ids_do_not_share_one(tiny_model, tmp_path):
    rows = prepared(tiny_model, tmp_path, [instance(passage) for passage in PASSAGES[:4]])
    for row in rows:
        row["passage_ids"] = [None]
    assert len(prepared(tiny_model, tmp_path, rows)) == 4
    sampler = no_duplicates_sampler(datasets.Dataset.from_list(rows), arguments(tmp_path), batch_size=2)
    assert len(set.union(*sampler.passages)) == 4


def test_tokenized_rows_may_lack_negatives(tmp_path):
    row = {"input_ids": [1, 2], "labels": [1, 2], "passage_input_ids": [[5]], "passage_ids": ["a"]}
    negatives = {"negative_input_ids": [[6], [7]], "negative_ids": ["b", "c"]}
    rows = datasets.Dataset.from_list([row | negatives, row])  # Arrow fills the second with None
    sampler = no_duplicates_sampler(rows, arguments(tmp_path), batch_size=2)
    assert [len(passages) for passages in sampler.passages] == [6, 2]  # ids and contents


@pytest.mark.parametrize("kind", ["list", "dataset", "streamed dataset"])
@pytest.mark.parametrize("supervision", ["co", "ntp", "nsp", "separate"])
def test_a_set_without_a_passage(tiny_model, tmp_path, monkeypatch, warnings, kind, supervision):
    monkeypatch.setattr(dataset_setup, "PATIENCE", 4)
    num = 4 if kind == "streamed dataset" else 6
    first = "first " if kind == "streamed dataset" else ""
    message = f"None of the {num} {first}instances of the training set has a passage, so there is no [NSP]"
    dataset = KINDS[kind]([instance() for _ in range(6)])
    if supervision in ("nsp", "separate"):
        with pytest.raises(ValueError) as error:
            prepared(tiny_model, tmp_path, dataset, supervision=supervision)
        assert str(error.value) == f"{message}, which supervision={supervision!r} needs."
        return
    assert len(prepared(tiny_model, tmp_path, dataset, supervision=supervision)) == 6
    expected = [f"{message}: retrieval is neither trained nor measured."]
    assert warnings == (expected if supervision == "co" else [])


@pytest.mark.parametrize("supervision", ["co", "separate"])
def test_a_short_stream_without_a_passage_is_told_of_when_it_has_ended(tiny_model, tmp_path, warnings, supervision):
    if supervision == "separate":
        tiny_model = make_model(query_from="emb_seq")
    stream = KINDS["streamed dataset"]([instance() for _ in range(4)])
    args = arguments(tmp_path, supervision=supervision, per_device_train_batch_size=4, max_steps=1)
    trainer = CoSupTrainer(tiny_model, args, train_dataset=stream)
    message = "None of the 4 instances of the training set has a passage, so there is no [NSP]"
    if supervision == "separate":
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer.train()
        return
    trainer.train()
    assert warnings == [f"{message}: retrieval is neither trained nor measured."]


def test_one_passage_is_enough(tiny_model, tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(dataset_setup, "PATIENCE", 4)
    rows = [instance() for _ in range(4)] + [instance(PASSAGES[0])]
    prepared(tiny_model, tmp_path, rows, supervision="nsp")
    prepared(tiny_model, tmp_path, KINDS["streamed dataset"](rows[1:]), supervision="nsp")
    assert warnings == []
    rows[4]["input"] = "long " * 300  # dropped, so no passage is left
    with pytest.raises(ValueError, match="None of the 4 instances"):
        prepared(tiny_model, tmp_path, rows, supervision="nsp")
    assert PATIENCE > 4


def test_passages_that_were_cut_are_counted(tmp_path, warnings):
    model = make_model(max_passage_length=8)
    long = [dict(PASSAGES[i], title="", text="radium " * (20 + i)) for i in range(3)]
    short = {"id": "short", "text": "in"}
    rows = [
        instance(long[0], short),
        instance(short, negatives=[long[1], {"id": "in", "text": "of"}]),
        instance(long[2]),
        {**instance(long[2]), "input": "long " * 300},  # dropped, so its passages do not count
    ]
    tokenized = prepared(model, tmp_path, rows)
    assert "num_cut_passages" not in tokenized[0]
    expected = ["Dropped 1 of 4", "Cut 3 of 6 passages of the training set to max_passage_length=8 tokens."]
    assert [message.startswith(start) for message, start in zip(warnings, expected, strict=True)] == [True, True]
    warnings.clear()
    prepared(model, tmp_path, datasets.Dataset.from_list(rows[:3]).to_iterable_dataset())
    counts = ["Cut 1 passage(s)", "Cut 2 passage(s)"]  # of 1, 2 and 3: the powers of two
    assert [message.partition(" of ")[0] for message in warnings] == counts
    assert warnings[1].endswith("so far to max_passage_length=8 tokens.")
    warnings.clear()
    prepared(model, tmp_path, [instance(short)])
    assert warnings == []


def test_a_checked_instance_remembers_its_place():
    assert check_instance(instance(PASSAGES[0]), "a.jsonl, line 3").where == "a.jsonl, line 3"


def test_columns_that_begin_empty_have_their_type(tiny_model, tmp_path):
    """Arrow would take the type of the first 1,000 rows, and refuse the text that later ones hold."""
    tokenizers = tiny_model.tokenizer, tiny_model.emb_seq_tokenizer
    args = arguments(tmp_path, supervision="attention_distillation")
    tokenized = tokenize_dataset([instance(PASSAGES[0])], tokenizers, tiny_model.config, args, "training set")
    row = tokenized[0]
    for name in ("positive_ids", "negative_ids", "negative_input_ids", "answers", "provenance", "candidate_pool"):
        assert row[name] in ([], [[]])
        assert "null" not in str(tokenized.features[name]), name


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_instances_with_and_without_a_passage_share_a_set(tiny_model, tmp_path, kind):
    rows = [instance(PASSAGES[0]), {"input": "q?", "answers": ["radium", "no"], "provenance": [["p0"]]}, instance()]
    prepared_rows = prepared(tiny_model, tmp_path, KINDS[kind](rows), supervision="attention_distillation")
    assert [row["needs_candidates"] for row in prepared_rows] == [False, True, True]
    assert [row["passage_ids"] for row in prepared_rows] == [["p0"], [], []]
    assert [row["answers"] for row in prepared_rows] == [[], ["radium"], []]  # a verdict is looked for in no passage
    assert prepared_rows[1]["provenance"] == [["p0"]]
    config = tiny_model.config
    ids, labels = prepared_rows[1]["input_ids"], prepared_rows[1]["labels"]
    column = ids.index(config.nsp_token_id)
    assert ids[column + 1] == config.cs_token_id and ids[-2] == config.ce_token_id
    assert [i for i, label in enumerate(labels) if label != -100] == [column, *range(column + 2, len(ids))]
    assert tiny_model.tokenizer.decode(ids[column + 2 : -2]) == "radium"
