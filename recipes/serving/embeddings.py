"""Embeddings of passages and queries, in the shape of OpenAI's API."""

import asyncio
import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine import BackendFailed, Embeddings, Engine
from serving.errors import ApiError
from serving.protocol import EmbeddingBody


async def embed(engine: Engine, body: EmbeddingBody) -> bytes:
    """
    Return the response of `/v1/embeddings`, as JSON.

    It can hold millions of numbers. Other requests go on while they are written.

    Raises:
        [`ApiError`]: for another number of dimensions than the embeddings have, and a query that is more than a text.
        [`EngineError`]: of the engine, and for embeddings that are not finite: JSON has no NaN.
    """
    width = engine.config.embedding_size
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions is {body.dimensions}, expected {width}, or nothing.", "dimensions")
    embeddings = await _embeddings(engine, body)
    if not np.isfinite(embeddings.embeds).all():
        raise BackendFailed("The embeddings hold numbers that are not finite.")
    entries = []
    for index, vector in enumerate(embeddings.embeds):
        entry = {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        entries.append(_json(entry))
        await asyncio.sleep(0)  # other requests go on
    usage = {"prompt_tokens": embeddings.num_tokens, "total_tokens": embeddings.num_tokens}
    rest = _json({"object": "list", "model": body.model, "usage": usage})
    return rest[:-1] + b',"data":[' + b",".join(entries) + b"]}"


async def _embeddings(engine: Engine, body: EmbeddingBody) -> Embeddings:
    if body.input_type == "passage":
        return await engine.embed_passages([{"title": passage.title, "text": passage.text} for passage in body.input])
    if any(passage.title or passage.id or passage.metadata for passage in body.input):
        raise ApiError(400, "input: a query is a text, without title, id and metadata.", "input")
    return await engine.embed_queries([passage.text for passage in body.input])


def _encoded(vector: NDArray[np.float32], encoding_format: str) -> list[float] | str:
    """Return an embedding as numbers, or as the base64 of little-endian float32."""
    if encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
