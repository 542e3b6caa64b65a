"""The streamer of texts and retrievals: its events together hold the trace and the texts of the call."""

import queue
import re
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria

from modeling_cosup import RetrievalConfig, RetrievalError, RetrievalStreamer, StreamEvent
from modeling_cosup.tokenization_cosup import encode_prompt
from modeling_cosup.trace_cosup import written_text
from support.generation import BreakingIndex, Steer
from support.models import PASSAGES, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "[NSP] in a question", "Zürich?"]


class Write(LogitsProcessor):
    """Makes Gen decide these tokens, in this order, then end."""

    def __init__(self, ids, end):
        self.ids = [*ids, end]

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, float("-inf"))
        scores[:, self.ids.pop(0)] = 0
        return scores


class EndSpans(LogitsProcessor):
    """Makes Gen decide `[CE]` at every fifth length, so that there is free text between grounded texts."""

    def __init__(self, model):
        self.ce = model.config.ce_token_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] % 5 == 0:
            scores[:, self.ce] += 500.0
        return scores


def stream(model, input_ids, processors=(), **kwargs):
    """Generate in another thread; return the events, the error that the loop raised, and the output or error."""
    streamer = model.make_streamer(timeout=60)
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, **kwargs}
    results = []

    def work():
        try:
            processor = LogitsProcessorList(processors)
            output = model.generate(
                torch.tensor([input_ids]), streamer=streamer, logits_processor=processor, **options
            )
            results.append(output)
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    events, error = [], None
    try:
        for event in streamer:
            events.append(event)
    except Exception as raised:
        error = raised
    thread.join()
    assert next(streamer, "over") == "over"
    return events, error, results[0]


def spans_of(events):
    """
    Return `[(retrieval or None, text)]`: the texts between the events that begin and end grounded texts.

    Each text event must name the retrieval on which it is grounded.
    """
    retrieval, text = None, ""
    spans = []
    for event in events:
        if event.type == "text":
            assert event.text
            assert event.retrieval is retrieval
            text += event.text
            continue
        spans.append((retrieval, text))
        text = ""
        if event.type == "retrieval":
            assert retrieval is None
            assert not event.text
            retrieval = event.retrieval
        else:
            assert event.type == "grounded_end"
            assert event.retrieval is retrieval is not None
            retrieval = None
    assert retrieval is None
    return [*spans, (None, text)]


def cited(events):
    """Return what decode_with_citations returns, from events alone."""
    numbers, passages, texts = {}, {}, []
    for retrieval, text in spans_of(events):
        if retrieval is None:
            texts.append(text.strip())
            continue
        citations = ""
        for passage in retrieval.passages:
            passages[passage["id"]] = passage
            number = numbers.setdefault(passage["id"], len(numbers) + 1)
            citations += f"[{number}]"
        texts.append(f"{text.strip()} {citations}".strip())
    lines = [" ".join(text for text in texts if text)]
    for id, number in numbers.items():
        title = f"{passages[id]['title']}: " if passages[id]["title"] else ""
        lines.append(f"[{number}] {title}{passages[id]['text']}")
    return "\n".join(lines)


def check(model, events, output):
    """Check that the events hold the trace and the texts of the output, and return their spans."""
    ids, trace = output.sequences[0].tolist(), output.retrievals[0]
    spans = spans_of(events)
    assert [event.retrieval for event in events if event.type == "retrieval"] == trace
    grounded = [text.strip() for retrieval, text in spans if retrieval is not None]
    expected = []
    for retrieval in trace:
        start, end = retrieval.grounded_span
        expected.append(model.tokenizer.decode(ids[start:end], skip_special_tokens=True).strip())
    assert grounded == expected
    assert cited(events) == model.decode_with_citations(output)[0]
    # written_text puts a space before each retrieval, and may join the bytes on both sides of a [CE] to a character
    written = written_text(ids, trace, output.prompt_length, model.tokenizer)
    assert letters("".join(text for _, text in spans)) == letters(written)
    return spans


def letters(text):
    """Return the text without white space and half characters."""
    return re.sub(r"[\s\ufffd]", "", text)


SETTINGS = {
    "one passage": {},
    "several passages": {"top_k": 3},
    "passages not streamed": {"stream_passages": False},
    "taken back": {"min_score": 0.2},
    "all taken back": {"min_score": 2.0, "force_nsp_first": True},
    "forced": {"force_nsp_first": True, "max_retrievals": 1},
    "forbidden": {"forbid_nsp": True},
    "recomputed": {"forget_passages": "recompute"},
    "masked": {"forget_passages": "mask"},
    "given": {"passages": [["p1", {"title": "Given", "text": "A passage of an oracle."}]]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_events_are_the_trace_and_the_texts(model, settings):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    num_retrievals = 0
    num_with_free_text = 0
    for every in (3, 7):
        for question in QUESTIONS:
            prompt = encode_prompt(model.tokenizer, question)
            processors = [Steer(model, retrieve_every=every, end_every=23), EndSpans(model)]
            config = RetrievalConfig(**settings)
            events, error, output = stream(model, prompt, processors, retriever=index, retrieval_config=config)
            assert error is None
            for retrieval in output.retrievals[0]:
                if retrieval.passages[0]["id"] is None:
                    retrieval.passages[0]["id"] = "given"  # `cited` of this test numbers by id
            spans = check(model, events, output)
            num_retrievals += len(output.retrievals[0])
            if any(text.strip() for retrieval, text in spans if retrieval is None):
                num_with_free_text += 1
    never_retrieves = settings.get("forbid_nsp", False) or settings.get("min_score") == 2.0
    assert (num_retrievals == 0) == never_retrieves
    assert num_with_free_text >= 4


def test_a_prompt_that_ends_in_nsp(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompt = [*encode_prompt(model.tokenizer, "who?"), model.config.nsp_token_id]
    events, _, output = stream(model, prompt, [EndSpans(model)], retriever=index)
    assert events[0].type == "retrieval"
    check(model, events, output)


def test_without_room_for_a_passage(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompt = encode_prompt(model.tokenizer, "who?")
    model.config.get_text_config().max_position_embeddings = len(prompt) + 2
    events, error, output = stream(model, prompt, [Write([model.config.nsp_token_id] * 3, 0)], retriever=index)
    assert error is None
    assert events == []
    assert output.retrievals == [[]]


def test_plain_generation_streams_its_text(model):
    prompt = encode_prompt(model.tokenizer, "who?")
    events, error, output = stream(model, prompt)
    assert error is None
    assert {event.type for event in events} == {"text"}
    assert {event.retrieval for event in events} == {None}
    continuation = output.sequences[0, len(prompt) :]
    assert "".join(event.text for event in events) == model.tokenizer.decode(continuation, skip_special_tokens=True)


# ------------------------------------------------------------------ characters and spaces


def metaspace_tokenizer():
    """Return a tokenizer like SentencePiece: a space belongs to the next word; a text loses its first space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    texts = ["Rembrandt painted the Night Watch in Amsterdam.", "who? ##Input:\n\nOutput"]
    texts += [passage["text"] for passage in PASSAGES]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def wordpiece_tokenizer():
    """Return a tokenizer without tokens for spaces: decoding puts them between words, not within one."""
    vocab = "<unk> Rem ##brandt painted the Night Watch in Amsterdam . Curie who ? # Input Output :".split()
    backend = Tokenizer(models.WordPiece({word: id for id, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [make_tokenizer, metaspace_tokenizer, wordpiece_tokenizer])
def test_spaces_between_spans_come_from_the_tokenizer(make):
    model = make_model(tokenizer=make())
    index = model.build_index(PASSAGES[:2], show_progress_bar=False)

    def encode(text):
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    nsp, ce = model.config.nsp_token_id, model.config.ce_token_id
    ids = [*encode("Rembrandt painted"), nsp, *encode(" the Night Watch"), ce]
    ids += [*encode(" in Amsterdam"), nsp, *encode(" Curie"), ce, *encode(" .")]
    prompt = encode_prompt(model.tokenizer, "who?")
    events, _, output = stream(model, prompt, [Write(ids, model.tokenizer.eos_token_id)], retriever=index)
    assert len(output.retrievals[0]) == 2
    text = "".join(text for _, text in spans_of(events)).replace(" .", ".")
    assert text == "Rembrandt painted the Night Watch in Amsterdam Curie."
    check(model, events, output)


def test_characters_of_several_tokens_come_whole(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    ids = model.tokenizer("é東京 ½🦜", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 15  # bytes: none of these characters is a token
    nsp, ce, eos = model.config.nsp_token_id, model.config.ce_token_id, model.tokenizer.eos_token_id
    prompt = encode_prompt(model.tokenizer, "who?")
    events, _, _ = stream(model, prompt, [Write([nsp, *ids, ce, *ids], eos)], retriever=index)
    assert [event.text for event in events if event.type == "text"] == ["é", "東", "京", " ", "½", "🦜"] * 2
    # a span that ends within a character: what follows does not complete it
    character = model.tokenizer("東", add_special_tokens=False)["input_ids"]
    half, rest = character[:2], character[2:]
    events, _, output = stream(model, prompt, [Write([nsp, *half, ce, *rest], eos)], retriever=index)
    assert cited(events) == model.decode_with_citations(output)[0]
    assert [event.type for event in events] == ["retrieval", "text", "grounded_end", "text"]
    assert {event.text for event in events if event.type == "text"} == {"\ufffd"}


# ------------------------------------------------------------------ errors, stopping, misuse


def test_an_error_is_raised_after_the_events_before_it(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    nsp = model.config.nsp_token_id
    letter = model.tokenizer("a")["input_ids"][0]
    prompt = encode_prompt(model.tokenizer, "who?")
    broken = BreakingIndex(index, failing_search=2)
    events, error, raised = stream(model, prompt, [Write([nsp, letter, nsp], 0)], retriever=broken)
    assert [event.type for event in events] == ["retrieval", "text", "grounded_end"]
    assert isinstance(error, RetrievalError)
    assert error is raised
    assert "the server went away" in str(error)


def test_errors_before_the_first_token_are_raised_too(model):
    other_model = make_model(gen_kwargs={"seed": 5}, emb_seq_kwargs={"seed": 6})
    index = other_model.build_index(PASSAGES, show_progress_bar=False)
    prompt = encode_prompt(model.tokenizer, "who?")
    for wrong in ({"retriever": index}, {"num_beams": 2}, {"nsp_token_id": 3}):
        events, error, raised = stream(model, prompt, **wrong)
        assert events == []
        assert isinstance(error, ValueError)
        assert error is raised


def test_a_stopping_criterion_ends_the_stream(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    stop = threading.Event()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    prompt = encode_prompt(model.tokenizer, "who?")
    stop.set()  # at the first token
    options = {"retriever": index, "max_new_tokens": 400, "stopping_criteria": [Stop()]}
    events, error, output = stream(model, prompt, [Steer(model)], **options)
    assert error is None
    assert len(events) <= 1
    assert int(output.num_generated_tokens) == 1


def test_a_streamer_waits_no_longer_than_its_timeout(model):
    streamer = model.make_streamer(timeout=0.01)
    assert isinstance(streamer, RetrievalStreamer)
    with pytest.raises(TimeoutError, match="within 0.01 seconds") as error:
        next(streamer)
    assert not isinstance(error.value, queue.Empty)
    prompt = encode_prompt(model.tokenizer, "who?")
    model.generate(torch.tensor([prompt]), streamer=streamer, max_new_tokens=2)
    assert all(isinstance(event, StreamEvent) for event in streamer)


def test_a_streamer_serves_one_row_and_one_call(model):
    streamer = model.make_streamer()
    ids = encode_prompt(model.tokenizer, "who?")
    with pytest.raises(ValueError, match="takes one row"):
        model.generate(torch.tensor([ids, ids]), streamer=model.make_streamer(), max_new_tokens=2)
    model.generate(torch.tensor([ids]), streamer=streamer, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="make another one"):
        model.generate(torch.tensor([ids]), streamer=streamer, max_new_tokens=2)
    assert all(isinstance(event, StreamEvent) for event in streamer)
