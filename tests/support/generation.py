"""Generation under test: a processor that makes random models retrieve, and the slow reference that a fast loop must equal."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor


class Steer(LogitsProcessor):
    """
    Makes a random model retrieve at different steps, in some rows several times, in others never.

    The rule reads nothing but the row's own tokens (its last one, how many there are, and whether it holds `quiet_id`), so it means the
    same for a row alone, a row of a padded batch and a recompute of the whole prefix.
    """

    def __init__(self, model, retrieve_every=7, end_every=None, quiet_id=-1):
        self.nsp, self.pad = model.config.nsp_token_id, model.generation_config.pad_token_id
        self.ends = model.generation_config.eos_token_id
        self.retrieve_every, self.end_every, self.quiet_id = retrieve_every, end_every, quiet_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.pad] = float("-inf")  # else real pad tokens could not be told from padding
        for row, ids in enumerate(input_ids):
            clock = 31 * int(ids[-1]) + int((ids != self.pad).sum())
            if clock % self.retrieve_every == 0 and not (ids == self.quiet_id).any():
                scores[row, self.nsp] += 1000
            if self.end_every and clock % self.end_every == 1:
                scores[row, self.ends] += 2000
        return scores


def reference_generate(model, index, input_ids, steer, max_new_tokens, max_retrievals=None, encode_query=None):
    """Greedy generation of one row the slow way: the whole prefix through Gen for every token, no cache. Its ids, and (column, passage id) pairs."""
    config, ids, trace, generated = model.config, list(input_ids), [], 0
    while True:
        hidden = model.gen.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        exhausted = max_retrievals is not None and len(trace) >= max_retrievals
        if ids[-1] == config.nsp_token_id and not exhausted:
            query = hidden if encode_query is None else encode_query(ids)
            query = F.normalize(query, dim=-1) if config.similarity == "cosine" else query
            passage = index[int((index.embeddings @ query).argmax())]
            trace.append((len(ids) - 1, passage["id"]))
            ids += passage["input_ids"] + [config.cs_token_id]
            continue
        scores = steer(torch.tensor([ids]), model.gen.get_output_embeddings()(hidden)[None])[0]
        scores[[config.cs_token_id] + [config.nsp_token_id] * exhausted] = float("-inf")
        ids.append(int(scores.argmax()))
        generated += 1
        if generated == max_new_tokens or ids[-1] in model.generation_config.eos_token_id:
            return ids, trace


def left_pad(prompts, pad):
    """`input_ids` and `attention_mask` of prompts of different lengths, padded on the left."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def real_tokens(output, attention_mask, pad):
    """Each row of `sequences` as a list without padding (the prompt's by its mask, on the right by the pad id)."""
    rows = []
    for sequence, mask in zip(output.sequences, attention_mask, strict=True):
        prompt, continuation = sequence[: output.prompt_length][mask.bool()], sequence[output.prompt_length :]
        rows.append(prompt.tolist() + continuation[continuation != pad].tolist())
    return rows


def assert_same_retrievals(found, expected):
    """Two traces of a batch: the same passages at the same places; scores may differ by a rounding (weights lie elsewhere in memory)."""
    for ours, theirs in zip(found, expected, strict=True):
        for first, second in zip(ours, theirs, strict=True):
            assert (first.row, first.position, first.passages, first.grounded_span) == (
                second.row,
                second.position,
                second.passages,
                second.grounded_span,
            )
            assert first.scores == pytest.approx(second.scores, abs=1e-5)
