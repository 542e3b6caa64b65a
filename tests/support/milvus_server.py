"""A real Milvus Lite server on loopback, which tests start, kill and start again."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class MilvusServer:
    """Milvus Lite over a folder that outlives it, always on the same port."""

    process: subprocess.Popen | None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> "MilvusServer":
        """Start the server, and return when it answers."""
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self.folder), *address]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log_path = Path(f"{self.folder}.log")
        with open(log_path, "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"The Milvus server did not start: {log_path.read_text()[-2000:]}")

    def kill(self) -> None:
        """End the server as a failing machine does: nothing more is written or sent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    server = MilvusServer(tmp_path_factory.mktemp("milvus") / "server").start()
    yield server
    server.kill()
