"""Embeddings of passages and queries, in the shape of OpenAI's API."""

import asyncio
import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine import Engine
from serving.errors import ApiError
from serving.protocol import EmbeddingBody


async def embed(engine: Engine, body: EmbeddingBody) -> dict[str, Any]:
    """
    Return the response of `/v1/embeddings`.

    Raises:
        [`ApiError`]: for another number of dimensions than the embeddings have, and a query with a title.
        [`EngineError`]: of the engine.
    """
    width = engine.config.embedding_size
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions is {body.dimensions}, expected {width}, or nothing.", "dimensions")
    if body.input_type == "query":
        if any(passage.title or passage.id for passage in body.input):
            raise ApiError(400, "input: a query is a text, without title and id.", "input")
        embeds = await engine.embed_queries([passage.text for passage in body.input])
    else:
        embeds = await engine.embed_passages([passage.model_dump() for passage in body.input])
    num_tokens = 0
    for passage in body.input:
        num_tokens += len(engine.tokenizer(f"{passage.title} {passage.text}".strip())["input_ids"])
        await asyncio.sleep(0)  # other requests go on
    data = []
    for index, embed in enumerate(embeds):
        data.append({"object": "embedding", "index": index, "embedding": _encoded(embed, body.encoding_format)})
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _encoded(embed: NDArray[np.float32], encoding_format: str) -> list[float] | str:
    """Return an embedding as numbers, or as the base64 of little-endian float32."""
    if encoding_format == "float":
        return embed.tolist()
    return base64.b64encode(embed.astype("<f4").tobytes()).decode()
