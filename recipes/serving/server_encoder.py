"""Embed the passages of an index on a server that serves what `save_emb_seq` wrote, in place of this machine."""

import asyncio
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import added_tokens

from serving.engine import BackendFailed
from serving.vllm_client import VllmClient

NUM_COMPARED = 4  # passages that are also embedded here, to recognise a server of another model
TOLERANCE = 0.05  # how far the server's embeddings may be, as a share of their length; bfloat16 stays below 0.01
REQUESTS = 8  # at a time


class ServerEncoder:
    """
    An encoder of [`PassageIndex.build`] that sends token ids to a vLLM pooling server.

    Args:
        model ([`CoSupForCausalLM`]): with Emb_seq in memory, which embeds the first passages for comparison.
        url (`str`): of the server, such as `http://host:8000/v1`.
        api_key (`str`, *optional*): of the server.
        batch_size (`int`): passages in a request.

    Raises:
        `ValueError`: if `url` is not a URL.
    """

    def __init__(self, model: CoSupForCausalLM, url: str, api_key: str | None = None, batch_size: int = 256) -> None:
        self.model = model
        self.batch_size = batch_size
        self.client = VllmClient(url, "encoder_url", api_key, max_connections=REQUESTS)
        self.is_compared = False
        self._loop = asyncio.new_event_loop()

    def __call__(self, token_ids: list[NDArray[np.int32]]) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        """
        Yield the rows of `token_ids`, as Emb_seq reads them, and their embeddings `(n, h)`, as they arrive.

        Raises:
            `ConnectionError`: if the server cannot be reached, refuses, or sends anything but finite embeddings.
            `ValueError`: if it serves another model.
        """
        try:
            if not self.is_compared:
                self._compare(token_ids[: min(NUM_COMPARED, self.batch_size)])
                self.is_compared = True
            yield from self._embed(token_ids)
        except BackendFailed as error:
            raise ConnectionError(f"{error} ({self.client.url})") from error

    def close(self) -> None:
        """Close the connections."""
        self._loop.run_until_complete(self.client.close())
        self._loop.close()

    def _embed(self, token_ids: list[NDArray[np.int32]]) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        starts = iter(range(0, len(token_ids), self.batch_size))
        tasks: set[asyncio.Task] = set()  # whose results were not given yet
        try:
            while True:
                for start in islice(starts, REQUESTS - len(tasks)):
                    tasks.add(self._loop.create_task(self._request(start, token_ids)))
                if not tasks:
                    return
                done, _ = self._loop.run_until_complete(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    yield task.result()
                    tasks.discard(task)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _request(self, start: int, token_ids: list[NDArray[np.int32]]) -> tuple[NDArray[np.int64], torch.Tensor]:
        batch = token_ids[start : start + self.batch_size]
        embeds = torch.from_numpy(await self.client.embed([ids.tolist() for ids in batch]))
        return np.arange(start, start + len(batch)), embeds

    def _compare(self, token_ids: list[NDArray[np.int32]]) -> None:
        """Raise a `ValueError` unless the server embeds these passages as the model does."""
        config, name = self.model.config, self.client.name
        max_model_len = self._loop.run_until_complete(self.client.max_model_len())
        longest = config.max_passage_length + sum(map(len, added_tokens(self.model.emb_seq_tokenizer, config)))
        if max_model_len < longest:
            raise ValueError(
                f"{name} reads {max_model_len} tokens, but a passage may have {longest}, with BOS and EOS: serve it"
                " with a longer --max-model-len."
            )
        _, served = self._loop.run_until_complete(self._request(0, token_ids))  # (n, h)
        if served.shape[1] != config.embedding_size:
            raise ValueError(
                f"{name} returns embeddings of width {served.shape[1]}, expected {config.embedding_size}: it serves"
                " another model."
            )
        with torch.no_grad():
            expected = self.model.encode_passages(
                *pad_rows([ids.tolist() for ids in token_ids], device=self.model._input_device())
            ).cpu()
        distance = ((self.model._normalize(served) - expected).norm(dim=1) / expected.norm(dim=1)).max()
        if not distance <= TOLERANCE:
            raise ValueError(
                f"{name} does not serve the Emb_seq of this checkpoint: its embeddings are {distance:.2f} of their"
                " length away. Serve what save_emb_seq wrote of it."
            )
