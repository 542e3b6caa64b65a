"""
A server on loopback that speaks the Hugging Face Hub's protocol, for tests that push, kill it, and push again.

    python tests/support/hub_server.py --root DIR

prints its URL as the first line. It keeps everything in `DIR`, also for the next start. It has one account and one
token. Unlike the Hub it has no Xet (clients set `HF_HUB_DISABLE_XET=1`), no pull requests and no redirects to a
content network, and a page holds 1,000 files.

Tests use `hub_server(root)` or the fixture `hub`. The genuine client reads its environment when it is imported, and
tests are offline, so code that talks to this server runs in a separate process: `hub.run(code)`, or `hub.popen(code)`
for one that can be killed.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.forks import ENVIRONMENT, run_forked
from support.hub_handler import HubHandler
from support.hub_store import HubStore, write_atomically

TESTS = Path(__file__).parents[1]
TOKEN = "hf_of_the_test_hub"
BLOCK_PACKAGES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_cosup", "trainer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


class HubHTTPServer(ThreadingHTTPServer):
    """The server of `HubHandler`: what all requests share."""

    daemon_threads = True

    def __init__(
        self,
        root: str | Path,
        port: int,
        token: str,
        stall_after_bytes: int | None,
        multipart_above: int,
        page_size: int,
    ) -> None:
        super().__init__(("127.0.0.1", port), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = HubStore(root)
        self.token = token
        self.stall_after_bytes = stall_after_bytes
        self.multipart_above = multipart_above
        self.page_size = page_size
        self.object_bytes = 0  # bytes of LFS objects received since the start
        self.log_lock = threading.Lock()
        secret = self.store.root / "secret"
        if not secret.exists():
            write_atomically(secret, secrets.token_bytes(32))
        self.secret = secret.read_bytes()

    def log(self, **request: Any) -> None:
        """Write one JSON line about a request: method, path without its query, status, bytes received; no headers."""
        with self.log_lock, open(self.store.root / "requests.jsonl", "a") as file:
            file.write(json.dumps(request) + "\n")

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave
            super().handle_error(request, client_address)


class Hub:
    """
    A server process on a folder, and what its clients need. After `kill()`, `start()` continues on the same port.

    Args:
        root (`Path`): the server's folder. Caches and working folders of clients are created next to it.
        options: command line options of the server, such as `stall_after_bytes=1000`.
    """

    def __init__(self, root: str | Path, **options: Any) -> None:
        self.root = Path(root)
        self.token = TOKEN
        self.user = "tester"
        self.process: subprocess.Popen | None = None
        self.port = 0
        self.options = options

    def start(self, **options: Any) -> "Hub":
        """Start the server; `options` override those of the constructor."""
        self.options = {**self.options, **options}
        command = [sys.executable, __file__]
        for name, value in {"root": self.root, "port": self.port, **self.options}.items():
            if value is not None:
                command += [f"--{name}", str(value)]
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}  # for `support`
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.endpoint = self.process.stdout.readline().strip()
        if not self.endpoint:
            raise RuntimeError(f"The test Hub did not start: exit status {self.process.wait()}")
        self.port = int(self.endpoint.rsplit(":", 1)[1])
        return self

    def kill(self) -> None:
        """Kill the server as a failing machine does (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def environment(self, home: Path | None = None, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a client; see `run`. Without `home`, its Hugging Face folder is a new one."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "no_proxy", "NO_PROXY")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or tempfile.mkdtemp(dir=self.root.parent, prefix="hf_home_")),
            "HF_HUB_OFFLINE": "0",  # if it is not set, conftest.py sets it to 1
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        if token:
            environment["HF_TOKEN"] = token
        else:
            environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        return environment

    def popen(
        self, code: str, *args: Any, home: Path | None = None, token: str | None = TOKEN, package: bool = True
    ) -> subprocess.Popen:
        """Start `python -c code` as a client, in an empty folder; see `call`. Its imports take seconds."""
        environment = self.environment(home, token)
        if package:
            environment["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
        else:
            environment.pop("PYTHONPATH", None)
            code = BLOCK_PACKAGES + code
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            env=environment,
            cwd=tempfile.mkdtemp(dir=self.root.parent, prefix="cwd_"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(
        self,
        code: str,
        *args: Any,
        home: Path | None = None,
        token: str | None = TOKEN,
        package: bool = True,
        variables: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run code in a process with the genuine client, by default with an empty cache.

        Args:
            code (`str`): a program.
            args: its `sys.argv[1:]`.
            home (`Path`, *optional*): its `HF_HOME`, for a cache that several programs share.
            token (`str`, *optional*): its token, by default the right one; `None` for none.
            package (`bool`): whether it imports `modeling_cosup`, `trainer` and `support` from this checkout; `False`
                makes them impossible to import.
            variables (`Mapping[str, str]`, *optional*): further environment variables.
            timeout (`float`): seconds.

        Raises:
            `AssertionError`: with the program's stderr, if it failed.
        """
        environment: dict[str, str | None] = {**self.environment(home, token), **(variables or {})}
        removed = dict.fromkeys(set(ENVIRONMENT) - set(environment) - {"PYTHONPATH"})
        folder = Path(tempfile.mkdtemp(dir=self.root.parent, prefix="cwd_"))
        ended = run_forked(
            "-c", code, *args, cwd=folder, env={**removed, **environment}, package=package, timeout=timeout
        )
        assert ended.returncode == 0, ended.stderr
        return ended

    def run(self, code: str, *args: Any, **options: Any) -> Any:
        """Return the JSON in the last line that code prints; the arguments are those of `call`."""
        return json.loads(self.call(code, *args, **options).stdout.splitlines()[-1])

    def requests(self, method: str | None = None) -> list[dict[str, Any]]:
        """Return the requests answered so far: method, path, status (or "stalled") and bytes received of each."""
        log = self.root / "requests.jsonl"
        if not log.exists():
            return []
        requests = [json.loads(line) for line in log.read_text().splitlines()]
        return [request for request in requests if method in (None, request["method"])]

    def wait_for_stall(self) -> None:
        """Wait until an upload has reached `stall_after_bytes`; raise a `RuntimeError` after two minutes."""
        for _ in range(6000):
            if any(request["status"] == "stalled" for request in self.requests()):
                return
            time.sleep(0.02)
        limit = self.options["stall_after_bytes"]
        raise RuntimeError(f"No upload reached the {limit} bytes at which the test Hub stalls")


@contextmanager
def hub_server(root: str | Path, **options: Any) -> Iterator[Hub]:
    """Yield a running `Hub` on a folder; it is killed at the end."""
    hub = Hub(root, **options).start()
    try:
        yield hub
    finally:
        hub.kill()


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("jsonschema", reason="jsonschema, which the test Hub checks cards with, is not installed")
    with hub_server(tmp_path / "hub") as running:
        yield running


def main() -> None:
    description = "A server that speaks the Hugging Face Hub's protocol on loopback, for tests"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--root", required=True, help="folder that holds everything, kept between runs")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--token", default=TOKEN, help="the only token it knows")
    parser.add_argument("--stall_after_bytes", type=int, help="stop reading LFS objects after so many bytes")
    parser.add_argument("--multipart_above", type=int, default=2**24, help="largest size of an upload in one part")
    parser.add_argument("--page_size", type=int, default=1000, help="entries of a tree in one response")
    server = HubHTTPServer(**vars(parser.parse_args()))
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
