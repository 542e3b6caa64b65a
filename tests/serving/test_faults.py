"""What goes wrong around a running server: each fault fails its own request, and the server lives on."""

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from support.forks import run_forked
from support.served_world import MODEL, served_world

SERVE = Path(__file__).parents[2] / "recipes" / "serve.py"
KEY = "secret"
LONG = 1500  # tokens: seconds of work, unless something ends it


@pytest.fixture(scope="module")
def world():
    with served_world(api_keys=[KEY]) as world:
        yield world


@pytest.fixture
def client(world):
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
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
    body = world.model.gen.base_model
    forward = body.forward
    fails = threading.Event()

    def failing_forward(*args, **kwargs):
        if fails.is_set():
            raise RuntimeError("CUDA out of memory at /srv/secret")
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", failing_forward)
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
        f"Authorization: Bearer {KEY}",
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


def test_a_client_that_does_not_read_holds_nobody_up_and_is_given_up(world, client, monkeypatch, caplog):
    monkeypatch.setattr("serving.generating.SEND_TIMEOUT", 0.5)
    with raw_request(world, long_body(stream=True, n=8, logprobs=True, top_logprobs=20)):
        world.wait_for(lambda load: load.running == 8)
        assert ask(client, "who?").message.content.split() == world.expected("who?").split()
        world.wait_until_idle()
        assert "A client read nothing for 0.5 seconds: its answer was given up." in caplog.text


def test_all_clients_leave_at_once(world):
    connections = [raw_request(world, long_body(stream=number % 2 == 0)) for number in range(12)]
    world.wait_for(lambda load: load.running + load.waiting == 12)
    for connection in connections:
        connection.close()
    world.wait_until_idle()


# ---------------------------------------------------------------------- bodies


BODY = json.dumps(long_body()).encode()


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"model": ', {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (BODY, {"content-type": "text/plain"}, 400),
        (b" " * 5_000_000 + BODY, {}, 413),
        (iter([b" " * 3_000_000, b" " * 3_000_000, BODY]), {}, 413),
        (BODY, {"authorization": "Bearer wrong"}, 401),
    ],
    ids=["half a body", "no UTF-8", "deep", "another type", "huge", "huge, in chunks", "another key"],
)
def test_a_body_that_is_refused(world, content, headers, status):
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **headers}
    response = httpx.post(f"{world.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_that_breaks_off(world):
    with raw_request(world, json.dumps(long_body()).encode()[:40], ["Content-Length: 400"]):
        pass
    with raw_request(world, b'5\r\n{"mod', ["Transfer-Encoding: chunked"]):
        pass


# ---------------------------------------------------------------------- the process

RUN = """
import os, pathlib, runpy, sys
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
script, *arguments = sys.argv[2:]
sys.argv = [script, *arguments]
sys.path[0] = os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
"""


def test_a_port_in_use_and_a_shutdown_under_load(world, tmp_path):
    model, index, pid_file = tmp_path / "tiny", tmp_path / "index", tmp_path / "pid"
    world.model.save_pretrained(model)
    world.index.save_pretrained(index)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [SERVE, "--model", model, "--index", index, "--port", port, "--decode_in", "thread"]
        refused = run_forked(*command)
    assert refused.returncode == 1
    assert refused.stderr == f"error: --host 127.0.0.1 --port {port}: Address already in use.\n"

    with ThreadPoolExecutor() as pool, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as client:
        process = pool.submit(run_forked, "-c", RUN, pid_file, *command, env={"COSUP_API_KEY": None})
        wait_until_healthy(port, process)
        with stream(client, "when?", 600) as chunks:
            next(chunks)
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
            with pytest.raises(openai.InternalServerError) as error:
                while True:  # until the signal has arrived
                    ask(client.with_options(max_retries=0), "who?", 1)
            assert error.value.status_code == 503
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        result = process.result()
    assert text.split() == world.expected("when?", 600, forbid_nsp=True).split()
    assert result.returncode == 0
    assert f"Ready: http://127.0.0.1:{port}/v1" in result.stdout


def wait_until_healthy(port, process):
    """Wait until a server answers."""
    while True:
        assert not process.done(), process.result()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
