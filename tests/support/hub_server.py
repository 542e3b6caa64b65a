"""
A server on loopback that speaks the Hugging Face Hub's protocol with the genuine client, for tests that push, kill it, and push again.

    python tests/support/hub_server.py --root DIR

prints its URL as the first line. What it has accepted lies in `DIR` and is there when it is started again. It has one account and one token.
Not the Hub: no Xet (clients set `HF_HUB_DISABLE_XET=1`), no pull requests, no redirects to a content network, one page of 1,000 files.

Tests use `hub_server(root)` or the fixture `hub`. The client reads its environment when it is imported, and tests are offline: code that
talks to this server runs in a process of its own, `hub.run(code)`.
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
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from support.hub_handler import HubHandler
from support.hub_store import HubStore, write_whole

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
    """`HubHandler`'s server: what all requests share."""

    daemon_threads = True

    def __init__(self, root, port, token, stall_after_bytes, multipart_above, page_size):
        super().__init__(("127.0.0.1", port), HubHandler)
        self.url, self.store, self.token = f"http://127.0.0.1:{self.server_port}", HubStore(root), token
        self.stall_after_bytes, self.multipart_above, self.page_size = stall_after_bytes, multipart_above, page_size
        self.taken, self.log_lock = 0, threading.Lock()  # bytes of LFS objects since the start
        secret = self.store.root / "secret"
        if not secret.exists():
            write_whole(secret, secrets.token_bytes(32))
        self.secret = secret.read_bytes()

    def log(self, **request):
        """One JSON line for each request: method, path without its query, status, bytes received. Never a header."""
        with self.log_lock, open(self.store.root / "requests.jsonl", "a") as file:
            file.write(json.dumps(request) + "\n")

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave
            super().handle_error(request, client_address)


class Hub:
    """
    A server process over the folder `root`, and what a client of it needs. After `kill()`, `start()` continues on the same port.

    Args:
        root (`Path`): the server's folder; clients' caches and working folders go beside it.
        options: command line options of the server, as `stall_after_bytes=1000`.
    """

    def __init__(self, root, **options):
        self.root, self.token, self.user, self.process, self.port = Path(root), TOKEN, "tester", None, 0
        self.options = options

    def start(self, **options):
        """Starts the server; `options` replace those that it was made with."""
        self.options = {**self.options, **options}
        chosen = {
            name: value
            for name, value in {"root": self.root, "port": self.port, **self.options}.items()
            if value is not None
        }
        command = [
            sys.executable,
            __file__,
            *(text for name, value in chosen.items() for text in (f"--{name}", str(value))),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # tests/, for `support`
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.endpoint = self.process.stdout.readline().strip()
        if not self.endpoint:
            raise RuntimeError(f"The test Hub did not start: exit status {self.process.wait()}")
        self.port = int(self.endpoint.rsplit(":", 1)[1])
        return self

    def kill(self):
        """As a machine that fails does (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def environment(self, home=None, token=TOKEN):
        """The environment of a client: this endpoint, `token` (`None` for none) and a Hugging Face folder, a new one if `home` is `None`."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "no_proxy", "NO_PROXY"))
        }
        home = home or tempfile.mkdtemp(dir=self.root.parent, prefix="hf_home_")
        ours = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
        }  # not absent: conftest.py would set it to 1
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **ours, **({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})}

    def popen(self, code, *args, home=None, token=TOKEN, package=True):
        """Starts `python -c code` as a client, in an empty folder; `args` are its `sys.argv[1:]`, as text. See `run`."""
        tests = Path(__file__).parents[1]
        environment = {
            **self.environment(home, token),
            "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        }  # this checkout, and the helpers of its tests
        if not package:
            code = BLOCK_PACKAGES + code
            del environment["PYTHONPATH"]
        elsewhere = tempfile.mkdtemp(dir=self.root.parent, prefix="cwd_")
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)], env=environment, cwd=elsewhere, **streams
        )

    def run(self, code, *args, home=None, token=TOKEN, package=True, timeout=300):
        """
        Runs `code` in a process with the genuine client, by default with an empty cache.

        Args:
            code (`str`): a program whose last printed line is JSON.
            args: its `sys.argv[1:]`.
            home (`Path`, *optional*): the `HF_HOME` to use, for a cache that several programs share.
            token (`str`, *optional*): another token than the right one; `None` for none.
            package (`bool`): False if `modeling_cosup` and `trainer` must not be importable; else they and `support` are this checkout's.

        Returns:
            What the last line holds. An `AssertionError` with the program's stderr if it failed.
        """
        process = self.popen(code, *args, home=home, token=token, package=package)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def requests(self, method=None):
        """The requests answered so far, those of `method`: dicts of method, path, status ("stalled" too) and bytes received."""
        log = self.root / "requests.jsonl"
        requests = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [request for request in requests if method in (None, request["method"])]

    def wait_for_stall(self):
        """Returns when an upload has come to `stall_after_bytes`; a `RuntimeError` if none has after two minutes."""
        for _ in range(6000):
            if any(request["status"] == "stalled" for request in self.requests()):
                return
            time.sleep(0.02)
        raise RuntimeError(
            f"No upload came to the {self.options['stall_after_bytes']} bytes at which the test Hub stalls"
        )


@contextmanager
def hub_server(root, **options):
    """A running `Hub` over `root`, killed at the end."""
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


def main():
    parser = argparse.ArgumentParser(
        description="A server that speaks the Hugging Face Hub's protocol on loopback, for tests"
    )
    parser.add_argument("--root", required=True, help="folder that holds everything, kept between runs")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--token", default=TOKEN, help="the only token it knows")
    parser.add_argument(
        "--stall_after_bytes", type=int, help="read that many bytes of LFS objects, then nothing more of them"
    )
    parser.add_argument(
        "--multipart_above", type=int, default=2**24, help="objects of more bytes come in parts of that size"
    )
    parser.add_argument("--page_size", type=int, default=1000, help="entries of a tree in one answer")
    server = HubHTTPServer(**vars(parser.parse_args()))
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
