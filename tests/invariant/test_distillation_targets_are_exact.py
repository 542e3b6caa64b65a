"""
Attention shares == eager attention × ‖v‖; log-likelihoods == the NTP loss of each passage alone; whatever the batch.

No gradient reaches the reader through either.
"""

import pytest
import torch

from support.models import ARCHITECTURES, make_gen, make_model
from support.readers import CE, CS, END, LINE_BREAK, NSP, eager_attention, eager_shares, make_row, make_rows
from trainer.distillation import attention_target, distillation_loss, perplexity_target
from trainer.reader_scores import answer_log_likelihoods, attention_shares, token_attention
from trainer.recording import recording_attention

# windows are shorter than the rows, of 18 to 45 tokens; a cap of 1 flattens most scores
READERS = {
    "llama": {"num_key_value_heads": 4, "layers": 3},
    "grouped llama": {},
    "eager llama": {"attn_implementation": "eager"},
    "mistral": {"sliding_window": 16},
    "phi3": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 1.0},
    "gemma3": {"sliding_window": 16},
    "gpt2": {},
    "qwen3": {},
    "mixtral": {},
}
PADDING = 0


def make_reader(name):
    return make_gen(name.split()[-1], **READERS[name])


@pytest.fixture(scope="module", params=READERS)
def reader(request):
    return make_reader(request.param)


def worst(values, expected):
    return (values - expected).abs().max().item()


def test_shares_equal_eager_attention(reader):
    rows = make_rows()
    shares = attention_shares(reader, rows, PADDING)
    attention = token_attention(reader, rows, PADDING)
    for i, row in enumerate(rows):
        expected = eager_shares(reader, row)
        assert worst(shares[i, : len(expected)], expected) < 1e-5
        assert not shares[i, len(expected) :].any()
        assert worst(attention[i], eager_attention(reader, row)[: row.answer_span[1] - 1]) < 1e-5
    assert shares.dtype == torch.float32
    assert worst(shares.sum(1), 1.0) < 1e-6


def test_shares_do_not_depend_on_the_batch(reader):
    rows = make_rows() + make_rows(seed=1)
    alone = attention_shares(reader, rows, PADDING, max_tokens=1)
    assert worst(attention_shares(reader, rows, PADDING), alone) < 1e-6
    assert worst(attention_shares(reader, rows[::-1], PADDING, max_tokens=100), alone.flip(0)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_padding_on_the_left_with_a_mask(name):
    reader = make_reader(name)
    rows = make_rows()
    width = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    answer_rows = torch.full((len(rows), 5), -1)
    for i, row in enumerate(rows):
        shift = width - len(row.input_ids)
        ids[i, shift:] = torch.tensor(row.input_ids)
        start, end = row.answer_span
        answer_rows[i, : end - start] = torch.arange(start - 1, end - 1) + shift
    mask = torch.tensor([[0] * (width - len(row.input_ids)) + [1] * len(row.input_ids) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with recording_attention(reader, answer_rows) as recorded:
        reader(input_ids=ids, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        shift = width - len(row.input_ids)
        assert worst(recorded.token_attention()[i, shift:], eager_attention(reader, row)) < 1e-5
        assert not recorded.token_attention()[i, :shift].any()


def test_attention_sinks_are_read_with_eager_attention(monkeypatch):
    monkeypatch.setitem(
        ARCHITECTURES,
        "gpt_oss",
        {
            **{"num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8, "sliding_window": 16},
            **{"num_local_experts": 2, "num_experts_per_tok": 1},
        },
    )
    reader = make_gen("gpt_oss")
    row = make_rows()[0]
    assert worst(attention_shares(reader, [row], PADDING)[0], eager_shares(reader, row)) < 1e-5
    reader.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attention sinks \(s_aux\), .*attn_implementation='eager'"):
        attention_shares(reader, [row], PADDING)


def test_layers_without_attention_do_not_count():
    reader = make_gen("recurrent_gemma")  # one layer of two
    rows = make_rows()
    alone = attention_shares(reader, rows, PADDING, max_tokens=1)
    assert worst(attention_shares(reader, rows, PADDING), alone) < 1e-6
    assert alone.isfinite().all()


# ---------------------------------------------------------------------- log-likelihoods


def loss_of(model, row, passages):
    """The NTP loss of the answer and [CE] after a prompt and `passages`, one row of a batch of its own."""
    prompt = row.input_ids[: row.nsp_column + 1]
    start, end = row.answer_span
    answer = row.input_ids[start : end + 1]
    read = []
    for number, passage in enumerate(passages):
        first, last = row.passage_spans[passage]
        read += ([LINE_BREAK] if number else []) + row.input_ids[first:last]
    ids = [*prompt, *read, CS, *answer, END]
    labels = [-100] * (len(ids) - len(answer) - 1) + [*answer, -100]
    assert (prompt[-1], answer[-1]) == (NSP, CE)
    output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), output_query_embeds=False)
    return output.ntp_loss.item(), len(answer)


@pytest.mark.parametrize("gen", ["llama", "mistral", "gemma2", "gpt2", "gptj"])  # gptj makes its masks itself
def test_log_likelihoods_equal_the_ntp_loss(gen):
    model = make_model(gen, gen_kwargs={"sliding_window": 8} if gen in ("mistral", "gemma2") else None)
    rows = make_rows()
    mean = answer_log_likelihoods(model, rows, PADDING)
    total = answer_log_likelihoods(model, rows, PADDING, reduction="sum", max_tokens=90)
    without = answer_log_likelihoods(model, rows, PADDING, leave_one_out=True)
    for i, row in enumerate(rows):
        numbers = range(len(row.passage_spans))
        for k in numbers:
            loss, count = loss_of(model, row, [k])
            assert abs(mean[i, k].item() + loss) < 1e-5
            assert abs(total[i, k].item() + loss * count) < 1e-4
            loss, _ = loss_of(model, row, [number for number in numbers if number != k])
            assert abs(without[i, k].item() + loss) < 1e-5
        assert not mean[i, len(numbers) :].any()


@pytest.mark.parametrize("gen", ["llama", "mistral"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_log_likelihoods_depend_neither_on_batch_nor_cache(gen, leave_one_out):
    reader = make_gen(gen)
    rows = make_rows() + make_rows(seed=1)
    options = {"leave_one_out": leave_one_out}
    alone = answer_log_likelihoods(reader, rows, PADDING, max_tokens=1, share_prompts=False, **options)
    for max_tokens in (1, 60, 8192):
        assert worst(answer_log_likelihoods(reader, rows, PADDING, max_tokens, **options), alone) < 2e-6


def test_padding_needs_no_position_that_gen_lacks():
    """A long prompt with a short passage is padded to the length of a short one's long passage."""
    reader = make_gen("gpt2", max_position_embeddings=40)
    rows = [make_row(30, (2, 3), 2), make_row(4, (25, 28), 2)]
    alone = answer_log_likelihoods(reader, rows, PADDING, max_tokens=1, share_prompts=False)
    assert worst(answer_log_likelihoods(reader, rows, PADDING), alone) < 2e-6


def test_a_prompt_is_read_once():
    reader = make_gen()
    rows = [make_row(40, (3, 3, 3, 3), 2), make_row(40, (3, 3, 3, 3), 2, seed=1)]
    forwarded = []
    hook = reader.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answer_log_likelihoods(reader, rows, PADDING)
    hook.remove()
    assert forwarded == [2 * 41, 8 * 6]  # prompts with [NSP]; passage, [Cs] and two tokens of the answer


# ---------------------------------------------------------------------- gradients


def test_no_gradient_reaches_the_reader():
    reader = make_gen().train()
    rows = make_rows()[:1] + make_rows(seed=1)[:1]
    mask = torch.ones(2, 3, dtype=torch.bool)
    student_scores = torch.randn(2, 3, requires_grad=True)
    for target in (
        attention_target(attention_shares(reader, rows, PADDING), mask, 0.02),
        perplexity_target(answer_log_likelihoods(reader, rows, PADDING), mask, 0.1),
    ):
        assert not target.requires_grad
        distillation_loss(student_scores, target, mask).sum().backward()
    assert student_scores.grad.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in reader.parameters())
    assert reader.training  # as it was
