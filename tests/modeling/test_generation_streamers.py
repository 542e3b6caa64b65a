"""generate() with the streamers of transformers: they get tokens, and passages if they want them."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt, encode_texts
from support.generation import (
    Collect,
    Prefer,
    generate,
    prompt_of,
    question_that_retrieves,
)
from support.models import PASSAGES


def generate_four_letters(model, index, **kwargs):
    """Retrieve for a prompt that ends in `[NSP]`, then write "aaaa"."""
    inputs = {"input_ids": torch.tensor([question_that_retrieves(model)])}
    letter = encode_texts(model.tokenizer, ["a"])[0]
    return generate(model, inputs, index, Prefer(letter), max_new_tokens=4, **kwargs)


def test_streaming_gives_every_token_in_order(model, inputs, index, steer):
    for row in (0, 1):
        streamer = Collect()
        output = generate(model, prompt_of(inputs, row), index, steer, streamer=streamer)
        assert len(output.retrievals[0]) >= 1
        assert streamer.ended
        assert streamer.tokens == output.sequences[0].tolist()


def test_text_streamer_prints_answer_and_passages(model, index, capsys):
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = generate_four_letters(model, index, streamer=streamer)
    printed = capsys.readouterr().out.strip()
    assert printed == model.tokenizer.decode(output.sequences[0, output.prompt_length :], skip_special_tokens=True)
    assert output.retrievals[0][0].text in printed
    assert printed.endswith("aaaa")


def test_passages_can_be_hidden_from_a_streamer(model, index, capsys):
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = RetrievalConfig(stream_passages=False)
    output = generate_four_letters(model, index, streamer=streamer, retrieval_config=config)
    assert capsys.readouterr().out.strip() == "aaaa"
    assert len(output.retrievals[0]) == 1


def test_text_iterator_streamer(model, index):
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=generate_four_letters, args=(model, index), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.strip().endswith("aaaa")
    assert any(passage["text"] in text for passage in PASSAGES)


def test_a_refused_nsp_is_not_streamed(model, index, steer):
    ids = torch.tensor([encode_prompt(model.tokenizer, "who?")])
    streamer = Collect()
    settings = RetrievalConfig(min_score=9.0, force_nsp_first=True)
    output = generate(model, {"input_ids": ids}, index, steer, streamer=streamer, retrieval_config=settings)
    assert streamer.tokens == output.sequences[0].tolist()
    assert model.config.nsp_token_id not in streamer.tokens[:-1]


def test_an_nsp_without_room_for_a_passage_is_streamed(model, index):
    prompt = encode_prompt(model.tokenizer, "who?")
    model.config.get_text_config().max_position_embeddings = len(prompt) + 2
    streamer = Collect()
    eager = Prefer([model.config.nsp_token_id])
    output = generate(model, {"input_ids": torch.tensor([prompt])}, index, eager, streamer=streamer)
    assert streamer.tokens == output.sequences[0].tolist()
    assert output.retrievals == [[]]


def test_a_streamer_takes_one_row(model, inputs, index):
    with pytest.raises(ValueError, match="A streamer takes one row, found 5"):
        generate(model, inputs, index, streamer=Collect())
