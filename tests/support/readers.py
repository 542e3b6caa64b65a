"""Rows for a reader, and a slow reference of what it thinks of their passages: eager attention, one row at a time."""

import random
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from transformers import DynamicCache, PreTrainedModel

from trainer.reading import ReaderRow, reader_row

NSP, CS, CE, END, LINE_BREAK = 390, 391, 392, 393, 394
CONFIG = SimpleNamespace(nsp_token_id=NSP, cs_token_id=CS, ce_token_id=CE)
# tokens of prompt, passages and answer: one passage, passages and answers of one token, different numbers of passages
SHAPES = ((5, (7, 1, 9), 3), (9, (4,), 1), (2, (12, 6), 5), (30, (1, 1, 1, 1), 2))


def make_row(prompt: int, passages: Sequence[int], answer: int, seed: int = 0) -> ReaderRow:
    """Return a row of random tokens with parts of these lengths."""
    rng = random.Random(f"{prompt} {passages} {answer} {seed}")
    parts = [[rng.randrange(5, 380) for _ in range(length)] for length in (prompt, *passages, answer)]
    return reader_row(parts[0], parts[1:-1], parts[-1], CONFIG, [LINE_BREAK], END)


def make_rows(seed: int = 0) -> list[ReaderRow]:
    """Return rows of all `SHAPES`."""
    return [make_row(*shape, seed) for shape in SHAPES]


@torch.no_grad()
def eager_attention(gen: PreTrainedModel, row: ReaderRow) -> torch.Tensor:
    """Return α_t·‖v_t‖ of each token of a row, `(T,)`, from `output_attentions` and the values of the KV cache."""
    implementation = gen.config.get_text_config()._attn_implementation
    gen.set_attn_implementation("eager")
    cache = DynamicCache()  # without a config, no layer forgets what is outside of its window
    ids = torch.tensor([row.input_ids])
    output = gen.base_model(input_ids=ids, past_key_values=cache, output_attentions=True)
    gen.set_attn_implementation(implementation)
    start, end = row.answer_span
    layers = []
    for weights, layer in zip(output.attentions, cache.layers, strict=True):
        norms = layer.values[0].norm(dim=-1)  # (H', T)
        norms = norms.repeat_interleave(weights.shape[1] // len(norms), 0)  # (H, T)
        layers.append((weights[0, :, start - 1 : end - 1] * norms[:, None]).mean((0, 1)))
    return torch.stack(layers).mean(0)


def eager_shares(gen: PreTrainedModel, row: ReaderRow) -> torch.Tensor:
    """Return the share of each passage of a row in the attention, `(K,)`."""
    attention = eager_attention(gen, row)
    scores = torch.stack([attention[start:end].sum() for start, end in row.passage_spans])
    return scores / scores.sum()
