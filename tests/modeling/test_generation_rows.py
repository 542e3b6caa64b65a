"""Rows of a batch: they end and leave, processors see each one alone, and a failed search keeps the finished ones."""

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import RepetitionPenaltyLogitsProcessor

from modeling_cosup import RetrievalConfig, RetrievalError
from modeling_cosup.tokenization_cosup import encode_prompt, encode_texts
from support.generation import (
    BreakingIndex,
    Collect,
    Prefer,
    Steer,
    generate,
    left_pad,
    prompt_of,
    question_inputs,
    question_steer,
    rows_of,
)
from support.models import PASSAGES, make_model, make_tokenizer

# ------------------------------------------------------------------ rows that leave


def test_an_ended_row_is_padded_and_stays_as_it_was(model, inputs, index, steer):
    steer.end_every = 6
    output = generate(model, inputs, index, steer)
    ends = set(model.generation_config.eos_token_id)
    prompt_lengths = inputs["attention_mask"].sum(1).tolist()
    counts = output.num_generated_tokens.tolist()
    assert min(counts) < max(counts)
    for ids, count, prompt_length in zip(rows_of(model, inputs, output), counts, prompt_lengths, strict=True):
        assert (ids[-1] in ends) == (count < 20)
        assert not set(ids[prompt_length:-1]) & ends


def test_finished_rows_leave_the_batch(model, inputs, index, steer):
    steer.end_every = 6
    shapes = []
    model.gen.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    output = generate(model, inputs, index, steer)
    steps = [rows for rows, width in shapes if width == 1]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 1
    # the first token of a row is decided after the prefill, and its last one is not forwarded
    assert sum(steps) == sum(count - 1 for count in output.num_generated_tokens.tolist())


# ------------------------------------------------------------------ processors and criteria


def test_stopping_criteria_see_each_row_without_gaps(model, inputs, index, steer):
    word = encode_texts(model.tokenizer, ["a"])[0][0]

    class EndsInWord(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == word

    processors = [steer, Prefer([word], 3.0)]
    criteria = StoppingCriteriaList([EndsInWord()])
    output = generate(model, inputs, index, *processors, stopping_criteria=criteria)
    assert min(output.num_generated_tokens.tolist()) < 20
    for row, ids in enumerate(rows_of(model, inputs, output)):
        alone = generate(model, prompt_of(inputs, row), index, *processors, stopping_criteria=criteria)
        assert alone.sequences[0].tolist() == ids


def test_processors_see_the_whole_batch_in_order(model, inputs, index, steer):
    steer.end_every = 6
    letters = [encode_texts(model.tokenizer, [letter])[0][0] for letter in "abcde"]
    num_rows = set()

    class OneLetterPerRow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            num_rows.add(input_ids.shape[0])
            scores = scores.clone()
            scores[torch.arange(5), letters] += 100.0
            return scores

    output = generate(model, inputs, index, steer, OneLetterPerRow())
    assert num_rows == {5}
    assert len(set(output.num_generated_tokens.tolist())) > 2
    assert_one_letter_per_row(model, output, letters)


def assert_one_letter_per_row(model, output, letters):
    """Check that each row generated only its letter, `[NSP]` and the end."""
    others = {model.config.nsp_token_id, *model.generation_config.eos_token_id, model.tokenizer.pad_token_id}
    for letter, ids, trace in zip(letters, output.sequences.tolist(), output.retrievals, strict=True):
        written = set()
        position = output.prompt_length
        for retrieval in trace:
            written |= set(ids[position : retrieval.position + 1])
            position = retrieval.grounded_span[0]
        written |= set(ids[position:])
        assert written <= {letter, *others}


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (4, 3.0)},
        {"begin_suppress_tokens": [22, 232]},
        {"min_new_tokens": 9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_that_count_do_not_count_passages(model, inputs, index, steer, options):
    """A batch in which rows retrieve different amounts equals its rows alone, and the option makes a difference."""
    bonus = 500.0 if "min_new_tokens" in options else 1.0
    processors = [steer, Prefer(model.generation_config.eos_token_id, bonus)]
    output = generate(model, inputs, index, *processors, **options)
    rows = rows_of(model, inputs, output)
    counts = output.num_generated_tokens.tolist()
    assert len(set(map(len, output.retrievals))) > 1
    for row, ids in enumerate(rows):
        alone = generate(model, prompt_of(inputs, row), index, *processors, **options)
        assert alone.sequences[0].tolist() == ids
    if "forced_eos_token_id" in options:
        assert counts == [20] * 5
        assert [ids[-1] for ids in rows] == [5] * 5
    if "min_new_tokens" in options:
        assert min(counts) > 9
    without_option = generate(model, inputs, index, *processors)
    assert rows != rows_of(model, inputs, without_option)


@pytest.mark.parametrize("ignored", [None, 0, 15, 23, torch.tensor([23, 15, 20, 0, 22])], ids=str)
def test_a_repetition_penalty_leaves_out_the_same_as_of_the_row_alone(model, inputs, index, steer, ignored):
    """`ignored` counts columns of the padded prompts, of which there are 23."""
    assert inputs["input_ids"].shape == (5, 23)
    penalty = RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=ignored)
    rows = rows_of(model, inputs, generate(model, inputs, index, steer, penalty))
    assert penalty.prompt_ignore_length is ignored  # as it was given
    columns = torch.zeros(5, dtype=torch.long) if ignored is None else torch.as_tensor(ignored).expand(5)
    num_tokens = (columns - (inputs["attention_mask"] == 0).sum(1)).clamp(min=0).tolist()
    for row, count in enumerate(num_tokens):

        def reference(ids, scores, count=count):
            return RepetitionPenaltyLogitsProcessor(3.0)(ids[:, count:], scores)

        alone = generate(model, prompt_of(inputs, row), index, steer, reference)
        assert alone.sequences[0].tolist() == rows[row]


def test_prefix_allowed_tokens_know_their_row(model, inputs, index, steer):
    letters = [encode_texts(model.tokenizer, [letter])[0][0] for letter in "abcde"]
    nsp, ends = model.config.nsp_token_id, model.generation_config.eos_token_id
    steer.end_every = 6

    def allowed_tokens(row, ids):
        return [letters[row], nsp, *ends]

    output = generate(model, inputs, index, steer, prefix_allowed_tokens_fn=allowed_tokens)
    assert len(set(output.num_generated_tokens.tolist())) > 2
    assert_one_letter_per_row(model, output, letters)


# ------------------------------------------------------------------ a search that fails, queries that are too long


def test_a_failed_search_keeps_the_finished_rows(model, inputs, index, steer):
    steer.end_every = 6
    expected = rows_of(model, inputs, generate(model, inputs, index, steer))
    with pytest.raises(RetrievalError, match="the server went away") as error:
        generate(model, inputs, BreakingIndex(index, failing_search=3), steer)
    assert error.value.finished
    for row in error.value.finished:
        assert row.ids == expected[row.number]


def test_a_failed_search_ends_the_stream(model, inputs, index):
    streamer = Collect()
    eager = Prefer([model.config.nsp_token_id])
    one_row = {"input_ids": inputs["input_ids"][1:2]}
    with pytest.raises(RetrievalError):
        generate(model, one_row, BreakingIndex(index, failing_search=3), eager, streamer=streamer)
    assert streamer.ended  # a thread that reads from it does not wait forever


def test_an_encoder_that_fails_keeps_the_finished_rows():
    model = make_model(query_from="emb_seq").eval()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    inputs, steer = question_inputs(model), question_steer(model)
    steer.end_every = 7
    calls = []
    model.emb_seq.register_forward_pre_hook(lambda module, args: calls.append(module))
    expected = rows_of(model, inputs, generate(model, inputs, index, steer))
    last_call = len(calls)
    calls.clear()

    def fail_at_the_last(module, args):
        if len(calls) == last_call:
            raise torch.OutOfMemoryError("no room for the encoder")

    model.emb_seq.register_forward_pre_hook(fail_at_the_last)
    with pytest.raises(RetrievalError, match="no room for the encoder") as error:
        generate(model, inputs, index, steer)
    assert error.value.finished
    for row in error.value.finished:
        assert row.ids == expected[row.number]


@pytest.mark.parametrize("shared", [True, False])
def test_queries_of_a_long_answer_keep_changing(shared):
    """The encoder has 40 positions. Every query is its end, which changes with each retrieval of the answer."""
    tokenizer = make_tokenizer()
    emb_seq_tokenizer = None if shared else make_tokenizer(bos="<cls>", eos="<sep>", texts=["others"])
    model = make_model(
        "llama",
        "gpt2",
        tokenizer=tokenizer,
        emb_seq_tokenizer=emb_seq_tokenizer,
        emb_seq_kwargs={"max_position_embeddings": 40},
        query_from="emb_seq",
        max_passage_length=20,
    ).eval()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    rows = []
    for end in ("painted?", "radium?"):
        rows.append([*encode_prompt(tokenizer, f"{'Words that come first. ' * 5}{end}"), model.config.nsp_token_id])
    inputs = left_pad(rows, tokenizer.pad_token_id)
    steer = Steer(model, retrieve_every=2)
    settings = RetrievalConfig(no_repeat_passages=True, max_retrievals=5, output_query_embeds=True)
    output = generate(model, inputs, index, steer, retrieval_config=settings, max_new_tokens=30)
    assert output.retrievals[0][0].query_embed != pytest.approx(output.retrievals[1][0].query_embed, abs=1e-3)
    for trace in output.retrievals:
        assert len({tuple(retrieval.query_embed) for retrieval in trace}) == 5


class Unreached(LogitsProcessor):
    """A processor that no decision reaches."""

    def __call__(self, input_ids, scores):
        raise AssertionError("a token is decided")


def test_a_row_that_must_search_needs_a_retriever(model, inputs):
    """It is refused before anything is generated, not at its first search."""
    two_rows = {"input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"][:2]}
    config = RetrievalConfig(passages=[[PASSAGES[0]], None])
    with pytest.raises(ValueError, match="passages is None for prompt 1, which must search: pass a retriever"):
        generate(model, two_rows, None, Unreached(), retrieval_config=config)
    never = RetrievalConfig(passages=[[PASSAGES[0]], None], forbid_nsp=True)
    assert len(generate(model, two_rows, None, retrieval_config=never).sequences) == 2
