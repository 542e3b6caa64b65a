"""Read files into checked instances, and instances into token ids, labels and passages."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # recipes that prepare data need neither tokenizers nor the model, which take seconds to import
    from transformers import PreTrainedTokenizerBase

    from modeling_cosup import CoSupConfig

# Fields whose misspelt names are refused. A misspelt `id` does no harm: the place then becomes the id.
QUESTION_FIELDS = ("dataset", "instruction", "input")
TRAINING_FIELDS = (*QUESTION_FIELDS, "segments")
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
            `"positives"`, ids of further passages that would have been right; it has no other fields. Ids are strings
            or integers, see [`~modeling_cosup.passages_cosup.check_id`].
        where (`str`): file and line, or row, for the error.

    Returns:
        [`CheckedInstance`].

    Raises:
        `ValueError`: names the place, the field, what was found and what was expected; also for an unknown field of a
            segment, and for a field of an instance or passage that is missing while another has nearly its name.
    """
    if isinstance(instance, CheckedInstance):
        return instance
    if not isinstance(instance, Mapping):
        raise ValueError(f"{where} is {shown(instance)}, expected an object with input and segments.")
    refuse_misspelt(instance, TRAINING_FIELDS, where)
    segments = instance.get("segments")
    if not isinstance(segments, list) or not segments:
        raise ValueError(f"{where}: segments is {shown(segments)}, expected a list of at least one segment.")
    checked_segments = [_check_segment(segment, f"segments[{i}]", where) for i, segment in enumerate(segments)]
    return CheckedInstance({**_check_question(instance, where), "segments": checked_segments}, where)


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
    rows = read_corpus(source) if str(source).endswith(".parquet") else read_rows(source, split)
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
    `candidates` may be missing, and so may `meta`, an object with anything else that a metric needs, such as the
    `qa_pairs` and `claims` of ALCE. Further fields are dropped. Ids are strings or integers, see
    [`~modeling_cosup.passages_cosup.check_id`].

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
    provenance = value.get("provenance")
    candidates = value.get("candidates")
    if candidates is None:
        candidates = []
    meta = value.get("meta")
    if meta is None:
        meta = {}
    if not isinstance(answers, list) or (answers_required and not answers):
        expected = "at least one string" if answers_required else "strings"
        raise ValueError(f"{where}: answers is {shown(answers)}, expected a list of {expected}.")
    if not isinstance(provenance, list) or not all(isinstance(ids, list) and ids for ids in provenance):
        raise ValueError(f"{where}: provenance is {shown(provenance)}, expected a list of lists of passage ids.")
    if not isinstance(meta, dict):
        raise ValueError(f"{where}: meta is {shown(meta)}, expected an object.")
    return {
        **question,
        "answers": [check_text(answer, f"answers[{i}]", where) for i, answer in enumerate(answers)],
        "provenance": [_checked_ids(ids, f"provenance[{i}]", where) for i, ids in enumerate(provenance)],
        "candidates": _checked_ids(candidates, "candidates", where),
        "meta": meta,
    }


def _check_known(ids: Sequence[str], field: str, known_ids: set[str], where: str) -> None:
    """Raise if the corpus, whose passage ids are `known_ids`, lacks one of `ids`."""
    missing = [id for id in ids if id not in known_ids]
    if missing:
        raise ValueError(f"{where}: {field} holds {missing[0]!r}, which the corpus lacks ({len(missing)} such ids).")


# ---------------------------------------------------------------------- tokenizing


def tokenize_instance(
    instance: dict,
    tokenizer: "PreTrainedTokenizerBase",
    emb_seq_tokenizer: "PreTrainedTokenizerBase",
    config: "CoSupConfig",
    train_on_passages: bool = False,
    end_of_turn_id: int | None = None,
) -> dict[str, Any]:
    """
    Return the token ids, labels and passages of an instance.

    The prompt comes first. Then each segment: `[NSP]` passage `[Cs]` text `[CE]`, or its text alone. Then the end of
    turn. `[NSP]`, text, `[CE]` and the end of turn are trained. The prompt, passages and `[Cs]` have label -100
    (`train_on_passages` turns passages on).

    Args:
        instance (`dict`): as [`check_instance`] returns it.
        tokenizer, emb_seq_tokenizer (`PreTrainedTokenizerBase`): Gen's and Emb_seq's.
        config (`CoSupConfig`): control token ids, passage template and passage length.
        train_on_passages (`bool`, *optional*, defaults to `False`): also train passage tokens.
        end_of_turn_id (`int`, *optional*): the token that ends the response; by default that of the chat template.

    Returns:
        `dict`:

        - `id`
        - `input_ids` and `labels` (`list[int]`, equally long)
        - for each `[NSP]` an entry of `passage_input_ids` (what Emb_seq reads), `passage_ids` and `positive_ids` (ids
          of further passages that would have been right)
        - `negative_input_ids` and `negative_ids`, of hard negatives
        - `num_cut_passages`, passages and hard negatives of which Gen or Emb_seq reads only the beginning
        - if an encoder makes the queries, `query_input_ids`: what it reads for each `[NSP]`
        - with these, `num_cut_queries`: how many were too long and lost their beginning

    Raises:
        `ValueError`: if a text holds a special token that the tokenizer cannot read as text.
    """
    from modeling_cosup.tokenization_cosup import (
        encode_passages_for_emb_seq,
        encode_passages_for_gen,
        encode_prompt,
        encode_queries_for_emb_seq,
        encode_texts,
        end_of_turn_token_id,
    )

    segments = instance["segments"]
    retrieving = [segment for segment in segments if segment["passage"] is not None]
    passages = [segment["passage"] for segment in retrieving]
    negatives: list[dict] = []
    for segment in retrieving:
        negatives += segment.get("negatives") or []

    nsp, cs, ce = config.nsp_token_id, config.cs_token_id, config.ce_token_id
    assert nsp is not None and cs is not None and ce is not None  # set when Gen and Emb_seq were put together
    cut_passages: set[int] = set()  # their numbers
    cut_negatives: set[int] = set()
    gen_passages = iter(encode_passages_for_gen(tokenizer, passages, config, cut_passages))
    names = [f"Instance {instance['id']!r}, segments[{i}].text" for i in range(len(segments))]
    texts = encode_texts(tokenizer, [segment["text"] for segment in segments], names)
    try:
        input_ids = list(encode_prompt(tokenizer, instance["input"], instance["instruction"]))
    except ValueError as error:
        raise ValueError(f"Instance {instance['id']!r}: {error}") from error
    labels = [-100] * len(input_ids)
    queries = []  # everything up to and including each [NSP]
    for segment, text in zip(segments, texts, strict=True):
        if segment["passage"] is None:
            input_ids += text
            labels += text
            continue
        passage = next(gen_passages)
        passage_labels = passage if train_on_passages else [-100] * len(passage)
        queries.append([*input_ids, nsp])
        input_ids += [nsp, *passage, cs, *text, ce]
        labels += [nsp, *passage_labels, -100, *text, ce]
    if end_of_turn_id is None:
        end_of_turn_id = end_of_turn_token_id(tokenizer)

    tokenized = {
        "id": instance["id"],
        "input_ids": [*input_ids, end_of_turn_id],
        "labels": [*labels, end_of_turn_id],
        "passage_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, passages, config, cut_passages),
        "passage_ids": [passage["id"] for passage in passages],
        "positive_ids": [list(segment.get("positives") or []) for segment in retrieving],
        "negative_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, negatives, config, cut_negatives),
        "negative_ids": [negative["id"] for negative in negatives],
        "num_cut_passages": len(cut_passages) + len(cut_negatives),
    }
    if config.query_from != "gen":
        query_input_ids, num_cut = encode_queries_for_emb_seq(tokenizer, emb_seq_tokenizer, queries, config)
        tokenized.update(query_input_ids=query_input_ids, num_cut_queries=num_cut)
    return tokenized
