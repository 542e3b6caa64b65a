"""generate_many(): the answers of generate(), a batch that stays full, and an output file that survives anything."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation import MaxTimeCriteria, RepetitionPenaltyLogitsProcessor

from modeling_cosup import Completion, RetrievalConfig, RetrievalError, decoding_cosup, room_cosup
from modeling_cosup.cache_cosup import rounded
from modeling_cosup.tokenization_cosup import encode_prompt
from support.forks import run_forked
from support.generation import BreakingIndex, Steer, left_pad, real_tokens
from support.models import PASSAGES, make_model, make_tokenizer

WORDS = ["who", "painted", "the Night Watch", "in Amsterdam", "Curie"]
WORDS += ["radium", "when", "was it", "Warsaw", "a physicist"]


def question(i):
    """Return a question of one to four phrases."""
    words = [WORDS[(i * k) % 10] for k in range(1, 2 + i % 4)]
    return " ".join(words) + "?"


PROMPTS = [question(i) for i in range(17)]


@pytest.fixture
def prompts(model):
    prompts = [list(encode_prompt(model.tokenizer, text)) for text in PROMPTS]
    prompts[3].append(model.config.nsp_token_id)
    return prompts


@pytest.fixture
def options(model):
    steer = Steer(model, retrieve_every=7, end_every=9)
    return {"max_new_tokens": 18, "logits_processor": LogitsProcessorList([steer]), "show_progress_bar": False}


def without_bar(options):
    """The options that generate() takes too."""
    return {name: value for name, value in options.items() if name != "show_progress_bar"}


def one_by_one(model, index, prompts, options):
    """Return the output of generate() for each prompt, and the token ids after the prompt."""
    outputs, continuations = [], []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), retriever=index, return_dict_in_generate=True, **without_bar(options)
        )
        (ids,) = real_tokens(output, torch.ones(1, len(prompt)), model.tokenizer.pad_token_id)
        outputs.append(output)
        continuations.append(ids[len(prompt) :])
    return outputs, continuations


def test_on_completion_gets_each_new_answer_and_returns_what_the_bar_shows(
    model, index, prompts, options, tmp_path, capsys
):
    options |= {"show_progress_bar": True, "output_file": tmp_path / "answers.jsonl"}
    completed = []

    def on_completion(completion):
        completed.append(completion)
        return {"done": f"{len(completed)}!"}

    options["on_completion"] = on_completion
    answers = model.generate_many(prompts[:5], retriever=index, batch_size=4, **options)
    assert sorted(completed, key=lambda completion: completion.index) == answers
    assert "done=5!" in capsys.readouterr().err
    completed.clear()
    answers = model.generate_many(prompts, retriever=index, batch_size=4, **options)
    # the file holds the others
    assert sorted(completion.index for completion in completed) == list(range(5, 17))
    assert len(answers) == 17


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_same_answers_as_one_by_one(model, index, prompts, options, batch_size):
    outputs, continuations = one_by_one(model, index, prompts, options)
    completions = model.generate_many(prompts, retriever=index, batch_size=batch_size, **options)
    assert [completion.index for completion in completions] == list(range(17))
    assert [completion.token_ids for completion in completions] == continuations
    assert len(set(map(len, continuations))) > 5
    assert sum(len(completion.retrievals) for completion in completions) > 10
    for completion, output in zip(completions, outputs, strict=True):
        assert completion.num_generated_tokens == int(output.num_generated_tokens)
        assert completion.cited_text == model.decode_with_citations(output)[0]
        for retrieval, expected in zip(completion.retrievals, output.retrievals[0], strict=True):
            assert retrieval.row == completion.index
            assert retrieval.position == expected.position
            assert retrieval.grounded_span == expected.grounded_span
            assert retrieval.passage_ids == expected.passage_ids
            assert all(passage["text"] not in completion.text for passage in retrieval.passages)


def test_without_retriever_it_is_plain_generation(model, prompts, options):
    pad = model.tokenizer.pad_token_id
    inputs = left_pad(prompts, pad)
    expected = model.generate(**inputs, **without_bar(options))[:, inputs["input_ids"].shape[1] :]
    completions = model.generate_many(prompts, batch_size=4, **options)
    assert [completion.token_ids for completion in completions] == [ids[ids != pad].tolist() for ids in expected]
    assert model.config.nsp_token_id in expected
    assert all(completion.retrievals == [] for completion in completions)


@pytest.mark.parametrize("static", [False, True])
def test_a_finished_row_makes_room_for_the_next(model, index, prompts, options, static):
    shapes = []
    model.gen.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    if static:
        options["cache_implementation"] = "static"
    completions = model.generate_many(prompts, retriever=index, batch_size=4, **options)
    steps = [rows for rows, width in shapes if width == 1]
    num_stepped_tokens = sum(completion.num_generated_tokens - 1 for completion in completions)
    assert max(steps) == 4
    assert len(steps) < 1.35 * num_stepped_tokens / 4  # the batch is full, except at the end
    if not static:
        assert steps[-5:] == sorted(steps[-5:], reverse=True)
    options.pop("cache_implementation", None)
    _, expected = one_by_one(model, index, prompts, options)
    assert [completion.token_ids for completion in completions] == expected


def test_max_batch_tokens_limits_the_rows(model, index, prompts, options):
    sizes = []
    model.gen.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    columns_per_row = rounded(max(map(len, prompts)) + 18 + model.config.max_passage_length + 2)
    for max_batch_tokens, expected in ((10, 1), (columns_per_row, 1), (3 * columns_per_row, 3)):
        sizes.clear()
        completions = model.generate_many(prompts[:6], retriever=index, max_batch_tokens=max_batch_tokens, **options)
        assert max(sizes) == expected
        assert len(completions) == 6


@pytest.mark.parametrize("forget", [None, "recompute", "mask"])
def test_rows_that_retrieve_more_often_than_there_is_room_for_wait(
    model, index, prompts, options, forget, monkeypatch
):
    """The cache never has more columns than allowed, no token changes, and none is forwarded twice."""
    options["logits_processor"] = LogitsProcessorList([Steer(model, retrieve_every=3, end_every=9)])
    options["retrieval_config"] = RetrievalConfig(forget_passages=forget)
    limit = 4 * rounded(max(map(len, prompts)) + 18 + 2 * (model.config.max_passage_length + 1) + 1)
    sizes, num_set_aside = [], 0

    def set_latest_aside(decoder):
        nonlocal num_set_aside
        num_set_aside += 1
        room_cosup.set_latest_aside(decoder)

    def note_size(module, args, kwargs):
        cache = kwargs["past_key_values"]
        sizes.append((cache.rows * cache.columns, len(kwargs["input_ids"])))

    monkeypatch.setattr(decoding_cosup, "set_latest_aside", set_latest_aside)
    hook = model.gen.base_model.register_forward_pre_hook(note_size, with_kwargs=True)
    completions = model.generate_many(prompts, retriever=index, max_batch_tokens=limit, **options)
    hook.remove()
    assert max(columns for columns, _ in sizes) <= limit
    assert max(rows for _, rows in sizes) >= 3
    assert num_set_aside >= 2
    outputs, expected = one_by_one(model, index, prompts, options)
    assert [completion.token_ids for completion in completions] == expected
    for completion, output in zip(completions, outputs, strict=True):
        for retrieval, alone in zip(completion.retrievals, output.retrievals[0], strict=True):
            assert (retrieval.position, retrieval.grounded_span) == (alone.position, alone.grounded_span)
            assert retrieval.passage_ids == alone.passage_ids


def test_candidates_and_passages_belong_to_their_prompts(model, index, prompts, options):
    ids = [f"p{i % 6}" for i in range(17)]
    for name in ("candidates", "passages"):
        config = RetrievalConfig(force_nsp_first=True, **{name: [[id] for id in ids]})
        completions = model.generate_many(prompts, retriever=index, retrieval_config=config, batch_size=5, **options)
        for completion, id in zip(completions, ids, strict=True):
            assert completion.retrievals
            assert all(set(retrieval.passage_ids) == {id} for retrieval in completion.retrievals)


def test_prompts_and_options_that_are_refused(model, index, options):
    assert model.generate_many([], retriever=index, **options) == []
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate_many([[5]], retriever=index, do_sample=True, num_return_sequences=2, **options)
    with pytest.raises(ValueError, match="retrieval_config needs a retriever"):
        model.generate_many([[5]], retrieval_config=RetrievalConfig(force_nsp_first=True), **options)
    refused = {"streamer": TextStreamer(model.tokenizer), "prefix_allowed_tokens_fn": lambda row, ids: [5]}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name} needs rows that keep their places"):
            model.generate_many([[5]], retriever=index, **options, **{name: value})
    config = RetrievalConfig(candidates=[["p0"], ["p1"]])
    with pytest.raises(ValueError, match="candidates has 2 entries, expected one for each of the 4 prompts"):
        model.generate_many([[5]] * 4, retriever=index, retrieval_config=config, **options)
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        model.generate_many([[5], []], retriever=index, **options)
    with pytest.raises(ValueError, match="Prompt 1 has 600 tokens, but Gen reads 512"):
        model.generate_many([[5], [6] * 600], retriever=index, **options)
    with pytest.raises(ValueError, match="Prompt 1 holds the token ids 4 to 400, but Gen knows 0 to 399"):
        model.generate_many([[5], [400, 4]], retriever=index, **options)
    for name, value in {"batch_size": 0, "max_batch_tokens": -1}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
            model.generate_many([[5]], retriever=index, **options, **{name: value})
    for settings in ({"max_length": 30, "max_new_tokens": None}, {"min_length": 20}):
        with pytest.raises(ValueError, match=f"takes no {next(iter(settings))}, which would count the longest prompt"):
            model.generate_many([[5]], retriever=index, **{**options, **settings})
    for limit in ({"max_time": 5.0}, {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(5.0)])}):
        with pytest.raises(ValueError, match="generate_many takes no max_time"):
            model.generate_many([[5]], retriever=index, **options, **limit)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=3)])
    with pytest.raises(ValueError, match="generate_many takes no prompt_ignore_length"):
        model.generate_many([[5]], retriever=index, **{**options, "logits_processor": penalty})
    for name in ("input_ids", "attention_mask"):
        with pytest.raises(ValueError, match=f"generate_many takes no {name}"):
            model.generate_many([[5]], retriever=index, **options, **{name: torch.ones(1, 1)})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("who?", r"Prompt 0 is the text 'who\?', expected token ids"),
        ([[5], "who?"], r"Prompt 1 is the text 'who\?', expected token ids: encode_prompt\(model.tokenizer, text\)"),
        ([5, 6], "Prompt 0 is 5, expected a list of token ids"),
        (torch.tensor([5, 6]), r"Prompt 0 is tensor\(5\)"),
        ([[5.5, 6]], r"Prompt 0 is \[5.5, 6\]"),
        ([["5"]], r"Prompt 0 is \['5'\]"),
        ([[[5, 6]]], r"Prompt 0 is \[\[5, 6\]\]"),
        (torch.tensor([[5.0]]), r"Prompt 0 is tensor\(\[5.\]\)"),
        (None, "Prompt 0 is None"),
        ([None], "Prompt 0 is None"),
    ],
    ids=str,
)
def test_prompts_that_are_not_token_ids_raise(model, prompts, message):
    with pytest.raises(TypeError, match=message):
        model.generate_many(prompts)


@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_the_output_of_a_tokenizer_is_taken_whole_and_without_padding(model, index, options, tensors):
    texts = ["who painted it?", "where?"]
    expected = model.generate_many([model.tokenizer(text).input_ids for text in texts], retriever=index, **options)
    for side in ("left", "right"):
        encoding = model.tokenizer(texts, padding=True, padding_side=side, return_tensors=tensors)
        assert model.generate_many(encoding, retriever=index, **options) == expected
    without_padding = model.tokenizer(texts, return_attention_mask=False)
    assert model.generate_many(without_padding, retriever=index, **options) == expected


class Favour:
    """Favours the end, then another token, then all others."""

    def __init__(self, end):
        self.end = end

    def __call__(self, ids, scores):
        scores = torch.full_like(scores, -10.0)
        scores[:, [20, self.end]] = torch.tensor([8.0, 10.0])
        return scores


def test_a_repetition_penalty_does_not_see_the_padding_of_shorter_rows():
    tokenizer = make_tokenizer(pad=None)  # rows are padded with the token that ends them
    model = make_model(tokenizer=tokenizer).eval()
    processors = LogitsProcessorList([Favour(tokenizer.eos_token_id), RepetitionPenaltyLogitsProcessor(2.0)])
    prompts = [[5, 6, 7], list(range(8, 20))]
    together = model.generate_many(prompts, max_new_tokens=4, logits_processor=processors, show_progress_bar=False)
    assert processors[1].prompt_ignore_length is None  # as it was given
    assert [answer.token_ids for answer in together] == [[tokenizer.eos_token_id]] * 2


def test_a_stopping_criterion_may_return_one_bool(model, index, prompts, options):
    never = StoppingCriteriaList([lambda ids, scores, **kwargs: False])
    expected = model.generate_many(prompts[:3], retriever=index, **options)
    assert model.generate_many(prompts[:3], retriever=index, stopping_criteria=never, **options) == expected


# ------------------------------------------------------------------ the output file


def test_the_output_file_holds_every_answer(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    options["max_new_tokens"] = 8  # some rows end before
    completions = model.generate_many(prompts, retriever=index, output_file=path, **options)
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[line["index"]] = line
    assert sorted(lines) == list(range(17))
    for completion in completions:
        line = lines[completion.index]
        assert line["token_ids"] == completion.token_ids
        assert line["text"] == completion.text
        assert line["cited_text"] == completion.cited_text
        ended = completion.token_ids[-1] in model.generation_config.eos_token_id
        assert line["finish_reason"] == completion.finish_reason == ("stop" if ended else "length")
        assert [trace["passages"] for trace in line["retrievals"]] == [r.passages for r in completion.retrievals]

    before = path.read_bytes()
    model.gen.base_model.register_forward_pre_hook(lambda *args: pytest.fail("an answer was written again"))
    again = model.generate_many(prompts, retriever=index, output_file=path, **options)
    assert again == completions
    assert path.read_bytes() == before
    assert isinstance(again[0], Completion)
    reasons = [completion.finish_reason for completion in completions]
    assert set(reasons) == {"stop", "length"}
    of_an_earlier_release = before.decode()
    for reason in set(reasons):
        of_an_earlier_release = of_an_earlier_release.replace(f', "finish_reason": "{reason}"', "")
    path.write_text(of_an_earlier_release, encoding="utf-8")
    earlier = model.generate_many(prompts, retriever=index, output_file=path, **options)
    assert earlier == [replace(completion, finish_reason="") for completion in completions]


def test_an_interrupted_call_can_be_resumed(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    expected = model.generate_many(prompts, retriever=index, **options)

    broken = BreakingIndex(index, failing_search=8)
    with pytest.raises(RetrievalError, match="the server went away"):
        model.generate_many(prompts, retriever=broken, batch_size=3, output_file=path, **options)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) < 17
    with path.open("a", encoding="utf-8") as file:
        file.write(lines[0][: len(lines[0]) // 2])  # as if it was killed in the middle of a write
    repaired = BreakingIndex(index, failing_search=-1)
    completions = model.generate_many(prompts, retriever=repaired, batch_size=3, output_file=path, **options)
    assert [completion.token_ids for completion in completions] == [answer.token_ids for answer in expected]
    assert path.read_text(encoding="utf-8").splitlines()[: len(lines)] == lines


def test_an_output_file_of_other_prompts_is_refused(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    model.generate_many(prompts[:2], retriever=index, output_file=path, **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line [12]: an answer to another prompt"):
        model.generate_many(prompts[2:6], retriever=index, output_file=path, **options)
    same = {"retriever": index, "output_file": path, **options}
    other_settings = [
        {"retrieval_config": RetrievalConfig(top_k=2)},
        {"max_retrievals": 1},
        {"do_sample": True},
        {"sequence_bias": {(7,): -1.0}},
        {"retriever": None},
    ]
    for other in other_settings:
        with pytest.raises(ValueError, match="line 1: an answer of another model or index, or with other settings"):
            model.generate_many(prompts[:2], **{**same, **other})
    for given in ({"passages": [["p1"]] * 2}, {"candidates": [["p1"], None]}):
        other = {"retrieval_config": RetrievalConfig(**given)}
        with pytest.raises(ValueError, match="line [12]: an answer to another prompt .* or with other passages"):
            model.generate_many(prompts[:2], **{**same, **other})
    of_index = {**same, "output_file": tmp_path / "of an index.jsonl"}
    for passages in (PASSAGES, [*PASSAGES[1:], PASSAGES[0]]):  # as many, in another order
        model.build_index(passages, save_directory=tmp_path / "index", show_progress_bar=False)
        of_index["retriever"] = model.load_index(tmp_path / "index")
        if passages is PASSAGES:
            model.generate_many(prompts[:2], **of_index)
    with pytest.raises(ValueError, match="line 1: an answer of another model or index"):
        model.generate_many(prompts[:2], **of_index)
    in_memory = model.build_index(passages, show_progress_bar=False)
    with pytest.raises(ValueError, match="line 1: an answer of another model or index"):
        model.generate_many(prompts[:2], **{**same, "retriever": in_memory})
    assert path.read_bytes() == before
    foreign = tmp_path / "results.json"
    foreign.write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="line 1: not an answer of generate_many; choose another file"):
        model.generate_many(prompts, retriever=index, output_file=foreign, **options)
    assert foreign.read_text() == '{"accuracy": 1}'
    path.write_bytes(before + b"{}\n")
    with pytest.raises(ValueError, match="line 3: not an answer"):
        model.generate_many(prompts, retriever=index, output_file=path, **options)
    assert path.read_bytes() == before + b"{}\n"


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}, {here!r}]
from support.models import PASSAGES, make_model
from support.generation import *
from support.models import *
from test_generate_many import *
tokenizer = make_tokenizer()
model = make_model(tokenizer=tokenizer)
index = model.build_index(PASSAGES, show_progress_bar=False)
fast_search = index.search

def slow_search(*args, **kwargs):
    time.sleep(0.02)  # leaves time for the kill
    return fast_search(*args, **kwargs)

index.search = slow_search
prompts = [list(encode_prompt(tokenizer, text)) for text in PROMPTS]
options = {{"max_new_tokens": 18, "logits_processor": LogitsProcessorList([Steer(model, 7, 9)])}}
options |= {{"batch_size": 2, "output_file": {path!r}, "show_progress_bar": False}}
completions = model.generate_many(prompts, retriever=index, **options)
print(json.dumps([completion.token_ids for completion in completions]))
"""


def test_killed_and_called_again(tmp_path):
    def script(path):
        return SCRIPT.format(tests=str(Path(__file__).parents[1]), here=str(Path(__file__).parent), path=str(path))

    path = tmp_path / "answers.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script(path)])
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = path.read_bytes()
    assert 3 <= written.count(b"\n") < 17
    resumed = run_forked("-c", script(path))  # with one thread, while the process that was killed may have had more
    reference = run_forked("-c", script(tmp_path / "whole.jsonl"))
    assert resumed.returncode == reference.returncode == 0, resumed.stderr + reference.stderr
    assert json.loads(resumed.stdout) == json.loads(reference.stdout)
    whole_lines = written[: written.rindex(b"\n") + 1]
    assert path.read_bytes().startswith(whole_lines)
