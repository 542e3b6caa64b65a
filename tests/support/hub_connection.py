"""Requests and responses of the test Hub: routing, tokens, bodies and ranges. hub_handler.py has the endpoints."""

import hmac
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_store import HubError, Repository

CHUNK = 2**16  # bytes read and written at a time


class HubConnection(BaseHTTPRequestHandler):
    """One connection. Its `server` is a `hub_server.HubHTTPServer` with store, token, secret, options and log."""

    protocol_version = "HTTP/1.1"
    # (methods, pattern of the path, endpoint, access: "read", "write" or "signed")
    routes: list[tuple[tuple[str, ...], str, Callable, str]] = []

    def handle_any(self) -> None:
        """Find the endpoint and its repository, check that the caller may use it, and call it."""
        url = urlsplit(self.path)
        self.unread = int(self.headers.get("Content-Length") or 0)  # bytes of the body
        self.received = 0
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True  # where the body ends is unknown
                raise HubError(411, "A body needs a Content-Length")
            endpoint, access, match = self.route(url.path)
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            self.authorise(access)
            if "repo" in arguments:
                kind, repo_id = arguments.pop("kind", "model"), arguments.pop("repo")
                endpoint(self, repo=self.repository(kind, repo_id, access), **arguments)
            else:
                endpoint(self, **arguments)
        except HubError as error:
            headers = {"X-Error-Message": str(error).encode("ascii", "replace").decode()}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer({"error": str(error)}, error.status, headers)
        for _ in self.chunks():
            pass  # the next request of this connection begins after the body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path: str) -> tuple[Callable, str, re.Match]:
        """Return the endpoint of this request, the access that it needs, and the match with its arguments."""
        for methods, pattern, endpoint, access in self.routes:
            match = re.fullmatch(pattern, path)
            if self.command in methods and match is not None:
                return endpoint, access, match
        raise HubError(404, f"The test Hub has no endpoint {self.command} {path}")

    def authorise(self, access: str) -> None:
        """Refuse, as the Hub does, a wrong token everywhere, and a missing one if `access` is "write"."""
        authorization = self.headers.get("Authorization")
        expected = f"Bearer {self.server.token}"
        self.is_known = authorization is not None and hmac.compare_digest(authorization.encode(), expected.encode())
        if authorization is not None and not self.is_known:
            raise HubError(401, "Invalid credentials in Authorization header")
        if access == "write" and not self.is_known:
            raise HubError(401, "Invalid username or password.")

    def repository(self, kind: str, repo_id: str, access: str) -> Repository:
        """
        Return a repository that the caller may see.

        A private one needs the token, or a signed address, which the endpoint checks.
        """
        repo = self.server.store.get(kind, repo_id)
        if repo.settings["private"] and not self.is_known and access != "signed":
            raise HubError(401, "Repository not found", "RepoNotFound")
        return repo

    # the request

    def chunks(self) -> Iterator[bytes]:
        """Yield the rest of the body."""
        while self.unread and (chunk := self.rfile.read(min(CHUNK, self.unread))):
            self.unread -= len(chunk)
            self.received += len(chunk)
            yield chunk
        if self.unread:
            raise ConnectionError("the client went away")

    def json(self) -> Any:
        """Return the body as JSON."""
        try:
            return json.loads(b"".join(self.chunks()))
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from None

    def object_chunks(self) -> Iterator[bytes]:
        """
        Yield the bytes of an LFS object.

        After `stall_after_bytes` of all objects together, nothing more is read until the server is killed.
        """
        limit = self.server.stall_after_bytes
        for chunk in self.chunks():
            if limit is not None and self.server.object_bytes + len(chunk) > limit:
                path = urlsplit(self.path).path
                self.server.log(method=self.command, path=path, status="stalled", received=self.received)
                threading.Event().wait()
            self.server.object_bytes += len(chunk)
            yield chunk

    # the response

    def answer(
        self,
        value: Any = None,
        status: int = 200,
        headers: dict[str, str] | None = None,
        data: Iterable[bytes] | None = None,
    ) -> None:
        """Send `value` as JSON, or the bytes that `data` yields, whose `Content-Length` is in `headers`."""
        body = b"" if value is None else json.dumps(value, default=str).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        self.server.log(method=self.command, path=urlsplit(self.path).path, status=status, received=self.received)
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            for chunk in [body] if data is None else data:
                self.wfile.write(chunk)

    def log_message(self, *args: Any) -> None:
        pass  # tests read the server's own log, which holds no headers

    def url(self, repo: Repository, rest: str = "") -> str:
        """Return an address in a repository."""
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        return f"{self.server.url}/{prefix}{repo.id}{rest}"

    def send_range(self, path: Path, size: int, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that the request names."""
        first, last = 0, size - 1
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            first = int(match[1])
            if match[2]:
                last = min(int(match[2]), last)
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            if first > last:
                self.answer(status=416, headers={**headers, "Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
        count = last + 1 - first
        headers["Content-Length"] = str(count)
        self.answer(status=status, headers=headers, data=read_range(path, first, count))


def read_range(path: Path, start: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes of a file from `start` on."""
    with open(path, "rb") as file:
        file.seek(start)
        while count and (chunk := file.read(min(CHUNK, count))):
            count -= len(chunk)
            yield chunk
