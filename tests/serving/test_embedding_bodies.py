"""The bodies of `/v1/embeddings`, which can hold millions of numbers: right, and written without holding others up."""

import asyncio
import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest

from serving.embeddings import embed
from serving.engine import BackendFailed, Embeddings
from serving.errors import ApiError
from serving.protocol import EmbeddingBody

EMBEDS = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


class EmbedsAll:
    """An engine with these embeddings for any texts."""

    config = SimpleNamespace(embedding_size=8)

    def __init__(self, embeds=EMBEDS):
        self.embeds = embeds

    async def embed_passages(self, passages):
        return Embeddings(self.embeds, 123)

    async def embed_queries(self, texts):
        return Embeddings(self.embeds, 123)


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
    vectors = [entry["embedding"] for entry in response["data"]]
    if encoding_format == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_array_equal(vectors, EMBEDS)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("input_type", ["passage", "query"])
def test_numbers_that_are_not_finite_are_no_embedding(number, encoding_format, input_type):
    embeds = EMBEDS.copy()
    embeds[7, 3] = number
    body = EmbeddingBody(model="m", input=["x"] * 40, encoding_format=encoding_format, input_type=input_type)
    with pytest.raises(BackendFailed, match="not finite"):
        asyncio.run(embed(EmbedsAll(embeds), body))


@pytest.mark.parametrize("more", [{"title": "a"}, {"id": "a"}, {"metadata": {"page": 1}}])
def test_a_query_is_only_a_text(more):
    body = EmbeddingBody(model="m", input=[{"text": "x", **more}], input_type="query")
    with pytest.raises(ApiError, match="a query is a text, without title, id and metadata"):
        asyncio.run(embed(EmbedsAll(), body))
    alone = EmbeddingBody(model="m", input=[{"text": "x", "metadata": {}}], input_type="query")
    assert asyncio.run(embed(EmbedsAll(EMBEDS[:1]), alone))
