"""A model in a server that speaks OpenAI's API."""

import argparse
import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

from demo_parts.answers import Answer
from demo_parts.questions import FORCED, MAX_RETRIEVALS, OFF, Question


class ServedModel:
    """
    A model in a server that speaks OpenAI's API, such as `recipes/serve.py`.

    Args:
        args (`argparse.Namespace`): options of [`parse`].

    Raises:
        `ValueError`: if the server does not answer, or has no such model.
        `ImportError`: without the package openai.
    """

    at_once = 20  # answers; the server batches them
    no_corpora = "This demo takes no corpora: its model runs in a server, which searches an index there."
    score_name = "score"
    note = "searched: the index of the server"

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"{error}. --base_url needs: pip install openai") from error
        self.openai = openai
        self.instruction = args.instruction
        # A coroutine can be cancelled while it waits for the server; that closes its connection, and frees its slot.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = openai.AsyncOpenAI(base_url=args.base_url, api_key=args.api_key or "none", max_retries=0)
        try:
            names = asyncio.run_coroutine_threadsafe(self._model_names(), self.loop).result()
        except openai.OpenAIError as error:
            raise ValueError(f"--base_url {args.base_url}: {self._explain(error)}") from error
        self.name = args.model or "".join(names[:1])
        if self.name not in names:
            raise ValueError(f"--model is {self.name!r}, expected a model of {args.base_url}: {', '.join(names)}.")
        self.status = "Answers come from a server."

    async def _model_names(self):
        return [model.id async for model in self.client.models.list()]

    def write(self, answer: Answer, question: Question, corpus: None, stop: threading.Event) -> Iterator[None]:
        """Return an iterator that writes the answer, until `stop` is set or it is closed."""
        messages = [{"role": "user", "content": question.text}]
        if self.instruction:
            messages.insert(0, {"role": "system", "content": self.instruction})
        retrieval: dict[str, Any] = {"top_k": question.top_k, "max_retrievals": MAX_RETRIEVALS}
        if question.min_score is not None:
            retrieval["min_score"] = question.min_score
        if question.retrieval == FORCED:
            retrieval["force_nsp_first"] = True
        if question.retrieval == OFF:
            retrieval["forbid_nsp"] = True
        request = {
            "model": self.name,
            "messages": messages,
            "max_tokens": question.max_new_tokens,
            "temperature": 0,
            "extra_body": {"retrieval": retrieval},
        }
        with contextlib.closing(self._deltas(stop, request)) as deltas:
            for delta in deltas:
                answer.write(delta.content or "")
                for span in getattr(delta, "retrievals", None) or []:
                    answer.ground(span["start_index"], span["end_index"], span["passages"], span["scores"])
                yield

    def _deltas(self, stop, request):
        """Yield the pieces of an answer; close its connection when `stop` is set or the caller stops iterating."""
        deltas: queue.Queue = queue.Queue()

        async def read():
            async with await self.client.chat.completions.create(stream=True, **request) as stream:
                async for chunk in stream:
                    for choice in chunk.choices:
                        deltas.put(choice.delta)

        reading = asyncio.run_coroutine_threadsafe(read(), self.loop)
        reading.add_done_callback(lambda _: deltas.put(None))
        try:
            while not stop.is_set():
                try:
                    delta = deltas.get(timeout=0.1)
                except queue.Empty:
                    continue
                if delta is None:
                    return reading.result()
                yield delta
        except self.openai.OpenAIError as error:
            raise ValueError(self._explain(error)) from error
        finally:
            reading.cancel()

    def _explain(self, error):
        """Return an error of the client in plain words, without the server's address."""
        body = getattr(error, "body", None)
        if isinstance(body, dict) and body.get("message"):
            return f"The server answers: {body['message']}"
        if isinstance(error, self.openai.APIConnectionError):
            return "The server does not answer, or broke off."
        return f"The server fails ({type(error).__name__})."
