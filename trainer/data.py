"""Read files into checked instances, and instances into token ids, labels and passages."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_cosup.lines_cosup import lines_with_places
from modeling_cosup.passages_cosup import check_text, check_title_and_text, checked_passages, read_corpus

if TYPE_CHECKING:  # recipes that prepare data need neither tokenizers nor the model, which take seconds to import
    from transformers import PreTrainedTokenizerBase

    from modeling_cosup import CoSupConfig

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


def load_instances(source: str | Path, split: str = "train") -> list[dict]:
    """Load training instances from a JSON Lines file or a named dataset, checked; see [`check_instance`]."""
    instances: list[dict] = [check_instance(value, where) for where, value in read_rows(source, split)]
    if not instances:
        raise ValueError(f"{source}: holds no instance.")
    return instances


class CheckedInstance(dict):
    """
    A training instance that has been checked: [`check_instance`] returns it without a second check.

    A changed copy is a plain `dict` and is checked again. Changes made in place are not checked.
    """


def check_instance(instance: dict, where: str) -> CheckedInstance:
    """
    Check a training instance, fill in `instruction`, and drop unknown fields.

    Args:
        instance (`dict`): `{"id", "dataset", "instruction", "input", "segments": [{"text", "passage": {"id", "title",
            "text"} | None}]}`. `id`, `dataset`, `instruction` and a passage's `title` may be missing. A segment with a
            passage may also have `"negatives"`, passages that look right but are not, and `"positives"`, ids of
            further passages that would have been right.
        where (`str`): file and line, or row, for the error.

    Returns:
        [`CheckedInstance`].

    Raises:
        `ValueError`: names the place, the field, what was found and what was expected.
    """
    if isinstance(instance, CheckedInstance):
        return instance
    segments = instance.get("segments")
    if not isinstance(segments, list) or not segments:
        raise ValueError(f"{where}: segments is {segments!r}, expected a list of at least one segment.")
    checked_segments = [_check_segment(segment, f"segments[{i}]", where) for i, segment in enumerate(segments)]
    return CheckedInstance({**_check_question(instance, where), "segments": checked_segments})


def _check_segment(segment: Any, name: str, where: str) -> dict:
    """Return a checked segment with all its fields; `name` is its place in the instance."""
    if not isinstance(segment, dict):
        raise ValueError(f"{where}: {name} is {segment!r}, expected an object with text and passage.")
    passage = segment.get("passage")
    if passage is not None and not isinstance(passage, dict):
        raise ValueError(f"{where}: {name}.passage is {passage!r}, expected an object or null.")
    negatives = segment.get("negatives") or []
    positives = segment.get("positives") or []
    if not isinstance(negatives, list) or not all(isinstance(negative, dict) for negative in negatives):
        raise ValueError(f"{where}: {name}.negatives is {negatives!r}, expected a list of passages.")
    if not _are_strings(positives):
        raise ValueError(f"{where}: {name}.positives is {positives!r}, expected a list of passage ids.")
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


def check_passage(passage: dict, where: str, field: str = "") -> dict[str, str]:
    """Return a passage as `{"id", "title", "text"}`; a missing title is empty, a missing id is its [`content_id`]."""
    checked = check_title_and_text(passage, where, field)
    if passage.get("id") is None:
        return {"id": content_id(**checked), **checked}
    return {"id": str(passage["id"]), **checked}


def content_id(title: str, text: str) -> str:
    """Return the id of a passage that has none: the first 16 hex digits of `sha1(title + "\\n" + text)`."""
    return hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:16]


def _check_question(value: dict, where: str) -> dict[str, str]:
    """Return, checked, the fields that training and evaluation instances share."""
    id = value.get("id")
    instruction = value.get("instruction")
    if instruction is None:
        instruction = ""
    return {
        "id": where if id is None else str(id),
        "dataset": str(value.get("dataset") or ""),
        "instruction": check_text(instruction, "instruction", where, may_be_empty=True),
        "input": check_text(value.get("input"), "input", where),
    }


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


# ---------------------------------------------------------------------- corpora and evaluation sets


def load_corpus(source: str | Path, split: str = "train") -> list[dict]:
    """
    Load a corpus, `list[{"id", "title", "text"}]`, from a JSON Lines or Parquet file or a named dataset, checked.

    Raises:
        `ValueError`: for a missing or empty field, or a duplicate id, naming file and line.
    """
    passages = []
    places: dict[str, str] = {}
    rows = read_corpus(source) if str(source).endswith(".parquet") else read_rows(source, split)
    for where, passage in checked_passages(rows):
        id = passage["id"]
        if id in places:
            raise ValueError(f"{where}: id {id!r} is already in {places[id]}; ids must be unique.")
        places[id] = where
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
    `qa_pairs` and `claims` of ALCE.

    Args:
        source (`str` or `Path`): JSON Lines file or name of a dataset.
        split (`str`, *optional*, defaults to `"test"`): of a named dataset.
        corpus (`list[dict]`, *optional*): if given, every id in `provenance` and `candidates` must be in it.
        answers_required (`bool`, *optional*, defaults to `True`): whether an empty list of answers is an error.
            Retrieval alone can be judged without answers.

    Raises:
        `ValueError`: for a missing field or an id that the corpus lacks, naming file and line.
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


def _check_evaluation_instance(value: dict, where: str, answers_required: bool) -> dict:
    """Return a checked evaluation instance with all its fields."""
    question = _check_question(value, where)
    answers = value.get("answers")
    provenance = value.get("provenance")
    candidates = value.get("candidates")
    if candidates is None:
        candidates = []
    meta = value.get("meta")
    if meta is None:
        meta = {}
    if not _are_strings(answers) or (answers_required and not answers):
        expected = "at least one string" if answers_required else "strings"
        raise ValueError(f"{where}: answers is {answers!r}, expected a list of {expected}.")
    if not isinstance(provenance, list) or not all(_are_strings(ids) and ids for ids in provenance):
        raise ValueError(f"{where}: provenance is {provenance!r}, expected a list of lists of passage ids.")
    if not _are_strings(candidates):
        raise ValueError(f"{where}: candidates is {candidates!r}, expected a list of passage ids.")
    if not isinstance(meta, dict):
        raise ValueError(f"{where}: meta is {meta!r}, expected an object.")
    return {**question, "answers": answers, "provenance": provenance, "candidates": candidates, "meta": meta}


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
        - if an encoder makes the queries, `query_input_ids`: what it reads for each `[NSP]`

    Raises:
        `ValueError`: if a query is longer than its encoder can read, naming the instance.
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
    gen_passages = iter(encode_passages_for_gen(tokenizer, passages, config))
    forbidden_ids = (nsp, cs, ce, tokenizer.eos_token_id)  # only this function writes them; no text may become one
    texts = encode_texts(tokenizer, [segment["text"] for segment in segments], forbidden_ids)
    input_ids = list(encode_prompt(tokenizer, instance["input"], instance["instruction"]))
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
        "passage_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, passages, config),
        "passage_ids": [passage["id"] for passage in passages],
        "positive_ids": [list(segment.get("positives") or []) for segment in retrieving],
        "negative_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, negatives, config),
        "negative_ids": [negative["id"] for negative in negatives],
    }
    if config.query_from != "gen":
        query_input_ids = encode_queries_for_emb_seq(tokenizer, emb_seq_tokenizer, queries, config)
        _check_query_lengths(query_input_ids, instance["id"], config)
        tokenized["query_input_ids"] = query_input_ids
    return tokenized


def _check_query_lengths(query_input_ids: Sequence[Sequence[int]], instance_id: str, config: "CoSupConfig") -> None:
    """Raise if a query is longer than its encoder can read."""
    encoder_config = config.emb_seq_config if config.query_from == "emb_seq" else config.query_encoder_config
    limit = getattr(encoder_config.get_text_config(), "max_position_embeddings", None) or float("inf")
    longest = max((len(ids) for ids in query_input_ids), default=0)
    if longest > limit:
        raise ValueError(
            f"Instance {instance_id!r}: the text up to an [NSP] has {longest} tokens, but its encoder reads {limit}."
        )
