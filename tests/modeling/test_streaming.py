"""The streamer of texts and retrievals: its events, put together, are the trace and the texts of the same generate() call."""

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
from support.generation import Steer
from support.models import PASSAGES, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "[NSP] in a question", "Zürich?"]


class Write(LogitsProcessor):
    """Gen decides these tokens, in this order, then ends."""

    def __init__(self, ids, end):
        self.ids = [*ids, end]

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, float("-inf"))
        scores[:, self.ids.pop(0)] = 0
        return scores


class EndSpans(LogitsProcessor):
    """`[CE]` at every fifth length, so that free text stands between grounded ones."""

    def __init__(self, model):
        self.ce = model.config.ce_token_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ce] += 500.0 * (input_ids.shape[1] % 5 == 0)
        return scores


def stream(model, input_ids, processors=(), **kwargs):
    """The events of a generate() call in another thread, and its output or error."""
    streamer, done = model.make_streamer(timeout=60), []

    def work():
        try:
            options = {
                "max_new_tokens": 40,
                "return_dict_in_generate": True,
                "logits_processor": LogitsProcessorList(processors),
                **kwargs,
            }
            done.append(model.generate(torch.tensor([input_ids]), streamer=streamer, **options))
        except Exception as error:
            done.append(error)

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
    return events, error, done[0]


def pieces(events):
    """`[(retrieval or None, text)]`: texts between the events that begin and end spans; each text event names the retrieval it is grounded on."""
    found = [(None, "")]
    for event in events:
        if event.type == "text":
            assert event.text and event.retrieval is found[-1][0]
            found[-1] = (found[-1][0], found[-1][1] + event.text)
        elif event.type == "retrieval":
            assert found[-1][0] is None and not event.text
            found.append((event.retrieval, ""))
        else:
            assert event.type == "grounded_end" and event.retrieval is found[-1][0] is not None
            found.append((None, ""))
    assert found[-1][0] is None
    return found


def cited(events):
    """What decode_with_citations returns, from events alone."""
    numbers, known, texts = {}, {}, []
    for retrieval, text in pieces(events):
        cites = []
        for passage in retrieval.passages if retrieval is not None else []:
            known[passage["id"]] = passage
            cites.append(f"[{numbers.setdefault(passage['id'], len(numbers) + 1)}]")
        if retrieval is not None:
            texts.append(f"{text.strip()} {''.join(cites)}".strip())
        elif text.strip():
            texts.append(text.strip())
    lines = [
        f"[{n}] {known[id]['title'] + ': ' if known[id]['title'] else ''}{known[id]['text']}"
        for id, n in numbers.items()
    ]
    return "\n".join([" ".join(texts), *lines])


def check(model, events, output):
    ids, trace = output.sequences[0].tolist(), output.retrievals[0]
    found = pieces(events)
    assert [event.retrieval for event in events if event.type == "retrieval"] == trace
    grounded = [text for retrieval, text in found if retrieval is not None]
    spans = [
        model.tokenizer.decode(ids[slice(*retrieval.grounded_span)], skip_special_tokens=True) for retrieval in trace
    ]
    assert [text.strip() for text in grounded] == [span.strip() for span in spans]
    assert cited(events) == model.decode_with_citations(output)[0]
    # written_text puts a space before each retrieval, and may join the bytes on both sides of a [CE] to a character
    written = written_text(ids, trace, output.prompt_length, model.tokenizer)
    assert letters("".join(text for _, text in found)) == letters(written)
    return found


def letters(text):
    """Without white space, and without what is half a character."""
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
    retrievals = free = 0
    for every in (3, 7):
        for question in QUESTIONS:
            steer = [Steer(model, retrieve_every=every, end_every=23), EndSpans(model)]
            config = RetrievalConfig(**settings)
            events, error, output = stream(
                model, encode_prompt(model.tokenizer, question), steer, retriever=index, retrieval_config=config
            )
            assert error is None
            if "passages" in settings:
                for retrieval in output.retrievals[0]:
                    retrieval.passages[0]["id"] = (
                        retrieval.passages[0]["id"] or "given"
                    )  # `cited` of this test numbers by id
            found = check(model, events, output)
            retrievals += len(output.retrievals[0])
            free += any(text.strip() for retrieval, text in found if retrieval is None)
    assert (retrievals == 0) == (settings.get("forbid_nsp", False) or settings.get("min_score") == 2.0)
    assert free >= 4


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
    assert error is None and events == [] and output.retrievals == [[]]


def test_plain_generation_streams_its_text(model):
    events, error, output = stream(model, encode_prompt(model.tokenizer, "who?"))
    assert (
        error is None
        and {event.type for event in events} == {"text"}
        and {event.retrieval for event in events} == {None}
    )
    continuation = output.sequences[0, len(encode_prompt(model.tokenizer, "who?")) :]
    assert "".join(event.text for event in events) == model.tokenizer.decode(continuation, skip_special_tokens=True)


# ------------------------------------------------------------------ characters and spaces


def metaspace_tokenizer():
    """As SentencePiece does it: a space belongs to the word behind it, and the first one of a text is stripped."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = [
        "Rembrandt painted the Night Watch in Amsterdam.",
        "who? ##Input:\n\nOutput",
        *(passage["text"] for passage in PASSAGES),
    ]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def wordpiece_tokenizer():
    """Spaces are no tokens: they stand between words, not before the rest of one."""
    vocab = [
        "<unk>",
        "Rem",
        "##brandt",
        "painted",
        "the",
        "Night",
        "Watch",
        "in",
        "Amsterdam",
        ".",
        "Curie",
        "who",
        "?",
        "#",
        "Input",
        "Output",
        ":",
    ]
    backend = Tokenizer(models.WordPiece({word: id for id, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [make_tokenizer, metaspace_tokenizer, wordpiece_tokenizer])
def test_spaces_between_spans_are_the_tokenizers(make):
    model = make_model(tokenizer=make())
    index = model.build_index(PASSAGES[:2], show_progress_bar=False)

    def encode(text):
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    nsp, ce = model.config.nsp_token_id, model.config.ce_token_id
    ids = [
        *encode("Rembrandt painted"),
        nsp,
        *encode(" the Night Watch"),
        ce,
        *encode(" in Amsterdam"),
        nsp,
        *encode(" Curie"),
        ce,
        *encode(" ."),
    ]
    events, _, output = stream(
        model, encode_prompt(model.tokenizer, "who?"), [Write(ids, model.tokenizer.eos_token_id)], retriever=index
    )
    assert len(output.retrievals[0]) == 2
    text = "".join(text for _, text in pieces(events)).replace(" .", ".")
    assert text == "Rembrandt painted the Night Watch in Amsterdam Curie."
    check(model, events, output)


def test_characters_of_several_tokens_come_whole(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    ids = model.tokenizer("é東京 ½🦜", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 15  # bytes: none of these characters is a token
    half = model.tokenizer("東", add_special_tokens=False)["input_ids"][:2]
    nsp, ce, eos = model.config.nsp_token_id, model.config.ce_token_id, model.tokenizer.eos_token_id
    prompt = encode_prompt(model.tokenizer, "who?")
    events, _, _ = stream(model, prompt, [Write([nsp, *ids, ce, *ids], eos)], retriever=index)
    assert [event.text for event in events if event.type == "text"] == ["é", "東", "京", " ", "½", "🦜"] * 2
    # a span that ends within a character: what follows does not complete it
    rest = model.tokenizer("東", add_special_tokens=False)["input_ids"][2:]
    events, _, output = stream(model, prompt, [Write([nsp, *half, ce, *rest], eos)], retriever=index)
    assert cited(events) == model.decode_with_citations(output)[0]
    assert [event.type for event in events] == ["retrieval", "text", "grounded_end", "text"]
    assert {event.text for event in events if event.type == "text"} == {"\ufffd"}


# ------------------------------------------------------------------ errors, stopping, misuse


class Breaks:
    """An index whose second search fails."""

    def __init__(self, index):
        self.index, self.searches = index, 0
        self.check_model, self.get_passages, self.rows_of = index.check_model, index.get_passages, index.rows_of

    def search(self, *args, **kwargs):
        self.searches += 1
        if self.searches == 2:
            raise ConnectionError("the server went away")
        return self.index.search(*args, **kwargs)


def test_an_error_is_raised_behind_what_was_written(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    nsp, (a, *_) = model.config.nsp_token_id, model.tokenizer("a")["input_ids"]
    prompt = encode_prompt(model.tokenizer, "who?")
    events, error, raised = stream(model, prompt, [Write([nsp, a, nsp], 0)], retriever=Breaks(index))
    assert [event.type for event in events] == ["retrieval", "text", "grounded_end"]
    assert isinstance(error, RetrievalError) and error is raised and "the server went away" in str(error)


def test_errors_before_the_first_token_are_raised_too(model):
    index = make_model(gen_kwargs={"seed": 5}, emb_seq_kwargs={"seed": 6}).build_index(
        PASSAGES, show_progress_bar=False
    )
    prompt = encode_prompt(model.tokenizer, "who?")
    for wrong in ({"retriever": index}, {"num_beams": 2}, {"nsp_token_id": 3}):
        events, error, raised = stream(model, prompt, **wrong)
        assert events == [] and isinstance(error, ValueError) and error is raised


def test_a_stopping_criterion_ends_the_stream(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    stop = threading.Event()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    streamer = model.make_streamer(timeout=60)
    options = {
        "retriever": index,
        "max_new_tokens": 400,
        "stopping_criteria": [Stop()],
        "streamer": streamer,
        "return_dict_in_generate": True,
    }
    options["logits_processor"] = LogitsProcessorList([Steer(model)])
    outputs = []
    thread = threading.Thread(
        target=lambda: outputs.append(
            model.generate(torch.tensor([encode_prompt(model.tokenizer, "who?")]), **options)
        )
    )
    stop.set()  # at the first token
    thread.start()
    events = list(streamer)
    thread.join()
    assert len(events) <= 1 and int(outputs[0].num_generated_tokens) == 1


def test_a_streamer_waits_no_longer_than_its_timeout_and_serves_one_row_and_one_call(model):
    streamer = model.make_streamer(timeout=0.01)
    assert isinstance(streamer, RetrievalStreamer)
    with pytest.raises(TimeoutError, match="within 0.01 seconds") as error:
        next(streamer)
    assert not isinstance(error.value, queue.Empty)
    ids = encode_prompt(model.tokenizer, "who?")
    with pytest.raises(ValueError, match="takes one row"):
        model.generate(torch.tensor([ids, ids]), streamer=model.make_streamer(), max_new_tokens=2)
    model.generate(torch.tensor([ids]), streamer=streamer, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="make another one"):
        model.generate(torch.tensor([ids]), streamer=streamer, max_new_tokens=2)
    assert all(isinstance(event, StreamEvent) for event in streamer)
