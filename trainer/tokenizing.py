"""Turn checked instances into token ids, labels and passages."""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupConfig
from modeling_cosup.tokenization_cosup import (
    encode_passages_for_emb_seq,
    encode_passages_for_gen,
    encode_prompt,
    encode_queries_for_emb_seq,
    encode_texts,
    end_of_turn_token_id,
)

from .data import candidate_ids, has_passage
from .questions import answers_to_find


def tokenize_instance(
    instance: dict,
    tokenizer: PreTrainedTokenizerBase,
    emb_seq_tokenizer: PreTrainedTokenizerBase,
    config: CoSupConfig,
    train_on_passages: bool = False,
    end_of_turn_id: int | None = None,
    candidates_from: str | None = None,
) -> dict[str, Any]:
    """
    Return the token ids, labels and passages of an instance.

    The prompt comes first. Then each segment: `[NSP]` passage `[Cs]` text `[CE]`, or its text alone. Then the end of
    turn. `[NSP]`, text, `[CE]` and the end of turn are trained. The prompt, passages and `[Cs]` have label -100
    (`train_on_passages` turns passages on).

    With `candidates_from`, an instance whose passage is unknown gets the row prompt `[NSP]` `[Cs]` answer `[CE]`, end
    of turn; its candidates are put between `[NSP]` and `[Cs]` when a step needs them. With `"instance"`, segments
    without candidates stay free text.

    Args:
        instance (`dict`): as [`~trainer.data.check_instance`] returns it.
        tokenizer, emb_seq_tokenizer (`PreTrainedTokenizerBase`): Gen's and Emb_seq's.
        config (`CoSupConfig`): control token ids, passage template and passage length.
        train_on_passages (`bool`, *optional*, defaults to `False`): also train passage tokens.
        end_of_turn_id (`int`, *optional*): the token that ends the response; by default that of the chat template.
        candidates_from (`str`, *optional*): see [`CoSupTrainingArguments`].

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
        - with `candidates_from`, `needs_candidates` (`bool`), `provenance`, `answers` that passages can be searched
          for and, with `"instance"`, `candidate_pool`, ids of its own candidates

    Raises:
        `ValueError`: if a text holds a special token that the tokenizer cannot read as text; if an instance has only
            answers, without `candidates_from`; or, with `"instance"`, if it has only answers and no candidates.
    """
    needs_candidates = _needs_candidates(instance, candidates_from)
    segments = instance["segments"]
    if not segments and not needs_candidates:
        raise ValueError(
            f"Instance {instance['id']!r} has answers and no segments: its passage is unknown. Train it with"
            " supervision='attention_distillation' or 'perplexity_distillation', or with 'ntp' and candidates_from."
        )
    retrieving = [segment for segment in segments if segment["passage"] is not None]
    passages = [segment["passage"] for segment in retrieving]
    negatives: list[dict] = []
    for segment in retrieving:
        negatives += segment.get("negatives") or []

    cut_passages: set[int] = set()  # their numbers
    cut_negatives: set[int] = set()
    gen_passages = encode_passages_for_gen(tokenizer, passages, config, cut_passages)
    row = _Row(_encode_prompt(instance, tokenizer), config)
    if needs_candidates:
        row.add_answer(_encode_answer(instance, tokenizer))
    else:
        row.add_segments(segments, _encode_segments(instance, tokenizer), gen_passages, train_on_passages)
    if end_of_turn_id is None:
        end_of_turn_id = end_of_turn_token_id(tokenizer)

    tokenized = {
        "id": instance["id"],
        "input_ids": [*row.input_ids, end_of_turn_id],
        "labels": [*row.labels, end_of_turn_id],
        "passage_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, passages, config, cut_passages),
        "passage_ids": [passage["id"] for passage in passages],
        "positive_ids": [list(segment.get("positives") or []) for segment in retrieving],
        "negative_input_ids": encode_passages_for_emb_seq(emb_seq_tokenizer, negatives, config, cut_negatives),
        "negative_ids": [negative["id"] for negative in negatives],
        "num_cut_passages": len(cut_passages) + len(cut_negatives),
    }
    if config.query_from != "gen":
        query_input_ids, num_cut = encode_queries_for_emb_seq(tokenizer, emb_seq_tokenizer, row.queries, config)
        tokenized.update(query_input_ids=query_input_ids, num_cut_queries=num_cut)
    if candidates_from is not None:
        tokenized.update(
            needs_candidates=needs_candidates,
            answers=answers_to_find(instance),
            provenance=instance.get("provenance") or [],
            candidate_pool=candidate_ids(instance) if candidates_from == "instance" else [],
        )
    return tokenized


class _Row:
    """
    The row of an instance as it grows from its prompt.

    Attributes:
        input_ids, labels (`list[int]`): equally long.
        queries (`list[list[int]]`): everything up to and including each `[NSP]`.
    """

    def __init__(self, prompt: list[int], config: CoSupConfig) -> None:
        assert config.nsp_token_id is not None  # the three are set when Gen and Emb_seq were put together
        assert config.cs_token_id is not None and config.ce_token_id is not None
        self.nsp, self.cs, self.ce = config.nsp_token_id, config.cs_token_id, config.ce_token_id
        self.input_ids = prompt
        self.labels = [-100] * len(prompt)
        self.queries: list[list[int]] = []

    def add_answer(self, answer: list[int]) -> None:
        """Add `[NSP]` `[Cs]` answer `[CE]`: the passages are not known yet."""
        self._add_grounded([], [], answer)

    def add_segments(
        self, segments: list[dict], texts: list[list[int]], passages: list[list[int]], train_on_passages: bool
    ) -> None:
        """Add each segment; `passages` are those of the segments that have one."""
        remaining = iter(passages)
        for segment, text in zip(segments, texts, strict=True):
            if segment["passage"] is None:
                self.input_ids += text
                self.labels += text
                continue
            passage = next(remaining)
            self._add_grounded(passage, passage if train_on_passages else [-100] * len(passage), text)

    def _add_grounded(self, passage: list[int], passage_labels: list[int], text: list[int]) -> None:
        self.queries.append([*self.input_ids, self.nsp])
        self.input_ids += [self.nsp, *passage, self.cs, *text, self.ce]
        self.labels += [self.nsp, *passage_labels, -100, *text, self.ce]


def _encode_prompt(instance: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return list(encode_prompt(tokenizer, instance["input"], instance["instruction"]))
    except ValueError as error:
        raise ValueError(f"Instance {instance['id']!r}: {error}") from error


def _encode_segments(instance: dict, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each segment's text."""
    segments = instance["segments"]
    names = [f"Instance {instance['id']!r}, segments[{i}].text" for i in range(len(segments))]
    return encode_texts(tokenizer, [segment["text"] for segment in segments], names)


def _encode_answer(instance: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that are trained of an instance without a passage: its segments, or its first answer."""
    if instance["segments"]:
        return list(itertools.chain.from_iterable(_encode_segments(instance, tokenizer)))
    return encode_texts(tokenizer, instance["answers"][:1], [f"Instance {instance['id']!r}, answers[0]"])[0]


def _needs_candidates(instance: dict, candidates_from: str | None) -> bool:
    """Return whether the passage of an instance is unknown, and candidates take its place."""
    if candidates_from is None or has_passage(instance):
        return False
    if candidates_from == "index" or candidate_ids(instance):
        return True
    if instance["segments"]:
        return False  # free text, which has nothing to search
    raise ValueError(
        f"Instance {instance['id']!r} has no candidates, and candidates_from='instance' searches nothing else."
    )
