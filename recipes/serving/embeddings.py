"""Embeddings of passages and queries, in the shape of OpenAI's API."""

import asyncio
import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine import Embeddings, Engine
from serving.errors import ApiError
from serving.protocol import EmbeddingBody


async def embed(engine: Engine, body: EmbeddingBody) -> bytes:
    """
    Return the response of `/v1/embeddings`, as JSON.

    It can hold millions of numbers. Other requests go on while they are written.

    Raises:
        [`ApiError`]: for another number of dimensions than the embeddings have, and a query with a title.
        [`EngineError`]: of the engine.
    """
    width = engine.config.embedding_size
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions is {body.dimensions}, expected {width}, or nothing.", "dimensions")
    embeddings = await _embeddings(engine, body)
    entries = []
    for index, embed in enumerate(embeddings.embeds):
        entry = {"object": "embedding", "index": index, "embedding": _encoded(embed, body.encoding_format)}
        entries.append(_json(entry))
        await asyncio.sleep(0)  # other requests go on
    usage = {"prompt_tokens": embeddings.num_tokens, "total_tokens": embeddings.num_tokens}
    rest = _json({"object": "list", "model": body.model, "usage": usage})
    return rest[:-1] + b', "data": [' + b", ".join(entries) + b"]}"


async def _embeddings(engine: Engine, body: EmbeddingBody) -> Embeddings:
    if body.input_type == "passage":
        return await engine.embed_passages([{"title": passage.title, "text": passage.text} for passage in body.input])
    if any(passage.title or passage.id for passage in body.input):
        raise ApiError(400, "input: a query is a text, without title and id.", "input")
    return await engine.embed_queries([passage.text for passage in body.input])


def _encoded(embed: NDArray[np.float32], encoding_format: str) -> list[float] | str:
    """Return an embedding as numbers, or as the base64 of little-endian float32."""
    if encoding_format == "float":
        return embed.tolist()
    return base64.b64encode(embed.astype("<f4").tobytes()).decode()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
