"""The bodies of `/v1/embeddings`, which can hold millions of numbers: right, and written without holding others up."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

from serving.embeddings import embed
from serving.engine import Embeddings
from serving.protocol import EmbeddingBody

EMBEDS = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


class EmbedsAll:
    """An engine with these embeddings for any texts."""

    config = SimpleNamespace(embedding_size=8)

    async def embed_passages(self, passages):
        return Embeddings(EMBEDS, 123)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_other_requests_go_on_after_each_row_of_a_body(encoding_format):
    body = EmbeddingBody(model='mo"del', input=["x"] * 40, encoding_format=encoding_format)
    num_turns = 0

    async def others():
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def run():
        task = asyncio.create_task(others())
        content = await embed(EmbedsAll(), body)
        task.cancel()
        return content

    response = json.loads(asyncio.run(run()))
    assert num_turns >= len(EMBEDS)
    assert response["usage"] == {"prompt_tokens": 123, "total_tokens": 123}
    assert (response["object"], response["model"]) == ("list", 'mo"del')
    assert [entry["index"] for entry in response["data"]] == list(range(40))
    if encoding_format == "float":
        np.testing.assert_array_equal([entry["embedding"] for entry in response["data"]], EMBEDS)
