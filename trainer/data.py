"""From files to checked instances, from an instance to token ids, labels and passages."""

import hashlib
from pathlib import Path

from modeling_cosup.lines_cosup import lines_with_places
from modeling_cosup.passages_cosup import check_text, check_title_and_text, checked_passages, read_corpus
from modeling_cosup.tokenization_cosup import (
    encode_passages_for_emb_seq,
    encode_passages_for_gen,
    encode_prompt,
    encode_queries_for_emb_seq,
    encode_texts,
    end_of_turn_token_id,
)

# ---------------------------------------------------------------------- reading and checking


def read_rows(source, split="train"):
    """`(where, dict)` pairs of a JSON Lines file, or of a dataset name (Hub or folder) through `datasets.load_dataset`, unchecked."""
    if str(source).endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) or Path(source).is_file():
        yield from lines_with_places(source)
        return
    from datasets import load_dataset

    for row, value in enumerate(load_dataset(str(source), split=split)):
        yield f"{source} ({split}), row {row}", value


def check_passage(passage, where, field=""):
    """A passage as `{"id", "title", "text"}`; a missing title becomes empty, a missing id becomes its [`content_id`]."""
    checked, id = check_title_and_text(passage, where, field), passage.get("id")
    return {"id": content_id(**checked) if id is None else str(id), **checked}


def load_instances(source, split="train"):
    """Training instances of a JSON Lines file or dataset name, checked: `list[dict]`; see [`check_instance`]."""
    instances = [check_instance(value, where) for where, value in read_rows(source, split)]
    if not instances:
        raise ValueError(f"{source}: holds no instance.")
    return instances


class CheckedInstance(dict):
    """
    A training instance that was checked: [`check_instance`] returns it as it is.

    A changed copy is a plain `dict` and is checked again. Changes made in place after loading are not checked.
    """


def check_instance(instance, where):
    """
    A training instance with `instruction` filled in and nothing but known fields.

    Args:
        instance (`dict`): `{"id", "dataset", "instruction", "input", "segments": [{"text", "passage": {"id", "title", "text"} | None}]}`;
            `id`, `dataset`, `instruction` and a passage's `title` may be missing. A segment with a passage may also hold `"negatives"`, passages that
            are no answer though they look like one, and `"positives"`, ids of further passages that would have been right.
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
    checked = []
    for i, segment in enumerate(segments):
        name = f"segments[{i}]"
        if not isinstance(segment, dict):
            raise ValueError(f"{where}: {name} is {segment!r}, expected an object with text and passage.")
        passage = segment.get("passage")
        if passage is not None and not isinstance(passage, dict):
            raise ValueError(f"{where}: {name}.passage is {passage!r}, expected an object or null.")
        negatives, positives = segment.get("negatives") or [], segment.get("positives") or []
        if not isinstance(negatives, list) or not all(isinstance(negative, dict) for negative in negatives):
            raise ValueError(f"{where}: {name}.negatives is {negatives!r}, expected a list of passages.")
        if not _are_strings(positives):
            raise ValueError(f"{where}: {name}.positives is {positives!r}, expected a list of passage ids.")
        if passage is None and (negatives or positives):
            raise ValueError(
                f"{where}: {name} has negatives or positives but no passage, so no [NSP] that they could belong to."
            )
        checked.append(
            {
                "text": check_text(segment.get("text"), f"{name}.text", where),
                "passage": None if passage is None else check_passage(passage, where, f"{name}.passage."),
                "negatives": [
                    check_passage(negative, where, f"{name}.negatives[{j}].") for j, negative in enumerate(negatives)
                ],
                "positives": positives,
            }
        )
    return CheckedInstance({**_check_question(instance, where), "segments": checked})


def _check_question(value, where):
    """The fields that training and evaluation instances share."""
    instruction = value.get("instruction")
    return {
        "id": where if value.get("id") is None else str(value["id"]),
        "dataset": str(value.get("dataset") or ""),
        "instruction": check_text("" if instruction is None else instruction, "instruction", where, may_be_empty=True),
        "input": check_text(value.get("input"), "input", where),
    }


def content_id(title, text):
    """Id of a passage that has none: the first 16 hex digits of `sha1(title + "\\n" + text)`."""
    return hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:16]


def load_corpus(source, split="train"):
    """
    A corpus, `list[{"id", "title", "text"}]`, checked: of a JSON Lines or Parquet file, or a dataset name.

    Raises:
        `ValueError`: a missing or empty field, or a duplicate id, naming file and line.
    """
    passages, places = [], {}
    pairs = read_corpus(source) if str(source).endswith(".parquet") else read_rows(source, split)
    for where, passage in checked_passages(pairs):
        if passage["id"] in places:
            raise ValueError(
                f"{where}: id {passage['id']!r} already stands at {places[passage['id']]}; ids must be unique."
            )
        places[passage["id"]] = where
        passages.append(passage)
    if not passages:
        raise ValueError(f"{source}: the corpus holds no passage.")
    return passages


def load_evaluation_set(source, split="test", corpus=None, answers_required=True):
    """
    Evaluation instances `{"id", "dataset", "instruction", "input", "answers", "provenance", "candidates", "meta"}`, checked.

    Args:
        source (`str`): JSON Lines file or dataset name.
        split (`str`): of a dataset name.
        corpus (`list[dict]`, *optional*): then every id in `provenance` and `candidates` must be a passage of it.
        answers_required (`bool`): an empty list of answers is an error; retrieval alone can be judged without them.

    `candidates` may be missing, and so may `meta`, an object of whatever else a metric needs (`qa_pairs` and `claims` of ALCE).

    Raises:
        `ValueError`: a missing field or an id that the corpus lacks, naming file and line.
    """
    known = None if corpus is None else {passage["id"] for passage in corpus}
    instances = []
    for where, value in read_rows(source, split):
        question = _check_question(value, where)
        answers, provenance, candidates = value.get("answers"), value.get("provenance"), value.get("candidates")
        candidates = [] if candidates is None else candidates
        if not _are_strings(answers) or (answers_required and not answers):
            raise ValueError(
                f"{where}: answers is {answers!r}, expected a list of {'at least one string' if answers_required else 'strings'}."
            )
        if not isinstance(provenance, list) or not all(_are_strings(ids) and ids for ids in provenance):
            raise ValueError(f"{where}: provenance is {provenance!r}, expected a list of lists of passage ids.")
        if not _are_strings(candidates):
            raise ValueError(f"{where}: candidates is {candidates!r}, expected a list of passage ids.")
        meta = {} if value.get("meta") is None else value["meta"]
        if not isinstance(meta, dict):
            raise ValueError(f"{where}: meta is {meta!r}, expected an object.")
        for name, ids in [
            ("provenance", [id for evidence in provenance for id in evidence]),
            ("candidates", candidates),
        ]:
            missing = [] if known is None else [id for id in ids if id not in known]
            if missing:
                raise ValueError(
                    f"{where}: {name} holds {missing[0]!r}, which the corpus lacks ({len(missing)} such ids)."
                )
        instances.append(
            {**question, "answers": answers, "provenance": provenance, "candidates": candidates, "meta": meta}
        )
    if not instances:
        raise ValueError(f"{source}: the evaluation set holds no instance.")
    return instances


def _are_strings(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


# ---------------------------------------------------------------------- tokenizing


def tokenize_instance(instance, tokenizer, emb_seq_tokenizer, config, train_on_passages=False, end_of_turn_id=None):
    """
    Token ids, labels and passages of an instance.

    Prompt, then for each segment `[NSP]` passage `[Cs]` text `[CE]`, or its text alone, then the end of turn. Trained are `[NSP]`, text, `[CE]`
    and the end of turn; the prompt, passages and `[Cs]` have label -100 (`train_on_passages` turns passages on).

    Args:
        instance (`dict`): as [`check_instance`] returns it.
        tokenizer, emb_seq_tokenizer (`PreTrainedTokenizerBase`): Gen's and Emb_seq's.
        config (`CoSupConfig`): control token ids, passage template and length.
        train_on_passages (`bool`): also train passage tokens.
        end_of_turn_id (`int`, *optional*): what ends the response; found through the chat template when it is not given.

    Returns:
        `dict`: `id`; `input_ids` and `labels` (`list[int]`, equally long); for each `[NSP]` an entry of `passage_input_ids` (as Emb_seq reads them),
        `passage_ids` and `positive_ids` (ids of further passages that would have been right); `negative_input_ids` and `negative_ids`; and, where
        Emb_seq or a query encoder makes the queries, `query_input_ids`, what it reads for each `[NSP]`.
    """
    nsp, cs, ce = config.nsp_token_id, config.cs_token_id, config.ce_token_id
    retrieving = [segment for segment in instance["segments"] if segment["passage"] is not None]
    passages = [segment["passage"] for segment in retrieving]
    negatives = [negative for segment in retrieving for negative in segment.get("negatives") or []]
    gen_passages = iter(encode_passages_for_gen(tokenizer, passages, config))
    texts = encode_texts(
        tokenizer, [segment["text"] for segment in instance["segments"]], (nsp, cs, ce, tokenizer.eos_token_id)
    )
    input_ids = list(encode_prompt(tokenizer, instance["input"], instance["instruction"]))
    labels, queries = [-100] * len(input_ids), []
    for segment, text in zip(instance["segments"], texts, strict=True):
        if segment["passage"] is None:
            input_ids += text
            labels += text
        else:
            passage = next(gen_passages)
            queries.append([*input_ids, nsp])
            input_ids += [nsp, *passage, cs, *text, ce]
            labels += [nsp, *(passage if train_on_passages else [-100] * len(passage)), -100, *text, ce]
    end = end_of_turn_token_id(tokenizer) if end_of_turn_id is None else end_of_turn_id
    tokenized = {
        "id": instance["id"],
        "input_ids": [*input_ids, end],
        "labels": [*labels, end],
        "passage_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, passages, config),
        "passage_ids": [passage["id"] for passage in passages],
        "positive_ids": [list(segment.get("positives") or []) for segment in retrieving],
        "negative_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, negatives, config),
        "negative_ids": [negative["id"] for negative in negatives],
    }
    if config.query_from != "gen":
        tokenized["query_input_ids"] = encode_queries_for_emb_seq(tokenizer, emb_seq_tokenizer, queries, config)
        encoder = config.emb_seq_config if config.query_from == "emb_seq" else config.query_encoder_config
        limit = getattr(encoder.get_text_config(), "max_position_embeddings", None) or float("inf")
        longest = max(map(len, tokenized["query_input_ids"]), default=0)
        if longest > limit:
            raise ValueError(
                f"Instance {instance['id']!r}: what stands before an [NSP] has {longest} tokens, its encoder reads {limit}."
            )
    return tokenized
