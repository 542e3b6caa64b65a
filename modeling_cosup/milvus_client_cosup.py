"""Requests to a Milvus server or file that are sent again while it does not answer."""

import json
import os
import time
from collections import Counter
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_REQUEST_ROWS = 4_096
MAX_REQUEST_BYTES = 16 * 2**20  # a server takes 64 MiB a message
NOT_LOADED = 101  # Milvus' code for a collection that is not in memory, e.g. after a restart
CANNOT_CONNECT = 2  # pymilvus' own code
TOKEN_VARIABLE = (
    "MILVUS_TOKEN"  # of the environment: a token on a command line would be seen in lists of processes, and in results
)

_open_files: Counter = (
    Counter()
)  # file mode: Milvus Lite runs in this process, once for each file, until its last connection is closed


class MilvusConnection:
    """
    A Milvus server, or a local file that Milvus Lite serves within this process, and one collection there.

    Args:
        uri, collection, token, timeout, max_retries: see [`MilvusPassageIndex`].

    Raises:
        `ImportError`: when pymilvus is missing.
        `ValueError`: when `uri` is neither a server nor a file that ends in `.db`, or holds a password, which messages and results would show.
    """

    def __init__(self, uri, collection, token=None, timeout=60.0, max_retries=5):
        milvus_packages()
        self.uri, self.collection, self.timeout, self.max_retries = str(uri), collection, timeout, max_retries
        self.token = token or os.environ.get(TOKEN_VARIABLE, "")
        self.is_file, self._client = "://" not in self.uri, None
        if self.is_file and not self.uri.endswith(".db"):
            raise ValueError(
                f"uri is {self.uri!r}, expected a server (http://host:19530) or a local file that ends in .db."
            )
        host = self.uri.partition("://")[2].partition("/")[0]
        if "@" in host:
            raise ValueError(
                f"uri holds a password; expected http://{host.rpartition('@')[2]}, and user:password in the variable {TOKEN_VARIABLE}."
            )

    def __str__(self):
        return f"Milvus at {self.uri}, collection {self.collection!r}"

    def call(self, method, doing, name_collection=True, **kwargs):
        """
        One method of the Milvus client, sent again while the server does not answer. All that is called here may arrive twice.

        Args:
            method (`str`): of `pymilvus.MilvusClient`.
            doing (`str`): for the error message.
            name_collection (`bool`): whether the method's first argument is the collection.
            **kwargs: for the method.

        Raises:
            `ConnectionError`: when it did not answer `max_retries + 1` times.
            `OSError`: when Milvus refuses the request.
        """
        pymilvus, grpc = milvus_packages()
        arguments = (self.collection,) if name_collection else ()
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(0.5 * 2 ** (attempt - 1))
            try:
                return self._send(method, *arguments, **kwargs)
            except (pymilvus.MilvusException, grpc.RpcError) as error:
                if not _may_pass(error, grpc):
                    raise OSError(f"{self}: failed while {doing}: {error}") from error
                failure = error
                logger.warning(f"{self}: no answer while {doing}, attempt {attempt + 1} of {self.max_retries + 1}.")
        raise ConnectionError(
            f"{self}: no answer to {self.max_retries + 1} attempts while {doing}: {failure}. Check that the server runs, and uri and token; "
            "then call again. A larger max_retries or timeout waits longer."
        ) from failure

    def _send(self, method, *arguments, **kwargs):
        pymilvus, _ = milvus_packages()
        client = self._connected()
        send = getattr(client, method)
        try:
            return send(*arguments, retry_times=0, **kwargs)  # pymilvus alone would try 75 times
        except pymilvus.MilvusException as error:
            if error.code != NOT_LOADED:
                raise
            client.load_collection(self.collection, retry_times=0)
            return send(*arguments, retry_times=0, **kwargs)

    def _connected(self):
        if self._client is None:
            pymilvus, _ = milvus_packages()
            # A deadline given to each call would make pymilvus go on trying until it is reached; and gRPC by itself waits up to two minutes
            # before it tries a server again that was away.
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
                    f"Milvus cannot open {self.uri}: {error.message}. A local file serves one process at a time; several need a server."
                ) from error
            _open_files[_file_key(self.uri)] += self.is_file
        return self._client

    def close(self):
        """Close the connection. A local file can be opened by another process when this was the last one to it in this process."""
        if self._client is None:
            return
        self._client.close()
        self._client = None
        if self.is_file:
            key = _file_key(self.uri)
            _open_files[key] -= 1
            if not _open_files[key]:
                _stop_milvus_lite(self.uri)


def milvus_packages():
    """
    The modules pymilvus and grpc, imported when they are first needed: they take a second.

    Raises:
        `ImportError`: says what to install.
    """
    try:
        import grpc
        import pymilvus
    except ImportError as error:
        raise ImportError('An index in Milvus needs pymilvus: pip install "cosup[milvus]".') from error
    return pymilvus, grpc


def split(items, size, limit):
    """Lists of items in order, each of at most `MAX_REQUEST_ROWS` items and `limit` in size (or one larger item)."""
    part, total = [], 0
    for item in items:
        if part and (len(part) == MAX_REQUEST_ROWS or total + size(item) > limit):
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


def _file_key(path):
    return str(Path(path).absolute())


def _stop_milvus_lite(path):
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError:
        return
    server_manager_instance.release_server(path)


def _may_pass(error, grpc):
    """Whether an error says that the server cannot be reached or is not ready, so that the same request may succeed later."""
    code = error.code() if callable(error.code) else error.code  # a method of gRPC's errors
    return code in (CANNOT_CONNECT, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
