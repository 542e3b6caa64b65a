"""
Tell a good reader from a bad one by where it looks: Indicators 1 and 2 of arXiv 2402.11794 (section 4, Table 2).

A reader that is worth distilling attends to the passage tokens that are near to its answer (Indicator 1) and to the
nouns of the question (Indicator 2). Over the nearest 10 % and 5 % of the passage tokens of an instance, an indicator
is the mean attention, and Spearman's rho between attention and similarity. [`~trainer.nearest_tokens`] defines both.

The paper leaves three choices open; they are arguments here. By default, similarity is measured between Gen's input
embeddings; with several target tokens, it is the mean over them; and nouns are the ones that the data names, or else
those that [`~trainer.judging.nouns.nouns_by_rule`] finds.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # loads scipy.stats only when it is used
import torch
from tqdm.auto import tqdm

from modeling_cosup import CoSupForCausalLM, Retriever
from modeling_cosup.architectures_cosup import num_positions
from modeling_cosup.tokenization_cosup import (
    encode_passages_for_gen,
    encode_prompt,
    encode_texts,
    end_of_turn_token_id,
)

from ..nearest_tokens import Embed, Pooling, is_nearest, passage_tokens, target_token_ids, token_similarity
from ..questions import gold_ids
from ..reader_scores import MAX_TOKENS, answer_log_likelihoods, passage_shares, token_attention
from ..reading import ReaderRow, reader_row
from .answers import embed_queries
from .correctness import worded
from .intervals import mean_and_deviation
from .nouns import marked_nouns, nouns_by_rule
from .teaching import best_is_gold, relative_to_place, shares_by_place

TARGETS = ("answer", "nouns")  # of Indicator 1 and of Indicator 2
PERCENTILES = (90, 95)
ROWS_AT_A_TIME = 64  # rows whose attention is in memory


@dataclass
class Spread:
    """Mean and sample standard deviation of a figure over `n` instances; `None` where there are too few."""

    mean: float | None
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of any number of values."""
        if not values:
            return cls(None, None, 0)
        mean, deviation = mean_and_deviation(values)
        return cls(mean, deviation if len(values) > 1 else None, len(values))


@dataclass
class Indicator:
    """
    One indicator over the nearest tokens.

    Args:
        attention ([`Spread`]): share of the attention to all passages that one of the nearest tokens gets, mean over
            these tokens.
        rho ([`Spread`]): Spearman's correlation of attention and similarity over the nearest tokens.
        num_undefined (`int`): instances without a correlation, because fewer than three tokens are nearest, or all of
            them have the same similarity or the same attention. They are not in `rho`.
    """

    attention: Spread
    rho: Spread
    num_undefined: int


@dataclass
class IndicatorResults:
    """
    The indicators of one reader.

    Args:
        indicators (`dict[str, dict[int, Indicator]]`): target (`"answer"`: Indicator 1, `"nouns"`: Indicator 2) ->
            percentile of similarity -> [`Indicator`].
        uniform ([`Spread`]): the attention of a reader that attends to all passage tokens alike, 1 / their number.
        num_instances (`int`): instances that were given.
        left_out (`dict[str, int]`): reason -> number of instances: `"no_passage"`, `"no_answer"`, `"too_long"` for
            Gen; and `"no_noun"`, which are left out of Indicator 2 alone.
        places (`list[float]`): mean share of attention of each place in the row.
        best_is_gold (`dict[str, Spread]`): `distillation_target` -> how often the passage that it prefers is gold,
            over the instances that have a gold passage among theirs.
    """

    indicators: dict[str, dict[int, Indicator]]
    uniform: Spread
    num_instances: int
    left_out: dict[str, int]
    places: list[float]
    best_is_gold: dict[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values: percentiles become texts."""
        results = asdict(self)
        for target, by_percentile in results["indicators"].items():
            results["indicators"][target] = {str(percentile): value for percentile, value in by_percentile.items()}
        return results


def indicators(
    model: CoSupForCausalLM,
    instances: Sequence[dict],
    passages: Sequence[Sequence[dict]],
    percentiles: Sequence[int] = PERCENTILES,
    embed: Embed | None = None,
    pooling: Pooling = "mean",
    find_nouns: Callable[[str], list[str]] | None = None,
    max_tokens: int = MAX_TOKENS,
    likelihoods: bool = False,
) -> IndicatorResults:
    """
    Measure Indicators 1 and 2 of a reader, and what it would teach a retriever.

    Args:
        model ([`CoSupForCausalLM`]): its Gen is the reader.
        instances (sequence of `dict`): evaluation instances. The first answer is read, and is the target of Indicator
            1. Nouns may stand in `"nouns"` or in `"meta": {"nouns": [...]}`.
        passages (sequence of sequences of `dict`): for each instance the passages that are read with it, in order.
        percentiles (sequence of `int`, *optional*, defaults to `(90, 95)`): of similarity; tokens at and above one are
            the nearest.
        embed (`Callable`, *optional*): maps token ids of Gen `(n,)` to embeddings `(n, h)`; defaults to Gen's input
            embeddings.
        pooling (`str`, *optional*, defaults to `"mean"`): over several target tokens, or `"max"`; see
            [`~trainer.nearest_tokens.token_similarity`].
        find_nouns (`Callable`, *optional*): returns the nouns of a question whose instance has no field; defaults to
            [`~trainer.judging.nouns.nouns_by_rule`].
        max_tokens (`int`, *optional*): of a forward, padding included.
        likelihoods (`bool`, *optional*, defaults to `False`): also read each passage alone, for `"perplexity"`.

    Returns:
        [`IndicatorResults`].

    Raises:
        `ValueError`: if there are not as many lists of passages as instances, if no instance is left, or if Gen's
            attention cannot be recorded, see [`~trainer.recording.recording_attention`].
        `FloatingPointError`: if the attention is not finite, naming the instance.
    """
    if len(instances) != len(passages):
        raise ValueError(f"{len(passages)} lists of passages, expected one for each of {len(instances)} instances.")
    _check_options(percentiles, pooling)
    left_out = dict.fromkeys(("no_passage", "no_answer", "too_long", "no_noun"), 0)
    readings = list(_readings(model, instances, passages, find_nouns or nouns_by_rule, left_out))
    if not readings:
        reasons = ", ".join(f"{name}: {count}" for name, count in left_out.items() if count) or "there is none"
        raise ValueError(f"None of {len(instances)} instances can be read ({reasons}).")
    embed = model.gen.get_input_embeddings() if embed is None else embed
    pad = model.tokenizer.pad_token_id
    measured = {(target, percentile): _Measured() for target in TARGETS for percentile in percentiles}
    uniform = []
    scores: dict[str, list] = {"attention_shares": []}
    for start in tqdm(range(0, len(readings), ROWS_AT_A_TIME), desc="Reading", unit="batch"):
        chosen = readings[start : start + ROWS_AT_A_TIME]
        rows = [reading.row for reading in chosen]
        attention = token_attention(model, rows, pad, max_tokens)
        names = [reading.name for reading in chosen]
        scores["attention_shares"] += _without_padding(passage_shares(attention, rows, names), rows)
        if likelihoods:
            log_likelihoods = answer_log_likelihoods(model, rows, pad, max_tokens, names=names)
            scores.setdefault("perplexity", []).extend(_without_padding(log_likelihoods, rows))
        for reading, row_attention in zip(chosen, attention, strict=True):
            ids, of_passages = passage_tokens(reading.row, row_attention)
            uniform.append(1 / len(ids))
            for target, target_ids in reading.targets.items():
                similarity = token_similarity(embed, ids, target_ids, pooling)
                for percentile in percentiles:
                    nearest = is_nearest(similarity, percentile)
                    measured[target, percentile].add(of_passages[nearest], similarity[nearest])
    by_target = {
        target: {percentile: measured[target, percentile].indicator() for percentile in percentiles}
        for target in TARGETS
    }
    scores["attention"] = relative_to_place(scores["attention_shares"])
    gold = [reading.gold for reading in readings]
    return IndicatorResults(
        by_target,
        Spread.of(uniform),
        len(instances),
        left_out,
        places=shares_by_place(scores["attention_shares"]),
        best_is_gold={name: Spread.of(best_is_gold(values, gold)) for name, values in scores.items()},
    )


def _without_padding(scores: torch.Tensor, rows: Sequence[ReaderRow]) -> list[list[float]]:
    """Return the scores `(B, K_max)` of the passages that each row has."""
    return [values[: len(row.passage_spans)] for values, row in zip(scores.tolist(), rows, strict=True)]


def _check_options(percentiles: Sequence[int], pooling: str) -> None:
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling is {pooling!r}, expected 'mean' or 'max'.")
    for percentile in percentiles:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentiles holds {percentile}, expected numbers from 0 to 100.")


# ---------------------------------------------------------------------- what is read


@dataclass
class _Reading:
    """An instance as it is read, the target tokens of each indicator that it counts for, and its gold passages."""

    name: str
    row: ReaderRow
    targets: dict[str, list[int]]
    gold: set[int]  # their numbers among those that are read


def _readings(
    model: CoSupForCausalLM,
    instances: Sequence[dict],
    passages: Sequence[Sequence[dict]],
    find_nouns: Callable[[str], list[str]],
    left_out: dict[str, int],
) -> Iterator[_Reading]:
    """Yield the instances that can be read, and count the others in `left_out`."""
    tokenizer, config = model.tokenizer, model.config
    (separator,) = encode_texts(tokenizer, ["\n"])
    end_of_turn = end_of_turn_token_id(tokenizer)
    positions = num_positions(model.gen.config)
    for instance, instance_passages in zip(instances, passages, strict=True):
        answers = worded(instance["answers"][:1])
        if not instance_passages or not answers:
            left_out["no_answer" if instance_passages else "no_passage"] += 1
            continue
        prompt = encode_prompt(tokenizer, instance["input"], instance["instruction"])
        gen_passages = encode_passages_for_gen(tokenizer, instance_passages, config)
        (answer,) = encode_texts(tokenizer, answers)
        row = reader_row(prompt, gen_passages, answer, config, separator, end_of_turn)
        if positions is not None and len(row.input_ids) > positions:
            left_out["too_long"] += 1
            continue
        targets = {"answer": target_token_ids(tokenizer, answers)}
        nouns = marked_nouns(instance)
        if nouns is None:
            nouns = find_nouns(instance["input"])
        if worded(nouns):
            targets["nouns"] = target_token_ids(tokenizer, worded(nouns))
        else:
            left_out["no_noun"] += 1
        ids = gold_ids(instance)
        gold = {number for number, passage in enumerate(instance_passages) if passage.get("id") in ids}
        yield _Reading(f"instance {instance['id']!r}", row, targets, gold)


def candidate_passages(
    model: CoSupForCausalLM,
    index: Retriever,
    questions: list[dict],
    num_candidates: int = 5,
    gold_included: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    shuffle: bool = False,
) -> list[list[dict]]:
    """
    Return the passages that are nearest to each question's query embedding.

    Args:
        model ([`CoSupForCausalLM`]): embeds the questions.
        index ([`Retriever`]): its index.
        questions (`list[dict]`): evaluation instances.
        num_candidates (`int`): passages of each question.
        gold_included (`bool`): whether a gold passage replaces the last one where none was found. It is put at a place
            drawn from the seed and the id of the question, so that no place says which passage is gold.
        batch_size (`int`): questions per forward.
        seed (`int`): of the places of gold passages, and of the order.
        shuffle (`bool`): put the passages of each question in a random order; by default the nearest is first.

    Raises:
        `ValueError`: if the index holds fewer passages; with counts, if gold passages are to be included and questions
            have no provenance, or the index lacks them.
    """
    if not 1 <= num_candidates <= len(index):
        raise ValueError(f"num_candidates is {num_candidates}, and the index holds {len(index):,} passages.")
    if gold_included:
        num_without = sum(not question["provenance"] for question in questions)
        if num_without:
            raise ValueError(
                f"{num_without} of {len(questions)} questions have no provenance: no gold passage can be included."
            )
        gold_rows = index.rows_of([question["provenance"][0][0] for question in questions])
    found = index.search(embed_queries(model, questions, batch_size), k=num_candidates)[1]
    candidates = []
    for number, question in enumerate(questions):
        passages = index.get_passages(found[number][found[number] >= 0])
        if gold_included and gold_ids(question).isdisjoint(passage["id"] for passage in passages):
            passages = passages[: num_candidates - 1]
            place = random.Random(f"{seed} {question['id']}").randint(0, len(passages))
            passages[place:place] = index.get_passages(gold_rows[number : number + 1])
        if shuffle:
            random.Random(f"order {seed} {question['id']}").shuffle(passages)
        candidates.append(passages)
    return candidates


# ---------------------------------------------------------------------- statistics


class _Measured:
    """The values of one indicator at one percentile, collected instance by instance."""

    def __init__(self) -> None:
        self.attention: list[float] = []
        self.correlations: list[float] = []
        self.num_undefined = 0

    def add(self, attention: torch.Tensor, similarity: torch.Tensor) -> None:
        """Add an instance: attention and similarity of its nearest tokens, both `(n,)`."""
        self.attention.append(float(attention.double().mean()))
        correlation = spearman(attention.double().cpu().numpy(), similarity.double().cpu().numpy())
        if correlation is None:
            self.num_undefined += 1
        else:
            self.correlations.append(correlation)

    def indicator(self) -> Indicator:
        """Return the indicator over the instances so far."""
        return Indicator(Spread.of(self.attention), Spread.of(self.correlations), self.num_undefined)


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """
    Return Spearman's rank correlation, with mean ranks for ties; `None` if it is not defined.

    It needs three values, and neither side may be constant up to the rounding of float32.
    """
    if len(first) < 3:
        return None
    for values in (first, second):
        if np.ptp(values) <= 1e-6 * np.abs(values).max():
            return None
    return float(scipy.stats.spearmanr(first, second).statistic)
