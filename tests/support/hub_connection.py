"""Requests and answers of the test Hub: who may ask, what comes in, what goes out. hub_handler.py has the endpoints."""

import hmac
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_store import HubError

CHUNK = 2**16  # bytes read and written at a time


class HubConnection(BaseHTTPRequestHandler):
    """One connection. `server` is `hub_server.HubHTTPServer`: store, token, secret, options and log."""

    protocol_version = "HTTP/1.1"
    routes: list = []  # (methods, pattern of the path, endpoint, access: "read", "write" or "signed")

    def handle_any(self):
        """Finds the endpoint, its repository and whether this caller may use it; reads what is left of the body."""
        self.left = int(self.headers.get("Content-Length") or 0)
        self.received, url = 0, urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True  # where its body ends is not known
                raise HubError(411, "A body needs a Content-Length")
            endpoint, access, found = self.route(url.path)
            groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
            self.authorise(access)
            if "repo" in groups:
                groups["repo"] = self.repository(groups.pop("kind", "model"), groups["repo"], access)
            endpoint(self, **groups)
        except HubError as error:
            headers = {"X-Error-Message": str(error).encode("ascii", "replace").decode()} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
            self.answer({"error": str(error)}, error.status, headers)
        for _ in self.chunks():
            pass  # the next request of this connection begins behind the body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path):
        """The endpoint for this request, what it needs, and the match that holds its arguments."""
        for methods, pattern, endpoint, access in self.routes:
            if self.command in methods and (found := re.fullmatch(pattern, path)):
                return endpoint, access, found
        raise HubError(404, f"The test Hub has no endpoint {self.command} {path}")

    def authorise(self, access):
        """A token that is not the right one is refused everywhere, a missing one where `access` is "write" (as on the Hub)."""
        given = self.headers.get("Authorization")
        self.known = given is not None and hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode())
        if given is not None and not self.known:
            raise HubError(401, "Invalid credentials in Authorization header")
        if access == "write" and not self.known:
            raise HubError(401, "Invalid username or password.")

    def repository(self, kind, repo_id, access):
        """A private repository exists only for who knows the token, or brings a signed address (checked by the endpoint)."""
        repo = self.server.store.get(kind, repo_id)
        if repo.settings["private"] and not self.known and access != "signed":
            raise HubError(401, "Repository not found", "RepoNotFound")
        return repo

    # what comes in

    def chunks(self):
        while self.left and (chunk := self.rfile.read(min(CHUNK, self.left))):
            self.left -= len(chunk)
            self.received += len(chunk)
            yield chunk
        if self.left:
            raise ConnectionError("the client went away")

    def json(self):
        try:
            return json.loads(b"".join(self.chunks()))
        except ValueError as error:
            raise HubError(400, f"The body is no JSON: {error}") from None

    def object_chunks(self):
        """An object's bytes; after `stall_after_bytes` of all objects' nothing is read any more, until the server is killed."""
        for chunk in self.chunks():
            if (
                self.server.stall_after_bytes is not None
                and self.server.taken + len(chunk) > self.server.stall_after_bytes
            ):
                self.server.log(
                    method=self.command, path=urlsplit(self.path).path, status="stalled", received=self.received
                )
                threading.Event().wait()
            self.server.taken += len(chunk)
            yield chunk

    # what goes out

    def answer(self, value=None, status=200, headers=None, data=None):
        """Sends `value` as JSON, or the bytes that `data` yields (their `Content-Length` is in `headers`); never both."""
        body = b"" if value is None else json.dumps(value, default=str).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        self.server.log(method=self.command, path=urlsplit(self.path).path, status=status, received=self.received)
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            for chunk in data if data is not None else [body]:
                self.wfile.write(chunk)

    def log_message(self, *args):
        pass  # the server's own log holds what tests read, and no header

    def url(self, repo, rest=""):
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        return f"{self.server.url}/{prefix}{repo.id}{rest}"

    def send_range(self, path, size, headers):
        first, last, status = 0, size - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(asked[1]), min(int(asked[2] or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            if first > last:
                self.answer(status=416, headers={**headers, "Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
        self.answer(
            status=status,
            headers={**headers, "Content-Length": str(last + 1 - first)},
            data=read_range(path, first, last + 1 - first),
        )


def read_range(path, start, count):
    with open(path, "rb") as file:
        file.seek(start)
        while count and (chunk := file.read(min(CHUNK, count))):
            count -= len(chunk)
            yield chunk
