"""generate_many(): the same answers as generate(), a batch that stays full, and an output file that survives anything."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, TextStreamer

from modeling_cosup import Completion, RetrievalConfig, RetrievalError
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import Steer, left_pad, real_tokens
from support.models import PASSAGES

WORDS = [
    "who",
    "painted",
    "the Night Watch",
    "in Amsterdam",
    "Curie",
    "radium",
    "when",
    "was it",
    "Warsaw",
    "a physicist",
]
PROMPTS = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 4)) + "?" for i in range(17)]


@pytest.fixture
def index(model):
    return model.build_index(PASSAGES, show_progress_bar=False)


@pytest.fixture
def prompts(model):
    prompts = [list(encode_prompt(model.tokenizer, text)) for text in PROMPTS]
    prompts[3].append(model.config.nsp_token_id)
    return prompts


@pytest.fixture
def options(model):
    steer = Steer(model, retrieve_every=7, end_every=9)
    return {"max_new_tokens": 18, "logits_processor": LogitsProcessorList([steer]), "show_progress_bar": False}


def one_by_one(model, index, prompts, options, **kwargs):
    options = {name: value for name, value in options.items() if name != "show_progress_bar"}
    outputs = [
        model.generate(torch.tensor([ids]), retriever=index, return_dict_in_generate=True, **options, **kwargs)
        for ids in prompts
    ]
    rows = [
        real_tokens(output, torch.ones(1, len(ids)), model.tokenizer.pad_token_id)[0][len(ids) :]
        for output, ids in zip(outputs, prompts, strict=True)
    ]
    return outputs, rows


def test_on_completion_gets_each_new_answer_and_says_what_the_bar_shows(
    model, index, prompts, options, tmp_path, capsys
):
    def run(prompts):
        found = []
        options["show_progress_bar"] = True
        file = {
            "output_file": tmp_path / "answers.jsonl",
            "on_completion": lambda done: found.append(done) or {"done": f"{len(found)}!"},
        }
        return found, model.generate_many(prompts, retriever=index, batch_size=4, **file, **options)

    first, answers = run(prompts[:5])
    assert sorted(first, key=lambda done: done.index) == answers
    assert "done=5!" in capsys.readouterr().err
    second, answers = run(prompts)
    assert (
        sorted(done.index for done in second) == list(range(5, 17)) and len(answers) == 17
    )  # the others stood in the file


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_same_answers_as_one_by_one(model, index, prompts, options, batch_size):
    outputs, rows = one_by_one(model, index, prompts, options)
    found = model.generate_many(prompts, retriever=index, batch_size=batch_size, **options)
    assert [done.index for done in found] == list(range(17)) and [done.token_ids for done in found] == rows
    assert len({len(done.token_ids) for done in found}) > 5 and sum(len(done.retrievals) for done in found) > 10
    for done, output in zip(found, outputs, strict=True):
        assert done.num_generated_tokens == int(output.num_generated_tokens)
        assert done.cited_text == model.decode_with_citations(output)[0]
        for ours, theirs in zip(done.retrievals, output.retrievals[0], strict=True):
            assert (ours.position, ours.grounded_span, ours.passage_ids) == (
                theirs.position,
                theirs.grounded_span,
                theirs.passage_ids,
            )
            assert ours.row == done.index
        assert all(passage["text"] not in done.text for r in done.retrievals for passage in r.passages)


def test_without_retriever_it_is_plain_generation(model, prompts, options):
    inputs = left_pad(prompts, model.tokenizer.pad_token_id)
    plain = {name: value for name, value in options.items() if name != "show_progress_bar"}
    expected = model.generate(**inputs, **plain)[:, inputs["input_ids"].shape[1] :]
    found = model.generate_many(prompts, batch_size=4, **options)
    assert [done.token_ids for done in found] == [
        ids[ids != model.tokenizer.pad_token_id].tolist() for ids in expected
    ]
    assert model.config.nsp_token_id in expected and all(done.retrievals == [] for done in found)


@pytest.mark.parametrize("static", [False, True])
def test_a_finished_row_makes_room_at_once(model, index, prompts, options, static):
    sizes = []
    model.gen.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    kind = {"cache_implementation": "static"} if static else {}
    found = model.generate_many(prompts, retriever=index, batch_size=4, **options, **kind)
    steps = [rows for rows, width in sizes if width == 1]
    work = sum(done.num_generated_tokens - 1 for done in found)
    assert max(steps) == 4 and len(steps) < 1.35 * work / 4  # a full batch but for the end
    assert static or steps[-5:] == sorted(steps[-5:], reverse=True)
    assert [done.token_ids for done in found] == one_by_one(model, index, prompts, options)[1]


def test_fewer_rows_where_the_cache_may_hold_fewer_tokens(model, index, prompts, options):
    need = max(map(len, prompts)) + 18 + model.config.max_passage_length + 1
    for tokens, expected in ((10, 1), (need, 1), (3 * need, 3)):
        sizes = []
        hook = model.gen.base_model.register_forward_pre_hook(
            lambda m, a, kwargs, s=sizes: s.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = model.generate_many(prompts[:6], retriever=index, max_batch_tokens=tokens, **options)
        hook.remove()
        assert max(sizes) == expected and len(found) == 6


def test_candidates_and_passages_belong_to_their_prompts(model, index, prompts, options):
    ids = [f"p{i % 6}" for i in range(17)]
    for name in ("candidates", "passages"):
        settings = RetrievalConfig(force_nsp_first=True, **{name: [[id] for id in ids]})
        found = model.generate_many(prompts, retriever=index, retrieval_config=settings, batch_size=5, **options)
        assert [{id for r in done.retrievals for id in r.passage_ids} for done in found] == [{id} for id in ids]


def test_prompts_that_cannot_be(model, index, options):
    assert model.generate_many([], retriever=index, **options) == []
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate_many([[5]], retriever=index, do_sample=True, num_return_sequences=2, **options)
    with pytest.raises(ValueError, match="retrieval_config needs a retriever"):
        model.generate_many([[5]], retrieval_config=RetrievalConfig(force_nsp_first=True), **options)
    for name, value in (
        ("streamer", TextStreamer(model.tokenizer)),
        ("prefix_allowed_tokens_fn", lambda row, ids: [5]),
    ):
        with pytest.raises(ValueError, match=f"{name} needs rows that keep their places"):
            model.generate_many([[5]], retriever=index, **options, **{name: value})
    with pytest.raises(ValueError, match="candidates has 2 entries, expected one for each of the 4 prompts"):
        model.generate_many(
            [[5]] * 4, retriever=index, retrieval_config=RetrievalConfig(candidates=[["p0"], ["p1"]]), **options
        )
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        model.generate_many([[5], []], retriever=index, **options)
    with pytest.raises(ValueError, match="Prompt 1 has 600 tokens, but Gen reads 512"):
        model.generate_many([[5], [6] * 600], retriever=index, **options)


# ------------------------------------------------------------------ the output file


def test_the_output_file_holds_every_answer(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    found = model.generate_many(prompts, retriever=index, output_file=path, **options)
    lines = {line["index"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert sorted(lines) == list(range(17))
    for done in found:
        line = lines[done.index]
        assert (line["token_ids"], line["text"], line["cited_text"]) == (done.token_ids, done.text, done.cited_text)
        assert [trace["passages"] for trace in line["retrievals"]] == [r.passages for r in done.retrievals]
    before = path.read_bytes()
    model.gen.base_model.register_forward_pre_hook(lambda *args: pytest.fail("an answer was written again"))
    again = model.generate_many(prompts, retriever=index, output_file=path, **options)
    assert again == found and path.read_bytes() == before and isinstance(again[0], Completion)


def test_an_interrupted_call_goes_on(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    expected = model.generate_many(prompts, retriever=index, **options)

    class Breaks:
        check_model, rows_of, get_passages, fingerprint, searches = (
            index.check_model,
            index.rows_of,
            index.get_passages,
            index.fingerprint,
            0,
        )

        def search(self, *args, **kwargs):
            self.searches += 1
            if self.searches == 8:
                raise ConnectionError("the server went away")
            return index.search(*args, **kwargs)

    with pytest.raises(RetrievalError, match="the server went away"):
        model.generate_many(prompts, retriever=Breaks(), batch_size=3, output_file=path, **options)
    done = path.read_text(encoding="utf-8").splitlines()
    assert 0 < len(done) < 17
    with path.open("a", encoding="utf-8") as file:
        file.write(done[0][: len(done[0]) // 2])  # as a kill in the middle of a write leaves it
    found = model.generate_many(prompts, retriever=index, batch_size=3, output_file=path, **options)
    assert [d.token_ids for d in found] == [d.token_ids for d in expected]
    assert path.read_text(encoding="utf-8").splitlines()[: len(done)] == done


def test_an_output_file_of_other_prompts_is_refused(model, index, prompts, options, tmp_path):
    path = tmp_path / "answers.jsonl"
    model.generate_many(prompts[:2], retriever=index, output_file=path, **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line [12]: an answer to another prompt"):
        model.generate_many(prompts[2:6], retriever=index, output_file=path, **options)
    for other in (
        {"retrieval_config": RetrievalConfig(top_k=2)},
        {"max_retrievals": 1},
        {"do_sample": True},
        {"retriever": None},
    ):
        with pytest.raises(ValueError, match="line 1: an answer of another model or index, or with other settings"):
            model.generate_many(prompts[:2], **{"retriever": index, "output_file": path, **options, **other})
    assert path.read_bytes() == before
    path.write_bytes(before + b"{}\n")
    with pytest.raises(ValueError, match="line 3: not an answer"):
        model.generate_many(prompts, retriever=index, output_file=path, **options)
    assert path.read_bytes() == before + b"{}\n"


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}, {here!r}]
from support.generation import *
from support.models import *
from test_generate_many import *
tokenizer = make_tokenizer()
model = make_model(tokenizer=tokenizer)
index = model.build_index(PASSAGES, show_progress_bar=False)
search = index.search
index.search = lambda *args, **kwargs: (time.sleep(0.02), search(*args, **kwargs))[1]  # time to be killed in
prompts = [list(encode_prompt(tokenizer, text)) for text in PROMPTS]
options = {{"max_new_tokens": 18, "logits_processor": LogitsProcessorList([Steer(model, 7, 9)])}}
found = model.generate_many(prompts, retriever=index, batch_size=2, output_file={path!r}, show_progress_bar=False, **options)
print(json.dumps([done.token_ids for done in found]))
"""


def test_killed_and_called_again(tmp_path):
    def start(path):
        script = SCRIPT.format(tests=str(Path(__file__).parents[1]), here=str(Path(__file__).parent), path=str(path))
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    path, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    process = start(path)
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 3 <= kept.count(b"\n") < 17
    again, reference = start(path), start(whole)
    assert json.loads(again.communicate()[0]) == json.loads(reference.communicate()[0])
    assert path.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
