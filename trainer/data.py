"""Read files into checked instances, passages and questions."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_cosup.lines_cosup import lines_with_places
from modeling_cosup.names_cosup import nearest_name, refuse_misspelt
from modeling_cosup.passages_cosup import (
    check_id,
    check_text,
    check_title_and_text,
    checked_passages,
    read_corpus,
    shown,
)

from .passage_contents import PassageContents

# Fields whose misspelt names are refused. A misspelt `id` does no harm: the place then becomes the id.
QUESTION_FIELDS = ("dataset", "instruction", "input")
TRAINING_FIELDS = (*QUESTION_FIELDS, "segments", "answers", "provenance", "candidates")
EVALUATION_FIELDS = (*QUESTION_FIELDS, "answers", "provenance", "candidates", "meta")
SEGMENT_FIELDS = ("text", "passage", "negatives", "positives")  # of a segment, which has no others

# ---------------------------------------------------------------------- training instances


def read_rows(source: str | Path, split: str = "train") -> Iterator[tuple[str, Any]]:
    """
    Yield the unchecked rows of a file or dataset.

    Args:
        source (`str` or `Path`): a JSON Lines file, or the name of a dataset (on the Hub, or a folder) for
            `datasets.load_dataset`.
        split (`str`, *optional*, defaults to `"train"`): of a named dataset.

    Yields:
        `(str, dict)`: where the row is, for errors, and the row.
    """
    if str(source).endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) or Path(source).is_file():
        yield from lines_with_places(source)
        return
    from datasets import load_dataset

    for row, value in enumerate(load_dataset(str(source), split=split)):
        yield f"{source} ({split}), row {row}", value


def load_instances(source: str | Path, split: str = "train") -> list["CheckedInstance"]:
    """
    Load training instances from a JSON Lines file or a named dataset, checked; see [`check_instance`].

    Raises:
        `ValueError`: for an invalid instance, or a passage id with two contents, naming the places.
    """
    instances: list[CheckedInstance] = []
    contents = PassageContents()
    for where, value in read_rows(source, split):
        instance = check_instance(value, where)
        contents.add_instance(instance, where)
        instances.append(instance)
    if not instances:
        raise ValueError(f"{source}: holds no instance.")
    return instances


class CheckedInstance(dict):
    """
    A training instance that has been checked: [`check_instance`] returns it without a second check.

    A changed copy is a plain `dict` and is checked again. Changes made in place are not checked.

    Args:
        instance (`dict`): with all its fields.
        where (`str`): file and line, or row.
    """

    def __init__(self, instance: Mapping[str, Any], where: str) -> None:
        super().__init__(instance)
        self.where = where


def check_instance(instance: Mapping[str, Any], where: str) -> CheckedInstance:
    """
    Check a training instance, fill in `instruction`, and drop further fields of the instance and of its passages.

    Args:
        instance (`dict`): `{"id", "dataset", "instruction", "input", "segments": [{"text", "passage": {"id", "title",
            "text"} | None}]}`. `id`, `dataset`, `instruction`, and a passage's `id` and `title` may be missing. A
            segment with a passage may also have `"negatives"`, passages that look right but are not, and
            `"positives"`, ids of further passages that would have been right; it has no other fields. An instance
            whose passage is unknown has no segment with one. It may have `"answers"` in place of segments, of which
            the first is trained; `"provenance"`, sets of passage ids, for figures alone; and `"candidates"`, passages
            or their ids, among which `candidates_from="instance"` searches. Ids are strings or integers, see
            [`~modeling_cosup.passages_cosup.check_id`].
        where (`str`): file and line, or row, for the error.

    Returns:
        [`CheckedInstance`]; `segments` is empty if there are answers alone, and fields that were left out stay out.

    Raises:
        `ValueError`: names the place, the field, what was found and what was expected; also for an unknown field of a
            segment, and for a field of an instance or passage that is missing while another has nearly its name.
    """
    if isinstance(instance, CheckedInstance):
        return instance
    if not isinstance(instance, Mapping):
        raise ValueError(f"{where} is {shown(instance)}, expected an object with input and segments.")
    refuse_misspelt(instance, TRAINING_FIELDS, where)
    answers = _checked_answers(instance.get("answers"), where)
    segments = instance.get("segments")
    if answers and not segments:
        segments = []
    elif not isinstance(segments, list) or not segments:
        raise ValueError(
            f"{where}: segments is {shown(segments)}, expected a list of at least one segment; or else answers, a list"
            " of at least one string."
        )
    checked_segments = [_check_segment(segment, f"segments[{i}]", where) for i, segment in enumerate(segments)]
    checked: dict[str, Any] = {**_check_question(instance, where), "segments": checked_segments}
    if answers:
        checked["answers"] = answers
    if instance.get("provenance"):
        checked["provenance"] = _checked_provenance(instance["provenance"], where)
    if instance.get("candidates"):
        checked["candidates"] = checked_candidates(instance["candidates"], where)
    return CheckedInstance(checked, where)


def has_passage(instance: Mapping[str, Any]) -> bool:
    """Return whether a checked instance has a segment with a passage; the passage of any other is unknown."""
    return any(segment["passage"] is not None for segment in instance["segments"])


def _checked_answers(answers: Any, where: str) -> list[str]:
    """Return checked answers of a training instance; an empty list if there are none."""
    if answers is None:
        return []
    if not isinstance(answers, list):
        raise ValueError(f"{where}: answers is {shown(answers)}, expected a list of strings.")
    return [check_text(answer, f"answers[{i}]", where) for i, answer in enumerate(answers)]


def checked_candidates(candidates: Any, where: str) -> list[dict[str, str] | str]:
    """Return candidates as passages, or as ids of passages."""
    if not isinstance(candidates, list):
        raise ValueError(f"{where}: candidates is {shown(candidates)}, expected a list of passages or their ids.")
    checked: list[dict[str, str] | str] = []
    for i, candidate in enumerate(candidates):
        if isinstance(candidate, dict):
            checked.append(check_passage(candidate, where, f"candidates[{i}]."))
        else:
            checked.append(check_id(candidate, where, f"candidates[{i}]"))
    return checked


def candidate_ids(instance: Mapping[str, Any]) -> list[str]:
    """Return the ids of a checked instance's own candidates."""
    candidates = instance.get("candidates") or []
    return [candidate if isinstance(candidate, str) else candidate["id"] for candidate in candidates]


def _check_segment(segment: Any, name: str, where: str) -> dict:
    """Return a checked segment with all its fields; `name` is its place in the instance."""
    if not isinstance(segment, dict):
        raise ValueError(f"{where}: {name} is {shown(segment)}, expected an object with text and passage.")
    _refuse_unknown(segment, name, where)
    if "passage" not in segment:
        raise ValueError(f"{where}: {name} has no passage, expected one; null for free text.")
    passage = segment["passage"]
    if passage is not None and not isinstance(passage, dict):
        raise ValueError(f"{where}: {name}.passage is {shown(passage)}, expected an object or null.")
    negatives = segment.get("negatives") or []
    if not isinstance(negatives, list) or not all(isinstance(negative, dict) for negative in negatives):
        raise ValueError(f"{where}: {name}.negatives is {shown(negatives)}, expected a list of passages.")
    positives = _checked_ids(segment.get("positives") or [], f"{name}.positives", where)
    if passage is None and (negatives or positives):
        raise ValueError(
            f"{where}: {name} has negatives or positives but no passage, so there is no [NSP] that they belong to."
        )
    text = check_text(segment.get("text"), f"{name}.text", where)
    if passage is not None:
        passage = check_passage(passage, where, f"{name}.passage.")
    checked_negatives = []
    for i, negative in enumerate(negatives):
        checked_negatives.append(check_passage(negative, where, f"{name}.negatives[{i}]."))
    return {"text": text, "passage": passage, "negatives": checked_negatives, "positives": positives}


def _refuse_unknown(segment: dict, name: str, where: str) -> None:
    """Raise for a field that a segment does not have; Arrow fills in `None` for fields of other rows."""
    for key, value in segment.items():
        if key in SEGMENT_FIELDS or value is None:
            continue
        nearest = nearest_name(str(key), SEGMENT_FIELDS)
        hint = f"; did you mean {nearest!r}?" if nearest else "."
        expected = ", ".join(SEGMENT_FIELDS)
        raise ValueError(f"{where}: {name} has the unknown key {key!r}, expected some of {expected}{hint}")


def check_passage(passage: dict, where: str, field: str = "") -> dict[str, str]:
    """Return a passage as `{"id", "title", "text"}`; a missing title is empty, a missing id is its [`content_id`]."""
    refuse_misspelt(passage, ("id",), where, field)
    checked = check_title_and_text(passage, where, field)
    if passage.get("id") is None:
        return {"id": content_id(**checked), **checked}
    return {"id": check_id(passage["id"], where, f"{field}id"), **checked}


def content_id(title: str, text: str) -> str:
    """Return the id of a passage that has none: the first 16 hex digits of `sha1(title + "\\n" + text)`."""
    return hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:16]


def _check_question(value: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return, checked, the fields that training and evaluation instances share."""
    id = value.get("id")
    instruction = value.get("instruction")
    if instruction is None:
        instruction = ""
    return {
        "id": where if id is None else check_id(id, where),
        "dataset": str(value.get("dataset") or ""),
        "instruction": check_text(instruction, "instruction", where, may_be_empty=True),
        "input": check_text(value.get("input"), "input", where),
    }


def _checked_ids(ids: object, field: str, where: str) -> list[str]:
    """Return a list of passage ids as strings, see [`~modeling_cosup.passages_cosup.check_id`]."""
    if not isinstance(ids, list):
        raise ValueError(f"{where}: {field} is {shown(ids)}, expected a list of passage ids.")
    return [check_id(id, where, f"an id in {field}") for id in ids]


def _checked_provenance(provenance: Any, where: str) -> list[list[str]]:
    """Return sets of passage ids, each of which is enough evidence."""
    if not isinstance(provenance, list) or not all(isinstance(ids, list) and ids for ids in provenance):
        raise ValueError(f"{where}: provenance is {shown(provenance)}, expected a list of lists of passage ids.")
    return [_checked_ids(ids, f"provenance[{i}]", where) for i, ids in enumerate(provenance)]


# ---------------------------------------------------------------------- corpora and evaluation sets


def load_corpus(source: str | Path, split: str = "train", contents: PassageContents | None = None) -> list[dict]:
    """
    Load a corpus, `list[{"id", "title", "text"}]`, from a JSON Lines or Parquet file or a named dataset, checked.

    Args:
        source (`str` or `Path`): JSON Lines or Parquet file, or name of a dataset.
        split (`str`, *optional*, defaults to `"train"`): of a named dataset.
        contents ([`PassageContents`], *optional*): of other passages that are used together with this corpus.

    Raises:
        `ValueError`: for a missing or empty field, a duplicate id, or an id with another content in `contents`,
            naming file and line.
    """
    passages = []
    places: dict[str, str] = {}
    rows = read_corpus(source) if Path(source).suffix.lower() == ".parquet" else read_rows(source, split)
    for where, passage in checked_passages(rows):
        id = passage["id"]
        if id in places:
            raise ValueError(f"{where}: id {id!r} is already in {places[id]}; ids must be unique.")
        places[id] = where
        if contents is not None:
            contents.add(id, (passage["title"], passage["text"]), where)
        passages.append(passage)
    if not passages:
        raise ValueError(f"{source}: the corpus holds no passage.")
    return passages


def load_evaluation_set(
    source: str | Path, split: str = "test", corpus: Sequence[dict] | None = None, answers_required: bool = True
) -> list[dict]:
    """
    Load evaluation instances, checked.

    An instance is `{"id", "dataset", "instruction", "input", "answers", "provenance", "candidates", "meta"}`.
    `candidates` may be missing, and so may `meta`, an object with anything else that a metric needs: the `qa_pairs`,
    `claims` and `answers` of ALCE, `provenance_unknown`, `long_answers` and `nouns`. If `provenance` is missing, it is
    unknown; an empty list says that a question needs no passage. Further fields are dropped. Ids are strings or
    integers, see [`~modeling_cosup.passages_cosup.check_id`]. A question without one has its place: `"line 3"` of a
    file, `"row 3"` of a dataset.

    Args:
        source (`str` or `Path`): JSON Lines file or name of a dataset.
        split (`str`, *optional*, defaults to `"test"`): of a named dataset.
        corpus (`list[dict]`, *optional*): if given, every id in `provenance` and `candidates` must be in it.
        answers_required (`bool`, *optional*, defaults to `True`): whether an empty list of answers is an error.
            Retrieval alone can be judged without answers.

    Raises:
        `ValueError`: for a missing or misspelt field, an empty answer, or an id that the corpus lacks, naming file and
            line.
    """
    known_ids = None if corpus is None else {passage["id"] for passage in corpus}
    instances = []
    for where, value in read_rows(source, split):
        instance = _check_evaluation_instance(value, where, answers_required)
        if known_ids is not None:
            evidence_ids = [id for evidence in instance["provenance"] for id in evidence]
            _check_known(evidence_ids, "provenance", known_ids, where)
            _check_known(instance["candidates"], "candidates", known_ids, where)
        instances.append(instance)
    if not instances:
        raise ValueError(f"{source}: the evaluation set holds no instance.")
    return instances


def _check_evaluation_instance(value: Mapping[str, Any], where: str, answers_required: bool) -> dict:
    """Return a checked evaluation instance with all its fields."""
    refuse_misspelt(value, EVALUATION_FIELDS, where)
    question = _check_question(value, where)
    answers = value.get("answers")
    candidates = value.get("candidates")
    if candidates is None:
        candidates = []
    meta = value.get("meta")
    if meta is None:
        meta = {}
    if value.get("id") is None:
        question["id"] = where.rpartition(", ")[2]  # not the file: answers are matched by id, wherever it was read
    if not isinstance(answers, list) or (answers_required and not answers):
        expected = "at least one string" if answers_required else "strings"
        raise ValueError(f"{where}: answers is {shown(answers)}, expected a list of {expected}.")
    if not isinstance(meta, dict):
        raise ValueError(f"{where}: meta is {shown(meta)}, expected an object.")
    provenance = value.get("provenance")
    if provenance is None:
        provenance = []
        meta = {**meta, "provenance_unknown": True}
    return {
        **question,
        "answers": [check_text(answer, f"answers[{i}]", where) for i, answer in enumerate(answers)],
        "provenance": _checked_provenance(provenance, where),
        "candidates": _checked_ids(candidates, "candidates", where),
        "meta": meta,
    }


def _check_known(ids: Sequence[str], field: str, known_ids: set[str], where: str) -> None:
    """Raise if the corpus, whose passage ids are `known_ids`, lacks one of `ids`."""
    missing = [id for id in ids if id not in known_ids]
    if missing:
        raise ValueError(f"{where}: {field} holds {missing[0]!r}, which the corpus lacks ({len(missing)} such ids).")
