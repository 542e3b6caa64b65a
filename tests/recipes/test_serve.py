"""`recipes/serve.py`: from its options to a server that answers, and stops at a signal; what it refuses before."""

import math
import os
import signal
import socket
import sys
import threading
import time

import httpx
import pytest
import serve

from modeling_cosup import CoSupForCausalLM, MLPMemory, PassageIndex
from support.models import PASSAGES, make_model
from support.recipes import fails_here, flags

from serving.arguments import ServeArguments
from serving.running import open_socket
from shared.memory_options import MemoryOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model named `tiny` and its index, and the index of another model."""
    folder = tmp_path_factory.mktemp("serve")
    for seed, name in [(0, "tiny"), (5, "other")]:
        model = make_model(emb_seq_kwargs={"seed": seed})
        model.save_pretrained(folder / name)
        PassageIndex.build(PASSAGES[:2], model, save_directory=folder / name / "index")
    return folder


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return port


def test_a_server_answers_until_a_signal(checkpoint, free_port, monkeypatch, capsys):
    monkeypatch.setenv("COSUP_API_KEY", "from-variable, second")
    words = flags(model=checkpoint / "tiny", index=checkpoint / "tiny/index", port=free_port, max_new_tokens=3)
    monkeypatch.setattr(
        sys, "argv", ["serve.py", *words, "--load_emb_seq", "--decode_in", "thread", "--api_key", "from-option"]
    )
    url = f"http://127.0.0.1:{free_port}"
    responses = {}

    def call():
        try:
            with httpx.Client(base_url=url, headers={"Authorization": "Bearer second"}) as client:
                for _ in range(400):
                    try:
                        client.get("/health")
                        break
                    except httpx.ConnectError:
                        time.sleep(0.05)
                chat = {"model": "tiny", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 50}
                chat["retrieval"] = {"force_nsp_first": True}
                responses["chat"] = client.post("/v1/chat/completions", json=chat)
                responses["embedding"] = client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
                for key in ("from-variable", "from-option", "from-variable, second"):
                    headers = {"Authorization": f"Bearer {key}"}
                    responses[key] = client.get("/v1/models", headers=headers)
                client.get("/health", headers={"Connection": "close"})  # so the server closes first, and waits
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    caller = threading.Thread(target=call)
    caller.start()
    serve.main()  # returns: to be stopped is no failure
    caller.join()
    assert f"Ready: {url}/v1" in capsys.readouterr().out
    answer = responses["chat"].json()
    assert answer["usage"]["completion_tokens"] <= 3
    assert answer["choices"][0]["message"]["retrievals"]
    assert len(responses["embedding"].json()["data"][0]["embedding"]) == 32
    statuses = [responses[key].status_code for key in ("from-variable", "from-option", "from-variable, second")]
    assert statuses == [200, 200, 401]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    open_socket("127.0.0.1", free_port).close()  # at once, although connections of the server are still closing


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = fails_here(monkeypatch, "serve", *flags(model=tmp_path, port=port))  # no model in this folder
    assert message == f"error: --host 127.0.0.1 --port {port}: Address already in use."


def test_a_port_of_a_server_that_still_loads_its_model_is_in_use(tmp_path, monkeypatch):
    with open_socket("127.0.0.1", 0) as loading:  # bound, but does not listen yet
        port = loading.getsockname()[1]
        message = fails_here(monkeypatch, "serve", *flags(model=tmp_path, port=port))
    assert message == f"error: --host 127.0.0.1 --port {port}: Address already in use."


def test_an_index_of_another_model_is_refused_at_the_start(checkpoint, free_port, monkeypatch):
    words = flags(model=checkpoint / "tiny", index=checkpoint / "other/index", port=free_port, decode_in="thread")
    message = fails_here(monkeypatch, "serve", *words)
    assert "This index was built by another model" in message and "emb_seq" in message


def test_a_server_that_is_open_to_the_network_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COSUP_API_KEY", raising=False)
    words = flags(model=tmp_path, host="0.0.0.0", port=0, decode_in="thread")
    fails_here(monkeypatch, "serve", *words)  # the folder is empty
    assert "warning: --host 0.0.0.0 without --api_key" in capsys.readouterr().err
    fails_here(monkeypatch, "serve", *words, "--api_key", "secret")
    assert "warning: --host" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "--max_running 0: expected at least 1."),
        ({"max_waiting": -1}, "--max_waiting -1: expected at least 0."),
        ({"request_timeout": 0.0}, "--request_timeout 0.0: expected a finite number above 0; leave it out for never."),
        ({"request_timeout": math.inf}, "--request_timeout inf: expected a finite number above 0"),
        ({"request_timeout": math.nan}, "--request_timeout nan: expected a finite number above 0"),
        ({"index_timeout": math.inf}, "--index_timeout inf: expected a finite number above 0."),
        ({"index_timeout": math.nan}, "--index_timeout nan: expected a finite number above 0"),
        ({"index_timeout": 1.0}, "--index_timeout is for an index in Milvus: give --index_uri."),
        ({"shutdown_timeout": -1.0}, "--shutdown_timeout -1.0: expected a finite number, at least 0."),
        ({"shutdown_timeout": math.inf}, "--shutdown_timeout inf: expected a finite number, at least 0"),
        ({"shutdown_timeout": math.nan}, "--shutdown_timeout nan: expected a finite number, at least 0"),
        ({"api_key": [""]}, "--api_key: a key is empty; leave the option out for a server without keys."),
        ({"api_key": ["secret", " "]}, "--api_key: a key is empty"),
        ({"port": 70000}, "--port 70000: expected 0 to 65535."),
        ({"engine": "vllm", "query_url": "http://q/v1"}, "--engine vllm needs --gen_url."),
        ({"gen_url": "http://g/v1"}, "--gen_url is of --engine vllm."),
        ({"engine": "vllm", "dtype": "bfloat16"}, "--dtype is of --engine embedded."),
        ({"engine": "tgi"}, "--engine tgi: expected embedded, vllm, or module:function."),
        ({"engine": "tgi:"}, "--engine tgi:: expected embedded, vllm, or module:function."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ServeArguments(model="x", **options)


def test_an_engine_of_ones_own_gets_options_that_only_it_understands():
    assert ServeArguments(model="x", engine="my_engine:open", index_timeout=2.0).index_timeout == 2.0


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_a_variable_without_a_key_does_not_open_the_server(value, monkeypatch):
    monkeypatch.setenv("COSUP_API_KEY", value)
    with pytest.raises(ValueError, match="COSUP_API_KEY is set but holds no key; unset it"):
        ServeArguments(model="x")
    assert ServeArguments(model="x", api_key=["secret"]).keys == ["secret"]


def test_keys_of_the_option_and_the_variable_are_all_right(monkeypatch):
    monkeypatch.setenv("COSUP_API_KEY", "first, second,,")
    assert ServeArguments(model="x", api_key=[" third "]).keys == ["third", "first", "second"]
    monkeypatch.delenv("COSUP_API_KEY")
    assert ServeArguments(model="x").keys == []


def test_a_memory_is_mixed_in(checkpoint, tmp_path):
    model = CoSupForCausalLM.from_pretrained(checkpoint / "tiny")
    MLPMemory.from_gen(model, intermediate_size=8).save_pretrained(tmp_path)
    args = ServeArguments(
        model=str(checkpoint / "tiny"), max_running=3, max_waiting=0, max_batch_tokens=500, decode_in="thread"
    )
    engine = serve.open_engine(args, MemoryOptions(memory=str(tmp_path), memory_weight=0.4))
    served = engine.decoding.served
    assert served.memory_config.weight == 0.4
    assert (engine.max_running, engine.max_waiting, served.max_batch_tokens) == (3, 0, 500)
    assert not engine.has_index and served.model.emb_seq is None


def test_an_engine_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "engine_of_a_test.py").write_text("def open_engine(args):\n    return args.model, args.gen_url\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = {"engine": "engine_of_a_test:open_engine", "gen_url": "http://host/v1"}
    args = ServeArguments(model="out", **options)
    assert serve.open_engine(args, MemoryOptions()) == ("out", "http://host/v1")
    with pytest.raises(ValueError, match="--memory: engine_of_a_test:open_engine mixes no token memory in"):
        serve.open_engine(args, MemoryOptions(memory="mem"))
    for name, message in [("no_such_module:f", "No module named 'no_such_module'"), ("engine_of_a_test:f", "no attr")]:
        with pytest.raises(ValueError, match=f"--engine {name}: .*{message}"):
            serve.open_engine(ServeArguments(model="out", engine=name), MemoryOptions())
