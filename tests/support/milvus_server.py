"""A real Milvus Lite server on loopback, that tests start, kill and start again."""

import os
import socket
import subprocess
import sys
import time

import pytest


class MilvusServer:
    """Milvus Lite over a folder that outlives it, always on the same port."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        """Returns when the server answers."""
        command = [
            sys.executable,
            "-m",
            "milvus_lite",
            "server",
            "--data-dir",
            str(self.folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with open(f"{self.folder}.log", "a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"The Milvus server did not start: {open(f'{self.folder}.log').read()[-2000:]}")

    def kill(self):
        """As a machine that fails does: nothing is written or said any more."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def milvus_server(tmp_path_factory):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    server = MilvusServer(tmp_path_factory.mktemp("milvus") / "server").start()
    yield server
    server.kill()
