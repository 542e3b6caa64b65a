"""Helpers for tests of generation: a processor that makes random models retrieve, and a slow reference of the loop."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from modeling_cosup import CoSupGenerateOutput, Retrieval
from modeling_cosup.tokenization_cosup import encode_prompt

QUESTIONS = ["who?", "who painted the Night Watch?", "Curie", "when was it finished; in Amsterdam", "not this one!"]


class Prefer(LogitsProcessor):
    """Adds a bonus to the scores of some tokens, in every decision."""

    def __init__(self, ids: Sequence[int], bonus: float = 1000.0) -> None:
        self.ids = ids
        self.bonus = bonus

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.ids] += self.bonus
        return scores


class Steer(LogitsProcessor):
    """
    Makes a random model retrieve at different steps: in some rows several times, in others never.

    The rule depends only on the row's tokens (the last one, their number, and whether `quiet_id` is among them), so it
    does the same to a row alone, a row in a padded batch, and a recompute of the whole prefix.
    """

    def __init__(self, model: Any, retrieve_every: int = 7, end_every: int | None = None, quiet_id: int = -1) -> None:
        self.nsp = model.config.nsp_token_id
        self.pad = model.generation_config.pad_token_id
        self.ends = model.generation_config.eos_token_id
        self.retrieve_every = retrieve_every
        self.end_every = end_every
        self.quiet_id = quiet_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.pad] = float("-inf")  # otherwise real pad tokens could not be told from padding
        for row, ids in enumerate(input_ids):
            clock = 31 * int(ids[-1]) + int((ids != self.pad).sum())
            is_quiet = (ids == self.quiet_id).any()
            if clock % self.retrieve_every == 0 and not is_quiet:
                scores[row, self.nsp] += 1000
            if self.end_every and clock % self.end_every == 1:
                scores[row, self.ends] += 2000
        return scores


class BreakingIndex:
    """An index whose server goes away at the `failing_search`-th search."""

    def __init__(self, index: Any, failing_search: int) -> None:
        self.index = index
        self.failing_search = failing_search
        self.searches = 0
        self.check_model = index.check_model
        self.get_passages = index.get_passages
        self.rows_of = index.rows_of
        self.fingerprint = index.fingerprint

    def search(self, *args: Any, **kwargs: Any) -> Any:
        self.searches += 1
        if self.searches == self.failing_search:
            raise ConnectionError("the server went away")
        return self.index.search(*args, **kwargs)


def reference_generate(
    model: Any,
    index: Any,
    input_ids: Sequence[int],
    steer: Steer,
    max_new_tokens: int,
    max_retrievals: int | None = None,
    encode_query: Callable[[list[int]], torch.Tensor] | None = None,
) -> tuple[list[int], list[tuple[int, str]]]:
    """
    Generate one row greedily, the slow way: Gen forwards the whole prefix for every token, without a cache.

    Args:
        encode_query (`Callable`, *optional*): returns the query embedding of token ids; by default it is Gen's hidden
            state.

    Returns:
        The ids of the row, and a `(column, passage id)` pair for each retrieval.
    """
    config = model.config
    ids = list(input_ids)
    trace: list[tuple[int, str]] = []
    generated = 0
    while True:
        hidden = model.gen.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        exhausted = max_retrievals is not None and len(trace) >= max_retrievals
        if ids[-1] == config.nsp_token_id and not exhausted:
            query = hidden if encode_query is None else encode_query(ids)
            if config.tie_emb_seq and model.emb_head is not None:
                query = model.emb_head(query)
            query = query[: config.truncate_dim]
            if config.similarity == "cosine":
                query = F.normalize(query, dim=-1)
            passage = index[int((index.embeddings @ query).argmax())]
            trace.append((len(ids) - 1, passage["id"]))
            ids += [*passage["input_ids"], config.cs_token_id]
            continue
        scores = steer(torch.tensor([ids]), model.gen.get_output_embeddings()(hidden)[None])[0]
        scores[config.cs_token_id] = float("-inf")
        if exhausted:
            scores[config.nsp_token_id] = float("-inf")
        ids.append(int(scores.argmax()))
        generated += 1
        if generated == max_new_tokens or ids[-1] in model.generation_config.eos_token_id:
            return ids, trace


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of prompts of different lengths, padded on the left."""
    width = max(map(len, prompts))
    input_ids, attention_mask = [], []
    for ids in prompts:
        padding = width - len(ids)
        input_ids.append([pad] * padding + list(ids))
        attention_mask.append([0] * padding + [1] * len(ids))
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(attention_mask)}


def real_tokens(output: Any, attention_mask: torch.Tensor, pad: int) -> list[list[int]]:
    """Return each row of `sequences` without padding, which the mask shows in the prompt and the pad id after it."""
    rows = []
    for sequence, mask in zip(output.sequences, attention_mask, strict=True):
        prompt = sequence[: output.prompt_length][mask.bool()]
        continuation = sequence[output.prompt_length :]
        rows.append(prompt.tolist() + continuation[continuation != pad].tolist())
    return rows


def assert_same_retrievals(traces: Sequence[Sequence[Retrieval]], expected: Sequence[Sequence[Retrieval]]) -> None:
    """Check that two batches have the same trace; scores may differ by a rounding: weights are elsewhere in memory."""
    for trace, expected_trace in zip(traces, expected, strict=True):
        for retrieval, other in zip(trace, expected_trace, strict=True):
            assert retrieval.row == other.row
            assert retrieval.position == other.position
            assert retrieval.passages == other.passages
            assert retrieval.grounded_span == other.grounded_span
            assert retrieval.scores == pytest.approx(other.scores, abs=1e-5)


class Collect(BaseStreamer):
    """A streamer that collects the tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


# ---------------------------------------------------------------------- questions and their rows


def question_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of `QUESTIONS`, padded on the left; the second ends in `[NSP]`."""
    prompts = [encode_prompt(model.tokenizer, question) for question in QUESTIONS]
    prompts[1].append(model.config.nsp_token_id)
    return left_pad(prompts, model.tokenizer.pad_token_id)


def question_steer(model: Any) -> Steer:
    """Return a processor with which all of `QUESTIONS` but the last retrieve."""
    return Steer(model, retrieve_every=7, quiet_id=model.tokenizer("!")["input_ids"][0])


def question_that_retrieves(model: Any) -> list[int]:
    """Return the token ids of a prompt that ends in `[NSP]`."""
    return [*encode_prompt(model.tokenizer, "who?"), model.config.nsp_token_id]


def generate(
    model: Any, inputs: dict[str, torch.Tensor], index: Any, *processors: LogitsProcessor, **kwargs: Any
) -> Any:
    """Generate 20 tokens and return a trace, unless `kwargs` say otherwise."""
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, **kwargs}
    return model.generate(**inputs, retriever=index, logits_processor=LogitsProcessorList(processors), **options)


def prompt_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return the `input_ids` of one row alone, without padding."""
    return {"input_ids": inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]}


def rows_of(model: Any, inputs: dict[str, torch.Tensor], output: CoSupGenerateOutput) -> list[list[int]]:
    """Return each row of the output without padding."""
    return real_tokens(output, inputs["attention_mask"], model.tokenizer.pad_token_id)


def num_retrievals(output: CoSupGenerateOutput) -> int:
    """Return the number of retrievals in all rows together."""
    return sum(map(len, output.retrievals))
