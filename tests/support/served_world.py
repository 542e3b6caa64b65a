"""A tiny random model that retrieves, behind a real server on loopback."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modeling_cosup import CoSupForCausalLM, PassageIndex, RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt

from serving.api import ApiSettings, build_app
from serving.embedded_engine import EmbeddedEngine
from serving.engine import EngineLoad
from serving.running import EngineServer, open_socket, url_of

from support.models import PASSAGES, make_model

MODEL = "tiny"


@dataclass
class ServedWorld:
    """
    What is served, and where.

    Args:
        model ([`CoSupForCausalLM`]), index ([`PassageIndex`]), engine ([`EmbeddedEngine`]): what is served.
        url (`str`): of the server, without `/v1`.
    """

    model: CoSupForCausalLM
    index: PassageIndex
    engine: EmbeddedEngine
    url: str

    @property
    def port(self) -> int:
        """Port of the server."""
        return int(self.url.rpartition(":")[2])

    def expected(self, question: str, max_tokens: int = 12, **retrieval: Any) -> str:
        """Return the text that generate() writes for a chat of one question."""
        prompts = [encode_prompt(self.model.tokenizer, question)]
        config = RetrievalConfig(**retrieval)
        (answer,) = self.model.generate_many(
            prompts,
            retriever=self.index,
            retrieval_config=config,
            max_new_tokens=max_tokens,
            do_sample=False,
            show_progress_bar=False,
        )
        return answer.text

    def wait_for(self, condition: Callable[[EngineLoad], bool], timeout: float = 20) -> None:
        """Wait until the engine's load fulfils a condition."""
        end = time.monotonic() + timeout
        while not condition(self.engine.load()):
            assert time.monotonic() < end, self.engine.load()
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        """Wait until no request runs or waits."""
        self.wait_for(lambda load: load.running == load.waiting == 0)


@contextlib.contextmanager
def served_world(
    max_position_embeddings: int = 2048, api_keys: tuple[str, ...] = (), **engine_options: Any
) -> Iterator[ServedWorld]:
    """Serve a random model, which now and then retrieves, until the context ends."""
    gen_kwargs = {"max_position_embeddings": max_position_embeddings}
    model = make_model("gpt2", gen_kwargs=gen_kwargs)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    engine = EmbeddedEngine(model, index, **engine_options)
    app = build_app(engine, ApiSettings(MODEL, api_keys=api_keys))
    server = EngineServer(app, engine)
    bound = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_engine(bound)), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "The server did not start."
            time.sleep(0.005)
        yield ServedWorld(model, index, engine, url_of(bound))
    finally:
        server.should_exit = True
        thread.join(timeout=60)
