"""The text of an answer and its citations: offsets, spaces between spans, stop strings, for any tokenizer."""

from unittest.mock import Mock, patch

import pytest
from transformers import LlamaTokenizer

from modeling_cosup import Retrieval
from modeling_cosup.tokenization_cosup import encode_texts
from support.models import make_tokenizer
from support.tokenizer_kinds import TOKENIZERS

from serving.answers import AnswerToken, AnswerWriter, Piece, TokenTexts
from serving.engine import EndEvent, RetrievalEvent, TokenEvent, TokenLogprobs
from serving.token_names import TokenNames

CE, NSP = 10**6, 10**6 + 1  # ids of no tokenizer


def retrieval(position=100, num_tokens=7):
    """Return a retrieval of one passage whose `num_tokens` tokens follow the `[NSP]` at `position`."""
    start = position + num_tokens + 2
    return Retrieval(0, position, [{"id": "p", "title": "t", "text": "x"}], [0.5], (start, start))


def events_of(tokenizer, *spans, finish_reason="stop"):
    """Return the events of an answer: a text is free, `[text]` is grounded."""
    events = []
    num_tokens = 0
    for span in spans:
        if isinstance(span, list):
            events.append(RetrievalEvent(retrieval()))
        text = span[0] if isinstance(span, list) else span
        ids = encode_texts(tokenizer, [text])[0]
        if isinstance(span, list):
            ids = [*ids, CE]
            num_tokens += 1
        events += [TokenEvent(id) for id in ids]
        num_tokens += len(ids)
    return [*events, EndEvent(finish_reason, num_tokens)]


def written(tokenizer, events, stop=(), group=1, context=()):
    """Return the whole answer, and the pieces of its stream."""
    writer = AnswerWriter(TokenTexts(tokenizer), frozenset({CE, NSP}), prompt_length=5, stop=stop, context=context)
    pieces = [writer.write(events[i : i + group]) for i in range(0, len(events), group)]
    answer = Piece()
    for piece in pieces:
        answer.add(piece)
    assert answer.text == writer.text
    return answer, pieces


def grounded_texts(answer):
    return [answer.text[citation.start : citation.end] for citation in answer.citations]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_offsets_are_right_for_every_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    # word-level and Unigram vocabularies of the tests know few characters
    texts = {"word_level": "is here"}.get(kind, "the painting")
    events = events_of(tokenizer, texts, [texts], texts, [texts])
    answer, _ = written(tokenizer, events)
    expected = tokenizer.decode(encode_texts(tokenizer, [texts])[0], skip_special_tokens=True).strip()
    assert grounded_texts(answer) == [expected] * 2
    assert answer.text.split() == (expected.split()) * 4  # no word is lost, and none runs into the next
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("stop", [(), ("Zürich",), ("s. Ver", "never")])
def test_a_stream_concatenates_to_the_answer(group, stop):
    tokenizer = make_tokenizer()
    events = events_of(tokenizer, "Ça 東京 🎨.", ["Zürich 🏔 is"], "Or", ["Vera lives. Vera"], finish_reason="length")
    answer, pieces = written(tokenizer, events, stop, group)
    at_once, _ = written(tokenizer, events, stop, group=len(events))
    assert answer == at_once
    # the citation comes with the piece that closes its span: its text was streamed by then
    length = 0
    for piece in pieces:
        length += len(piece.text)
        assert all(citation.end <= length for citation in piece.citations)
    if not stop:
        assert answer.text == "Ça 東京 🎨. Zürich 🏔 is Or Vera lives. Vera"
        assert grounded_texts(answer) == ["Zürich 🏔 is", "Vera lives. Vera"]
        assert answer.finish_reason == "length"


def test_a_stop_string_spans_tokens_and_spans():
    tokenizer = make_tokenizer()
    events = events_of(tokenizer, "One", ["two three."], "Four five")
    answer, pieces = written(tokenizer, events, stop=["three. Fo"])
    assert answer.text == "One two "
    assert grounded_texts(answer) == ["two"]
    assert answer.finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == "One two "
    # the first stop string in the text wins, not the first in the list
    assert written(tokenizer, events, stop=["three", "wo"])[0].text == "One t"
    # at the very beginning: the retrieval stays, its text is empty and not cited
    answer, _ = written(tokenizer, events_of(tokenizer, ["abc"]), stop=["abc"])
    assert answer.text == "" and (answer.citations[0].start, answer.citations[0].end) == (0, 0)


def test_text_that_only_begins_a_stop_string_is_not_lost():
    tokenizer = make_tokenizer()
    answer, pieces = written(tokenizer, events_of(tokenizer, "a b c"), stop=["c d", "b d"])
    assert answer.text == "a b c"
    assert pieces[-1].text.endswith("c")  # waited for the end


def test_spans_run_together_only_where_they_should():
    tokenizer = make_tokenizer()

    def text(*spans):
        return written(tokenizer, events_of(tokenizer, *spans))[0].text

    assert text("It is", ["Paris"], ".") == "It is Paris."
    assert text("It is ", ["Paris"], " now") == "It is Paris now"
    assert text("(", ["Paris"], ")") == "(Paris)"
    assert text(["Paris."], ["Rome."]) == "Paris. Rome."
    assert text("首都は", ["東京です。"], ["京都は古い"], "。") == "首都は東京です。京都は古い。"
    assert text(["กรุงเทพ"], "เมือง") == "กรุงเทพเมือง"
    assert text(["서울은"], "도시다") == "서울은 도시다"  # Korean has spaces
    assert text("in", ["東京"]) == "in 東京"


def test_control_tokens_and_ends_have_no_text_and_half_a_character_stays_half():
    tokenizer = make_tokenizer()
    half = encode_texts(tokenizer, ["東"])[0][:1]
    text = encode_texts(tokenizer, ["x"])[0]
    ids = [NSP, *text, *half, CE, *half, *text, tokenizer.eos_token_id]
    events = [RetrievalEvent(retrieval()), *map(TokenEvent, ids), EndEvent("stop", len(ids))]
    answer, _ = written(tokenizer, events)
    assert answer.text == "x\ufffd \ufffdx"
    assert len(answer.tokens) == 4


def test_tokens_have_their_offset():
    tokenizer = make_tokenizer()
    events = events_of(tokenizer, "the", ["東 x"])
    answer, _ = written(tokenizer, events)
    offsets = [token.offset for token in answer.tokens]
    assert answer.text == "the 東 x"
    assert offsets[0] == 0
    num_bytes = len(encode_texts(tokenizer, ["東"])[0])
    first_of_span = len(encode_texts(tokenizer, ["the"])[0])
    assert offsets[first_of_span : first_of_span + num_bytes] == [4] * num_bytes  # they share a character
    assert offsets[-1] >= 5
    # a stop string takes its tokens with it
    cut, _ = written(tokenizer, events, stop=["東"])
    assert len(cut.tokens) == first_of_span


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_names_of_tokens_add_up_to_the_text(kind):
    tokenizer = TOKENIZERS[kind]()
    answer, _ = written(tokenizer, events_of(tokenizer, "the painting at the painting"))
    names = [TokenNames(tokenizer).name(token.event.token_id) for token in answer.tokens]
    assert "".join(name for name, _ in names).strip() == answer.text
    assert b"".join(bytes(token_bytes) for _, token_bytes in names).decode().strip() == answer.text


def test_a_word_has_another_name_with_and_without_a_space():
    vocab = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", "the", "▁the", "a"])}
    names = TokenNames(LlamaTokenizer(vocab=vocab, merges=[]))
    event = TokenEvent(4, TokenLogprobs(-1.0, [(4, -1.0), (3, -2.0), (2, -3.0)]))
    logprobs = names.completion_logprobs([AnswerToken(event, 0)])
    assert logprobs["tokens"] == [" the"]
    assert logprobs["top_logprobs"] == [{" the": -1.0, "the": -2.0, "</s>": -3.0}]


def test_the_usage_counts_as_generate_does():
    writer = AnswerWriter(TokenTexts(make_tokenizer()), frozenset({CE, NSP}), prompt_length=5)
    writer.write([RetrievalEvent(retrieval(position=4, num_tokens=7))])  # the [NSP] of the prompt
    assert (writer.num_generated_tokens, writer.num_passage_tokens, writer.num_retrievals) == (0, 7, 1)
    writer.write([TokenEvent(70), TokenEvent(CE), RetrievalEvent(retrieval(position=20, num_tokens=3))])
    assert (writer.num_generated_tokens, writer.num_passage_tokens, writer.num_retrievals) == (3, 10, 2)


def test_a_continued_text_keeps_its_first_space():
    tokenizer = TOKENIZERS["SentencePiece BPE"]()
    prompt = encode_texts(tokenizer, ["the"])[0]
    events = events_of(tokenizer, "end")
    assert written(tokenizer, events)[0].text == "end"
    assert written(tokenizer, events, context=prompt)[0].text == " end"


def test_the_texts_of_the_same_tokens_are_decoded_once():
    tokenizer = make_tokenizer()
    texts = TokenTexts(tokenizer)
    decode = Mock(wraps=tokenizer.decode)
    texts_of_two = texts.decode([5, 6])
    with patch.object(tokenizer, "decode", decode):
        assert texts.decode([5, 6]) == texts_of_two == tokenizer.decode([5, 6], skip_special_tokens=True)
        assert texts.decode([6, 5]) == tokenizer.decode([6, 5], skip_special_tokens=True)
    assert decode.call_count == 2  # both by this test
