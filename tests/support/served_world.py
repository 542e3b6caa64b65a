"""A tiny random model that retrieves, behind a real server on loopback."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_cosup import CoSupForCausalLM, PassageIndex, RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt
from support.models import PASSAGES, make_model
from support.serving import running_server

from serving.api import ApiSettings
from serving.embedded_engine import EmbeddedEngine
from serving.engine import EngineLoad

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
    max_position_embeddings: int = 2048,
    api_keys: Sequence[str] = (),
    log_prompts: bool = False,
    **engine_options: Any,
) -> Iterator[ServedWorld]:
    """Serve a random model, which now and then retrieves, until the context ends."""
    gen_kwargs = {"max_position_embeddings": max_position_embeddings}
    model = make_model("gpt2", gen_kwargs=gen_kwargs)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    engine = EmbeddedEngine.in_thread(model, index, **engine_options)
    with running_server(engine, ApiSettings(MODEL, api_keys=api_keys, log_prompts=log_prompts)) as url:
        yield ServedWorld(model, index, engine, url)
