"""Tasks as a user lists them, and their pools."""

import pytest

from support.evaluation_world import CORPUS, question
from trainer.judging.tasks import Task, read_tasks


def test_pools():
    about_p4 = question(0, CORPUS[4])
    assert Task("t", "eval.jsonl", pool="2")._pool(about_p4) == ["p4", "p0"]
    assert Task("t", "eval.jsonl", pool=2, gold_in_pool=False)._pool(about_p4) == ["p0", "p1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "some"}, "pool is 'some'"),
        ({"pool": 0}, "pool is 0"),
        ({"split": "train"}, "split is 'train'"),
        ({"metric": "bleu"}, "metric is 'bleu'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"top_k": 0}, "top_k is 0"),
        (
            {"corpus_file": "c.jsonl", "index": "i"},
            "names a corpus_file, c.jsonl, and an index, i, .*: give one of them",
        ),
    ],
)
def test_bad_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "t", "eval_file": "x", **fields})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a", "eval_file": "x"}, {"name": "b", "evalfile": "x"}], "Task 2: unknown field 'evalfile'"),
        ([{"name": "a"}], "Task 1 has no eval_file"),
        ([{"name": "a", "eval_file": "x"}] * 2, "1 names of tasks occur twice: a"),
    ],
)
def test_bad_lists_of_tasks_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        read_tasks(entries)


def test_defaults_apply_to_entries_that_leave_a_field_out():
    entries = [{"name": "a", "eval_file": "x"}, {"name": "b", "eval_file": "x", "pool": "full"}]
    with_default, with_its_own = read_tasks(entries, pool=20, top_k=None)
    assert (with_default.pool, with_default.top_k) == (20, 1)
    assert with_its_own.pool == "full"


def test_an_entry_with_a_corpus_gets_no_default_index_nor_the_other_way_round():
    entries = [{"name": "a", "eval_file": "x", "corpus_file": "own"}, {"name": "b", "eval_file": "x"}]
    with_corpus, with_default = read_tasks(entries, index="wiki", index_uri="http://host:19530")
    assert (with_corpus.corpus_file, with_corpus.index, with_corpus.index_uri) == ("own", None, None)
    assert (with_default.index, with_default.index_uri) == ("wiki", "http://host:19530")
    (with_index,) = read_tasks([{"name": "c", "eval_file": "x", "index": "own"}], corpus_file="default")
    assert (with_index.corpus_file, with_index.index) == (None, "own")
