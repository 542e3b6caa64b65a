"""Splitting a corpus into the text of a memory and held-out text."""

import json
from argparse import Namespace

import pytest
from prepare_memory_text import prepare


def corpus():
    sizes = {"Rivers": 20, "Bridges": 12, "Owls": 10, "Tea": 5, "": 4}
    for title, size in sizes.items():
        yield from ({"id": f"{title}{i}", "title": title, "text": f"{title} {i}"} for i in range(size))


def split(tmp_path, **changes):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in corpus()))
    options = {"corpus_file": str(path), "output_dir": str(tmp_path / "text"), "num_topics": 2}
    args = Namespace(**{**options, "held_out_share": 0.1, "seed": 0, **changes})
    counts = prepare(args)
    files = {}
    for name in counts:
        lines = (tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()
        files[name] = [json.loads(line) for line in lines]
    assert counts == {name: len(passages) for name, passages in files.items()}
    return files


def test_no_passage_is_in_two_files_and_topics_are_kept_apart(tmp_path):
    files = split(tmp_path)
    ids = [passage["id"] for passages in files.values() for passage in passages]
    assert len(ids) == len(set(ids))
    assert {name: len(passages) for name, passages in files.items()} == {"store": 26, "fit": 3, "same": 3, "other": 3}
    for name in ("store", "fit", "same"):
        assert {passage["title"] for passage in files[name]} == {"Rivers", "Bridges"}
    assert {passage["title"] for passage in files["other"]} <= {"Owls", "Tea"}


def test_the_seed_chooses_the_held_out_passages(tmp_path):
    first = split(tmp_path)
    assert split(tmp_path) == first
    assert split(tmp_path, seed=1)["same"] != first["same"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_share": 0.5}, "held_out_share is 0.5, expected more than 0 and less than 0.5"),
        ({"num_topics": 4}, "num_topics is 4, expected 1 to 3"),
        ({"held_out_share": 0.01}, "the largest has 20"),
    ],
)
def test_bad_options_are_errors_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        split(tmp_path, **changes)
    assert not (tmp_path / "text").exists()
