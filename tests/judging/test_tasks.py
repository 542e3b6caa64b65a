"""Tasks as a user lists them, and their pools."""

import pytest

from support.evaluation_world import CORPUS, question
from trainer.judging.tasks import Task, read_tasks


def test_pools():
    task = Task("t", "eval.jsonl", pool="2")
    x = question(0, CORPUS[4])
    assert task._pool(x) == ["p4", "p0"]
    assert Task("t", "eval.jsonl", pool=2, gold_in_pool=False)._pool(x) == ["p0", "p1"]


def test_bad_tasks_are_refused():
    for fields, message in [
        ({"pool": "some"}, "pool is 'some'"),
        ({"pool": 0}, "pool is 0"),
        ({"split": "train"}, "split is 'train'"),
        ({"metric": "bleu"}, "metric is 'bleu'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"top_k": 0}, "top_k is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Task(**{"name": "t", "eval_file": "x", **fields})
    with pytest.raises(ValueError, match="Task 2: unknown field 'evalfile'"):
        read_tasks([{"name": "a", "eval_file": "x"}, {"name": "b", "evalfile": "x"}])
    with pytest.raises(ValueError, match="Task 1 has no eval_file"):
        read_tasks([{"name": "a"}])
    with pytest.raises(ValueError, match="1 names of tasks occur twice: a"):
        read_tasks([{"name": "a", "eval_file": "x"}] * 2)
    assert (
        read_tasks(
            [{"name": "a", "eval_file": "x"}, {"name": "b", "eval_file": "x", "pool": "full"}], pool=20, top_k=None
        )[0].pool
        == 20
    )
