"""The rows of a reader, what is recorded of its attention, and the targets and loss that a retriever learns from."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_passages_for_gen, encode_prompt, encode_texts
from support.generation import Prefer
from support.models import PASSAGES, make_gen, make_model
from support.readers import CE, CONFIG, CS, END, LINE_BREAK, NSP, eager_attention, eager_shares, make_row, make_rows
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer, recording
from trainer.distillation import attention_target, distillation_loss, perplexity_target
from trainer.reader_scores import answer_log_likelihoods, attention_shares, token_attention
from trainer.reading import batches_by_length, reader_row
from trainer.recording import recording_attention

PADDING = 0


@pytest.fixture(scope="module")
def reader():
    return make_gen()


def worst(values, expected):
    return (values - expected).abs().max().item()


# ---------------------------------------------------------------------- rows


def test_a_row_has_every_part_where_it_says():
    row = reader_row([1, 2], [[3, 4], [5], [6]], [7, 8], CONFIG, [LINE_BREAK], END)
    assert row.input_ids == [1, 2, NSP, 3, 4, LINE_BREAK, 5, LINE_BREAK, 6, CS, 7, 8, CE, END]
    assert row.labels == [-100, -100, NSP, *[-100] * 7, 7, 8, CE, END]
    assert [row.input_ids[start:end] for start, end in row.passage_spans] == [[3, 4], [5], [6]]
    assert row.input_ids[slice(*row.answer_span)] == [7, 8]
    assert row.input_ids[row.nsp_column] == NSP
    trained = reader_row([1, 2], [[3, 4], [5]], [7], CONFIG, [LINE_BREAK], END, train_on_passages=True)
    assert trained.labels == [-100, -100, NSP, 3, 4, LINE_BREAK, 5, -100, 7, CE, END]


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_row_is_what_generate_reads_and_writes(top_k):
    model = make_model()
    tokenizer, config = model.tokenizer, model.config
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompt = encode_prompt(tokenizer, "who painted the Night Watch?")
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        retriever=index,
        retrieval_config=RetrievalConfig(top_k=top_k, force_nsp_first=True),
        logits_processor=[Prefer([tokenizer.convert_tokens_to_ids("a")])],
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    (retrieval,) = output.retrievals[0]
    assert len(retrieval.passages) == top_k
    passages = encode_passages_for_gen(tokenizer, retrieval.passages, config)
    answer = output.sequences[0, slice(*retrieval.grounded_span)].tolist()
    row = reader_row(prompt, passages, answer, config, encode_texts(tokenizer, ["\n"])[0], END)
    assert row.answer_span == retrieval.grounded_span
    assert row.nsp_column == retrieval.position
    assert row.input_ids[: row.answer_span[1]] == output.sequences[0].tolist()


def test_what_is_no_row():
    with pytest.raises(ValueError, match="answer has no tokens"):
        reader_row([1], [[2]], [], CONFIG, [LINE_BREAK], END)
    with pytest.raises(ValueError, match="needs at least one passage"):
        reader_row([1], [], [2], CONFIG, [LINE_BREAK], END)


def test_batches_hold_rows_of_similar_length():
    assert list(batches_by_length([3, 9, 4, 1, 9], 18)) == [[1, 4], [2, 0, 3]]
    assert list(batches_by_length([3, 9], 2)) == [[1], [0]]  # longer than a batch: alone
    assert list(batches_by_length([], 18)) == []
    with pytest.raises(ValueError, match="max_tokens is 0"):
        list(batches_by_length([1], 0))


# ---------------------------------------------------------------------- recording


def record(reader, row, **options):
    start, end = row.answer_span
    rows = torch.arange(start - 1, end - 1)[None]
    with recording_attention(reader, rows) as recorded:
        reader(input_ids=torch.tensor([row.input_ids]), **options)
    return recorded.token_attention()[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_gen_has_its_attention_back(implementation, monkeypatch):
    """Flash and Flex are read with SDPA: this machine has neither, so another forward than the recorded one fails."""
    reader = make_gen()
    row = make_rows()[0]
    expected = eager_attention(reader, row)
    reader.config._attn_implementation = implementation
    assert worst(record(reader, row), expected) < 1e-5
    assert reader.config._attn_implementation == implementation
    with pytest.raises(KeyError), recording_attention(reader, torch.tensor([[3]])):
        raise KeyError
    assert reader.config._attn_implementation == implementation
    assert not reader.base_model._forward_pre_hooks


def test_a_reader_that_caps_its_scores_is_read_with_eager_attention():
    reader = make_gen("gemma2", attn_logit_softcapping=1.0)
    row = make_rows()[0]
    expected = eager_attention(reader, row)
    reader.config._attn_implementation = "flex_attention"
    assert worst(record(reader, row), expected) < 1e-5


def test_nested_and_repeated_recordings():
    first, second = make_gen(), make_gen(seed=2)
    rows = make_rows()
    expected = eager_attention(first, rows[0])
    start, end = rows[0].answer_span
    with recording_attention(first, torch.arange(start - 1, end - 1)[None]) as outer:
        first(input_ids=torch.tensor([rows[0].input_ids]))
        assert worst(record(second, rows[1]), eager_attention(second, rows[1])) < 1e-5  # of another model
        assert worst(record(first, rows[2]), eager_attention(make_gen(), rows[2])) < 1e-5  # of the same model
        assert worst(outer.token_attention()[0], expected) < 1e-5
        first(input_ids=torch.tensor([rows[0].input_ids[::-1]]))
        assert worst(outer.token_attention()[0], expected) > 1e-3
        first(input_ids=torch.tensor([rows[0].input_ids]))
        assert worst(outer.token_attention()[0], expected) < 1e-5  # of the last forward, not of all
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


def test_recording_changes_no_output(reader):
    ids = torch.tensor([make_rows()[0].input_ids])
    expected = reader(input_ids=ids).logits
    with recording_attention(reader, torch.tensor([[3]])):
        assert torch.equal(reader(input_ids=ids).logits, expected)


def test_compiled_layers(reader):
    compiled = make_gen(layers=1)
    rows = make_rows()
    shares, log_likelihoods = (
        attention_shares(compiled, rows, PADDING),
        answer_log_likelihoods(compiled, rows, PADDING),
    )
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled.model.layers[0].compile(backend=backend, dynamic=True)
    assert torch.equal(attention_shares(compiled, rows, PADDING), shares)
    assert torch.equal(answer_log_likelihoods(compiled, rows, PADDING), log_likelihoods)
    assert not calls  # no reading is compiled
    compiled(input_ids=torch.tensor([rows[0].input_ids]), use_cache=False)
    assert calls


def test_gradient_checkpointing_runs_layers_twice():
    reader = make_gen()
    row = make_rows()[0]
    expected = eager_attention(reader, row)
    reader.gradient_checkpointing_enable()
    start, end = row.answer_span
    with recording_attention(reader.train(), torch.arange(start - 1, end - 1)[None]) as recorded:
        ids = torch.tensor([row.input_ids])
        reader(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert worst(recorded.token_attention()[0], expected) < 1e-5
    assert not recorded.token_attention().requires_grad
    assert worst(attention_shares(reader, [row], PADDING)[0], eager_shares(make_gen(), row)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_reader_inside_a_cosup_model_and_peft(tied):
    model = make_model(tie_emb_seq=tied)
    rows = make_rows()
    shares, log_likelihoods = attention_shares(model, rows, PADDING), answer_log_likelihoods(model, rows, PADDING)
    assert worst(shares[0, :3], eager_shares(make_gen(), rows[0])) < 1e-5
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = eager_shares(adapted.gen, rows[0])
    assert worst(attention_shares(adapted, rows[:1], PADDING)[0], expected) < 1e-5
    assert worst(expected, shares[0, :3]) > 1e-2  # the adapters count
    with adapted.disable_adapter():
        assert worst(attention_shares(adapted, rows, PADDING), shares) < 1e-6
        assert worst(answer_log_likelihoods(adapted, rows, PADDING), log_likelihoods) < 1e-6


def test_half_precision_gives_float32_scores():
    rows = make_rows()
    single = attention_shares(make_gen(), rows, PADDING)
    reader = make_gen().bfloat16()
    for shares in (attention_shares(reader, rows, PADDING), autocast_shares(rows)):
        assert shares.dtype == torch.float32
        assert worst(shares, single) < 0.05
    log_likelihoods = answer_log_likelihoods(reader, rows, PADDING)
    assert log_likelihoods.dtype == torch.float32
    assert log_likelihoods.isfinite().all()


def autocast_shares(rows):
    with torch.autocast("cpu", torch.bfloat16):
        return attention_shares(make_gen(), rows, PADDING)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return output


def test_no_tensor_of_t_times_t_and_no_more_rows_than_a_chunk(monkeypatch):
    reader = make_gen()
    row = make_row(10, (180, 180), 20)
    whole = attention_shares(reader, [row], PADDING)
    with LargestTensor() as tensors:
        attention_shares(reader, [row], PADDING)
    length = row.answer_span[1] - 1  # tokens that are read
    assert 4 * 20 * length <= tensors.largest < length**2  # the weights of 20 answer rows for 4 heads
    monkeypatch.setattr(recording, "CHUNK_SIZE", 3 * 4 * length)
    with LargestTensor() as tensors:
        chunked = attention_shares(reader, [row], PADDING)
    assert tensors.largest < 4 * 20 * length
    assert worst(chunked, whole) < 1e-6


def test_an_instance_without_an_answer_row_attends_to_nothing(reader):
    ids = torch.tensor([make_rows()[0].input_ids] * 2)
    with recording_attention(reader, torch.tensor([[9, 8], [-1, -1]])) as recorded:
        reader(input_ids=ids)
    attention = recorded.token_attention()
    assert attention[0].any()
    assert not attention[1].any()


# ---------------------------------------------------------------------- what cannot be recorded


@pytest.mark.parametrize("architecture", ["gptj", "bloom", "mamba"])
def test_an_architecture_that_computes_attention_itself(architecture):
    gen = make_gen(architecture)
    with pytest.raises(ValueError, match="lacks _supports_attention_backend.*perplexity_distillation"):
        attention_shares(gen, make_rows(), PADDING)
    assert answer_log_likelihoods(gen, make_rows(), PADDING).isfinite().all()


def test_a_training_refuses_a_reader_before_it_starts(tmp_path):
    model = make_model("gptj")
    asked, corpus = questions(NAMES[:8])
    perplexity = {"supervision": "perplexity_distillation"}
    for options in ({"supervision": "attention_distillation"}, {**perplexity, "log_indicators": True}):
        with pytest.raises(ValueError, match="GPTJForCausalLM computes attention itself"):
            CoSupTrainer(model, arguments(tmp_path, **options), train_dataset=asked, corpus=corpus)
    CoSupTrainer(model, arguments(tmp_path, **perplexity), train_dataset=asked, corpus=corpus)


def test_packed_rows(reader):
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        with recording_attention(reader, torch.tensor([[1]])):
            reader(**packed)
    reader(**packed)  # outside, packing is allowed


def test_forwards_that_do_not_fit(reader):
    ids = torch.tensor([[5, 6, 7]])
    cache = reader(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a KV cache"), recording_attention(reader, torch.tensor([[0]])):
        reader(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="has 2 rows, expected one for each of 1"):
        with recording_attention(reader, torch.tensor([[0], [1]])):
            reader(input_ids=ids)
    with pytest.raises(ValueError, match="position 3, and the forward has 3 tokens"):
        with recording_attention(reader, torch.tensor([[3]])):
            reader(input_ids=ids)
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(1,\)"), recording_attention(reader, torch.ones(1)):
        pass
    with recording_attention(reader, torch.tensor([[0]])) as recorded:
        pass
    with pytest.raises(ValueError, match="No attention was recorded"):
        recorded.token_attention()


def test_an_unknown_attention_implementation():
    reader = make_gen()
    reader.config._attn_implementation = "of_a_user"
    with pytest.raises(ValueError, match="'of_a_user' cannot be recorded"):
        attention_shares(reader, make_rows(), PADDING)
    assert reader.config._attn_implementation == "of_a_user"


def test_scores_that_are_not_finite():
    reader = make_gen("mistral", sliding_window=4)
    near = make_row(3, (5, 5), 1)
    far = replace(near, passage_spans=[(4, 6)])  # [Cs] sees no passage
    with pytest.raises(FloatingPointError, match=r"of row 1 are NaN or infinite \(1 of 2 rows\).*sees a passage"):
        attention_shares(reader, [near, far], PADDING)
    assert attention_shares(reader, [near], PADDING).isfinite().all()
    broken = make_gen()
    broken.lm_head.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="log-likelihoods of the answer of instance 'a'"):
        answer_log_likelihoods(broken, make_rows(), PADDING, names=[f"instance {name!r}" for name in "abcd"])
    with pytest.raises(ValueError, match="reduction is 'none'"):
        answer_log_likelihoods(reader, [near], PADDING, reduction="none")


def test_nothing_to_read(reader):
    assert attention_shares(reader, [], PADDING).shape == (0, 0)
    assert answer_log_likelihoods(reader, [], PADDING).shape == (0, 0)
    assert token_attention(reader, [], PADDING) == []


# ---------------------------------------------------------------------- targets

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
SCORES = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.25, 0.75, 9.0]])


def test_attention_targets():
    sharp = attention_target(SCORES, MASK, 0.1)
    assert worst(sharp[0], torch.tensor([5.0, 3.0, 2.0]).softmax(0)) < 1e-6
    assert sharp[1].tolist() == [1, 0, 0]  # one passage
    assert worst(sharp[2], torch.tensor([*torch.tensor([2.5, 7.5]).softmax(0), 0.0])) < 1e-6
    raw = attention_target(SCORES, MASK, None)
    assert worst(raw, torch.tensor([[0.5, 0.3, 0.2], [1, 0, 0], [0.25, 0.75, 0]])) < 1e-6


def test_perplexity_targets():
    log_likelihoods = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0], [-1.0, -1.5, 0.0]])
    target = perplexity_target(log_likelihoods, MASK, 0.5)
    assert worst(target[0], torch.tensor([-2.0, -4.0, -6.0]).softmax(0)) < 1e-6
    assert target[1].tolist() == [1, 0, 0]
    assert target[2, 2] == 0
    without = perplexity_target(log_likelihoods, MASK, 0.5, "leave_one_out")
    assert worst(without[0], torch.tensor([2.0, 4.0, 6.0]).softmax(0)) < 1e-6  # the last one is missed most
    assert worst(perplexity_target(log_likelihoods, MASK, None)[0], torch.tensor([-1.0, -2.0, -3.0]).softmax(0)) < 1e-6


def test_the_gradient_of_emdr():
    torch.manual_seed(0)
    scores = torch.randn(3, 3, requires_grad=True)
    log_likelihoods = 3 * torch.randn(3, 3)  # sums over the answer's tokens
    log_probs = scores.masked_fill(~MASK, -torch.inf).log_softmax(-1)
    emdr = -(log_probs + log_likelihoods).masked_fill(~MASK, -torch.inf).logsumexp(-1).sum()
    (expected,) = torch.autograd.grad(emdr, scores)
    student = scores.masked_fill(~MASK, -torch.inf).log_softmax(-1)
    target = perplexity_target(log_likelihoods, MASK, None, "emdr", student)
    (gradient,) = torch.autograd.grad(distillation_loss(scores, target, MASK).sum(), scores)
    assert worst(gradient, expected) < 1e-6
    assert gradient.abs().max() > 0.1
    softer = perplexity_target(log_likelihoods, MASK, 2.0, "emdr", student)
    assert worst(softer[0], (student[0] + log_likelihoods[0] / 2).softmax(0)) < 1e-6  # the prior is not softened
    with pytest.raises(ValueError, match="needs student_log_probs"):
        perplexity_target(log_likelihoods, MASK, None, "emdr")


def test_what_is_no_target():
    for broken in (torch.nan, torch.inf):
        scores = SCORES.clone()
        scores[2, 1] = broken
        for target in (attention_target(SCORES, MASK, 0.1), attention_target(SCORES, MASK, None)):
            assert target.isfinite().all()  # the 9 outside of the mask does no harm
        for temperature in (0.1, None):
            with pytest.raises(FloatingPointError, match="attention shares of row 2"):
                attention_target(scores, MASK, temperature)
        with pytest.raises(FloatingPointError, match="log-likelihoods of the answer of row 2"):
            perplexity_target(scores, MASK, 0.1)
    with pytest.raises(ValueError, match="Row 1 has no passages"):
        attention_target(SCORES, MASK & torch.tensor([[True], [False], [True]]), None)
    with pytest.raises(ValueError, match="temperature is 0, expected a positive number"):
        attention_target(SCORES, MASK, 0)
    with pytest.raises(ValueError, match="kind is 'loo', expected one of perplexity, leave_one_out, emdr"):
        perplexity_target(SCORES, MASK, 0.1, "loo")


# ---------------------------------------------------------------------- loss


def test_the_loss_is_the_divergence_of_each_query():
    torch.manual_seed(0)
    scores = torch.randn(3, 3, requires_grad=True)
    target = attention_target(SCORES, MASK, 0.1).requires_grad_()
    losses = distillation_loss(scores, target, MASK)
    for i in range(3):
        kept = MASK[i]
        expected = F.kl_div(scores[i, kept].log_softmax(0), target[i, kept], reduction="sum")
        assert losses[i].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses[1].item() == 0  # nothing to choose from
    losses.sum().backward()
    assert target.grad is None
    assert scores.grad.isfinite().all()
    assert not scores.grad[~MASK].any()
    probs = scores.detach().masked_fill(~MASK, -torch.inf).softmax(-1)
    assert worst(scores.grad, probs - target.detach()) < 1e-6


def test_the_loss_is_zero_at_the_target_and_has_a_graph_without_queries():
    target = attention_target(SCORES, MASK, 0.1)
    assert worst(distillation_loss(target.log(), target, MASK), 0.0) < 1e-6
    scores = torch.zeros(0, 3, requires_grad=True)
    empty = distillation_loss(scores, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    assert empty.shape == (0,)
    empty.sum().backward()
    half = distillation_loss(target.log().clamp(min=-9).bfloat16(), target, MASK)
    assert half.dtype == torch.float32
