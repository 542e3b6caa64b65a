"""
Give instances whose passage is unknown their candidates, before each optimiser step (arXiv 2402.11794).

1. The query embedding of each instance searches the index of candidates.
2. Its row becomes prompt `[NSP]` candidates `[Cs]` answer `[CE]`, as `generate()` with that `top_k` writes it.
3. The reader, Gen, reads the row, and scores each candidate.

All of this happens in evaluation mode and without a graph. From then on the candidates and their scores are data: no
gradient reaches the reader through them, and a batch is cut, shared between ranks and trained like any other.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from modeling_cosup.encoding_cosup import evaluating
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_texts

from .batching import CoSupDataCollator, UnresolvedBatch, needs_candidates
from .candidate_refresh import CandidatesMixin
from .candidate_watch import FLATNESS, LEFT_OUT, UNTAUGHT
from .candidates import Candidate
from .distributed import gather_objects
from .model_setup import without_peft
from .nearest_tokens import indicator_1, target_token_ids
from .position_bias import Sums, added, by_candidate, place_sums, without_bias
from .questions import answer_place, gold_ids
from .reader_scores import MAX_TOKENS, answer_log_likelihoods, passage_shares, token_attention
from .reading import ReaderRow, batches_by_length, reader_row
from .recording import without_compilation
from .running import RunningFigures
from .training_args import CoSupTrainingArguments


@dataclass
class Reading:
    """
    What the reader reads of an instance.

    Args:
        row ([`ReaderRow`]): with all candidates.
        order (`list[int]`): for each passage, in the order of the row, its number among the candidates.
        scores (`list[float]`): the reader's scores of the passages, in the order of the row.
    """

    row: ReaderRow
    order: list[int]
    scores: list[float] = field(default_factory=list)


@dataclass
class Resolution:
    """
    Instances with their candidates, and what was measured as they were retrieved.

    Args:
        features (`list[dict]`): tokenized instances, as the collator takes them.
        readings (`dict[int, Reading]`): of the instances that got candidates, by their place in `features`.
        values (`dict[str, list[float]]`): a value for each instance that has one, by the name of the figure.
        num_left_out (`int`): instances that are not among `features`, because they are too long.
    """

    features: list[Mapping[str, Any]] = field(default_factory=list)
    readings: dict[int, Reading] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    num_left_out: int = 0


def mean_names(args: CoSupTrainingArguments) -> list[str]:
    """Return the names, in logs, of the figures that are means: of gradients, candidates and distillation."""
    if args.gradient_cosine_steps is not None:
        return ["gradient_cosine", "gradient_ratio"]
    if args.candidates_from is None:
        return []
    names = [f"hit_rate@{args.num_candidates}", f"query_recall@{args.num_candidates}"]
    if args.distills:
        names += ["target_entropy", "student_entropy", "target_max", FLATNESS]
    if args.log_indicators:
        names.append("indicator_1")
    return names


def running_figures(loss_names: Iterable[str], args: CoSupTrainingArguments) -> RunningFigures:
    """Return the figures of the log, all zero."""
    return RunningFigures(loss_names, mean_names(args), [] if args.candidates_from is None else [LEFT_OUT, UNTAUGHT])


# ---------------------------------------------------------------------- the three steps


@torch.no_grad()
def query_embeddings(
    model: CoSupForCausalLM,
    features: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    emb_seq_pad_token_id: int,
    max_tokens: int = MAX_TOKENS,
) -> torch.Tensor:
    """
    Return the query embeddings of instances that need candidates, from Gen or from an encoder.

    Args:
        model ([`CoSupForCausalLM`]): in evaluation mode.
        features (`list[dict]`): tokenized instances.
        pad_token_id, emb_seq_pad_token_id (`int`): of Gen and of the encoders.
        max_tokens (`int`): of a forward, padding included.

    Returns:
        `torch.FloatTensor` of shape `(N, h)`.
    """
    from_gen = model.config.query_from == "gen"
    rows: list[list[int]] = []
    for feature in features:
        if from_gen:
            rows.append(list(feature["input_ids"])[: nsp_column(feature, model.config) + 1])
        else:
            rows.append(feature["query_input_ids"][0])
    embeds = torch.zeros(len(rows), model.config.embedding_size, device=model.device)
    for numbers in batches_by_length([len(row) for row in rows], max_tokens):
        batch = [rows[number] for number in numbers]
        pad = pad_token_id if from_gen else emb_seq_pad_token_id
        ids, mask = pad_rows(batch, pad, device=model.device)  # (B, T) each
        inputs: dict[str, Any] = {"query_input_ids": ids, "query_attention_mask": mask}
        if from_gen:
            ends = torch.arange(len(ids), device=ids.device) * ids.shape[1] + mask.sum(1) - 1
            inputs = {"input_ids": ids, "nsp_positions": ends, "use_cache": False, "return_logits": False}
        embeds[numbers] = model(**inputs).query_embeds.float()
    return embeds


def nsp_column(feature: Mapping[str, Any], config: CoSupConfig) -> int:
    """Return where `[NSP]` stands in a tokenized instance; no text can hold it."""
    return list(feature["input_ids"]).index(config.nsp_token_id)


def row_with_candidates(
    feature: Mapping[str, Any],
    candidates: Sequence[Candidate],
    config: CoSupConfig,
    separator: Sequence[int],
    train_on_passages: bool = False,
) -> ReaderRow:
    """Return the row of an instance, prompt `[NSP]` `[Cs]` answer `[CE]` end, with candidates after its `[NSP]`."""
    ids = list(feature["input_ids"])
    column = nsp_column(feature, config)
    passages = [candidate.input_ids for candidate in candidates]
    return reader_row(ids[:column], passages, ids[column + 2 : -2], config, separator, ids[-1], train_on_passages)


def reader_scores(
    model: CoSupForCausalLM,
    rows: Sequence[ReaderRow],
    names: Sequence[str],
    args: CoSupTrainingArguments,
    pad_token_id: int,
    attention: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Let Gen read rows, and return its score of each passage, as the target of `args` needs it.

    Args:
        model ([`CoSupForCausalLM`]): the reader.
        rows (`list[ReaderRow]`): instances with their candidates.
        names (`list[str]`): what each row is, for the error.
        args ([`CoSupTrainingArguments`]): `supervision` and the target.
        pad_token_id (`int`): of Gen.
        attention (`list[torch.FloatTensor]`, *optional*): what [`token_attention`] returned for the rows, if they have
            been read.

    Returns:
        `torch.FloatTensor` of shape `(N, K)`; 0 where a row has fewer passages.

    Raises:
        `FloatingPointError`: if a score is not finite, with the row's name.
    """
    if args.supervision == "attention_distillation":
        if attention is None:
            attention = token_attention(model, rows, pad_token_id)
        return passage_shares(attention, rows, names)
    target, _ = args.target
    return answer_log_likelihoods(
        model,
        rows,
        pad_token_id,
        leave_one_out=target == "leave_one_out",
        reduction="sum" if target == "emdr" else "mean",
        names=names,
    )


def add_scores(resolution: Resolution, sums: Sums | None = None) -> int:
    """
    Add the reader's scores to instances that have several candidates, in place, in the order of the candidates.

    Args:
        resolution ([`Resolution`]): instances that have been read.
        sums (`dict`, *optional*): shares by place. If given, scores become relative to them; see [`without_bias`].

    Returns:
        `int`: instances with candidates that got no scores, because there is nothing to compare the scores with.
    """
    num_without = 0
    for place, reading in resolution.readings.items():
        scores: list[float] | None = reading.scores
        if sums is not None:
            scores = without_bias(reading.scores, sums)
        if scores is None or len(scores) == 1:
            num_without += 1
            continue
        candidate_scores = by_candidate(scores, reading.order)
        resolution.features[place] = {**resolution.features[place], "candidate_scores": candidate_scores}
    return num_without


# ---------------------------------------------------------------------- in CoSupTrainer


class DistillationStepMixin(CandidatesMixin):
    """The part of [`CoSupTrainer`] that resolves batches."""

    args: CoSupTrainingArguments
    model: CoSupForCausalLM  # or the PeftModel that wraps it
    data_collator: Any
    cosup_config: CoSupConfig
    _running: RunningFigures

    def _resolved_batches(self, batches: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the batches of a step, with candidates for the instances that need them; all ranks call this."""
        self._refresh_candidates()
        resolutions: list[Resolution | None] = []
        for batch in batches:
            resolution = None
            if isinstance(batch, UnresolvedBatch):
                resolution = self._resolve(batch.features, self.args.shuffle_candidates)
                self._running.add_values(resolution.values)
                self._running.add_count(LEFT_OUT, resolution.num_left_out)
            resolutions.append(resolution)
        num_untaught = self._add_scores([resolution for resolution in resolutions if resolution is not None])
        if num_untaught:
            self._running.add_count(UNTAUGHT, num_untaught)
        resolved_batches = []
        for batch, resolution in zip(batches, resolutions, strict=True):
            if resolution is not None:
                batch = self.data_collator.collate(resolution.features)
            resolved_batches.append(batch)
        return resolved_batches

    def _add_scores(self, resolutions: Sequence[Resolution]) -> int:
        """
        Add to instances, in place, the reader's scores of their candidates; all ranks call this together.

        With `distillation_target="attention"`, a share is relative to the mean share of its place, over all given
        instances of all ranks. If no other instance has as many passages, an instance gets no scores, and so is not
        distilled.

        Returns:
            `int`: instances with candidates that got no scores.
        """
        if not self.args.distills:
            return 0
        sums = None
        if self._corrects_places:
            shares: list[list[float]] = []
            for resolution in resolutions:
                shares += [reading.scores for reading in resolution.readings.values()]
            sums = added(gather_objects(place_sums(shares), self._host_group))
        return sum(add_scores(resolution, sums) for resolution in resolutions)

    @property
    def _corrects_places(self) -> bool:
        """Whether a share of attention is relative to the mean share of its place."""
        return self.args.distills and self.args.target[0] == "attention"

    def _resolve(self, features: Sequence[Mapping[str, Any]], shuffle: bool = False) -> Resolution:
        """
        Return instances with candidates, in the given order.

        Args:
            features (`list[dict]`): tokenized instances; those that need no candidates stay as they are.
            shuffle (`bool`, *optional*, defaults to `False`): put the candidates in a random order.

        Raises:
            `FloatingPointError`: if a score of the reader is not finite, naming the instance.
        """
        model = without_peft(self.model)
        waiting = [feature for feature in features if needs_candidates(feature)]
        # compiled layers would compile again for the shapes of queries and readings
        # Trainer autocasts the forward of the prepared model alone
        with evaluating(model), torch.no_grad(), self.accelerator.autocast(), without_compilation():
            separator = encode_texts(model.tokenizer, ["\n"])[0]
            retrieved = self._retrieve(model, waiting)
            resolution = Resolution(values=self._retrieval_values(waiting, retrieved))
            remaining = iter(retrieved)
            for feature in features:
                if not needs_candidates(feature):
                    resolution.features.append(feature)
                    continue
                candidates = next(remaining)
                if shuffle:
                    candidates = [candidates[number] for number in self._random_order(_id(feature), len(candidates))]
                row = row_with_candidates(
                    feature, candidates, self.cosup_config, separator, self.args.train_on_passages
                )
                if len(row.input_ids) > self.args.max_length:
                    resolution.num_left_out += 1
                    continue
                reading = Reading(row, list(range(len(candidates))))
                if self._corrects_places and not shuffle:
                    # if passages were read best first, a place's bias could not be told from what the best deserve
                    reading.order = self._random_order(_id(feature), len(candidates))
                    shuffled = [candidates[number] for number in reading.order]
                    reading.row = row_with_candidates(feature, shuffled, self.cosup_config, separator)
                resolution.readings[len(resolution.features)] = reading
                resolution.features.append(_resolved(feature, row, candidates))
            self._read(model, resolution)
        return resolution

    def _retrieve(self, model: CoSupForCausalLM, features: Sequence[Mapping[str, Any]]) -> list[list[Candidate]]:
        """Return the candidates of instances, the best first."""
        assert self.candidates is not None  # without it, instances that need candidates were refused
        collator = cast(CoSupDataCollator, self.data_collator)
        queries = query_embeddings(model, features, collator.pad_token_id, collator.emb_seq_pad_token_id)
        pools = None
        if self.args.candidates_from == "instance":
            pools = [feature["candidate_pool"] for feature in features]
        return self.candidates.search(model, queries, pools)

    def _retrieval_values(
        self, features: Sequence[Mapping[str, Any]], retrieved: Sequence[Sequence[Candidate]]
    ) -> dict[str, list[float]]:
        """Return, for instances where it is known, whether a candidate holds an answer, and whether one is gold."""
        hits, found = [], []
        for feature, candidates in zip(features, retrieved, strict=True):
            if feature.get("answers"):
                passages = [{"title": candidate.title, "text": candidate.text} for candidate in candidates]
                hits.append(float(answer_place(passages, feature["answers"]) > 0))
            if feature.get("provenance"):
                ids = {candidate.id for candidate in candidates}
                found.append(float(not ids.isdisjoint(gold_ids({"provenance": feature["provenance"]}))))
        k = self.args.num_candidates
        return {f"hit_rate@{k}": hits, f"query_recall@{k}": found}

    def _random_order(self, instance_id: str, count: int) -> list[int]:
        """Return the numbers of `count` candidates in an order that depends on seed, step and instance alone."""
        drawn = random.Random(f"{self.args.seed} {self.state.global_step} {instance_id}")
        return drawn.sample(range(count), count)

    def _read(self, model: CoSupForCausalLM, resolution: Resolution) -> None:
        """Let the reader read; add its scores to the readings, and its indicator to the values, in place."""
        pad_token_id = cast(CoSupDataCollator, self.data_collator).pad_token_id
        readings = list(resolution.readings.values())
        rows = [reading.row for reading in readings]
        features = [resolution.features[place] for place in resolution.readings]
        attention = None
        if self.args.log_indicators:
            attention = token_attention(model, rows, pad_token_id)
            targets = [_answer_tokens(model.tokenizer, row) for row in rows]
            resolution.values["indicator_1"] = indicator_1(model.get_input_embeddings(), rows, attention, targets)
        if not self.args.distills:
            return
        names = [f"instance {feature.get('id')!r}" for feature in features]
        scores = reader_scores(model, rows, names, self.args, pad_token_id, attention).tolist()
        for reading, row_scores in zip(readings, scores, strict=True):
            reading.scores = row_scores[: len(reading.order)]


def _id(feature: Mapping[str, Any]) -> str:
    return str(feature.get("id", "without id"))


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, row: ReaderRow) -> list[int]:
    """Return the tokens of the answer that is read, as Indicator 1 takes them."""
    return target_token_ids(tokenizer, [str(tokenizer.decode(row.input_ids[slice(*row.answer_span)])).strip()])


def _resolved(feature: Mapping[str, Any], row: ReaderRow, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return a tokenized instance with its candidates."""
    return {
        **feature,
        "input_ids": row.input_ids,
        "labels": row.labels,
        "candidate_ids": [candidate.id for candidate in candidates],
        "candidate_input_ids": [candidate.emb_seq_input_ids for candidate in candidates],
    }
