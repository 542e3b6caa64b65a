"""What the API refuses, in the shape of OpenAI's errors, and what it does when engine or client fail."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from transformers import GenerationConfig

from modeling_cosup import Retrieval, RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt
from support.models import make_model
from support.serving import ScriptedEngine, started_server

from serving.api import ApiSettings
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    EndEvent,
    EngineLoad,
    QueueFull,
    RetrievalEvent,
    SearchFailed,
    TokenEvent,
    UnsupportedSetting,
)
from serving.protocol import MAX_PASSAGE_CHARACTERS, EmbeddingBody, RetrievalBody

openai = pytest.importorskip("openai", reason="needs the official client: pip install openai")

MESSAGES = [{"role": "user", "content": "who?"}]
CHAT = {"model": "tiny", "messages": MESSAGES}
KEY = "schlüssel"  # not ASCII: the comparison is of bytes
DEEP = json.loads("[" * 600 + "]" * 600)  # more than can be pickled
KEYS_THAT_END_LIKE_SPACE = ["voilà", "успех"]  # their last byte, in Latin-1, is white space
ERRORS = {  # what the engine raises; the status, and what the official client raises
    "unsupported": (UnsupportedSetting("force_nsp_first: no index."), 400, openai.BadRequestError),
    "full": (QueueFull("The queue is full.", retry_after=7), 429, openai.RateLimitError),
    "late": (DeadlineExceeded("Too late."), 504, openai.InternalServerError),
    "search": (SearchFailed("The index is gone."), 502, openai.InternalServerError),
    "backend": (BackendFailed("The loop crashed."), 502, openai.InternalServerError),
    "bug": (RuntimeError("a secret path"), 500, openai.InternalServerError),
}


@pytest.fixture(scope="module")
def engine():
    """An engine that is told by the prompt what to do: write, wait, or fail before or after its first token."""
    release = threading.Event()
    model = make_model()
    large = Retrieval(0, 100, [{"id": "p", "title": "", "text": "x" * 100_000}], [None], (105, 105))

    async def script(request):
        import asyncio

        text = model.tokenizer.decode(request.prompt_ids)
        for name, (error, _, _) in ERRORS.items():
            if f"fail {name}" in text:
                raise error
            if f"break {name}" in text:
                yield [TokenEvent(70)]
                raise error
        yield [TokenEvent(70)]
        while "wait" in text and not release.is_set():
            await asyncio.sleep(0.002)
        while "flood" in text:
            yield [RetrievalEvent(large), TokenEvent(model.config.ce_token_id)]
        yield [TokenEvent(71), EndEvent("stop", 2)]

    engine = ScriptedEngine(model, script)
    engine.release = release
    return engine


@pytest.fixture(scope="module")
def server(engine):
    settings = ApiSettings(
        "tiny",
        GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=11),
        api_keys=["other", KEY, *KEYS_THAT_END_LIKE_SPACE],
        max_body_bytes=20_000,
        max_new_tokens=30,
        request_timeout=60,
        cors_origins=["http://ui.example"],
    )
    with started_server(engine, settings) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    headers = {"Authorization": f"Bearer {KEY}".encode(), "Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def anyone(server):
    """A client without a key."""
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    headers = {"Authorization": "Bearer other"}
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", default_headers=headers, max_retries=0)


def refusal(response, status=400):
    """Return the error of a response with the given status, whose shape is checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def head(length):
    """Return the head of a request whose body has so many bytes."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Authorization: Bearer other"]
    lines += ["Content-Type: application/json", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines)


def connected(server, receive_buffer=None):
    """Return a connection to the server."""
    connection = socket.socket()
    connection.settimeout(20)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    return connection


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff{}",
        b"[" * 9000,
        b'{"model": ' + b"1" * 5000 + b"}",
        json.dumps(CHAT).encode().replace(b'"who?"', b'"\\ud800"'),
        json.dumps({**CHAT, "temperature": 1}).encode().replace(b": 1", b": NaN"),
        json.dumps({**CHAT, "temperature": 1}).encode().replace(b": 1", b": -Infinity"),
        json.dumps({**CHAT, "\ud800": 1}).encode(),
    ],
)
def test_a_body_that_cannot_be_read_gets_400(http, body):
    error = refusal(http.post("/v1/chat/completions", content=body))
    assert error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("top_k", 5, "Unrecognized request argument supplied: top_k"),
        ("retrieval", {"stream_passages": True}, "Unrecognized request argument supplied: retrieval.stream_passages"),
        ("retrieval", {"output_query_embeds": True}, "Unrecognized request argument"),
        ("retrieval", {"force_nsp_first": True, "forbid_nsp": True}, "exclude each other"),
        ("retrieval", {"top_k": 0}, "retrieval.top_k"),
        ("retrieval", {"top_k": 10**30}, "retrieval.top_k"),
        ("retrieval", {"passages": [{"text": ""}]}, "retrieval.passages[0].text: it is empty, expected a text."),
        ("retrieval", {"passages": [{"text": " "}]}, "passages[0].text: it is only white space, expected a text."),
        (
            "retrieval",
            {"passages": [5]},
            "retrieval.passages[0]: expected an object with text",
        ),
        ("retrieval", {"passages": [{"text": "x", "metadata": 1}]}, "[0].metadata: Input should be a JSON object"),
        (
            "retrieval",
            {"passages": [{"text": "x", "metadata": {"a": DEEP}}]},
            "retrieval.passages[0].metadata: metadata['a'] is nested too deeply, expected at most 64 levels.",
        ),
        ("retrieval", {"passages": [{"text": "x", "metadata": {"a": "x" * 17_000}}]}, "metadata takes 17,009 bytes"),
        ("retrieval", {"passages": ["\ud800"]}, "retrieval.passages[0]: half a surrogate pair is no character"),
        ("retrieval", {"passages": [{"text": "x", "id": "\ud800"}]}, "passages[0].id: half a surrogate pair"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content: "),
        ("frequency_penalty", 0.5, "frequency_penalty: this server does not support it, expected null or 0"),
        ("frequency_penalty", False, "frequency_penalty"),
        ("tools", [{"type": "function"}], "tools: this server does not support it"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("n", 17, "n: "),
        ("n", True, "n: "),
        ("max_tokens", 0, "max_tokens: "),
        ("max_tokens", "5", "max_tokens: "),
        ("temperature", 2.1, "temperature: Input should be less than or equal to 2, found '2.1'."),
        ("retrieval", [], "retrieval: Input should be a JSON object."),
        ("top_p", 0, "top_p: "),
        ("seed", 2**70, "seed: "),
        ("stop", ["a"] * 5, "stop has 5 entries, expected at most 4."),
        ("stop", [""], "stop: it holds an empty text, expected texts at which an answer ends."),
        ("stop", "x" * 300, "stop[0] has 300 characters, expected at most 256."),
        ("top_logprobs", 3, "logprobs=true"),
        ("stream_options", {"include_usage": True}, "stream=true"),
        ("messages", [], "messages is empty, expected at least one entry."),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role: "),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "found a part of type 'image_url'"),
        ("messages", [{"role": "user", "content": "word " * 600}], "tokens, expected at most 511"),
    ],
)
def test_fields_are_refused_by_name(http, field, value, message):
    error = refusal(http.post("/v1/chat/completions", content=json.dumps({**CHAT, field: value})))
    assert message in error["message"]


def test_more_answers_than_the_engine_takes_are_refused(http, engine, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda: EngineLoad(0, 0, max_running=2, max_waiting=5))
    error = refusal(http.post("/v1/completions", json={"model": "tiny", "prompt": ["x", "y"], "n": 4}))
    assert error["message"] == "n, times the prompts, is 8, expected at most 7."
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": ["x"], "n": 7}).status_code == 200


def test_given_passages_are_short_together():
    half = {"text": "x" * (MAX_PASSAGE_CHARACTERS // 2 - 1), "title": "t"}
    assert len(RetrievalBody(passages=[half, half]).passages) == 2
    with pytest.raises(ValueError, match="100,001 characters together, expected at most 100,000"):
        RetrievalBody(passages=[half, half, {"text": "x"}])


def test_neutral_and_harmless_fields_are_accepted(http):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none"}
    neutral |= {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False}
    neutral |= dict.fromkeys(["n", "stop", "retrieval"])
    assert http.post("/v1/chat/completions", json={**CHAT, **neutral}).status_code == 200
    retrieval = dict.fromkeys(RetrievalBody.model_fields)
    assert http.post("/v1/chat/completions", json={**CHAT, "retrieval": retrieval}).status_code == 200
    assert EmbeddingBody(model="x", input="x", encoding_format=None, input_type=None) == EmbeddingBody(
        model="x", input="x"
    )
    completion = {"model": "tiny", "prompt": "x", "echo": False, "best_of": 1, "suffix": None}
    assert http.post("/v1/completions", json=completion).status_code == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty, expected at least one token."),
        ({"prompt": ["x", ""]}, "prompt[1] is empty, expected at least one token."),
        ({"prompt": []}, "prompt is empty, expected at least one entry."),
        ({"prompt": [[1], []]}, "prompt: entry 1 is empty, expected at least one token id."),
        ({"prompt": [5, 10**6]}, "1000000 is no token id"),
        ({"prompt": [-1]}, "prompt: expected a text"),
        ({"prompt": [5, True]}, "prompt: expected a text"),
        ({"prompt": None}, "prompt: expected a text"),
        ({"prompt": ["x"] * 65}, "prompt has 65 entries, expected at most 64."),
        ({"echo": True}, "echo: "),
        ({"suffix": "x"}, "suffix: "),
        ({"best_of": 2}, "best_of: "),
        ({"logprobs": 6}, "logprobs: "),
    ],
)
def test_completions_refuse(http, changes, message):
    error = refusal(http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **changes}))
    assert message in error["message"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"input": []}, 400, "input is empty, expected at least one entry."),
        ({"input": ""}, 400, "input: it is empty, expected a text."),
        ({"input": ["x", " "]}, 400, "input: entry 1 is only white space, expected a text."),
        ({"input": ["x", {"text": ""}]}, 400, "input[1].text: it is empty, expected a text."),
        ({"input": [1, 2]}, 400, "input: expected a text"),
        ({"dimensions": 5}, 400, "dimensions is 5, expected 32"),
        ({"encoding_format": "hex"}, 400, "encoding_format: "),
        ({"input": {"text": "x", "title": "t"}, "input_type": "query"}, 400, "a query is a text"),
        ({}, 400, "Emb_seq is not loaded"),
        ({"input_type": "query"}, 502, "no answer"),
    ],
)
def test_embeddings_refuse(http, changes, status, message):
    body = {"model": "tiny", "input": "x", **changes}
    assert message in refusal(http.post("/v1/embeddings", json=body), status)["message"]


def test_other_models_and_urls_are_not_found(http, client):
    error = refusal(http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-x"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"
    with pytest.raises(openai.NotFoundError, match="gpt-x"):
        client.models.retrieve("gpt-x")
    refusal(http.get("/v1/nothing"), 404)
    refusal(http.get("/v1/chat/completions"), 405)


def test_a_large_body_gets_413_with_and_without_its_length(http):
    large = {**CHAT, "user": "x" * 20_000}
    assert refusal(http.post("/v1/chat/completions", json=large), 413)["code"] == "request_too_large"

    def chunks():
        yield b'{"model": "'
        for _ in range(30):
            yield b"x" * 1000

    assert "20,000 bytes" in refusal(http.post("/v1/chat/completions", content=chunks()), 413)["message"]


def test_a_body_that_does_not_come_gets_408(server, monkeypatch):
    monkeypatch.setattr("serving.guards.BODY_TIMEOUT", 0.05)
    with connected(server) as connection:
        connection.sendall(f"{head(1000)}{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# ---------------------------------------------------------------------- defaults, and what is written down


def test_defaults_are_those_of_the_checkpoint(http, engine):
    def request(path="/v1/chat/completions", **fields):
        body = {
            "model": "tiny",
            **({"prompt": "x"} if path == "/v1/completions" else {"messages": MESSAGES}),
            **fields,
        }
        assert http.post(path, json=body).status_code == 200
        return engine.requests[-1]

    default = request()
    assert (default.temperature, default.top_p, default.max_new_tokens, default.seed) == (0.7, 0.9, 11, None)
    assert 50 < default.deadline - time.monotonic() <= 60
    assert not default.incremental
    given = request(temperature=1e-9, top_p=1, max_tokens=7, seed=-1, stop="x")
    assert (given.temperature, given.top_p, given.max_new_tokens, given.seed) == (0, 1, 7, 2**63 - 1)
    assert given.incremental  # so that a stop string frees the slot
    assert request(max_tokens=10**30).max_new_tokens == 30
    assert request(max_tokens=5, max_completion_tokens=6).max_new_tokens == 6
    assert request("/v1/completions").max_new_tokens == 16
    retrieval = {"top_k": 2, "candidates": ["a"], "min_score": 0.4, "forget_passages": "mask", "max_retrievals": 0}
    config = request(retrieval=retrieval).retrieval
    assert config == RetrievalConfig(**{**retrieval, "candidates": [["a"]]})


def test_prompts_are_logged_only_if_asked_for(http, engine, caplog):
    caplog.set_level("INFO")
    secret = {**CHAT, "messages": [{"role": "user", "content": "my secret"}]}
    assert http.post("/v1/chat/completions", json=secret).status_code == 200
    assert http.post("/v1/chat/completions", json={**secret, "foo": 1}).status_code == 400
    assert "secret" not in caplog.text
    bodies = []
    for content in ("my secret", "break search"):
        bodies += [
            {**CHAT, "messages": [{"role": "user", "content": content}], "stream": way} for way in (False, True)
        ]
    bodies[0]["user"] = "\ud800"  # is ignored; no log can hold half a surrogate pair
    with started_server(ScriptedEngine(make_model(), engine.script), ApiSettings("tiny", log_prompts=True)) as server:
        statuses = []
        for body in bodies:
            statuses.append(http.post(f"{server.url}/v1/chat/completions", content=json.dumps(body)).status_code)
        refused = http.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "fail full"})
        several = http.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "who?", "n": 2})
    assert statuses == [200, 200, 502, 200]
    assert (refused.status_code, several.status_code) == (429, 200)
    completions = [record.message for record in caplog.records if record.message.startswith("cmpl-")]
    assert len(completions) == 4  # two prompts and two answers: nothing was answered to the refused prompt
    response_id, answer = several.json()["id"], engine.tokenizer.decode([70, 71])
    assert sorted(completions[2:]) == [f"{response_id}[{number}]: {answer!r}" for number in (0, 1)]
    messages = [record.message for record in caplog.records if record.message.startswith("chatcmpl-")]
    answers = [engine.tokenizer.decode(ids) for ids in ([70, 71], [70, 71], [70], [70])]  # two broke off
    assert len(messages) == 2 * len(bodies)
    for body, answer, prompt_line, answer_line in zip(bodies, answers, messages[::2], messages[1::2], strict=True):
        response_id = prompt_line.partition(":")[0]
        assert body["messages"][0]["content"] in prompt_line
        assert answer_line == f"{response_id}[0]: {answer!r}"


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer", "Basic other", "Bearer others", "Bearer ü"])
def test_a_wrong_key_gets_401(anyone, authorization):
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    response = anyone.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert refusal(response, 401)["type"] == "authentication_error"
    assert anyone.get("/v1/models", headers=headers).status_code == 401
    assert anyone.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize("key", KEYS_THAT_END_LIKE_SPACE)
def test_a_right_key_passes_whatever_its_bytes(anyone, key):
    for authorization in (f"Bearer {key}", f"bearer \t {key}"):
        assert anyone.get("/v1/models", headers={"Authorization": authorization.encode()}).status_code == 200


def test_the_official_client_raises_its_own_errors(server, client):
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        wrong.chat.completions.create(**CHAT)
    with pytest.raises(openai.BadRequestError, match="top_k") as caught:
        client.chat.completions.create(**CHAT, extra_body={"top_k": 3})
    assert caught.value.param == "top_k" and caught.value.code == "unknown_parameter"


def test_a_browser_may_call_from_the_given_origin(anyone):
    headers = {"Origin": "http://ui.example", "Access-Control-Request-Method": "POST"}
    response = anyone.options("/v1/chat/completions", headers=headers)
    assert response.headers["access-control-allow-origin"] == "http://ui.example"
    response = anyone.options("/v1/models", headers={**headers, "Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers


# ---------------------------------------------------------------------- failing engines


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_reach_the_client(client, name, stream):
    error, status, kind = ERRORS[name]
    messages = [{"role": "user", "content": f"fail {name}"}]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="tiny", messages=messages, stream=stream)
    assert caught.value.status_code == status
    if name == "bug":
        assert "secret" not in str(caught.value)
    else:
        assert str(error) in str(caught.value)
    if name == "full":
        assert caught.value.response.headers["retry-after"] == "7"


def test_an_error_in_mid_stream_is_its_last_event(client):
    messages = [{"role": "user", "content": "break search"}]
    texts = []
    with pytest.raises(openai.APIError, match="The index is gone"):
        for chunk in client.chat.completions.create(model="tiny", messages=messages, stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert len(texts) == 2 and texts[1]  # the role, and the token before the error


def test_one_failing_answer_fails_the_request_and_frees_the_others(client, engine):
    with pytest.raises(openai.InternalServerError, match="The index is gone"):
        client.completions.create(model="tiny", prompt=["wait", "break search", "wait"])
    assert engine.idle.wait(5)


# ---------------------------------------------------------------------- clients that leave, and the end


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server, engine, stream):
    body = json.dumps({**CHAT, "stream": stream, "messages": [{"role": "user", "content": "wait"}]})
    with connected(server) as connection:
        connection.sendall(f"{head(len(body))}{body}".encode())
        while not engine.running:
            pass
    assert engine.idle.wait(5)


def test_a_client_that_does_not_read_is_given_up(server, http, engine, monkeypatch, caplog):
    monkeypatch.setattr("serving.generating.SEND_TIMEOUT", 0.2)
    body = json.dumps({**CHAT, "stream": True, "messages": [{"role": "user", "content": "flood"}]})
    with connected(server, receive_buffer=4096) as connection:
        connection.sendall(f"{head(len(body))}{body}".encode())
        while not engine.running:
            pass
        # others are served meanwhile
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert engine.idle.wait(10)
    assert "A client read nothing" in caplog.text


def test_the_metrics_count_by_route_and_status(http, engine):
    def count(text, route, status):
        label = f'cosup_requests_total{{route="{route}",status="{status}"}} '
        return next((float(line[len(label) :]) for line in text.splitlines() if line.startswith(label)), 0.0)

    before = http.get("/metrics").text
    http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    http.post("/v1/completions", json={"model": "other", "prompt": "x"})
    http.get("/v1/anything/at/all")
    after = http.get("/metrics").text
    for route, status in (("/v1/completions", 200), ("/v1/completions", 404), ("other", 404)):
        assert count(after, route, status) == count(before, route, status) + 1
    assert "anything" not in after
    assert "cosup_requests_running 0.0" in after
    # the text of answers that are not streamed comes at their end
    http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    streamed = http.get("/metrics").text

    def value(text, name):
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"cosup_{name} "))

    for name, before_stream, by_stream in [
        ("generated_tokens_total", 2, 2),
        ("prompt_tokens_total", 1, len(encode_prompt(engine.tokenizer, "who?"))),
        ("time_to_first_token_seconds_count", 0, 1),
        ("time_per_token_seconds_count", 0, 1),
    ]:
        assert value(after, name) - value(before, name) == before_stream, name
        assert value(streamed, name) - value(after, name) == by_stream, name


def test_the_metrics_count_a_prompt_once_and_only_if_it_is_answered(http, engine):
    def num_prompt_tokens():
        lines = http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("cosup_prompt_tokens_total "))

    before = num_prompt_tokens()
    for prompt in ("fail full", "fail backend"):
        assert http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}).status_code in (429, 502)
    assert num_prompt_tokens() == before
    prompts = [[5, 6, 7], [5]]
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": prompts, "n": 2}).status_code == 200
    assert num_prompt_tokens() == before + 4


def test_at_the_end_running_answers_finish_and_new_ones_get_503(server, http, engine):
    with ThreadPoolExecutor() as pool:
        messages = [{"role": "user", "content": "wait"}]
        running = pool.submit(http.post, "/v1/chat/completions", json={**CHAT, "messages": messages})
        while not engine.running:
            pass
        server.stop_soon()
        while not engine.is_stopping:
            pass
        response = http.post("/v1/chat/completions", json=CHAT)
        assert refusal(response, 503)["code"] == "shutting_down"
        assert response.headers["retry-after"] == "10"
        assert http.get("/health").status_code == 503
        engine.release.set()
        assert running.result().status_code == 200
    server.thread.join(10)
    assert not server.thread.is_alive()
