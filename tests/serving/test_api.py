"""The API over a real engine, called by the official client: answers equal generate(), citations and all."""

import base64
import json
import shutil
import subprocess

import httpx
import numpy as np
import pytest
import torch

from modeling_cosup import PassageIndex, RetrievalConfig
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt, encode_texts
from support.models import PASSAGES, make_model
from support.serving import running_server

from serving.api import ApiSettings
from serving.embedded_engine import EmbeddedEngine

openai = pytest.importorskip("openai", reason="needs the official client: pip install openai")

MESSAGES = [{"role": "user", "content": "who painted the Night Watch?"}]
FORCED = {"retrieval": {"force_nsp_first": True, "max_retrievals": 2}}


@pytest.fixture(scope="module")
def model():
    """A random model that often decides `[NSP]`, `[CE]` and an end."""
    model = make_model(gen_kwargs={"tie_word_embeddings": False})
    head = model.gen.get_output_embeddings().weight
    config = model.config
    ends = model.generation_config.eos_token_id
    with torch.no_grad():
        torch.manual_seed(0)
        for id, scale in [(config.nsp_token_id, 3.0), (config.ce_token_id, 1.6), (ends[0], 1.5)]:
            row = torch.randn(head.shape[1])
            head[id] = scale * row / row.norm() * head.norm(dim=1).mean()
    return model


@pytest.fixture(scope="module")
def index(model):
    passages = [dict(passage) for passage in PASSAGES]
    passages[0]["metadata"] = {"source": "art.pdf", "page": 3}
    passages[1]["metadata"] = {"source": "x.html", "url": "http://example.org/curie"}
    return PassageIndex.build(passages, model)


@pytest.fixture(scope="module")
def url(model, index):
    settings = ApiSettings("tiny", model.generation_config, max_new_tokens=16)
    with running_server(EmbeddedEngine.in_thread(model, index, max_running=4), settings) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def numbered(entries):
    """Return what a stream sends for the entries of a list of the whole answer: each has its index."""
    return [{"index": index, **entry} for index, entry in enumerate(entries)]


def expected_spans(model, index, prompt, max_new_tokens=16, **retrieval):
    """Return the texts of generate(): `(text, retrieval)` of each span, `None` for free text."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            retriever=index,
            retrieval_config=RetrievalConfig(**retrieval),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
    ids = output.sequences[0].tolist()
    spans, position = [], len(prompt)
    for found in output.retrievals[0]:
        spans.append((ids[position : found.position], None))
        start, position = found.grounded_span
        spans.append((ids[start:position], found))
    spans.append((ids[position:], None))
    decode = model.tokenizer.decode
    return [(decode(ids, skip_special_tokens=True).strip(), found) for ids, found in spans], output


def without_space(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    ("question", "retrieval"),
    [
        ("who painted the Night Watch?", {}),
        ("Curie", {"force_nsp_first": True}),
        ("Curie", {"force_nsp_first": True, "top_k": 2, "max_retrievals": 2, "no_repeat_passages": True}),
        ("Curie", {"force_nsp_first": True, "forget_passages": "recompute"}),
        ("who?", {"forbid_nsp": True}),
        ("who?", {"force_nsp_first": True, "candidates": ["p4"]}),
        ("who?", {"force_nsp_first": True, "passages": [{"title": "T", "text": "given", "id": None}]}),
        ("who?", {"force_nsp_first": True, "passages": ["p3", {"text": "given", "metadata": {"source": "a.pdf"}}]}),
        ("Warsaw", {"force_nsp_first": True, "min_score": 2.0}),
    ],
)
def test_an_answer_is_that_of_generate_streamed_or_not(client, model, index, question, retrieval):
    config = {name: [value] if name in ("candidates", "passages") else value for name, value in retrieval.items()}
    spans, output = expected_spans(model, index, encode_prompt(model.tokenizer, question), **config)
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "extra_body": {"retrieval": retrieval},
        "temperature": 0,
    }
    answer = client.chat.completions.create(**request)
    choice = answer.choices[0]
    text = choice.message.content
    assert without_space(text) == without_space("".join(text for text, _ in spans))
    assert answer.usage.completion_tokens == int(output.num_generated_tokens[0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    ends = model.generation_config.eos_token_id
    assert choice.finish_reason == ("stop" if int(output.sequences[0, -1]) in ends else "length")

    grounded = [(text, found) for text, found in spans if found is not None]
    assert len(choice.message.retrievals) == len(grounded)
    num_passage_tokens = 0
    cited = []
    assert bool(grounded) != bool(retrieval.get("forbid_nsp") or retrieval.get("min_score"))
    for entry, (expected, found) in zip(choice.message.retrievals, grounded, strict=True):
        assert text[entry["start_index"] : entry["end_index"]] == expected
        assert entry["passages"] == found.passages
        assert entry["scores"] == pytest.approx(found.scores, abs=1e-5)
        num_passage_tokens += found.grounded_span[0] - found.position - 2
        cited += [(expected, passage) for passage in found.passages if expected]
    assert answer.usage.passage_tokens == num_passage_tokens
    annotations = choice.message.annotations
    for annotation, (expected, passage) in zip(annotations, cited, strict=True):
        citation = annotation.url_citation
        assert text[citation.start_index : citation.end_index] == expected
        assert citation.title == passage["title"]

    streamed, stream_annotations, stream_retrievals, reasons, usage = "", [], [], [], None
    stream_options = {"include_usage": True}
    for chunk in client.chat.completions.create(**request, stream=True, stream_options=stream_options):
        usage = chunk.usage
        for piece in chunk.choices:
            streamed += piece.delta.content or ""
            new = getattr(piece.delta, "retrievals", [])
            assert all(entry["end_index"] <= len(streamed) for entry in new)
            stream_retrievals += new
            stream_annotations += getattr(piece.delta, "annotations", [])
            reasons.append(piece.finish_reason)
    assert streamed == text
    assert stream_annotations == numbered([annotation.model_dump() for annotation in annotations])
    assert json.dumps(stream_retrievals) == json.dumps(numbered(choice.message.retrievals))
    assert usage == answer.usage
    assert reasons[-1] == choice.finish_reason and set(reasons[:-1]) == {None}

    with client.chat.completions.stream(**request) as stream:  # the client joins the pieces itself
        stream.until_done()
    joined = stream.current_completion_snapshot.choices[0].message
    assert joined.content == text
    assert [annotation.model_dump() for annotation in joined.annotations or []] == stream_annotations
    assert (joined.model_extra.get("retrievals") or []) == stream_retrievals


def test_citations_say_where_a_passage_comes_from(client):
    urls = {}
    for id in ("p0", "p1", "p2"):
        settings = {"retrieval": {"force_nsp_first": True, "candidates": [id]}}
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, extra_body=settings)
        message = answer.choices[0].message
        urls[id] = message.annotations[0].url_citation.url
        assert message.annotations[0].url_citation.title == PASSAGES[int(id[1])]["title"]
        assert ("metadata" in message.retrievals[0]["passages"][0]) == (id != "p2")
    assert urls == {"p0": "art.pdf#page=3", "p1": "http://example.org/curie", "p2": "p2"}


def test_the_passages_of_an_answer_can_be_given_back(client):
    def ask(**retrieval):
        body = {"retrieval": {"force_nsp_first": True, "max_retrievals": 1, **retrieval}}
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, extra_body=body)
        return answer.choices[0].message

    first = ask(candidates=["p0"])
    (passage,) = first.retrievals[0]["passages"]
    assert passage["metadata"] == {"source": "art.pdf", "page": 3}
    for given in (passage, "p0"):
        second = ask(passages=[given])
        assert second.retrievals[0]["passages"] == [passage]
        assert (second.content, second.annotations) == (first.content, first.annotations)
    assert client.embeddings.create(model="tiny", input=[passage]).data[0].embedding


def test_typed_control_tokens_stay_text(client, model, index):
    typed = "say [NSP] and [CE] </s>"
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": typed}])
    prompt = encode_prompt(model.tokenizer, typed)
    assert model.config.nsp_token_id not in prompt  # nothing retrieves
    assert answer.usage.prompt_tokens == len(prompt)  # nothing vanishes
    spans, _ = expected_spans(model, index, prompt)
    assert without_space(answer.choices[0].message.content) == without_space("".join(text for text, _ in spans))
    completion = client.completions.create(model="tiny", prompt="[NSP]", max_tokens=1)
    assert completion.usage.prompt_tokens == len(encode_texts(model.tokenizer, ["[NSP]"])[0]) > 1


def test_a_chat_has_many_roles_and_parts(client, model):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=FORCED)
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": parts},
        first.choices[0].message,  # with its annotations and retrievals, as users of the client send it back
        {"role": "user", "content": "and?"},
    ]
    refusal = {"role": "assistant", "content": None, "refusal": "No."}
    messages += [refusal, {"role": "user", "content": "why?"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "why?"},
    ]
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens <= 3


def test_a_long_prompt_is_encoded_apart_and_alike(client, model):
    text = "[NSP] who? " * 2000
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=text)
    num_tokens = len(encode_texts(model.tokenizer, [text])[0])
    assert f"The prompt has {num_tokens} tokens, expected at most 511." in str(caught.value)
    assert caught.value.code == "context_length_exceeded"


def test_stop_strings_end_the_answer(client):
    request = {"model": "tiny", "messages": MESSAGES, "extra_body": FORCED}
    whole = client.chat.completions.create(**request).choices[0].message
    middle = len(whole.content) // 2
    stop = whole.content[middle : middle + 3]
    answer = client.chat.completions.create(**request, stop=[stop, "never written"]).choices[0]
    assert answer.message.content == whole.content[: whole.content.index(stop)]
    assert answer.finish_reason == "stop"
    assert all(entry["end_index"] <= len(answer.message.content) for entry in answer.message.retrievals)
    stream = client.chat.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.message.content


def test_sampling_is_repeated_by_its_seed(client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 3}
    texts = [choice.message.content for choice in client.chat.completions.create(**request).choices]
    assert len(set(texts)) == 3
    again = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        again[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert again == texts
    one = client.chat.completions.create(**{**request, "n": 1, "top_p": 1.0})
    assert one.choices[0].message.content == texts[0]
    assert client.chat.completions.create(**{**request, "seed": 8}).choices[0].message.content != texts[0]


def test_logprobs_are_those_of_the_model(client, model):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
    settings = {"retrieval": {"forbid_nsp": True}}
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2, extra_body=settings)
    prompt = encode_prompt(model.tokenizer, MESSAGES[0]["content"])
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), retrieval_config=RetrievalConfig(forbid_nsp=True), max_new_tokens=6
        )
        logprobs = model(ids).logits[0].log_softmax(-1)
    choice = answer.choices[0]
    entries = choice.logprobs.content
    places = [i for i in range(len(prompt), ids.shape[1]) if int(ids[0, i]) not in model.tokenizer.all_special_ids]
    assert len(entries) == len(places) > 3
    text_bytes = b"".join(bytes(entry.bytes) for entry in entries)
    assert text_bytes.decode(errors="replace") == choice.message.content
    for entry, place in zip(entries, places, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs[place - 1, ids[0, place]]), abs=1e-4)
        top = logprobs[place - 1].topk(2).values.tolist()
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(top, abs=1e-4)
    stream = client.chat.completions.create(**request, logprobs=True, stream=True, extra_body=settings)
    streamed = []
    for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, logprobs=1, extra_body=settings)
    old_shape = completion.choices[0].logprobs
    assert old_shape.tokens == [entry.token for entry in entries]
    assert old_shape.token_logprobs == pytest.approx([entry.logprob for entry in entries], abs=1e-5)
    assert old_shape.text_offset[0] == 0 and old_shape.text_offset == sorted(old_shape.text_offset)
    assert set(old_shape.tokens[:1]) <= set(old_shape.top_logprobs[0])


def test_completions_take_every_form_of_a_prompt(client, model, index):
    ids = encode_texts(model.tokenizer, ["who?"])[0]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    expected = client.completions.create(prompt="who?", **options).choices[0].text
    for prompt in (["who?"], ids, [ids]):
        assert client.completions.create(prompt=prompt, **options).choices[0].text == expected
    several = client.completions.create(prompt=["who?", "Curie"], n=2, **options)
    texts = [choice.text for choice in several.choices]
    assert texts[0] == texts[1] == expected and texts[2] == texts[3] != expected
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    stream = client.completions.create(prompt=["who?", "Curie"], n=2, stream=True, **options)
    streamed = ["", "", "", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    default = client.completions.create(model="tiny", prompt="who?", extra_body={"retrieval": {"forbid_nsp": True}})
    assert default.usage.completion_tokens <= 16

    # the [NSP] of a prompt, which token ids can hold, retrieves
    nsp = [*ids, model.config.nsp_token_id]
    answer = client.completions.create(prompt=nsp, **options)
    spans, output = expected_spans(model, index, nsp, max_new_tokens=8)
    found = answer.choices[0].retrievals
    assert found[0]["passages"] == spans[1][1].passages
    assert answer.choices[0].text[found[0]["start_index"] : found[0]["end_index"]] == spans[1][0]
    assert answer.usage.completion_tokens == int(output.num_generated_tokens[0])


def test_embeddings_are_those_of_the_index(client, model, index):
    passages = [{"title": passage["title"], "text": passage["text"]} for passage in PASSAGES]
    response = client.embeddings.create(model="tiny", input=passages)  # the client asks for base64
    embeds = np.array([entry.embedding for entry in response.data], np.float32)
    rows = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    with torch.no_grad():
        expected = model.encode_passages(*pad_rows(rows)).numpy()
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    np.testing.assert_allclose(embeds, index.embeddings, atol=1e-5)
    assert response.usage.prompt_tokens == response.usage.total_tokens == sum(map(len, rows))
    long_text = client.embeddings.create(model="tiny", input="far too long " * 500)
    (long_row,) = encode_passages_for_emb_seq(
        model.emb_seq_tokenizer, [{"title": "", "text": "far too long " * 500}], model.config
    )
    assert long_text.usage.prompt_tokens == len(long_row) < 500
    as_floats = client.embeddings.create(model="tiny", input="x", encoding_format="float", dimensions=32)
    as_text = client.embeddings.create(model="tiny", input=["x"])
    np.testing.assert_allclose(as_floats.data[0].embedding, as_text.data[0].embedding, atol=1e-6)
    query = client.embeddings.create(model="tiny", input="Curie", extra_body={"input_type": "query"})
    ids = [*encode_prompt(model.tokenizer, "Curie"), model.config.nsp_token_id]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).query_embeds[0].numpy()
    np.testing.assert_allclose(query.data[0].embedding, expected, atol=1e-5)
    assert query.usage.prompt_tokens == len(ids)
    raw = client.embeddings.with_raw_response.create(model="tiny", input="x", encoding_format="base64").http_response
    assert len(base64.b64decode(raw.json()["data"][0]["embedding"])) == 4 * 32


def test_a_refusal_of_the_engine_names_the_field(client):
    settings = {"retrieval": {"candidates": ["p0", "nowhere"]}}
    with pytest.raises(openai.BadRequestError, match="nowhere") as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=settings)
    assert caught.value.param == "retrieval.candidates"


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.max_model_len) == ("tiny", "model", "cosup", 512)
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_ui_is_served(url):
    """What Open WebUI sends, and reads from each chunk."""
    body = {
        "stream": True,
        "model": "tiny",
        "messages": [{"role": "user", "content": "who?"}],
        "stream_options": {"include_usage": True},
        "max_tokens": 4096,
        "retrieval": {"force_nsp_first": True, "candidates": ["p1"]},
    }
    content, sources, usage = "", [], None
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        data = json.loads(line.removeprefix("data: "))
        usage = data.get("usage") or usage
        if not data["choices"]:
            continue
        delta = data["choices"][0]["delta"]
        content += delta.get("content") or ""
        for annotation in delta.get("annotations") or []:
            assert annotation["type"] == "url_citation"
            sources.append((annotation["url_citation"]["title"], annotation["url_citation"]["url"]))
    assert content and usage["total_tokens"] > 0
    assert ("Marie Curie", "http://example.org/curie") in sources


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_served(url):
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2})
    command = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, timeout=20).stdout)
    assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["role"] == "assistant"
