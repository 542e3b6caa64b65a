"""Splitting a corpus into the text of a memory and held-out text."""

import contextlib
import json
from argparse import Namespace

import pytest
from prepare_memory_text import prepare

from modeling_cosup.lines_cosup import read_lines, writing_lines

REPEATED = "left out: the text of another passage"


def corpus():
    sizes = {"Rivers": 20, "Bridges": 12, "Owls": 10, "Tea": 5, "": 4}
    for title, size in sizes.items():
        yield from ({"id": f"{title}{i}", "title": title, "text": f"{title} {i}"} for i in range(size))


def split(tmp_path, passages=None, **changes):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages or corpus()))
    options = {"corpus_file": str(path), "output_dir": str(tmp_path / "text"), "num_topics": 2}
    args = Namespace(**{**options, "held_out_share": 0.1, "seed": 0, **changes})
    counts = prepare(args)
    files = {path.stem: read_lines(path) for path in (tmp_path / "text").iterdir()}
    num_repeated = counts.pop(REPEATED)
    assert counts == {f"{name}.jsonl": len(passages) for name, passages in files.items()}
    assert num_repeated == len(passages or []) // 2
    return files


def test_no_passage_is_in_two_files_and_topics_are_kept_apart(tmp_path):
    files = split(tmp_path)
    ids = [passage["id"] for passages in files.values() for passage in passages]
    assert len(ids) == len(set(ids))
    assert {name: len(passages) for name, passages in files.items()} == {"store": 26, "fit": 3, "same": 3, "other": 3}
    for name in ("store", "fit", "same"):
        assert {passage["title"] for passage in files[name]} == {"Rivers", "Bridges"}
    assert {passage["title"] for passage in files["other"]} <= {"Owls", "Tea"}


def test_a_text_that_the_corpus_repeats_is_in_one_file_once(tmp_path):
    """Under another id or another title it is the same text to a memory."""
    again = [{**passage, "id": f"again{passage['id']}"} for passage in corpus()]
    again[0]["title"] = "Tea"
    titled = [passage for passage in [*corpus(), *again] if passage["title"]]
    assert split(tmp_path, titled) == split(tmp_path)


def test_an_interrupted_run_leaves_the_files_of_the_run_before(tmp_path, monkeypatch):
    before = split(tmp_path)
    monkeypatch.setattr("prepare_memory_text.writing_lines", failing_at("other.jsonl"))
    with pytest.raises(OSError, match="no space left"):
        split(tmp_path, seed=1)
    assert {path.stem: read_lines(path) for path in (tmp_path / "text").iterdir()} == before


def failing_at(name):
    """Return a `writing_lines` that cannot write the file with a name."""

    @contextlib.contextmanager
    def writing(path):
        with writing_lines(path) as write:
            yield write
            if path.name == name:
                raise OSError("no space left")

    return writing


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


def test_an_id_that_occurs_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="corpus.jsonl, line 48: the id 'Rivers0' is already in the corpus"):
        split(tmp_path, [*corpus(), *corpus()][:47] + [next(corpus())])
