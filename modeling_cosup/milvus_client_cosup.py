"""Requests to a Milvus server or file, sent again while it does not answer."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from .index_search_cosup import nothing
from .retriever_cosup import SearchResults

logger = logging.get_logger(__name__)

MAX_REQUEST_ROWS = 4_096
MAX_REQUEST_BYTES = 16 * 2**20  # a server accepts messages of up to 64 MiB
NOT_LOADED = 101  # Milvus's error code for a collection that is not in memory, e.g. after a restart
CANNOT_CONNECT = 2  # pymilvus's error code
RATE_LIMIT = 8  # Milvus's error code; it allows one flush of a collection in ten seconds, for example
RATE_LIMIT_SECONDS = 10
GETS_READY = (103, 106, 503)  # Milvus's error codes for a collection or channel that is being loaded or recovers
# An environment variable: a token on the command line would be visible in lists of processes and in results
TOKEN_VARIABLE = "MILVUS_TOKEN"

# Connections to each local file: Milvus Lite runs in this process, once per file, until the last one is closed
_open_files: Counter[str] = Counter()
T = TypeVar("T")


class MilvusConnection:
    """
    A Milvus server, or a local file that Milvus Lite serves within this process, and one collection in it.

    Args:
        uri, collection, token, timeout, max_retries: see [`MilvusPassageIndex`].

    Raises:
        `ImportError`: if pymilvus is missing.
        `ValueError`: if `uri` is neither a server nor a file that ends in `.db`, or holds a password, which would
            appear in messages and results.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        collection: str,
        token: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        milvus_packages()
        self.uri = str(uri)
        self.collection = collection
        self.token = token or os.environ.get(TOKEN_VARIABLE, "")
        self.timeout = timeout
        self.max_retries = max_retries
        self.is_file = "://" not in self.uri
        self._client: Any = None  # a pymilvus.MilvusClient, made by the first request
        if self.is_file and not self.uri.endswith(".db"):
            raise ValueError(
                f"uri is {self.uri!r}, expected a server (http://host:19530) or a local file that ends in .db."
            )
        host = self.uri.partition("://")[2].partition("/")[0]
        if "@" in host:
            raise ValueError(
                f"uri holds a password; expected http://{host.rpartition('@')[2]}, and user:password in the variable"
                f" {TOKEN_VARIABLE}."
            )

    def __str__(self) -> str:
        return f"Milvus at {self.uri}, collection {self.collection!r}"

    def call(self, method: str, doing: str, name_collection: bool = True, **kwargs: Any) -> Any:
        """
        Call a method of the Milvus client; if the server does not answer, or not yet, call it again.

        A request may arrive twice, so call only methods for which that is harmless.

        Args:
            method (`str`): name of a method of `pymilvus.MilvusClient`.
            doing (`str`): what it does, for the error message, e.g. `"searching"`.
            name_collection (`bool`): whether the method's first argument is the collection.
            **kwargs: arguments of the method.

        Raises:
            `ConnectionError`: if the server did not answer, or was still not ready, after `max_retries + 1` calls.
            `OSError`: if Milvus refuses the request.
        """
        pymilvus, grpc = milvus_packages()
        arguments = (self.collection,) if name_collection else ()
        failure: Any = None
        for attempt in range(self.max_retries + 1):
            if attempt:
                seconds = 0.5 * 2 ** (attempt - 1)
                time.sleep(max(seconds, RATE_LIMIT_SECONDS) if _code(failure) == RATE_LIMIT else seconds)
            try:
                return self._send(method, *arguments, **kwargs)
            except (pymilvus.MilvusException, grpc.RpcError) as error:
                if not _may_pass(error, grpc):
                    raise OSError(f"{self}: failed while {doing}: {error}") from error
                failure = error
                logger.warning(f"{self}: no answer while {doing}, attempt {attempt + 1} of {self.max_retries + 1}.")
        raise ConnectionError(
            f"{self}: no answer to {self.max_retries + 1} attempts while {doing}: {failure}. Check that the server"
            " runs, and uri and token; then call again. A larger max_retries or timeout waits longer."
        ) from failure

    def _send(self, method: str, *arguments: str, **kwargs: Any) -> Any:
        """Call a method once; if the server has unloaded the collection, e.g. by a restart, load it and call again."""
        pymilvus, _ = milvus_packages()
        client = self._connected()
        send = getattr(client, method)
        try:
            return send(*arguments, retry_times=0, **kwargs)  # pymilvus retries 75 times by default
        except pymilvus.MilvusException as error:
            if error.code != NOT_LOADED:
                raise
            client.load_collection(self.collection, retry_times=0)
            return send(*arguments, retry_times=0, **kwargs)

    def _connected(self) -> Any:
        """Return the client, connecting it first if needed."""
        if self._client is not None:
            return self._client
        pymilvus, _ = milvus_packages()
        # Set in gRPC, because pymilvus would retry until a deadline that is passed with a call. And by default gRPC
        # waits up to two minutes before it reconnects to a server that was away.
        deadline = json.dumps({"methodConfig": [{"name": [{}], "timeout": f"{self.timeout}s"}]})
        grpc_options = {
            "grpc.service_config": deadline,
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 500,
        }
        options = {"dedicated": True, "timeout": min(self.timeout, 10), "grpc_options": grpc_options}
        try:
            self._client = pymilvus.MilvusClient(self.uri, token=self.token, **options)
        except pymilvus.exceptions.ConnectionConfigException as error:
            raise OSError(
                f"Milvus cannot open {self.uri}: {error.message}. A local file serves one process at a time; several"
                " need a server."
            ) from error
        if self.is_file:
            _open_files[_file_key(self.uri)] += 1
        return self._client

    def close(self) -> None:
        """Close the connection. Once all connections to a local file are closed, another process can open it."""
        if self._client is None:
            return
        self._client.close()
        self._client = None
        if self.is_file:
            key = _file_key(self.uri)
            _open_files[key] -= 1
            if not _open_files[key]:
                _stop_milvus_lite(self.uri)

    # ------------------------------------------------------------------ reading

    def query(self, expression: str, fields: list[str], consistency_level: str = "Session") -> list[dict[str, Any]]:
        """Read fields of the passages that match a filter expression."""
        options: dict[str, Any] = {"output_fields": fields, "consistency_level": consistency_level}
        return self.call("query", "reading passages", filter=expression, **options)

    def query_rows(self, rows: list[int], fields: list[str], step: int) -> Iterator[dict[str, Any]]:
        """Read fields of the rows that hold a passage, `step` rows per request."""
        for start in range(0, len(rows), step):
            yield from self.query(f"row in {rows[start : start + step]}", fields)

    def rows_of_ids(self, ids: list[str], consistency_level: str = "Session") -> dict[str, int]:
        """Return the rows of the ids that are in the collection; with `"Strong"`, whichever process wrote them."""
        rows: dict[str, int] = {}
        quoted = [quote(id) for id in dict.fromkeys(ids)]
        for part in split(quoted, len, MAX_REQUEST_BYTES // 4):  # of characters, up to four bytes each
            hits = self.query(f"id in [{', '.join(part)}]", ["row", "id"], consistency_level)
            rows.update({hit["id"]: hit["row"] for hit in hits})
        return rows

    def fetch_embeddings(self, rows: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows that hold a passage, of sorted `rows`, and their embeddings `(M, size)`."""
        step = max(1, min(MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * size)))
        hits = list(self.query_rows(rows.tolist(), ["row", "embedding"], step))
        live_rows = np.array([hit["row"] for hit in hits], np.int64)
        embeddings = np.array([hit["embedding"] for hit in hits], np.float32).reshape(len(hits), size)
        order = np.argsort(live_rows)
        return live_rows[order], embeddings[order]

    def search(
        self, queries: NDArray[np.float32], k: int, search_params: dict[str, Any], expression: str = ""
    ) -> SearchResults:
        """Search in one request, among the rows that match a filter expression; see [`Retriever.search`]."""
        options: dict[str, Any] = {
            "limit": k,
            "filter": expression,
            "anns_field": "embedding",
            "output_fields": ["row"],
            "consistency_level": "Session",
            "search_params": {"metric_type": "IP", "params": search_params},
        }
        scores, rows = nothing(len(queries), k)
        for i, hits in enumerate(self.call("search", "searching", data=list(queries), **options)):
            scores[i, : len(hits)] = [hit["distance"] for hit in hits]
            rows[i, : len(hits)] = [hit["row"] for hit in hits]
        return scores, rows


def milvus_packages() -> tuple[ModuleType, ModuleType]:
    """
    Import and return the modules pymilvus and grpc; only when they are needed, because it takes a second.

    Raises:
        `ImportError`: says what to install.
    """
    try:
        import grpc
        import pymilvus
    except ImportError as error:
        raise ImportError('An index in Milvus needs pymilvus: pip install "cosup[milvus]".') from error
    return pymilvus, grpc


def split(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield lists of items in order, each of at most `MAX_REQUEST_ROWS` items and size `limit`, or one larger item."""
    part: list[T] = []
    total = 0
    for item in items:
        item_size = size(item)
        if part and (len(part) == MAX_REQUEST_ROWS or total + item_size > limit):
            yield part
            part, total = [], 0
        part.append(item)
        total += item_size
    if part:
        yield part


def quote(text: str) -> str:
    """Return a string literal for Milvus's filter language, which has fewer escapes than JSON."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f'"{text}"'


def _file_key(path: str) -> str:
    return str(Path(path).absolute())


def _stop_milvus_lite(path: str) -> None:
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError:
        return
    server_manager_instance.release_server(path)


def _may_pass(error: Any, grpc: ModuleType) -> bool:
    """Return whether the server was unreachable or not ready, so that the same request may succeed later."""
    no_answer = (CANNOT_CONNECT, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return _code(error) in (*no_answer, RATE_LIMIT, *GETS_READY)


def _code(error: Any) -> Any:
    return error.code() if callable(error.code) else error.code  # a method in gRPC's errors
