"""What goes wrong around a running server: each fault fails its own request, and the server lives on."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from support.served_world import MODEL, served_world

LONG = 1500  # tokens: seconds of work, unless something ends it


@pytest.fixture(scope="module")
def world():
    with served_world() as world:
        yield world


@pytest.fixture
def client(world):
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def alive(world, client):
    """After each fault no slot is taken, and the server gives the right answer."""
    yield
    world.wait_until_idle()
    assert ask(client, "who?").message.content.split() == world.expected("who?").split()


def ask(client, question, max_tokens=12, **retrieval):
    """Return the choice of a whole answer."""
    body = {"retrieval": retrieval}
    messages = [{"role": "user", "content": question}]
    completion = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0, extra_body=body
    )
    return completion.choices[0]


def stream(client, question, max_tokens=LONG, **retrieval):
    """Return the stream of an answer without retrieval, unless `retrieval` says otherwise."""
    messages = [{"role": "user", "content": question}]
    body = {"retrieval": retrieval or {"forbid_nsp": True}}
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0, stream=True, extra_body=body
    )


# ---------------------------------------------------------------------- the engine and the index


def test_a_forward_that_fails_ends_the_answers_of_its_batch(world, client, monkeypatch):
    forward = world.model.gen.forward
    fails = threading.Event()

    def failing_forward(*args, **kwargs):
        if fails.is_set():
            raise RuntimeError("CUDA out of memory at /srv/secret")
        return forward(*args, **kwargs)

    monkeypatch.setattr(world.model.gen, "forward", failing_forward)
    with stream(client, "when?") as chunks:
        next(chunks)
        next(chunks)
        fails.set()
        with pytest.raises(openai.APIError) as error:
            list(chunks)
    assert "secret" not in str(error.value)
    with pytest.raises(openai.InternalServerError):
        ask(client, "who?")
    fails.clear()
    assert ask(client, "who?").message.content


def test_a_search_that_fails_fails_its_own_request(world, client, monkeypatch):
    searching = threading.Event()

    def fail(*args, **kwargs):
        searching.set()
        raise ConnectionError("the server at 10.0.0.7 went away")

    with ThreadPoolExecutor() as pool:
        other = pool.submit(ask, client, "when?", 200, forbid_nsp=True)
        monkeypatch.setattr(world.index, "search", fail)
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, "who?", force_nsp_first=True)
        assert error.value.status_code == 502
        assert searching.is_set()
        with pytest.raises(openai.APIError):
            list(stream(client, "who?", force_nsp_first=True))
        expected = world.expected("when?", 200, forbid_nsp=True)
        assert other.result().message.content.split() == expected.split()
    monkeypatch.undo()


# ---------------------------------------------------------------------- clients that are slow, or leave


def raw_request(world, body, headers=()):
    """Return a socket on which a request was sent; its receive buffer is the smallest there is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {world.url.removeprefix('http://')}",
        "Content-Type: application/json",
        *(headers or [f"Content-Length: {len(content)}"]),
    ]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", world.port))
    connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
    return connection


def long_body(**options):
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "when?"}],
        "max_tokens": LONG,
        "temperature": 0,
        "retrieval": {"forbid_nsp": True},
        **options,
    }


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_slot(world, streamed):
    with raw_request(world, long_body(stream=streamed)):
        world.wait_for(lambda load: load.running == 1)
    start = time.monotonic()
    world.wait_until_idle()
    assert time.monotonic() - start < 0.5  # the answer itself takes seconds


def test_a_client_that_reads_slowly_holds_nobody_up(world, client):
    with raw_request(world, long_body(stream=True, logprobs=True, top_logprobs=20)):
        world.wait_for(lambda load: load.running == 1)
        assert ask(client, "who?").message.content.split() == world.expected("who?").split()


def test_all_clients_leave_at_once(world):
    connections = [raw_request(world, long_body(stream=number % 2 == 0)) for number in range(12)]
    world.wait_for(lambda load: load.running + load.waiting == 12)
    for connection in connections:
        connection.close()
    world.wait_until_idle()


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"model": ', {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (json.dumps(long_body()).encode(), {"content-type": "text/plain"}, 400),
        (b"a" * 3_000_000, {}, 413),
        (json.dumps(long_body()).encode(), {"authorization": "Bearer wrong"}, None),
    ],
    ids=["half a body", "no UTF-8", "deep", "another type", "huge", "a key that nobody asked for"],
)
def test_a_bad_body(world, content, headers, status):
    if status is None:
        pytest.skip("a server without a key takes any")
    headers = {"content-type": "application/json", **headers}
    response = httpx.post(f"{world.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_that_breaks_off(world):
    with raw_request(world, json.dumps(long_body()).encode()[:40], ["Content-Length: 400"]):
        pass
    with raw_request(world, b'5\r\n{"mod', ["Transfer-Encoding: chunked"]):
        pass
