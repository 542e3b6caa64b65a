"""A passage's embedding does not depend on its batch-mates: padding side, batch size, order."""

import pytest
import torch

from modeling_cosup.packing_cosup import Packing
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.models import PASSAGES, make_model

# the usual pooling of each architecture, and every pooling in which padding could matter
CASES = [
    ("llama", "eos"),
    ("llama", "mean"),
    ("llama", "lasttoken"),
    ("gpt2", "eos"),
    ("gpt2", "mean"),
    ("mistral", "eos"),
    ("mistral", "mean"),
    ("bert", "cls"),
    ("bert", "mean"),
    ("bert", "eos"),
    ("tied", "eos"),
    ("tied", "mean"),
]


def pad(rows, side, extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), 7)  # an ordinary token
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, tokens in enumerate(rows):
        columns = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[i, columns] = torch.tensor(tokens)
        mask[i, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(embeds, expected):
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("architecture", "pooling"), CASES)
@torch.no_grad()
def test_embedding_does_not_depend_on_batch_mates(architecture, pooling, similarity):
    parts = {"tie_emb_seq": True, "emb_head_size": 24} if architecture == "tied" else {"emb_seq": architecture}
    model = make_model(
        **parts,
        emb_seq_pooling=pooling,
        similarity=similarity,
        emb_seq_add_eos_token=pooling != "lasttoken",
    )
    rows = encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES, model.config)
    assert len(set(map(len, rows))) > 3
    alone = torch.cat([model.encode_passages(torch.tensor([tokens])) for tokens in rows])  # no padding, no mask
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    order = [3, 0, 5, 1, 4, 2]
    for side in ("right", "left"):
        for extra in (0, 5):
            assert_close(model.encode_passages(**pad(rows, side, extra)), alone)
        assert_close(model.encode_passages(**pad([rows[i] for i in order], side)), alone[order])
        assert_close(model.encode_passages(**pad(rows[:2], side)), alone[:2])
    for batch_size in (1, 2, 4):
        index = model.build_index(PASSAGES, batch_size=batch_size, show_progress_bar=False)
        assert_close(index.embeddings, alone)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_eos_pooling_reads_the_eos(architecture):
    model = make_model(emb_seq=architecture, similarity="dot")
    tokens = encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES[:1], model.config)[0]
    assert tokens[-1] == model.emb_seq_tokenizer.eos_token_id
    hidden = model.emb_seq(torch.tensor([tokens])).last_hidden_state[0]
    assert_close(model.encode_passages(**pad([tokens, tokens * 2], "right"))[0], hidden[-1])


@torch.no_grad()
def test_last_token_pooling_reads_the_passage_itself():
    model = make_model(emb_seq_pooling="lasttoken", emb_seq_add_eos_token=False, similarity="dot")
    tokens = encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES[:1], model.config)[0]
    assert tokens[-1] == model.emb_seq_tokenizer(".", add_special_tokens=False)["input_ids"][0]
    hidden = model.emb_seq(torch.tensor([tokens])).last_hidden_state[0]
    assert_close(model.encode_passages(**pad([tokens, tokens * 2], "right"))[0], hidden[-1])
    length = len(tokens)
    packing = Packing(torch.arange(length).repeat(2)[None], torch.tensor([length - 1, 2 * length - 1]))
    packed = model.encode_passages(torch.tensor([tokens * 2]), packing=packing)
    assert_close(packed, hidden[-1:].expand(2, -1))


@torch.no_grad()
def test_eos_survives_truncation():
    model = make_model(max_passage_length=6)
    rows = encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES, model.config)
    bos, eos = model.emb_seq_tokenizer.bos_token_id, model.emb_seq_tokenizer.eos_token_id
    assert {(len(tokens), tokens[0], tokens[-1]) for tokens in rows} == {(8, bos, eos)}


@pytest.mark.parametrize(
    ("emb_seq", "config"),
    [("llama", {"emb_seq_kwargs": {"hidden_size": 48}}), ("gpt2", {}), ("bert", {"emb_seq_pooling": "cls"})],
)
@pytest.mark.parametrize("width", [0, 4])
def test_no_passages_still_gives_every_parameter_a_gradient(emb_seq, config, width):
    """A rank without passages takes part in every collective: its gradients are zero, not None."""
    model = make_model(emb_seq=emb_seq, **config).train()
    nothing = torch.zeros(0, width, dtype=torch.long)
    embeds = model.encode_passages(nothing, nothing)
    assert embeds.shape == (0, model.config.embedding_size)
    input_ids = torch.tensor([[5, 6, 7, 8]])
    output = model(
        input_ids,
        labels=input_ids,
        passage_input_ids=nothing,
        passage_attention_mask=nothing,
        passage_labels=torch.zeros(0, dtype=torch.long),
    )
    output.loss.backward()
    trained = [name for name, p in model.named_parameters() if name.startswith("emb_") and p.requires_grad]
    assert trained
    for name in trained:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert not gradient.any(), name
